"""Where the queries of a model lie before their rotation, for policies that expect them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from raas_jax.attention import causal_attention
from raas_jax.model import Layer, ends, run_layers
from raas_jax.params import Params
from raas_jax.policies import bucket
from raas_jax.policies.triattention import Centres
from raas_jax.rotation import frequencies, rotations_of
from raas_jax.windows import check_some_see_all


def calibrate(
    params: Params, sequences: Sequence[Sequence[int]], *, progress: bool | None = None
) -> Centres:
    """Reads the sequences, and averages the queries of every head over all tokens.

    Of the layers that see everything; a window needs no policy.

    Args:
      params: the model.
      sequences: token ids; best prompts with the model's own answers. A few thousand tokens do.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: no sequence, or an empty one; a model all of whose layers see a window; or a rope
        whose frequencies depend on the length, or that leaves layers or a part of a head as they
        are.
    """
    check_some_see_all(params.config)
    rope = params.config.rope
    plain = set(params.config.unrotated_layers) - set(params.config.window_layers)
    if rope.partial < 1 or rope.kind in ("dynamic", "longrope") or plain:
        raise ValueError(
            f"the model has a rope of the type {rope.kind}, partial={rope.partial}, with "
            f"{len(plain)} layers unrotated; centres are of heads that are rotated whole in every "
            "layer, by frequencies that stay. Use another policy than TriAttention."
        )
    if not sequences or not all(len(ids) for ids in sequences):
        raise ValueError("sequences have nothing to read; give at least one, none of them empty.")
    sums: Any = None
    hidden = None if progress is None else not progress
    for ids in tqdm(sequences, unit="sequence", disable=hidden):
        padded = np.zeros((1, 32 * bucket(-(-len(ids) // 32))), np.int32)
        padded[0, : len(ids)] = ids
        found = _sum_queries(params, jnp.asarray(padded), jnp.int32(len(ids)))
        # In float64, since float32 loses what it adds to a large sum.
        found = jax.tree.map(partial(np.asarray, dtype=np.float64), found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    tokens = sum(len(ids) for ids in sequences)
    centre, length = ((x / tokens).astype(np.float32) for x in sums)
    frequency = np.asarray(frequencies(rope, params.config.head_dim))
    return Centres(centre, length, frequency)


@jax.jit
def _sum_queries(
    params: Params, tokens: jax.Array, length: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Sums of the queries `[L, N, H]` and of the lengths of their pairs `[L, N, H / 2]`."""
    config = params.config
    position = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    rotations = rotations_of(config, position)
    still = rotations_of(config, jnp.zeros_like(position))
    counts = (position < length)[0, :, None, None]

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        q, k, v = layer.qkv(x, rotations[layer.kind])
        plain = layer.qkv(x, still[layer.kind])[0][0].astype(jnp.float32)
        plain = jnp.where(counts, plain, 0.0)
        real, imaginary = jnp.split(plain, 2, axis=-1)
        lengths = jnp.sqrt(real * real + imaginary * imaginary)
        sums = jnp.sum(plain, axis=0), jnp.sum(lengths, axis=0)
        return layer.finish(x, causal_attention(q, k, v, **layer.sight)), sums

    x = ends(config, params.weights).embed(tokens)
    sums: tuple[jax.Array, jax.Array] = run_layers(config, params.weights, body, x)[1]["full"]
    return sums
