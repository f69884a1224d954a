"""Models whose layers are of several kinds, compiled for a TPU and a GPU: windows and experts."""

from __future__ import annotations

import dataclasses
import functools

import jax
import pytest
from hlo import written_in_loops

from raas_jax import ModelConfig, RaaS
from raas_jax.aot.decode_traffic import bytes_on_one_device, decode_traffic, pages_per_call
from raas_jax.aot.memory import abstract_session, compiled, target_mesh
from raas_jax.aot.targets import target_devices
from raas_jax.rope import Rope

PROMPT, BUDGET, P = 512, 1024, 16
FIVE_TO_ONE = ModelConfig(
    32_000,
    *(1024, 4096, 26, 16, 4, 128),
    qk_norm=True,
    model_type="qwen3",
    window=500,  # No multiple of a page.
    window_layers=tuple(layer for layer in range(26) if (layer + 1) % 6),
    window_rope=Rope(theta=100.0),
)
# gpt-oss-20b by its published sizes.
EXPERTS = ModelConfig(
    201_088,
    *(2880, 2880, 24, 64, 8, 64),
    rope=Rope(150_000.0),
    qkv_bias=True,
    output_bias=True,
    window=128,
    window_layers=tuple(range(0, 24, 2)),
    sinks=True,
    num_experts=32,
    num_experts_per_tok=4,
    moe_intermediate_size=2880,
    norm_topk_prob=True,
    expert_bias=True,
    swiglu_limit=7.0,
    model_type="gpt_oss",
)
CASES = {"five to one": (FIVE_TO_ONE, "v5e:2x2", 8), "experts": (EXPERTS, "h100", 1)}


def session(config, target, rows, new=65_536):
    try:
        target_devices(target)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    mesh = target_mesh(config, target, 1, 1)
    return abstract_session(config, RaaS(BUDGET), [PROMPT] * rows, new, "bfloat16", mesh)


@functools.cache
def decode(name):
    ahead = session(*CASES[name])
    return ahead, ahead.lower_advance(pages_per_call(ahead)).compile()


@pytest.mark.parametrize("name", CASES)
def test_memory_is_that_of_each_kind_by_the_compilers_account(name):
    config, target, rows = CASES[name]
    ahead, program = decode(name)
    assert ahead.plan == session(config, target, rows, 2048).plan
    ring = -(-(config.window - 1) // P) * P
    tokens = config.full_layers * (PROMPT + BUDGET + P)
    tokens += len(config.window_layers) * (ring + P)
    wanted = rows * tokens * 2 * config.num_key_value_heads * config.head_dim * 2
    account = compiled(program.memory_analysis())
    weights, state = map(bytes_on_one_device, (ahead.params, ahead.shape.cache))
    assert abs(state - wanted) <= 0.03 * wanted
    # A GPU's compiler puts its constants among the arguments.
    assert abs(account.arguments - weights - wanted) <= 0.05 * wanted
    assert account.aliases >= state
    assert account.temporaries < 0.05 * weights


@pytest.mark.parametrize("name", CASES)
def test_a_step_reads_what_it_must_and_copies_nothing(name):
    """Of 32 experts the four that are chosen; of each kind's cache all, once."""
    ahead, program = decode(name)
    text, cache = program.as_text(), ahead.shape.cache
    smallest = min(map(bytes_on_one_device, (cache.prompt.k, *(kept.k for kept in cache.kept))))
    # Logits of a large vocabulary are larger than the smallest part.
    written = written_in_loops(text, smallest)
    assert [each for each in written if f",{ahead.params.config.vocab_size}]" not in each] == []
    found = decode_traffic(ahead, text)
    assert found.ratio < 1.1
    assert found.cache_read == pytest.approx(found.cache, rel=0.05)
    assert found.weights_read == pytest.approx(found.weights, rel=0.03)
    assert found.copies == []


def test_programs_do_not_grow_with_depth():
    """Eight repeats of the pattern and a rest, or four: as many instructions."""
    sizes = set()
    for count in (26, 50):
        windows = tuple(layer for layer in range(count) if (layer + 1) % 6)
        config = dataclasses.replace(FIVE_TO_ONE, num_hidden_layers=count, window_layers=windows)
        ahead = abstract_session(config, RaaS(BUDGET), [PROMPT], 2048, "float32", None)
        sizes.add(len(ahead.lower_advance(1).as_text().splitlines()))
    assert len(sizes) == 1


@pytest.fixture(autouse=True)
def one_program_in_memory():
    yield
    jax.clear_caches()
