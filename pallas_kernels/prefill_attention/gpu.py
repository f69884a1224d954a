"""`prefill_attention` for NVIDIA GPUs: cuDNN's fused attention, through `jax.nn`."""

from __future__ import annotations

import jax


def prefill_attention_gpu(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    sink: jax.Array | None = None,
    *,
    scale: float,
    window: int | None = None,
    device_kind: str = "",
) -> jax.Array:
    """See `api.prefill_attention`, which checks the arguments.

    Raises:
      NotImplementedError: segments, a sink, float32, or a head dim that cuDNN does not take; or
        there is no cuDNN on this machine, as where a program is compiled ahead of time.
    """
    H = q.shape[-1]
    if segments is not None:
        raise NotImplementedError("cuDNN's attention knows no segments")
    if sink is not None:
        # Its log-sum-exp, by which one could be joined, comes rounded to 16 bits.
        raise NotImplementedError("cuDNN's attention knows no sinks")
    if q.dtype.itemsize != 2:
        raise NotImplementedError(f"cuDNN's attention takes bfloat16 and float16, not {q.dtype}")
    if H % 8 or H > 128:
        raise NotImplementedError(f"cuDNN's attention takes head dims 8, 16 ... 128, not {H}")
    try:
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    except RuntimeError as error:
        raise NotImplementedError(f"cuDNN's attention is not to be had ({error})") from error
