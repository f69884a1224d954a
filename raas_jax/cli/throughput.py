"""`raas-jax throughput`: the engine beside plain batches and transformers, in tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raas_jax.cli.options import Dtype, PolicyOptions, readable_bytes, unset

if TYPE_CHECKING:
    from raas_jax.lab.bench.throughput import Age, Sharing
    from raas_jax.lab.bench.throughput import Throughput as Way
    from raas_jax.policies import Policy


@dataclasses.dataclass
class Throughput:
    """Measure the engine beside plain batches of rows."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="SOURCE")] = "demo"
    """Model that answers lemma problems: demo, or one that `raas-jax train` made."""
    problems: int = 200
    """Number of problems."""
    definitions: Annotated[str, tyro.conf.arg(metavar="FROM-TO")] = "2-48"
    """Definitions of each problem, drawn evenly."""
    rows: int = 16
    """Answers at once."""
    turns: int = 1
    """Runs of each, in turn; the medians are shown."""
    against: Annotated[Literal["transformers"] | None, unset("{transformers}")] = None
    """Time Hugging Face's batched generate too, on the same weights and problems (needs torch)."""
    old: int = 4096
    """Tokens after which rows count as old."""
    samples: int = 16
    """Answers that share a prompt."""
    prompt_tokens: int = 1024
    """Length of the prompts that are shared."""
    json: bool = False
    """Print JSON lines instead of tables."""
    dtype: Dtype = None
    policy: PolicyOptions = dataclasses.field(default_factory=lambda: PolicyOptions(budget=256))

    def run(self) -> int:
        """Measures and prints."""
        from raas_jax import load
        from raas_jax.cli.eval import parse_range
        from raas_jax.lab.bench import throughput as bench_engine

        for name in ("problems", "rows", "turns", "old", "samples", "prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1.")
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
        from raas_jax.lab.runs.tables import markdown_table

        engine = ways[0]
        print(f"{self.problems} problems of {self.definitions} definitions, {policy}\n")
        print(
            markdown_table(
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
                labels=0,
            )
        )
        print(
            markdown_table(
                [f"{aged.rows} rows after", "ms/step", "ratio"],
                [
                    [f"{aged.young} tokens", f"{aged.young_ms:.2f}", ""],
                    [f"{aged.old} tokens", f"{aged.old_ms:.2f}", f"{aged.ratio:.3f}"],
                ],
                labels=0,
            )
        )
        batch = f"{shared.rows} rows, prompts of {shared.prompt_tokens}"
        print(
            markdown_table(
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
                labels=0,
            )
        )
