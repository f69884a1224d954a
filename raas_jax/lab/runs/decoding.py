"""How the items of a cell are answered: with the cache recorded, or sampled by the engine."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np
from jax.sharding import Mesh

from raas_jax import checks, tokenizer
from raas_jax.decode import dense_bytes
from raas_jax.engine import Engine, Request, Result
from raas_jax.lab.inspect.recording import Recording, record, row_bytes
from raas_jax.lab.limits import MOST_ROWS, MOST_SAMPLES, MOST_SECONDS, SEEDS, check_counts
from raas_jax.lab.runs.progress import Bar
from raas_jax.lab.tasks.base import Column, Item, Response, Task
from raas_jax.params import Params
from raas_jax.policies import Policy, pages_for
from raas_jax.sampling import Sampling

ANSWERS = Column("correct", "Exact answers", "share")
BYTES = Column("kv_bytes", "KV bytes", "bytes")


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a task is asked: all that decides the samples beside the model and the policies.

    Attributes:
      samples: answers per item and policy.
      sampling: greedy by default.
      seed: sample i of item j draws from a key of its own, made of this, i and j.
      max_new_tokens: cap of every answer; None is what the model's context leaves, at most 32,768.
      chat: whether text goes into the model's chat template; None: if it has one.
      grading_seconds: after which an answer counts as wrong.
    """

    samples: int = 1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int | None = None
    chat: bool | None = None
    grading_seconds: float = 10.0

    def __post_init__(self) -> None:
        check_counts(self, samples=(1, MOST_SAMPLES), seed=SEEDS)
        check_counts(self, max_new_tokens=(1, checks.MOST_TOKENS))
        seconds = f"a number of seconds above 0, at most {MOST_SECONDS:g}"
        least = math.ulp(0.0)
        checks.real("grading_seconds", self.grading_seconds, seconds, least, MOST_SECONDS)
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, but temperature 0 always gives the same answer; set a "
                "temperature such as 0.6."
            )

    def uses_chat(self, params: Params) -> bool:
        """Whether text goes into the chat template of this model."""
        if self.chat is None:
            return tokenizer.has_tokenizer(params) and bool(tokenizer.load(params).chat_template)
        return self.chat


class Work(NamedTuple):
    """What a cell asks: its items, and the pairs of item and sample that are `done`."""

    params: Params
    policy: Policy
    items: Sequence[Item]
    done: Collection[tuple[str, int]]
    bar: Bar

    def missing(self, samples: int) -> list[Item]:
        """Items that lack an answer."""
        wanted = range(samples)
        return [item for item in self.items if any((item.name, i) not in self.done for i in wanted)]

    def bytes_of_row(self, prompt: int, length: int) -> int:
        """Bytes of such a row in a cache of its own."""
        params, dtype = self.params, self.params.dtype
        return row_bytes(params.config, self.policy, prompt, length, dtype.name)


class Decoding(Protocol):
    """How the items of a cell are answered."""

    @property
    def asking(self) -> Asking:
        """How many answers to each item, and how they are drawn."""

    def config(self, params: Params, task: Task) -> dict[str, Any]:
        """What it adds to the configuration of a run."""

    def environment(self) -> dict[str, Any]:
        """What it adds to the notes of a start; it does not decide the samples."""

    def responses(self, work: Work) -> Iterator[Response]:
        """Answers what is missing, each answer as soon as it is there."""


@dataclasses.dataclass(frozen=True)
class RecordedDecoding:
    """Greedy answers in batches, with the cache recorded while they are written.

    Attributes:
      rows: items at once.
      record: answers a batch, as `raas_jax.lab.inspect.recording.record` does.
    """

    asking: ClassVar[Asking] = Asking(chat=False)

    rows: int = 16
    record: Callable[..., Iterator[tuple[int, Recording]]] = record

    def __post_init__(self) -> None:
        check_counts(self, rows=(1, MOST_ROWS))

    def config(self, params: Params, task: Task) -> dict[str, Any]:
        columns = (ANSWERS, *task.columns, BYTES)
        return {"columns": [dataclasses.asdict(column) for column in columns]}

    def environment(self) -> dict[str, Any]:
        return {}

    def responses(self, work: Work) -> Iterator[Response]:
        params, dtype = work.params, work.params.dtype
        # Neighbours of one length finish together, and share a compiled program.
        missing = sorted(work.missing(1), key=lambda item: (item.limit, len(item.prompt)))
        for start in range(0, len(missing), self.rows):
            batch = missing[start : start + self.rows]
            for index, recording in self.record(
                params,
                [item.prompt for item in batch],
                [item.limit for item in batch],
                work.policy,
                stop_tokens=tokenizer.stop_token_ids(params),
                rows=min(self.rows, len(work.items)),
            ):
                item, tokens = batch[index], recording.tokens
                length = len(item.prompt) + len(tokens)
                measured = {
                    "kv_bytes": work.bytes_of_row(len(item.prompt), item.limit),
                    "dense_kv_bytes": dense_bytes(params.config, length, dtype),
                    "seconds": round(recording.seconds, 3),
                }
                text, why = tokenizer.decode(params, tokens), recording.finish_reason
                yield Response(item, 0, tokens, text, why, measured, recording=recording)


