"""Products with a stack's weights: the reference and the Hopper kernel, against NumPy.

Layers that must not be read are NaN. `tests/aot/test_hopper.py` compiles the kernel for the chip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import Target, stacked_product
from pallas_kernels.stacked_product.gpu import stacked_product_gpu, sums_by_row
from pallas_kernels.stacked_product.tuning import MOST_ROWS, Blocks, hopper_blocks

H100 = "NVIDIA H100 80GB HBM3"
HOPPER = Target("gpu", H100)
BF16, F32 = jnp.bfloat16, jnp.float32

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason=f"jax {jax.__version__} has no public interpreter for GPU kernels; 0.12 has",
)


def case(B, width, outs, dtype=BF16):
    """x, stacks of three layers of which the second counts, and the products in float64."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(B, width)), dtype)
    stacks = [rng.normal(size=(3, out, width)) for out in outs]
    for stack in stacks:
        stack[[0, 2]] = np.nan
    stacks = [jnp.asarray(stack, dtype) for stack in stacks]
    wanted = [np.asarray(x, np.float64) @ np.asarray(stack[1], np.float64).T for stack in stacks]
    return x, stacks, wanted


def interpret(kernel, *arrays, **options):
    """Runs a kernel in the interpreter; a race, which it only prints, fails."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    params = plgpu.InterpretGPUParams(detect_races=True)
    out = jax.block_until_ready(kernel(*arrays, **options, device_kind=H100, interpret=params))
    assert not gpu_callbacks.get_races().races_found
    return out


def check(got, wanted, dtype):
    """Sums are float32, and rounded once; a value in doubt may be rounded to its neighbour."""
    rounding = 2.0**-8 if dtype == BF16 else 0
    assert len(got) == len(wanted)
    for one, other in zip(got, wanted, strict=True):
        assert one.dtype == dtype
        np.testing.assert_allclose(np.asarray(one, np.float64), other, rtol=rounding, atol=2e-4)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_reference_is_the_product(dtype):
    x, stacks, wanted = case(3, 48, [5, 7], dtype)
    got = jax.jit(lambda *a: stacked_product(*a, dtype=F32, implementation="xla"))(x, stacks, 1)
    check(got, wanted, F32)
    check(stacked_product(x, stacks, 1), wanted, dtype)
    check(sums_by_row(x, jnp.int32(1), *stacks, dtype=dtype), wanted, dtype)


@interpreted
@pytest.mark.parametrize(
    "B, width, outs, dtype, blocks",
    [
        (1, 128, [64], BF16, None),  # One row, of eight.
        (3, 256, [64, 128, 64], F32, None),  # Several stacks.
        (8, 640, [64], F32, Blocks(8, 1, 128, 5, 1, 2)),  # Stages are filled again.
        (5, 448, [64, 64], BF16, Blocks(8, 1, 64, 3, 3, 2)),  # The last part is shorter.
        (40, 256, [128, 256], BF16, Blocks(40, 2, 64, 4, 1, 2)),  # Two warpgroups.
        (33, 512, [128], F32, Blocks(40, 2, 64, 4, 2, 3)),
    ],
)
def test_the_kernel_is_the_product(B, width, outs, dtype, blocks):
    x, stacks, wanted = case(B, width, outs)
    how = {"dtype": jnp.dtype(dtype), "blocks": blocks}
    got = interpret(stacked_product_gpu, x, jnp.int32(1), *stacks, **how)
    check(got, wanted, dtype)


SHARED_MEMORY = 227 * 1024
MULTIPROCESSORS = 132
WIDTHS = [  # Of Qwen3-8B, Qwen2.5-7B, Llama-3.1-8B and Qwen2.5-0.5B, and heads; in and out.
    (4096, (4096, 1024, 1024)), (4096, (4096,)), (4096, (12288, 12288)), (12288, (4096,)),
    (3584, (3584, 512, 512)), (18944, (3584,)), (4096, (14336, 14336)), (14336, (4096,)),
    (896, (896, 128, 128)), (4864, (896,)), (4096, (151936,)), (64, (64,)),
]  # fmt: skip


@pytest.mark.parametrize("B", [1, 8, 13, 32, 64, 100, 128, MOST_ROWS])
def test_blocks_fit_and_fill_the_chip(B):
    for width, outs in WIDTHS:
        blocks = hopper_blocks(B, width, outs)
        height = 64 * blocks.warpgroups
        count = sum(outs) // height * blocks.splits
        assert blocks.rows % 8 == 0 and B <= blocks.rows < B + 8
        assert all(out % height == 0 for out in outs) and width % blocks.columns == 0
        # Every tile is someone's, and no part is empty.
        along = width // blocks.columns
        assert blocks.tiles * (blocks.splits - 1) < along <= blocks.tiles * blocks.splits
        # Tiles in flight, and how many blocks find room on a multiprocessor.
        size = blocks.stages * (height + blocks.rows) * blocks.columns * 2
        assert size < SHARED_MEMORY and blocks.stages >= min(3, blocks.tiles)
        resident = 2 if 2 * (size + 2048) <= SHARED_MEMORY else 1
        # Accumulators of all the blocks' threads, and as many registers again to work with.
        registers = 128 * blocks.warpgroups * (blocks.rows // 2 + 40)
        assert registers * (1 if count <= MULTIPROCESSORS else resident) <= 65536
        if sum(outs) >= 4096 and B <= 128:
            assert count >= 0.95 * MULTIPROCESSORS


def declines(x, stacks, reason, target=HOPPER):
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(
            lambda *a: stacked_product(*a, implementation="gpu", target=target), x, stacks
        )


def shapes(B, width, *outs, dtype=BF16):
    stacks = [jax.ShapeDtypeStruct((2, out, width), dtype) for out in outs]
    return jax.ShapeDtypeStruct((B, width), dtype), stacks


@pytest.mark.parametrize(
    ("sizes", "dtype", "reason"),
    [
        ((9, 64, 64), jnp.float16, "the weights are float16, not bfloat16"),
        ((9, 64, 64), F32, "the weights are float32, not bfloat16"),
        ((257, 64, 64), BF16, "x has 257 rows; a block holds 256"),
        ((9, 96, 64), BF16, "in is 96 and out \\[64\\]"),
        ((9, 64, 64, 32), BF16, "out \\[64, 32\\], not all multiples of 64"),
    ],
)
def test_what_the_tiles_cannot_hold_is_declined_with_its_reason(sizes, dtype, reason):
    declines(*shapes(*sizes, dtype=dtype), reason)


def test_other_gpus_take_the_xla_path():
    a100 = Target("gpu", "NVIDIA A100-SXM4-80GB")
    declines(*shapes(9, 64, 64), "no GPU of compute capability 9.0", a100)
    found = jax.eval_shape(lambda *a: stacked_product(*a, target=a100), *shapes(9, 64, 64, 128))
    assert [out.shape for out in found] == [(9, 64), (9, 128)]


@pytest.mark.parametrize(
    ("x", "stacks", "reason"),
    [
        ((2, 3, 4), [(5, 6, 4)], "x has shape"),
        ((2, 4), [], "stacks is empty"),
        ((2, 4), [(5, 6, 3)], "must be \\[5, out, 4\\]"),
        ((2, 4), [(5, 6, 4), (4, 6, 4)], "stacks\\[1\\] has shape \\(4, 6, 4\\)"),
    ],
)
def test_what_does_not_fit_together_is_named(x, stacks, reason):
    with pytest.raises(ValueError, match=reason):
        stacked_product(jnp.ones(x), [jnp.ones(stack) for stack in stacks])
    with pytest.raises(ValueError, match=r"stacks\[0\] is float32 and x bfloat16"):
        stacked_product(jnp.ones((2, 4), BF16), [jnp.ones((1, 3, 4))])
    with pytest.raises(ValueError, match="layer is 7"):
        stacked_product(jnp.ones((2, 4)), [jnp.ones((3, 5, 4))], 7)


@pytest.mark.parametrize(
    ("model", "inward", "local", "sums"),
    [
        (4, False, [(8, 128), (2, 64, 128), (2, 128, 128)], 0),
        (4, True, [(8, 32), (2, 256, 32), (2, 512, 32)], 2),
        (3, True, [(8, 128), (2, 256, 128), (2, 512, 128)], 0),  # Three do not divide 128.
    ],
)
def test_a_mesh_splits_what_comes_out_or_what_is_summed(monkeypatch, model, inward, local, sums):
    from pallas_kernels.stacked_product import api
    from pallas_kernels.stacked_product.reference import stacked_product_reference

    given = []

    def backend(x, layer, *stacks, device_kind, **options):
        given.append([x.shape, *(stack.shape for stack in stacks)])
        return stacked_product_reference(x, layer, *stacks, **options)

    monkeypatch.setitem(api._BACKENDS, "gpu", backend)
    axes = (AxisType.Auto,) * 2
    target = Target("gpu", H100, AbstractMesh((2, model), ("data", "model"), axis_types=axes))
    arrays = shapes(16, 128, 256, 512)
    jaxpr = jax.make_jaxpr(lambda *a: stacked_product(*a, inward=inward, target=target))(*arrays)
    assert given == [local]
    assert [out.shape for out in jaxpr.out_avals] == [(16, 256), (16, 512)]
    assert str(jaxpr).count("psum") == sums


def test_it_lowers_for_cuda_without_a_gpu_or_its_plugin():
    call = jax.jit(lambda *a: stacked_product(*a, implementation="gpu", target=HOPPER))
    text = call.trace(*shapes(3, 128, 64, 128)).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text and "dot_general" not in text
