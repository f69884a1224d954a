"""Which tokens of a derivation are live milestones, and what an ideal cache would keep.

A *statement* is a name with its value right after it, such as `c 3`. Writing the value of a name
again (`c 3` as an operand, or in the answer) is a *look-up*: it needs one earlier statement of
that name. The newest one serves it, so each statement is live until the look-up that follows it,
and dead afterwards, because that look-up states the value anew. The ideal cache therefore holds,
beside the prompt and the line being written, one statement for each name that is still needed.

Positions count the tokens of `<bos>` + prompt + derivation, from 0, as the model sees them.
"""

import bisect
import dataclasses
from collections.abc import Sequence

from raas_jax.lab.tasks.lemma.language import DIGITS, NAMES
from raas_jax.lab.tasks.lemma.problems import Problem


@dataclasses.dataclass(frozen=True)
class Lookup:
    """One value that is copied from an earlier line."""

    position: int  # of the value that is written; the cache is read one step before
    name: str
    sources: tuple[int, ...]  # positions of the name's earlier values, newest last; any one serves


@dataclasses.dataclass(frozen=True)
class Liveness:
    """Marks for every token of one problem and its right derivation."""

    prompt_tokens: int  # `<bos>` and the prompt: positions below this are the prompt
    line_starts: tuple[int, ...]  # first position of every derivation line
    needed_until: tuple[int, ...]  # by position: of the look-up it serves last; -1 if of none
    lookups: tuple[Lookup, ...]  # in the order they are written

    @property
    def tokens(self) -> int:
        return len(self.needed_until)

    def mark(self, position: int, now: int) -> str:
        """`prompt`, `line` (of the line being written), `live` or `dead` as token `now` is due.

        Needs position < now: a token that is not written yet has no mark.
        """
        if not 0 <= position < now:
            what = f"position={position}: wanted 0 <= position < now={now}"
            raise ValueError(f"{what}; ask about a token that is already written")
        if position < self.prompt_tokens:
            return "prompt"
        if position >= self._line_start(now):
            return "line"
        return "live" if self.needed_until[position] >= now else "dead"

    def ideal(self, now: int) -> frozenset[int]:
        """Positions that an ideal cache holds, beside the prompt, as token `now` is written."""
        return frozenset(
            position
            for position in range(self.prompt_tokens, now)
            if self.mark(position, now) != "dead"
        )

    def _line_start(self, now: int) -> int:
        index = bisect.bisect_right(self.line_starts, now) - 1
        return self.line_starts[index] if index >= 0 else self.prompt_tokens


def liveness(problem: Problem) -> Liveness:
    """Marks for `problem`, from its text alone."""
    return written(1 + len(problem.prompt_words), problem.derivation_words)


def written(prompt_tokens: int, words: Sequence[str]) -> Liveness:
    """Marks of a derivation as a model wrote it, right or wrong.

    A name with a digit right after it is a statement; it looks up the statements of that name
    before it, if there are any. `prompt_tokens` stand before the `words`, one for each token.
    """
    needed_until = [-1] * (prompt_tokens + len(words))
    starts: list[int] = []
    lookups: list[Lookup] = []
    stated: dict[str, list[int]] = {}
    for index, word in enumerate(words):
        position = prompt_tokens + index
        if index == 0 or words[index - 1] == ";":
            starts.append(position)
        if index == 0 or word not in DIGITS or words[index - 1] not in NAMES:
            continue
        name = words[index - 1]
        if name in stated:
            lookups.append(Lookup(position, name, tuple(stated[name])))
            # Both tokens of a statement: the name is what the look-up finds, the value what it
            # reads.
            for served in (stated[name][-1] - 1, stated[name][-1]):
                needed_until[served] = position
        stated.setdefault(name, []).append(position)
    return Liveness(prompt_tokens, tuple(starts), tuple(needed_until), tuple(lookups))
