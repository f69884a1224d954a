"""From a study to an experiment, in which every policy gets as many bytes as the reference.

A budget of the file is that of the reference policy. Every other policy gets the largest budget of
its own whose bytes (prompt, kept pages, metadata, buffers) are no more than the reference's; those
that keep everything, such as Dense, are run as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raas_jax.calibrate import calibrate, with_answers
from raas_jax.lab.inspect.ceiling import ceiling
from raas_jax.lab.inspect.recording import row_bytes
from raas_jax.lab.runs.decoding import RecordedDecoding
from raas_jax.lab.runs.experiment import Cell, model_identity
from raas_jax.lab.runs.points import MAIN
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.runner import run_cells
from raas_jax.lab.runs.speed import measure_speed, measure_steps
from raas_jax.lab.runs.study import Study, StudyTask, Variant
from raas_jax.lab.tasks.base import Item
from raas_jax.params import Params
from raas_jax.policies import Policy

Size = Callable[[Policy], int]
"""Bytes of a row under a policy."""
TOLERANCE = 0.02
"""How far, as a share, a policy's bytes may exceed the reference's at the same budget: pages are
whole, and metadata differs by a few bytes."""
MOST_PAGES = 64
"""How many pages more than the reference's budget are tried for a policy."""
CEILING = "Belady (oracle)"
CALIBRATION = "centres.safetensors"
CALIBRATED_ON = 16
"""Problems of the validation split whose right answers calibrate a policy that needs it."""


def run_study(
    params: Params,
    study: Study,
    out: str | Path,
    *,
    model: str,
    progress: bool | None = None,
) -> Results:
    """Runs what is missing of a study, sample by sample into a folder.

    Args:
      params: the model.
      study: what to run.
      out: folder; one that holds a part of this study goes on from there.
      model: name of the model, for the tables.
      progress: a bar on stderr; None shows it on a terminal.

    Raises:
      ValueError: a folder of another run, with what differs. Nothing was computed.
    """
    folder = Path(out)
    # Beside the folder, which holds samples alone.
    calibration = folder.with_name(f"{folder.name}.{CALIBRATION}")
    calibrated = study.calibrated(calibration)
    if calibrated != study and not calibration.is_file():
        _calibrate(study, params, calibration)
    study = calibrated
    planned, impossible = plan_study(study, params)
    config = {
        "kind": "study",
        **model_identity(params, model),
        "reference": study.reference,
        "controls": list(study.controls),
        "ceiling": CEILING if study.ceiling is not None else None,
        # How fast it is does not decide the samples.
        "study": {key: value for key, value in study.source.items() if key != "speed"},
        "cells": [cell.describe() for cell in planned],
        "impossible": impossible,
        **RecordedDecoding(study.rows).config(params, study.tasks[0].task),
    }
    results = run_cells(params, planned, out, config, progress=progress)
    if study.speed is not None:
        tried = {
            label: study.variant(label).create(study.speed.budget, study.page_size)
            for label in study.speed.policies
        }
        measure_speed(params, study.speed, tried, folder, progress)
        for task in study.tasks:
            if task.label == study.speed.steps_of:
                items = task.task.items(params)[: study.rows]
                of_task = {
                    cell.label: cell.policy
                    for cell in planned
                    if cell.task_label == task.label
                    and MAIN in cell.groups
                    and cell.variant != CEILING
                }
                measure_steps(params, task.label, of_task, items, folder, progress)
    return results


def _calibrate(study: Study, params: Params, file: Path) -> None:
    others = dataclasses.replace(study.tasks[0].task, split="validation", problems=CALIBRATED_ON)
    texts = with_answers(params, [item.prompt for item in others.items(params)], 256)
    file.parent.mkdir(parents=True, exist_ok=True)
    calibrate(params, texts, progress=False).write(file)


@dataclasses.dataclass(frozen=True)
class StudyCell(Cell):
    """A cell of the study, with what its tables say of it.

    Attributes:
      variant: label of the policy without its budget.
      budget: of the reference policy, in tokens; 0 for what has none.
      own_budget: of this policy, after fitting.
      bytes: of the key/value memory of a row of median size.
      groups: `MAIN`, or labels of ablations.
    """

    variant: str
    budget: int
    own_budget: int
    bytes: int
    groups: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "task": self.task_label,
            "label": self.label,
            "entry": self.variant,
            "budget": self.budget,
            "own_budget": self.own_budget,
            "bytes": self.bytes,
            "groups": list(self.groups),
            "policy": {"name": type(self.policy).__name__, **dataclasses.asdict(self.policy)},
        }


