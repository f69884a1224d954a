"""The engine: any number of requests through a fixed number of rows."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from raas_jax import checks, tokenizer
from raas_jax.admission import empty_admissions
from raas_jax.decode import DecodeState, Progress
from raas_jax.engine import checkpoint
from raas_jax.engine.autosize import largest_batch
from raas_jax.engine.requests import Id, Job, Request, Result, check, checked_id
from raas_jax.engine.scheduler import Row, Schedule, Start
from raas_jax.generation import checked
from raas_jax.outputs import Answer, default_limit
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Policy, pages_for
from raas_jax.sampling import Sampler
from raas_jax.session import Session
from raas_jax.sharding import place_weights, target_of
from raas_jax.suited import suited
from raas_jax.tokenizer import Prompt

SMALLEST_BUCKET = 64  # Tokens. Shorter prompts gain little from a program of their own.


@dataclasses.dataclass
class Usage:
    """What an engine has done so far.

    Attributes:
      steps: token steps, each of all rows.
      row_steps: steps times rows.
      useful_row_steps: of these, those that drew a token of an answer.
      prompts: prompts read.
      prompt_tokens, padded_prompt_tokens: their tokens, and with the padding of their buckets.
      decode_seconds: waiting for the device to decode, the host's own work apart.
    """

    steps: int = 0
    row_steps: int = 0
    useful_row_steps: int = 0
    prompts: int = 0
    prompt_tokens: int = 0
    padded_prompt_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def useful(self) -> float:
        """Share of the row-steps that drew a token of an answer."""
        return self.useful_row_steps / max(1, self.row_steps)


@dataclasses.dataclass
class _Sync:
    """What was asked of the device since the last look, and by whom."""

    started: list[tuple[list[tuple[int, Row]], Progress]]
    progress: Progress
    rows: list[Row | None]


class Engine:
    """Answers requests in rows that are refilled at page boundaries.

    Every row has one fixed size, so that a finished row is replaced while the others go on, without
    an allocator and without compiling anything. What a row answers does not depend on the others,
    on when it joined, or on which row it is: it is what `raas_jax.generate` gives for the request
    alone.

    Attributes:
      session: the decode that it drives, with the model, on the mesh if there is one.
      rows: `B`.
      buckets: lengths to which prompts are padded, in tokens, ascending.
      usage: what was done so far.
    """

    def __init__(
        self,
        params: Params,
        *,
        policy: Policy | None = None,
        rows: int | Literal["auto"] = 64,
        max_new_tokens: int | None = None,
        max_prompt_tokens: int = 1024,
        samples: int = 1,
        stop_token_ids: Iterable[int] = (),
        mesh: Mesh | None = None,
        sync_every: int | None = None,
        overlap: bool | None = None,
        prefill_rows: int = 4,
        save_to: str | Path | None = None,
        save_every: float | None = None,
        memory_limit: int | None = None,
    ):
        """Fixes all shapes; compiles nothing before it must, except for `rows="auto"`.

        Args:
          params: from `raas_jax.load`.
          policy: which pages of the cache to keep; `RaaS(budget=1024)` by default.
          rows: answers at once, a multiple of `samples` and of the mesh's `data` axis; "auto" takes
            as many as the device's memory holds, by the compiler's own account.
          max_new_tokens: the most that a request may ask for; by default what the model's context
            leaves, at most 32,768.
          max_prompt_tokens: longest prompt.
          samples: rows that share one copy of a prompt, for requests with `n` > 1. A group of rows
            takes another prompt only when all of them are done.
          stop_token_ids: ids that end an answer, besides those of the tokenizer, the model's config
            and its generation config.
          mesh: from `raas_jax.make_mesh`: weights by heads and mlp width, the cache by rows and
            key/value heads. The parameters are moved there if they are not there.
          sync_every: tokens between two looks of the host, which is when rows are refilled; rounded
            up to whole pages, by default one.
          overlap: the device starts on the next page while the host looks at the last one, so
            that rows are refilled one look later; by default where the device is an accelerator.
          prefill_rows: prompts of one bucket that are read at once, where there are as many.
          save_to: folder in which `run` saves, in the background.
          save_every: seconds between two saves; 300 by default.
          memory_limit: bytes per device, for `rows="auto"`; by default what the device has, and on
            a CPU what the machine has free.

        Raises:
          TypeError, ValueError: names the argument, its value and the remedy.
        """
        policy = suited(checked(params, policy), params)
        if max_new_tokens is None:
            max_new_tokens = default_limit(params, 1)
        numbers = {
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": max_prompt_tokens,
            "samples": samples,
            "prefill_rows": prefill_rows,
            "sync_every": policy.page_size if sync_every is None else sync_every,
        }
        numbers = {
            name: checks.integer(name, value, 1, checks.MOST_TOKENS)
            for name, value in numbers.items()
        }
        max_new_tokens, max_prompt_tokens, samples, prefill_rows, sync_every = numbers.values()
        if save_every is None:
            save_every = 300.0
        elif save_to is None:
            raise ValueError(f"save_every is {save_every}; give save_to, the folder, too.")
        save_every = checks.real("save_every", save_every, "a number of seconds >= 0", 0)
        if memory_limit is not None:
            memory_limit = checks.integer("memory_limit", memory_limit, 1, 2**63 - 1)
        P = policy.page_size
        if mesh is not None:
            params = place_weights(params, mesh)
        self.buckets = _buckets(max_prompt_tokens, P)
        self.max_new_tokens = max_new_tokens
        longest, target = self.buckets[-1], target_of(mesh)
        plan = Plan.create(
            params.config, policy, [1], max_new_tokens, samples, target, longest=longest
        )
        self.stop_tokens = tokenizer.stop_token_ids(params, stop_token_ids)

        def session(rows: int) -> Session:
            return Session(params, plan, rows, stop_tokens=self.stop_tokens, mesh=mesh)

        self.usage = Usage()
        self._pages = pages_for(sync_every, P)
        self._sizes = (prefill_rows, 1) if prefill_rows > 1 else (1,)
        self._late = jax.default_backend() != "cpu" if overlap is None else overlap
        together = samples * (1 if mesh is None else mesh.shape["data"])
        if rows == "auto":

            def largest(count: int) -> list[Any]:
                """The lowered programs that take most memory."""
                one = session(count)
                admit = one.lower_admit(self._sizes[0], self.buckets[-1])
                return [one.lower_advance(self._pages), admit]

            rows = largest_batch(largest, together, memory_limit)
        rows = checks.integer("rows", rows, 1, checks.MOST_ROWS)
        if rows % together:
            raise ValueError(
                f"rows is {rows!r}; it must be 'auto' or a multiple of {together} (samples="
                f"{samples}, and the data axis of the mesh)."
            )
        self.rows = rows
        self.session = session(rows)
        self._schedule = Schedule(rows, samples)
        self._ready: deque[Result] = deque()
        self._taken: set[Id] = set()
        self._state: DecodeState | None = None
        self._syncs: deque[_Sync] = deque()
        self._started: list[tuple[list[tuple[int, Row]], Progress]] = []
        self._saver = None if save_to is None else checkpoint.Saver(save_to, save_every)

    @property
    def params(self) -> Params:
        """The model."""
        return self.session.params

    @property
    def plan(self) -> Plan:
        """Fixed shapes."""
        return self.session.plan

    @functools.cached_property
    def _model(self) -> dict[str, Any]:
        """What tells its model from another; not asked for before something is saved."""
        return checkpoint.model_of(self.params)

    @property
    def compiles(self) -> int:
        """Programs that this engine has called so far: each is compiled once."""
        return len(self.session.called)

    @property
    def most_compiles(self) -> int:
        """Programs that it can ever call."""
        return 2 + len(self.buckets) * len(self._sizes)

    def warm_up(self) -> None:
        """Calls every program once, without a row that runs, so that nothing compiles later."""
        state = self._take_state()
        for bucket in self.buckets:
            for size in self._sizes:
                admissions = empty_admissions(size, bucket, self.plan.samples)
                state, _ = self.session.admit(state, admissions)
        if not self._schedule.busy():
            state, _ = self.session.advance(state, self._pages)
        self._state = jax.block_until_ready(state)

    def run(
        self,
        requests: Iterable[Request | Prompt] = (),
        *,
        done: Collection[tuple[Id, int]] | None = None,
    ) -> Iterator[Result]:
        """Answers requests, and yields every result as it is finished.

        Requests are taken one by one as rows become free, so that there may be any number of them.
        A run that is left early, or restored, goes on with the next call.

        Args:
          requests: `Request`s, or prompts, whose id is then their number. After `Engine.restore`
            give the same ones again: those that were taken already are left out.
          done: results that need not be given (again), as (id, sample), for a caller who keeps
            them: what is neither there nor in the making is then answered, whatever was given out.

        Yields:
          A `Result` for each sample of each request. What is wrong with a request is said by its
          own. Ctrl-C yields what there is of the answers in the making, and ends.
        """
        known = None if done is None else _pairs(done)
        if known is not None:
            self._schedule.drop(known)
            self._ready = deque(r for r in self._ready if (r.id, r.sample) not in known)
        jobs = self._jobs(iter(requests), known)
        try:
            while True:
                starts = self._schedule.starts(jobs)
                self._admit(starts)
                if self._schedule.busy():
                    self._advance()
                elif not self._syncs and not self._ready:
                    return
                while len(self._syncs) > (self._late and self._schedule.busy()):
                    self._sync()
                while self._ready:
                    result = self._ready.popleft()
                    if known is not None:
                        known.add((result.id, result.sample))
                    yield result
                # Not before the caller is back for more: it has dealt with what it was given.
                if self._saver is not None and self._saver.due():
                    self._save(self._saver)
        except KeyboardInterrupt:
            yield from self._interrupt()
        finally:
            if self._saver is not None:
                self._saver.wait()

    def save(self, folder: str | Path) -> None:
        """Saves everything: the state on the device, waiting requests, results not yet given out.

        The folder keeps the last two saves, each complete or absent whatever happens meanwhile.
        Within a loop over `run`, the results given out so far count as dealt with.

        Raises:
          OSError: it cannot be written.
        """
        saver = checkpoint.Saver(folder, 0.0)
        self._save(saver)
        saver.wait()

    @classmethod
    def restore(
        cls,
        folder: str | Path,
        params: Params,
        *,
        policy: Policy | None = None,
        mesh: Mesh | None = None,
        save_to: str | Path | None = None,
        save_every: float | None = None,
    ) -> Engine:
        """An engine that goes on where the last complete save left off, with the same tokens.

        Args:
          folder: given to `save`, or to `Engine(save_to=...)`.
          params: the same weights.
          policy: needed only for one that `raas_jax.policies` does not know by name.
          mesh: as for `Engine`; need not be that of the engine that was saved, but with an
            allotment it must split the heads likewise.
          save_to, save_every: as for `Engine`.

        Raises:
          FileNotFoundError: there is no complete save.
          FileError: it is damaged, or another version's.
          ValueError: it belongs to another model or policy, or to rows or heads that the mesh does
            not divide so.
        """
        usual = checked(params, policy)
        given = None if policy is None else suited(usual, params)
        host_state = checkpoint.read_host_state(folder)
        checkpoint.check_model(host_state, params, folder)
        options = {
            **host_state["options"],
            "policy": checkpoint.policy_of(host_state, given, params, folder),
        }
        engine = cls(params, **options, mesh=mesh, save_to=save_to, save_every=save_every)
        checkpoint.check_pools(host_state, engine.plan, folder)
        engine._model = host_state["model"]
        engine._state = checkpoint.read_state(folder, engine.session.shape, host_state["arrays"])
        try:
            engine._open(host_state)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise checkpoint.damaged(folder, error) from error
        return engine

    def _take_state(self) -> DecodeState:
        """The state, to be given away."""
        state, self._state = self._state, None
        return self.session.empty() if state is None else state

    def _jobs(
        self, source: Iterator[Request | Prompt], done: set[tuple[Id, int]] | None
    ) -> Iterator[Job]:
        """Jobs of good requests; the bad ones become results here."""
        asked_before: set[Id] = set()
        for number, item in enumerate(source):
            request = item if isinstance(item, Request) else Request(number, item)
            try:
                name = checked_id(request.id)
            except (TypeError, ValueError) as error:
                request = dataclasses.replace(request, id=checks.short(request.id))
                self._refuse(request, [0], str(error))
                continue
            request = dataclasses.replace(request, id=name)
            samples = request.samples()
            if name in asked_before:
                if (name, 0) not in (done or ()):
                    self._refuse(request, samples, f"id {name!r} was used before.")
                continue
            asked_before.add(name)
            left = self._left_to_start(name, samples, done)
            try:
                job = check(self.params, self.plan, self.max_new_tokens, request)
            except Exception as error:  # Whatever it is, it is this request's alone.
                self._refuse(request, left, str(error) or type(error).__name__)
                continue
            job.todo = left
            if left:
                yield job

    def _left_to_start(
        self, name: Id, samples: list[int], done: set[tuple[Id, int]] | None
    ) -> list[int]:
        """Samples of a request that are not begun and not done."""
        taken = name in self._taken
        self._taken.add(name)
        if not taken:
            return [sample for sample in samples if (name, sample) not in (done or ())]
        if done is None:
            return []
        begun = done | self._in_hand()
        return [sample for sample in samples if (name, sample) not in begun]

    def _in_hand(self) -> set[Any]:
        return self._schedule.in_hand() | {(result.id, result.sample) for result in self._ready}

    def _refuse(self, request: Request, samples: Sequence[int], why: str) -> None:
        for sample in samples:
            self._ready.append(Result(request.id, sample, None, [], "error", [], None, why))

    def _admit(self, starts: Sequence[Start]) -> None:
        """Starts rows: full batches of one bucket, and the rest one by one."""
        by_bucket: dict[int, list[Start]] = {}
        for start in starts:
            bucket = next(size for size in self.buckets if size >= len(start.job.prompt))
            by_bucket.setdefault(bucket, []).append(start)
        for bucket, waiting in by_bucket.items():
            while waiting:
                size = next(size for size in self._sizes if size <= len(waiting))
                batch, waiting = waiting[:size], waiting[size:]
                self._admit_together(batch, bucket)

    def _admit_together(self, batch: Sequence[Start], bucket: int) -> None:
        admissions = empty_admissions(len(batch), bucket, self.plan.samples)
        samples, began, rows = self.plan.samples, time.perf_counter(), []
        for line, start in enumerate(batch):
            job = start.job
            admissions.tokens[line, : len(job.prompt)] = job.prompt
            admissions.lengths[line] = len(job.prompt)
            admissions.groups[line] = start.group
            admissions.new_prompt[line] = start.new_prompt
            admissions.seed[line] = np.asarray(job.seed % 2**32, np.uint32).astype(np.int32)
            admissions.limit[line] = job.limit
            for place, sample in enumerate(start.samples):
                if sample is None:
                    continue
                admissions.fresh[line, place] = True
                admissions.sample[line, place] = sample
                row = Row(job, sample, self._answer(job), began)
                self._schedule.rows[start.group * samples + place] = row
                rows.append((line * samples + place, row))
            self.usage.prompts += 1
            self.usage.prompt_tokens += len(job.prompt)
        self.usage.padded_prompt_tokens += admissions.tokens.size
        sampler = Sampler.create([start.job.sampling for start in batch], None)
        admissions = admissions._replace(sampler=sampler)
        self._state, progress = self.session.admit(self._take_state(), admissions)
        self._started.append((rows, progress))

    def _answer(self, job: Job) -> Answer:
        # Without stop strings the text is made at the end, which is much less work.
        detokenizer = tokenizer.Detokenizer(self.params, job.stop) if job.stop else None
        return Answer(job.prompt, job.limit, frozenset(self.stop_tokens), detokenizer)

    def _advance(self) -> None:
        self._state, progress = self.session.advance(self._take_state(), self._pages)
        self._syncs.append(_Sync(self._started, progress, list(self._schedule.rows)))
        self._started = []
        steps = self._pages * self.plan.page_size
        self.usage.steps += steps
        self.usage.row_steps += steps * self.rows

    def _sync(self) -> None:
        """Takes what the oldest look brings, and frees the rows that are done."""
        sync = self._syncs.popleft()
        began = time.perf_counter()
        *firsts, seen = self.session.read([*(first for _, first in sync.started), sync.progress])
        now = time.perf_counter()
        self.usage.decode_seconds += now - began
        for (rows, _), first in zip(sync.started, firsts, strict=True):
            for place, begun in rows:
                begun.seen = now
                begun.answer.prefill_seconds = now - begun.began
                begun.answer.take(first, place, self.plan)
        for index, row in enumerate(sync.rows):
            # Idle, or its answer was finished by an earlier look.
            if row is None or self._schedule.rows[index] is not row:
                continue
            answer = row.answer
            before = len(answer.tokens)
            answer.take(seen, index, self.plan)
            answer.decode_seconds = now - (row.seen or now)
            self.usage.useful_row_steps += len(answer.tokens) - before
            if answer.finish_reason:
                self._schedule.rows[index] = None
                self._ready.append(self._result(row))

    def _result(self, row: Row) -> Result:
        answer, known = row.answer, None
        if answer.detokenizer is not None:
            known = answer.text
        elif tokenizer.has_tokenizer(self.params):
            ended = bool(answer.tokens) and answer.tokens[-1] in answer.stop_ids
            known = tokenizer.decode(self.params, answer.tokens[: len(answer.tokens) - ended])
        stats = answer.stats(self.params, self.session.plan, self.session.row_bytes)
        reason = answer.finish_reason or "interrupted"
        made = (answer.tokens, reason, answer.logprobs, stats, answer.error)
        return Result(row.job.id, row.sample, known, *made)

    def _interrupt(self) -> Iterator[Result]:
        """Gives what there is, and forgets what was in the making."""
        yield from self._ready
        for going in [row for row in self._schedule.rows if row is not None]:
            going.answer.interrupt()
            yield self._result(going)
        self._ready.clear()
        self._syncs.clear()
        self._started = []
        self._state = None
        self._schedule = Schedule(self.rows, self.plan.samples)

    def _save(self, saver: checkpoint.Saver) -> None:
        while self._syncs:
            self._sync()
        state = self._take_state()
        self._state = state
        saver.save(state, self._host_state())

    def _host_state(self) -> dict[str, Any]:
        """Everything on the host, as JSON values."""
        return {
            "model": self._model,
            "policy": checkpoint.describe(self.plan.policy),
            "pools": checkpoint.pools_of(self.plan),
            "options": {
                "rows": self.rows,
                "max_new_tokens": self.max_new_tokens,
                "max_prompt_tokens": self.buckets[-1],
                "samples": self.plan.samples,
                "stop_token_ids": list(self.stop_tokens),
                "sync_every": self._pages * self.plan.page_size,
                "prefill_rows": self._sizes[0],
            },
            "schedule": self._schedule.to_json(),
            "ready": [result.to_json() for result in self._ready],
            "taken": sorted(self._taken, key=str),
            "usage": dataclasses.asdict(self.usage),
        }

    def _open(self, host_state: dict[str, Any]) -> None:
        """The inverse of `_host_state`."""
        self._schedule.open(host_state["schedule"], self._answer)
        self._ready = deque(Result.from_json(result) for result in host_state["ready"])
        self._taken = set(host_state["taken"])
        self.usage = Usage(**host_state["usage"])


def _pairs(done: Any) -> set[tuple[Id, int]]:
    """Results as (id, sample), which may be lists, as JSON keeps them. Raises TypeError."""
    try:
        return {(name, sample) for name, sample in done}
    except (TypeError, ValueError):
        short = checks.short(done)
        raise TypeError(f"done is {short}; it must hold pairs of an id and a sample.") from None


def _buckets(max_prompt_tokens: int, page_size: int) -> tuple[int, ...]:
    """The longest prompt in whole pages, its half, its quarter, ... in tokens, ascending."""
    pages = [pages_for(max_prompt_tokens, page_size)]
    while pages[-1] > 1 and pages[-1] * page_size > SMALLEST_BUCKET:
        pages.append(-(-pages[-1] // 2))
    return tuple(count * page_size for count in reversed(pages))
