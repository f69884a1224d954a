"""Drawing a token of the largest vocabularies: what the compilers of TPUs and GPUs make of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hlo import FREE, computations

from raas_jax.aot.targets import target_devices
from raas_jax.sampling import Sampler

V = 151_936  # Of Qwen3.
MOST_SECONDS = 1e-4


def compiled(target, rows=1):
    sharding = jax.sharding.SingleDeviceSharding(target_devices(target)[0])

    def shape(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    sampler = Sampler.create([], keys)
    sampler = jax.tree.map(lambda x: x if x is keys else jnp.zeros(rows, x.dtype), sampler)
    arguments = sampler, jnp.zeros((rows, V), jnp.float32), jnp.zeros(rows, jnp.int32)
    return jax.jit(Sampler.__call__).lower(*jax.tree.map(shape, arguments)).compile().as_text()


def launched(text):
    """What is launched or runs for itself, in all branches, and the bytes that all of it moves."""
    parts = computations(text)
    inner = {name for part in parts.values() for i in part for name in i.called}
    todo, found, moved = [name for name in parts if name not in inner], [], 0
    while todo:
        part = parts[todo.pop()]
        size = {i.name: i.bytes for i in part}
        for i in part:
            if i.op in FREE:
                todo += i.called
            else:
                found.append(i)
                moved += i.bytes + sum(size.get(name, 0) for name in i.operands)
    return found, moved


def test_a_gpu_never_waits_for_its_host():
    """Neither a branch nor a loop, so that all can be launched as one graph."""
    try:
        text = compiled("h100")
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    parts = computations(text)
    assert not {i.op for part in parts.values() for i in part} & {"conditional", "while", "sort"}
    operations, moved = launched(text)
    assert len(operations) <= 70
    assert moved / 3.3e12 < MOST_SECONDS / 10


@pytest.mark.parametrize(
    ("target", "bandwidth"), [("v5e:2x2", 0.82e12), ("v6e:2x2", 1.6e12), ("tpu7x:2x2x1", 3.7e12)]
)
def test_a_tpu_moves_little(tpu, target, bandwidth):
    """All branches together; a TPU takes a branch by itself, and waits for no host."""
    text = compiled(target)
    assert "sort(" not in text and "custom-call(" not in text
    _, moved = launched(text)
    assert moved / bandwidth < MOST_SECONDS / 2
