"""Text in, text out: `generate`, `stream`, and `generate_ids` for use inside a jit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from raas_jax import checks, tokenizer
from raas_jax.decode import Progress, RowRequest, Sampled, decode_until_done, prefill
from raas_jax.outputs import Answer, Output, answer_limit, default_limit
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Policy, RaaS
from raas_jax.sampling import Sampling
from raas_jax.session import Session
from raas_jax.suited import suited
from raas_jax.tokenizer import Prompt, Prompts, PromptT

TOKENS_PER_SYNC = 32  # How often the host looks: often enough to stream, too rarely to matter.


class Options(TypedDict, total=False):
    """Keyword arguments of `stream`, which are those of `generate`."""

    policy: Policy | None
    sampling: Sampling | Sequence[Sampling] | None
    max_new_tokens: int | None
    stop: str | Iterable[str]
    stop_token_ids: Iterable[int]
    seed: int | jax.Array | Sequence[int]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a streamed answer; `print(piece, end="")` prints its text.

    Attributes:
      text: new text, possibly empty.
      tokens: new token ids.
      row: which prompt it answers, 0 for a single one.
      generated_tokens, kept_pages, evicted_pages: as in `Stats`, so far.
      output: the whole answer, on the row's last piece; else None.
    """

    text: str
    tokens: list[int]
    row: int
    generated_tokens: int
    kept_pages: int
    evicted_pages: int
    output: Output | None

    def __str__(self) -> str:
        return self.text


@overload
def generate(
    params: Params, prompt: Prompt, *, progress: bool | None = None, **options: Unpack[Options]
) -> Output: ...
@overload
def generate(
    params: Params,
    prompt: Prompts[PromptT],
    *,
    progress: bool | None = None,
    **options: Unpack[Options],
) -> list[Output]: ...
def generate(
    params: Params,
    prompt: Prompt | Prompts[PromptT],
    *,
    policy: Policy | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int | None = None,
    stop: str | Iterable[str] = (),
    stop_token_ids: Iterable[int] = (),
    seed: int | jax.Array | Sequence[int] = 0,
    progress: bool | None = None,
) -> Output | list[Output]:
    """Answers one prompt, or a list of them.

    Args:
      params: from `raas_jax.load`.
      prompt: a string, a chat (list of {"role", "content"}), or token ids (list of int or integer
        array `[T]`); or a list of those. Traced ids (`[T]` or `[B, T]`) work inside `jax.jit`.
      policy: which pages of the cache to keep; `RaaS(budget=1024)` by default.
      sampling: greedy by default; one for all rows, or one for each.
      max_new_tokens: by default what the model's context leaves, at most 32,768. More than the
        context leaves is allowed, with a warning.
      stop: strings that end an answer.
      stop_token_ids: ids that end an answer, besides those of the tokenizer, the model's config and
        its generation config.
      seed: an int or a typed key, folded with the row and the token; or one int for each row.
      progress: shows a bar on stderr; None shows it on a terminal once it takes seconds.

    Returns:
      An `Output`, or a list of them for a list. Ctrl-C returns what there is, its finish_reason
      "interrupted".

    Raises:
      TypeError, ValueError: names the argument, its value and the remedy. Nothing was computed.
    """
    if isinstance(prompt, jax.core.Tracer):
        if stop:
            raise ValueError(f"stop is {stop!r}; inside a jit use stop_token_ids.")
        options = {"policy": policy, "sampling": sampling, "seed": seed}
        return _generate_traced(params, prompt, max_new_tokens, stop_token_ids, **options)
    run = _Run(params, prompt, policy, sampling, max_new_tokens, stop, stop_token_ids, seed)
    total = sum(row.limit for row in run.rows)
    with tqdm(
        total=total,
        unit="tok",
        delay=3,
        desc=type(run.session.plan.policy).__name__,
        disable=None if progress is None else not progress,
    ) as bar:
        try:
            for _ in run.syncs():
                bar.set_postfix(
                    kept=max(row.kept_pages for row in run.rows),
                    evicted=max(row.evicted_pages for row in run.rows),
                    refresh=False,
                )
                bar.update(sum(len(row.tokens) for row in run.rows) - bar.n)
        except KeyboardInterrupt:
            run.interrupt()
    outputs = [run.output(index) for index in range(len(run.rows))]
    return outputs[0] if run.single else outputs


def stream(
    params: Params, prompt: Prompt | Prompts[PromptT], **options: Unpack[Options]
) -> Iterator[Piece]:
    """As `generate`, giving every answer in pieces while it is being made.

    The arguments are checked at the call, before the first piece is asked for. The last piece of
    each row carries its whole `Output`. Ctrl-C while waiting for a piece ends every answer with the
    finish_reason "interrupted".
    """
    return _pieces(_Run(params, prompt, **options))


