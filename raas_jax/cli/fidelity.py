"""`raas-jax eval fidelity`: how far policies are from the dense model on text, at equal bytes."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from raas_jax.cli import options
from raas_jax.lab.limits import MOST_PROBLEMS

# What evicts nothing of the prompt here, and needs no calibration.
USUAL = "raas,recent,random,h2o,tova,snapkv,rkv"


@dataclasses.dataclass
class Fidelity:
    """Compare policies with the dense model on text, at equal bytes; a stopped run goes on."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help=options.SOURCE)]
    out: Annotated[str | None, options.unset("DIR", aliases=["-o"])] = None
    """Folder for what is found of each text, and the tables; it may get more of both later."""
    text: options.Texts = ()
    policies: Annotated[str, tyro.conf.arg(metavar="NAMES")] = USUAL
    """Policies with commas, each with its options, or oracle; the first's bytes are all's."""
    budgets: Annotated[str, tyro.conf.arg(metavar="INTS")] = "256"
    """Budgets of the first policy, with commas."""
    page_sizes: Annotated[str, tyro.conf.arg(metavar="INTS")] = "16"
    """Tokens per page, with commas; the bytes are those at the first."""
    texts: options.Problems = 4
    """Texts of each kind."""
    skip: Annotated[int, options.Within(0, MOST_PROBLEMS)] = 0
    """Texts of each kind to pass over, so that others can be kept for a choice of options."""
    length: options.Tokens = 2048
    """Tokens of a text."""
    prompt_tokens: options.Tokens = 128
    """How many of them are the prompt, which policies keep beside the budget."""
    rows: options.Rows = 8
    """Texts at once."""
    dtype: options.Dtype = None

    def run(self) -> int:
        """Runs what is missing, then prints the tables and saves them in the folder."""
        from raas_jax import load
        from raas_jax.cli.eval import print_report, resumable
        from raas_jax.lab.fidelity.oracle import NAMES
        from raas_jax.lab.fidelity.run import plan_points, run
        from raas_jax.lab.fidelity.texts import texts_in_turns

        if self.out is None:
            raise ValueError("--out DIR is missing: the folder for what is found, and the tables.")
        if self.length < self.prompt_tokens + 2:
            raise ValueError(
                f"--length is {self.length}; it must be above the {self.prompt_tokens} of "
                "--prompt-tokens by two at least."
            )
        sizes = options.whole_numbers("--page-sizes", self.page_sizes, "4,16,32")
        tried = [
            policy
            for size in sizes
            for policy in options.parse_policies(self.policies, self.budgets, size, NAMES)
        ]
        params = load(self.model, dtype=self.dtype)
        points = plan_points(params, tried, self.prompt_tokens, self.length)
        texts = texts_in_turns(params, self.text, self.length, self.texts, self.skip)
        with resumable(self.out):
            run(
                params,
                texts,
                points,
                self.out,
                model=self.model,
                prompt_tokens=self.prompt_tokens,
                rows=self.rows,
            )
        return print_report(self.out)
