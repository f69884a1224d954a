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
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import Segment, Target, cache_attention
from pallas_kernels.arrays import result
from pallas_kernels.cache_attention import api
from pallas_kernels.cache_attention.gpu import cache_attention_gpu
from pallas_kernels.cache_attention.ragged_tpu import ragged_cache_attention_tpu
from pallas_kernels.cache_attention.segments import Attended
from pallas_kernels.cache_attention.tpu import cache_attention_tpu
from pallas_kernels.decode_attention.tuning import TpuBlocks
from pallas_kernels.ragged_decode_attention.tuning import RaggedBlocks
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
@settings(max_examples=3)
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


def test_what_is_attended_is_rounded_last():
    """After a sink has joined."""
    q, *segments, _ = drawn_cache(Sizes(B=2, K=2, G=3, S=4, Sp=2, dtype=BF16))
    attend = partial(cache_attention, sink=jnp.ones(6, F32))
    got = jax.jit(partial(attend, dtype=BF16))(q, *segments)
    wanted = jax.jit(attend)(q, *segments)
    assert got.out.dtype == BF16 and wanted.out.dtype == F32
    jax.tree.map(np.testing.assert_array_equal, got, wanted._replace(out=wanted.out.astype(BF16)))


def test_of_a_pool():
    ranges = Ranges(((2, 1), (1, 3)))
    sizes = Sizes(B=2, samples=2, K=2, G=2, S=3, ranges=ranges)
    q, *segments, tokens = drawn_cache(sizes)
    got = jax.jit(partial(cache_attention, ranges=ranges, scale=SCALE))(q, *segments)
    check(got, by_the_book(q, tokens, sizes, SCALE), F32)


# The kernel for TPUs


def places(ranges):
    """What kernels are told of ranges."""
    if ranges is None:
        return None, None
    return jnp.asarray(ranges.starts), jnp.asarray(ranges.counts, jnp.int32)


def on_a_tpu(checked, sizes, blocks):
    q, *segments, tokens = drawn_cache(sizes)
    ranges = sizes.ranges
    kernel = cache_attention_tpu if ranges is None else ragged_cache_attention_tpu
    attend = partial(kernel, sizes=ranges and ranges.sizes, scale=SCALE, blocks=blocks)
    found = checked(jax.jit(attend), q, *segments, *places(ranges))
    check(api.finished(found, None), by_the_book(q, tokens, sizes, SCALE), sizes.dtype)


