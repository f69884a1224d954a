"""The definition of `page_bound`, in plain jnp. Also the CPU path."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def page_bound_reference(
    q: jax.Array, key_min: jax.Array, key_max: jax.Array, layer: jax.Array, *, scale: float
) -> jax.Array:
    """See `api.page_bound`, which checks the arguments."""
    B, N, H = q.shape
    _, _, K, S, _ = key_min.shape
    low = jax.lax.dynamic_index_in_dim(key_min, layer, 0, keepdims=False)
    high = jax.lax.dynamic_index_in_dim(key_max, layer, 0, keepdims=False)
    grouped = q.reshape(B, K, N // K, H).astype(jnp.float32)
    # max(q * low, q * high) is q * high where q > 0 and q * low where q < 0: two plain products.
    bound = jnp.einsum(
        "bkgh,bksh->bkgs", jnp.maximum(grouped, 0), high.astype(jnp.float32)
    ) + jnp.einsum("bkgh,bksh->bkgs", jnp.minimum(grouped, 0), low.astype(jnp.float32))
    return (bound * scale).reshape(B, N, S)
