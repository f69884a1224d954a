"""The TPU kernels in Pallas' checking interpreter, against the references.

It simulates the memories and the copies between them: memory that was not written is NaN, a slot
out of range raises, and a read before its copy has ended is a race. Pools are tiny, since each step
takes tens of milliseconds. What is dead is NaN.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tolerances import assert_close, assert_same_attention

from pallas_kernels.decode_attention import tuning
from pallas_kernels.decode_attention.reference import decode_attention_reference
from pallas_kernels.decode_attention.tpu import decode_attention_tpu, fetched_blocks
from pallas_kernels.decode_attention.tuning import TpuBlocks, tpu_blocks
from pallas_kernels.page_bound.reference import page_bound_reference
from pallas_kernels.page_bound.tpu import page_bound_tpu
from pallas_kernels.page_commit.reference import page_commit_reference
from pallas_kernels.page_commit.tpu import page_commit_tpu
from pallas_kernels.prefill_attention.reference import prefill_attention_reference
from pallas_kernels.prefill_attention.tpu import prefill_attention_tpu
from pallas_kernels.selected_decode_attention.reference import selected_decode_attention_reference
from pallas_kernels.selected_decode_attention.tpu import selected_decode_attention_tpu

LAYER = jnp.int32(1)


def normal(rng, dtype, *shape):
    return jnp.asarray(rng.normal(size=shape), dtype)


def drawn(dtype, H, G, P, S, *, B=2, K=2, seed=0):
    """Queries, poisoned pages and a ragged fill: empty rows, empty heads, empty blocks."""
    rng = np.random.default_rng(seed)
    fill = rng.integers(0, P + 1, (B, K, S))
    fill[0, 0] = 0
    fill[-1, :, : S // 2] = 0
    dead = (np.arange(P) >= fill[..., None])[None, ..., None]
    k, v = (jnp.where(dead, jnp.nan, normal(rng, dtype, 2, B, K, S, P, H)) for _ in range(2))
    return normal(rng, dtype, B, K * G, H), k, v, jnp.asarray(fill, jnp.int32)


f32, bf16 = jnp.float32, jnp.bfloat16

# Every head dim, group and page size of the contract; each with another way of cutting the work.
ATTENTION = [
    # dtype, H, G, P, S, blocks
    (f32, 64, 3, 4, 5, TpuBlocks(heads=1, pages=2, splits=1)),
    (bf16, 80, 1, 16, 9, TpuBlocks(heads=2, pages=8, splits=1)),
    (f32, 96, 16, 3, 5, TpuBlocks(heads=1, pages=2, splits=2)),
    (bf16, 128, 7, 16, 16, None),
    (f32, 256, 4, 8, 3, None),
    (bf16, 128, 2, 1, 130, None),
    (f32, 128, 5, 2, 64, TpuBlocks(heads=2, pages=64, splits=1)),
    (bf16, 64, 8, 128, 3, TpuBlocks(heads=1, pages=1, splits=1)),
    (f32, 64, 2, 48, 3, TpuBlocks(heads=2, pages=2, splits=1)),
    (bf16, 128, 6, 32, 8, TpuBlocks(heads=1, pages=4, splits=2)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "H", "G", "P", "S", "blocks"),
    ATTENTION,
)
def test_decode_attention(checked, dtype, H, G, P, S, blocks):
    operands = drawn(dtype, H, G, P, S)
    attend = functools.partial(decode_attention_tpu, scale=H**-0.5, blocks=blocks)
    got = checked(attend, *operands, LAYER)
    wanted = decode_attention_reference(*operands, LAYER, scale=H**-0.5)
    assert_same_attention(got, wanted, dtype)


def test_decode_attention_over_nothing(checked):
    q, k, v, _ = drawn(f32, 64, 1, 8, 2, B=1)
    empty = checked(
        decode_attention_tpu, q, k * jnp.nan, v * jnp.nan, jnp.zeros((1, 2, 2), jnp.int32), LAYER,
        scale=1.0,
    )  # fmt: skip
    assert np.all(np.asarray(empty.out) == 0) and np.all(np.asarray(empty.sum) == 0)
    assert np.all(np.isneginf(empty.max)) and np.all(np.isneginf(empty.page_lse))


def test_a_layer_out_of_range_raises(checked):
    operands = drawn(f32, 64, 1, 8, 2, B=1, K=1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds"):
        checked(decode_attention_tpu, *operands, jnp.int32(2), scale=1.0)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_dead_block_is_never_fetched(steps):
    """Each step holds the latest live block, or before there was one the first to come."""
    rng = np.random.default_rng(0)
    for live in rng.random((20, steps * 5)) < 0.4:
        fetched = np.asarray(fetched_blocks(jnp.asarray(live)))
        for at, block in enumerate(fetched):
            if live[at]:
                assert block == at
            elif live.any():
                assert live[block] and (block < at or not live[:at].any())
                assert not live[block + 1 : at].any()


# Selected slots


def chosen(rows, K, S, C):
    """Distinct slots; one head lists none, and one only some."""
    rng = np.random.default_rng(1)
    slots = np.argsort(rng.random((rows, K, S)), axis=-1)[..., :C]
    slots[0, 0], slots[-1, -1, 0] = -1, -1
    return jnp.asarray(slots, jnp.int32)


@pytest.mark.parametrize(
    ("dtype", "H", "G", "P", "S", "C", "samples", "pages"),
    [(f32, 128, 4, 4, 7, 5, 1, 2), (bf16, 64, 2, 16, 6, 4, 2, None), (f32, 96, 1, 3, 4, 3, 1, 3)],
)
def test_selected_decode_attention(checked, dtype, H, G, P, S, C, samples, pages):
    _, k, v, fill = drawn(dtype, H, G, P, S)
    q = drawn(dtype, H, G, P, S, B=2 * samples)[0]
    operands = q, k, v, fill, chosen(2 * samples, 2, S, C), LAYER
    got = checked(selected_decode_attention_tpu, *operands, scale=0.1, pages=pages)
    wanted = selected_decode_attention_reference(*operands, scale=0.1)
    assert_same_attention(got, wanted, dtype)


def test_a_selected_slot_out_of_range_raises(checked):
    q, k, v, _ = drawn(f32, 64, 1, 8, 2, B=1, K=1)
    full = jnp.full((1, 1, 3), 8)
    # The fill has a third slot, the pages have not.
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds"):
        checked(
            selected_decode_attention_tpu, q, k, v, full, jnp.full((1, 1, 1), 2), LAYER, scale=1.0
        )


# Bounds and commits


@pytest.mark.parametrize(("dtype", "H", "G", "S"), [(f32, 128, 3, 5), (bf16, 80, 9, 16)])
def test_page_bound(checked, dtype, H, G, S):
    rng = np.random.default_rng(0)
    q = normal(rng, dtype, 2, 2 * G, H)
    low, high = (normal(rng, dtype, 2, 2, 2, S, H) for _ in range(2))
    operands = q, low, high, LAYER
    got = checked(page_bound_tpu, *operands, scale=0.1)
    assert_close(got, page_bound_reference(*operands, scale=0.1), dtype, "scores")


@pytest.mark.parametrize(("dtype", "P", "H"), [(f32, 1, 64), (bf16, 16, 128), (f32, 3, 96)])
def test_page_commit(checked, dtype, P, H):
    _, pages, other, _ = drawn(dtype, H, 1, P, 4)
    slot = jnp.asarray(np.random.default_rng(2).integers(0, 4, (2, 2, 2)), jnp.int32)
    operands = pages, jnp.nan_to_num(other[:, :, :, 0]), slot
    got = checked(page_commit_tpu, *operands)
    np.testing.assert_array_equal(
        *(np.asarray(x, np.float32) for x in (got, page_commit_reference(*operands)))
    )


def test_a_victim_out_of_range_raises(checked):
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds"):
        checked(
            page_commit_tpu, jnp.zeros((1, 1, 1, 2, 2, 8)), jnp.zeros((1, 1, 1, 2, 8)),
            jnp.full((1, 1, 1), 2),
        )  # fmt: skip


def test_half_a_word_is_declined():
    pages, page = jnp.zeros((1, 1, 1, 2, 1, 8), bf16), jnp.zeros((1, 1, 1, 1, 8), bf16)
    with pytest.raises(NotImplementedError, match="32 bits"):
        page_commit_tpu(pages, page, jnp.zeros((1, 1, 1), jnp.int32))


# Prefill


@pytest.mark.parametrize(
    ("segmented", "window", "sink"),
    [(False, None, None), (True, None, None), (False, 70, (1.0, -2.0)), (True, 5, (0.5, 9.0))],
)
def test_prefill(checked, segmented, window, sink):
    """Not a multiple of a block, so that the library's kernel sees padding."""
    rng = np.random.default_rng(0)
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (1, 200))), jnp.int32) if segmented else None
    q, k, v = (normal(rng, f32, 1, 200, heads, 64) for heads in (2, 1, 1))
    operands = q, k, v, segments, None if sink is None else jnp.asarray(sink)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = prefill_attention_tpu(*operands, scale=0.1, window=window)
    wanted = prefill_attention_reference(*operands, scale=0.1, window=window)
    assert_close(got, wanted, f32)


