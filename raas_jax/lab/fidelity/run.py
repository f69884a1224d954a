"""Runs a comparison of policies on texts, and writes what is found of each text as it comes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from raas_jax.lab.fidelity.measure import Differences, Followed, dense_outputs, follow
from raas_jax.lab.fidelity.oracle import NAMES
from raas_jax.lab.fidelity.texts import Text
from raas_jax.lab.inspect.recording import row_bytes
from raas_jax.lab.runs.equal_bytes import fitted
from raas_jax.lab.runs.experiment import model_identity, policy_identity
from raas_jax.lab.runs.layout import DENSE
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.runner import environment
from raas_jax.params import Params
from raas_jax.policies import Dense, Policy
from raas_jax.suited import suited

BLOCK = 64
"""Tokens whose sums are written as one: the unit of positions that intervals are drawn from."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy at one budget.

    Attributes:
      label: what samples and tables call it.
      policy: with its own budget.
      described: what the configuration says of it, as JSON values.
    """

    label: str
    policy: Policy
    described: Mapping[str, Any]


def plan_points(
    params: Params, tried: Sequence[Policy], prompt_tokens: int, length: int
) -> list[Point]:
    """The policies, each at a budget of its own that takes as many bytes as the first one's.

    Args:
      params: the model.
      tried: policies at their nominal budgets; the first that has one is the reference.
      prompt_tokens, length: of every text.

    Raises:
      ValueError: a policy that cannot work within those bytes, or is named twice.
    """
    tried = [suited(policy, params) for policy in tried]
    budgeted = [policy for policy in tried if hasattr(policy, "budget")]
    if not budgeted:
        raise ValueError("policies have no budget among them; give at least one that evicts.")
    points: dict[str, Point] = {}
    for policy in tried:
        if isinstance(policy, Dense):
            continue  # What all are compared with.
        described = policy_identity(policy, NAMES)
        label = described["label"]
        if label in points:
            raise ValueError(f"policies repeat: {label}; name each once.")
        try:
            own, size = _at_equal_bytes(params, policy, budgeted[0], prompt_tokens, length)
        except ValueError as error:
            raise ValueError(f"policy {label}: {error}") from error
        described |= {"own_budget": getattr(own, "budget", 0), "bytes": size}
        points[label] = Point(label, own, described)
    return list(points.values())


def _at_equal_bytes(
    params: Params, policy: Any, reference: Any, prompt_tokens: int, length: int
) -> tuple[Policy, int]:
    """The policy with a budget of its own, and the bytes of a row under it."""

    def bytes_under(policy: Policy, answer: int = length - prompt_tokens) -> int:
        policy.check_prompts([prompt_tokens])
        policy.check_model(params.config)
        return row_bytes(params.config, policy, prompt_tokens, answer, params.dtype.name)

    def at(budget: int) -> Policy:
        resized: Policy = dataclasses.replace(policy, budget=budget)
        return resized

    own: Policy = policy
    if hasattr(policy, "budget"):
        nominal, step = policy.budget, policy.page_size
        # What keeps all, and only reads less of it, has no budget of bytes.
        if bytes_under(at(nominal), 16 * nominal) != bytes_under(at(2 * nominal), 16 * nominal):
            most = bytes_under(dataclasses.replace(reference, budget=nominal))
            name = policy_identity(reference, NAMES)["Policy"]
            own = fitted(at, bytes_under, nominal // step * step, step, most, name)
    return own, bytes_under(own)


def run(
    params: Params,
    texts: Sequence[Text],
    points: Sequence[Point],
    out: str | Path,
    *,
    model: str,
    prompt_tokens: int,
    rows: int,
    progress: bool | None = None,
) -> Results:
    """Compares the policies on the texts; what `out` has already is skipped.

    Texts are taken `rows` at a time, under every policy in turn, so that policies can be compared
    early. A folder may be given more texts and more policies later.

    Args:
      params: the model.
      texts: of one length, longer than `prompt_tokens + 1`.
      points: of `plan_points`.
      out: folder of the run.
      model: name of the model, for the tables.
      prompt_tokens: how many of the first tokens of a text are its prompt.
      rows: texts at once.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: before anything is computed, for a folder of another run. OSError: the folder
        cannot be written.
    """
    config = {
        "kind": "fidelity",
        **model_identity(params, model),
        "prompt_tokens": prompt_tokens,
        "length": len(texts[0].tokens),
        "block": BLOCK,
        "reference": points[0].described["Policy"],
        "texts": [text.config() for text in texts],
        "points": [dict(point.described) for point in points],
    }
    grows = {"texts": ("kind", "name"), "points": ("label",)}
    with Results.open(out, config, environment(), grows) as results:
        wanted = [(text, label) for text in texts for label in [DENSE, *(p.label for p in points)]]
        ready = sum(_key(text, label) in results.samples for text, label in wanted)
        hidden = None if progress is None else not progress
        with tqdm(total=len(wanted), initial=ready, unit="text", disable=hidden) as bar:
            for first in range(0, len(texts), rows):
                batch = list(texts[first : first + rows])
                # Missing rows repeat the last one, so that every batch has one shape.
                batch += [batch[-1]] * (min(rows, len(texts)) - len(batch))
                _run_batch(params, batch, points, results, bar, config)
    return results


def _key(text: Text, label: str) -> tuple[str, ...]:
    return text.kind, label, text.name, "0"


def _run_batch(
    params: Params,
    batch: Sequence[Text],
    points: Sequence[Point],
    results: Results,
    bar: Any,
    config: Mapping[str, Any],
) -> None:
    outputs: dict[str, np.ndarray] = {}
    prompt_tokens = config["prompt_tokens"]
    for point in points:
        left = [text for text in batch if _key(text, point.label) not in results.samples]
        if not left:
            continue
        bar.set_description(point.label)
        for text in batch:
            if text.name not in outputs:
                outputs[text.name] = dense_outputs(params, text.tokens)
        # A smaller batch would be compiled anew; it is computed again and left out.
        tokens, dense = [text.tokens for text in batch], [outputs[text.name] for text in batch]
        for step in follow(params, point.policy, tokens, dense, prompt_tokens):
            if isinstance(step, int):
                bar.set_postfix_str(f"token {step + prompt_tokens} of {config['length']}")
                continue
            for text, found in zip(batch, step, strict=True):
                _add(results, bar, text, DENSE, _of_dense(found), prompt_tokens)
                _add(results, bar, text, point.label, found, prompt_tokens)


def _of_dense(found: Followed) -> Followed:
    seen = found.differences
    same = Differences(
        seen.dense_nll, seen.dense_nll, np.zeros_like(seen.kl), np.ones_like(seen.agree)
    )
    return Followed(same, 0.0, 0)


def _add(
    results: Results, bar: Any, text: Text, label: str, found: Followed, prompt_tokens: int
) -> None:
    if _key(text, label) in results.samples:
        return
    first = prompt_tokens + 1
    results.add(
        {
            "task": text.kind,
            "policy": label,
            "item": text.name,
            "sample": 0,
            "span": [first, len(text.tokens)],
            **{
                name: _block_sums(getattr(found.differences, name), first)
                for name in ("nll", "kl", "agree")
            },
            "seconds": round(found.seconds, 3),
            "kv_bytes": found.kv_bytes,
        }
    )
    bar.update()


def _block_sums(values: np.ndarray, first: int) -> list[float]:
    """Sums over blocks of positions, `values[0]` being at position `first`; 5 decimals."""
    starts = block_starts(first, first + len(values)) - first
    sums = np.add.reduceat(values.astype(np.float64), np.maximum(starts, 0))
    return [round(float(each), 5) for each in sums]


def block_starts(first: int, end: int) -> np.ndarray:
    """Where blocks of positions from `first` to `end` begin: `first`, and multiples of `BLOCK`."""
    aligned = np.arange(first // BLOCK, -(-end // BLOCK)) * BLOCK
    return np.maximum(aligned, first)
