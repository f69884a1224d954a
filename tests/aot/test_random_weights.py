"""Random weights, as a benchmark makes them on a device: each array takes its own memory alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from raas_jax.aot.targets import target_devices
from raas_jax.model import _normal


@pytest.mark.parametrize("target", ["v5e:2x2", "h100"])
def test_no_array_but_the_result_is_made(target):
    try:
        device = target_devices(target)[0]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    here = jax.sharding.SingleDeviceSharding(device)

    def on_device(leaf: jax.Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)

    given = jax.tree.map(on_device, (jax.eval_shape(lambda: jax.random.key(0)), jnp.float32(2)))
    draw = jax.jit(_normal, static_argnames=("shape", "dtype"), out_shardings=here)
    program = draw.lower(*given, shape=(8, 1024, 512), dtype=jnp.dtype("bfloat16")).compile()
    account = program.memory_analysis()
    assert account.output_size_in_bytes >= 2 * 8 * 1024 * 512
    assert account.temp_size_in_bytes < account.output_size_in_bytes / 20
