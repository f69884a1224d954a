"""The Hopper kernel over ranges of a pool, against the reference, with race detection.

Living tokens apart, the pool is NaN: dead slots, other layers and other heads.
`tests/aot/test_kernels.py` compiles it for the chip.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from pools import living
from tolerances import assert_same_on_hopper

from pallas_kernels import Target, ragged_decode_attention
from pallas_kernels.arrays import result
from pallas_kernels.hopper import MULTIPROCESSORS, TILE, choose_ragged_splits
from pallas_kernels.ragged_decode_attention.gpu import (
    places_of_tiles,
    ragged_decode_attention_gpu,
)
from pallas_kernels.ragged_decode_attention.reference import ragged_decode_attention_reference
from pallas_kernels.ranges import Ranges

H100 = "NVIDIA H100 80GB HBM3"
BF16, F32 = jnp.bfloat16, jnp.float32
HOPPER = Target("gpu", H100)

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public interpreter for GPU kernels; 0.12 has",
)


def drawn(ranges, layer, dtype, H, G, P, B):
    """Operands whose pools hold nothing but living tokens; pages are empty, full and partly so."""
    rng = np.random.default_rng(layer)
    fill = rng.integers(0, P + 1, (B, ranges.heads, ranges.most))
    fill[rng.random(fill.shape) < 0.3] = 0
    fill[rng.random(fill.shape) < 0.3] = P
    return living(rng, ranges, layer, fill, dtype, H, G, P)


# Ranges shorter than a tile (the pool's last one too), and of several; tiles moved back.
CASES = [
    # dtype, H, G, P, B, counts
    (BF16, 64, 3, 16, 2, ((1, 7), (9, 2))),
    (BF16, 128, 7, 8, 1, ((9, 17), (3, 1))),
    (BF16, 64, 1, 1, 1, ((3, 70), (130, 5))),
    (BF16, 64, 2, 4, 1, ((1, 18), (3, 2))),
    (BF16, 64, 9, 128, 1, ((1, 2), (2, 1))),
    (BF16, 80, 5, 32, 1, ((1, 3), (4, 1))),
    (F32, 128, 3, 8, 1, ((2, 12), (9, 1))),
]


@interpreted
@pytest.mark.parametrize(("dtype", "H", "G", "P", "B", "counts"), CASES)
def test_attention(dtype, H, G, P, B, counts):
    """In every layer by one program."""
    ranges = Ranges(counts)
    options = {"sizes": ranges.sizes, "scale": 0.2}
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    attend = jax.jit(
        partial(ragged_decode_attention_gpu, **options, device_kind=H100, interpret=interpreter)
    )
    for layer in range(ranges.layers):
        operands = drawn(ranges, layer, dtype, H, G, P, B)
        exact = [x.astype(F32) for x in operands[:3]]
        wanted = ragged_decode_attention_reference(*exact, *operands[3:], **options)
        assert_same_on_hopper(attend(*operands), wanted, dtype)


@interpreted
def test_attention_in_a_part_of_the_pool():
    """As the second of two devices: its starts are counted from the beginning of the whole pool."""
    ranges = Ranges(((1, 3, 2, 2), (2, 2, 1, 3)), parts=2)
    q, k, v, fill, starts, counts, layer = drawn(ranges, 1, F32, 64, 2, 16, 1)
    options = {"sizes": ranges.sizes, "scale": 0.1}
    wanted = ragged_decode_attention_reference(q, k, v, fill, starts, counts, layer, **options)
    mine = q[:, 4:], k[:, 8:], v[:, 8:], fill[:, 2:], starts[:, 2:], counts[:, 2:], layer
    got = ragged_decode_attention_gpu(
        *mine, **options, device_kind=H100, interpret=plgpu.InterpretGPUParams()
    )
    assert_same_on_hopper(got, type(wanted)(*(x[:, 4:] for x in wanted)), F32)


@pytest.mark.parametrize("P", [1, 2, 8, 16, 64, 128])
def test_every_token_of_a_range_is_in_one_tile(P):
    """And no tile reaches beyond the pool, or further than it must beyond the range."""
    rng = np.random.default_rng(P)
    counts = rng.integers(1, 200 // P + 2, (3, 4))
    counts[-1, -1] += -np.sum(counts) * P % 8
    ranges = Ranges(tuple(map(tuple, counts.tolist())))
    tokens, size = ranges.total * P, min(P, TILE)
    places = places_of_tiles(
        jnp.asarray(ranges.starts), jnp.asarray(counts), ranges.most, P, tokens
    )
    tiles, start, slot, inside, mine, piece = map(np.asarray, places)
    assert start.min() >= 0 and start.max() <= tokens - TILE and not np.any(start % 8)
    for at in np.ndindex(counts.shape):
        first, last = (ranges.starts[at] * P, (ranges.starts[at] + counts[at]) * P)
        pieces = [
            slot[(*at, *where)] * P + inside[(*at, *where)] for where in np.argwhere(mine[at])
        ]
        assert pieces == list(range(0, counts[at] * P, size))
        # Those of tiles that the head does not have are not among them.
        assert not np.any(mine[at][tiles[at] :])
        if last - first >= TILE + 8:
            own = start[at][: tiles[at]]
            assert own.min() > first - 8 and own.max() + TILE < last + 8
        # And each is found again where its slot says that it is.
        flat = [x[at].reshape(-1) for x in (slot, inside, mine)]
        for number, where in enumerate(piece[at][: counts[at] * P // size]):
            assert flat[2][where]
            assert flat[0][where] * P + flat[1][where] == number * size


def test_long_heads_have_more_parts():
    """None of more tiles than the average head, and enough of them for the chip."""
    for blocks in (1, 8, 64, 512):
        for most, mean in ((1, 1), (40, 16), (300, 10)):
            splits = choose_ragged_splits(blocks, most, mean)
            each = -(-most // splits)
            assert 1 <= each <= mean
            assert each == 1 or blocks * mean / each >= MULTIPROCESSORS


# What it does not serve, and that it lowers at all, on any version of jax.


def shapes(ranges, G=3, P=16, H=64, dtype=BF16):
    pool = result(2, ranges.total, P, H, dtype=dtype)
    fill = result(2, ranges.heads, ranges.most, dtype=jnp.int32)
    return result(2, ranges.heads * G, H, dtype=dtype), pool, pool, fill


@pytest.mark.parametrize(
    ("sizes", "counts", "reason"),
    [
        ({"dtype": jnp.float16}, ((4, 4),), "q is float16 and the pages float16"),
        ({"dtype": F32, "H": 256}, ((4, 4),), "head dim is 256; in float32 at most 128"),
        ({"P": 12}, ((4, 4),), "page of 12 tokens"),
        ({}, ((1, 2),), "T \\* P is 48, not a multiple of 8 that is at least 64"),
        ({"P": 1}, ((60, 9),), "T \\* P is 69"),
    ],
)
def test_what_the_tiles_cannot_hold_is_declined_with_its_reason(sizes, counts, reason):
    ranges = Ranges(counts)
    attend = partial(ragged_decode_attention, layer=0, ranges=ranges)
    with pytest.raises(ValueError, match=reason):
        call = partial(attend, implementation="gpu", target=HOPPER)
        jax.eval_shape(call, *shapes(ranges, **sizes))
    # The XLA path takes it.
    jax.eval_shape(partial(attend, target=HOPPER), *shapes(ranges, **sizes))


def test_it_lowers_for_cuda_without_a_gpu_or_its_plugin():
    ranges = Ranges(((1, 7), (9, 2)))
    call = jax.jit(partial(ragged_decode_attention, ranges=ranges, target=HOPPER))
    traced = call.trace(*shapes(ranges), result(dtype=jnp.int32))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
