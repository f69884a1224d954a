"""The standard streams as a shell may leave them: closed, full, or read by nobody any more."""

from __future__ import annotations

import contextlib
import io
import os
import sys

from raas_jax import checks


def prepare() -> None:
    """Gives closed streams an end (input is empty, output goes nowhere), and output any character.

    A terminal that lacks a character shows that it does, and the answer goes on.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            # It takes the number of the closed stream, which no other file can then get.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def drop_output() -> None:
    """What cannot be written goes nowhere, so that Python does not complain of it at its end."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        # A stream that a test or a notebook put there has no number.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def typed(text: str) -> str:
    """What was typed as an argument, as UTF-8 also where the locale knows only ASCII."""
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def say(message: str) -> None:
    """A line on stderr; control characters, which files may hold, do not reach the terminal."""
    with contextlib.suppress(OSError, ValueError):
        print(checks.printable(f"raas-jax: {message}"), file=sys.stderr, flush=True)
