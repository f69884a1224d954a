"""`raas-jax allot`: how much of a budget each layer and head of a model should have."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from raas_jax.checks import MOST_TOKENS
from raas_jax.cli import options, tables
from raas_jax.cli.prompts import Prompt, demo_prompts, read_prompts
from raas_jax.lab.limits import MOST_PROBLEMS

if TYPE_CHECKING:
    from raas_jax.params import Params
    from raas_jax.policies import Allotment, Budgeted

DEMO_DEFINITIONS, DEMO_PROMPT, DEMO_LENGTH = 12, 72, 212
"""Of the demo's problems; tokens of the longest prompt, and what half of the answers reach."""
BUDGETS = (64, 128, 256, 512, 1024)
"""Tokens, for which the table says what to expect; in whole pages."""


@dataclasses.dataclass
class Allot:
    """Find how much of a budget each head should have."""

    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL", help=options.SOURCE)]
    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = "allotment.json"
    """File to write; --allotment FILE uses it. In the model's folder, --allotment auto finds it."""
    text: options.Texts = ()
    prompts: options.File = None
    """File with one prompt per line; texts are these with the model's answers, from --length on."""
    policy: Annotated[str, tyro.conf.arg(metavar="NAME[:OPTION=VALUE...]")] = "raas"
    """Decides what a head keeps; policies of other names can use the file, too."""
    budget: Annotated[int | None, options.Within(2, MOST_TOKENS), options.unset("INT")] = None
    """Refines the shares for this budget, on the model as it is when it forgets that much."""
    texts: options.Problems = 2
    """Texts of each kind."""
    skip: Annotated[int, options.Within(0, MOST_PROBLEMS)] = 12
    """Texts of each kind to pass over: those that eval fidelity reads."""
    length: options.Tokens = 2048
    """Tokens of a text; a head's needs are found up to it."""
    prompt_tokens: options.Tokens = 128
    """How many of them are the prompt, which is kept."""
    picture: Annotated[str | None, options.unset("FILE")] = None
    """Draws pages by layer and head, and some curves, as PNG."""
    dtype: options.Dtype = None

    def run(self) -> int:
        """Writes the file, and says what it is expected to save."""
        from raas_jax import load, policies
        from raas_jax.allotting import allot, simulated

        options.check_out("--out", self.out)
        if self.picture is not None:
            options.check_out("--picture", self.picture)
            if Path(self.picture).resolve() == Path(self.out).resolve():
                raise ValueError(f"--picture is {self.picture!r}, as is --out; give another file.")
            # Before the work, as matplotlib may not be there.
            from raas_jax.lab.allotments.picture import BUDGET, draw
        policy = simulated(policies.parse(self.policy))
        if self.budget is not None:  # As the policy would have it.
            policy = dataclasses.replace(policy, budget=self.budget)
        self._check_lengths(policy)
        params = load(self.model, dtype=self.dtype, layers="stacked")
        began = time.perf_counter()
        texts, kinds = self._texts(params)
        prompt_tokens = DEMO_PROMPT if self._of_demo else self.prompt_tokens
        found = allot(params, texts, policy=policy, budget=self.budget, prompt_tokens=prompt_tokens)
        found = dataclasses.replace(found, made={**found.made, "kinds": kinds})
        found.write(self.out)
        seconds = time.perf_counter() - began
        print(
            f"{self.out}: {found.layers} layers x {found.heads} heads, {len(texts)} texts of "
            f"{len(texts[0])} tokens ({', '.join(kinds)}), {seconds:.0f} s\n"
        )
        print(expected(found, policy) if self.budget is None else refined(found, policy))
        if self.picture is not None:
            draw(found, self.picture, policy, self.budget or BUDGET)
            print(f"\n{self.picture}: pages by layer and head")
        return 0

    @property
    def _of_demo(self) -> bool:
        return self.model == "demo" and not self.text and self.prompts is None

    def _check_lengths(self, policy: Budgeted) -> None:
        """Raises ValueError for texts that are too short, and for what would not be heeded."""
        from raas_jax.allotting import room

        unheeded: dict[str, str] = {}
        if self._of_demo:
            why = f"without --text the demo reads derivations of its own, of {DEMO_LENGTH} tokens"
            unheeded = dict.fromkeys(("texts", "skip", "length", "prompt_tokens"), why)
        elif self.prompts is not None:
            unheeded = dict.fromkeys(("text", "texts", "skip"), "--prompts says what is read")
        for name, why in unheeded.items():
            if (given := getattr(self, name)) != getattr(Allot, name):
                raise ValueError(f"{name} is {given}, but {why}. Leave it out.")
        lengths = (DEMO_LENGTH, DEMO_PROMPT) if self._of_demo else (self.length, self.prompt_tokens)
        room(*lengths, policy)

    def _texts(self, params: Params) -> tuple[list[Sequence[int]], list[str]]:
        """Texts of one length, and their kinds."""
        if self._of_demo:
            prompts = demo_prompts(32, DEMO_DEFINITIONS, DEMO_DEFINITIONS)
            return _answered(params, prompts, DEMO_LENGTH), ["derivations"]
        if self.prompts is not None:
            return _answered(params, read_prompts(self.prompts), self.length), ["answers"]
        from raas_jax.lab.fidelity.texts import texts_in_turns

        texts = texts_in_turns(params, self.text, self.length, self.texts, self.skip)
        kinds = sorted({text.kind for text in texts})
        return [text.tokens for text in texts], kinds


def _answered(params: Params, prompts: list[Prompt], length: int) -> list[Sequence[int]]:
    """Prompts with the model's own greedy answers, those that are long enough, cut to one length.

    Raises ValueError where there are none.
    """
    from raas_jax import tokenizer
    from raas_jax.lab.runs.planning import with_answers

    ids, _ = tokenizer.encode(params, prompts)
    answered = with_answers(params, ids, max(1, length - min(map(len, ids))))
    found: list[Sequence[int]] = [each[:length] for each in answered if len(each) >= length]
    if not found:
        longest = max(map(len, answered))
        raise ValueError(
            f"length is {length}, but no prompt with its answer is as long; the longest has "
            f"{longest} tokens. Use a smaller --length, or other prompts."
        )
    return found


def expected(found: Allotment, policy: Budgeted) -> str:
    """A table of what budgets are expected to cost, shared out evenly and by the allotment."""
    rows, P, reserve = [], policy.page_size, policy.least_pages
    for mean in sorted({max(reserve + 1, budget // P) for budget in BUDGETS}):
        pages = found.pages(mean, P, reserve)
        even, given = (found.loss(each, P) for each in (pages * 0 + mean, pages))
        least, most = int(pages.min()) * P, int(pages.max()) * P
        rows.append([f"{mean * P}", f"{even:.3g}", f"{given:.3g}", f"{least}-{most}"])
    table = tables.markdown(["Budget", "All the same", "Allotted", "Tokens by head"], rows)
    return table.rstrip() + (
        "\n\nExpected KL divergence from the dense model, nats per token, each head for itself."
    )


def refined(found: Allotment, policy: Budgeted) -> str:
    """What the texts lose under the budget that the shares were refined for."""
    P, made = policy.page_size, found.made
    pages = found.pages(made["budget"] // P, P, policy.least_pages)
    return (
        f"Budget {made['budget']}: {int(pages.min()) * P}-{int(pages.max()) * P} tokens by head. "
        f"KL divergence of these texts from the dense model,\nnats per token: {made['evenly']:.3g} "
        f"if all have the same, {made['refined']:.3g} as refined."
    )
