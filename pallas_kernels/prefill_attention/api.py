"""`prefill_attention`: causal attention over a prompt."""

from __future__ import annotations

from functools import partial

import jax

from pallas_kernels.checks import check_floats, check_integers, check_queries
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.prefill_attention.reference import prefill_attention_reference

_BACKENDS = {
    "xla": prefill_attention_reference,
    "tpu": load("pallas_kernels.prefill_attention.tpu", "prefill_attention_tpu"),
    "gpu": load("pallas_kernels.prefill_attention.gpu", "prefill_attention_gpu"),
}
_AXES = ("BTNH", "BTKH", "BTKH", "BT", "N"), "BTNH"


def prefill_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None = None,
    *,
    window: int | None = None,
    sink: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> jax.Array:
    """Causal attention, grouped heads, no `T * T` scores in memory beyond 1,024 tokens.

    Args:
      q: `[B, T, N, H]`, N a multiple of K.
      k, v: `[B, T, K, H]`.
      segments: int32 `[B, T]`; a token attends only within its own segment. None: one segment.
      window: static; a token sees itself and the `window - 1` tokens before it. None: all before.
      sink: float `[N]`, a logit per query head that joins the softmax and has no value.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      implementation: None picks by target and arguments; "xla", "tpu" or "gpu" forces one.
      target: what is compiled for; the default backend where not given.

    Returns:
      `[B, T, N, H]` in q's dtype.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    if k.ndim != 4 or v.shape != k.shape:
        raise ValueError(f"k has shape {k.shape} and v {v.shape}; both must be [B, T, K, H].")
    B, T, K, H = k.shape
    check_queries(q, "k", k, (B, T), K, H)
    if segments is not None:
        if segments.shape != (B, T):
            raise ValueError(f"segments has shape {segments.shape}; it must be [{B}, {T}].")
        check_integers("segments", segments, "the segment of each token")
    for name, array in (("q", q), ("k", k), ("v", v)):
        check_floats(name, array)
    if window is not None and window < 1:
        raise ValueError(f"window is {window}; a token sees itself, so it must be at least 1.")
    if sink is not None:
        check_floats("sink", sink)
        if sink.shape != q.shape[2:3]:
            raise ValueError(f"sink has shape {sink.shape}; it must be [{q.shape[2]}], one a head.")
    seen = window if window is not None and window < T else None
    return dispatch(
        "prefill_attention",
        {name: partial(backend, window=seen) for name, backend in _BACKENDS.items()},
        implementation,
        target,
        (q, k, v, segments, sink),
        _AXES,
        scale=H**-0.5 if scale is None else scale,
    )
