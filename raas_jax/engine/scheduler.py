"""Which row answers what: the host's book of rows, groups and waiting jobs. Nothing is computed."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from raas_jax.engine.requests import Id, Job
from raas_jax.outputs import Answer


@dataclasses.dataclass(eq=False)
class Row:
    """One answer in the making.

    Attributes:
      job: what it belongs to.
      sample: which of the job's answers.
      answer: what there is of it.
      began: clock when the row started, seconds.
      seen: clock when its first token was seen; None before.
    """

    job: Job
    sample: int
    answer: Answer
    began: float
    seen: float | None = None


@dataclasses.dataclass(frozen=True)
class Start:
    """Rows of one group that are to begin.

    Attributes:
      group: 0..B'-1.
      job: whose prompt the group answers.
      new_prompt: whether the group has to read the prompt; else it holds it already.
      samples: which of the job's answers each row begins; None for a row that does not begin.
    """

    group: int
    job: Job
    new_prompt: bool
    samples: tuple[int | None, ...]


class Schedule:
    """Rows in groups of `samples` that share a prompt, and the jobs that wait.

    Attributes:
      rows: what each row answers; None for an idle one.
      prompts: the job whose prompt each group holds; None for none.
      waiting: jobs with samples that no row has started, first come first served.
    """

    def __init__(self, rows: int, samples: int):
        self.rows: list[Row | None] = [None] * rows
        self.prompts: list[Job | None] = [None] * (rows // samples)
        self.waiting: deque[Job] = deque()
        self._samples = samples
        self._starting: list[Start] = []

    def of_group(self, group: int) -> list[Row | None]:
        """The rows of a group."""
        return self.rows[group * self._samples : (group + 1) * self._samples]

    def starts(self, jobs: Iterator[Job]) -> list[Start]:
        """Gives idle rows to what waits, and to `jobs` once nothing does.

        A row whose neighbours still answer can only take a further sample of the same prompt. What
        `jobs` raises is raised, and no job is lost by it.
        """
        self._starting = []
        try:
            self._start(jobs)
        except BaseException:
            for start in reversed(self._starting):
                start.job.todo[:0] = [sample for sample in start.samples if sample is not None]
                if start.job not in self.waiting:
                    self.waiting.appendleft(start.job)
            self._starting = []
            raise
        return self._starting

    def _start(self, jobs: Iterator[Job]) -> None:
        for group, held in enumerate(self.prompts):
            rows = self.of_group(group)
            idle = [row is None for row in rows]
            if not any(idle):
                continue
            if not self.waiting and (job := next(jobs, None)) is not None:
                self.waiting.append(job)
            if not self.waiting:
                break
            job = self.waiting[0]
            if not all(idle) and job is not held:
                continue
            take = iter([job.todo.pop(0) for _ in range(min(sum(idle), len(job.todo)))])
            samples = tuple(next(take, None) if free else None for free in idle)
            if not job.todo:
                self.waiting.popleft()
            self.prompts[group] = job
            self._starting.append(Start(group, job, all(idle), samples))

    def busy(self) -> bool:
        """Whether any row answers something."""
        return any(row is not None for row in self.rows)

    def in_hand(self) -> set[tuple[Id, int | None]]:
        """Answers that wait, are about to start, or are in the making, as (id, sample)."""
        running = {(row.job.id, row.sample) for row in self.rows if row is not None}
        starting = {(start.job.id, sample) for start in self._starting for sample in start.samples}
        waiting = {(job.id, sample) for job in self.waiting for sample in job.todo}
        return running | starting | waiting

    def drop(self, done: set[tuple[Id, int]]) -> None:
        """Forgets answers that are not wanted any more."""
        for index, row in enumerate(self.rows):
            if row is not None and (row.job.id, row.sample) in done:
                self.rows[index] = None
        for job in self.waiting:
            job.todo = [sample for sample in job.todo if (job.id, sample) not in done]
        self.waiting = deque(job for job in self.waiting if job.todo)

    def to_json(self) -> dict[str, Any]:
        """Rows with what they have, prompts and waiting jobs, as JSON values that are copies."""
        jobs: list[Job] = []
        for job in (*self.waiting, *self.prompts):
            if job is not None and job not in jobs:
                jobs.append(job)
        return {
            "jobs": [job.to_json() for job in jobs],
            "waiting": [jobs.index(job) for job in self.waiting],
            "prompts": [None if job is None else jobs.index(job) for job in self.prompts],
            "rows": [
                None
                if row is None
                else {
                    "job": jobs.index(row.job),
                    "sample": row.sample,
                    "tokens": list(row.answer.tokens),
                    "logprobs": list(row.answer.logprobs),
                    "pages": [row.answer.kept_pages, row.answer.evicted_pages],
                    "seconds": [row.answer.prefill_seconds, row.answer.decode_seconds],
                }
                for row in self.rows
            ],
        }

    def open(self, values: dict[str, Any], answer: Callable[[Job], Answer]) -> None:
        """The inverse of `to_json`; `answer` gives an empty answer to a job."""
        jobs, now = [Job.from_json(job) for job in values["jobs"]], time.perf_counter()
        self.waiting = deque(jobs[index] for index in values["waiting"])
        self.prompts = [None if index is None else jobs[index] for index in values["prompts"]]
        for index, saved in enumerate(values["rows"]):
            if saved is None:
                continue
            job = jobs[saved["job"]]
            made = answer(job)
            made.add(saved["tokens"], saved["logprobs"])
            made.kept_pages, made.evicted_pages = saved["pages"]
            made.prefill_seconds, seconds = saved["seconds"]
            self.rows[index] = Row(job, saved["sample"], made, now, now - seconds)
