"""`cache_attention`, its reference and its interpreted kernels, against NumPy in float64."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from caches import Sizes, by_the_book, drawn_cache
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Target, cache_attention
from pallas_kernels.cache_attention import api
from pallas_kernels.cache_attention.gpu import cache_attention_gpu
from pallas_kernels.cache_attention.tpu import cache_attention_tpu
from pallas_kernels.decode_attention.tuning import TpuBlocks
from pallas_kernels.ranges import Ranges

BF16, F32 = jnp.bfloat16, jnp.float32
SCALE = 0.2
H100 = "NVIDIA H100 80GB HBM3"
HOPPER = Target("gpu", H100)

# What the weights are rounded to before they meet the values; masses come from unrounded scores.
OUT = {"float32": 3e-5, "bfloat16": 1e-2}
MASS = 2e-5

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public interpreter for GPU kernels; 0.12 has",
)


def check(got, wanted, dtype):
    for name, one, other in zip(got._fields, got, wanted, strict=True):
        one = np.asarray(one, np.float64)
        assert one.shape == other.shape and not np.any(np.isnan(one)), name
        atol = OUT[jnp.dtype(dtype).name] if name == "out" else MASS
        np.testing.assert_allclose(one, other, rtol=0, atol=atol, err_msg=name)


# As models have them; of rows, heads and pages few, since kernels are interpreted.
shapes = st.builds(
    Sizes,
    B=st.sampled_from([1, 2]),
    K=st.sampled_from([1, 2]),
    G=st.sampled_from([1, 4, 7, 8]),
    H=st.sampled_from([64, 96, 128, 256]),
    P=st.sampled_from([8, 16, 32]),
    S=st.integers(1, 5),
    Sp=st.integers(0, 4),
    dtype=st.sampled_from([F32, BF16]),
)


def shared(sizes):
    """The same rows, of one prompt."""
    return dataclasses.replace(sizes, samples=sizes.B)


# The operation


@given(shapes, st.booleans(), st.booleans(), st.integers(0, 99))
@settings(max_examples=4)
def test_the_reference(sizes, one_prompt, with_sink, seed):
    sizes = shared(sizes) if one_prompt else sizes
    q, *segments, tokens = drawn_cache(sizes, seed)
    sink = np.random.default_rng(seed).normal(size=q.shape[1]) if with_sink else None
    given_sink = None if sink is None else jnp.asarray(sink, F32)
    attend = jax.jit(partial(cache_attention, scale=SCALE, implementation="xla"))
    got = attend(q, *segments, sink=given_sink)
    check(got, by_the_book(q, tokens, sizes, SCALE, sink), sizes.dtype)


def test_without_a_sink_all_shares_are_one():
    """Of a cache without a prompt."""
    sizes = Sizes(B=2, K=2, G=3, S=4, Sp=0)
    q, *segments, _ = drawn_cache(sizes)
    got = jax.jit(cache_attention)(q, *segments)
    np.testing.assert_allclose(got.kept_mass.sum(-1) + got.current_mass, 1, rtol=1e-5)


def test_of_a_pool():
    ranges = Ranges(((2, 1), (1, 3)))
    sizes = Sizes(B=2, samples=2, K=2, G=2, S=3, ranges=ranges)
    q, *segments, tokens = drawn_cache(sizes)
    got = jax.jit(partial(cache_attention, ranges=ranges, scale=SCALE))(q, *segments)
    check(got, by_the_book(q, tokens, sizes, SCALE), F32)


# The kernel for TPUs


def on_a_tpu(checked, sizes, blocks):
    q, *segments, tokens = drawn_cache(sizes)
    attend = partial(cache_attention_tpu, sizes=None, scale=SCALE, blocks=blocks)
    found = checked(jax.jit(attend), q, *segments, None, None)
    check(api.finished(found, None), by_the_book(q, tokens, sizes, SCALE), sizes.dtype)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        (Sizes(B=2, K=2, G=7, H=64, P=8, S=5, Sp=3), TpuBlocks(heads=1, pages=2, splits=1)),
        (Sizes(B=2, samples=2, K=2, G=4, H=128, P=16, S=3, Sp=2, dtype=BF16), None),
        (Sizes(B=2, samples=2, G=8, H=96, P=32, S=2, Sp=2), TpuBlocks(1, 1, 1)),
        (Sizes(G=1, H=256, P=8, S=2, Sp=0), None),
        (Sizes(G=2, H=128, P=1, S=9, Sp=10), None),
    ],
)
def test_on_a_tpu(checked, sizes, blocks):
    """Every way of cutting the work."""
    on_a_tpu(checked, sizes, blocks)


@given(shapes, st.booleans())
@settings(
    max_examples=2,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_of_any_shape_on_a_tpu(checked, sizes, one_prompt):
    on_a_tpu(checked, shared(sizes) if one_prompt else sizes, None)


# The kernel for Hopper GPUs


def on_a_gpu(sizes, seed=0):
    q, *segments, tokens = drawn_cache(sizes, seed)
    interpreter = plgpu.InterpretGPUParams(detect_races=True)
    options = {"sizes": None, "scale": SCALE, "device_kind": H100, "interpret": interpreter}
    found = jax.jit(partial(cache_attention_gpu, **options))(q, *segments, None, None)
    check(api.finished(found, None), by_the_book(q, tokens, sizes, SCALE), sizes.dtype)


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(B=2, samples=2, K=2, G=7, H=128, P=8, S=12, Sp=3, dtype=BF16),
        Sizes(G=4, H=64, P=16, S=9, Sp=5),
        Sizes(G=40, H=128, P=64, S=2, Sp=0, dtype=BF16),  # More heads than one block serves.
        Sizes(G=2, H=96, P=128, S=1, Sp=1, dtype=BF16),  # Two tiles per page.
    ],
)
def test_on_a_gpu(sizes):
    on_a_gpu(sizes)


@interpreted
@given(shapes, st.booleans())
@settings(max_examples=2, derandomize=True)
def test_of_any_shape_on_a_gpu(sizes, one_prompt):
    if sizes.dtype == F32 and sizes.H > 128:
        sizes = dataclasses.replace(sizes, dtype=BF16)
    on_a_gpu(shared(sizes) if one_prompt else sizes)
