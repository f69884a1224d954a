"""`raas-jax bench`: time per token at several lengths, beside what the memory allows."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raas_jax.commands.options import Int, PolicyOptions, read_config, readable_bytes
from raas_jax.params import Params

if TYPE_CHECKING:
    from raas_jax.bench import Report


@dataclasses.dataclass
class Bench:
    """Measure the time per token, the memory's floor, and transformers beside it."""

    config: Annotated[str, tyro.conf.arg(metavar="FILE")]
    """Shape of the model (weights are random): a config.json, or YAML as configs/bench_25m.yaml."""
    prompt_tokens: Annotated[int, tyro.conf.arg(metavar="INT")] = 128
    """Length of the prompt."""
    lengths: Annotated[str, tyro.conf.arg(metavar="INT,INT,...")] = "256,1024,4096"
    """Generated lengths at which to measure."""
    batch: Annotated[int, tyro.conf.arg(metavar="INT")] = 1
    """Sequences at once."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Of weights and cache."""
    layers: Int = None
    """Instead of the number of layers in the file."""
    repetitions: Annotated[int, tyro.conf.arg(metavar="INT")] = 15
    """Timed turns at every length; the median counts."""
    against: Annotated[
        Literal["transformers"] | None,
        tyro.conf.arg(metavar="{transformers}", help_behavior_hint=""),
    ] = None
    """Also time Hugging Face's dense generate on the same weights, prompt and lengths."""
    json: bool = False
    """Print JSON instead of a table."""
    policy: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)

    def run(self) -> int:
        """Prints the table, or the JSON object."""
        policy = self.policy.create()
        lengths = parse_lengths(self.lengths)
        config = read_config(self.config, self.layers)
        load, cores = os.getloadavg()[0], os.cpu_count() or 1
        from raas_jax.bench import bench

        report = bench(
            Params.random(config, dtype=self.dtype),
            policy,
            prompt_tokens=self.prompt_tokens,
            lengths=lengths,
            batch=self.batch,
            repetitions=self.repetitions,
            transformers=self.against == "transformers",
            progress=sys.stderr.isatty(),
        )
        print(json.dumps(dataclasses.asdict(report), indent=2) if self.json else table(report))
        if load > 0.5 * cores:
            print(
                f"raas-jax: note: this machine was busy (load {load:.1f} on {cores} cores) before "
                "the measurement began; the figures may be off.",
                file=sys.stderr,
            )
        return 0


def parse_lengths(text: str) -> list[int]:
    """`256,1024` → `[256, 1024]`. Raises ValueError for anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(
            f"--lengths is {text!r}; expected whole numbers with commas, as in 256,1024,4096."
        ) from None


def table(report: Report) -> str:
    """The report as Markdown, which reads well on a terminal too."""
    rivals = any(timing.transformers_ms_per_token for timing in report.timings)
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
    if rivals:
        heads += ["transformers ms", "faster", "whole run"]
        for row, timing in zip(rows, report.timings, strict=True):
            whole = timing.whole_run_speedup
            row += [
                f"{timing.transformers_ms_per_token:.2f}",
                f"{timing.speedup:.2f} x",
                f"{whole:.2f} x" if whole else "-",
            ]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return "\n".join(
        [
            f"{report.policy}",
            f"{report.parameters / 1e6:.1f} M parameters, {report.dtype}, batch {report.batch}, "
            f"prompt of {report.prompt_tokens}, {report.device}, jax {report.jax}, "
            f"reads {report.read_bandwidth / 1e9:.1f} GB/s",
            "",
            _line(heads, widths),
            rule,
            *(_line(row, widths) for row in rows),
        ]
    )


def _line(cells: list[str], widths: list[int]) -> str:
    padded = (cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
    return "| " + " | ".join(padded) + " |"
