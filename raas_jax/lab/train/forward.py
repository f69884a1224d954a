"""The forward pass of training: the model's own layers, with attention in blocks of queries.

It computes what `raas_jax.model.forward` computes. A block of queries reads only the keys up to its
own end, so nearly half of the T x T scores are never made: on a CPU that halves the step at
T = 1280.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from raas_jax import model

QUERY_BLOCK = 128
_NEVER = -1e30  # finite, so that a padding row gives an average and not a NaN


def blocked_attention(q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array) -> jax.Array:
    """Causal attention within segments, float32.

    Queries `[B, T, N, H]`, keys and values `[B, T, K, H]` and int32 segments `[B, T]` give
    `[B, T, N, H]`.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    q = q.reshape(B, T, K, N // K, H) * H**-0.5
    outputs = []
    for start in range(0, T, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, T)
        scores = jnp.einsum("btkgh,bskh->bkgts", q[:, start:end], k[:, :end])
        earlier = jnp.arange(start, end)[:, None] >= jnp.arange(end)[None, :]
        same = segments[:, start:end, None] == segments[:, None, :end]
        scores = jnp.where((earlier[None] & same)[:, None, None], scores, _NEVER)
        weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
        total = weights.sum(-1, keepdims=True)
        outputs.append(jnp.einsum("bkgts,bskh->bkgth", weights, v[:, :end]) / total)
    attended = jnp.concatenate(outputs, axis=3)
    return jnp.transpose(attended, (0, 3, 1, 2, 4)).reshape(B, T, N, H)


forward = functools.partial(model.forward, attend=blocked_attention)
"""float32 logits `[B, T, V]`; arguments as in `raas_jax.model.forward`."""
