"""Asks a benchmark under several policies, through the engine, sample by sample into a folder."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from raas_jax import tokenizer
from raas_jax.engine import Engine, Request, Result
from raas_jax.lab.inspect.recording import row_bytes
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.run import describe, environment, identity, label, refuse_repeats
from raas_jax.lab.tasks.benchmarks import Benchmark, Problem, digest
from raas_jax.lab.tasks.grading import GraderPool, Verdict
from raas_jax.params import Params
from raas_jax.policies import Policy, pages_for
from raas_jax.sampling import Sampling

KIND = "benchmark"  # Of the folder, in `run.json`.
Rows = int | Literal["auto"]


@dataclasses.dataclass(frozen=True)
class Asking:
    """How a benchmark is asked: all that decides the samples beside the model and the policies.

    Attributes:
      samples: answers per problem and policy.
      sampling: greedy by default.
      seed: sample i of problem j draws from a key of its own, made of this, i and j.
      max_new_tokens: cap of every answer; None is what the model's context leaves, at most 32,768.
      chat: whether the prompt goes into the model's chat template; None: if it has one.
      grading_seconds: after which an answer counts as wrong.
    """

    samples: int = 1
    sampling: Sampling = dataclasses.field(default_factory=Sampling)
    seed: int = 0
    max_new_tokens: int | None = None
    chat: bool | None = None
    grading_seconds: float = 10.0

    def __post_init__(self) -> None:
        for name in ("samples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1.")
        if self.samples > 1 and self.sampling.temperature == 0:
            raise ValueError(
                f"samples is {self.samples}, but temperature 0 always gives the same answer; set a "
                "temperature such as 0.6."
            )


def run_benchmark(
    params: Params,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    tried: Sequence[Policy],
    out: str | Path,
    *,
    model: str,
    asking: Asking | None = None,
    rows: Rows = 16,
    share: int = 1,
    mesh: Mesh | None = None,
    keep_tokens: bool = False,
    workers: int = 2,
    progress: bool | None = None,
) -> Results:
    """Answers every problem under every policy; what `out` has already is skipped.

    A sample is written as soon as it is graded, so a run that is killed goes on where it was. A
    row does not depend on its neighbours, so it gives the same samples.

    Args:
      params: the model.
      benchmark, problems: from `open_benchmark`.
      tried: policies, each with its budget.
      out: folder of the run.
      model: name of the model, for the tables.
      asking: greedy, one sample, by default.
      rows: answers at once, or "auto".
      share: samples of one problem that share one copy of its prompt; divides `rows`.
      mesh: of devices, see `raas_jax.Engine`; `rows` is a multiple of its data axis.
      keep_tokens: write the token ids of every answer too.
      workers: processes that grade.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: before anything is computed, for a wrong argument, a policy that cannot take a
        prompt, or a folder of another run. OSError: the folder cannot be written.
    """
    asking = asking or Asking()
    names = [label(policy) for policy in tried]
    refuse_repeats(names)
    chat = has_chat_template(params) if asking.chat is None else asking.chat
    asking = dataclasses.replace(asking, chat=chat)
    prompts = encode(params, problems, chat)
    for policy in tried:
        policy.check_prompts([len(prompt) for prompt in prompts])
    config = configuration(params, benchmark, problems, tried, model, asking)
    with ExitStack() as stack:
        scorer = stack.enter_context(Scorer(benchmark, workers, asking.grading_seconds))
        here: dict[str, Any] = {**environment(), "rows": rows, "share": share}
        if mesh is not None:
            here["mesh"] = dict(mesh.shape)
        results = stack.enter_context(Results.open(out, config, here))
        run = _Run(params, benchmark, problems, prompts, asking, results, scorer, keep_tokens)
        for policy in tried:
            run.ask(policy, rows, share, mesh, progress)
    return results


def has_chat_template(params: Params) -> bool:
    """Whether the model's tokenizer has one."""
    return tokenizer.has_tokenizer(params) and bool(tokenizer.load(params).chat_template)


def encode(params: Params, problems: Sequence[Problem], chat: bool) -> list[list[int]]:
    """Token ids of every prompt. Raises ValueError for one that the model cannot read."""
    asked: list[Any] = [problem.prompt for problem in problems]
    if chat:
        asked = [[{"role": "user", "content": prompt}] for prompt in asked]
    return tokenizer.encode(params, asked)[0]


