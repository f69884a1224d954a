"""`prefill_attention` for TPU: JAX's splash attention."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LEAST_TOKENS = 128
MOST_BLOCK = 512


def prefill_attention_tpu(
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
      NotImplementedError: too few tokens for a block, or a head dim that is no multiple of 64.
    """
    _, T, N, H = q.shape
    if T < LEAST_TOKENS:
        raise NotImplementedError(f"{T} tokens are less than a block of {LEAST_TOKENS}")
    if H % 64:
        raise NotImplementedError(f"head dim {H} is no multiple of 64")
    block = min(MOST_BLOCK, -(-T // LEAST_TOKENS) * LEAST_TOKENS)
    padding = -T % block
    if padding:
        # Behind all others, so that the causal mask hides the padding from them.
        widths = (0, 0), (0, padding), (0, 0), (0, 0)
        q, k, v = (jnp.pad(x, widths) for x in (q, k, v))
        if segments is not None:
            segments = jnp.pad(segments, widths[:2], mode="edge")
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    square = T + padding, T + padding
    masks: list[Any] = [splash.CausalMask(square)] * N
    if window is not None:
        masks = [splash.LocalMask(square, (window - 1, 0), 0)] * N
    attend = splash.make_splash_mha_single_device(splash.MultiHeadMask(masks), block_sizes=sizes)
    own = {} if sink is None else {"sinks": sink.astype(jnp.float32)}

    def of_row(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        out: jax.Array = attend(q, k, v, ids, **own)
        return out

    q, k, v = (jnp.swapaxes(x, 1, 2) for x in ((q * scale).astype(q.dtype), k, v))
    out = jax.vmap(of_row)(q, k, v, segments)
    return jnp.swapaxes(out, 1, 2)[:, :T].astype(q.dtype)
