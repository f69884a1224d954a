r"""Is the answer of this text that one? The rules that are followed.

`statement` finds where a text states its answer, `typography` turns that into LaTeX, and
math-verify (https://github.com/huggingface/Math-Verify) reads and compares it. Only words, ratios,
number bases and units are compared here, since math-verify passes over them.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from raas_jax.lab.tasks.grading.statement import (
    Statement,
    after_thought,
    boxed,
    last_sentence,
    marked,
    taken_back,
)
from raas_jax.lab.tasks.grading.typography import quantity, typeset

# The pool keeps the time. An interval may be put as an inequality.
_LIMITS: dict[str, Any] = {
    "allow_set_relation_comp": True,
    "timeout_seconds": None,
    "raise_on_error": True,
}
_WRAPPER = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_BASE = re.compile(r"\d_\{?(\d+)\}?\$?$")
_RATIO = re.compile(r"[^:{}]+(?::[^:{}]+)+")
_NUMBER = re.compile(r"\A[^=]*\d[^=]*\Z")
# `2n = 9` and `n^2 = 9`, of which math-verify takes the 9.
_UNSOLVED = re.compile(r"\A[\s\d{}]*(?:\d\s*[A-Za-z]|[A-Za-z]\s*\^)[\s\d{}]*=")
_OPTION = re.compile(r"option |choice |answer ")


class Verdict(NamedTuple):
    """A graded answer.

    Attributes:
      correct: whether it equals the reference.
      answer: what was taken for the answer; None if nothing was found.
      error: why it could not be graded; None if it was.
    """

    correct: bool
    answer: str | None = None
    error: str | None = None


Grader = Callable[[str, str], "bool | Verdict"]


def stated(text: str) -> Statement | None:
    """What a text marks as its answer; None if it marks nothing, empty if it is taken back.

    A box counts before other marks, unless a later one states an answer that can be read.
    """
    text = after_thought(text)
    box, marks = boxed(text), marked(text)
    after = [mark for mark in marks if box is None or mark.start > box.end]
    readable = [mark for mark in after if _NUMBER.search(mark.text) and quantity(mark.text)]
    found = next(iter(readable), None) or box or next(iter(after), None)
    return found._replace(text="") if found and taken_back(text, found) else found


def unwrap(text: str) -> str:
    r"""`(073)` for `\textbf{(073)}`: without commands that only choose a font."""
    text = text.strip()
    while found := _WRAPPER.fullmatch(text):
        text = found[1].strip()
    return text


def word(text: str) -> str | None:
    r"""`east` for `\text{East}`, `c` for `\textbf{(C)}`; None for what is not one plain word."""
    bare = " ".join(unwrap(text.strip().strip("$`")).strip(" .*`").casefold().split())
    bare = re.sub(r"^\(?(.*?)\)?$", r"\1", _OPTION.sub("", bare)).strip()
    return bare if re.fullmatch(r"[^\W\d_]+(?:[ -][^\W\d_]+)*", bare) else None


def same(gold: str, answer: str, exact: bool = True) -> bool:
    """Whether an answer equals the reference. Raises what math-verify raises."""
    wanted, given = word(gold), word(answer)
    # Letter by letter, "sane" and "seen" are products; a single letter may be a variable.
    if wanted is not None and given is not None:
        return wanted == given
    if wanted is not None and len(wanted) > 1:
        return False
    found = quantity(unwrap(answer), exact)
    if found is None:
        return False
    maths, unit = found
    gold_maths, gold_unit = quantity(unwrap(gold)) or (typeset(gold), "")
    if not _alike(gold_unit, unit):
        return False
    in_base, given_base = _BASE.search(gold_maths), _BASE.search(maths)
    # math-verify ignores the base. A reference may leave its out, as its problem says it.
    if given_base and given_base[1] != (in_base[1] if in_base else "10"):
        return False
    ratios = _RATIO.fullmatch(gold_maths), _RATIO.fullmatch(maths)
    if any(ratios):  # Of `3:1` math-verify reads the 3.
        if not all(ratios):
            return False
        gold_maths, maths = (f"({each.replace(':', ',')})" for each in (gold_maths, maths))
    if "=" not in gold_maths and _UNSOLVED.search(re.sub(r"\\[a-z]+", "", maths)):
        return False
    return _compare(gold_maths, maths)


def grade(gold: str, text: str) -> Verdict:
    """Marks a text against the reference answer."""
    answer = stated(text)
    if answer is None:
        text = after_thought(text)
        answer = last_sentence(text)
    if answer is None:
        return Verdict(False)
    return Verdict(same(gold, answer.text, answer.exact), answer.text.strip())


def _alike(unit: str, other: str) -> bool:
    """Whether two units may be the same: `cm` and `centimeters`, `square inches` and `inches^2`."""
    short, long = sorted(
        (re.sub(r"\b(?:square|cubic|sq)\b|[\W\d]", "", each.casefold()) for each in (unit, other)),
        key=len,
    )
    letters = iter(long)
    return not short or (short[0] == long[0] and all(letter in letters for letter in short))


def _read(maths: str) -> list[Any]:
    from math_verify import parse

    found: list[Any] = parse(f"${maths}$", parsing_timeout=None, raise_on_error=True)
    return found


def _compare(gold: str, answer: str) -> bool:
    from math_verify import verify

    # Six decimals, as math-verify has it; more where the reference has more.
    decimals = max(6, *map(len, re.findall(r"\.(\d+)", gold)), 0)
    failed: Exception | None = None
    for wanted in _read(gold):
        for given in _read(answer):
            try:
                if verify(wanted, given, decimals, **_LIMITS):
                    return True
            except Exception as error:  # sympy raises whatever its depths raised.
                failed = error
    if failed is not None:
        raise failed
    return False
