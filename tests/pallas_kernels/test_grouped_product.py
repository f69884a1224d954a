"""Products of blocks of rows with their owners' weights: the reference and the Hopper kernel.

Against NumPy; weights that must not be read are NaN. `tests/aot/test_hopper.py` compiles the kernel
for the chip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Target, grouped_product
from pallas_kernels.grouped_product import reads_in_place
from pallas_kernels.grouped_product.gpu import grouped_product_gpu
from pallas_kernels.grouped_product.tuning import MOST_ROWS, Blocks, hopper_blocks

H100 = "NVIDIA H100 80GB HBM3"
HOPPER = Target("gpu", H100)
BF16, F32 = jnp.bfloat16, jnp.float32

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public interpreter for GPU kernels; 0.12 has",
)


def case(owner, experts, R, width, outs, dtype=BF16):
    """x, stacks of three layers of which the second counts, and the owned products in float64."""
    rng = np.random.default_rng(0)
    owner = np.asarray(owner, np.int32)
    x = jnp.asarray(rng.normal(size=(len(owner), R, width)), dtype)
    stacks = [rng.normal(size=(3, experts, out, width)) for out in outs]
    for stack in stacks:
        stack[[0, 2]] = np.nan
        stack[1, [each for each in range(experts) if each not in owner]] = np.nan
    stacks = [jnp.asarray(stack, dtype) for stack in stacks]
    owned, whole = owner < experts, np.asarray(x, np.float64)
    wanted = [
        np.einsum("tri,toi->tro", whole[owned], np.asarray(stack, np.float64)[1, owner[owned]])
        for stack in stacks
    ]
    return (x, jnp.asarray(owner), jnp.int32(1), *stacks), owned, wanted


def check(got, owned, wanted, dtype):
    """Sums are float32, and rounded once; a value in doubt may be rounded to its neighbour."""
    rounding = 2.0**-8 if dtype == BF16 else 0
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        found = np.asarray(one, np.float64)[owned]
        np.testing.assert_allclose(found, other, rtol=rounding, atol=2e-4)


@settings(max_examples=8, deadline=None)
@given(
    # Experts without a block, of one and of all of them, and blocks without an expert.
    owner=st.lists(st.integers(0, 3), min_size=1, max_size=6).map(sorted),
    R=st.sampled_from([1, 5]),
    outs=st.sampled_from([[7], [5, 3]]),
    dtype=st.sampled_from([F32, BF16]),
)
def test_the_reference_is_the_product(owner, R, outs, dtype):
    arrays, owned, wanted = case(owner, 3, R, 9, outs, dtype)
    x, owner, layer, *stacks = arrays
    got = jax.jit(lambda *a: grouped_product(*a, dtype=F32, implementation="xla"))(
        x, stacks, owner, layer
    )
    check(got, owned, wanted, F32)
    assert all(not np.any(one[~owned]) for one in got)
    check(grouped_product(x, stacks, owner, layer), owned, wanted, dtype)


def interpret(arrays, dtype, blocks=None):
    """Runs the kernel in the interpreter; a race, which it only prints, fails."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    how = {"device_kind": H100, "interpret": plgpu.InterpretGPUParams(detect_races=True)}
    got = grouped_product_gpu(*arrays, dtype=jnp.dtype(dtype), blocks=blocks, **how)
    got = jax.block_until_ready(got)
    assert not gpu_callbacks.get_races().races_found
    return got


@interpreted
@pytest.mark.parametrize(
    ("owner", "R", "width", "outs", "dtype", "blocks"),
    [
        ([0], 8, 64, [64], BF16, None),
        ([1, 1, 2, 3], 8, 128, [64, 128], F32, None),  # Two blocks of one, and one of nobody.
        ([0, 2], 16, 320, [64, 64], BF16, Blocks(1, 64, 2)),  # Stages are filled again.
        ([2, 2, 2], 8, 256, [128], F32, Blocks(2, 64, 2)),  # All of one; two warpgroups.
        ([3, 3], 8, 64, [64], BF16, None),  # All of nobody.
    ],
)
def test_the_kernel_is_the_product(owner, R, width, outs, dtype, blocks):
    arrays, owned, wanted = case(owner, 3, R, width, outs)
    got = interpret(arrays, dtype, blocks)
    check(got, owned, wanted, dtype)
    # Nothing was computed for nobody: the interpreter's memory is NaN before it is written.
    assert all(np.all(np.isnan(np.asarray(one, np.float64)[~owned])) for one in got)


@interpreted
@settings(max_examples=4, deadline=None)
@given(
    owner=st.lists(st.integers(0, 2), min_size=1, max_size=3).map(sorted),
    R=st.sampled_from([8, 24]),
    width=st.sampled_from([64, 128, 192]),
    outs=st.sampled_from([[64], [64, 64]]),
)
def test_the_kernel_is_the_product_for_any_owners(owner, R, width, outs):
    arrays, owned, wanted = case(owner, 2, R, width, outs)
    check(interpret(arrays, BF16), owned, wanted, BF16)