@pytest.mark.parametrize(("T", "H", "reason"), [(100, 64, "100 tokens"), (128, 96, "head dim 96")])
def test_prefill_declines(T, H, reason):
    q = jnp.zeros((1, T, 2, H))
    with pytest.raises(NotImplementedError, match=reason):
        prefill_attention_tpu(q, q, q, None, scale=1.0)


# Block sizes


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", ""])
def test_blocks_suit_the_chip(kind):
    """They divide the heads, fit with room for the next ones, and leave no core idle."""
    for B in (1, 8, 256):
        for K in (1, 4, 8):
            for S, P in ((64, 16), (512, 16), (5, 3), (1024, 1), (64, 128)):
                for H, itemsize in ((64, 4), (128, 2), (256, 4)):
                    blocks = tpu_blocks(kind, B, K, S, P, H, itemsize)
                    assert K % blocks.heads == 0 and 1 <= blocks.pages <= S
                    row = -(-H // 128) * 128 * itemsize
                    # Keys and values, twice each, in the 16 MiB that a kernel may have.
                    block = blocks.heads * blocks.pages * P * row
                    assert 4 * block <= 8 << 20
                    steps = math.prod((B, K // blocks.heads, blocks.splits))
                    assert steps >= min(tuning.CORES.get(kind, 1), S)