def item_seed(seed: int, index: int) -> int:
    """The seed of a problem's samples, whatever else is asked."""
    return int(np.random.SeedSequence([seed % 2**64, index]).generate_state(1)[0] >> 1)


def configuration(
    params: Params,
    benchmark: Benchmark,
    problems: Sequence[Problem],
    tried: Sequence[Policy],
    model: str,
    asking: Asking,
) -> dict[str, Any]:
    """All that decides the samples, as JSON values."""
    return {
        "kind": KIND,
        "task": {
            "name": benchmark.name,
            "problems": len(problems),
            "data": digest(problems, benchmark.grader),
        },
        **identity(params, model),
        "asking": dataclasses.asdict(asking),
        "policies": [describe(policy) for policy in tried],
    }


class Scorer:
    """Marks answers: in processes, or at once where the benchmark compares by itself."""

    def __init__(self, benchmark: Benchmark, workers: int, seconds: float):
        self._is_right = benchmark.is_right
        self._graders = None
        if self._is_right is None:
            self._graders = GraderPool(workers, seconds, benchmark.grader)

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._graders is not None:
            self._graders.close()

    def submit(self, gold: str, answer: str) -> Future[Verdict]:
        """The mark, once it is there."""
        if self._graders is not None:
            return self._graders.submit(gold, answer)
        assert self._is_right is not None
        return _marked(Verdict(self._is_right(gold, answer)))


def _marked(mark: Verdict) -> Future[Verdict]:
    found: Future[Verdict] = Future()
    found.set_result(mark)
    return found