@pytest.mark.parametrize(
    ("sizes", "blocks"),
    [
        (Sizes(B=2, K=2, G=7, H=64, P=8, S=5, Sp=3), TpuBlocks(heads=1, pages=2, splits=1)),
        (Sizes(B=2, samples=2, K=2, G=4, H=128, P=16, S=3, Sp=2, dtype=BF16), None),
        (Sizes(B=2, samples=2, G=8, H=96, P=32, S=2, Sp=2), TpuBlocks(1, 1, 1)),
        (Sizes(G=1, H=256, P=8, S=2, Sp=0), None),
        (Sizes(G=2, H=128, P=1, S=9, Sp=10), None),
        (
            Sizes(B=2, K=2, G=3, P=8, S=7, Sp=3, ranges=Ranges(((1, 7), (5, 2)))),
            RaggedBlocks(rows=2, pages=2),
        ),
        (
            Sizes(B=2, K=2, G=7, H=128, P=16, S=5, Sp=0, dtype=BF16, ranges=Ranges(((5, 1),) * 2)),
            RaggedBlocks(rows=1, pages=2, groups=2),
        ),
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
    ranges = sizes.ranges
    options = {"scale": SCALE, "device_kind": H100, "interpret": interpreter}
    attend = partial(cache_attention_gpu, sizes=ranges and ranges.sizes, **options)
    found = jax.jit(attend)(q, *segments, *places(ranges))
    check(api.finished(found, None), by_the_book(q, tokens, sizes, SCALE), sizes.dtype)


@interpreted
@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(B=2, samples=2, K=2, G=7, H=128, P=8, S=12, Sp=3, dtype=BF16),
        Sizes(G=4, H=64, P=16, S=9, Sp=5),
        Sizes(G=40, H=128, P=64, S=2, Sp=0, dtype=BF16),  # More heads than one block serves.
        Sizes(G=2, H=96, P=128, S=1, Sp=1, dtype=BF16),  # Two tiles per page.
        Sizes(B=2, samples=2, K=2, P=16, S=9, Sp=3, dtype=BF16, ranges=Ranges(((1, 7), (9, 2)))),
        # The last tile of the pool has to begin earlier.
        Sizes(K=2, G=7, H=128, P=8, S=17, dtype=BF16, ranges=Ranges(((9, 17), (3, 12)))),
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


@interpreted
@pytest.mark.parametrize("H", [64, 96])
def test_a_gpu_rounds_what_is_attended(H):
    """By the kernel that joins the shares, or by XLA; the rest stays float32."""
    q, *segments, _ = drawn_cache(Sizes(K=2, G=3, H=H, P=16, S=9, Sp=2, dtype=BF16))
    options = {"scale": SCALE, "device_kind": H100, "interpret": plgpu.InterpretGPUParams()}
    attend = partial(cache_attention_gpu, sizes=None, **options)
    whole, rounded = (
        jax.jit(partial(attend, dtype=dtype))(q, *segments, None, None) for dtype in (F32, BF16)
    )
    wanted = whole._replace(out=whole.out.astype(BF16))
    assert jax.tree.map(lambda x: x.dtype, rounded) == Attended(BF16, F32, F32, F32)
    jax.tree.map(np.testing.assert_array_equal, rounded, wanted)


# What does not fit together, what they do not serve, and who is asked


def shapes_of(samples=1, B=2, K=2, G=3, H=128, P=16, S=8, Sp=4, dtype=BF16):
    """Segments without numbers; by default what all kernels serve."""
    number = result(dtype=jnp.int32)

    def segment(tokens, *axes):
        pages = result(*axes, P, H, dtype=dtype)
        return Segment(pages, pages, result(*tokens, dtype=jnp.int32), number)

    prompts = B // samples
    return (
        result(B, K * G, H, dtype=dtype),
        segment((prompts,), 2, prompts, K, Sp),
        segment((2, B, K, S), 2, B, K, S),
        segment((), 2, B, K),
    )


@pytest.mark.parametrize(
    ("at", "name", "bad", "reason"),
    [
        (1, "tokens", result(3, dtype=jnp.int32), "prompt.tokens has shape"),
        (1, "tokens", result(2), "prompt.tokens has dtype float32"),
        (2, "tokens", result(2, 2, 8, dtype=jnp.int32), "kept.tokens has shape"),
        (2, "tokens", result(1, 2, 2, 8, dtype=jnp.int32), "kept.tokens has shape"),
        (2, "v", result(2, 2, 2, 8, 16, 128), "v_pages is float32"),
        (3, "k", result(2, 2, 2, 8, 128, dtype=BF16), "current.k has shape"),
        (3, "v", result(2, 2, 2, 16, 128), "current.v is float32"),
        (3, "tokens", result(2, dtype=jnp.int32), "current.tokens has shape"),
        (3, "layer", 2, "layer is 2"),
    ],
)
def test_what_does_not_fit_is_named(at, name, bad, reason):
    arrays = list(shapes_of())
    if isinstance(bad, int):
        attend = lambda *x: cache_attention(*x[:3], x[3]._replace(layer=bad))  # noqa: E731
    else:
        attend, arrays[at] = cache_attention, arrays[at]._replace(**{name: bad})
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(attend, *arrays)


def test_a_sink_is_one_a_head():
    with pytest.raises(ValueError, match="sink has shape \\(5,\\); it must be \\[6\\]"):
        jax.eval_shape(lambda *x: cache_attention(*x, sink=jnp.zeros(5)), *shapes_of())


def kernel_asked(target, arrays):
    traced = jax.jit(partial(cache_attention, target=target)).trace(*arrays)
    return "cache_attention" in str(traced.jaxpr)


@pytest.mark.parametrize(
    ("target", "sizes", "wanted"),
    [
        (Target("tpu", "TPU v5 lite"), {}, True),
        (Target("tpu", "TPU v5 lite"), {"samples": 2}, True),
        (Target("tpu", "TPU v5 lite"), {"H": 64}, False),  # It would copy the pages.
        (Target("tpu", "TPU v5"), {"B": 1, "K": 1}, False),  # Two cores.
        (HOPPER, {}, True),
        (HOPPER, {"P": 4}, False),
        (HOPPER, {"dtype": jnp.float16}, False),
        (HOPPER, {"samples": 2, "Sp": 16}, True),
        (HOPPER, {"samples": 2, "Sp": 17}, False),  # Too often from a GPU's cache.
        (Target("gpu", "NVIDIA A100-SXM4-80GB"), {}, False),
        (Target("cpu"), {}, False),
    ],
)
def test_who_is_asked(target, sizes, wanted):
    """The kernel, or an operation for each segment."""
    assert kernel_asked(target, shapes_of(**sizes)) == wanted


def test_on_a_mesh_rows_go_with_their_prompts():
    """And where the prompts cannot be split, each segment is by itself."""
    mesh = AbstractMesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    target = Target("gpu", H100, mesh)
    assert kernel_asked(target, shapes_of(B=4, samples=2))
    assert not kernel_asked(target, shapes_of(B=2, samples=2))


def test_it_lowers_for_cuda_without_a_gpu_or_its_plugin():
    call = jax.jit(partial(cache_attention, implementation="gpu", target=HOPPER))
    text = call.trace(*shapes_of()).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
