"""Memory does not grow with the length, is what is said, and is never copied."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import written_in_loops
from tiny import allotment_of, random_params

import raas_jax
from raas_jax import ModelConfig, RaaS, experts
from raas_jax.aot.memory import abstract_session
from raas_jax.decode import RowRequest, cache_bytes, decode_pages, decode_until_done, prefill
from raas_jax.plan import Plan
from raas_jax.sampling import Sampling

# The cache is far larger than anything else: weights, activations, scores of one layer.
CONFIG = ModelConfig(32, 16, 24, 4, 4, 2, 16, qk_norm=True, model_type="qwen3")
ROWS, PROMPT, P = 2, 512, 16
POLICIES = {
    "mass": RaaS(1024, page_size=P),
    "bound": RaaS(1024, score="bound", granularity="layer", top_fraction=0.5, page_size=P),
    "two kinds of layers": RaaS(1024, dense_layers=2, page_size=P),
    # No head has more than the 64 pages of the shorter answer.
    "allotted": RaaS(512, page_size=P, allotment=allotment_of(CONFIG, P, most=60)),
}


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def start(params, plan):
    tokens = jnp.ones((ROWS, PROMPT), jnp.int32)
    request = RowRequest.create([1 << 20] * ROWS, (), Sampling(temperature=1.0, top_p=0.9))
    return prefill(params, tokens, jnp.full(ROWS, PROMPT), request, plan=plan)


@functools.cache
def compiled(name, pages=1024 // P):
    """The state of a decode, and its program for this many pages."""
    plan, params = plan_for(POLICIES[name], 1024), random_params(CONFIG)
    state = jax.eval_shape(lambda params: start(params, plan), params)[0]
    return state, decode_pages.lower(params, state, plan=plan, pages=pages).compile()


def size(tree):
    leaves = [
        leaf
        for leaf in jax.tree.leaves(tree)
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    ]
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def plan_for(policy, new):
    return Plan.create(CONFIG, policy, [PROMPT], new)


@pytest.mark.parametrize("name", ["mass", "bound"])
def test_the_allocation_is_the_same_for_1k_and_64k_tokens(name):
    plans = [plan_for(POLICIES[name], new) for new in (1024, 65_536)]
    assert plans[0] == plans[1]
    (state, short), (_, long) = (compiled(name, new // P) for new in (1024, 65_536))
    short, long = short.memory_analysis(), long.memory_analysis()
    assert long.temp_size_in_bytes == short.temp_size_in_bytes
    assert long.argument_size_in_bytes == short.argument_size_in_bytes
    assert long.alias_size_in_bytes == short.alias_size_in_bytes
    # What is drawn: a token and a log-probability per row and step, nothing else.
    growth = long.output_size_in_bytes - short.output_size_in_bytes
    assert growth == (65_536 - 1024) * ROWS * 8
    # Besides the cache, a step takes no more than what it reads of one or two layers.
    assert short.temp_size_in_bytes < size(state.cache) / 2


def test_the_plan_is_the_same_where_budgets_differ():
    plan = plan_for(POLICIES["allotted"], 1024)
    assert plan == plan_for(POLICIES["allotted"], 65_536)
    assert plan.groups[0].ranges.total == 32 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads


def test_inside_one_jit_only_the_answer_grows(params):
    """`generate_ids`: prefill and the whole loop in one program."""
    policy = POLICIES["mass"]
    tokens = jnp.ones((ROWS, PROMPT), jnp.int32)

    def analysis(new):
        ask = functools.partial(raas_jax.generate_ids.lower, params, tokens, policy=policy)
        return ask(max_new_tokens=new).compile().memory_analysis()

    short, long = analysis(1024), analysis(65_536)
    answer = (65_536 - 1024) * ROWS * 8
    assert long.output_size_in_bytes - short.output_size_in_bytes == answer
    assert long.argument_size_in_bytes == short.argument_size_in_bytes
    # The answer as the loop fills it, token by token, and once more turned to rows.
    assert long.temp_size_in_bytes - short.temp_size_in_bytes <= 2.01 * answer


@pytest.mark.parametrize("name", POLICIES)
def test_kv_bytes_is_what_the_compiler_allocates(params, name):
    state, program = compiled(name)
    analysis, said = program.memory_analysis(), cache_bytes(state)
    allocated = analysis.argument_size_in_bytes - size(params)
    assert abs(allocated - said) <= 0.03 * said
    # All of it is updated where it lies.
    assert analysis.alias_size_in_bytes >= said


def test_stats_say_the_same(params):
    _, program = compiled("bound")
    allocated = program.memory_analysis().argument_size_in_bytes - size(params)
    outs = raas_jax.generate(
        params,
        [[1] * PROMPT] * ROWS,
        policy=POLICIES["bound"],
        max_new_tokens=1024,
        stop_token_ids=range(CONFIG.vocab_size),  # One token, and no decode to compile.
    )
    said = sum(out.stats.kv_bytes for out in outs)
    assert abs(allocated - said) <= 0.03 * said
    per_token = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    assert [out.stats.dense_kv_bytes for out in outs] == [(PROMPT + 1) * per_token] * ROWS


def smallest_buffer(cache):
    return min(
        leaf.size * leaf.dtype.itemsize for leaf in (cache.prompt.k, *(k.k for k in cache.kept))
    )


@pytest.mark.parametrize("name", POLICIES)
def test_no_loop_copies_the_cache(name):
    """Neither per token nor per page, in the pages that `generate` runs."""
    state, program = compiled(name)
    assert written_in_loops(program.as_text(), smallest_buffer(state.cache)) == []


def test_no_loop_copies_the_cache_inside_one_jit(params):
    plan = plan_for(POLICIES["bound"], 2048)

    state, first = jax.eval_shape(lambda params: start(params, plan), params)
    loop = jax.jit(
        lambda params, state, first: decode_until_done(params, state, first, plan, 2048),
        donate_argnames="state",
    )
    text = loop.lower(params, state, first).compile().as_text()
    assert written_in_loops(text, smallest_buffer(state.cache)) == []


@pytest.mark.parametrize("bad", ["select", "read after write", "carried along", "transpose"])
def test_the_check_finds_copies(bad):
    """Four ways of writing such a loop badly, each found; a good one passes."""
    shape = (2, 64, 16, 8)
    size = 4 * 2 * 64 * 16 * 8
    page = jnp.ones((2, 16, 8))

    def step(kept, index):
        if bad == "select":
            chosen = (jnp.arange(64) == index)[None, :, None, None]
            return jnp.where(chosen, page[:, None], kept), jnp.sum(kept[:, index])
        written = jax.lax.dynamic_update_slice(kept, page[:, None], (0, index, 0, 0))
        if bad == "read after write":
            return written, jnp.sum(jax.lax.dynamic_index_in_dim(kept, 63 - index, 1))
        if bad == "carried along":
            return written, written
        return jnp.swapaxes(jnp.swapaxes(written, 0, 1) * 2.0, 0, 1), page[0, 0, 0]

    def good(kept, index):
        seen = jnp.sum(jax.lax.dynamic_index_in_dim(kept, index, 1))
        page = jnp.broadcast_to(seen, (2, 1, 16, 8))
        return jax.lax.dynamic_update_slice(kept, page, (0, index, 0, 0)), seen

    def text(body):
        loop = jax.jit(lambda kept: jax.lax.scan(body, kept, jnp.arange(64)), donate_argnums=0)
        return loop.lower(jnp.zeros(shape)).compile().as_text()

    assert written_in_loops(text(step), size) != []
    assert written_in_loops(text(good), size) == []


def test_the_state_is_donated(params):
    """The buffers that go in are gone, and what comes out lies where they lay."""
    _, program = compiled("mass")
    assert "input_output_alias" in program.as_text().splitlines()[0]
    state, _ = start(params, plan_for(POLICIES["mass"], 1024))
    buffers = [state.cache.prompt.k, state.cache.kept[0].k, state.cache.kept[0].v]
    places = [buffer.unsafe_buffer_pointer() for buffer in buffers]
    after, _ = program(params, state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.cache, state.meta)))
    cache = after.cache
    now = [x.unsafe_buffer_pointer() for x in (cache.prompt.k, cache.kept[0].k, cache.kept[0].v)]
    assert now == places
    assert np.all(np.asarray(after.rows.committed) == 1024 // P)


def test_experts_are_not_copied_whole():
    """XLA on CPUs would make a float32 copy of a stack of 16-bit floats before it is read."""
    config = dataclasses.replace(
        CONFIG, model_type="qwen3_moe", num_experts=64, num_experts_per_tok=2,
        moe_intermediate_size=256, hidden_size=64,
    )  # fmt: skip
    ahead = abstract_session(config, RaaS(64), [16], 64, "bfloat16", None)
    stack = min(size(ahead.params.weights[name]) for name in experts.NAMES)
    assert ahead.lower_advance(1).compile().memory_analysis().temp_size_in_bytes < stack / 2
