"""The points of a run: each policy at each budget on each task, with its samples and figures."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from raas_jax.lab.runs.layout import Sample, read_speed, read_steps
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.statistics import (
    Estimate,
    clustered_mean,
    clustered_share,
    estimate,
    paired,
    pass_at_k,
    quantile,
)

STUDIED = {"correct", "derivation", "written_served", "tokens", "capped"}
"""Columns that the tables and pictures of a study are made of."""
MAIN = "policies"
"""The group of points that is no ablation."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One policy at one budget on one task.

    Attributes:
      task: label of the task.
      policy: label of the policy without its budget.
      label: what the samples call it.
      budget: in tokens; in a study, of the reference policy. None for a policy without one.
      samples: all that are finished.
      figures: by name, in the order of the table.
      own_budget: in a study, that of the policy itself.
      bytes: in a study, of the key/value memory of a row of median size.
      groups: in a study, `MAIN` and the ablations that it belongs to.
      step_ms: time of a step of a batch, milliseconds; None where it was not measured.
    """

    task: str
    policy: str
    label: str
    budget: int | None
    samples: Sequence[Sample]
    figures: Mapping[str, Estimate]
    own_budget: int | None = None
    bytes: int = 0
    groups: Sequence[str] = (MAIN,)
    step_ms: float | None = None

    @property
    def answered(self) -> list[Sample]:
        """The samples that are answers; a request that could not be answered has no length."""
        return [sample for sample in self.samples if sample.get("finish_reason") != "error"]

    def against(self, other: Point) -> Estimate:
        """Difference of the share of right answers, over the questions that both have."""
        mine, theirs = (
            {(str(each["item"]), each["sample"]): bool(each["correct"]) for each in point.samples}
            for point in (self, other)
        )
        both = [key for key in mine if key in theirs]
        return paired([mine[key] for key in both], [theirs[key] for key in both])


class Findings:
    """All points of a folder, of a run that is finished or not, in the order of the run.

    Attributes:
      config: of the run, field by field.
      model: its name.
      kind: "study", "benchmark", or "" for a task with its cache recorded.
      reference, controls, ceiling: labels of policies of a study.
      baselines: what every policy of a study is compared with: those three.
      columns: of the tables, where the configuration says them.
      points: those that have samples.
      tasks, policies: their labels.
      ablations: labels of groups of points in which one option is varied.
      speed: of a study, by policy: time and bytes at growing lengths.
    """

    def __init__(self, results: Results):
        self.layout = layout = results.layout
        self.config = layout.config
        self.kind, self.columns = layout.kind, layout.columns
        for name in sorted(STUDIED - {each.name for each in self.columns}):
            if self.kind == "study":
                raise self.config.error(f"its columns lack {name}")
        self.model: str = self.config.text("model")
        self.reference: str | None = self.config.text("reference", None)
        self.ceiling: str | None = self.config.text("ceiling", None)
        self.controls = self.config.texts("controls", [])
        self.baselines = [x for x in (self.reference, *self.controls, self.ceiling) if x]
        self.speed, steps = read_speed(results.folder), read_steps(results.folder)
        self.points: list[Point] = []
        for cell in layout.cells():
            samples = results.of(cell["task"], cell["label"])
            if samples:
                times = steps["milliseconds"] if steps.get("task") == cell["task"] else {}
                step_ms = times.get(cell["label"])
                figures = self._figures(samples)
                self.points.append(Point(**cell, samples=samples, figures=figures, step_ms=step_ms))
        self.tasks = list(dict.fromkeys(point.task for point in self.points))
        self.policies = list(dict.fromkeys(point.policy for point in self.points))
        groups = dict.fromkeys(group for point in self.points for group in point.groups)
        self.ablations = [group for group in groups if group != MAIN]

    def _figures(self, samples: Sequence[Sample]) -> dict[str, Estimate]:
        problems: dict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            problems[str(sample["item"])].append(sample)
        if self.kind != "benchmark":
            return {each.name: estimate(each, [*problems.values()]) for each in self.columns}
        samples_each = self.config.inner("asking").integer("samples", 1)
        return sampled_figures([*problems.values()], samples_each)

    def of_task(self, task: str, group: str = MAIN) -> list[Point]:
        """Points of a task in a group, in the order of the configuration."""
        found = [point for point in self.points if point.task == task and group in point.groups]
        if group == MAIN:
            return found
        ablations = self.config.inner("study").inner("ablations")
        entries = ablations.inner(group).each("policies")
        order = {entry.text("label"): number for number, entry in enumerate(entries)}
        return sorted(found, key=lambda point: order.get(point.policy, 0))

    def find(self, task: str, policy: str, budget: int | None) -> Point | None:
        """The point of a policy at a budget; one without a budget serves all."""
        found = (point for point in self.points if (point.task, point.policy) == (task, policy))
        return next((point for point in found if point.budget in (budget, None)), None)


def sampled_figures(problems: Sequence[Sequence[Sample]], n: int) -> dict[str, Estimate]:
    """All figures of answers from the engine, of which each problem has one to n."""
    rights = [[bool(sample["correct"]) for sample in samples] for samples in problems]
    found = {"correct": clustered_share(rights)}
    for k in sorted({*(2**i for i in range(1, n.bit_length())), n} - {1}):
        found[f"pass@{k}"] = pass_at_k(rights, k)
    # A request that could not be answered has no length.
    answered = [[s for s in samples if s["finish_reason"] != "error"] for samples in problems]
    answered = [samples for samples in answered if samples]
    if not answered:
        return found
    lengths = [float(sample["tokens"]) for samples in answered for sample in samples]
    found["tokens"] = clustered_mean([[float(s["tokens"]) for s in each] for each in answered])
    for share in (10, 50, 90):
        found[f"tokens_p{share}"] = Estimate(quantile(lengths, share / 100))
    found["capped"] = clustered_share([[bool(s["capped"]) for s in each] for each in answered])
    # Each start of the run worked up to its last answer.
    ends: dict[int, float] = defaultdict(float)
    for sample in (sample for samples in problems for sample in samples):
        ends[sample["start"]] = max(ends[sample["start"]], sample["elapsed"])
    worked = sum(ends.values())
    found["seconds_per_answer"] = Estimate(worked / len(lengths))
    found["latency"] = clustered_mean([[s["seconds"] for s in each] for each in answered])
    found["tokens_per_second"] = Estimate(sum(lengths) / worked if worked else math.nan)
    found["kv_bytes"] = Estimate(max(float(s["kv_bytes"]) for each in answered for s in each))
    return found
