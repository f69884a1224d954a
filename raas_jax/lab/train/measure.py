"""Measuring a model on fixed test problems by one forward pass over the right derivations.

A derivation is exact under greedy decoding just where every token is the model's first choice
given the right ones before it, so one pass tells the share of exact derivations. The share of
right answers can only be higher: a wrong token in a line that the answer does not need costs
nothing.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.config import ModelConfig
from raas_jax.lab.tasks.lemma.draws import Knobs, draw
from raas_jax.lab.tasks.lemma.problems import Problem
from raas_jax.lab.tasks.lemma.tokenizer import PAD_ID
from raas_jax.lab.train.batches import row_ids
from raas_jax.lab.train.forward import forward


def held_out(count: int, knobs: Knobs, seed: int = 0) -> list[Problem]:
    """The first `count` test problems of a seed; training never saw one of them."""
    return [draw("test", seed, index, knobs) for index in range(count)]


@functools.partial(jax.jit, static_argnums=0)
def _choices(config: ModelConfig, weights: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return forward(config, weights, tokens, positions, jnp.ones_like(tokens)).argmax(-1)


def wrong_tokens(
    config: ModelConfig, weights: Any, problems: Sequence[Problem], rows: int = 8
) -> list[np.ndarray]:
    """For each problem, the positions of derivation tokens that are not the model's first choice.

    Positions count `<bos>` + prompt + derivation + `<eos>` from 0; an empty array is an exact
    derivation. Computed in float32, `rows` problems at a time, in rows of a multiple of 512.
    """
    weights = jax.tree.map(lambda value: value.astype(jnp.float32), weights)
    order = sorted(range(len(problems)), key=lambda index: len(problems[index].definitions))
    found: dict[int, np.ndarray] = {}
    for start in range(0, len(order), rows):
        chosen = order[start : start + rows]
        ids = [row_ids(problems[index]) for index in chosen]
        length = -(-max(len(each) for each, _ in ids) // 512) * 512
        tokens = np.full((rows, length), PAD_ID, np.int32)
        for row, (each, _) in enumerate(ids):
            tokens[row, : len(each)] = each
        choices = np.asarray(_choices(config, weights, tokens))
        for row, (index, (each, prompt)) in enumerate(zip(chosen, ids, strict=True)):
            missed = choices[row, prompt - 1 : len(each) - 1] != np.asarray(each[prompt:])
            found[index] = prompt + np.flatnonzero(missed)
    return [found[index] for index in range(len(problems))]