@dataclasses.dataclass(frozen=True)
class EngineDecoding:
    """Sampled answers from the engine, whose rows are refilled as they finish.

    Attributes:
      asking: how many answers, and how they are drawn.
      rows: answers at once, or "auto".
      share: samples of one item that share one copy of its prompt; divides `rows`.
      mesh: of devices, see `raas_jax.Engine`; `rows` is a multiple of its data axis.
      keep_tokens: write the token ids of every answer too.
    """

    asking: Asking = dataclasses.field(default_factory=Asking)
    rows: int | Literal["auto"] = 16
    share: int = 1
    mesh: Mesh | None = None
    keep_tokens: bool = False

    def __post_init__(self) -> None:
        check_counts(self, share=(1, MOST_ROWS))
        if self.rows != "auto":
            check_counts(self, rows=(1, MOST_ROWS))

    def config(self, params: Params, task: Task) -> dict[str, Any]:
        chat = {"chat": self.asking.uses_chat(params)}
        return {"kind": "benchmark", "asking": dataclasses.asdict(self.asking) | chat}

    def environment(self) -> dict[str, Any]:
        mesh = {} if self.mesh is None else {"mesh": dict(self.mesh.shape)}
        return {"rows": self.rows, "share": self.share, **mesh}

    def responses(self, work: Work) -> Iterator[Response]:
        items = {item.name: item for item in work.items}
        engine = self._engine(work)
        engine.warm_up()
        work.bar.watch(engine)
        began = time.perf_counter()
        requests = map(self._request, work.missing(self.asking.samples))
        for result in engine.run(requests, done=work.done):
            if result.finish_reason == "interrupted":
                raise KeyboardInterrupt
            item = items[str(result.id)]
            measured = {
                "gold": item.gold,
                "seed": self._seed(item),
                "finish_reason": result.finish_reason,
                **_stats(work, result),
                "elapsed": round(time.perf_counter() - began, 3),
            }
            if self.keep_tokens:
                measured["token_ids"] = list(result.tokens)
            answer = (result.tokens, result.text, result.finish_reason)
            yield Response(item, result.sample, *answer, measured, error=result.error)

    def _engine(self, work: Work) -> Engine:
        """The same however much is missing, so that going on compiles nothing new."""
        together = self.share * (1 if self.mesh is None else self.mesh.shape["data"])
        enough = -(-len(work.items) * self.asking.samples // together) * together
        limits = [item.limit or self.asking.max_new_tokens or 0 for item in work.items]
        return Engine(
            work.params,
            policy=work.policy,
            rows=self.rows if self.rows == "auto" else min(self.rows, enough),
            max_new_tokens=max(limits) if all(limits) else None,
            max_prompt_tokens=max(len(item.prompt) for item in work.items),
            samples=self.share,
            mesh=self.mesh,
        )

    def _request(self, item: Item) -> Request:
        return Request(
            item.name,
            list(item.prompt),
            self.asking.sampling,
            seed=self._seed(item),
            max_new_tokens=item.limit or self.asking.max_new_tokens,
            n=self.asking.samples,
        )

    def _seed(self, item: Item) -> int:
        return item_seed(self.asking.seed, int(item.name))


def _stats(work: Work, result: Result) -> dict[str, Any]:
    stats, P = result.stats, work.policy.page_size
    if stats is None:
        return {}
    # Whole pages, so that few lengths have to be worked out.
    prompt, length = (
        pages_for(count, P) * P for count in (stats.prompt_tokens, stats.generated_tokens)
    )
    return {
        "kept_pages": stats.kept_pages,
        "evicted_pages": stats.evicted_pages,
        "kv_bytes": stats.kv_bytes,
        "kv_bytes_of_length": work.bytes_of_row(prompt, length),
        "dense_kv_bytes": stats.dense_kv_bytes,
        "seconds": round(stats.prefill_seconds + stats.decode_seconds, 3),
    }


def item_seed(seed: int, index: int) -> int:
    """The seed of an item's samples, whatever else is asked."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0] >> 1)