def plan_study(study: Study, params: Params) -> tuple[list[StudyCell], list[str]]:
    """All cells, in the order in which they are run, and why others cannot be."""
    planner = _Planner(study)
    for task in study.tasks:
        items = task.task.items(params)
        size = row_size(params, items)
        for variant in study.variants:
            for budget in task.budgets if variant.has_budget else (0,):
                planner.add(task, size, variant, budget, MAIN)
        if study.ceiling is not None:
            longest = max(item.limit for item in items)
            for budget in task.budgets:
                planner.add_ceiling(task, size, budget, longest, study.ceiling)
        for ablation in study.ablations:
            if task.label in ablation.budget:
                for variant in ablation.variants:
                    planner.add(task, size, variant, ablation.budget[task.label], ablation.label)
    return list(planner.planned.values()), planner.impossible


def row_size(params: Params, items: Sequence[Item]) -> Callable[[Policy], int]:
    """Gives the bytes of a row under a policy, for the median prompt and the longest answer.

    What it returns raises ValueError for a policy that cannot take one of the prompts.
    """
    prompts = sorted(len(item.prompt) for item in items)
    median, longest = prompts[len(prompts) // 2], max(item.limit for item in items)
    dtype = params.weights["embedding"].dtype.name

    def size(policy: Policy) -> int:
        policy.check_prompts(prompts)
        return row_bytes(params.config, policy, median, longest, dtype)

    return size


class _Planner:
    def __init__(self, study: Study):
        self.study = study
        self.planned: dict[tuple[str, str], StudyCell] = {}
        self.impossible: list[str] = []
        self._named: dict[str, Variant] = {}

    def add(self, task: StudyTask, size: Size, variant: Variant, budget: int, group: str) -> None:
        """Plans a policy at a budget; one that is there already only joins another group."""
        label = f"{variant.label} {budget}" if variant.has_budget else variant.label
        if self._named.setdefault(variant.label, variant) != variant:
            raise ValueError(f"label {variant.label!r} names two policies; give each its own")
        if there := self.planned.get((task.label, label)):
            groups = tuple(dict.fromkeys([*there.groups, group]))
            self.planned[task.label, label] = dataclasses.replace(there, groups=groups)
            return
        try:
            policy = fitted(self.study, variant, budget, size)
        except ValueError as error:
            self.impossible.append(f"{task.label}, {label}: {error}")
            return
        self.planned[task.label, label] = StudyCell(
            task.label,
            label,
            task.task,
            policy,
            RecordedDecoding(self.study.rows),
            variant.label,
            budget if variant.has_budget else 0,
            getattr(policy, "budget", 0),
            size(policy),
            (group,),
        )

    def add_ceiling(
        self, task: StudyTask, size: Size, budget: int, longest: int, threshold: float
    ) -> None:
        """Plans Belady's oracle; its script is no memory that a policy would need."""
        policy, record = ceiling(budget, self.study.page_size, longest, threshold)
        self.planned[task.label, f"{CEILING} {budget}"] = StudyCell(
            task.label,
            f"{CEILING} {budget}",
            task.task,
            policy,
            RecordedDecoding(self.study.rows, record),
            CEILING,
            budget,
            budget,
            size(self.study.reference_at(budget)),
            (MAIN,),
        )


def fitted(study: Study, variant: Variant, budget: int, size: Size) -> Policy:
    """The policy at the largest budget that takes no more bytes than the reference at `budget`.

    Raises ValueError, with the reason, where there is no such budget.
    """
    if not (variant.has_budget and variant.equal_bytes):
        return variant.create(budget, study.page_size)
    target = size(study.reference_at(budget))
    step = max(dict(variant.options).get("page_size", study.page_size), study.page_size)
    nominal = budget // step * step
    reason = ""
    # What keeps the prompt among its pages needs more tokens for the same bytes.
    for own in range(nominal + MOST_PAGES * step, 0, -step):
        try:
            policy = variant.create(own, study.page_size)
            taken = size(policy)
        except ValueError as error:
            # The first refusal says what it needs; smaller budgets only repeat it.
            raise ValueError(reason or str(error)) from None
        if taken <= target or (own <= nominal and taken <= target * (1 + TOLERANCE)):
            return policy
        reason = (
            f"the least budget that it can work with, {own}, takes {taken} bytes, where "
            f"{study.reference} takes {target}"
        )
    raise ValueError(reason)
