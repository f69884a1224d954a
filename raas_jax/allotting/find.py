"""Finds an allotment: what each head loses, and, for one budget, what all of them lose together."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from raas_jax import checks
from raas_jax.allotting.losses import curves
from raas_jax.allotting.refine import refine
from raas_jax.allotting.simulate import simulated
from raas_jax.params import Params
from raas_jax.policies import Allotment, Policy, RaaS
from raas_jax.windows import check_some_see_all

MOST_ROUNDS = 1000


def allot(
    params: Params,
    texts: Sequence[Sequence[int]],
    *,
    policy: Policy | None = None,
    budget: int | None = None,
    prompt_tokens: int = 128,
    rounds: int = 8,
    seed: int = 0,
    temperature: float = 1.0,
    progress: bool | None = None,
) -> Allotment:
    """Finds how much of a budget each layer and key/value head should have.

    Layers that see a window keep it whatever the budget is: they have no part in it.

    Args:
      params: the model; float32 is best.
      texts: token ids of texts of one length, like those that the model will write. Four of 2,048
        tokens do; a head's size is found up to their length.
      policy: decides what a head keeps; `RaaS` by default. Its budget does not matter.
      budget: tokens. Where it is given, the shares are refined for it: the model is read again, as
        it is when it forgets that much, since heads stand in for each other. Other budgets are then
        shared out in the same proportions.
      prompt_tokens: how many of the first tokens are the prompt, which is kept.
      rounds: how often the model is read at most to refine; each takes up to three times what all
        takes without `budget`.
      seed: of the tokens that are drawn.
      temperature: of the draws and of the likelihood, above 0; above 1 also counts what a model
        loses that is sure of its tokens.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: no text, texts of several lengths or too short ones, a policy that cannot be
        simulated, or a model all of whose layers see a window.
    """
    check_some_see_all(params.config)
    temperature = checks.real("temperature", temperature, "a number from 1e-3", 1e-3)
    rounds = checks.integer("rounds", rounds, 1, MOST_ROUNDS)
    tried = simulated(RaaS() if policy is None else policy)
    if budget is not None:
        tried = dataclasses.replace(tried, budget=budget)
    found = curves(
        params,
        texts,
        policy=tried,
        prompt_tokens=prompt_tokens,
        seed=seed,
        temperature=temperature,
        progress=progress,
    )
    if budget is None:
        return found
    return refine(
        params,
        texts,
        found,
        policy=tried,
        prompt_tokens=prompt_tokens,
        rounds=rounds,
        progress=progress,
    )