def _pieces(run: _Run) -> Iterator[Piece]:
    going = list(range(len(run.rows)))
    try:
        for _ in run.syncs():
            for index in list(going):
                yield run.piece(index)
                if run.rows[index].finish_reason:
                    going.remove(index)
    except KeyboardInterrupt:
        run.interrupt()
        for index in going:
            yield run.piece(index)


@partial(
    jax.jit, static_argnames=("policy", "sampling", "max_new_tokens", "stop_token_ids", "samples")
)
def generate_ids(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array | None = None,
    *,
    policy: Policy | None = None,
    sampling: Sampling | None = None,
    max_new_tokens: int,
    stop_token_ids: tuple[int, ...] | None = None,
    seed: int | jax.Array = 0,
    samples: int = 1,
) -> Sampled:
    """Token ids in, token ids out, as one compiled function: prefill and the whole decode loop.

    Args:
      params: the model.
      tokens: int32 `[B', T]`, prompts at the left, padded at the right.
      lengths: int32 `[B']`, true lengths; T where not given.
      policy: `RaaS(budget=1024)` by default.
      sampling: greedy by default.
      max_new_tokens: at most this many tokens per row.
      stop_token_ids: those of the model's config by default.
      seed: an int or a typed key, folded with the row and the token.
      samples: answers per prompt; they share its keys and values.

    Returns:
      `Sampled`: tokens int32 `[B' * samples, max_new_tokens]`, -1 after the end of a row, and their
      float32 log-probabilities.
    """
    policy = suited(checked(params, policy), params)
    _check_ids("tokens", tokens, "[B', T], with at least one token", 2)
    if lengths is not None:
        _check_ids("lengths", lengths, f"[{len(tokens)}]", 1, len(tokens))
    if sampling is not None and not isinstance(sampling, Sampling):
        raise TypeError(f"sampling is {checks.short(sampling)}; expected a raas_jax.Sampling.")
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, 1, checks.MOST_TOKENS)
    samples = checks.integer("samples", samples, 1)
    if stop_token_ids is None:
        stop_token_ids = params.config.eos_token_ids
    else:
        stop_token_ids = tuple(tokenizer.checked_stops(params, stop_token_ids))
    prompts, T = tokens.shape
    rows = prompts * samples
    plan = Plan.create(params.config, policy, [T], max_new_tokens, samples)
    key = _key(seed)
    request = RowRequest.create([max_new_tokens] * rows, stop_token_ids, sampling, key)
    if lengths is None:
        lengths = jnp.full(prompts, T, jnp.int32)
    state, first = prefill(params, tokens.astype(jnp.int32), lengths, request, plan=plan)
    _, sampled = decode_until_done(params, state, first, plan, max_new_tokens)
    return Sampled(sampled.tokens.T, sampled.logprobs.T)


def _check_ids(name: str, value: Any, shape: str, ndim: int, size: int | None = None) -> None:
    """Raises TypeError or ValueError for what is no integer array of this shape."""
    if not isinstance(value, jax.Array):
        raise TypeError(f"{name} is a {type(value).__name__}; expected an int32 array {shape}.")
    fits = value.ndim == ndim and value.size in ([size] if size else range(1, value.size + 1))
    if not fits or not jnp.issubdtype(value.dtype, jnp.integer):
        raise ValueError(f"{name} is {value.dtype}{list(value.shape)}; expected int32 {shape}.")


