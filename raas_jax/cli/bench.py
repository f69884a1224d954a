"""`raas-jax bench`: time per token at several lengths, beside what the memory allows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from raas_jax.cli import options
from raas_jax.cli.errors import note
from raas_jax.cli.streams import say
from raas_jax.cli.tables import markdown
from raas_jax.config import ModelConfig

if TYPE_CHECKING:
    from raas_jax.lab.bench.policies import Comparison
    from raas_jax.lab.bench.steps import StepReport
    from raas_jax.params import Params


@dataclasses.dataclass
class Bench:
    """Measure the time per token beside what memory allows."""

    config: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Shape of the model, with random weights: config.json, or YAML as configs/bench_25m.yaml."""
    prompt_tokens: options.Tokens = 128
    """Length of the prompt."""
    lengths: Annotated[str, tyro.conf.arg(metavar="INT,INT,...")] = "256,1024,4096"
    """Generated lengths at which to measure."""
    batch: options.Rows = 1
    """Sequences at once."""
    dtype: options.Dtype = None
    layers: options.Layers = None
    """Number of layers, in place of the one in the file."""
    repetitions: options.Turns = 15
    """Timed turns at every length; the median counts."""
    against: Annotated[str | None, options.unset("NAMES")] = None
    """Time these too, all dense: transformers, llama.cpp (needs llama-cpp-python), dense (ours)."""
    largest_batch: bool = False
    """Say also how many sequences fit, by the compiler's account; nothing more is run."""
    policies: Annotated[str | None, options.unset("{all,NAMES}")] = None
    """Compare policies instead, all or named as for eval; --policy and --lengths do not count."""
    json: bool = False
    """Print JSON instead of a table."""
    policy: options.PolicyOptions = dataclasses.field(default_factory=options.PolicyOptions)

    def run(self) -> int:
        """Prints the table, or the JSON object."""
        if self.against is not None:
            leave_memory()
        config = options.read_config(self.config, self.layers)
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        report, text = self._steps(config) if self.policies is None else self._compare(config)
        print(json.dumps(dataclasses.asdict(report), indent=2) if self.json else text)
        if load > 0.5 * cores:
            note(
                f"this machine was busy (load {load:.1f} on {cores} cores) before the measurement "
                "began; the figures may be off."
            )
        return 0

    def _params(self, config: ModelConfig) -> Params:
        """Random weights, stored as `raas_jax.load` would."""
        from raas_jax import weights
        from raas_jax.params import Params
        from raas_jax.weights.hf import wanted_dtype

        params = Params.random(config, dtype=wanted_dtype(self.dtype, config.dtype))
        return params.separate() if weights.separates() else params

    def _steps(self, config: ModelConfig) -> tuple[StepReport | Comparison, str]:
        policy = self.policy.create()
        lengths = options.whole_numbers("--lengths", self.lengths, "256,1024,4096")
        from raas_jax.lab.bench.steps import bench

        report = bench(
            self._params(config),
            policy,
            lengths=lengths,
            against=options.split_names(self.against or ""),
            largest_batch=self.largest_batch,
            **self._common(),
        )
        for remark in report.left_out:
            note(remark)
        return report, table(report)

    def _compare(self, config: ModelConfig) -> tuple[StepReport | Comparison, str]:
        from raas_jax.lab.bench.policies import compare, every_policy

        names, params = self.policies or "", self._params(config)
        budget, page_size = self.policy.budget or 1024, self.policy.page_size or 16
        with contextlib.ExitStack() as stack:
            if names == "all":
                tried, left_out = stack.enter_context(every_policy(params, budget, page_size))
                for remark in left_out:
                    note(remark)
            else:
                made = options.parse_policies(names, str(budget), page_size)
                tried = dict(zip(options.split_names(names), made, strict=True))
            comparison = compare(params, tried, **self._common())
        return comparison, comparison_table(comparison)

    def _common(self) -> dict[str, Any]:
        names = ("prompt_tokens", "batch", "repetitions")
        return {name: getattr(self, name) for name in names} | {
            "progress": sys.stderr.isatty(),
            "say": say,
        }


def leave_memory() -> None:
    """Lets JAX take a GPU's memory as it needs it, so that others find some; before it starts."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


Column = tuple[str, str, Callable[[Any], str]]
"""Heading, field, and how its value is written."""
MS, TIMES = "{:.2f}".format, "{:.2f} x".format
ALWAYS: list[Column] = [
    ("generated", "generated", str),
    ("ms/token", "ms_per_token", MS),
    ("floor ms", "floor_ms", MS),
    ("of floor", "over_floor", TIMES),
    ("compile s", "compile_seconds", "{:.1f}".format),
    ("KV memory", "kv_bytes", options.readable_bytes),
]
# Shown where there is one.
IF_MEASURED: list[Column] = [
    ("rows fit", "largest_batch", "{:,}".format),
    ("dense rows fit", "dense_largest_batch", "{:,}".format),
]
OF_OTHER: list[Column] = [
    ("{} ms", "ms_per_token", MS),
    ("faster", "ratio", TIMES),
    ("whole run", "whole_run_ratio", TIMES),
    ("{} KV", "kv_bytes", options.readable_bytes),
]
COMPARED: list[Column] = [
    ("policy", "policy", str),
    ("tokens held", "slots", str),
    ("ms/token", "ms_per_token", MS),
    ("of attention", "over_attention", TIMES),
    ("of RaaS", "over_raas", TIMES),
    ("KV memory", "kv_bytes", options.readable_bytes),
]


def _in_columns(entries: Sequence[Any], columns: Sequence[Column]) -> list[list[str]]:
    """The cells of an entry per line; a dash where a value is missing."""

    def cell(value: Any, written: Callable[[Any], str]) -> str:
        return "-" if value is None else written(value)

    return [[cell(getattr(each, name), how) for _, name, how in columns] for each in entries]


def _measured(entries: Sequence[Any], columns: Sequence[Column]) -> list[Column]:
    return [each for each in columns if any(getattr(entry, each[1]) for entry in entries)]


def table(report: StepReport) -> str:
    """The report as Markdown, which reads well on a terminal too."""
    columns = ALWAYS + _measured(report.timings, IF_MEASURED)
    head, rows = [heading for heading, _, _ in columns], _in_columns(report.timings, columns)
    for name in report.timings[0].others:
        others = [timing.others[name] for timing in report.timings]
        columns = _measured(others, OF_OTHER)
        head += [heading.format(name) for heading, _, _ in columns]
        rows = [row + more for row, more in zip(rows, _in_columns(others, columns), strict=True)]
    return (
        f"{report.policy}\n"
        f"{report.parameters / 1e6:.1f} M parameters, {report.dtype}, batch {report.batch}, "
        f"prompt of {report.prompt_tokens}, {report.device}, jax {report.jax}, "
        f"reads {report.read_bandwidth / 1e9:.1f} GB/s\n\n{markdown(head, rows).rstrip()}"
    )


def comparison_table(comparison: Comparison) -> str:
    """The comparison as Markdown; a dash where a ratio has no meaning."""
    c, head = comparison, [heading for heading, _, _ in COMPARED]
    return (
        f"{c.parameters / 1e6:.1f} M parameters, {c.dtype}, batch {c.batch}, prompt of "
        f"{c.prompt_tokens}, {c.generated} generated, {c.device}, jax {c.jax}\n\n"
        f"{markdown(head, _in_columns(c.lines, COMPARED)).rstrip()}"
    )
