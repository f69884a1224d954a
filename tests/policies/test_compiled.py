"""As the compiler optimises it: no policy copies the cache, and none reads what is not there."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import start
from hlo import written_in_loops
from pools import poisoned
from tiny import allotment_of, calibration, prompts_of, random_params

from raas_jax import ModelConfig, policies
from raas_jax.decode import decode_pages
from raas_jax.plan import Plan

# The cache is far larger than anything else: weights, activations, scores of one layer.
CONFIG = ModelConfig(32, 16, 24, 4, 4, 2, 16, qk_norm=True, model_type="qwen3")
P, BUDGET, PAGES, LENGTHS = 16, 256, 14, [150, 20]

CASES = [
    "recent",
    "random:every=64:recent=32",
    "sink:prompt=evict",
    "h2o",
    "h2o:prompt=evict",
    "tova",
    "snapkv",
    "rkv:every=64",
    "lazy_eviction:every=32:recent=32",
    "vase:every=32:recent=32:window=32",
    "triattention:every=64",
    "quest",
    "raas_quest:prompt_budget=64",
]
# One that reads whole pages of a pool at a boundary, and one that fills it from the prompt.
ALLOTTED = ["triattention:every=64:across_layers=false", "h2o:prompt=evict"]
# One of each kind of decision is compiled by every version of jax.
EVERYWHERE = ["recent", "h2o:prompt=evict", "quest", "raas_quest:prompt_budget=64"]


@functools.cache
def params():
    return random_params(CONFIG, 0, 3.0)


def test_every_policy_is_here():
    names = {case.partition(":")[0] for case in CASES}
    # These two are in tests/test_constant_memory.py and tests/test_oracle.py.
    assert names | {"dense", "raas", "fifo"} == set(policies.available())


def cases():
    for case in CASES:
        marks = () if case in EVERYWHERE else pytest.mark.once
        yield pytest.param(case, {}, id=case, marks=marks)
    for case in ALLOTTED:
        more = {"allotment": allotment_of(CONFIG, P, most=32)}
        yield pytest.param(case, more, id=f"{case}, allotted")


@pytest.mark.parametrize(("case", "more"), [*cases()])
def test_nothing_is_copied_and_nothing_dead_is_read(case, more):
    options = {"page_size": P, "budget": BUDGET, **more}
    if case.startswith("triattention"):
        options["calibration"] = calibration(CONFIG)
    policy = policies.parse(case, **options)
    plan = Plan.create(CONFIG, policy, LENGTHS, 2 * PAGES * P)
    state, _ = start(params(), plan, prompts_of(LENGTHS, 1), seed=3)
    program = decode_pages.lower(params(), state, plan=plan, pages=PAGES).compile()
    sizes = [state.cache.prompt.k.nbytes, state.cache.kept[0].k.nbytes]
    assert written_in_loops(program.as_text(), min(size for size in sizes if size)) == []
    clean, bad = jax.tree.map(jnp.copy, state), poisoned(state, plan)
    for _ in range(2):
        # Slots that were emptied on the way are poisoned for the second round.
        clean, wanted = program(params(), clean)
        bad, drawn = program(params(), poisoned(bad, plan))
        np.testing.assert_array_equal(drawn.tokens, wanted.tokens)
        np.testing.assert_array_equal(drawn.logprobs, wanted.logprobs)
    assert np.all(np.asarray(clean.rows.evicted) > 0) or policy.selects
    np.testing.assert_array_equal(bad.cache.kept[0].fill, clean.cache.kept[0].fill)
