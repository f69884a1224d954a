"""Seeded draws of problems, in three splits that no problem can share.

A problem belongs to the split that a hash of its prompt names, so the splits are disjoint by
construction, whatever the seeds.
"""

import bisect
import dataclasses
import functools
import hashlib
import itertools
import random

from raas_jax.lab.tasks.lemma.language import MODULUS, NAMES, compute
from raas_jax.lab.tasks.lemma.problems import Definition, Problem

SPLITS = ("train", "validation", "test")
_SHARES = 16  # one sixteenth of all problems is test, one validation, the rest training


@dataclasses.dataclass(frozen=True)
class Knobs:
    """What a drawn problem looks like."""

    smallest: int = 24  # definitions
    largest: int = 48  # definitions, at most the 96 names there are
    literal_share: float = 0.15  # of the definitions after the second
    reuse_exponent: float = 1.0  # an operand lies d lines back with weight d ** -exponent
    late_facts: int = 0  # values found early, used only in as many lines at the end
    product_share: float = 0.2  # of the operators; the rest is + and - alike
    question_share: float = 0.25  # the question is about one of this last share of definitions

    def __post_init__(self) -> None:
        if not 1 <= self.smallest <= self.largest <= len(NAMES):
            raise ValueError(
                f"smallest={self.smallest}, largest={self.largest}: wanted "
                f"1 <= smallest <= largest <= {len(NAMES)}; change the number of definitions"
            )
        if not 0 <= self.late_facts <= self.smallest // 4:
            raise ValueError(
                f"late_facts={self.late_facts}: wanted between 0 and smallest // 4 = "
                f"{self.smallest // 4}; lower it, or raise smallest"
            )


def split_of(prompt: str) -> str:
    """The split that the problem with this normalised prompt belongs to."""
    share = hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % _SHARES
    return {0: "test", 1: "validation"}.get(share, "train")


@functools.lru_cache(maxsize=64)
def _cumulative(exponent: float) -> tuple[float, ...]:
    return tuple(itertools.accumulate(d**-exponent for d in range(1, len(NAMES) + 1)))


def _distance(source: random.Random, furthest: int, exponent: float) -> int:
    """A distance in [1, furthest] with weight d ** -exponent: the heavy tail of reuse."""
    cumulative = _cumulative(exponent)
    return 1 + bisect.bisect_left(cumulative, source.random() * cumulative[furthest - 1])


def _operator(source: random.Random, left: int, right: int, product_share: float) -> str:
    # A product that gives zero is drawn again: zeros multiply, and long problems would end in them.
    if source.random() < product_share and compute(left, "*", right):
        return "*"
    return source.choice("+-")


def draw_problem(source: random.Random, knobs: Knobs) -> Problem:
    """One problem, from any split, with `source` as the only randomness."""
    count = source.randint(knobs.smallest, knobs.largest)
    names = source.sample(NAMES, count)
    late = knobs.late_facts
    # Facts lie in the first half and are computed, so that the prompt does not give them away.
    facts = sorted(source.sample(range(2, 2 + max(late, (count - 2) // 2 - late)), late))
    definitions: list[Definition] = []
    values: list[int] = []

    def operand(index: int, without: int = -1) -> int:
        while True:
            chosen = index - _distance(source, index, knobs.reuse_exponent)
            if chosen != without and chosen not in facts:
                return chosen

    for index in range(count):
        name = names[index]
        at_end = index - (count - late)
        literal = index < 2 or (
            index not in facts and at_end < 0 and source.random() < knobs.literal_share
        )
        if literal:
            values.append(source.randrange(MODULUS))
            definitions.append(Definition(name, str(values[-1])))
            continue
        if at_end >= 0:
            # The chain of late lines passes each fact on to the last one.
            previous = index - 1 if at_end else operand(index)
            pair = [facts[at_end], previous]
            source.shuffle(pair)
            left, right = pair
        else:
            left = operand(index)
            # Now and then a name is its own partner, as in `b = a + a`.
            right = operand(index, without=left if source.random() < 0.97 else -1)
        operator = _operator(source, values[left], values[right], knobs.product_share)
        values.append(compute(values[left], operator, values[right]))
        definitions.append(Definition(name, names[left], operator, names[right]))
    last = max(1, int(count * knobs.question_share))
    asked = count - 1 if late else source.randrange(count - last, count)
    return Problem(tuple(definitions), names[asked])


def draw(split: str, seed: int, index: int, knobs: Knobs) -> Problem:
    """Problem `index` of the stream of this split and seed: the same on every machine."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r}: wanted one of {', '.join(SPLITS)}")
    source = random.Random(f"{split}/{seed}/{index}")
    problem = draw_problem(source, knobs)
    while split_of(problem.prompt) != split:
        problem = _renamed(problem, source)
    return problem


def _renamed(problem: Problem, source: random.Random) -> Problem:
    fresh = source.sample(NAMES, len(problem.definitions))
    rename = dict(zip((item.name for item in problem.definitions), fresh, strict=True))
    definitions = tuple(
        Definition(*(rename.get(word, word) for word in dataclasses.astuple(item)))
        for item in problem.definitions
    )
    return Problem(definitions, rename[problem.question])
