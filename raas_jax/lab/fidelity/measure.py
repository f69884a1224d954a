"""How far a policy's next-token distributions are from the dense model's on given text.

Both models see the same tokens. The dense one reads a text in one pass; under a policy it is fed
token by token, with the cache that a decode would have. What is kept of either are the last layer's
outputs, `D` numbers a token: logits of `V` are made from them a few positions at a time, twice, and
compared where they are made.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.decode import DecodeState, RowRequest
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.lab.fidelity.oracle import foresee
from raas_jax.model import ends, hidden_states
from raas_jax.params import Params
from raas_jax.policies import Policy
from raas_jax.scoring import in_blocks
from raas_jax.session import Session


class Differences(NamedTuple):
    """What is seen at each position; arrays of one shape, of NumPy or of JAX.

    Attributes:
      nll: float32, negative log-likelihood of the token that follows, in nats.
      dense_nll: the same of the dense model.
      kl: float32, Kullback-Leibler divergence KL(dense || policy) of the next token, in nats.
      agree: bool, whether both hold the same token for the likeliest.
    """

    nll: Any
    dense_nll: Any
    kl: Any
    agree: Any


@dataclasses.dataclass(frozen=True)
class Followed:
    """A text under a policy.

    Attributes:
      differences: at every position that follows the prompt, arrays `[T - prompt - 1]`: of the
        tokens from `prompt + 1` on, since the first is drawn by the dense prefill itself.
      seconds: of the batch that it was in, over the number of its texts.
      kv_bytes: of its row.
    """

    differences: Differences
    seconds: float
    kv_bytes: int


def dense_outputs(params: Params, tokens: Sequence[int]) -> np.ndarray:
    """The last layer's outputs of the dense model, `[T, D]`, on the host."""
    width = -(-len(tokens) // TOKENS_PER_SYNC) * TOKENS_PER_SYNC
    padded = np.zeros((1, width), np.int32)
    padded[0, : len(tokens)] = tokens
    length = jnp.asarray([len(tokens)], jnp.int32)
    found: np.ndarray = jax.device_get(_outputs(params, jnp.asarray(padded), length))
    return found[0, : len(tokens)]


@jax.jit
def _outputs(params: Params, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
    return hidden_states(params.config, params.weights, tokens, lengths=lengths)


def follow(
    params: Params,
    policy: Policy,
    texts: Sequence[Sequence[int]],
    outputs: Sequence[np.ndarray],
    prompt_tokens: int,
    prepare: Callable[[DecodeState], DecodeState] | None = None,
) -> Iterator[int | list[Followed]]:
    """Feeds texts through a decode under a policy, as rows of one batch.

    Args:
      params: the model.
      policy: which pages to keep.
      texts: token ids, each longer than `prompt_tokens + 1`.
      outputs: of `dense_outputs` for each of them.
      prompt_tokens: how many of the first tokens are the prompt.
      prepare: changes the state before the first step.

    Yields:
      After every few pages how many tokens of each row were fed; in the end what was found of each
      text.
    """
    began = time.perf_counter()
    longest, rows = max(map(len, texts)), len(texts)
    prompts = [ids[:prompt_tokens] for ids in texts]
    session = Session.create(params, policy, [prompt_tokens] * rows, longest - prompt_tokens)
    pages = max(1, TOKENS_PER_SYNC // session.plan.page_size)
    steps = pages * session.plan.page_size
    # Token t is fed at step t - prompt, and what follows it is looked at.
    fed = longest - 1 - prompt_tokens
    padded = -(-fed // steps) * steps
    tokens = np.zeros((padded + 2, rows), np.int32)
    reference = np.zeros((padded, rows, outputs[0].shape[-1]), outputs[0].dtype)
    for row, (ids, dense) in enumerate(zip(texts, outputs, strict=True)):
        tokens[: len(ids) - prompt_tokens, row] = ids[prompt_tokens:]
        reference[: len(ids) - prompt_tokens - 1, row] = dense[prompt_tokens:-1]
    # A row that has ended is fed like the others; without stop tokens none ends earlier.
    request = RowRequest.create([len(ids) - prompt_tokens for ids in texts])
    state, _ = session.start(prompts, request, force=tokens[0])
    state = foresee(params, session.plan, state, texts, prompt_tokens)
    state = state if prepare is None else prepare(state)
    found = []
    for first in range(0, padded, steps):
        following = tokens[first + 1 : first + 1 + steps]
        state, kept = session.feed(state, following)
        seen = compare(params, reference[first : first + steps], kept, following)
        found.append(jax.device_get(seen))
        yield min(first + steps, fed)
    joined = Differences(*(np.concatenate(parts) for parts in zip(*found, strict=True)))
    seconds = (time.perf_counter() - began) / rows
    yield [
        Followed(
            Differences(*(each[: len(ids) - 1 - prompt_tokens, row] for each in joined)),
            seconds,
            session.row_bytes,
        )
        for row, ids in enumerate(texts)
    ]


@jax.jit
def compare(params: Params, dense: jax.Array, kept: jax.Array, following: jax.Array) -> Differences:
    """Compares two models' next tokens, by their last layers' outputs `[T, B, D]`.

    `following` are the tokens that come next, int32 `[T, B]`; the results have that shape.
    """
    model = ends(params.config, params.weights)

    def of_block(block: tuple[jax.Array, jax.Array, jax.Array]) -> Differences:
        *outputs, wanted = block
        p, q = (model.logits(each) for each in outputs)
        log_p, log_q = (jax.nn.log_softmax(each, axis=-1) for each in (p, q))

        def nll(logs: jax.Array) -> jax.Array:
            return -jnp.take_along_axis(logs, wanted[..., None], axis=-1)[..., 0]

        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        agree = jnp.argmax(p, axis=-1) == jnp.argmax(q, axis=-1)
        return Differences(nll(log_q), nll(log_p), kl, agree)

    found: Differences = in_blocks(of_block, (dense, kept, following))
    return found
