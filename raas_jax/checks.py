"""Checks of values that come from outside: each names what was given, and what would be right."""

from __future__ import annotations

import math
import operator
import re
import reprlib
from collections.abc import Callable, Collection, Iterable
from typing import Any

INT32_MAX = 2**31 - 1
MOST_TOKENS = 2**27
"""More than any cache holds: no length, budget or count of tokens is above it."""
MOST_ROWS = 2**16
"""Of one batch."""
MOST_SAMPLES = 2**20
"""Answers to one request or problem."""

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_reprs = reprlib.Repr()
_reprs.maxstring = _reprs.maxother = 80


def short(value: object) -> str:
    """The value as Python writes it, in one line and cut where it is long; never fails."""
    try:
        return re.sub(r"\s*\n\s*", " ", _reprs.repr(value))
    except ValueError:  # An int of more digits than Python turns into text.
        return "a number of too many digits"


def integer(name: str, value: Any, least: int, most: int = INT32_MAX) -> int:
    """The value as a Python int; NumPy's and JAX's integers are taken too.

    Raises:
      TypeError: it is something else, a bool included. ValueError: not from `least` to `most`.
    """
    try:
        number = None if is_bool(value) else operator.index(value)
    except Exception:  # A deleted array of JAX raises what it likes, too.
        number = None
    if number is None:
        raise TypeError(f"{name} is {short(value)}; it must be an int.")
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} is {short(number)}; it must be an int of {bound}.")
    return number


def real(name: str, value: Any, wanted: str, least: float, most: float = math.inf) -> float:
    """The value as a finite Python float from `least` to `most`; `wanted` says so in words.

    Raises:
      TypeError: it is no number. ValueError: it is not finite, or out of range.
    """
    try:
        if is_bool(value) or isinstance(value, str | bytes):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {short(value)}; it must be {wanted}.") from None
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and least <= number <= most):
        raise ValueError(f"{name} is {short(value)}; it must be {wanted}.")
    return number


def choice(name: str, value: Any, choices: Collection[str]) -> str:
    """The value, if it is one of `choices`. Raises ValueError."""
    if isinstance(value, str) and value in choices:
        return value
    known = ", ".join(map(repr, choices))
    raise ValueError(f"{name} is {short(value)}; choose one of {known}.")


def flag(name: str, value: Any) -> bool:
    """The value, if it is True or False; raises ValueError."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {short(value)}; it must be True or False.")
    return value


def entries(name: str, values: Any, wanted: str) -> list[Any] | tuple[Any, ...]:
    """The values, if they are a list or a tuple, which `wanted` says in words, or ValueError."""
    if not isinstance(values, list | tuple):
        raise ValueError(f"{name} is {short(values)}; it must be a tuple of {wanted}.")
    return values


def field(instance: Any, name: str, check: Callable[[str, Any], Any]) -> None:
    """Puts a field of a frozen dataclass into its own type; raises ValueError."""
    try:
        object.__setattr__(instance, name, check(name, getattr(instance, name)))
    except TypeError as error:
        raise ValueError(str(error)) from None


def whole_text(name: str, text: str) -> str:
    """The text, if it is of whole characters. Raises ValueError."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is {short(text)}, which is no Unicode text: character {error.start} is half "
            f"of one, or a byte that was not UTF-8 ({text[error.start]!a}). Give it as UTF-8."
        ) from None
    return str(text)


def first_line(error: object) -> str:
    """What an error of somebody else says first, or its name where it says nothing."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return printable(line if len(line) <= 300 else line[:297] + "...")


def printable(text: str) -> str:
    """The text as a terminal may show it: what would move its cursor or colour it is escaped."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def is_many(value: object) -> bool:
    """Whether it has entries: not a text, bytes or a single number of an array library."""
    single = isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", 1) == 0
    return isinstance(value, Iterable) and not single


def is_bool(value: object) -> bool:
    """Whether it is a truth value, of Python or of an array library."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"
