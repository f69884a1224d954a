"""What memory allows: seconds per byte of reading and of copying, by calls so large that launching
them does not count.
"""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import Target
from pallas_kernels import bench as kernels
from raas_jax.lab.bench.turns import cores, timed

READ_BYTES = 2**30
"""What a pass over memory reads on an accelerator."""
PASSES = 8
"""Of one call."""
CPU_READ_BYTES = 2**28
"""What all cores together read: more than their caches hold."""


def reader() -> Callable[[], float]:
    """A function that reads memory once, as fast as it can, and returns seconds per byte."""
    return _cpu_reader() if jax.default_backend() == "cpu" else device_reader(READ_BYTES)


def copier() -> Callable[[], float]:
    """A function that copies memory once, and returns seconds per byte, read or written."""
    program = kernels.copying(Target.of())
    return lambda: program.seconds() / program.case.bytes


def device_reader(size: int) -> Callable[[], float]:
    """A `reader` of `size` bytes, several times over, in one program of the default device."""
    array = jnp.ones((size // 2**12, 2**10), jnp.float32)
    call = partial(_read, array, jnp.ones(()))
    timed(call)  # Compiles.
    return lambda: timed(call)[1] / (PASSES * array.nbytes)


@jax.jit
def _read(array: jax.Array, one: jax.Array) -> jax.Array:
    """The largest of the numbers; each pass needs what the one before it gave, which is one."""
    largest: jax.Array = jax.lax.fori_loop(0, PASSES, lambda _, one: jnp.max(array * one), one)
    return largest


def _cpu_reader() -> Callable[[], float]:
    workers = cores()
    blocks = np.ones((CPU_READ_BYTES // 2**20, 2**18), np.float32)
    # A dot product of a vector with itself does the least work per byte that NumPy vectorises.
    own = [part for part in np.array_split(blocks, workers) if len(part)]

    def read_part(part: np.ndarray) -> None:
        for block in part:
            np.dot(block, block)

    def read() -> float:
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            list(pool.map(read_part, own))
            return timed(lambda: list(pool.map(read_part, own)))[1] / blocks.nbytes

    return read
