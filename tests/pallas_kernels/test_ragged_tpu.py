"""The TPU kernels over ranges of a pool in Pallas' checking interpreter, against the references.

Living tokens apart, the pool is NaN: dead slots, other layers and other heads. Memory that was not
written is NaN too, a page out of range raises, and a read before its copy has ended is a race.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pools import living
from tolerances import assert_same_attention

from pallas_kernels.decode_attention import tuning
from pallas_kernels.ragged_decode_attention.reference import ragged_decode_attention_reference
from pallas_kernels.ragged_decode_attention.tpu import (
    live_from,
    ragged_decode_attention_tpu,
    unit_places,
)
from pallas_kernels.ragged_decode_attention.tuning import RaggedBlocks, alignment, ragged_blocks
from pallas_kernels.ragged_page_commit.reference import ragged_page_commit_reference
from pallas_kernels.ragged_page_commit.tpu import ragged_page_commit_tpu
from pallas_kernels.ranges import Ranges

f32, bf16 = jnp.float32, jnp.bfloat16


def drawn(ranges, layer, dtype, H, G, P, *, B=2, fill=None):
    """Operands whose pools hold nothing but living tokens; one head of several rows is empty."""
    rng = np.random.default_rng(layer)
    if fill is None:
        fill = rng.integers(0, P + 1, (B, ranges.heads, ranges.most))
        fill[rng.random(fill.shape) < 0.3] = P
        fill[:-1, 0] = 0
    return living(rng, ranges, layer, fill, dtype, H, G, P)


# Ranges of one page and of many, units that fill a range or not, heads and rows in every grouping.
SMALL, LONG, FINE = ((1, 3), (6, 2)), ((9, 1), (1, 11)), ((3, 30), (18, 5))
ATTENTION = [
    # dtype, H, G, P, B, counts, blocks, device_kind
    (f32, 64, 3, 4, 2, SMALL, RaggedBlocks(rows=2, pages=2), ""),
    (bf16, 128, 7, 16, 2, LONG, RaggedBlocks(rows=1, pages=8), ""),
    (bf16, 80, 2, 16, 1, LONG, RaggedBlocks(rows=1, pages=3, groups=2), "TPU v4"),
    (bf16, 128, 4, 16, 3, SMALL, None, ""),
    (f32, 96, 9, 3, 2, SMALL, RaggedBlocks(rows=1, pages=4), "TPU v5"),
    (bf16, 128, 2, 1, 1, FINE, RaggedBlocks(rows=1, pages=16), ""),
    (f32, 128, 5, 1, 2, FINE, None, ""),
    (bf16, 64, 2, 128, 1, SMALL, RaggedBlocks(rows=1, pages=1), ""),
    (f32, 64, 4, 128, 2, ((1, 2), (3, 1)), None, ""),
]  # fmt: skip


@pytest.mark.parametrize(("dtype", "H", "G", "P", "B", "counts", "blocks", "kind"), ATTENTION)
def test_attention(checked, dtype, H, G, P, B, counts, blocks, kind):
    """In every layer by one program."""
    ranges = Ranges(counts)
    options = {"sizes": ranges.sizes, "scale": H**-0.5}
    attend = jax.jit(
        functools.partial(ragged_decode_attention_tpu, **options, blocks=blocks, device_kind=kind)
    )
    for layer in range(ranges.layers):
        operands = drawn(ranges, layer, dtype, H, G, P, B=B)
        wanted = ragged_decode_attention_reference(*operands, **options)
        assert_same_attention(checked(attend, *operands), wanted, dtype)


def test_attention_in_a_part_of_the_pool(checked):
    """As the second of two devices: its starts are counted from the beginning of the whole pool."""
    ranges = Ranges(((1, 3, 2, 2), (2, 2, 1, 3)), parts=2)
    q, k, v, fill, starts, counts, layer = drawn(ranges, 1, f32, 64, 2, 4)
    options = {"sizes": ranges.sizes, "scale": 0.1}
    wanted = ragged_decode_attention_reference(q, k, v, fill, starts, counts, layer, **options)
    mine = q[:, 4:], k[:, 8:], v[:, 8:], fill[:, 2:], starts[:, 2:], counts[:, 2:], layer
    attend = jax.jit(functools.partial(ragged_decode_attention_tpu, **options))
    got = checked(attend, *mine)
    assert_same_attention(got, type(wanted)(*(x[:, 4:] for x in wanted)), f32)


@pytest.mark.parametrize("kind", ["", "TPU v4"])
def test_attention_over_little_and_over_nothing(checked, kind):
    """Dead units between living ones, and a row, or all of them, without a living token."""
    ranges = Ranges(((2, 7), (1, 1)))
    fill = np.zeros((2, 2, 7), int)
    blocks = RaggedBlocks(rows=1, pages=2)
    attend = jax.jit(
        functools.partial(
            ragged_decode_attention_tpu,
            sizes=ranges.sizes,
            scale=1.0,
            blocks=blocks,
            device_kind=kind,
        )
    )
    empty = checked(attend, *drawn(ranges, 0, f32, 64, 1, 4, fill=fill))
    assert np.all(np.asarray(empty.out) == 0) and np.all(np.asarray(empty.sum) == 0)
    assert np.all(np.isneginf(empty.max)) and np.all(np.isneginf(empty.page_lse))
    fill[0, 1, [0, 5, 6]] = 1, 4, 2
    fill[1, 1, 2] = 3
    operands = drawn(ranges, 0, f32, 64, 1, 4, fill=fill)
    wanted = ragged_decode_attention_reference(*operands, sizes=ranges.sizes, scale=1.0)
    assert_same_attention(checked(attend, *operands), wanted, f32)


def test_pools_that_cannot_be_cut_are_declined():
    ranges = Ranges(((1, 3),))
    for P, dtype, reason in ((1, f32, "4 single tokens"), (3, bf16, "3 bfloat16 tokens")):
        operands = drawn(ranges, 0, dtype, 128, 1, P)
        with pytest.raises(NotImplementedError, match=reason):
            ragged_decode_attention_tpu(*operands, sizes=ranges.sizes, scale=1.0)


# The plan of a layer's steps


@pytest.mark.parametrize("groups", [1, 2])
def test_each_unit_has_a_step_and_no_other(groups):
    units = np.random.default_rng(0).integers(1, 5, (3, 4))
    places, totals = unit_places(jnp.asarray(units), groups, 4)
    for layer, counts in enumerate(units):
        for group, heads in enumerate(np.split(np.arange(4), groups)):
            wanted = [head * 4 + unit for head in heads for unit in range(counts[head])]
            found = np.asarray(places)[layer].reshape(groups, -1)[group]
            assert int(totals[layer, group]) == len(wanted)
            assert list(found[: len(wanted)]) == wanted
            assert set(found[len(wanted) :]) <= {wanted[-1]}


def test_the_next_living_unit():
    live = np.random.default_rng(0).random(30) < 0.3
    found = np.asarray(live_from(jnp.asarray(live)))
    for at, coming in enumerate(found):
        later = np.flatnonzero(live[at:]) + at
        assert coming == (later[0] if later.size else 30)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", ""])
def test_blocks_suit_the_chip_and_the_ranges(kind):
    """They divide rows and heads, fit with room for the next ones, and leave no core idle."""
    cores = tuning.CORES.get(kind, 1)
    for B in (1, 3, 8, 64):
        for K in (1, 2, 8):
            for P, sizes in (
                (16, (3, 64, 90)),
                (1, (1, 700)),
                (128, (1, 9)),
                (48, (4,)),
                (3, (9,)),
            ):
                for H, itemsize in ((64, 4), (128, 2), (256, 4)):
                    blocks = ragged_blocks(kind, B, K, P, H, itemsize, sizes)
                    assert B % blocks.rows == 0 and K % blocks.groups == 0
                    assert blocks.pages % alignment(P) == 0
                    row = -(-H // 128) * 128 * itemsize
                    assert 4 * blocks.rows * blocks.pages * P * row <= 8 << 20
                    parts = B // blocks.rows * blocks.groups
                    assert parts >= cores or (B % cores and K % cores) or cores > B * K


# The write of a page


@pytest.mark.parametrize(("dtype", "P", "H"), [(f32, 1, 64), (bf16, 16, 128), (f32, 3, 96)])
@pytest.mark.parametrize("part", [slice(None), slice(1, 2)])
def test_commit(checked, dtype, P, H, part):
    """Into the whole pool, and into that of the second of two devices."""
    ranges = Ranges(((3, 1), (2, 4)), parts=2)
    pages = slice(5 * (part.start or 0), None)
    rng = np.random.default_rng(0)
    slot = rng.integers(0, np.asarray(ranges.counts)[:, None], (2, 2, 2))[..., part]
    pool = jnp.asarray(rng.normal(size=(2, 10, P, H)), dtype)[:, pages]
    page = jnp.asarray(rng.normal(size=(*slot.shape, P, H)), dtype)
    operands = pool, page, jnp.asarray(slot, jnp.int32), jnp.asarray(ranges.starts[:, part])
    got = checked(ragged_page_commit_tpu, *operands)
    wanted = ragged_page_commit_reference(*operands)
    assert not np.array_equal(np.asarray(wanted, np.float32), np.asarray(pool, np.float32))
    np.testing.assert_array_equal(*(np.asarray(x, np.float32) for x in (got, wanted)))


def test_a_page_out_of_the_pool_raises(checked):
    operands = jnp.zeros((1, 2, 2, 8)), jnp.zeros((1, 1, 1, 2, 8)), jnp.full((1, 1, 1), 2)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Out-of-bounds"):
        checked(ragged_page_commit_tpu, *operands, jnp.zeros((1, 1), jnp.int32))


def test_half_a_word_is_declined():
    operands = jnp.zeros((1, 2, 1, 8), bf16), jnp.zeros((1, 1, 1, 1, 8), bf16)
    zero = jnp.zeros((1, 1, 1), jnp.int32)
    with pytest.raises(NotImplementedError, match="32 bits"):
        ragged_page_commit_tpu(*operands, zero, zero[0])
