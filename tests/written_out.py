"""Attention of a layer over a whole text, written out: all scores at once, in JAX or in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from raas_jax.model import ends, run_layers
from raas_jax.rotation import rotations_of


def scores_of(layer, q, k):
    """Of q `[T, N, H]` and k `[T, K, H]` of a layer: `[N, T, T]`, -inf where none is allowed."""
    T, config = len(q), layer.block.config
    k = jnp.repeat(k, q.shape[1] // k.shape[1], axis=1)
    scores = jnp.einsum("tnh,snh->nts", q, k) / q.shape[-1] ** 0.5
    ago = jnp.arange(T)[:, None] - jnp.arange(T)
    near = ago < config.window if layer.kind == "window" else True
    return jnp.where((ago >= 0) & near, scores, -1e30)


def shares_of(layer, scores):
    """Of the softmax, with the layer's sink among what it is over: `[N, T, T]`."""
    biggest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - biggest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if layer.block.config.sinks:
        total = total + jnp.exp(layer.block.sink[...][:, None, None] - biggest)
    return weights / total


def read(shares, v):
    """`[N, T, T]` of v `[T, K, H]` → `[T, N, H]`."""
    return jnp.einsum("nts,snh->tnh", shares, jnp.repeat(v, len(shares) // v.shape[1], axis=1))


def run(params, ids, attended, xs=None):
    """Runs a text through all layers: `attended(layer, q, k, v, x) -> (out, y)`; x of full layers.

    Gives the last layer's output `[T, D]`, and the ys of the full layers, stacked.
    """
    config = params.config
    rotations = rotations_of(config, jnp.arange(len(ids))[None])

    def body(layer, x, own):
        q, k, v = (each[0] for each in layer.qkv(x, rotations[layer.kind]))
        out, y = attended(layer, q, k, v, own)
        return layer.finish(x, out[None]), y

    x = ends(config, params.weights).embed(jnp.asarray(ids))[None]
    x, found = run_layers(config, params.weights, body, x, {"full": xs})
    return x[0], found["full"]


def plainly(layer, q, k, v, _=None):
    """What a layer attends to, and its shares, as `run` wants them."""
    shares = shares_of(layer, scores_of(layer, q, k))
    return read(shares, v), shares
