"""What is run: tasks × policies × budgets as cells, and the configuration that decides samples."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from raas_jax import identity, policies
from raas_jax.lab.runs.decoding import Decoding
from raas_jax.lab.tasks.base import Task
from raas_jax.params import Params
from raas_jax.policies import Policy


@dataclasses.dataclass(frozen=True)
class Cell:
    """One policy on one task: a line of a table.

    Attributes:
      task_label, label: what samples and tables call the task and the policy.
      task, policy: themselves.
      decoding: how the items are answered.
      described: what the configuration of the run says of it, as JSON values.
    """

    task_label: str
    label: str
    task: Task
    policy: Policy
    decoding: Decoding
    described: Mapping[str, Any]


def model_identity(params: Params, model: str) -> dict[str, str]:
    """Which model, as JSON values: its name, a digest of its weights, their dtype."""
    return {
        "model": model,
        "weights": sampled_digest(params),
        "fingerprint": identity.of_model(params),
        "dtype": params.dtype.name,
    }


def policy_identity(policy: Policy, more: Mapping[str, type[Policy]] = {}) -> dict[str, Any]:
    """A policy as JSON values, and what tables call it.

    "Policy" names the options that differ from their defaults; "label" adds the budget. `more` are
    names of policies beside the available ones.
    """
    kinds = {policies.by_name(name, more): name for name in (*policies.available(), *more)}
    name = kinds.get(type(policy), type(policy).__name__)
    options = [
        f"{field.name}={_short(getattr(policy, field.name))}"
        for field in dataclasses.fields(policy)
        if field.repr and field.name != "budget" and getattr(policy, field.name) != field.default
    ]
    name += f" ({', '.join(options)})" if options else ""
    budget = str(getattr(policy, "budget", "–"))
    label = name if budget == "–" else f"{name} {budget}"
    return {"label": label, "Policy": name, "Budget": budget, **options_as_json(policy)}


def options_as_json(policy: Policy) -> dict[str, Any]:
    """What a policy was made of, an allotment by its digest."""
    return {
        name: value.digest if isinstance(value, policies.Allotment) else value
        for name, value in policy.options().items()
    }


def _short(value: Any) -> Any:
    if not isinstance(value, policies.Allotment):
        return value
    return " ".join([*filter(None, [value.made.get("rule")]), value.digest[:8]])


def sampled_digest(params: Params) -> str:
    """A digest of some of the weights, by which folders up to version 2 know their model."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(params.config).encode())
    for leaf in jax.tree.leaves(params.weights):
        flat = leaf.reshape(-1)
        some = flat[:: max(1, flat.size // 4096)]
        digest.update(f"{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.asarray(some).tobytes())
    return digest.hexdigest()
