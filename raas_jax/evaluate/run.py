"""Runs a task under several policies, sample by sample into a folder, and makes its tables."""

from __future__ import annotations

import dataclasses
import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

import raas_jax
from raas_jax import policies, text
from raas_jax.decode import Plan, dense_bytes
from raas_jax.evaluate.recording import record, row_bytes
from raas_jax.evaluate.results import Results
from raas_jax.evaluate.tables import Column, Line, Table, estimate
from raas_jax.evaluate.tasks import Item, Task
from raas_jax.params import Params
from raas_jax.policies import Policy

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
    if rows < 1:
        raise ValueError(f"rows is {rows}; it must be at least 1.")
    names = [label(policy) for policy in tried]
    if len(set(names)) < len(names):
        raise ValueError(f"policies repeat: {', '.join(names)}; name each once.")
    items = task.items(params)
    for policy in tried:
        Plan.create(params.config, policy, [len(item.prompt) for item in items], items[0].limit)
    results = Results.open(out, configuration(params, task, tried, model), environment())
    total = len(items) * len(tried)
    with tqdm(
        total=total,
        initial=len(results.samples),
        unit="sample",
        disable=None if progress is None else not progress,
    ) as bar:
        for name, policy in zip(names, tried, strict=True):
            bar.set_description(name)
            _run_policy(params, task, policy, items, results, rows, bar)
    return results


def _run_policy(
    params: Params,
    task: Task,
    policy: Policy,
    items: Sequence[Item],
    results: Results,
    rows: int,
    bar: Any,
) -> None:
    name = label(policy)
    dtype = params.weights["embedding"].dtype
    stops = text.stop_token_ids(params)
    # Neighbours of one length finish together, and share a compiled program.
    waiting = sorted(
        (item for item in items if (name, item.name) not in results.samples),
        key=lambda item: (item.limit, len(item.prompt)),
    )
    for start in range(0, len(waiting), rows):
        batch = waiting[start : start + rows]
        found = record(
            params,
            [item.prompt for item in batch],
            [item.limit for item in batch],
            policy,
            stop_tokens=stops,
            rows=min(rows, len(items)),
        )
        for index, recording in found:
            item = batch[index]
            answer = text.decode(params, recording.tokens)
            results.add(
                {
                    "policy": name,
                    "item": item.name,
                    **task.grade(item, recording, answer),
                    "prompt_tokens": len(item.prompt),
                    "tokens": len(recording.tokens),
                    "capped": recording.finish_reason == "length",
                    "kv_bytes": row_bytes(
                        params.config, policy, len(item.prompt), item.limit, dtype.name
                    ),
                    "dense_kv_bytes": dense_bytes(
                        params.config, len(item.prompt) + len(recording.tokens), dtype
                    ),
                    "seconds": round(recording.seconds, 3),
                    "text": answer,
                }
            )
            done = results.of(name)
            right = sum(sample["correct"] for sample in done)
            bar.set_postfix_str(f"right {right}/{len(done)}", refresh=False)
            bar.update()


def configuration(
    params: Params, task: Task, tried: Sequence[Policy], model: str
) -> dict[str, Any]:
    """All that decides the samples, as JSON values."""
    columns = (ANSWERS, *task.columns, BYTES)
    return {
        "task": task.config(),
        "model": model,
        "weights": fingerprint(params),
        "dtype": params.weights["embedding"].dtype.name,
        "policies": [
            {"label": label(policy), **_labels(policy), **dataclasses.asdict(policy)}
            for policy in tried
        ],
        "columns": [dataclasses.asdict(column) for column in columns],
    }


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
        samples = results.of(policy["label"])
        if samples:
            labels = {name: policy[name] for name in ("Policy", "Budget")}
            figures = tuple(estimate(column, samples) for column in columns)
            lines.append(Line(labels, len(samples), figures))
    return Table(columns, tuple(lines))


def report(folder: str | Path) -> tuple[str, list[str]]:
    """Makes `table.md` and `table.csv` of a run's folder from its samples.

    Returns:
      The table in Markdown with its title, and remarks on lines that could not be read.
    """
    results = Results.read(folder)
    made = table(results)
    task = results.config["task"]
    options = ", ".join(f"{key} {value}" for key, value in task.items() if value is not None)
    text = (
        f"`{results.config['model']}` on {options}. In brackets: 95 % intervals.\n\n"
        f"{made.markdown()}"
    )
    (results.folder / "table.md").write_text(text, encoding="utf-8")
    (results.folder / "table.csv").write_text(made.csv(), encoding="utf-8")
    return text, results.remarks()


def label(policy: Policy) -> str:
    """A policy's name with its budget and the options that differ from their defaults."""
    labels = _labels(policy)
    budget = f" {labels['Budget']}" if labels["Budget"] != "–" else ""
    return labels["Policy"] + budget


def _labels(policy: Policy) -> dict[str, str]:
    kinds = {policies.by_name(name): name for name in policies.available()}
    name = kinds.get(type(policy), type(policy).__name__)
    options = [
        f"{field.name}={getattr(policy, field.name)}"
        for field in dataclasses.fields(policy)
        if field.name != "budget" and getattr(policy, field.name) != field.default
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
