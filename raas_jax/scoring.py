"""The log-probability of a given continuation, token by token, under any policy.

Under a policy that evicts, what a token can see depends on what was kept when it was fed, so that
the continuation is fed as a decode would have fed it (teacher forcing), with the same bounded
cache. A dense cache hides nothing: there one forward pass gives all tokens at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from raas_jax import checks, tokenizer
from raas_jax.decode import RowRequest
from raas_jax.generation import TOKENS_PER_SYNC, checked
from raas_jax.model import ends, hidden_states
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Dense, Policy, bucket, pages_for
from raas_jax.sampling import log_probability
from raas_jax.session import Session
from raas_jax.sharding import check_mesh, place_weights, target_of
from raas_jax.suited import suited
from raas_jax.tokenizer import Prompt, Prompts, PromptT

SHORTEST = 64  # Tokens; shorter texts are padded to it, and longer ones to a power of two.
POSITIONS_AT_ONCE = 128  # Of all rows: a few hundred MB of logits with a large vocabulary.

Ids = Sequence[int]


@dataclasses.dataclass(frozen=True)
class Score:
    """How likely a continuation is.

    Attributes:
      tokens: its ids.
      logprobs: float32 `[T]`, of each token given the prompt and the tokens before it, as far as
        the policy kept them; at temperature 1. NaN from the page on in which the logits were
        not finite, or of the whole continuation under `Dense`, which reads it in one pass.
      greedy: bool `[T]`, whether each is the likeliest token.
    """

    tokens: list[int]
    logprobs: np.ndarray
    greedy: np.ndarray

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation, summed in float64."""
        return float(np.sum(self.logprobs, dtype=np.float64))


class Options(TypedDict, total=False):
    """Keyword arguments of `score`, for type checkers."""

    policy: Policy | None
    rows: int
    mesh: Mesh | None


@overload
def score(
    params: Params, prompt: Prompt, continuation: str | Ids, **options: Unpack[Options]
) -> Score: ...
@overload
def score(
    params: Params,
    prompt: Prompts[PromptT],
    continuation: Sequence[str | Ids],
    **options: Unpack[Options],
) -> list[Score]: ...
def score(
    params: Params,
    prompt: Prompt | Prompts[PromptT],
    continuation: str | Ids | Sequence[str | Ids],
    *,
    policy: Policy | None = None,
    rows: int = 16,
    mesh: Mesh | None = None,
) -> Score | list[Score]:
    """Scores a continuation of a prompt, or one of each of several.

    Args:
      params: from `raas_jax.load`.
      prompt: as for `raas_jax.generate`.
      continuation: text, which gets no special tokens, or token ids; or a list of them, one for
        each prompt.
      policy: which pages of the cache to keep; `RaaS(budget=1024)` by default.
      rows: continuations at once.
      mesh: from `raas_jax.make_mesh`.

    Returns:
      A `Score`, or a list of them for a list.

    Raises:
      TypeError, ValueError: names the argument, its value and the remedy. Nothing was computed.
    """
    policy = suited(checked(params, policy), params)
    check_mesh(mesh)
    rows = checks.integer("rows", rows, 1)
    prompts, single = tokenizer.encode(params, prompt)
    given: Any = [continuation] if single else continuation
    listed = isinstance(given, list | tuple) or getattr(given, "ndim", 0) > 0
    if not listed or len(given) != len(prompts):
        raise (ValueError if listed else TypeError)(
            f"continuation is {checks.short(continuation)} for {len(prompts)} prompts; give a list "
            "with one for each."
        )
    ids = [
        tokenizer.encode_continuation(
            params, each, "continuation" if single else f"continuation[{index}]"
        )
        for index, each in enumerate(given)
    ]
    found = dict(scores(params, prompts, ids, policy, rows=rows, mesh=mesh))
    return found[0] if single else [found[index] for index in range(len(prompts))]


