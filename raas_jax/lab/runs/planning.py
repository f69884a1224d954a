"""From a study to cells, in which every policy gets as many bytes as the reference.

A budget of the file is that of the reference policy. Every other policy gets the largest budget of
its own whose bytes (prompt, kept pages, metadata, buffers) are no more than the reference's; those
that keep everything, such as Dense, are run as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from raas_jax.calibrate import calibrate
from raas_jax.generation import generate
from raas_jax.lab.inspect.ceiling import ceiling
from raas_jax.lab.inspect.recording import record, row_bytes
from raas_jax.lab.runs.decoding import RecordedDecoding
from raas_jax.lab.runs.equal_bytes import fitted
from raas_jax.lab.runs.experiment import Cell, model_identity, options_as_json
from raas_jax.lab.runs.points import MAIN
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.runner import run_cells
from raas_jax.lab.runs.speed import measure_speed, measure_steps
from raas_jax.lab.runs.study import Study, StudyTask, Variant
from raas_jax.params import Params
from raas_jax.policies import Dense, Policy
from raas_jax.suited import suited

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
        "cells": [cell.described for cell in planned],
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
                    and MAIN in cell.described["groups"]
                    and cell.described["entry"] != CEILING
                }
                measure_steps(params, task.label, of_task, items, folder, progress)
    return results


def _calibrate(study: Study, params: Params, file: Path) -> None:
    others = dataclasses.replace(study.tasks[0].task, split="validation", problems=CALIBRATED_ON)
    texts = with_answers(params, [item.prompt for item in others.items(params)], 256)
    file.parent.mkdir(parents=True, exist_ok=True)
    calibrate(params, texts, progress=False).write(file)


def plan_study(study: Study, params: Params) -> tuple[list[Cell], list[str]]:
    """All cells, in the order in which they are run, and why others cannot be."""
    plans = [_TaskPlan(study, task, params) for task in study.tasks]
    cells = [cell for plan in plans for cell in plan.cells.values()]
    return cells, [reason for plan in plans for reason in plan.impossible]


class _TaskPlan:
    """The cells of one task, by label."""

    def __init__(self, study: Study, task: StudyTask, params: Params):
        self.study, self.task, self.params = study, task, params
        items = task.task.items(params)
        self.prompts = sorted(len(item.prompt) for item in items)
        self.longest = max(item.limit for item in items)
        self.cells: dict[str, Cell] = {}
        self.impossible: list[str] = []
        for variant in study.variants:
            for budget in task.budgets if variant.has_budget else (0,):
                self._add(variant, budget, MAIN)
        if study.ceiling is not None:
            for budget in task.budgets:
                self._add_ceiling(budget, study.ceiling)
        for ablation in study.ablations:
            for variant in ablation.variants if task.label in ablation.budget else ():
                self._add(variant, ablation.budget[task.label], ablation.label)

    def bytes_under(self, policy: Policy) -> int:
        """Bytes of a row: the median prompt, and the longest answer that is allowed.

        Raises ValueError for a policy that cannot take one of the prompts.
        """
        policy.check_prompts(self.prompts)
        median, dtype = self.prompts[len(self.prompts) // 2], self.params.dtype
        return row_bytes(self.params.config, policy, median, self.longest, dtype.name)

    def _add(self, variant: Variant, budget: int, group: str) -> None:
        """Plans a policy at a budget; one that is there already only joins another group."""
        label = f"{variant.label} {budget}" if variant.has_budget else variant.label
        if label in self.cells:
            if group not in self.cells[label].described["groups"]:
                self.cells[label].described["groups"].append(group)
            return
        try:
            policy = self._fitted(variant, budget)
        except ValueError as error:
            self.impossible.append(f"{self.task.label}, {label}: {error}")
            return
        given = {"entry": variant.label, "budget": budget if variant.has_budget else 0}
        size = self.bytes_under(policy)
        self._put(label, policy, record, **given, bytes=size, groups=[group])

    def _add_ceiling(self, budget: int, threshold: float) -> None:
        """Plans Belady's oracle; its script is no memory that a policy would need."""
        policy, answer = ceiling(budget, self.study.page_size, self.longest, threshold)
        given = {"entry": CEILING, "budget": budget}
        size = self.bytes_under(self._reference(budget))
        self._put(f"{CEILING} {budget}", policy, answer, **given, bytes=size, groups=[MAIN])

    def _put(self, label: str, policy: Policy, answer: Callable[..., Any], **given: Any) -> None:
        task, decoding = self.task, RecordedDecoding(self.study.rows, answer)
        described = {
            "task": task.label,
            "label": label,
            **given,
            "own_budget": getattr(policy, "budget", 0),
            "policy": {"name": type(policy).__name__, **options_as_json(policy)},
        }
        self.cells[label] = Cell(task.label, label, task.task, policy, decoding, described)

    def _created(self, variant: Variant, budget: int) -> Policy:
        return suited(variant.create(budget, self.study.page_size), self.params)

    def _reference(self, budget: int) -> Policy:
        return suited(self.study.reference_at(budget), self.params)

    def _fitted(self, variant: Variant, budget: int) -> Policy:
        """The policy at the largest budget that takes no more bytes than the reference at `budget`.

        Raises ValueError, with the reason, where there is no such budget.
        """
        study = self.study
        if not (variant.has_budget and variant.equal_bytes):
            return self._created(variant, budget)
        step = max(dict(variant.options).get("page_size", study.page_size), study.page_size)
        return fitted(
            lambda own: self._created(variant, own),
            self.bytes_under,
            budget // step * step,
            step,
            self.bytes_under(self._reference(budget)),
            study.reference,
        )


def with_answers(
    params: Params, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[list[int]]:
    """Prompts with the model's own greedy answers, to calibrate on; 0 tokens for prompts alone."""
    ids = [list(each) for each in prompts]
    if not max_new_tokens:
        return ids
    answers = generate(params, ids, policy=Dense(), max_new_tokens=max_new_tokens)
    return [[*each, *answer.tokens] for each, answer in zip(ids, answers, strict=True)]
