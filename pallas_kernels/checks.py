"""Checks of arguments that several operations share; all before anything is launched."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ranges import Ranges


def check_pages(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array | int,
    *,
    shared: bool,
) -> tuple[jax.Array, jax.Array]:
    """Checks queries against pages of keys and values.

    Args:
      q: `[B, N, H]`, N a multiple of K.
      k_pages, v_pages: `[L, B', K, S, P, H]`.
      fill: integers `[B', K, S]`, or axes of 1 in place of B' and K.
      layer: integer scalar.
      shared: whether several rows may share pages: B a multiple of B', and not B = B'.

    Returns:
      `fill`, whole, and `layer`, both int32.

    Raises:
      ValueError: names the argument, its value, and what it must be.
    """
    rows = "B'" if shared else "B"
    if k_pages.ndim != 6 or v_pages.shape != k_pages.shape:
        raise ValueError(
            f"k_pages has shape {k_pages.shape} and v_pages {v_pages.shape}; both must be "
            f"[L, {rows}, K, S, P, H]."
        )
    check_numbers(q, k_pages, v_pages, "pages")
    L, B, K, S, P, H = k_pages.shape
    check_axes("k_pages", k_pages, B=B, K=K, P=P, H=H)
    check_queries(q, "k_pages", k_pages, q.shape[:1] if shared else (B,), K, H)
    if q.shape[0] % B:
        raise ValueError(
            f"q has shape {q.shape}; with k_pages {k_pages.shape} its rows must be a multiple of "
            f"{B}."
        )
    if fill.shape not in {(b, k, S) for b in (1, B) for k in (1, K)}:
        raise ValueError(f"fill has shape {fill.shape}; it must be [{B}, {K}, {S}].")
    check_integers("fill", fill, "a count of tokens in each page")
    return jnp.broadcast_to(fill, (B, K, S)).astype(jnp.int32), check_layer(layer, L)


def check_pool(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    fill: jax.Array,
    layer: jax.Array | int,
    ranges: Ranges,
) -> tuple[jax.Array, jax.Array]:
    """Checks queries against a pool `[B, T, P, H]` of keys, and one of values.

    Returns:
      `fill [B, K, S]` and `layer`, both int32.

    Raises:
      ValueError: names the argument, its value, and what it must be.
    """
    if k_pool.ndim != 4 or v_pool.shape != k_pool.shape or k_pool.shape[1] != ranges.total:
        raise ValueError(
            f"k_pool has shape {k_pool.shape} and v_pool {v_pool.shape}; both must be "
            f"[B, {ranges.total}, P, H], as many pages as the ranges have."
        )
    check_numbers(q, k_pool, v_pool, "pool")
    B, _, P, H = k_pool.shape
    check_axes("k_pool", k_pool, B=B, P=P, H=H)
    check_queries(q, "k_pool", k_pool, (B,), ranges.heads, H)
    wanted = (B, ranges.heads, ranges.most)
    if fill.shape != wanted:
        raise ValueError(f"fill has shape {fill.shape}; it must be {list(wanted)}.")
    check_integers("fill", fill, "a count of tokens in each page")
    return fill.astype(jnp.int32), check_layer(layer, ranges.layers)


def check_numbers(q: jax.Array, k: jax.Array, v: jax.Array, what: str) -> None:
    """Raises ValueError unless q, `k_{what}` and `v_{what}` hold floats, k and v the same kind."""
    check_floats("q", q)
    check_floats(f"k_{what}", k)
    check_same_dtype(f"v_{what}", v, f"k_{what}", k)


def check_axes(name: str, array: jax.Array, **sizes: int) -> None:
    """Raises ValueError for an axis of no size."""
    for axis, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} has shape {array.shape}; its axis {axis} must not be 0.")


def check_queries(
    q: jax.Array, name: str, keys: jax.Array, rows: tuple[int, ...], K: int, H: int
) -> None:
    """Raises ValueError unless q is `[*rows, N, H]`, N a multiple of K."""
    if q.ndim < 2 or q.shape != (*rows, q.shape[-2], H) or not q.shape[-2] or q.shape[-2] % K:
        raise ValueError(
            f"q has shape {q.shape}; with {name} {keys.shape} it must be "
            f"[{', '.join(map(str, rows))}, N, {H}], N a multiple of {K}."
        )


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
