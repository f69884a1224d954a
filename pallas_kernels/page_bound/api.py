"""`page_bound`: Quest's upper bound on the scores of a page from its smallest and largest keys."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.dispatch import Implementation, dispatch
from pallas_kernels.page_bound.reference import page_bound_reference

_BACKENDS = {"xla": page_bound_reference}


def page_bound(
    q: jax.Array,
    key_min: jax.Array,
    key_max: jax.Array,
    layer: jax.Array | int = 0,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    """Upper bound of `scale * q · k` over the keys of each page (Quest, arXiv 2406.10774).

    Args:
      q: `[B, N, H]` queries, N a multiple of K.
      key_min, key_max: `[L, B, K, S, H]`, channel-wise extremes of each page's keys.
      layer: int32 scalar, which layer of the buffers to read.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by platform; "xla" forces the reference.

    Returns:
      float32 `[B, N, S]`. Slots are not masked: an empty slot's bound means nothing.

    Raises:
      ValueError: the shapes do not fit together; names the argument.
    """
    if key_min.ndim != 5 or key_max.shape != key_min.shape:
        raise ValueError(
            f"key_min has shape {key_min.shape} and key_max {key_max.shape}; both must be "
            "[L, B, K, S, H]."
        )
    _, B, K, _, H = key_min.shape
    if q.ndim != 3 or q.shape[0] != B or q.shape[2] != H or q.shape[1] % K:
        raise ValueError(
            f"q has shape {q.shape}; with key_min {key_min.shape} it must be [{B}, N, {H}], "
            f"N a multiple of {K}."
        )
    scale = H**-0.5 if scale is None else scale
    layer = jnp.asarray(layer, jnp.int32)
    return dispatch(
        "page_bound", _BACKENDS, implementation, q, key_min, key_max, layer, scale=scale
    )
