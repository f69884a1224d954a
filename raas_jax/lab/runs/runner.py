"""Runs cells one by one, and writes each sample into a folder as soon as it is graded."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax

import raas_jax
from raas_jax.lab.runs.decoding import Decoding, EngineDecoding, RecordedDecoding, Work
from raas_jax.lab.runs.experiment import Cell, model_identity, policy_identity
from raas_jax.lab.runs.layout import Sample
from raas_jax.lab.runs.progress import Bar
from raas_jax.lab.runs.results import Results
from raas_jax.lab.tasks.base import Item, Response, Task
from raas_jax.lab.tasks.grading import GraderPool, Verdict
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Policy
from raas_jax.suited import suited

_clear_caches: Callable[[], None] = jax.clear_caches  # Which has no types.
CELLS_AT_ONCE = 16
"""Cells whose compiled programs are kept, since neighbours may share them."""


def run(
    params: Params,
    task: Task,
    tried: Sequence[Policy],
    out: str | Path,
    *,
    model: str,
    decoding: Decoding | None = None,
    workers: int = 2,
    progress: bool | None = None,
) -> Results:
    """Answers every item of a task under every policy; what `out` has already is skipped.

    A folder may be given more policies and budgets later, and then reports all that it has.
    A sample is written as soon as it is graded, so a run that is killed goes on where it was. A row
    does not depend on its neighbours, so it gives the same samples.

    Args:
      params: the model.
      task: what is asked.
      tried: policies, each with its budget.
      out: folder of the run.
      model: name of the model, for the tables.
      decoding: by default greedy, with the cache recorded if the task's grades need it.
      workers: processes that grade.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: before anything is computed, for a wrong argument, a policy that cannot take a
        prompt, or a folder of another run. OSError: the folder cannot be written.
    """
    decoding = decoding or (RecordedDecoding() if task.records else EngineDecoding())
    cells = [
        Cell(task.name, described["label"], task, policy, decoding, described)
        for policy in (suited(each, params) for each in tried)
        for described in [policy_identity(policy)]
    ]
    config = {
        "task": task.config(),
        **model_identity(params, model),
        **decoding.config(params, task),
        "policies": [cell.described for cell in cells],
    }
    grows = {"policies": ["label"]}
    return run_cells(params, cells, out, config, grows, workers=workers, progress=progress)


def run_cells(
    params: Params,
    cells: Sequence[Cell],
    out: str | Path,
    config: Mapping[str, Any],
    grows: Mapping[str, Sequence[str]] | None = None,
    *,
    workers: int = 2,
    progress: bool | None = None,
) -> Results:
    """Answers every item of every cell, in their order; see `run`, which is this for one task.

    Args:
      params, out, workers, progress: as there.
      cells: what is run.
      config: all that decides the samples, as JSON values; must be that of the folder.
      grows: lists in it to which a later start may add, as `Results.open` takes them.
    """
    names = [f"{cell.label} on {cell.task_label}" for cell in cells]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"policies repeat: {', '.join(twice)}; name each once.")
    items: dict[Task, Sequence[Item]] = {}
    here = environment()
    for cell in cells:
        if cell.task not in items:
            items[cell.task] = cell.task.items(params, cell.decoding.asking.uses_chat(params))
        lengths = [len(item.prompt) for item in items[cell.task]]
        Plan.create(params.config, cell.policy, lengths, 1)
        here |= cell.decoding.environment()
    total = sum(len(items[cell.task]) * cell.decoding.asking.samples for cell in cells)
    with ExitStack() as stack:
        pools: dict[Task, GraderPool | None] = {}
        for cell in cells:
            if cell.task not in pools:
                pool = cell.task.graders(workers, cell.decoding.asking.grading_seconds)
                pools[cell.task] = pool and stack.enter_context(pool)
        results = stack.enter_context(Results.open(out, config, here, grows))
        done = sum(len(results.of(cell.task_label, cell.label)) for cell in cells)
        bar = stack.enter_context(Bar(total, done, progress))
        for number, cell in enumerate(cells, start=1):
            _run_cell(params, cell, items[cell.task], pools[cell.task], results, bar)
            if number % CELLS_AT_ONCE == 0:
                # Every compiled program takes memory mappings, of which a process has only so many.
                _clear_caches()
    return results


def _run_cell(
    params: Params,
    cell: Cell,
    items: Sequence[Item],
    pool: GraderPool | None,
    results: Results,
    bar: Bar,
) -> None:
    done = {
        (str(sample["item"]), int(sample["sample"])): bool(sample["correct"])
        for sample in results.of(cell.task_label, cell.label)
    }
    wanted = len(items) * cell.decoding.asking.samples
    bar.start(f"{cell.task_label}, {cell.label}", wanted, list(done.values()))
    if len(done) == wanted:
        return
    waiting: list[tuple[Response, Future[Verdict]]] = []

    def write(response: Response, graded: dict[str, Any]) -> None:
        results.add(_sample(cell, response, graded, len(results.starts) - 1))
        bar.count(bool(graded["correct"]))

    def write_graded(*, patient: bool) -> None:
        for each in list(waiting):
            response, verdict = each
            if patient or verdict.done():
                waiting.remove(each)
                write(response, verdict.result()._asdict())

    try:
        for response in cell.decoding.responses(Work(params, cell.policy, items, done, bar)):
            graded = cell.task.grade(response)
            if graded is not None:
                write(response, graded)
            else:
                assert pool is not None, f"{cell.task_label} leaves grading to nobody"
                waiting.append((response, pool.submit(response.item.gold, response.text or "")))
            write_graded(patient=False)
    finally:
        # What is answered is graded and kept, also when the run is interrupted.
        write_graded(patient=True)


def _sample(cell: Cell, response: Response, graded: dict[str, Any], start: int) -> Sample:
    sample = {
        "task": cell.task_label,
        "policy": cell.label,
        "item": response.item.name,
        "sample": response.sample,
        **graded,
        "prompt_tokens": len(response.item.prompt),
        "tokens": len(response.tokens),
        "capped": response.finish_reason == "length",
        **response.measured,
        "text": response.text,
    }
    # Times since the cell began are of one start of the run.
    return sample | {"start": start} if "elapsed" in sample else sample


def environment() -> dict[str, Any]:
    """Versions and device."""
    device = jax.devices()[0]
    return {
        "raas_jax": raas_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform} ({device.device_kind})",
    }
