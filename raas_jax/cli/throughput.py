"""`raas-jax throughput`: the engine beside plain batches and transformers, in tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Annotated, Literal

import tyro

from raas_jax.cli.options import Dtype, PolicyOptions, readable_bytes
from raas_jax.lab.bench.throughput import Age, Sharing
from raas_jax.lab.bench.throughput import Throughput as Way
from raas_jax.policies import Policy


@dataclasses.dataclass
class Throughput:
    """Measure the engine beside plain batches of rows."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="SOURCE")] = "demo"
    """A model that answers lemma problems: demo, or one that `raas-jax train` made."""
    problems: Annotated[int, tyro.conf.arg(metavar="INT")] = 200
    """How many."""
    definitions: Annotated[str, tyro.conf.arg(metavar="FROM-TO")] = "2-48"
    """Of each problem, drawn evenly."""
    rows: Annotated[int, tyro.conf.arg(metavar="INT")] = 16
    """Answers at once."""
    turns: Annotated[int, tyro.conf.arg(metavar="INT")] = 1
    """Runs of each, in turn; the medians are shown."""
    against: Annotated[
        Literal["transformers"] | None,
        tyro.conf.arg(metavar="{transformers}", help_behavior_hint=""),
    ] = None
    """Also Hugging Face's batched generate on the same weights and problems (needs torch)."""
    old: Annotated[int, tyro.conf.arg(metavar="INT")] = 4096
    """Tokens after which rows count as old."""
    samples: Annotated[int, tyro.conf.arg(metavar="INT")] = 16
    """Answers that share a prompt."""
    prompt_tokens: Annotated[int, tyro.conf.arg(metavar="INT")] = 1024
    """Of the prompts that are shared."""
    json: bool = False
    """Print JSON lines instead of tables."""
    dtype: Dtype = None
    """Of the weights; bfloat16 on accelerators, float32 on CPUs."""
    policy: PolicyOptions = dataclasses.field(default_factory=lambda: PolicyOptions(budget=256))

    def run(self) -> int:
        """Measures and prints."""
        from raas_jax import load
        from raas_jax.cli.eval import parse_range
        from raas_jax.lab.bench import throughput as bench_engine

        for name in ("problems", "rows", "turns", "old", "samples", "prompt_tokens"):
            value, option = getattr(self, name), name.replace("_", "-")
            if value < 1:
                raise ValueError(f"--{option} is {value}; it must be at least 1.")
        smallest, largest = parse_range(self.definitions)
        policy = self.policy.create()
        problems = bench_engine.mixed_problems(self.problems, smallest, largest)
        params = load(self.model, dtype=self.dtype)
        ways = bench_engine.throughput(
            params,
            problems,
            policy,
            rows=self.rows,
            turns=self.turns,
            transformers=self.against == "transformers",
            progress=sys.stderr.isatty(),
        )
        rows = 4 * self.samples
        aged = bench_engine.age(params, policy, rows=rows, old=self.old)
        shared = bench_engine.sharing(
            params, policy, rows=rows, samples=self.samples, prompt_tokens=self.prompt_tokens
        )
        if self.json:
            tables: list[Way | Age | Sharing] = [*ways, aged, shared]
            for found in tables:
                print(json.dumps({"kind": type(found).__name__, **dataclasses.asdict(found)}))
            return 0
        self._print(policy, ways, aged, shared)
        return 0

    def _print(self, policy: Policy, ways: list[Way], aged: Age, shared: Sharing) -> None:
        engine = ways[0]
        print(f"{self.problems} problems of {self.definitions} definitions, {policy}\n")
        print(
            _table(
                ["", "problems/min", "tokens/s", "row-steps", "useful", "right", "engine faster"],
                [
                    [
                        way.how,
                        f"{way.per_minute:.0f}",
                        f"{way.tokens / way.seconds:.0f}",
                        "-" if way.row_steps is None else str(way.row_steps),
                        "-" if way.useful is None else f"{way.useful:.1%}",
                        f"{way.right / way.problems:.1%}",
                        f"{engine.per_minute / way.per_minute:.2f} x",
                    ]
                    for way in ways
                ],
            )
        )
        print(
            _table(
                [f"{aged.rows} rows after", "ms/step", "ratio"],
                [
                    [f"{aged.young} tokens", f"{aged.young_ms:.2f}", ""],
                    [f"{aged.old} tokens", f"{aged.old_ms:.2f}", f"{aged.ratio:.3f}"],
                ],
            )
        )
        batch = f"{shared.rows} rows, prompts of {shared.prompt_tokens}"
        print(
            _table(
                [batch, "prompt bytes", "ms/step", "ratio"],
                [
                    [
                        f"{shared.samples} share one",
                        readable_bytes(shared.shared_bytes),
                        f"{shared.shared_ms:.2f}",
                        f"{shared.ratio:.3f}",
                    ],
                    [
                        "one each",
                        readable_bytes(shared.unshared_bytes),
                        f"{shared.unshared_ms:.2f}",
                        "",
                    ],
                ],
            )
        )


def _table(heads: list[str], rows: list[list[str]]) -> str:
    """Markdown that reads well on a terminal too, with an empty line after it."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    rule = ["-" * (width - 1) + ":" for width in widths]
    lines = ([cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    heads = [head.rjust(width) for head, width in zip(heads, widths, strict=True)]
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *lines)) + "\n"
