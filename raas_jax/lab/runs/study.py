"""A study: many policies, at budgets of equal bytes, on several tasks, from one YAML file.

    tasks × (policies × budgets + ablations + ceiling) ──► cells ──► run_cells ──► report

A budget of the file is that of the reference policy. Every other policy gets the largest budget of
its own whose bytes (prompt, kept pages, metadata, buffers) are no more than the reference's; those
that keep everything, such as Dense, are run as they are.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from raas_jax import policies
from raas_jax.calibrate import calibrate, with_answers
from raas_jax.config import read_yaml
from raas_jax.lab.inspect.ceiling import ceiling
from raas_jax.lab.inspect.recording import row_bytes
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.run import ANSWERS, BYTES, Cell, identity, run_cells
from raas_jax.lab.runs.speed import Speed, measure_speed, measure_steps
from raas_jax.lab.tasks.base import Item
from raas_jax.lab.tasks.lemma.task import LemmaTask
from raas_jax.params import Params
from raas_jax.policies import Policy

TOLERANCE = 0.02
"""How far, as a share, a policy's bytes may exceed the reference's at the same budget: pages are
whole, and metadata differs by a few bytes."""
MOST_PAGES = 64
"""How many pages more than the reference's budget are tried for a policy."""
MAIN = "policies"
"""The group of cells that is no ablation."""
CEILING = "Belady (oracle)"
CALIBRATION = "centres.safetensors"
CALIBRATED_ON = 16
"""Problems of the validation split whose right answers calibrate a policy that needs it."""
_OF_BUDGET = re.compile(r"budget/(\d+)")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A policy with options: a line of the tables, a curve of the plots.

    Attributes:
      label: what they call it.
      policy: name, as on the command line.
      options: of the policy; a value `budget/4` means that share of its budget, in tokens.
      equal_bytes: whether its budget is fitted; False for what keeps everything.
    """

    label: str
    policy: str
    options: tuple[tuple[str, Any], ...] = ()
    equal_bytes: bool = True

    @property
    def has_budget(self) -> bool:
        return any(
            field.name == "budget" for field in dataclasses.fields(policies.by_name(self.policy))
        )

    def create(self, budget: int, page_size: int) -> Policy:
        """The policy at a budget. Raises ValueError where it cannot work with it."""
        given: dict[str, Any] = {"page_size": page_size}
        for name, value in self.options:
            share = _OF_BUDGET.fullmatch(value) if isinstance(value, str) else None
            given[name] = max(1, budget // int(share[1])) if share else value
        if self.has_budget:
            given.setdefault("budget", budget)
        return policies.create(self.policy, **given)


@dataclasses.dataclass(frozen=True)
class Tested:
    """A task of the study: its label, its problems, and the budgets of the reference policy."""

    label: str
    task: LemmaTask
    budgets: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One option varied, at one budget of some tasks."""

    label: str
    budget: Mapping[str, int]  # For each task.
    entries: tuple[Entry, ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says; see `configs/study_tradeoff.yaml`."""

    page_size: int
    rows: int
    reference: str
    controls: tuple[str, ...]
    tested: tuple[Tested, ...]
    entries: tuple[Entry, ...]
    ablations: tuple[Ablation, ...]
    ceiling: float | None
    speed: Speed | None
    source: Mapping[str, Any]

    @classmethod
    def from_file(cls, file: str | Path) -> Study:
        """Reads a YAML file.

        Raises:
          FileNotFoundError: there is none. ValueError: it says something else than a study.
        """
        fields = read_yaml(file)
        try:
            return cls.create(fields)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} is no study: {what}; see configs/study_smoke.yaml.") from None

    @classmethod
    def create(cls, fields: Mapping[str, Any]) -> Study:
        """From the mapping of a file."""
        fields = dict(fields)
        source = dict(fields)
        tested = tuple(
            Tested(label, LemmaTask(**{k: v for k, v in each.items() if k != "budgets"}), budgets)
            for label, each in fields.pop("tasks").items()
            for budgets in [tuple(each["budgets"])]
        )
        entries = tuple(_entry(each) for each in fields.pop("policies"))
        ablations = tuple(
            Ablation(label, each["budget"], tuple(_entry(entry) for entry in each["policies"]))
            for label, each in fields.pop("ablations", {}).items()
        )
        speed = fields.pop("speed", None)
        study = cls(
            page_size=fields.pop("page_size"),
            rows=fields.pop("rows"),
            reference=fields.pop("reference"),
            controls=tuple(fields.pop("controls")),
            tested=tested,
            entries=entries,
            ablations=ablations,
            ceiling=fields.pop("ceiling", None),
            speed=None if speed is None else Speed(**speed),
            source=source,
        )
        if fields:
            raise TypeError(f"{', '.join(fields)} is not a field of a study")
        study._check()
        return study

    def _check(self) -> None:
        known = [entry.label for entry in self.entries]
        for name in (self.reference, *self.controls, *(self.speed.policies if self.speed else ())):
            if name not in known:
                raise TypeError(f"{name!r} is not the label of one of its policies")
        tasks = [each.label for each in self.tested]
        if self.speed and self.speed.steps_of not in (None, *tasks):
            raise TypeError(f"speed names the task {self.speed.steps_of!r}")
        for ablation in self.ablations:
            for task in ablation.budget:
                if task not in tasks:
                    raise TypeError(f"ablation {ablation.label!r} names the task {task!r}")

    def entry(self, label: str) -> Entry:
        """The policy of this label."""
        return next(entry for entry in self.entries if entry.label == label)


def _entry(fields: Mapping[str, Any]) -> Entry:
    options = {k: v for k, v in fields.items() if k not in ("label", "policy", "equal_bytes")}
    kind = policies.by_name(fields["policy"])
    known = {field.name for field in dataclasses.fields(kind)}
    for name in options:
        if name not in known:
            raise TypeError(f"{name!r} is not an option of the policy {fields['policy']}")
    return Entry(
        fields["label"],
        fields["policy"],
        tuple(options.items()),
        fields.get("equal_bytes", "budget" in known),
    )


@dataclasses.dataclass(frozen=True)
class Planned:
    """A cell of the study, with what its tables say of it.

    Attributes:
      cell: what is run.
      entry: label of the policy without its budget.
      budget: of the reference policy, in tokens; 0 for what has none.
      own_budget: of this policy, after fitting.
      bytes: of the key/value memory of a row of median size.
      groups: `MAIN`, or labels of ablations.
    """

    cell: Cell
    entry: str
    budget: int
    own_budget: int
    bytes: int
    groups: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """As JSON values."""
        policy = self.cell.policy
        return {
            "task": self.cell.task_label,
            "label": self.cell.label,
            "entry": self.entry,
            "budget": self.budget,
            "own_budget": self.own_budget,
            "bytes": self.bytes,
            "groups": list(self.groups),
            "policy": {"name": type(policy).__name__, **dataclasses.asdict(policy)},
        }


def plan_study(study: Study, params: Params) -> tuple[list[Planned], list[str]]:
    """All cells, in the order in which they are run, and why others cannot be."""
    planned: dict[tuple[str, str], Planned] = {}
    made_of: dict[str, Entry] = {}
    impossible: list[str] = []
    for tested in study.tested:
        items = tested.task.items(params)
        of_median = _bytes_of_median(params, items)

        def add(
            entry: Entry,
            budget: int,
            group: str,
            tested: Tested = tested,
            of_median: Callable[[Policy], int] = of_median,
        ) -> None:
            label = f"{entry.label} {budget}" if entry.has_budget else entry.label
            key = tested.label, label
            if key in planned:
                if made_of[entry.label] != entry:
                    raise ValueError(f"label {entry.label!r} names two policies; give each its own")
                groups = tuple(dict.fromkeys([*planned[key].groups, group]))
                planned[key] = dataclasses.replace(planned[key], groups=groups)
                return
            made_of[entry.label] = entry
            try:
                policy = _fitted(study, entry, budget, of_median)
            except ValueError as error:
                impossible.append(f"{tested.label}, {label}: {error}")
                return
            planned[key] = Planned(
                Cell(tested.label, label, tested.task, policy),
                entry.label,
                budget if entry.has_budget else 0,
                getattr(policy, "budget", 0),
                of_median(policy),
                (group,),
            )

        for entry in study.entries:
            for budget in tested.budgets if entry.has_budget else (0,):
                add(entry, budget, MAIN)
        if study.ceiling is not None:
            longest = max(item.limit for item in items)
            for each in _ceilings(study, tested, longest, of_median):
                planned[tested.label, each.cell.label] = each
        for ablation in study.ablations:
            if tested.label in ablation.budget:
                for entry in ablation.entries:
                    add(entry, ablation.budget[tested.label], ablation.label)
    return list(planned.values()), impossible


def calibrated(study: Study, params: Params, file: Path) -> Study:
    """The study with `calibration: auto` replaced by a file of the model's own text, made once."""

    def wants(entry: Entry) -> bool:
        return ("calibration", "auto") in entry.options

    everyone = [*study.entries, *(e for ablation in study.ablations for e in ablation.entries)]
    if not any(map(wants, everyone)):
        return study
    if not file.is_file():
        tested = study.tested[0].task
        others = dataclasses.replace(tested, split="validation", problems=CALIBRATED_ON)
        texts = with_answers(params, [item.prompt for item in others.items(params)], 256)
        file.parent.mkdir(parents=True, exist_ok=True)
        calibrate(params, texts, progress=False).write(file)

    def filled(entry: Entry) -> Entry:
        if not wants(entry):
            return entry
        return dataclasses.replace(
            entry, options=tuple({**dict(entry.options), "calibration": str(file)}.items())
        )

    return dataclasses.replace(
        study,
        entries=tuple(map(filled, study.entries)),
        ablations=tuple(
            dataclasses.replace(ablation, entries=tuple(map(filled, ablation.entries)))
            for ablation in study.ablations
        ),
    )


def _ceilings(
    study: Study, tested: Tested, longest: int, of_median: Callable[[Policy], int]
) -> list[Planned]:
    assert study.ceiling is not None
    found = []
    for budget in tested.budgets:
        policy, answer = ceiling(budget, study.page_size, longest, study.ceiling)
        cell = Cell(tested.label, f"{CEILING} {budget}", tested.task, policy, answer)
        # Its script is no memory that a policy would need.
        reference = study.entry(study.reference).create(budget, study.page_size)
        size = of_median(reference)
        found.append(Planned(cell, CEILING, budget, budget, size, (MAIN,)))
    return found


def _bytes_of_median(params: Params, items: Sequence[Item]) -> Callable[[Policy], int]:
    """Bytes of a row under a policy, for the median prompt and the longest answer allowed.

    What it returns raises ValueError for a policy that cannot take one of the prompts.
    """
    ordered = sorted(len(item.prompt) for item in items)
    prompt, limit = ordered[len(ordered) // 2], max(item.limit for item in items)
    dtype = params.weights["embedding"].dtype.name

    def of_median(policy: Policy) -> int:
        policy.check_prompts(ordered)
        return row_bytes(params.config, policy, prompt, limit, dtype)

    return of_median


def _fitted(study: Study, entry: Entry, budget: int, of_median: Callable[[Policy], int]) -> Policy:
    """The entry at the largest budget that takes no more bytes than the reference at `budget`.

    Raises ValueError, with the reason, where there is no such budget.
    """
    if not (entry.has_budget and entry.equal_bytes):
        return entry.create(budget, study.page_size)
    target = of_median(study.entry(study.reference).create(budget, study.page_size))
    page_size = dict(entry.options).get("page_size", study.page_size)
    step = max(page_size, study.page_size)
    nominal = budget // step * step
    # What keeps the prompt among its pages needs more tokens for the same bytes.
    own = nominal + MOST_PAGES * step
    reason = ""
    while own > 0:
        try:
            policy = entry.create(own, study.page_size)
            size = of_median(policy)
        except ValueError as error:
            # The first refusal says what it needs; smaller budgets only repeat it.
            raise ValueError(reason or str(error)) from None
        if size <= target or (own <= nominal and size <= target * (1 + TOLERANCE)):
            return policy
        reason = (
            f"the least budget that it can work with, {own}, takes {size} bytes, where "
            f"{study.reference} takes {target}"
        )
        own -= step
    raise ValueError(reason)


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
    # Beside the folder, which holds samples alone.
    study = calibrated(study, params, Path(out).with_name(f"{Path(out).name}.{CALIBRATION}"))
    planned, impossible = plan_study(study, params)
    columns = (ANSWERS, *study.tested[0].task.columns, BYTES)
    config = {
        "kind": "study",
        **identity(params, model),
        "reference": study.reference,
        "controls": list(study.controls),
        "ceiling": CEILING if study.ceiling is not None else None,
        # How fast it is does not decide the samples.
        "study": {key: value for key, value in study.source.items() if key != "speed"},
        "cells": [each.describe() for each in planned],
        "impossible": impossible,
        "columns": [dataclasses.asdict(column) for column in columns],
    }
    cells = [each.cell for each in planned]
    results = run_cells(params, cells, out, config, study.rows, progress)
    if study.speed is not None:
        tried = {
            label: study.entry(label).create(study.speed.budget, study.page_size)
            for label in study.speed.policies
        }
        measure_speed(params, study.speed, tried, Path(out), progress)
        for tested in study.tested:
            if tested.label == study.speed.steps_of:
                items = tested.task.items(params)[: study.rows]
                of_task = {
                    each.cell.label: each.cell.policy
                    for each in planned
                    if each.cell.task_label == tested.label
                    and MAIN in each.groups
                    and each.cell.answer is None
                }
                measure_steps(params, tested.label, of_task, items, Path(out), progress)
    return results