SHARED_MEMORY = 227 * 1024
WIDTHS = [  # Of Qwen3-30B-A3B, gpt-oss and Mixtral: in and out.
    (2048, (768, 768)), (768, (2048,)), (2880, (2880, 2880)), (2880, (5760,)), (4096, (14336,)),
    (14336, (4096,)), (64, (64,)),
]  # fmt: skip


@pytest.mark.parametrize("R", [8, 16, 32, 64, MOST_ROWS])
@pytest.mark.parametrize("experts", [1, 8, 128])
def test_two_blocks_fit_on_a_multiprocessor(R, experts):
    for width, outs in WIDTHS:
        blocks = hopper_blocks(experts, R, width, outs)
        height = 64 * blocks.warpgroups
        assert all(out % height == 0 for out in outs) and width % blocks.columns == 0
        size = blocks.stages * (height + R) * blocks.columns * 2
        assert 2 * (size + 2048) <= SHARED_MEMORY
        assert blocks.stages >= min(3, width // blocks.columns)
        # Accumulators of all threads, and as many registers again to work with.
        assert 2 * 128 * blocks.warpgroups * (R // 2 + 40) <= 65536


def shapes(T=2, R=8, width=64, outs=(64,), dtype=BF16):
    stacks = [jax.ShapeDtypeStruct((2, 4, out, width), dtype) for out in outs]
    x, owner = jax.ShapeDtypeStruct((T, R, width), dtype), jax.ShapeDtypeStruct((T,), jnp.int32)
    return x, stacks, owner


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"dtype": F32}, "the weights are float32, not bfloat16"),
        ({"R": 12}, "blocks have 12 rows, no multiple of 8 up to 128"),
        ({"R": 136}, "blocks have 136 rows"),
        ({"width": 96}, r"in and out are \[96, 64\], not all multiples of 64"),
        ({"outs": (64, 32)}, r"in and out are \[64, 64, 32\]"),
        ({"target": Target("gpu", "NVIDIA A100-SXM4-80GB")}, "no GPU of compute capability 9.0"),
    ],
)
def test_what_the_kernel_does_not_serve_is_declined_with_its_reason(sizes, reason):
    target = sizes.pop("target", HOPPER)
    x, stacks, _ = arrays = shapes(**sizes)
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda *a: grouped_product(*a, implementation="gpu", target=target), *arrays)
    widths = [x.shape[2], *(stack.shape[2] for stack in stacks)]
    assert not reads_in_place(target, x.shape[1], x.dtype, widths)
    found = jax.eval_shape(lambda *a: grouped_product(*a, target=target), *arrays)
    assert [one.shape for one in found] == [(*x.shape[:2], out) for out in widths[1:]]


def test_what_is_read_in_place():
    assert reads_in_place(HOPPER, 8, BF16, [64, 128])
    assert not reads_in_place(Target("tpu", "TPU v5 lite"), 8, BF16, [64, 128])


@pytest.mark.parametrize(
    ("x", "stacks", "owner", "reason"),
    [
        ((2, 4), [(5, 3, 6, 4)], (2,), "x has shape"),
        ((2, 8, 4), [], (2,), "stacks is empty"),
        ((2, 8, 4), [(5, 3, 6, 3)], (2,), r"must be \[L, E, out, 4\]"),
        ((2, 8, 4), [(5, 3, 6, 4), (5, 2, 6, 4)], (2,), r"stacks\[1\] has shape \(5, 2, 6, 4\)"),
        ((2, 8, 4), [(5, 3, 6, 4)], (3,), r"owner has shape \(3,\)"),
    ],
)
def test_what_does_not_fit_together_is_named(x, stacks, owner, reason):
    with pytest.raises(ValueError, match=reason):
        grouped_product(
            jnp.ones(x), [jnp.ones(stack) for stack in stacks], jnp.zeros(owner, jnp.int32)
        )


def test_dtypes_and_layers_are_checked():
    x, stacks, owner = jnp.ones((2, 8, 4)), [jnp.ones((5, 3, 6, 4))], jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match=r"stacks\[0\] is float32 and x bfloat16"):
        grouped_product(x.astype(BF16), stacks, owner)
    with pytest.raises(ValueError, match="owner has dtype float32"):
        grouped_product(x, stacks, owner.astype(F32))
    with pytest.raises(ValueError, match="layer is 7"):
        grouped_product(x, stacks, owner, 7)


def test_it_lowers_for_cuda_without_a_gpu_or_its_plugin():
    call = jax.jit(lambda *a: grouped_product(*a, implementation="gpu", target=HOPPER))
    text = call.trace(*shapes()).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "dot_general" not in text
