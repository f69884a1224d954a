"""How likely a model finds given tokens: one dense forward pass, no cache and no policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.model import merge
from raas_jax.params import Params

POSITIONS_AT_ONCE = 64  # Logits of more would take gigabytes with a vocabulary of 150,000.
SHORTEST = 64  # Lengths are rounded up to powers of two from here, so that few programs compile.


class Likelihood(NamedTuple):
    """Of the last tokens of a sequence, given all before.

    Attributes:
      logprob: natural logarithm of their joint probability.
      greedy: whether each of them is the likeliest one.
    """

    logprob: float
    greedy: bool


@partial(jax.jit, static_argnames="positions_at_once")
def next_logprobs(
    params: Params,
    tokens: jax.Array,
    following: jax.Array,
    *,
    positions_at_once: int = POSITIONS_AT_ONCE,
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of a token at every place, given those up to there.

    Args:
      params: the model.
      tokens: int32 `[B, T]`, T a multiple of `positions_at_once`.
      following: int32 `[B, T]`, the token that comes after each.
      positions_at_once: logits are made for this many at once.

    Returns:
      float32 `[B, T]`, and bool `[B, T]`, whether it is the likeliest.
    """
    model = merge(params.config, params.weights)
    B, T = tokens.shape
    x = model.hidden(tokens)

    def score(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, wanted = block
        logits = model.logits(hidden)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        logprob = chosen - jax.nn.logsumexp(logits, axis=-1)
        return logprob, jnp.argmax(logits, axis=-1) == wanted

    blocks = T // positions_at_once
    parts = (
        jnp.moveaxis(x.reshape(B, blocks, positions_at_once, -1), 1, 0),
        jnp.moveaxis(following.reshape(B, blocks, positions_at_once), 1, 0),
    )
    logprob, greedy = jax.lax.map(score, parts)
    return (
        jnp.moveaxis(logprob, 0, 1).reshape(B, T),
        jnp.moveaxis(greedy, 0, 1).reshape(B, T),
    )


def likelihoods(
    params: Params, sequences: Sequence[tuple[Sequence[int], int]], rows: int
) -> Iterator[tuple[int, Likelihood]]:
    """Scores the ends of sequences, the longest first.

    Args:
      params: the model.
      sequences: token ids, and how many of the last ones are scored (fewer than there are).
      rows: sequences at once.

    Yields:
      The index of a sequence, and its likelihood.
    """
    for tokens, scored in sequences:
        if not 0 <= scored < len(tokens):
            raise ValueError(
                f"{scored} of {len(tokens)} tokens are to be scored; at least one must come before."
            )
    order = sorted(range(len(sequences)), key=lambda index: -len(sequences[index][0]))
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        # The last token is only scored, not read.
        width = SHORTEST
        while width < len(sequences[batch[0]][0]) - 1:
            width *= 2
        # What is padded at the right is seen by nothing before it.
        padded = np.zeros((2, rows, width), np.int32)
        for row, index in enumerate(batch):
            tokens = sequences[index][0]
            padded[0, row, : len(tokens) - 1] = tokens[:-1]
            padded[1, row, : len(tokens) - 1] = tokens[1:]
        found = next_logprobs(params, jnp.asarray(padded[0]), jnp.asarray(padded[1]))
        logprobs, greedy = (np.asarray(each) for each in jax.device_get(found))
        for row, index in enumerate(batch):
            tokens, scored = sequences[index]
            part = slice(len(tokens) - 1 - scored, len(tokens) - 1)
            total = float(np.sum(logprobs[row, part], dtype=np.float64))
            yield index, Likelihood(total, bool(greedy[row, part].all()))
