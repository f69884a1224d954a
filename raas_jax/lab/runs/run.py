"""Runs a task under several policies, sample by sample into a folder, and makes its tables."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import raas_jax
from raas_jax import policies, tokenizer
from raas_jax.decode import Plan, dense_bytes
from raas_jax.lab.inspect.recording import Recording, record, row_bytes
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.tables import Column, Line, Table, estimate
from raas_jax.lab.tasks.base import Item, Task
from raas_jax.params import Params
from raas_jax.policies import Policy

CELLS_AT_ONCE = 16
"""Cells whose compiled programs are kept, since neighbours may share them."""
ANSWERS = Column("correct", "Exact answers", "share")
BYTES = Column("kv_bytes", "KV bytes", "bytes")


def run(
    params: Params,
    task: Task,
    tried: Sequence[Policy],
    out: str | Path,
    *,
    model: str,
    rows: int = 16,
    progress: bool | None = None,
) -> Results:
    """Answers every question of a task under every policy; what `out` has already is skipped.

    A sample is written as soon as its answer is finished, so a run that is killed goes on where it
    was. Decoding is greedy, and a row does not depend on its batch, so it gives the same table.

    Args:
      params: the model.
      task: the questions.
      tried: policies, each with its budget.
      out: folder of the run.
      model: name of the model, for the tables.
      rows: questions at once.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: before anything is computed, for a policy that cannot take a prompt, or a folder
        of another run.
    """
    cells = [Cell(task.name, label(policy), task, policy) for policy in tried]
    return run_cells(params, cells, out, configuration(params, task, tried, model), rows, progress)


@dataclasses.dataclass(frozen=True)
class Cell:
    """One policy on one task: a line of a table.

    Attributes:
      task_label, label: what samples and tables call the task and the policy.
      task, policy: themselves.
      answer: answers a batch as `record` does; None: `record` itself.
    """

    task_label: str
    label: str
    task: Task
    policy: Policy
    answer: Callable[..., Iterator[tuple[int, Recording]]] | None = None


def run_cells(
    params: Params,
    cells: Sequence[Cell],
    out: str | Path,
    config: dict[str, Any],
    rows: int,
    progress: bool | None = None,
) -> Results:
    """Answers every question of every cell; see `run`, which is this for one task.

    Args:
      params: the model.
      cells: in the order in which they are run.
      out: folder of the run.
      config: all that decides the samples; must be that of the folder.
      rows: questions at once.
      progress: a bar on stderr; None shows it on a terminal.
    """
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1.")
    refuse_repeats([f"{cell.label} on {cell.task_label}" for cell in cells])
    items = {cell.task: cell.task.items(params) for cell in cells}
    for cell in cells:
        asked = items[cell.task]
        Plan.create(params.config, cell.policy, [len(item.prompt) for item in asked], 1)
    with (
        Results.open(out, config, environment()) as results,
        tqdm(
            total=sum(len(items[cell.task]) for cell in cells),
            initial=len(results.samples),
            unit="sample",
            disable=None if progress is None else not progress,
        ) as bar,
    ):
        for number, cell in enumerate(cells, start=1):
            bar.set_description(f"{cell.task_label}, {cell.label}")
            _run_cell(params, cell, items[cell.task], results, rows, bar)
            if number % CELLS_AT_ONCE == 0:
                # Every compiled program takes memory mappings, of which a process has only so many.
                jax.clear_caches()
    return results


def _run_cell(
    params: Params, cell: Cell, items: Sequence[Item], results: Results, rows: int, bar: Any
) -> None:
    dtype = params.weights["embedding"].dtype
    done = {sample["item"] for sample in results.of(cell.task_label, cell.label)}
    right = sum(bool(each["correct"]) for each in results.of(cell.task_label, cell.label))
    # Neighbours of one length finish together, and share a compiled program.
    waiting = sorted(
        (item for item in items if item.name not in done),
        key=lambda item: (item.limit, len(item.prompt)),
    )
    for start in range(0, len(waiting), rows):
        batch = waiting[start : start + rows]
        found = (cell.answer or record)(
            params,
            [item.prompt for item in batch],
            [item.limit for item in batch],
            cell.policy,
            stop_tokens=tokenizer.stop_token_ids(params),
            rows=min(rows, len(items)),
        )
        for index, recording in found:
            item = batch[index]
            answer = tokenizer.decode(params, recording.tokens)
            sample = {
                "task": cell.task_label,
                "policy": cell.label,
                "item": item.name,
                "sample": 0,
                **cell.task.grade(item, recording, answer),
                "prompt_tokens": len(item.prompt),
                "tokens": len(recording.tokens),
                "capped": recording.finish_reason == "length",
                "kv_bytes": row_bytes(
                    params.config, cell.policy, len(item.prompt), item.limit, dtype.name
                ),
                "dense_kv_bytes": dense_bytes(
                    params.config, len(item.prompt) + len(recording.tokens), dtype
                ),
                "seconds": round(recording.seconds, 3),
                "text": answer,
            }
            results.add(sample)
            done.add(item.name)
            right += bool(sample["correct"])
            bar.set_postfix_str(f"right {right}/{len(done)}", refresh=False)
            bar.update()


def configuration(
    params: Params, task: Task, tried: Sequence[Policy], model: str
) -> dict[str, Any]:
    """All that decides the samples, as JSON values."""
    columns = (ANSWERS, *task.columns, BYTES)
    return {
        "task": task.config(),
        **identity(params, model),
        "policies": [describe(policy) for policy in tried],
        "columns": [dataclasses.asdict(column) for column in columns],
    }


def identity(params: Params, model: str) -> dict[str, str]:
    """Which model, as JSON values: its name, a digest of its weights, their dtype."""
    return {
        "model": model,
        "weights": fingerprint(params),
        "dtype": params.weights["embedding"].dtype.name,
    }


def describe(policy: Policy) -> dict[str, Any]:
    """A policy as JSON values, with what tables call it."""
    return {"label": label(policy), **labels(policy), **dataclasses.asdict(policy)}


def refuse_repeats(names: Sequence[str]) -> None:
    """Raises ValueError for names of policies that are there more than once."""
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"policies repeat: {', '.join(twice)}; name each once.")


def environment() -> dict[str, str]:
    """Versions and device."""
    device = jax.devices()[0]
    return {
        "raas_jax": raas_jax.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.platform} ({device.device_kind})",
    }


def table(results: Results) -> Table:
    """The table of a run, finished or not; policies without a sample are left out."""
    columns = tuple(Column(**column) for column in results.config["columns"])
    lines = []
    for policy in results.config["policies"]:
        samples = results.of(results.config["task"]["name"], policy["label"])
        if samples:
            named = {name: policy[name] for name in ("Policy", "Budget")}
            figures = tuple(estimate(column, samples) for column in columns)
            lines.append(Line(named, len(samples), figures))
    return Table(columns, tuple(lines))


def report(folder: str | Path) -> tuple[str, list[str]]:
    """Makes `table.md`, `table.csv` and pictures, of a run's folder from its samples.

    Returns:
      The table in Markdown with its title, and remarks on lines that could not be read.
    """
    results = Results.read(folder)
    if results.config.get("kind") == "study":
        from raas_jax.lab.runs.study_report import report_study

        return report_study(results), results.remarks()
    if results.config.get("kind") == "benchmark":
        from raas_jax.lab.runs.benchmark_report import report_benchmark

        made, more = report_benchmark(results)
        return made, [*results.remarks(), *more]
    lines = table(results)
    task = results.config["task"]
    options = ", ".join(f"{key} {value}" for key, value in task.items() if value is not None)
    text = (
        f"`{results.config['model']}` on {options}. In brackets: 95 % intervals.\n\n"
        f"{lines.markdown()}"
    )
    (results.folder / "table.md").write_text(text, encoding="utf-8")
    (results.folder / "table.csv").write_text(lines.csv(), encoding="utf-8")
    return text, results.remarks()


def label(policy: Policy) -> str:
    """A policy's name with its budget and the options that differ from their defaults."""
    named = labels(policy)
    budget = f" {named['Budget']}" if named["Budget"] != "–" else ""
    return named["Policy"] + budget


def labels(policy: Policy) -> dict[str, str]:
    """Of the columns that name a policy in tables."""
    kinds = {policies.by_name(name): name for name in policies.available()}
    name = kinds.get(type(policy), type(policy).__name__)
    options = [
        f"{field.name}={getattr(policy, field.name)}"
        for field in dataclasses.fields(policy)
        if field.repr and field.name != "budget" and getattr(policy, field.name) != field.default
    ]
    options_text = f" ({', '.join(options)})" if options else ""
    return {"Policy": name + options_text, "Budget": str(getattr(policy, "budget", "–"))}


def fingerprint(params: Params) -> str:
    """A short digest of the weights: other weights, another run."""
    digest = hashlib.blake2b(digest_size=8)
    digest.update(repr(params.config).encode())
    for leaf in jax.tree.leaves(params.weights):
        flat = leaf.reshape(-1)
        # A sample of each array, so that large models need not come to the host.
        some = flat[:: max(1, flat.size // 4096)]
        digest.update(f"{leaf.shape}{leaf.dtype}".encode())
        digest.update(np.asarray(some).tobytes())
    return digest.hexdigest()