class _Run:
    """One start of a run."""

    def __init__(
        self,
        params: Params,
        benchmark: Benchmark,
        problems: Sequence[Problem],
        prompts: Sequence[Sequence[int]],
        asking: Asking,
        results: Results,
        scorer: Scorer,
        keep_tokens: bool,
    ):
        self.params = params
        self.benchmark = benchmark
        self.task = benchmark.name
        self.problems = {problem.name: problem for problem in problems}
        self.prompts = dict(zip(self.problems, prompts, strict=True))
        self.asking = asking
        self.results = results
        self.scorer = scorer
        self.keep_tokens = keep_tokens
        self.start = results.starts - 1

    def ask(
        self, policy: Policy, rows: Rows, share: int, mesh: Mesh | None, progress: bool | None
    ) -> None:
        """Answers what is missing under one policy."""
        name, n = label(policy), self.asking.samples
        done = {
            (str(sample["item"]), int(sample["sample"])): bool(sample["correct"])
            for sample in self.results.of(self.task, name)
        }
        missing = [
            problem
            for problem in self.problems
            if any((problem, sample) not in done for sample in range(n))
        ]
        if not missing:
            return
        engine = self._engine(policy, rows, share, mesh)
        engine.warm_up()
        waiting: list[tuple[Result, float, Future[Verdict]]] = []
        with _Bar(name, len(self.problems) * n, done, engine, progress) as bar:
            try:
                began = time.perf_counter()
                # Only a problem whose samples are all there is left out of what is asked.
                for result in engine.run(map(self._request, missing), done=done.keys()):
                    if result.finish_reason == "interrupted":
                        raise KeyboardInterrupt
                    at = time.perf_counter() - began
                    waiting.append((result, at, self._mark(result)))
                    self._write(waiting, policy, bar, patient=False)
            finally:
                # What is answered is graded and kept, also when the run is interrupted.
                self._write(waiting, policy, bar, patient=True)

    def _engine(self, policy: Policy, rows: Rows, share: int, mesh: Mesh | None) -> Engine:
        """Of the same shape however much is missing, so that going on compiles nothing new."""
        wanted = len(self.problems) * self.asking.samples
        together = share * (1 if mesh is None else mesh.shape["data"])
        limits = [each.limit or self.asking.max_new_tokens for each in self.problems.values()]
        known = [limit for limit in limits if limit is not None]
        return Engine(
            self.params,
            policy=policy,
            rows="auto" if rows == "auto" else min(rows, -(-wanted // together) * together),
            max_new_tokens=max(known) if len(known) == len(limits) else None,
            max_prompt_tokens=max(len(prompt) for prompt in self.prompts.values()),
            samples=share,
            mesh=mesh,
        )

    def _request(self, name: str) -> Request:
        return Request(
            name,
            list(self.prompts[name]),
            self.asking.sampling,
            seed=item_seed(self.asking.seed, int(name)),
            max_new_tokens=self.problems[name].limit or self.asking.max_new_tokens,
            n=self.asking.samples,
        )

    def _mark(self, result: Result) -> Future[Verdict]:
        answer = result.text or ""
        if result.error is not None:
            return _marked(Verdict(False, None, result.error))
        if result.finish_reason == "length" and not self.benchmark.has_answer(answer):
            return _marked(Verdict(False))
        return self.scorer.submit(self.problems[str(result.id)].answer, answer)

    def _write(
        self,
        waiting: list[tuple[Result, float, Future[Verdict]]],
        policy: Policy,
        bar: _Bar,
        *,
        patient: bool,
    ) -> None:
        """Writes what is graded and takes it off; all of it, with patience."""
        for each in list(waiting):
            result, at, mark = each
            if patient or mark.done():
                sample = self._sample(result, at, mark.result(), policy)
                waiting.remove(each)
                self.results.add(sample)
                bar.count(bool(sample["correct"]))

    def _sample(self, result: Result, at: float, mark: Verdict, policy: Policy) -> dict[str, Any]:
        item = str(result.id)
        sample: dict[str, Any] = {
            "task": self.task,
            "policy": label(policy),
            "item": item,
            "sample": result.sample,
            "correct": mark.correct,
            "answer": mark.answer,
            "gold": self.problems[item].answer,
            "error": mark.error,
            "seed": item_seed(self.asking.seed, int(item)),
            "prompt_tokens": len(self.prompts[item]),
            "tokens": len(result.tokens),
            "finish_reason": result.finish_reason,
            "capped": result.finish_reason == "length",
        }
        stats = result.stats
        if stats is not None:
            P = policy.page_size
            # Whole pages, so that few lengths have to be worked out.
            prompt, length = (
                pages_for(count, P) * P for count in (stats.prompt_tokens, stats.generated_tokens)
            )
            dtype = self.params.weights["embedding"].dtype.name
            sample |= {
                "kept_pages": stats.kept_pages,
                "evicted_pages": stats.evicted_pages,
                "kv_bytes": stats.kv_bytes,
                "kv_bytes_of_length": row_bytes(self.params.config, policy, prompt, length, dtype),
                "dense_kv_bytes": stats.dense_kv_bytes,
                "seconds": round(stats.prefill_seconds + stats.decode_seconds, 3),
            }
        # Of the cell's answers in this start, this one was there after so long.
        sample |= {"start": self.start, "elapsed": round(at, 3), "text": result.text}
        if self.keep_tokens:
            sample["token_ids"] = list(result.tokens)
        return sample


class _Bar:
    """Rows in flight, tokens per second, done, right so far, time left; it moves by itself."""

    def __init__(
        self,
        name: str,
        total: int,
        done: dict[tuple[str, int], bool],
        engine: Engine,
        progress: bool | None,
    ):
        self._done, self._right = len(done), sum(done.values())
        self._total, self._engine = total, engine
        self._bar = tqdm(
            total=total,
            initial=len(done),
            desc=name,
            unit="sample",
            disable=None if progress is None else not progress,
        )
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> _Bar:
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._show()
        self._bar.close()

    def count(self, right: bool) -> None:
        """One more sample."""
        self._done += 1
        self._right += right
        self._bar.update()

    def _tick(self) -> None:
        # A long answer takes minutes, in which no sample comes.
        tokens, then = self._engine.usage.useful_row_steps, time.perf_counter()
        while not self._end.wait(1.0):
            now = time.perf_counter()
            more = self._engine.usage.useful_row_steps
            self._show((more - tokens) / (now - then))
            tokens, then = more, now

    def _show(self, speed: float | None = None) -> None:
        rows = min(self._engine.rows, self._total - self._done)
        rate = "" if speed is None else f", {speed:.0f} tokens/s"
        self._bar.set_postfix_str(f"{rows} rows{rate}, right {self._right}/{self._done}")
