"""Products with a stack's weights: the reference and the Hopper kernel, against NumPy.

Layers that must not be read are NaN. `tests/aot/test_hopper.py` compiles the kernel for the chip.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import Target, stacked_product
from pallas_kernels.stacked_product.gpu import stacked_product_gpu
from pallas_kernels.stacked_product.tuning import Blocks

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
    got = stacked_product_gpu(
        x,
        jnp.int32(1),
        *stacks,
        dtype=jnp.dtype(dtype),
        device_kind=H100,
        blocks=blocks,
        interpret=plgpu.InterpretGPUParams(detect_races=True),
    )
    check(got, wanted, dtype)
