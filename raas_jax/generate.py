"""Text in, text out: `generate`, `stream`, and `generate_ids` for use inside a jit."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from raas_jax import text
from raas_jax.decode import (
    DecodeState,
    Drawn,
    Plan,
    cache_bytes,
    decode_pages,
    decode_until_done,
    dense_bytes,
    prefill,
    request,
)
from raas_jax.params import Params
from raas_jax.policies import Policy, RaaS, pages_for
from raas_jax.sampling import Sampler, Sampling, row_keys

DEFAULT_MAX_NEW_TOKENS = 32_768
TOKENS_PER_LOOK = 32  # How often the host looks: often enough to stream, too rarely to matter.


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one answer took.

    Attributes:
      prompt_tokens: length of the prompt.
      generated_tokens: tokens drawn, the stop token included.
      kept_pages: pages of generated tokens in the cache at the end, per layer and key/value head,
        and of the prompt where the policy may evict it; the page being written is not counted.
      evicted_pages: pages that had to go.
      kv_bytes: what the row's share of the cache takes: prompt, kept and open pages, the policy's
        metadata, padding.
      dense_kv_bytes: what the keys and values of all its tokens would take, nothing dropped.
      prefill_seconds: from the call to the first token, compilation included where it was needed.
      decode_seconds: from then to the last.
    """

    prompt_tokens: int
    generated_tokens: int
    kept_pages: int
    evicted_pages: int
    kv_bytes: int
    dense_kv_bytes: int
    prefill_seconds: float
    decode_seconds: float


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "logprobs"],
    meta_fields=["text", "finish_reason", "stats"],
)
@dataclasses.dataclass(frozen=True)
class Output:
    """One answer.

    Attributes:
      text: without special tokens, cut before the stop string; None where there is no tokenizer.
      tokens: token ids, the stop token included. Inside a jit an int32 array `[max_new_tokens]`
        (or `[B, max_new_tokens]`), -1 after the end.
      finish_reason: "stop" (a stop token or string), "length" (`max_new_tokens`), "interrupted".
      logprobs: of the tokens, under the model at temperature 1, before any filter.
      stats: what it took; None inside a jit.
    """

    text: str | None
    tokens: Any
    finish_reason: str | None
    logprobs: Any
    stats: Stats | None


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


def generate(
    params: Params,
    prompt: Any,
    *,
    policy: Policy | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int | None = None,
    stop: str | Iterable[str] = (),
    stop_token_ids: Iterable[int] = (),
    seed: int | jax.Array | Sequence[int] = 0,
    progress: bool | None = None,
) -> Any:
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
        return _generate_traced(
            params, prompt, policy, sampling, max_new_tokens, stop_token_ids, seed
        )
    run = _Run(params, prompt, policy, sampling, max_new_tokens, stop, stop_token_ids, seed)
    total = sum(row.limit for row in run.rows)
    with tqdm(
        total=total,
        unit="tok",
        delay=3,
        desc=type(run.plan.policy).__name__,
        disable=None if progress is None else not progress,
    ) as bar:
        try:
            for _ in run.looks():
                bar.set_postfix(
                    kept=max(row.kept_pages for row in run.rows),
                    evicted=max(row.evicted_pages for row in run.rows),
                    refresh=False,
                )
                bar.update(sum(len(row.tokens) for row in run.rows) - bar.n)
        except KeyboardInterrupt:
            run.interrupt()
    outputs = [row.output(run) for row in run.rows]
    return outputs[0] if run.single else outputs


def stream(
    params: Params,
    prompt: Any,
    *,
    policy: Policy | None = None,
    sampling: Sampling | Sequence[Sampling] | None = None,
    max_new_tokens: int | None = None,
    stop: str | Iterable[str] = (),
    stop_token_ids: Iterable[int] = (),
    seed: int | jax.Array | Sequence[int] = 0,
) -> Iterator[Piece]:
    """As `generate`, giving every answer in pieces while it is being made.

    The arguments are checked at the call, before the first piece is asked for. The last piece of
    each row carries its whole `Output`. Ctrl-C while waiting for a piece ends every answer with the
    finish_reason "interrupted".
    """
    run = _Run(params, prompt, policy, sampling, max_new_tokens, stop, stop_token_ids, seed)
    return _pieces(run)


