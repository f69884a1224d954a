"""The attention of a recorded answer, token by token, computed anew in one masked forward pass.

The decode knows the attention of whole pages only. Here every query sees just the tokens that its
layer and head could read when it was fed, so hidden states and attention are those of the decode.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.attention import shares_of
from raas_jax.lab.inspect.recording import Recording
from raas_jax.model import Layer, ends, run_layers
from raas_jax.params import Params
from raas_jax.rotation import rotations_of

BUCKET = 128  # Lengths are padded to a multiple, so that few of them compile anew.
_NEVER = -1e30


def visible(recording: Recording, prompt_tokens: int, layer: int) -> np.ndarray:
    """Which keys each query of a layer could read: bool `[K, T, T]`, query before key.

    The layer is counted among those that see everything, as in the recording. T counts the prompt
    and all tokens but the last, which was never fed.
    """
    G, P = len(recording.tokens), recording.page_size
    T = prompt_tokens + G - 1
    K = recording.present.shape[2]
    seen = np.broadcast_to(np.tri(T, dtype=bool), (K, T, T)).copy()
    page = np.arange(G - 1) // P
    of_layer = recording.present[:, layer].transpose(1, 0, 2)  # [K, page now, page]
    seen[:, prompt_tokens:, prompt_tokens:] &= of_layer[:, page][:, :, page]
    return seen


def replay(
    params: Params, prompt: list[int], recording: Recording, drawn: list[int] | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Layer by layer, of those that see everything, the attention from which each token was drawn.

    Args:
      params: the model.
      prompt: token ids.
      recording: of the answer.
      drawn: a list that gets the tokens that this pass would draw greedily; they equal the
        recorded ones but for ties in rounding.

    Yields:
      The layer's place among them, and float32 `[K, G, T]`: `[k, g, t]` is the share of attention
      that position `t` received as token `g` was drawn, the largest among the query heads of
      key/value head `k`.
    """
    params = params.stacked()  # One program serves all layers.
    tokens = np.asarray([*prompt, *recording.tokens[:-1]], np.int32)
    T, first = len(tokens), len(prompt) - 1
    width = -(-T // BUCKET) * BUCKET
    padded = jnp.asarray(np.pad(tokens, (0, width - T)))
    x = _embed(params, padded)
    for number, (kind, place) in enumerate(params.config.layer_places):
        mask = np.zeros((params.config.num_key_value_heads, width, width), bool)
        if kind == "window":
            mask[:] = np.tri(width) - np.tri(width, k=-params.config.window)
            x, _ = _layer(params, x, jnp.int32(number), jnp.asarray(mask), kind)
            continue
        one = len(recording.tokens) == 1  # Then nothing is recorded.
        mask[:, :T, :T] = np.tri(T) if one else visible(recording, len(prompt), place)
        x, attention = _layer(params, x, jnp.int32(number), jnp.asarray(mask), kind)
        yield place, np.asarray(attention[:, first:T, :T])
    if drawn is not None:
        drawn += np.asarray(_choices(params, x))[first:T].tolist()


@jax.jit
def _embed(params: Params, tokens: jax.Array) -> jax.Array:
    return ends(params.config, params.weights).embed(tokens)[None]


@jax.jit
def _choices(params: Params, x: jax.Array) -> jax.Array:
    return ends(params.config, params.weights).logits(x[0]).argmax(-1)


@partial(jax.jit, static_argnames="kind")
def _layer(
    params: Params, x: jax.Array, number: jax.Array, mask: jax.Array, kind: str
) -> tuple[jax.Array, jax.Array]:
    """x `[1, T, D]`, mask `[K, T, T]` → x, and the attention `[K, T, T]`."""
    config, T = params.config, x.shape[1]
    positions = jnp.arange(T, dtype=jnp.int32)[None]
    rotation = rotations_of(config, positions)[kind]
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        q, k, v = layer.qkv(x, rotation)
        q = q[0].reshape(T, K, N // K, H).astype(jnp.float32) * H**-0.5
        scores = jnp.einsum("tkgh,skh->kgts", q, k[0].astype(jnp.float32))
        weights = shares_of(jnp.where(mask[:, None], scores, _NEVER), layer.sink)[0]
        out = jnp.einsum("kgts,skh->tkgh", weights, v[0].astype(jnp.float32))
        return layer.finish(x, out.reshape(1, T, N, H).astype(x.dtype)), weights.max(1)

    x, found = run_layers(config, params.weights, body, x, kinds=(kind,), first=number)
    return x, found[kind][0]
