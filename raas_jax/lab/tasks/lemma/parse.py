"""A problem as a person types it: spaces as they like, clear words when something is wrong."""

import re

from raas_jax.lab.tasks.lemma.language import DIGITS, NAMES, OPERATORS
from raas_jax.lab.tasks.lemma.problems import Definition, Problem

_WORD = re.compile(r"\s*([A-Za-z_]\w*|\d+|\S)")
_NAMES = frozenset(NAMES)
EXAMPLE = "a = 4; b = 9; c = a + b; ? c"


def _name(word: str, where: str) -> str:
    if word not in _NAMES:
        raise ValueError(
            f"problem: {where} uses {word!r}, which is not a name the model knows; use a letter "
            "a to z, or a syllable such as ba, de, ki, lo, mu (bdfgklmnprstvz with aeiou)"
        )
    return word


def _definition(words: list[str], known: dict[str, int], number: int) -> Definition:
    where = f"definition {number} ({' '.join(words)!r})"
    if len(words) < 3 or words[1] != "=":
        raise ValueError(
            f"problem: {where} should read `name = digit` or `name = name + name`; "
            f"for example {EXAMPLE!r}"
        )
    name = _name(words[0], where)
    if name in known:
        raise ValueError(
            f"problem: {where} repeats {name!r}, defined already as number {known[name]}; "
            "give it a name of its own"
        )
    if len(words) == 3:
        value = words[2]
        if value.isdigit() and value not in DIGITS:
            raise ValueError(
                f"problem: {where} has the value {value}; values are single digits 0 to 9, "
                "since the arithmetic is modulo ten"
            )
        if value in DIGITS:
            return Definition(name, value)
        raise ValueError(
            f"problem: {where} should give a digit, or two names with one of "
            f"{' '.join(OPERATORS)} between them"
        )
    operator = words[3]
    if operator not in OPERATORS:
        raise ValueError(
            f"problem: {where} uses the operator {operator!r}; the model knows "
            f"{' '.join(OPERATORS)} only (no division)"
        )
    if len(words) != 5:
        raise ValueError(
            f"problem: {where} should have two operands; give parts a name of their own: "
            "`d = a + b; e = d - c`"
        )
    for operand in (words[2], words[4]):
        if operand.isdigit():
            raise ValueError(
                f"problem: {where} has the number {operand} as an operand; operands are names, "
                f"so define it first, as in `k = {int(operand) % 10}`"
            )
        if _name(operand, where) not in known:
            raise ValueError(
                f"problem: {where} uses {operand!r} before it is defined; define it on an "
                "earlier line"
            )
    return Definition(name, words[2], operator, words[4])


def parse_problem(text: str) -> Problem:
    """Read a typed problem such as `a=4; b=9; c=a+b; ? c`.

    Definitions end at `;` or at the end of a line; spaces do not matter. Without a question the
    last definition is asked for.

    Raises:
      ValueError: with the definition, what is wrong with it, and what to write instead.
    """
    definitions: list[Definition] = []
    known: dict[str, int] = {}
    question = ""
    pieces = re.split(r"[;\n]", re.sub(r"\?", ";?", text))
    for piece in pieces:
        words = _WORD.findall(piece)
        if not words or words == [":"]:
            continue
        if question:
            raise ValueError(
                f"problem: {' '.join(words)!r} follows the question; the question comes last"
            )
        if words[0] == "?":
            words = [word for word in words[1:] if word != ":"]
            if len(words) != 1:
                raise ValueError(
                    f"problem: the question {' '.join(['?', *words])!r} should name one "
                    "definition, as in `? c`"
                )
            question = _name(words[0], "the question")
            continue
        definitions.append(_definition(words, known, len(definitions) + 1))
        known[definitions[-1].name] = len(definitions)
    if not definitions:
        raise ValueError(f"problem: no definition found; write for example {EXAMPLE!r}")
    question = question or definitions[-1].name
    if question not in known:
        raise ValueError(
            f"problem: the question asks for {question!r}, which is not defined; ask for one of "
            f"{', '.join(known)}"
        )
    return Problem(tuple(definitions), question)


def normalise(text: str) -> str:
    """The prompt that the model was trained on, for a problem as a person typed it."""
    return parse_problem(text).prompt
