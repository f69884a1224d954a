"""`raas-jax throughput`: the engine beside plain batches and transformers, in tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from raas_jax.cli import options
from raas_jax.cli.prompts import read_prompts
from raas_jax.cli.tables import markdown

if TYPE_CHECKING:
    from raas_jax.lab.bench.throughput import Age, Sharing, Work
    from raas_jax.lab.bench.throughput import Throughput as Way
    from raas_jax.params import Params


@dataclasses.dataclass
class Throughput:
    """Measure the engine beside plain batches of rows."""

    model: Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="SOURCE")] = "demo"
    """Model: demo or one of `raas-jax train` for lemma problems, any for --prompt-file."""
    prompt_file: options.File = None
    """Prompts as `raas-jax generate` takes them, in place of problems; one table then."""
    max_new_tokens: options.MaxNewTokens = None
    """Most tokens of an answer to such a prompt (default: 256)."""
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

        policy = self.policy.create()
        given = self._given()
        params = load(self.model, dtype=self.dtype)
        work = given(params)
        ways = bench_engine.throughput(
            params,
            work,
            policy,
            rows=self.rows,
            turns=self.turns,
            transformers=self.against == "transformers",
            progress=sys.stderr.isatty(),
        )
        of_steps: list[Age | Sharing] = []
        if self.prompt_file is None:
            rows = 4 * self.samples
            of_steps = [
                bench_engine.age(params, policy, rows=rows, old=self.old),
                bench_engine.sharing(
                    params,
                    policy,
                    rows=rows,
                    samples=self.samples,
                    prompt_tokens=self.prompt_tokens,
                ),
            ]
        if self.json:
            for each in (*ways, *of_steps):
                print(json.dumps({"kind": type(each).__name__, **dataclasses.asdict(each)}))
        else:
            what = f"problems of {self.definitions} definitions"
            if self.prompt_file is not None:
                what = f"prompts of {self.prompt_file}, at most {work.limit} tokens each"
            print(f"{len(work.ids)} {what}, {params.dtype.name}, {policy}\n")
            print(_of_ways(ways), *map(_of_steps, of_steps), sep="\n")
        return 0

    def _given(self) -> Callable[[Params], Work]:
        """Reads what is asked before the model is loaded."""
        from raas_jax import tokenizer
        from raas_jax.lab.bench.throughput import Work, mixed_problems

        if self.prompt_file is None:
            if self.max_new_tokens is not None:
                raise ValueError("--max-new-tokens goes with --prompt-file.")
            smallest, largest = options.parse_range(self.definitions)
            problems = mixed_problems(self.problems, smallest, largest)
            return lambda params: Work.lemma(params, problems)
        prompts, limit = read_prompts(self.prompt_file), self.max_new_tokens or 256
        return lambda params: Work(tokenizer.encode(params, prompts)[0], limit)


def _of_ways(ways: Sequence[Way]) -> str:
    head = ["", "answers/min", "tokens/s", "row-steps", "useful", "right", "engine faster"]
    lines = [
        [
            way.how,
            f"{way.per_minute:.0f}",
            f"{way.tokens / way.seconds:.0f}",
            "-" if way.row_steps is None else str(way.row_steps),
            "-" if way.useful is None else f"{way.useful:.1%}",
            "-" if way.right is None else f"{way.right / way.prompts:.1%}",
            f"{ways[0].per_minute / way.per_minute:.2f} x",
        ]
        for way in ways
    ]
    return markdown(head, lines)


def _of_steps(found: Age | Sharing) -> str:
    from raas_jax.lab.bench.throughput import Age

    if isinstance(found, Age):
        lines = [
            [f"{found.young} tokens", f"{found.young_ms:.2f}", ""],
            [f"{found.old} tokens", f"{found.old_ms:.2f}", f"{found.ratio:.3f}"],
        ]
        return markdown([f"{found.rows} rows after", "ms/step", "ratio"], lines)
    size = options.readable_bytes
    one = [size(found.shared_bytes), f"{found.shared_ms:.2f}", f"{found.ratio:.3f}"]
    each = [size(found.unshared_bytes), f"{found.unshared_ms:.2f}", ""]
    prompts = f"{found.rows} rows, prompts of {found.prompt_tokens}"
    lines = [[f"{found.samples} share one", *one], ["one each", *each]]
    return markdown([prompts, "prompt bytes", "ms/step", "ratio"], lines)
