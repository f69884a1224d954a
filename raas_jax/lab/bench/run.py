"""A decode at a generated length, to time its steps as often as wanted."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.decode import DecodeState
from raas_jax.params import Params

CHUNK = 64
"""Tokens that are timed together, in whole pages."""


@dataclasses.dataclass
class Run:
    """A decode that was generated up to the chunk in which the length is reached."""

    step: Callable[..., Any]
    state: DecodeState
    chunk: int
    tokens: np.ndarray  # int32 [B, T], generated before the chunk.
    compile_seconds: float
    whole_seconds: float

    def time_chunk(self, params: Params) -> float:
        """Seconds per step over the chunk in which the length is reached."""
        return seconds_per_step(self.step, params, self.state, self.chunk)


def seconds_per_step(
    step: Callable[..., Any], params: Params, state: DecodeState, chunk: int
) -> float:
    """Times a program of `chunk` steps on a copy of the state, which can be timed again."""
    state = jax.block_until_ready(copied(state))
    start = time.perf_counter()
    jax.block_until_ready(step(params, state))
    return (time.perf_counter() - start) / chunk


@jax.jit
def copied(state: DecodeState) -> DecodeState:
    return jax.tree.map(jnp.copy, state)
