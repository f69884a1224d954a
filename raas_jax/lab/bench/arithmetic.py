"""What the units that multiply allow: operations per second of a large product of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import PROGRAM_SECONDS, Case, Program

SIDE = 8192
CPU_SIDE = 512


def multiplier(dtype: Any) -> Callable[[], float]:
    """A function that multiplies square matrices, and returns seconds per multiply or add."""
    on_cpu = jax.default_backend() == "cpu"
    n = CPU_SIDE if on_cpu else SIDE
    # Orthogonal but for chance, so that a product has the size of its factor.
    one, other = (
        (jax.random.normal(key, (n, n), jnp.float32) / math.sqrt(n)).astype(dtype)
        for key in jax.random.split(jax.random.key(0))
    )
    case = Case(lambda carry, x, _: carry @ x, one, other, 1, 3 * one.nbytes)
    program = Program(case, 0.0 if on_cpu else PROGRAM_SECONDS)
    return lambda: program.seconds() / (2 * n**3)
