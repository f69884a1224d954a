"""What is done to each token for itself, done to some tokens at a time, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

MOST_TOKENS = 8192
"""Tokens of all rows together that go through a layer at once. So many keep the arithmetic of any
target busy, though XLA copies each layer before a loop; in the mlp of an 8B they take 0.6 GB."""


def in_chunks(part: Callable[..., Any], *arrays: jax.Array) -> Any:
    """`part(*arrays)`, in turns where there are more than `MOST_TOKENS` tokens.

    Args:
      part: makes arrays `[B, c, ...]`, a tree of them, out of arrays of any `c` tokens, each token
        for itself.
      arrays: `[B, T, ...]`.

    Returns:
      Arrays `[B, T, ...]`. The last chunk ends with the last token: where chunks do not divide
      them, some tokens are done twice, with the same result.
    """
    B, T = arrays[0].shape[:2]
    size = chunk_size(B, T)
    if size == T:
        return part(*arrays)

    def of(start: jax.Array | int) -> Any:
        return part(*(jax.lax.dynamic_slice_in_dim(array, start, size, 1) for array in arrays))

    def step(index: jax.Array, whole: Any) -> Any:
        start = jnp.minimum(index * size, T - size)

        def put(buffer: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(buffer, new, start, 1)

        return jax.tree.map(put, whole, of(start))

    def empty(piece: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((B, T, *piece.shape[2:]), piece.dtype)

    whole = jax.tree.map(empty, jax.eval_shape(lambda: of(0)))
    return jax.lax.fori_loop(0, math.ceil(T / size), step, whole)


def chunk_size(rows: int, tokens: int) -> int:
    """Tokens of each row in a chunk: all, or the largest power of two within `MOST_TOKENS`."""
    if rows * tokens <= MOST_TOKENS:
        return tokens
    return min(tokens, 1 << max(0, (MOST_TOKENS // rows).bit_length() - 1))
