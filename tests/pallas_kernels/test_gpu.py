"""The kernels for Hopper GPUs against their references, in the interpreter, with race detection.

What is dead is NaN everywhere. `tests/aot/test_hopper.py` compiles them for the chip.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from tolerances import HOPPER_TOLERANCES, assert_same_on_hopper

from pallas_kernels import Target, decode_attention, page_bound, selected_decode_attention
from pallas_kernels.decode_attention.gpu import decode_attention_gpu
from pallas_kernels.page_bound.gpu import page_bound_gpu
from pallas_kernels.selected_decode_attention.gpu import selected_decode_attention_gpu

H100 = "NVIDIA H100 80GB HBM3"
BF16, F32 = jnp.bfloat16, jnp.float32
HOPPER = Target("gpu", H100)

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public interpreter for GPU kernels; 0.12 has",
)


def interpreter():
    return plgpu.InterpretGPUParams(detect_races=True)


def normal(rng, *shape):
    return rng.normal(size=shape)


def case(B, K, G, S, P, H, prompts=None, fill=None, dtype=BF16):
    """q, k, v and fill; pages are empty, full and partly filled, and NaN where they are dead."""
    rng = np.random.default_rng(0)
    rows = prompts or B
    if fill is None:
        fill = rng.integers(0, P + 1, (rows, K, S))
        fill[rng.random(fill.shape) < 0.3] = 0
        fill[rng.random(fill.shape) < 0.3] = P
    fill = np.asarray(fill)
    dead = np.arange(P) >= fill[..., None]
    k, v = normal(rng, 2, rows, K, S, P, H), normal(rng, 2, rows, K, S, P, H)
    k[:, dead] = v[:, dead] = np.nan
    k[0] = v[0] = np.nan  # The other layer.
    arrays = [jnp.asarray(x, dtype) for x in (normal(rng, B, K * G, H), k, v)]
    return (*arrays, jnp.asarray(fill, jnp.int32))


def check(got, wanted, dtype=BF16):
    assert_same_on_hopper(got, wanted, dtype)


def exact(*arrays):
    return [x.astype(jnp.float32) for x in arrays]


@interpreted
@pytest.mark.parametrize(
    "dtype, B, K, G, S, P, H",
    [
        (BF16, 2, 2, 3, 8, 16, 64),  # Several rows and heads.
        (BF16, 1, 1, 7, 9, 8, 128),  # The last tile begins within the one before it.
        (BF16, 1, 1, 1, 72, 1, 64),  # Pages of one token.
        (BF16, 1, 1, 16, 2, 128, 64),  # Two tiles per page.
        (BF16, 1, 1, 33, 2, 32, 256),  # More query heads than one block serves.
        (BF16, 1, 1, 5, 4, 16, 80),  # Heads on the long side of the second product.
        (BF16, 1, 1, 9, 2, 64, 96),
        (F32, 1, 1, 3, 9, 8, 128),  # Split into halves.
        (F32, 1, 1, 9, 4, 32, 80),
    ],
)
def test_decode_attention(dtype, B, K, G, S, P, H):
    q, k, v, fill = case(B, K, G, S, P, H, dtype=dtype)
    layer = jnp.int32(1)
    got = decode_attention_gpu(
        q, k, v, fill, layer, scale=0.2, device_kind=H100, interpret=interpreter()
    )
    wanted = decode_attention(*exact(q, k, v), fill, layer, scale=0.2, implementation="xla")
    check(got, wanted, dtype)


@interpreted
def test_decode_attention_of_one_long_row_in_several_parts():
    """One row and head: four blocks, one of them with nothing alive, and scores far apart."""
    q, k, v, fill = case(1, 1, 2, 4, 64, 64, fill=[[[64, 0, 20, 64]]])
    q = q * jnp.asarray([1, 8], q.dtype)[:, None]
    got = decode_attention_gpu(
        q, k, v, fill, jnp.int32(1), scale=1.0, device_kind=H100, interpret=interpreter()
    )
    check(got, decode_attention(*exact(q, k, v), fill, 1, scale=1.0, implementation="xla"))


@interpreted
def test_an_empty_segment_has_no_weight_and_is_never_read():
    q, k, v, _ = case(1, 1, 2, 2, 32, 64)
    got = decode_attention_gpu(
        q,
        k * jnp.nan,
        v * jnp.nan,
        jnp.zeros((1, 1, 2), jnp.int32),
        jnp.int32(1),
        scale=1.0,
        device_kind=H100,
        interpret=interpreter(),
    )
    assert np.all(np.asarray(got.out) == 0) and np.all(np.asarray(got.sum) == 0)
    assert np.all(np.isneginf(got.max)) and np.all(np.isneginf(got.page_lse))


@interpreted
@pytest.mark.parametrize(
    "B, prompts, S, P, C", [(2, 1, 6, 16, 5), (2, 2, 9, 8, 8), (1, 1, 3, 128, 2)]
)
def test_selected_decode_attention(B, prompts, S, P, C):
    """Rows that share pages, lists that do not fill their tiles, slots of -1."""
    q, k, v, fill = case(B, 2, 3, S, P, 64, prompts)
    rng = np.random.default_rng(1)
    slots = np.stack([rng.permutation(S)[:C] for _ in range(2 * B)]).reshape(B, 2, C)
    slots[0, 0, 1] = -1
    slots = jnp.asarray(slots, jnp.int32)
    got = selected_decode_attention_gpu(
        q, k, v, fill, slots, jnp.int32(1), scale=0.2, device_kind=H100, interpret=interpreter()
    )
    wanted = selected_decode_attention(
        *exact(q, k, v), fill, slots, 1, scale=0.2, implementation="xla"
    )
    check(got, wanted)


@interpreted
@pytest.mark.parametrize("G, S, H", [(3, 64, 64), (9, 72, 80), (40, 136, 64)])
def test_page_bound(G, S, H):
    rng = np.random.default_rng(0)
    q = jnp.asarray(normal(rng, 2, G, H), jnp.bfloat16)
    low, high = (jnp.asarray(normal(rng, 2, 2, 1, S, H), jnp.bfloat16) for _ in range(2))
    got = page_bound_gpu(
        q, low, high, jnp.int32(1), scale=0.2, device_kind=H100, interpret=interpreter()
    )
    wanted = page_bound(q, low, high, 1, scale=0.2, implementation="xla")
    scale = float(jnp.max(jnp.abs(wanted)))
    np.testing.assert_allclose(
        got, wanted, rtol=0, atol=HOPPER_TOLERANCES["bfloat16"]["bound"] * scale
    )


# What they do not serve, and that they lower at all, on any version of jax.


def declines(operation, arrays, reason, target=HOPPER):
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(
            lambda *arrays: operation(*arrays, implementation="gpu", target=target), *arrays
        )


def shapes(B=2, K=2, G=3, S=8, P=16, H=64, dtype=jnp.bfloat16):
    pages = jax.ShapeDtypeStruct((2, B, K, S, P, H), dtype)
    fill = jax.ShapeDtypeStruct((B, K, S), jnp.int32)
    return jax.ShapeDtypeStruct((B, K * G, H), dtype), pages, pages, fill


@pytest.mark.parametrize(
    "sizes, reason",
    [
        ({"dtype": jnp.float16}, "q is float16 and the pages float16"),
        ({"dtype": F32, "H": 256}, "head dim is 256; in float32 at most 128"),
        ({"H": 72}, "head dim is 72"),
        ({"P": 12}, "page of 12 tokens"),
        ({"S": 2}, "S \\* P is 32, not a multiple of 8 that is at least 64"),
        ({"S": 65, "P": 1}, "S \\* P is 65"),
    ],
)
def test_what_the_tiles_cannot_hold_is_declined_with_its_reason(sizes, reason):
    declines(decode_attention, shapes(**sizes), reason)


@pytest.mark.parametrize("kind", ["NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090", ""])
def test_other_gpus_take_the_xla_path(kind):
    declines(decode_attention, shapes(), "no GPU of compute capability 9.0", Target("gpu", kind))
    attend = partial(decode_attention, target=Target("gpu", kind))
    assert jax.eval_shape(attend, *shapes()).out.shape == (2, 6, 64)


def test_small_pages_and_few_pages_are_declined():
    q, k, v, fill = shapes(P=4, S=32)
    slots = jax.ShapeDtypeStruct((2, 2, 16), jnp.int32)
    declines(selected_decode_attention, (q, k, v, fill, slots), "page has 4 tokens")
    bounds = jax.ShapeDtypeStruct((2, 2, 2, 60, 64), jnp.bfloat16)
    declines(page_bound, (q, bounds, bounds), "S is 60")


def test_they_lower_for_cuda_without_a_gpu_or_its_plugin():
    q, k, v, fill = shapes()
    slots = jax.ShapeDtypeStruct((2, 2, 5), jnp.int32)
    bounds = jax.ShapeDtypeStruct((2, 2, 2, 64, 64), jnp.bfloat16)
    for operation, arrays in (
        (decode_attention, (q, k, v, fill)),
        (selected_decode_attention, (q, k, v, fill, slots)),
        (page_bound, (q, bounds, bounds)),
    ):
        call = jax.jit(lambda *a, f=operation: f(*a, implementation="gpu", target=HOPPER))
        text = call.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
