"""Checks of arguments that several operations share; all before anything is launched."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def check_pages(
    q: jax.Array, k_pages: jax.Array, v_pages: jax.Array, fill: jax.Array, *, shared: bool
) -> None:
    """Checks queries against pages of keys and values.

    Args:
      q: `[B, N, H]`, N a multiple of K.
      k_pages, v_pages: `[L, B', K, S, P, H]`.
      fill: integers `[B', K, S]`, or axes of 1 in place of B' and K.
      shared: whether several rows may share pages: B a multiple of B', and not B = B'.

    Raises:
      ValueError: names the argument, its value, and what it must be.
    """
    rows = "B'" if shared else "B"
    if k_pages.ndim != 6 or v_pages.shape != k_pages.shape:
        raise ValueError(
            f"k_pages has shape {k_pages.shape} and v_pages {v_pages.shape}; both must be "
            f"[L, {rows}, K, S, P, H]."
        )
    check_floats("q", q)
    check_floats("k_pages", k_pages)
    check_same_dtype("v_pages", v_pages, "k_pages", k_pages)
    _, B, K, S, P, H = k_pages.shape
    for name, size in zip("BKPH", (B, K, P, H), strict=True):
        if size < 1:
            raise ValueError(f"k_pages has shape {k_pages.shape}; its axis {name} must not be 0.")
    fits = q.ndim == 3 and q.shape[2] == H and q.shape[1] > 0 and q.shape[1] % K == 0
    if not fits or (q.shape[0] % B if shared else q.shape[0] != B):
        wanted = f"[B, N, {H}], B a multiple of {B} and" if shared else f"[{B}, N, {H}],"
        raise ValueError(
            f"q has shape {q.shape}; with k_pages {k_pages.shape} it must be {wanted} "
            f"N a multiple of {K}."
        )
    if (
        fill.ndim != 3
        or fill.shape[2] != S
        or any(size not in (1, wanted) for size, wanted in zip(fill.shape[:2], (B, K), strict=True))
    ):
        raise ValueError(f"fill has shape {fill.shape}; it must be [{B}, {K}, {S}].")
    check_integers("fill", fill, "a count of tokens in each page")


def check_layer(layer: jax.Array | int, layers: int) -> jax.Array:
    """The int32 scalar `layer`; raises ValueError for what is not one, or an int out of range."""
    if isinstance(layer, int) and not 0 <= layer < layers:
        raise ValueError(f"layer is {layer}; the buffers have layers 0 to {layers - 1}.")
    layer = jnp.asarray(layer)
    if layer.ndim != 0:
        raise ValueError(f"layer has shape {layer.shape}; it must be a scalar.")
    check_integers("layer", layer, "the number of a layer")
    return layer.astype(jnp.int32)


def check_same_dtype(name: str, array: jax.Array, other_name: str, other: jax.Array) -> None:
    """Raises ValueError unless both arrays hold the same kind of numbers."""
    if array.dtype != other.dtype:
        raise ValueError(
            f"{name} is {array.dtype} and {other_name} {other.dtype}; cast one to the other's."
        )


def check_integers(name: str, array: jax.Array, meaning: str) -> None:
    """Raises ValueError unless `array` holds integers."""
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} has dtype {array.dtype}; it must hold integers, {meaning}: cast it to int32."
        )


def check_floats(name: str, array: jax.Array) -> None:
    """Raises ValueError unless `array` holds floating-point numbers."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} has dtype {array.dtype}; it must hold floating-point numbers, for instance "
            "bfloat16 or float32."
        )
