"""What a study file says: many policies at several budgets on several tasks, and ablations."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from raas_jax import policies
from raas_jax.files import read_yaml
from raas_jax.lab.runs.speed import Speed
from raas_jax.lab.tasks.lemma.task import LemmaTask
from raas_jax.policies import Policy

_OF_BUDGET = re.compile(r"budget/(\d+)")


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
    def parse(cls, fields: Mapping[str, Any]) -> Variant:
        """From a mapping of the file."""
        own = ("label", "policy", "equal_bytes")
        options = {name: value for name, value in fields.items() if name not in own}
        known = {field.name for field in dataclasses.fields(policies.by_name(fields["policy"]))}
        for name in options:
            if name not in known:
                raise TypeError(f"{name!r} is not an option of the policy {fields['policy']}")
        equal_bytes = fields.get("equal_bytes", "budget" in known)
        return cls(fields["label"], fields["policy"], tuple(options.items()), equal_bytes)

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
    def parse(cls, label: str, fields: Mapping[str, Any]) -> StudyTask:
        """From a mapping of the file."""
        options = dict(fields)
        budgets = tuple(options.pop("budgets"))
        return cls(label, LemmaTask(**options), budgets)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """One option varied, at one budget of some tasks."""

    label: str
    budget: Mapping[str, int]  # For each task.
    variants: tuple[Variant, ...]


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
          FileNotFoundError: there is none. ValueError: it says something else than a study.
        """
        fields = read_yaml(file)
        try:
            return cls.parse(fields)
        except (KeyError, TypeError, AttributeError) as error:
            what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file} is no study: {what}; see configs/study_smoke.yaml.") from None

    @classmethod
    def parse(cls, source: Mapping[str, Any]) -> Study:
        """From the mapping of a file."""
        fields = dict(source)
        ablations = fields.pop("ablations", {}).items()
        speed = fields.pop("speed", None)
        study = cls(
            tasks=tuple(StudyTask.parse(*each) for each in fields.pop("tasks").items()),
            variants=tuple(map(Variant.parse, fields.pop("policies"))),
            ablations=tuple(
                Ablation(label, each["budget"], tuple(map(Variant.parse, each["policies"])))
                for label, each in ablations
            ),
            page_size=fields.pop("page_size"),
            rows=fields.pop("rows"),
            reference=fields.pop("reference"),
            controls=tuple(fields.pop("controls")),
            ceiling=fields.pop("ceiling", None),
            speed=None if speed is None else Speed(**speed),
            source=source,
        )
        if fields:
            raise TypeError(f"{', '.join(fields)} is not a field of a study")
        study._check()
        return study

    def _check(self) -> None:
        known = [variant.label for variant in self.variants]
        for name in (self.reference, *self.controls, *(self.speed.policies if self.speed else ())):
            if name not in known:
                raise TypeError(f"{name!r} is not the label of one of its policies")
        named: dict[str, Variant] = {}
        for variant in [*self.variants, *(v for each in self.ablations for v in each.variants)]:
            if named.setdefault(variant.label, variant) != variant:
                raise TypeError(f"label {variant.label!r} names two policies; give each its own")
        tasks = [task.label for task in self.tasks]
        if self.speed and self.speed.steps_of not in (None, *tasks):
            raise TypeError(f"speed names the task {self.speed.steps_of!r}")
        for ablation in self.ablations:
            for task in ablation.budget:
                if task not in tasks:
                    raise TypeError(f"ablation {ablation.label!r} names the task {task!r}")

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
