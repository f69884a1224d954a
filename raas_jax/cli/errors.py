"""Errors of the library, which name arguments, in the flags of the command line."""

from __future__ import annotations

import dataclasses
import re
import typing

import tyro

from raas_jax.cli.streams import say

WRONG, FAILED, INTERRUPTED = 2, 1, 130
"""Exit codes: what the user can mend, what nobody foresaw, and Ctrl-C."""
EXTRAS = {
    "matplotlib": "plots",
    **dict.fromkeys(("filelock", "optax"), "lab"),
    **dict.fromkeys(("datasets", "lm_eval", "math_verify"), "eval"),
}
"""Which extra of this package brings a package."""


def note(text: str) -> None:
    """Says on stderr what a user should know beside the results."""
    say(f"note: {text}")


def explain(error: Exception, command: type) -> int:
    """Says on stderr, in one line, what went wrong; gives the exit code."""
    if (mendable := _mendable(error)) is not None:
        say(f"error: {in_flags(mendable, command)}")
        return WRONG
    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
    say(f"internal error: {what} (run with --debug for where; please report it)")
    return FAILED


def _mendable(error: Exception) -> str | None:
    """What a user should know; None for what is a mistake of this program."""
    text = str(error)
    if isinstance(error, ImportError):
        return _missing(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text:
        where = "this machine" if isinstance(error, MemoryError) else "the device"
        return f"{where} is out of memory; `raas-jax memory` says what a run takes"
    if isinstance(error, RecursionError):
        return "what was given is nested too deep"
    if isinstance(error, FileNotFoundError) and error.errno and error.filename is None:
        return "the current folder is no longer there; change to another"
    if isinstance(error, OSError) and error.strerror and text.startswith("[Errno"):
        named = "" if error.filename is None else f"{error.filename}: "
        return f"{named}{error.strerror[:1].lower()}{error.strerror[1:]}"
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in text:
        return " ".join(text.split())
    return text if isinstance(error, ValueError | TypeError | OSError) else None


def _missing(error: ImportError) -> str | None:
    package = (error.name or "").partition(".")[0]
    if extra := EXTRAS.get(package):
        every = "" if extra == "eval" else ", or '.[eval]' for all that `eval` can do"
        return (
            f"{package} is not installed: in the checkout of raas_jax, pip install -e "
            f"'.[{extra}]'{every}"
        )
    if isinstance(error, ModuleNotFoundError) and package not in ("", "raas_jax"):
        return f"{package} is not installed: pip install {package}"
    return str(error) if error.name is None else None


def flags(command: type) -> dict[str, str]:
    """The flag of every option of a command by its Python name, those of its groups included."""
    found: dict[str, str] = {}
    for name, hint in typing.get_type_hints(command, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found |= flags(typing.cast(type, hint))
        elif tyro.conf.Positional not in typing.get_args(hint):
            found[name] = "--" + name.replace("_", "-")
    return found


def in_flags(message: str, command: type) -> str:
    """The message with `max_new_tokens is 0; ...` as `--max-new-tokens is 0; ...`.

    Only for options of the command, at the beginning and in hints such as `Use top_k=5`: elsewhere
    the same word may mean something else.
    """
    known = flags(command)
    if "model" in known:
        known["source"] = known["model"]  # What `raas_jax.load` calls it.
    argument = r"^\w+(?=(?:\[\d+\])* (?:is|are)\b)|(?<=\bUse )\w+(?==)"
    return re.sub(argument, lambda found: known.get(found[0], found[0]), message)
