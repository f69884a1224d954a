"""What kernels for every platform do with arrays around their launch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def result(*sizes: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    """The shape and dtype of what a kernel returns."""
    return jax.ShapeDtypeStruct(sizes, dtype)


def pad_groups(q: jax.Array, K: int, padded: int) -> jax.Array:
    """The query heads `[B, N, H]` by the key/value head they share, `[B, K, padded, H]`."""
    B, N, H = q.shape
    return jnp.pad(q.reshape(B, K, N // K, H), ((0, 0), (0, 0), (0, padded - N // K), (0, 0)))


def merge_splits(peak: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """The largest peak along an axis of splits, and what multiplies the sums of each split."""
    top = jnp.max(peak, axis)
    return top, jnp.exp(peak - jnp.expand_dims(finite(top), axis))


def finite(peak: jax.Array) -> jax.Array:
    """0 in place of -inf, so that `exp(x - peak)` of an empty segment is 0 and not NaN."""
    return jnp.where(jnp.isneginf(peak), 0.0, peak)


def as_bits(x: jax.Array) -> jax.Array:
    """Half-precision numbers as integers of their bits, others as they are.

    XLA on CPUs has no half-precision operations: even what only moves numbers is done on a float32
    copy of the whole array, which integers are spared.
    """
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype.itemsize == 2 else x


def from_bits(x: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `as_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)
