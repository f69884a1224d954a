"""What a study file says: many policies at several budgets on several tasks, and ablations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raas_jax import checks, files, policies
from raas_jax.files import Fields
from raas_jax.lab.limits import MOST_ROWS
from raas_jax.lab.runs.speed import Speed
from raas_jax.lab.tasks.lemma.task import LemmaTask
from raas_jax.policies import Policy

_REMEDY = "See configs/study_smoke.yaml."
_OF_BUDGET = re.compile(r"budget/([1-9]\d{0,8})")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A policy with options: a line of the tables, a curve of the figures.

    Attributes:
      label: what they call it.
      policy: name, as on the command line.
      options: of the policy; a value `budget/4` means that share of its budget, in tokens.
      equal_bytes: whether its budget is fitted; False for what keeps everything.
    """

    label: str
    policy: str
    options: tuple[tuple[str, Any], ...]
    equal_bytes: bool

    @classmethod
    def parse(cls, fields: Fields) -> Variant:
        """From named fields of the file."""
        policy, own = fields.text("policy"), ("label", "policy", "equal_bytes")
        options = {name: value for name, value in fields.values.items() if name not in own}
        try:
            kind = policies.by_name(policy)
        except ValueError as error:
            raise fields.error(str(error)) from None
        known = {field.name for field in dataclasses.fields(kind)}
        for name, value in options.items():
            if name not in known:
                raise fields.error(f"{name!r} is not an option of the policy {policy}")
            if not isinstance(value, str | int | float):
                raise fields.error(f"{name} is {checks.short(value)}; it must be text or a number")
        equal_bytes = fields.flag("equal_bytes", "budget" in known)
        return cls(fields.text("label"), policy, tuple(options.items()), equal_bytes)

    @property
    def has_budget(self) -> bool:
        kind = policies.by_name(self.policy)
        return any(field.name == "budget" for field in dataclasses.fields(kind))

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
class StudyTask:
    """A task of the study: its label, its problems, and the budgets of the reference policy."""

    label: str
    task: LemmaTask
    budgets: tuple[int, ...]

    @classmethod
    def parse(cls, label: str, fields: Fields) -> StudyTask:
        """From named fields of the file."""
        budgets = fields.integers("budgets", 1, checks.MOST_TOKENS)
        return cls(label, fields.without("budgets").build(LemmaTask), tuple(budgets))


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One option varied, at one budget of some tasks."""

    label: str
    budget: Mapping[str, int]  # For each task.
    variants: tuple[Variant, ...]

    @classmethod
    def parse(cls, label: str, fields: Fields) -> Ablation:
        """From named fields of the file."""
        budget = fields.inner("budget")
        budgets = {task: budget.integer(task, 1, checks.MOST_TOKENS) for task in budget.values}
        return cls(label, budgets, tuple(map(Variant.parse, fields.each("policies"))))


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study file says; see `configs/study_tradeoff.yaml`."""

    page_size: int
    rows: int
    reference: str
    controls: tuple[str, ...]
    tasks: tuple[StudyTask, ...]
    variants: tuple[Variant, ...]
    ablations: tuple[Ablation, ...]
    ceiling: float | None
    speed: Speed | None
    source: Mapping[str, Any]

    @classmethod
    def from_file(cls, file: str | Path) -> Study:
        """Reads a YAML file.

        Raises:
          FileNotFoundError: there is none. FileError: it says something else than a study.
        """
        return cls.parse(files.read_yaml(file, _REMEDY), file)

    @classmethod
    def parse(cls, source: Mapping[str, Any], file: str | Path = "study") -> Study:
        """From what a file says; raises `FileError`."""
        fields = Fields(source, file, remedy=_REMEDY)
        known = {each.name for each in dataclasses.fields(cls)} - {"variants", "source"}
        if unknown := sorted(source.keys() - known - {"policies"}):
            raise fields.error(f"{', '.join(unknown)} is not a field of a study")
        tasks = fields.inner("tasks")
        ablations = fields.inner("ablations").values if "ablations" in source else {}
        within = {label: fields.inner("ablations").inner(label) for label in ablations}
        study = cls(
            tasks=tuple(StudyTask.parse(label, tasks.inner(label)) for label in tasks.values),
            variants=tuple(map(Variant.parse, fields.each("policies"))),
            ablations=tuple(Ablation.parse(*each) for each in within.items()),
            page_size=fields.integer("page_size", 1, checks.MOST_TOKENS),
            rows=fields.integer("rows", 1, MOST_ROWS),
            reference=fields.text("reference"),
            controls=tuple(fields.texts("controls")),
            ceiling=fields.real("ceiling", "a share from 0 to 1", 0, 1, default=None),
            speed=fields.inner("speed").build(Speed) if source.get("speed") is not None else None,
            source=source,
        )
        study._check(fields)
        return study

    def _check(self, fields: Fields) -> None:
        if not self.tasks:
            raise fields.error("its tasks are empty")
        known = [variant.label for variant in self.variants]
        for name in (self.reference, *self.controls, *(self.speed.policies if self.speed else ())):
            if name not in known:
                raise fields.error(f"{name!r} is not the label of one of its policies")
        named: dict[str, Variant] = {}
        for variant in [*self.variants, *(v for each in self.ablations for v in each.variants)]:
            if named.setdefault(variant.label, variant) != variant:
                raise fields.error(f"label {variant.label!r} names two policies; give each its own")
        tasks = [task.label for task in self.tasks]
        if self.speed and self.speed.steps_of not in (None, *tasks):
            raise fields.error(f"speed names the task {self.speed.steps_of!r}")
        for ablation in self.ablations:
            for task in ablation.budget:
                if task not in tasks:
                    raise fields.error(f"ablation {ablation.label!r} names the task {task!r}")

    def variant(self, label: str) -> Variant:
        """The policy of this label."""
        return next(variant for variant in self.variants if variant.label == label)

    def reference_at(self, budget: int) -> Policy:
        """The reference policy at a budget."""
        return self.variant(self.reference).create(budget, self.page_size)

    def calibrated(self, file: Path) -> Study:
        """The study with this file in the place of `calibration: auto`; its source stays."""
        return dataclasses.replace(Study.parse(_calibrated(self.source, file)), source=self.source)


def _calibrated(source: Any, file: Path) -> Any:
    if isinstance(source, list):
        return [_calibrated(each, file) for each in source]
    if not isinstance(source, Mapping):
        return source
    return {
        name: str(file) if (name, value) == ("calibration", "auto") else _calibrated(value, file)
        for name, value in source.items()
    }
