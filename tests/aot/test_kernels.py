"""Every TPU kernel through the compiler of every TPU, and what the compiler says of it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot.conftest import TPUS
from jax.sharding import SingleDeviceSharding

from pallas_kernels import Target
from pallas_kernels.decode_attention import decode_attention
from pallas_kernels.page_bound import page_bound
from pallas_kernels.page_commit import page_commit
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.ragged_decode_attention import ragged_decode_attention
from pallas_kernels.ragged_page_commit import ragged_page_commit
from pallas_kernels.ranges import Ranges
from pallas_kernels.selected_decode_attention import selected_decode_attention

# Large enough that no copy of a buffer can hide in the chip's own memory.
L, B, K = 8, 8, 8


def compile_for(device, operation, *shapes, donate=(), **options):
    """The compiled operation, forced onto the TPU kernel."""
    sharding = SingleDeviceSharding(device)
    call = partial(operation, implementation="tpu", target=Target.of(device), **options)
    jitted = jax.jit(call, in_shardings=sharding, out_shardings=sharding, donate_argnums=donate)
    shapes = [shape and jax.ShapeDtypeStruct(*shape, sharding=sharding) for shape in shapes]
    return jitted.lower(*shapes).compile()


def operands(dtype, H, G, P, S):
    pages = (L, B, K, S, P, H), dtype
    return ((B, K * G, H), dtype), pages, pages, ((B, K, S), jnp.int32)


def assert_nothing_copied(program, size):
    """Neither a buffer nor a layer of it."""
    assert "tpu_custom_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < size / L / 2


def buffer_bytes(dtype, H, P, S):
    return L * B * K * S * P * H * jnp.dtype(dtype).itemsize


bf16, f32 = jnp.bfloat16, jnp.float32
SCALAR = (), jnp.int32


@pytest.mark.parametrize("name", TPUS)
def test_every_operation_for_every_tpu(tpu, name):
    """The shapes of Llama-3.1-8B at a budget of 1,024."""
    device = tpu(name)[0]
    q, k, v, fill = operands(bf16, 128, 4, 16, 64)
    size = buffer_bytes(bf16, 128, 16, 64)
    layer = SCALAR
    assert_nothing_copied(compile_for(device, decode_attention, q, k, v, fill, layer), size)
    slots = (B, K, 32), jnp.int32
    assert_nothing_copied(
        compile_for(device, selected_decode_attention, q, k, v, fill, slots, layer), size
    )
    keys = (L, B, K, 64, 128), bf16
    assert_nothing_copied(compile_for(device, page_bound, q, keys, keys, layer), size)
    page, slot = ((L, B, K, 16, 128), bf16), ((L, B, K), jnp.int32)
    committed = compile_for(device, page_commit, k, page, slot, donate=0)
    assert_nothing_copied(committed, size)
    assert committed.memory_analysis().alias_size_in_bytes >= size
    long = (1, 4096, 32, 128), bf16
    short = (1, 4096, 8, 128), bf16
    program = compile_for(device, prefill_attention, long, short, short, None)
    # No square of scores. As a program of its own, whose arguments have their layouts, it may turn
    # q, k, v and the result to have the heads first: how many of them lie in HBM is up to libtpu.
    turned = 4096 * (2 * 32 + 2 * 8) * 128 * 2
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * turned < 4096 * 4096 * 32 / 4
    sink = (32,), bf16
    seen = partial(prefill_attention, window=128)
    program = compile_for(
        device,
        lambda q, k, v, sink, **how: seen(q, k, v, sink=sink, **how),
        long,
        short,
        short,
        sink,
    )
    assert "splash" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < 1.2 * turned


# Shapes that lie in a TPU's memory as they are, and so cost no copy.
TILED = [
    (bf16, 128, 1, 16, 256), (f32, 128, 16, 16, 128), (bf16, 256, 7, 16, 64),
    (bf16, 128, 4, 1, 1024), (f32, 128, 2, 1, 512), (bf16, 128, 4, 2, 512), (f32, 128, 4, 4, 128),
    (bf16, 128, 5, 8, 200), (bf16, 128, 8, 32, 63), (bf16, 128, 4, 64, 40), (f32, 256, 3, 128, 9),
    (f32, 128, 4, 48, 17),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "H", "G", "P", "S"), TILED)
def test_decode_attention_copies_nothing(tpu, dtype, H, G, P, S):
    program = compile_for(tpu("v5e:2x2")[0], decode_attention, *operands(dtype, H, G, P, S), SCALAR)
    assert_nothing_copied(program, buffer_bytes(dtype, H, P, S))


@pytest.mark.parametrize(
    ("dtype", "P"), [(f32, 1), (bf16, 2), (bf16, 4), (bf16, 8), (bf16, 128), (f32, 32)]
)
def test_page_commit_copies_nothing(tpu, dtype, P):
    S = 2048 // P
    program = compile_for(
        tpu("v5e:2x2")[0],
        page_commit,
        ((L, B, K, S, P, 128), dtype),
        ((L, B, K, P, 128), dtype),
        ((L, B, K), jnp.int32),
        donate=0,
    )
    assert_nothing_copied(program, buffer_bytes(dtype, 128, P, S))


# These a TPU stores in another order; the kernels serve them all the same.
UNTILED = [
    (bf16, 64, 4, 16, 64), (f32, 64, 1, 8, 32), (bf16, 80, 2, 16, 64), (f32, 96, 3, 16, 64),
    (bf16, 128, 4, 3, 64),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "H", "G", "P", "S"), UNTILED)
def test_other_shapes_compile_when_asked_for_and_fall_back_when_not(tpu, dtype, H, G, P, S):
    device, shapes = tpu("v5e:2x2")[0], (*operands(dtype, H, G, P, S), SCALAR)
    assert "tpu_custom_call" in compile_for(device, decode_attention, *shapes).as_text()
    traced = jax.jit(partial(decode_attention, target=Target.of(device))).trace(
        *(jax.ShapeDtypeStruct(*shape) for shape in shapes)
    )
    assert "pallas_call" not in str(traced.jaxpr)


# Ranges of a pool


def some_ranges(P, tokens):
    """Of so many tokens per layer and head on an average, from one page to twice as many."""
    counts = np.random.default_rng(0).integers(1, 2 * tokens // P, (L, K))
    # Single tokens lie in tiles of eight.
    counts[-1, -1] += -np.sum(counts) % 8
    return Ranges(tuple(map(tuple, counts.tolist())))


def assert_pool_stays(device, dtype, P, H=128, G=4, rows=B, tokens=1024, commit=True):
    """One kernel each, a write that is in place, and less besides than one layer of the pool."""
    ranges = some_ranges(P, tokens)
    pool = (rows, ranges.total, P, H), dtype
    size = rows * ranges.total * P * H * jnp.dtype(dtype).itemsize
    shapes = ((rows, K * G, H), dtype), pool, pool, ((rows, K, ranges.most), jnp.int32), SCALAR
    program = compile_for(device, ragged_decode_attention, *shapes, ranges=ranges)
    assert "tpu_custom_call" in program.as_text()
    assert program.memory_analysis().temp_size_in_bytes < size / L
    if commit:
        page, slot = ((L, rows, K, P, H), dtype), ((L, rows, K), jnp.int32)
        program = compile_for(device, ragged_page_commit, pool, page, slot, donate=0, ranges=ranges)
        assert program.memory_analysis().temp_size_in_bytes < size / L / 100
        assert program.memory_analysis().alias_size_in_bytes >= size


@pytest.mark.parametrize("name", TPUS)
def test_ranges_of_a_pool_for_every_tpu(tpu, name):
    assert_pool_stays(tpu(name)[0], bf16, 16)


@pytest.mark.parametrize(
    ("dtype", "P", "H", "G", "rows", "commit"),
    [
        # Of single bfloat16 tokens only the reading: half a word cannot be written.
        (bf16, 1, 128, 4, 8, False),
        (f32, 1, 128, 1, 8, True),
        (bf16, 2, 128, 7, 8, True),
        (f32, 4, 128, 9, 3, True),
        (bf16, 128, 128, 4, 8, True),
        (f32, 48, 256, 2, 8, True),
        (bf16, 16, 128, 4, 64, True),
    ],
)
def test_ranges_of_pools_of_many_shapes(tpu, dtype, P, H, G, rows, commit):
    assert_pool_stays(tpu("v5e:2x2")[0], dtype, P, H, G, rows, commit=commit)


def test_ranges_of_one_row(tpu):
    """So long that the pool does not fit into the chip's own memory."""
    assert_pool_stays(tpu("v5e:2x2")[0], bf16, 16, rows=1, tokens=16_384)
