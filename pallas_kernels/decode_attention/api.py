"""`decode_attention`: one query token per row over contiguous pages of keys and values."""

from __future__ import annotations

import functools

import jax

from pallas_kernels.checks import check_pages
from pallas_kernels.decode_attention.cpu import decode_attention_cpu
from pallas_kernels.decode_attention.reference import DecodeAttention, decode_attention_reference
from pallas_kernels.decode_attention.tuning import prefers_xla
from pallas_kernels.dispatch import Implementation, Target, dispatch, load

_BACKENDS = {
    "xla": decode_attention_reference,
    "cpu": decode_attention_cpu,
    "tpu": load("pallas_kernels.decode_attention.tpu", "decode_attention_tpu"),
    "gpu": load("pallas_kernels.decode_attention.gpu", "decode_attention_gpu"),
}
_AXES = ("BNH", "LBKSPH", "LBKSPH", "BKS", ""), DecodeAttention._make(["BNH", "BN", "BN", "BNS"])


def decode_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array | int = 0,
    *,
    scale: float | None = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> DecodeAttention:
    """Attention of one token per row over the pages of one layer, with the mass of every page.

    Args:
      q: `[B, N, H]` queries, N a multiple of K; query heads `k * G ... k * G + G - 1` share
        key/value head `k`.
      k_pages, v_pages: `[L, B, K, S, P, H]`; the whole buffer, so that no layer is sliced out.
      fill: int32 `[B, K, S]` (or `[B, 1, S]`, or `[1, 1, S]`), tokens in each page, 0..P. A slot
        with 0 is dead: its contents, NaN included, never matter.
      layer: int32 scalar, which layer of the buffer to read.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by target and arguments; "xla", "cpu", "tpu" or "gpu" forces one.
      target: what is compiled for; the default backend where not given.

    Returns:
      `DecodeAttention`; merge it with other segments, or divide `out` by `sum`.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    fill, layer = check_pages(q, k_pages, v_pages, fill, layer, shared=False)
    return dispatch(
        "decode_attention",
        _BACKENDS,
        implementation,
        target,
        (q, k_pages, v_pages, fill, layer),
        _AXES,
        prefers_xla=functools.partial(
            prefers_xla, P=k_pages.shape[4], H=k_pages.shape[5], pages=k_pages.shape[3]
        ),
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )
