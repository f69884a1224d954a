"""`raas-jax eval` and `raas-jax report`: policies side by side on a task, in tables."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raas_jax.checks import INT32_MAX, printable
from raas_jax.cli import options
from raas_jax.cli.errors import note
from raas_jax.lab.limits import (
    MOST_DEFINITIONS,
    MOST_ROWS,
    MOST_SAMPLES,
    MOST_SECONDS,
    MOST_WORKERS,
)

if TYPE_CHECKING:
    from raas_jax.lab.tasks.benchmarks import Benchmark
    from raas_jax.policies import Policy

# Options of one kind of task; given for the other, they are refused.
LEMMA_ONLY = ("problems", "definitions", "late_facts", "split")
BENCHMARK_ONLY = ("data", "limit", "no_chat")


@dataclasses.dataclass
class Eval:
    """Measure policies on a task; on text: `eval fidelity -h`."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """Task: lemma, gsm8k, math500, aime24, or your own: JSONL ("prompt", "answer") or Python."""
    out: Annotated[str | None, options.unset("DIR", aliases=["-o"])] = None
    """Folder for the samples and the tables."""
    config: options.File = None
    """Study, such as configs/study_tradeoff.yaml; only --out, --model and --dtype go with it."""
    model: options.Model = "demo"
    policies: Annotated[str, tyro.conf.arg(metavar="NAMES")] = "dense,raas"
    """Policies with commas, each with its options, as in raas:alpha=0.01:granularity=layer."""
    budgets: Annotated[str | None, options.unset("INTS", "32,64,128,256 for lemma, else 1024")] = (
        None
    )
    """Budgets, with commas, of the policies that have one."""
    page_size: options.PageSize = None
    """Tokens per page, for all policies."""
    data: options.File = None
    """JSONL file with the problems, in place of the hub."""
    limit: Annotated[int | None, options.unset("INT"), options.Within(1, INT32_MAX)] = None
    """Number of problems to ask, from the first; by default all."""
    samples: Annotated[int, options.Within(1, MOST_SAMPLES)] = 1
    """Answers per problem and policy, at a --temperature above 0."""
    sampling: options.SamplingOptions = dataclasses.field(default_factory=options.SamplingOptions)
    max_new_tokens: options.MaxNewTokens = None
    """Most tokens of an answer; by default as for generate, in lemma 1.5 times the right answer."""
    no_chat: bool = False
    """Ask without the model's chat template."""
    rows: Annotated[
        int | Literal["auto"], tyro.conf.arg(metavar="{INT,auto}"), options.Within(1, MOST_ROWS)
    ] = 16
    """Answers at once; auto is as many as fit the device's memory."""
    share: options.Rows = 1
    """Samples of a problem that share one copy of its prompt; divides --rows."""
    mesh: options.Mesh = None
    tokens: bool = False
    """Keep the token ids of every answer too."""
    graders: Annotated[int, options.Within(1, MOST_WORKERS)] = 2
    """Processes that grade."""
    grading_seconds: Annotated[float, options.Within(0.001, MOST_SECONDS)] = 10.0
    """Seconds of computing after which an answer that is still being graded counts as wrong."""
    check_grader: bool = False
    """Grade the reference answers and near misses instead, and count the right verdicts."""
    problems: options.Problems = 200
    """Number of problems (lemma)."""
    definitions: options.Definitions = "24-48"
    """Definitions of each problem (lemma)."""
    late_facts: Annotated[int, options.Within(0, MOST_DEFINITIONS)] = 0
    """Values that are found early and needed only at the end (lemma)."""
    split: Annotated[str, tyro.conf.arg(metavar="{test,validation}")] = "test"
    """Split of the problems, none of which the demo was trained on (lemma)."""
    dtype: options.Dtype = None

    def run(self) -> int:
        """Runs what is missing, then prints the table and saves it beside the samples."""
        from raas_jax.lab import runs as evaluate

        if self.task == "fidelity":
            raise ValueError("fidelity stands first: raas-jax eval fidelity MODEL --out DIR.")
        evaluate.check_task(self.task)
        if self.check_grader:
            return self._check_grader()
        if self.out is None:
            raise ValueError("--out DIR is missing: the folder for the samples and the tables.")
        if self.config is not None:
            return self._run_study(self.out, self.config)
        of_others = BENCHMARK_ONLY if self.task == "lemma" else LEMMA_ONLY
        for name, flag in self._given().items():
            if name in of_others:
                raise ValueError(f"{flag} is not an option of the task {self.task}; leave it out.")
        with resumable(self.out):
            if self.task == "lemma":
                self._run_lemma(self.out)
            else:
                self._ask(self.out, self._tried("1024"), self._open())
        return print_report(self.out)

    def _given(self) -> dict[str, str]:
        """Flags of the options that differ from their defaults, by name."""
        usual = vars(Eval(self.task))
        names = (name for name, value in vars(self).items() if value != usual[name])
        return {name: "--" + name.replace("_", "-") for name in names}

    def _tried(self, budgets: str) -> list[Policy]:
        return options.parse_policies(self.policies, self.budgets or budgets, self.page_size)

    def _run_lemma(self, out: str) -> None:
        """With milestones recorded; sampled answers go through the engine, without."""
        from raas_jax.lab import runs as evaluate

        smallest, largest = options.parse_range(self.definitions)
        task = evaluate.LemmaTask(
            problems=self.problems,
            smallest=smallest,
            largest=largest,
            late_facts=self.late_facts,
            seed=self.sampling.seed,
            split=self.split,
            max_new_tokens=self.max_new_tokens,
        )
        tried = self._tried("32,64,128,256")
        if self.samples > 1 or self.sampling.temperature > 0:
            from raas_jax.lab.tasks.benchmarks.lemma import lemma_benchmark

            self._ask(out, tried, lemma_benchmark(task))
            return
        if self.rows == "auto" or self.mesh is not None:
            raise ValueError(
                "--rows auto and --mesh are not for lemma, which records the cache; give a number "
                "of rows, or --samples and --temperature."
            )
        from raas_jax import load

        params = load(self.model, dtype=self.dtype)
        decoding = evaluate.RecordedDecoding(self.rows)
        evaluate.run(params, task, tried, out, model=self.model, decoding=decoding)

    def _open(self) -> Benchmark:
        from raas_jax.lab.tasks.benchmarks import open_benchmark

        return open_benchmark(self.task, self.data).first(self.limit)

    def _ask(self, out: str, tried: list[Policy], benchmark: Benchmark) -> None:
        from raas_jax import load
        from raas_jax.lab import runs as evaluate
        from raas_jax.sharding import make_mesh

        asking = evaluate.Asking(
            samples=self.samples,
            sampling=self.sampling.create(),
            seed=self.sampling.seed,
            max_new_tokens=self.max_new_tokens,
            chat=False if self.no_chat else None,
            grading_seconds=self.grading_seconds,
        )
        sizes = options.parse_mesh(self.mesh)
        mesh = make_mesh(sizes.get("data", 1), sizes.get("model", 1)) if sizes else None
        decoding = evaluate.EngineDecoding(asking, self.rows, self.share, mesh, self.tokens)
        params = load(self.model, dtype=self.dtype, sharding=mesh)
        evaluate.run(
            params, benchmark, tried, out, model=self.model, decoding=decoding, workers=self.graders
        )

    def _check_grader(self) -> int:
        from raas_jax.lab.tasks.benchmarks.check_grader import check_grader
        from raas_jax.lab.tasks.grading import GraderPool

        if self.task == "lemma":
            raise ValueError("lemma grades by plain comparison; --check-grader is for the others.")
        benchmark = self._open()
        with GraderPool(self.graders, self.grading_seconds, benchmark.grader) as graders:
            table, bad = check_grader(benchmark.questions, graders)
        print(table, end="")
        for line in bad:
            print(f"raas-jax: wrong mark: {line}", file=sys.stderr)
        return 1 if bad else 0

    def _run_study(self, out: str, file: str) -> int:
        from raas_jax import load
        from raas_jax.lab.runs.planning import run_study
        from raas_jax.lab.runs.study import Study

        for name, flag in self._given().items():
            if name not in ("out", "config", "model", "dtype"):
                raise ValueError(f"{flag} is given beside --config; write it into {file}.")
        study = Study.from_file(file)
        params = load(self.model, dtype=self.dtype)
        with resumable(out):
            run_study(params, study, out, model=self.model)
        return print_report(out)


@dataclasses.dataclass
class Report:
    """Make the tables of an evaluation again from its samples."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder that `raas-jax eval` was given as --out."""

    def run(self) -> int:
        """Prints the table and saves it as Markdown and CSV."""
        return print_report(self.folder)


@contextlib.contextmanager
def resumable(folder: str) -> Iterator[None]:
    """Says, where the user stops it, that the run can go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{folder} has what is finished; the same command goes on.", file=sys.stderr)
        raise


def print_report(folder: str) -> int:
    """Tables on stdout, remarks on stderr."""
    from raas_jax.lab import fidelity
    from raas_jax.lab import runs as evaluate

    text, remarks = (fidelity if fidelity.is_folder(folder) else evaluate).report(folder)
    print(printable(text), end="")
    for remark in remarks:
        note(remark)
    return 0
