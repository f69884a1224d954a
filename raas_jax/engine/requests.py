"""What goes into the engine, and what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from raas_jax import checks, tokenizer
from raas_jax.outputs import Stats, answer_limit
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.sampling import SEEDS, Sampling
from raas_jax.tokenizer import Prompt

Id = str | int


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt to answer, once or several times.

    Nothing is checked here: what is wrong with a request is said by its `Result`.

    Attributes:
      id: a name of one's own, a string or an int, each used once.
      prompt: a string, a chat (list of {"role", "content"}), or token ids.
      sampling: greedy by default.
      seed: an int. Sample `i` draws what row `i` of `generate([prompt] * n, seed=seed)` draws.
      max_new_tokens: by default the engine's, or what the model's context leaves.
      stop: strings that end an answer.
      n: answers wanted.
    """

    id: Id
    prompt: Prompt
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int | None = None
    stop: str | Iterable[str] = ()
    n: int = 1

    def samples(self) -> list[int]:
        """Numbers of the answers wanted; of one alone where `n` makes no sense."""
        try:
            return list(range(checks.integer("n", self.n, 1, checks.MOST_SAMPLES)))
        except (TypeError, ValueError):
            return [0]


@dataclasses.dataclass(frozen=True)
class Result:
    """One answer.

    Attributes:
      id: of the request.
      sample: 0..n-1, which of its answers.
      text: without special tokens, cut before the stop string; None where there is no tokenizer.
      tokens: token ids, the stop token included.
      finish_reason: "stop" (a stop token or string), "length" (`max_new_tokens`), "interrupted"
        (Ctrl-C), or "error".
      logprobs: of the tokens, under the model at temperature 1, before any filter.
      stats: what it took; `prefill_seconds` counts from the start of its row to the look that
        brought the first token. None for an error.
      error: what was wrong with the request; None if nothing was.
    """

    id: Id
    sample: int
    text: str | None
    tokens: list[int]
    finish_reason: str
    logprobs: list[float]
    stats: Stats | None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Result:
        """The inverse of `to_json`."""
        stats = values["stats"]
        return cls(**{**values, "stats": None if stats is None else Stats(**stats)})


@dataclasses.dataclass(eq=False)
class Job:
    """A request that was found good, and what is left of it to start.

    Attributes:
      id, sampling, seed: as in `Request`.
      prompt: token ids.
      limit: tokens that each answer may have.
      stop: strings that end an answer.
      todo: samples that no row has started, in their order.
    """

    id: Id
    prompt: list[int]
    sampling: Sampling
    seed: int
    limit: int
    stop: tuple[str, ...]
    todo: list[int]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        """The inverse of `to_json`."""
        sampling, stop = Sampling(**values["sampling"]), tuple(values["stop"])
        return cls(**{**values, "sampling": sampling, "stop": stop})


def checked_id(value: Any) -> Id:
    """An id that a save keeps as it is. Raises TypeError or ValueError for another one."""
    if isinstance(value, str):
        return checks.whole_text("id", value)
    try:
        return checks.integer("id", value, *SEEDS)
    except TypeError:
        what = f"id is {checks.short(value)}; it must be a string or an int."
        raise TypeError(what) from None


def check(params: Params, plan: Plan, max_new_tokens: int, request: Request) -> Job:
    """The job of a request; raises whatever says best what is wrong with it."""
    sampling: Any = request.sampling
    if not isinstance(sampling, Sampling):
        short = checks.short(sampling)
        raise TypeError(f"sampling is {short}; expected a raas_jax.Sampling.")
    seed = checks.integer("seed", request.seed, *SEEDS)
    checks.integer("n", request.n, 1, checks.MOST_SAMPLES)
    stop = tokenizer.stop_strings(request.stop)
    if stop and not tokenizer.has_tokenizer(params):
        raise ValueError(f"stop is {stop!r}, but params has no tokenizer.")
    ids, single = tokenizer.encode(params, request.prompt)
    if not single:
        raise ValueError(f"prompt is a list of {len(ids)} prompts; give each a request of its own.")
    (prompt,) = ids
    longest = plan.prompt_slots * plan.page_size
    if len(prompt) > longest:
        raise ValueError(
            f"prompt has {len(prompt)} tokens, but the engine was made for at most {longest}. "
            f"Shorten it, or use an Engine with max_prompt_tokens={len(prompt)}."
        )
    plan.policy.check_prompts([len(prompt)])
    limit = answer_limit(params, len(prompt), request.max_new_tokens)
    if request.max_new_tokens is not None and limit > max_new_tokens:
        raise ValueError(
            f"max_new_tokens is {limit}, but the engine was made for at most {max_new_tokens}. "
            f"Ask for less, or use an Engine with max_new_tokens={limit}."
        )
    return Job(
        id=request.id,
        prompt=prompt,
        sampling=request.sampling,
        seed=seed,
        limit=min(limit, max_new_tokens),
        stop=stop,
        todo=request.samples(),
    )
