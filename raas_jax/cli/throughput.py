"""`raas-jax throughput`: the engine beside plain batches and transformers, in tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raas_jax.cli import options

if TYPE_CHECKING:
    from raas_jax.lab.bench.throughput import Age, Sharing
    from raas_jax.lab.bench.throughput import Throughput as Way


@dataclasses.dataclass
class Throughput:
    """Measure the engine beside plain batches of rows."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="SOURCE")] = "demo"
    """Model that answers lemma problems: demo, or one that `raas-jax train` made."""
    problems: options.Problems = 200
    """Number of problems."""
    definitions: options.Definitions = "2-48"
    """Definitions of each problem, drawn evenly."""
    rows: options.Rows = 16
    """Answers at once."""
    turns: options.Turns = 1
    """Runs of each, in turn; the medians are shown."""
    against: Annotated[Literal["transformers"] | None, options.unset("{transformers}")] = None
    """Time Hugging Face's batched generate too, on the same weights and problems (needs torch)."""
    old: options.Tokens = 4096
    """Tokens after which rows count as old."""
    samples: options.Rows = 16
    """Answers that share a prompt."""
    prompt_tokens: options.Tokens = 1024
    """Length of the prompts that are shared."""
    json: bool = False
    """Print JSON lines instead of tables."""
    dtype: options.Dtype = None
    policy: options.PolicyOptions = dataclasses.field(
        default_factory=lambda: options.PolicyOptions(budget=256)
    )

    def run(self) -> int:
        """Measures and prints."""
        from raas_jax import load
        from raas_jax.lab.bench import throughput as bench_engine

        smallest, largest = options.parse_range(self.definitions)
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
            found: list[Way | Age | Sharing] = [*ways, aged, shared]
            for each in found:
                print(json.dumps({"kind": type(each).__name__, **dataclasses.asdict(each)}))
        else:
            print(f"{self.problems} problems of {self.definitions} definitions, {policy}\n")
            print(*tables(ways, aged, shared), sep="\n")
        return 0


def tables(ways: list[Way], aged: Age, shared: Sharing) -> list[str]:
    """The three measurements as Markdown."""
    from raas_jax.lab.runs.tables import markdown_table

    head = ["", "problems/min", "tokens/s", "row-steps", "useful", "right", "engine faster"]
    compared = [
        [
            way.how,
            f"{way.per_minute:.0f}",
            f"{way.tokens / way.seconds:.0f}",
            "-" if way.row_steps is None else str(way.row_steps),
            "-" if way.useful is None else f"{way.useful:.1%}",
            f"{way.right / way.problems:.1%}",
            f"{ways[0].per_minute / way.per_minute:.2f} x",
        ]
        for way in ways
    ]
    ages = [
        [f"{aged.young} tokens", f"{aged.young_ms:.2f}", ""],
        [f"{aged.old} tokens", f"{aged.old_ms:.2f}", f"{aged.ratio:.3f}"],
    ]
    size = options.readable_bytes
    one = [size(shared.shared_bytes), f"{shared.shared_ms:.2f}", f"{shared.ratio:.3f}"]
    each = [size(shared.unshared_bytes), f"{shared.unshared_ms:.2f}", ""]
    prompts = f"{shared.rows} rows, prompts of {shared.prompt_tokens}"
    return [
        markdown_table(head, compared, labels=0),
        markdown_table([f"{aged.rows} rows after", "ms/step", "ratio"], ages, labels=0),
        markdown_table(
            [prompts, "prompt bytes", "ms/step", "ratio"],
            [[f"{shared.samples} share one", *one], ["one each", *each]],
            labels=0,
        ),
    ]