def _key(seed: Any) -> Any:
    """The key of a seed inside a jit, where an int that was given has become an array."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return jax.random.key(seed)
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        return seed
    if isinstance(seed, jax.Array) and seed.ndim == 0 and jnp.issubdtype(seed.dtype, jnp.integer):
        return jax.random.key(seed)
    what = f"{seed.dtype}{list(seed.shape)}" if isinstance(seed, jax.Array) else type(seed).__name__
    raise TypeError(f"seed is a {what}; inside a jit it must be an int32 or a typed key.")


def _generate_traced(
    params: Params,
    prompt: jax.Array,
    max_new_tokens: int | None,
    stop_token_ids: Iterable[int],
    **options: Any,
) -> Output:
    if prompt.ndim not in (1, 2):
        raise ValueError(f"prompt has shape {prompt.shape}; inside a jit give ids [T] or [B, T].")
    batch = prompt[None] if prompt.ndim == 1 else prompt
    limit = default_limit(params, batch.shape[1]) if max_new_tokens is None else max_new_tokens
    stops = tokenizer.stop_token_ids(params, stop_token_ids)
    found = generate_ids(params, batch, max_new_tokens=limit, stop_token_ids=stops, **options)
    tokens, logprobs = found if prompt.ndim == 2 else (found.tokens[0], found.logprobs[0])
    return Output(None, tokens, None, logprobs, None)


def checked(params: Any, policy: Any) -> Policy:
    """The policy, or the default one. Raises TypeError for what is no model or no policy."""
    if not isinstance(params, Params):
        raise TypeError(
            f"params is a {type(params).__name__}; expected what raas_jax.load returns."
        )
    policy = RaaS() if policy is None else policy
    if not isinstance(policy, Policy):
        raise TypeError(
            f"policy is {policy!r}; expected a policy such as raas_jax.RaaS(budget=1024)."
        )
    return policy


class _Run:
    """One call: checks the arguments, drives a session, and looks every few pages."""

    def __init__(
        self,
        params: Params,
        prompt: Prompt | Prompts[PromptT],
        policy: Policy | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
        max_new_tokens: int | None = None,
        stop: str | Iterable[str] = (),
        stop_token_ids: Iterable[int] = (),
        seed: int | jax.Array | Sequence[int] = 0,
    ):
        policy = checked(params, policy)
        ids, self.single = tokenizer.encode(params, prompt)
        limits = [answer_limit(params, len(row), max_new_tokens) for row in ids]
        stops = tokenizer.stop_token_ids(params, stop_token_ids)
        stop_strings = tokenizer.stop_strings(stop)
        readable = tokenizer.has_tokenizer(params)
        if stop_strings and not readable:
            raise ValueError(f"stop is {stop!r}, but params has no tokenizer; use stop_token_ids.")
        settings = _per_row("sampling", sampling, len(ids))
        self.session = Session.create(params, policy, [len(row) for row in ids], max(limits))
        self._request = RowRequest.create(limits, stops, settings, seed)
        self.rows = [
            Answer(
                row,
                limit,
                frozenset(stops),
                tokenizer.Detokenizer(params, stop_strings) if readable else None,
            )
            for row, limit in zip(ids, limits, strict=True)
        ]
        self._given = [(0, 0)] * len(ids)  # Tokens and characters given out as pieces.

    def syncs(self) -> Iterator[None]:
        """Generates, and yields whenever the host has looked."""
        session, began = self.session, time.perf_counter()
        state, progress = session.start([row.prompt for row in self.rows], self._request)
        self._take(session.read(progress))
        for row in self.rows:
            row.prefill_seconds = time.perf_counter() - began
        yield
        pages = max(1, TOKENS_PER_SYNC // session.plan.page_size)
        began = time.perf_counter()
        while not all(row.finish_reason for row in self.rows):
            state, progress = session.advance(state, pages)
            seen = session.read(progress)
            self._take(seen, time.perf_counter() - began)
            # The device does not know of rows that a stop string has ended.
            finished = np.asarray([row.finish_reason is not None for row in self.rows])
            if np.any(finished & ~seen.done):
                state = session.stop(state, finished)
            yield

    def interrupt(self) -> None:
        """Ends every answer that is still in the making."""
        for row in self.rows:
            row.interrupt()

    def output(self, index: int) -> Output:
        """The answer of a row so far."""
        row, session = self.rows[index], self.session
        return row.output(row.stats(session.params, session.plan, session.row_bytes))

    def piece(self, index: int) -> Piece:
        """What a row has had since its last piece."""
        row, (tokens, characters) = self.rows[index], self._given[index]
        self._given[index] = len(row.tokens), len(row.text)
        return Piece(
            text=row.text[characters:],
            tokens=row.tokens[tokens:],
            row=index,
            generated_tokens=len(row.tokens),
            kept_pages=row.kept_pages,
            evicted_pages=row.evicted_pages,
            output=self.output(index) if row.finish_reason else None,
        )

    def _take(self, seen: Progress, seconds: float = 0.0) -> None:
        for index, row in enumerate(self.rows):
            if not row.finish_reason:
                row.decode_seconds = seconds
                row.take(seen, index, self.session.plan)


def _per_row(
    name: str, value: Sampling | Sequence[Sampling] | None, rows: int
) -> Sequence[Sampling]:
    if value is None or isinstance(value, Sampling):
        return [value or Sampling()] * rows
    if not isinstance(value, Sequence) or not all(isinstance(v, Sampling) for v in value):
        raise TypeError(f"{name} is {value!r}; expected a raas_jax.Sampling, or a list of them.")
    if len(value) != rows:
        raise ValueError(f"{name} has {len(value)} entries for {rows} prompts; give one for each.")
    return value
