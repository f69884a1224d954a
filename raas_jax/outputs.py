"""One answer in the making, as the host sees it: tokens, text, when it ends, what it took."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from raas_jax import checks, tokenizer
from raas_jax.decode import Progress, dense_bytes
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Allotment, pages_for

DEFAULT_MAX_NEW_TOKENS = 32_768


@dataclasses.dataclass(frozen=True)
class Stats:
    """What one answer took.

    Attributes:
      prompt_tokens: length of the prompt.
      generated_tokens: tokens drawn, the stop token included.
      kept_pages: pages of generated tokens in the cache at the end, per layer and key/value head,
        and of the prompt where the policy may evict it; the page being written is not counted.
      evicted_pages: pages that had to go. Where heads have budgets of their own, kept and evicted
        pages are those of the head that had to give up most.
      kv_bytes: what the row's share of the cache takes: prompt, kept and current pages, the
        policy's metadata, padding.
      dense_kv_bytes: what the keys and values of all its tokens would take, nothing dropped.
      prefill_seconds: from the call to the first token, compilation included where it was needed.
      decode_seconds: from then to the last.
      allotment: digest of the `Allotment` in use; None where all heads have the same budget.
    """

    prompt_tokens: int
    generated_tokens: int
    kept_pages: int
    evicted_pages: int
    kv_bytes: int
    dense_kv_bytes: int
    prefill_seconds: float
    decode_seconds: float
    allotment: str | None = None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "logprobs"],
    meta_fields=["text", "finish_reason", "stats", "error"],
)
@dataclasses.dataclass(frozen=True)
class Output:
    """One answer.

    Attributes:
      text: without special tokens, cut before the stop string; None where there is no tokenizer.
      tokens: token ids, the stop token included. Inside a jit an int32 array `[max_new_tokens]`
        (or `[B, max_new_tokens]`), -1 after the end.
      finish_reason: "stop" (a stop token or string), "length" (`max_new_tokens`), "interrupted",
        or "error".
      logprobs: of the tokens, under the model at temperature 1, before any filter. Inside a jit,
        NaN after the last token of an answer that ended by an error.
      stats: what it took; None inside a jit.
      error: what went wrong, for the finish_reason "error"; else None.
    """

    text: str | None
    tokens: Any
    finish_reason: str | None
    logprobs: Any
    stats: Stats | None
    error: str | None = None


@dataclasses.dataclass
class Answer:
    """One answer in the making, on the host.

    Attributes:
      prompt: its token ids.
      limit: tokens that it may have.
      stop_ids: tokens that end it.
      detokenizer: makes its text; None where there is no tokenizer.
      tokens, logprobs, text, finish_reason: as in `Output`, so far.
      kept_pages, evicted_pages, prefill_seconds, decode_seconds: as in `Stats`, so far.
    """

    prompt: list[int]
    limit: int
    stop_ids: frozenset[int]
    detokenizer: tokenizer.Detokenizer | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    kept_pages: int = 0
    evicted_pages: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def take(self, seen: Progress, row: int, plan: Plan) -> None:
        """Adds what a look at the device brought for this answer's row, up to the answer's end."""
        self.add(seen.tokens[:, row].tolist(), seen.logprobs[:, row].tolist())
        self._count_pages(int(seen.committed[row]), int(seen.evicted[row]), plan)

    def add(self, tokens: Sequence[int], logprobs: Sequence[float]) -> None:
        """Adds tokens, up to the end of the answer."""
        for token, logprob in zip(tokens, logprobs, strict=True):
            if token < 0 and math.isnan(logprob):
                self.finish_reason = self.finish_reason or "error"
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

    @property
    def error(self) -> str | None:
        """What went wrong, if the answer ended by an error."""
        if self.finish_reason != "error":
            return None
        return (
            f"the logits of token {len(self.tokens)} were not finite (NaN or infinity): the "
            "weights are damaged, or too large for their dtype. Load them anew, or with "
            "dtype='float32'."
        )

    def flush(self) -> None:
        """Lets go of text that was held back."""
        if self.detokenizer is not None:
            self.text += self.detokenizer.finish()

    def interrupt(self) -> None:
        """Ends the answer with what there is."""
        if not self.finish_reason:
            self.flush()
            self.finish_reason = "interrupted"

    def _count_pages(self, committed: int, evicted: int, plan: Plan) -> None:
        # The device runs on for a little where a stop string, which only the host sees, ends a row.
        mine = min(committed, max(0, len(self.tokens) - 2) // plan.page_size)
        self.evicted_pages = max(0, evicted - (committed - mine))
        self.kept_pages = mine - self.evicted_pages
        if plan.policy.evicts_prompt:
            self.kept_pages += pages_for(len(self.prompt), plan.page_size)

    def stats(self, params: Params, plan: Plan, kv_bytes: int) -> Stats:
        """What it took; `kv_bytes` is its share of the cache."""
        tokens = len(self.prompt) + len(self.tokens)
        allotment = getattr(plan.policy, "allotment", None)
        return Stats(
            prompt_tokens=len(self.prompt),
            generated_tokens=len(self.tokens),
            kept_pages=self.kept_pages,
            evicted_pages=self.evicted_pages,
            kv_bytes=kv_bytes,
            dense_kv_bytes=dense_bytes(params.config, tokens, params.dtype),
            prefill_seconds=self.prefill_seconds,
            decode_seconds=self.decode_seconds,
            allotment=allotment.digest if isinstance(allotment, Allotment) else None,
        )

    def output(self, stats: Stats) -> Output:
        """The answer so far, to give out."""
        known = self.text if self.detokenizer is not None else None
        reason, why = self.finish_reason, self.error
        return Output(known, self.tokens, reason, self.logprobs, stats, why)


def default_limit(params: Params, prompt_tokens: int) -> int:
    room = params.config.context - prompt_tokens
    if room < 1:
        raise ValueError(
            f"prompt has {prompt_tokens} tokens, but the model's context ends at "
            f"{params.config.context}. Shorten it."
        )
    return min(room, DEFAULT_MAX_NEW_TOKENS)


def answer_limit(params: Params, prompt_tokens: int, max_new_tokens: int | None) -> int:
    room = default_limit(params, prompt_tokens)
    if max_new_tokens is None:
        return room
    max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, 1, checks.MOST_TOKENS)
    limit = params.config.context
    if prompt_tokens + max_new_tokens > limit:
        warnings.warn(
            f"prompt ({prompt_tokens}) and max_new_tokens ({max_new_tokens}) together exceed the "
            f"model's context of {limit} tokens; what it writes beyond that may be poor.",
            stacklevel=4,
        )
    return max_new_tokens
