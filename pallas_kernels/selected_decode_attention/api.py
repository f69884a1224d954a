"""`selected_decode_attention`: one query token per row over a list of pages, others not read."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integers, check_pages
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.decode_attention.tuning import prefers_xla
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.selected_decode_attention.cpu import selected_decode_attention_cpu
from pallas_kernels.selected_decode_attention.reference import selected_decode_attention_reference

_BACKENDS = {
    "xla": selected_decode_attention_reference,
    "cpu": selected_decode_attention_cpu,
    "tpu": load("pallas_kernels.selected_decode_attention.tpu", "selected_decode_attention_tpu"),
    "gpu": load("pallas_kernels.selected_decode_attention.gpu", "selected_decode_attention_gpu"),
}
_AXES = (
    ("BNH", "LBKSPH", "LBKSPH", "BKS", "BKC", ""),
    DecodeAttention._make(["BNH", "BN", "BN", "BNC"]),
)


def selected_decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    slots: jax.Array,
    layer: jax.Array | int = 0,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> DecodeAttention:
    """Attention of one token per row over the listed pages of one layer, at the cost of these.

    Args:
      q: `[B, N, H]` queries, N a multiple of K; query heads `k * G ... k * G + G - 1` share
        key/value head `k`.
      k_pages, v_pages: `[L, B', K, S, P, H]`; rows `b` of q read row `b // (B / B')`, so that
        neighbouring rows can share pages.
      fill: int32 `[B', K, S]` (or axes of 1), tokens in each page, 0..P. A slot with 0 is dead.
      slots: int32 `[B, K, C]`, distinct slots to read, in 0..S-1 (not checked: it is data); -1 for
        none.
      layer: int32 scalar, which layer of the buffers to read.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by target and arguments; "xla", "cpu", "tpu" or "gpu" forces one.
      target: what is compiled for; the default backend where not given.

    Returns:
      `DecodeAttention` over the listed pages, its `page_lse` `[B, N, C]` in their order.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    fill, layer = check_pages(q, k_pages, v_pages, fill, layer, shared=True)
    K = k_pages.shape[2]
    if slots.ndim != 3 or slots.shape[:2] != (q.shape[0], K):
        raise ValueError(f"slots has shape {slots.shape}; it must be [{q.shape[0]}, {K}, any].")
    check_integers("slots", slots, "slots to read")
    return dispatch(
        "selected_decode_attention",
        _BACKENDS,
        implementation,
        target,
        (q, k_pages, v_pages, fill, slots.astype(jnp.int32), layer),
        _AXES,
        prefers_xla=functools.partial(
            prefers_xla, P=k_pages.shape[4], H=k_pages.shape[5], pages=slots.shape[2]
        ),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
