"""What rivals' rules ask of a model: where its attention goes on texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.allotting.dense import Block, embed, forward, look
from raas_jax.params import Params


def most_attended(
    params: Params, texts: Sequence[Sequence[int]], pages: int, page_size: int
) -> np.ndarray:
    """Of a layer's `K * pages` most attended pages, how many are each head's, on average.

    Of every token that has more pages than `pages` before its own; a group's attention is its mean.
    Float64 `[L, K]`, of mean `pages` in every layer. Raises ValueError where there is none such.
    """
    longest = max(map(len, texts))
    if longest <= (pages + 1) * page_size:
        raise ValueError(
            f"no token has more than {pages} pages of {page_size} tokens before its own; the "
            f"longest text has {longest} tokens."
        )

    def see(block: Block, tokens: jax.Array) -> jax.Array:
        ends, P = block.end // page_size, page_size
        mass = jnp.mean(block.shares[..., : ends * P], axis=1)
        mass = jnp.sum(mass.reshape(*mass.shape[:2], ends, P), axis=-1)  # [K, t, pages]
        number = jnp.arange(block.first, block.end) // P
        before = jnp.arange(ends) < number[:, None]
        by_token = jnp.moveaxis(jnp.where(before, mass, -1.0), 1, 0).reshape(len(number), -1)
        K = mass.shape[0]
        most = jax.lax.top_k(by_token, min(K * pages, by_token.shape[-1]))[1] // ends
        count = jax.nn.one_hot(most, K).sum(axis=1)
        return jnp.sum(jnp.where(number[:, None] > pages, count, 0.0), axis=0)

    found = _summed(params, texts, see)
    count: np.ndarray = pages * found / np.mean(found, axis=1, keepdims=True)
    return count


def copying(params: Params, texts: Sequence[Sequence[int]]) -> np.ndarray:
    """Attention to earlier places of the token that comes next, the mean of tokens: `[L, K]`.

    What retrieval heads are known by (2404.15574), on any text; the mean over a group's heads.
    """

    def see(block: Block, tokens: jax.Array) -> jax.Array:
        following = jnp.append(tokens[1:], -1)[block.first : block.end, None]
        same = tokens[: block.end] == following
        return jnp.sum(jnp.where(same, block.shares, 0.0), axis=(1, 2, 3)) / block.shares.shape[1]

    score: np.ndarray = _summed(params, texts, see) / sum(map(len, texts))
    return score


def _summed(params: Params, texts: Sequence[Sequence[int]], see: Any) -> np.ndarray:
    """What is seen, of all blocks and texts together, by layer of those that see everything."""
    config = params.config
    found = np.zeros((config.full_layers, config.num_key_value_heads))
    params = params.stacked()  # One program serves all layers.
    for text in texts:
        tokens = jnp.asarray(text, jnp.int32)
        x = embed(params, tokens)
        for number, (kind, place) in enumerate(config.layer_places):
            if kind == "window":
                x = forward(params, x, jnp.int32(number), kind=kind)
                continue
            x, of_blocks = look(params, x, jnp.int32(number), see, tokens)
            found[place] += np.sum(np.asarray(of_blocks, np.float64), axis=0)
    return found
