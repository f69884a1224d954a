"""`raas-jax eval` and `raas-jax report`: policies side by side on a task, in tables."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator
from typing import Annotated

import tyro

from raas_jax.commands.options import Dtype, Int, parse_policies


@dataclasses.dataclass
class Eval:
    """Measure policies on a task; a run that was stopped goes on where it was."""

    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """lemma."""
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """Folder for the samples and the tables."""
    config: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """A study, as configs/study_tradeoff.yaml: it says all that the other options say, but for
    --model and --dtype."""
    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="SOURCE")] = "demo"
    """Hugging Face or Orbax folder, or demo."""
    policies: Annotated[str, tyro.conf.arg(metavar="NAMES")] = "dense,raas"
    """Separated by commas, each with options if it has any, as in raas:alpha=0.01:share=layer."""
    budgets: Annotated[str, tyro.conf.arg(metavar="INTS")] = "32,64,128,256"
    """Of the policies that have one, separated by commas."""
    page_size: Int = None
    """Tokens per page, for all policies; 16."""
    problems: Annotated[int, tyro.conf.arg(metavar="INT")] = 200
    """How many."""
    definitions: Annotated[str, tyro.conf.arg(metavar="FROM-TO")] = "24-48"
    """Of each problem."""
    late_facts: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Values that are found early and needed only at the end."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Of the problems."""
    split: Annotated[str, tyro.conf.arg(metavar="{test,validation}")] = "test"
    """Problems that the demo was not trained on."""
    max_new_tokens: Annotated[Int, tyro.conf.arg(aliases=["-n"])] = None
    """Cap of every answer; by default half as much again as the right one takes."""
    rows: Annotated[int, tyro.conf.arg(metavar="INT")] = 16
    """Problems at once."""
    dtype: Dtype = None
    """Of the weights; bfloat16 on accelerators, float32 on CPUs."""

    def run(self) -> int:
        """Runs what is missing, then prints the table and saves it beside the samples."""
        from raas_jax import evaluate

        evaluate.check_task(self.task)
        if self.config is not None:
            return self._run_study(self.config)
        smallest, largest = parse_range(self.definitions)
        task = evaluate.LemmaTask(
            problems=self.problems,
            smallest=smallest,
            largest=largest,
            late_facts=self.late_facts,
            seed=self.seed,
            split=self.split,
            max_new_tokens=self.max_new_tokens,
        )
        tried = parse_policies(self.policies, self.budgets, self.page_size)
        from raas_jax import load

        params = load(self.model, dtype=self.dtype)
        with _resumable(self.out):
            evaluate.run(params, task, tried, self.out, model=self.model, rows=self.rows)
        return print_report(self.out)

    def _run_study(self, file: str) -> int:
        from raas_jax.evaluate.study import Study, run_study

        meant = {"task", "out", "config", "model", "dtype"}
        for field in dataclasses.fields(self):
            if field.name not in meant and getattr(self, field.name) != field.default:
                flag = field.name.replace("_", "-")
                raise ValueError(f"--{flag} is given beside --config; write it into {file}.")
        study = Study.from_file(file)
        from raas_jax import load

        params = load(self.model, dtype=self.dtype)
        with _resumable(self.out):
            run_study(params, study, self.out, model=self.model)
        return print_report(self.out)


@dataclasses.dataclass
class Report:
    """Make the tables of an evaluation again from its samples."""

    folder: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """The --out of `raas-jax eval`."""

    def run(self) -> int:
        """Prints the table and saves it as Markdown and CSV."""
        return print_report(self.folder)


@contextlib.contextmanager
def _resumable(folder: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"\n{folder} has what is finished; the same command goes on.", file=sys.stderr)
        raise


def print_report(folder: str) -> int:
    """Tables on stdout, remarks on stderr."""
    from raas_jax import evaluate

    text, remarks = evaluate.report(folder)
    print(text, end="")
    for remark in remarks:
        print(f"raas-jax: note: {remark}", file=sys.stderr)
    return 0


def parse_range(text: str) -> tuple[int, int]:
    """`24-48`, or `64` for 64-64. Raises ValueError."""
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text.strip())
    if not found:
        raise ValueError(f"--definitions is {text!r}; write for example 24-48, or 64.")
    return int(found[1]), int(found[2] or found[1])