def scores(
    params: Params,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
    policy: Policy,
    *,
    rows: int = 16,
    mesh: Mesh | None = None,
) -> Iterator[tuple[int, Score]]:
    """Scores token ids, the longest first, and gives each batch as soon as it is done.

    As `score`, with a continuation for each prompt, none of which may be empty.

    Yields:
      The index of a continuation, and its score.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{index}] is empty; at least one token must come before.")
    policy.check_prompts([len(prompt) for prompt in prompts])
    if mesh is not None:
        params = place_weights(params, mesh)
        rows = -(-rows // mesh.shape["data"]) * mesh.shape["data"]
    order = sorted(range(len(prompts)), key=lambda i: (-len(continuations[i]), -len(prompts[i])))
    # A dynamic rope turns what is decoded otherwise than what is read at once.
    at_once = isinstance(policy, Dense) and params.config.rope.kind != "dynamic"
    batch_scores = _in_one_pass if at_once else partial(_forced, policy, mesh)
    for start in range(0, len(order), rows):
        batch = order[start : start + rows]
        # Missing rows repeat the last one, so that every batch has one shape.
        padded = batch + [batch[-1]] * (rows - len(batch) if len(order) > rows or mesh else 0)
        found = batch_scores(
            params, [prompts[i] for i in padded], [continuations[i] for i in padded]
        )
        for index, score in zip(batch, found, strict=False):
            yield index, score


def _forced(
    policy: Policy,
    mesh: Mesh | None,
    params: Params,
    prompts: Sequence[Ids],
    continuations: Sequence[Ids],
) -> list[Score]:
    """Scores of a batch, fed through a decode."""
    longest = max(map(len, continuations))
    P = policy.page_size
    # A bucket of lengths shares a program; what lies beyond a row's end is not looked at.
    slots = bucket(pages_for(longest, P)) * P
    plan = Plan.create(
        params.config, policy, [len(prompt) for prompt in prompts], slots, target=target_of(mesh)
    )
    session = Session(params, plan, len(prompts), mesh=mesh)
    pages = max(1, TOKENS_PER_SYNC // P)
    steps = pages * P
    force = np.zeros((1 + -(-max(longest - 1, 0) // steps) * steps, len(prompts)), np.int32)
    for row, ids in enumerate(continuations):
        force[: len(ids), row] = ids
    # A row that has ended is fed like the others; without stop tokens none ends earlier.
    request = RowRequest.create([len(ids) for ids in continuations])
    state, progress = session.start(prompts, request, force=force[0])
    seen: list[Any] = [(progress.logprobs, progress.greedy)]
    for first in range(1, len(force), steps):
        following = jnp.asarray(force[first : first + steps])
        state, outputs = session.feed(state, following)
        seen.append(of_outputs(params, outputs, following))
    logprobs, greedy = map(np.concatenate, zip(*session.read(seen), strict=True))
    # What comes after logits that were not finite says nothing.
    logprobs = np.where(np.logical_or.accumulate(~np.isfinite(logprobs)), np.nan, logprobs)
    return [
        Score(list(ids), logprobs[: len(ids), row], greedy[: len(ids), row])
        for row, ids in enumerate(continuations)
    ]


def _in_one_pass(
    params: Params, prompts: Sequence[Ids], continuations: Sequence[Ids]
) -> list[Score]:
    """The same with a dense cache, in one forward pass."""
    texts = [[*prompt, *ids] for prompt, ids in zip(prompts, continuations, strict=True)]
    # The last token is only scored, not read. Padding at the right is seen by nothing before it.
    width = max(SHORTEST, 1 << (max(map(len, texts)) - 2).bit_length())
    padded = np.zeros((2, len(texts), width), np.int32)
    for row, text in enumerate(texts):
        padded[:, row, : len(text) - 1] = text[:-1], text[1:]
    lengths = jnp.asarray([len(text) - 1 for text in texts], jnp.int32)
    found = next_logprobs(params, *map(jnp.asarray, padded), lengths)
    logprobs, greedy = jax.device_get(found)
    parts = [
        slice(len(prompt) - 1, len(text) - 1) for prompt, text in zip(prompts, texts, strict=True)
    ]
    return [
        Score(list(ids), logprobs[row, part], greedy[row, part])
        for row, (ids, part) in enumerate(zip(continuations, parts, strict=True))
    ]


@jax.jit
def next_logprobs(
    params: Params, tokens: jax.Array, following: jax.Array, lengths: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability of the token that follows each, and whether it is the likeliest, `[B, T]`.

    Of one dense pass over tokens int32 `[B, T]`, padded after `lengths [B]`; those that follow have
    the same shape.
    """
    outputs = hidden_states(params.config, params.weights, tokens, lengths=lengths)
    found = of_outputs(params, jnp.swapaxes(outputs, 0, 1), following.T)
    return found[0].T, found[1].T


@jax.jit
def of_outputs(
    params: Params, outputs: jax.Array, following: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same from the last layer's outputs `[T, B, D]` and int32 `[T, B]`; results `[T, B]`."""
    model = ends(params.config, params.weights)

    def of_block(block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        hidden, wanted = block
        logits = model.logits(hidden)
        return log_probability(logits, wanted), jnp.argmax(logits, axis=-1) == wanted

    found: tuple[jax.Array, jax.Array] = in_blocks(of_block, (outputs, following))
    return found


def in_blocks(function: Callable[[Any], Any], arrays: Any) -> Any:
    """Maps over the first two axes `[T, B]` of arrays, about `POSITIONS_AT_ONCE` of them together.

    The logits of all positions of a long text would not fit into memory.
    """
    T, B = jax.tree.leaves(arrays)[0].shape[:2]
    most = max(1, min(T, POSITIONS_AT_ONCE // B))
    size = next(size for size in range(most, 0, -1) if T % size == 0)
    blocks = jax.tree.map(lambda x: x.reshape(T // size, size, *x.shape[1:]), arrays)
    found = jax.lax.map(function, blocks)
    return jax.tree.map(lambda x: x.reshape(T, *x.shape[2:]), found)
