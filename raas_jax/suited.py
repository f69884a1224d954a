"""A policy for one model: whether its allotment is this model's, and the model's own one."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from raas_jax import identity
from raas_jax.params import Params
from raas_jax.policies import Allotment, Policy

FILE = "allotment.json"
"""In a model's folder; used where the allotment is "auto"."""


def suited(policy: Policy, params: Params) -> Policy:
    """The policy, with the model's own allotment in the place of "auto".

    Raises:
      FileNotFoundError: the model has none of its own.
      ValueError: the allotment is another model's, or of another shape.
    """
    return policy.suited(partial(identity.likeness, params), partial(_own, params))


def _own(params: Params) -> Allotment:
    source = params.source
    if source is None or not (Path(source) / FILE).is_file():
        where = "weights without a folder" if source is None else source
        raise FileNotFoundError(
            f"allotment is 'auto', but the model has no {FILE} ({where}). Make it with "
            f"`raas-jax allot MODEL --out {FILE}`, and name the file or put it into the folder."
        )
    return Allotment.read(Path(source) / FILE)
