"""Every policy there is, tight and ample, and its decode over a few pages."""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from cheap import CONFIG, start
from tiny import calibration, random_params

from raas_jax import Dense, policies
from raas_jax.decode import cache_bytes
from raas_jax.plan import Plan
from raas_jax.session import Session

P, PAGES, LENGTHS = 2, 14, [9, 3, 1]
NEW = PAGES * P + 1

# Small windows for a small budget; more than one entry where the prompt can be treated otherwise.
OPTIONS = {
    "dense": [{}],
    "quest": [{}],
    "raas": [{"alpha": 0.12}],
    "raas_quest": [{"alpha": 0.12}],
    "random": [{"every": 4, "recent": 4}],
    "rkv": [{"every": 4, "recent": 2, "window": 2, "prompt": "included"}],
    "lazy_eviction": [{"every": 4, "recent": 4, "alpha": 0.12}],
    "snapkv": [{"window": 4, "granularity": "layer"}],
    "vase": [{"every": 4, "recent": 4, "window": 4}],
    "triattention": [{"every": 4, "dense_layers": 1}],
    "sink": [{"prompt": "included", "dense_layers": 1}, {"prompt": "evict"}],
    "h2o": [{"granularity": "layer"}, {"prompt": "evict"}],
    "tova": [{}, {"prompt": "evict"}],
}
EVERY = [
    pytest.param(
        name,
        options,
        id=", ".join([name, *map(str, options.values())]),
    )
    for name in policies.available()
    for options in OPTIONS.get(name, [{}])
]


def tight(name, options):
    if name == "dense":
        return Dense(page_size=P)
    if name == "raas_quest":
        options = {**options, "prompt_budget": 2 * P}
    if name == "triattention":
        options = {**options, "calibration": calibration(CONFIG)}
    spare = 5 if options.get("prompt") == "included" else 0
    return policies.create(name, budget=(6 + spare) * P, page_size=P, **options)


def ample(name, options):
    if name == "dense":
        return Dense(page_size=P)
    if name == "raas_quest":
        options = {**options, "prompt_budget": 10 * P}
    if name == "triattention":
        options = {**options, "calibration": calibration(CONFIG)}
    return policies.create(name, budget=(PAGES + 6) * P, page_size=P, **options)


@functools.cache
def params():
    return random_params(CONFIG, 0, 3.0)


def plan_of(policy, prompts):
    return Plan.create(CONFIG, policy, [len(prompt) for prompt in prompts], NEW)


@functools.lru_cache(maxsize=2)
def program(plan, rows):
    """Half of the decode."""
    return Session(params(), plan, rows).lower_advance(PAGES // 2).compile()


def run(policy, prompts, seeds):
    """Tokens `[B, T]`, log-probabilities, the last state, bytes reported and bytes compiled for."""
    return decoded(plan_of(policy, prompts), prompts, seeds)


def decoded(plan, prompts, seeds, before=lambda state: state):
    """The same by a plan; `before` may change the state ahead of each half."""
    state, first = start(params(), plan, prompts, seed=seeds)
    reported = cache_bytes(state)
    rest = dataclasses.replace(state, cache=None, meta=None)
    others = sum(leaf.nbytes for leaf in jax.tree.leaves((params().weights, rest)))
    compiled = program(plan, len(prompts))
    allocated = compiled.memory_analysis().argument_size_in_bytes - others
    drawn = [first]
    for _ in range(2):
        state, more = compiled(params(), before(state))
        drawn.append(more)
    tokens, logprobs = (
        np.concatenate(each).T for each in zip(*(each[:2] for each in drawn), strict=True)
    )
    return tokens, logprobs, state, reported, allocated
