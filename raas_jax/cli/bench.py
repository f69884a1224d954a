"""`raas-jax bench`: time per token at several lengths, beside what the memory allows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raas_jax.cli.options import (
    Int,
    PolicyOptions,
    parse_policies,
    read_config,
    readable_bytes,
    split_names,
    unset,
)

if TYPE_CHECKING:
    from raas_jax.lab.bench.policies import Comparison
    from raas_jax.lab.bench.steps import StepReport


@dataclasses.dataclass
class Bench:
    """Measure the time per token beside what memory allows."""

    config: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Shape of the model, with random weights: config.json, or YAML as configs/bench_25m.yaml."""
    prompt_tokens: int = 128
    """Length of the prompt."""
    lengths: Annotated[str, tyro.conf.arg(metavar="INT,INT,...")] = "256,1024,4096"
    """Generated lengths at which to measure."""
    batch: int = 1
    """Sequences at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Data type of weights and cache."""
    layers: Int = None
    """Number of layers, in place of the one in the file."""
    repetitions: int = 15
    """Timed turns at every length; the median counts."""
    against: Annotated[str | None, unset("transformers,dense")] = None
    """Baselines to time too: transformers (Hugging Face's dense decode), dense (this library's)."""
    largest_batch: bool = False
    """Say also how many sequences fit, by the compiler's account; nothing more is run."""
    policies: Annotated[str | None, unset("{all,NAMES}")] = None
    """Compare policies instead, all or named as for eval; --policy and --lengths do not count."""
    json: bool = False
    """Print JSON instead of a table."""
    policy: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)

    def run(self) -> int:
        """Prints the table, or the JSON object."""
        if self.policies is not None:
            return self._compare(self.policies)
        policy = self.policy.create()
        lengths, against = parse_lengths(self.lengths), parse_against(self.against)
        config = read_config(self.config, self.layers)
        load = os.getloadavg()[0]
        from raas_jax.lab.bench.steps import bench
        from raas_jax.params import Params

        report = bench(
            Params.random(config, dtype=self.dtype),
            policy,
            prompt_tokens=self.prompt_tokens,
            lengths=lengths,
            batch=self.batch,
            repetitions=self.repetitions,
            against=against,
            largest_batch=self.largest_batch,
            progress=sys.stderr.isatty(),
        )
        print(json.dumps(dataclasses.asdict(report), indent=2) if self.json else table(report))
        _warn_if_busy(load)
        return 0

    def _compare(self, names: str) -> int:
        config = read_config(self.config, self.layers)
        budget, page_size = self.policy.budget or 1024, self.policy.page_size or 16
        load = os.getloadavg()[0]
        from raas_jax.lab.bench.policies import compare, every_policy
        from raas_jax.params import Params

        params = Params.random(config, dtype=self.dtype)
        with contextlib.ExitStack() as stack:
            if names == "all":
                tried, left_out = stack.enter_context(every_policy(params, budget, page_size))
                for remark in left_out:
                    print(f"raas-jax: note: {remark}", file=sys.stderr)
            else:
                made = parse_policies(names, str(budget), page_size)
                tried = dict(zip(split_names(names), made, strict=True))
            comparison = compare(
                params,
                tried,
                prompt_tokens=self.prompt_tokens,
                batch=self.batch,
                repetitions=self.repetitions,
                progress=sys.stderr.isatty(),
            )
        if self.json:
            print(json.dumps(dataclasses.asdict(comparison), indent=2))
        else:
            print(comparison_table(comparison))
        _warn_if_busy(load)
        return 0


def _warn_if_busy(load: float) -> None:
    cores = os.cpu_count() or 1
    if load > 0.5 * cores:
        print(
            f"raas-jax: note: this machine was busy (load {load:.1f} on {cores} cores) before "
            "the measurement began; the figures may be off.",
            file=sys.stderr,
        )


def parse_lengths(text: str) -> list[int]:
    """`256,1024` → `[256, 1024]`. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--lengths is {text!r}; expected whole numbers with commas, as in 256,1024,4096."
        ) from None


def parse_against(text: str | None) -> list[str]:
    """`transformers,dense` → both. Raises ValueError for anything else."""
    names = [] if text is None else split_names(text)
    for name in names:
        if name not in ("transformers", "dense"):
            raise ValueError(f"--against is {text!r}; there are transformers and dense.")
    return names


def table(report: StepReport) -> str:
    """The report as Markdown, which reads well on a terminal too."""
    from raas_jax.lab.runs.tables import markdown_table

    baselines = any(timing.transformers_ms_per_token for timing in report.timings)
    heads = ["generated", "ms/token", "floor ms", "of floor", "compile s", "KV memory"]
    rows = [
        [
            f"{timing.generated}",
            f"{timing.ms_per_token:.2f}",
            f"{timing.floor_ms:.2f}",
            f"{timing.over_floor:.2f} x",
            f"{timing.compile_seconds:.1f}",
            readable_bytes(timing.kv_bytes),
        ]
        for timing in report.timings
    ]
    if baselines:
        heads += ["transformers ms", "faster", "whole run"]
        for row, timing in zip(rows, report.timings, strict=True):
            whole = timing.whole_run_speedup
            row += [
                f"{timing.transformers_ms_per_token:.2f}",
                f"{timing.speedup:.2f} x",
                f"{whole:.2f} x" if whole else "-",
            ]
    if any(timing.dense_ms_per_token for timing in report.timings):
        heads += ["dense ms", "faster", "dense KV"]
        for row, timing in zip(rows, report.timings, strict=True):
            row += [
                f"{timing.dense_ms_per_token:.2f}",
                f"{timing.over_dense:.2f} x",
                readable_bytes(timing.dense_kv_bytes or 0),
            ]
    for head, field in ("rows fit", "largest_batch"), ("dense rows fit", "dense_largest_batch"):
        if any(getattr(timing, field) for timing in report.timings):
            heads.append(head)
            for row, timing in zip(rows, report.timings, strict=True):
                row.append(f"{getattr(timing, field):,}")
    return "\n".join(
        [
            f"{report.policy}",
            f"{report.parameters / 1e6:.1f} M parameters, {report.dtype}, batch {report.batch}, "
            f"prompt of {report.prompt_tokens}, {report.device}, jax {report.jax}, "
            f"reads {report.read_bandwidth / 1e9:.1f} GB/s",
            "",
            markdown_table(heads, rows, labels=0).rstrip(),
        ]
    )


def comparison_table(comparison: Comparison) -> str:
    """The comparison as Markdown; a dash where a ratio has no meaning."""
    from raas_jax.lab.runs.tables import markdown_table

    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f} x"

    heads = ["policy", "tokens held", "ms/token", "of attention", "of RaaS", "KV memory"]
    rows = [
        [
            line.policy,
            f"{line.slots}",
            f"{line.ms_per_token:.2f}",
            ratio(line.over_attention),
            ratio(line.over_raas),
            readable_bytes(line.kv_bytes),
        ]
        for line in comparison.lines
    ]
    c = comparison
    return "\n".join(
        [
            f"{c.parameters / 1e6:.1f} M parameters, {c.dtype}, batch {c.batch}, prompt of "
            f"{c.prompt_tokens}, {c.generated} generated, {c.device}, jax {c.jax}",
            "",
            markdown_table(heads, rows, labels=0).rstrip(),
        ]
    )
