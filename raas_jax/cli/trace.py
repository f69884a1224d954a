"""`raas-jax trace`: pictures of one derivation, and a page to look through it."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from raas_jax.cli.errors import note
from raas_jax.cli.options import (
    Dtype,
    MaxNewTokens,
    Model,
    PolicyOptions,
    Within,
    readable_bytes,
    unset,
)
from raas_jax.lab.limits import MOST_DEFINITIONS

if TYPE_CHECKING:
    from raas_jax.lab.trace import Trace as Traced


@dataclasses.dataclass
class Trace:
    """Draw what one derivation does with its cache."""

    out: Annotated[str, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """Folder for the pictures and the page."""
    prompt: Annotated[str | None, tyro.conf.Positional, unset("[PROMPT]")] = None
    """Text to answer, as in "a=4; b=9; c=a+b; ? c"."""
    definitions: Annotated[int | None, unset("INT"), Within(1, MOST_DEFINITIONS)] = None
    """Definitions of a problem that the demo has not seen, in place of PROMPT."""
    model: Model = "demo"
    heads: Annotated[str | None, unset("LAYER.HEAD,...")] = None
    """Key/value heads to show, from 0; by default those that read milestones and prompt most.
    Layers that see a window are not counted."""
    max_new_tokens: MaxNewTokens = None
    """Most tokens of the answer; by default half as much again as the right derivation takes."""
    dtype: Dtype = None
    policy: PolicyOptions = dataclasses.field(default_factory=PolicyOptions)

    def run(self) -> int:
        """Writes the files and says on standard output what is in them."""
        from raas_jax import load
        from raas_jax.lab.trace import trace
        from raas_jax.lab.trace.draw import pyplot
        from raas_jax.policies import Dense

        pyplot()  # Before anything is computed.
        prompt, policy, heads = self._prompt(), self.policy.create(), parse_heads(self.heads)
        folder = Path(self.out)
        folder.mkdir(parents=True, exist_ok=True)
        params = load(self.model, dtype=self.dtype)
        see = partial(trace, params, prompt, max_new_tokens=self.max_new_tokens)
        seen = [see(Dense(page_size=policy.page_size), heads=heads)]
        if not isinstance(policy, Dense):
            seen.append(see(policy, heads=list(seen[0].attention)))
        print(*write(seen, folder), sep="\n")
        return 0

    def _prompt(self) -> str:
        from raas_jax.lab.tasks.lemma import Knobs, draw, normalise

        if (self.prompt is None) == (self.definitions is None):
            raise ValueError(
                'give a prompt, as in `raas-jax trace "a=4; b=9; c=a+b; ? c"`, or --definitions N '
                "for a drawn problem, and not both."
            )
        if self.definitions is not None:
            return draw("test", 0, 0, Knobs(self.definitions, self.definitions)).prompt
        assert self.prompt is not None
        return normalise(self.prompt) if self.model == "demo" else self.prompt


def write(traces: list[Traced], folder: Path) -> list[str]:
    """Draws the pictures and the page of the last trace, beside the others; gives what to print."""
    from raas_jax.lab.trace import draw_milestones, draw_pages, draw_waterfall, write_page

    last = traces[-1]
    said = [summary(each) for each in traces]
    if not last.evicted() and len(traces) > 1:
        note(
            "nothing was forgotten, since the answer fits the budget; a smaller --budget, such as "
            f"{max(2, last.pages // 4) * last.recording.page_size}, shows more."
        )
    waterfall, pages, page = folder / "waterfall.png", folder / "pages.png", folder / "index.html"
    draw_waterfall(traces, waterfall)
    draw_pages(last, pages)
    pictures = [
        (
            "Attention over time",
            "Each row is a token as it is written, each column a token that it may look at. "
            "Columns that stay bright for a while and then fade are milestones; in the prompt, "
            "what lights up again after long is a phoenix token.",
            waterfall,
        ),
        (
            "Pages in the cache",
            "Each column is a page of the answer, from the step that began it downwards, until "
            "the policy forgets it.",
            pages,
        ),
    ]
    if last.milestones is not None and last.milestones.lookups:
        lost = folder / "milestones.png"
        draw_milestones(last, lost)
        pictures.append(
            (
                "What was lost while it was still needed",
                "Each row is a name, from its first value to its last use. Blue: all layers and "
                "heads can still read a value of it; vermillion: none can.",
                lost,
            )
        )
    write_page(last, pictures, page)
    files = ", ".join(str(png) for _, _, png in pictures)
    return [*said, f"Pictures: {files}", f"To look through: {page}"]


def summary(trace: Traced) -> str:
    """One line on how an answer went."""
    from raas_jax.lab.trace.draw import error_text, name

    right = ""
    if trace.problem is not None:
        right = "; every token right" if trace.first_error is None else f"; {error_text(trace)}"
    return (
        f"{name(trace)}: {len(trace.recording.tokens)} tokens, {trace.evicted()} of {trace.pages} "
        f"pages forgotten, keys and values {readable_bytes(trace.kv_bytes)}{right}"
    )


def parse_heads(text: str | None) -> list[tuple[int, int]] | None:
    """`1.0,3.1` → layer and key/value head of each. Raises ValueError."""
    if text is None:
        return None
    found = [re.fullmatch(r"\s*(\d{1,6})\.(\d{1,6})\s*", part) for part in text.split(",")]
    heads = [(int(each[1]), int(each[2])) for each in found if each]
    if len(heads) < len(found):
        raise ValueError(f"--heads is {text!r}; write layer.head, as in 1.0,3.1.")
    return heads