def _pieces(run: _Run) -> Iterator[Piece]:
    finished: set[int] = set()
    try:
        for _ in run.looks():
            for row in run.rows:
                if row.index not in finished:
                    yield row.piece(run)
                    if row.finish_reason:
                        finished.add(row.index)
    except KeyboardInterrupt:
        run.interrupt()
        for row in run.rows:
            if row.index not in finished:
                yield row.piece(run)


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
) -> Drawn:
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
      `Drawn`: tokens int32 `[B' * samples, max_new_tokens]`, -1 after the end of a row, and their
      float32 log-probabilities.
    """
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens is {tokens.dtype}{list(tokens.shape)}; expected int32 [B, T].")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    policy = RaaS() if policy is None else policy
    if stop_token_ids is None:
        stop_token_ids = params.config.eos_token_ids
    prompts, T = tokens.shape
    rows = prompts * samples
    plan = Plan.create(params.config, policy, [T], max_new_tokens, samples)
    keys = row_keys(jax.random.key(seed) if _is_integer(seed) else seed, rows)
    asked = request(
        jnp.full(rows, max_new_tokens),
        stop_token_ids,
        Sampler.create([sampling or Sampling()] * rows, keys),
    )
    if lengths is None:
        lengths = jnp.full(prompts, T, jnp.int32)
    state, first = prefill(params, tokens.astype(jnp.int32), lengths, asked, plan=plan)
    _, drawn = decode_until_done(params, state, first, plan, max_new_tokens)
    return jax.tree.map(jnp.transpose, drawn)


def _is_integer(seed: Any) -> bool:
    return isinstance(seed, int) or jnp.issubdtype(jnp.asarray(seed).dtype, jnp.integer)


def _generate_traced(
    params: Params,
    prompt: jax.Array,
    policy: Policy | None,
    sampling: Any,
    max_new_tokens: int | None,
    stop_token_ids: Iterable[int],
    seed: Any,
) -> Output:
    if prompt.ndim not in (1, 2):
        raise ValueError(f"prompt has shape {prompt.shape}; inside a jit give ids [T] or [B, T].")
    batch = prompt[None] if prompt.ndim == 1 else prompt
    if max_new_tokens is None:
        max_new_tokens = _default_limit(params, batch.shape[1])
    stops = tuple(sorted({*params.config.eos_token_ids, *stop_token_ids}))
    drawn = generate_ids(
        params,
        batch,
        policy=policy,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        stop_token_ids=stops,
        seed=seed,
    )
    tokens, logprobs = drawn if prompt.ndim == 2 else (drawn.tokens[0], drawn.logprobs[0])
    return Output(None, tokens, None, logprobs, None)


@dataclasses.dataclass
class _Row:
    """One answer in the making, on the host."""

    index: int
    prompt: list[int]
    limit: int
    stop_ids: frozenset[int]
    detokenizer: text.Detokenizer | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    kept_pages: int = 0
    evicted_pages: int = 0
    decode_seconds: float = 0.0
    given: int = 0  # Tokens already given out as pieces.
    given_text: int = 0

    def take(self, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Adds what a look brought, up to the end of the answer."""
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            if self.finish_reason or token < 0:
                break
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if token in self.stop_ids:
                self.finish_reason = "stop"
            elif self.detokenizer is not None:
                self.text += self.detokenizer.push([token])
                if self.detokenizer.stopped is not None:
                    self.finish_reason = "stop"
            if not self.finish_reason and len(self.tokens) >= self.limit:
                self.finish_reason = "length"
        if self.finish_reason:
            self.flush()

    def flush(self) -> None:
        """Lets go of text that was held back."""
        if self.detokenizer is not None:
            self.text += self.detokenizer.finish()

    def count_pages(self, committed: int, evicted: int, plan: Plan) -> None:
        """Takes the device's counts, which run on a little when a stop string ends the row."""
        mine = min(committed, max(0, len(self.tokens) - 2) // plan.page_size)
        self.evicted_pages = max(0, evicted - (committed - mine))
        self.kept_pages = mine - self.evicted_pages
        if plan.policy.evicts_prompt:
            self.kept_pages += pages_for(len(self.prompt), plan.page_size)

    def output(self, run: _Run) -> Output:
        stats = Stats(
            prompt_tokens=len(self.prompt),
            generated_tokens=len(self.tokens),
            kept_pages=self.kept_pages,
            evicted_pages=self.evicted_pages,
            kv_bytes=run.row_bytes,
            dense_kv_bytes=dense_bytes(
                run.params.config, len(self.prompt) + len(self.tokens), run.dtype
            ),
            prefill_seconds=run.prefill_seconds,
            decode_seconds=self.decode_seconds,
        )
        known = self.text if self.detokenizer is not None else None
        return Output(known, self.tokens, self.finish_reason, self.logprobs, stats)

    def piece(self, run: _Run) -> Piece:
        """What came since the last piece."""
        piece = Piece(
            text=self.text[self.given_text :],
            tokens=self.tokens[self.given :],
            row=self.index,
            generated_tokens=len(self.tokens),
            kept_pages=self.kept_pages,
            evicted_pages=self.evicted_pages,
            output=self.output(run) if self.finish_reason else None,
        )
        self.given, self.given_text = len(self.tokens), len(self.text)
        return piece


class _Run:
    """One call: checks the arguments, drives the compiled functions, looks every few pages."""

    def __init__(
        self,
        params: Params,
        prompt: Any,
        policy: Policy | None,
        sampling: Sampling | Sequence[Sampling] | None,
        max_new_tokens: int | None,
        stop: str | Iterable[str],
        stop_token_ids: Iterable[int],
        seed: int | jax.Array | Sequence[int],
    ):
        if not isinstance(params, Params):
            raise TypeError(
                f"params is a {type(params).__name__}; expected what raas_jax.load returns."
            )
        policy = RaaS() if policy is None else policy
        if not isinstance(policy, Policy):
            raise TypeError(
                f"policy is {policy!r}; expected a policy such as raas_jax.RaaS(budget=1024)."
            )
        ids, self.single = text.encode(params, prompt)
        limits = [_row_limit(params, len(row), max_new_tokens) for row in ids]
        stops = text.stop_token_ids(params, stop_token_ids)
        stop_strings = text.stop_strings(stop)
        readable = text.has_tokenizer(params)
        if stop_strings and not readable:
            raise ValueError(f"stop is {stop!r}, but params has no tokenizer; use stop_token_ids.")
        settings = _per_row("sampling", sampling, len(ids))
        self.params = params
        self.dtype = params.weights["embedding"].dtype
        self.plan = Plan.create(params.config, policy, [len(row) for row in ids], max(limits))
        self._sampler = Sampler.create(settings, row_keys(seed, len(ids)))
        self._stops = stops
        self.rows = [
            _Row(
                i,
                row,
                limits[i],
                frozenset(stops),
                text.Detokenizer(params, stop_strings) if readable else None,
            )
            for i, row in enumerate(ids)
        ]
        self.prefill_seconds = 0.0
        self.row_bytes = 0

    def looks(self) -> Iterator[None]:
        """Generates, and yields whenever the host has looked."""
        began = time.perf_counter()
        limits = jnp.asarray([row.limit for row in self.rows])
        state, first = prefill(
            self.params,
            *_padded([row.prompt for row in self.rows], self.plan),
            request(limits, self._stops, self._sampler),
            plan=self.plan,
        )
        self._look(Drawn(first.tokens[None], first.logprobs[None]))
        self.prefill_seconds = time.perf_counter() - began
        self.row_bytes = cache_bytes(state) // len(self.rows)
        yield
        pages = max(1, TOKENS_PER_LOOK // self.plan.page_size)
        began = time.perf_counter()
        while not all(row.finish_reason for row in self.rows):
            state, drawn = decode_pages(self.params, state, plan=self.plan, pages=pages)
            self._look(drawn, state, time.perf_counter() - began)
            state = self._stop_early(state)
            yield

    def interrupt(self) -> None:
        """Ends every answer that is still in the making."""
        for row in self.rows:
            if not row.finish_reason:
                row.flush()
                row.finish_reason = "interrupted"

    def _look(self, drawn: Drawn, state: DecodeState | None = None, seconds: float = 0.0) -> None:
        tokens, logprobs = np.asarray(drawn.tokens), np.asarray(drawn.logprobs)
        for row in self.rows:
            if row.finish_reason:
                continue
            row.take(tokens[:, row.index], logprobs[:, row.index])
            row.decode_seconds = seconds
            if state is not None:
                committed, evicted = int(state.committed[row.index]), int(state.evicted[row.index])
                row.count_pages(committed, evicted, self.plan)

    def _stop_early(self, state: DecodeState) -> DecodeState:
        """Tells the device of rows that a stop string has ended, which only the host can see."""
        finished = np.asarray([row.finish_reason is not None for row in self.rows])
        if np.array_equal(finished, np.asarray(state.done)):
            return state
        return dataclasses.replace(state, done=state.done | jnp.asarray(finished))


def _padded(prompts: list[list[int]], plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 `[B, Sp * P]` padded at the right, and lengths int32 `[B]`."""
    tokens = np.zeros((len(prompts), plan.prompt_slots * plan.page_size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


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


def _default_limit(params: Params, prompt_tokens: int) -> int:
    room = params.config.max_position_embeddings - prompt_tokens
    if room < 1:
        raise ValueError(
            f"prompt has {prompt_tokens} tokens, but the model's context ends at "
            f"{params.config.max_position_embeddings} (max_position_embeddings). Shorten it."
        )
    return min(room, DEFAULT_MAX_NEW_TOKENS)


def _row_limit(params: Params, prompt_tokens: int, max_new_tokens: int | None) -> int:
    room = _default_limit(params, prompt_tokens)
    if max_new_tokens is None:
        return room
    if not isinstance(max_new_tokens, int) or isinstance(max_new_tokens, bool):
        raise TypeError(f"max_new_tokens is {max_new_tokens!r}; it must be an int.")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1.")
    limit = params.config.max_position_embeddings
    if prompt_tokens + max_new_tokens > limit:
        warnings.warn(
            f"prompt ({prompt_tokens}) and max_new_tokens ({max_new_tokens}) together exceed the "
            f"model's context of {limit} tokens; what it writes beyond that may be poor.",
            stacklevel=4,
        )
    return max_new_tokens
