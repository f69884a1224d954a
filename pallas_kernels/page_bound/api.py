"""`page_bound`: Quest's upper bound on the scores of a page from its smallest and largest keys."""

from __future__ import annotations

import jax

from pallas_kernels.checks import check_floats, check_layer, check_queries, check_same_dtype
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.page_bound.reference import page_bound_reference

_BACKENDS = {
    "xla": page_bound_reference,
    "tpu": load("pallas_kernels.page_bound.tpu", "page_bound_tpu"),
    "gpu": load("pallas_kernels.page_bound.gpu", "page_bound_gpu"),
}
_AXES = ("BNH", "LBKSH", "LBKSH", ""), "BNS"


def page_bound(
    q: jax.Array,
    key_min: jax.Array,
    key_max: jax.Array,
    layer: jax.Array | int = 0,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> jax.Array:
    """Upper bound of `scale * q · k` over the keys of each page (Quest, arXiv 2406.10774).

    Args:
      q: `[B, N, H]` queries, N a multiple of K.
      key_min, key_max: `[L, B, K, S, H]`, channel-wise extremes of each page's keys.
      layer: int32 scalar, which layer of the buffers to read.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by target and arguments; "xla", "tpu" or "gpu" forces one.
      target: what is compiled for; the default backend where not given.

    Returns:
      float32 `[B, N, S]`. Slots are not masked: an empty slot's bound means nothing.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    if key_min.ndim != 5 or key_max.shape != key_min.shape:
        raise ValueError(
            f"key_min has shape {key_min.shape} and key_max {key_max.shape}; both must be "
            "[L, B, K, S, H]."
        )
    _, B, K, _, H = key_min.shape
    check_queries(q, "key_min", key_min, (B,), K, H)
    check_floats("q", q)
    check_floats("key_min", key_min)
    check_same_dtype("key_max", key_max, "key_min", key_min)
    layer = check_layer(layer, key_min.shape[0])
    return dispatch(
        "page_bound",
        _BACKENDS,
        implementation,
        target,
        (q, key_min, key_max, layer),
        _AXES,
        scale=H**-0.5 if scale is None else scale,
    )
