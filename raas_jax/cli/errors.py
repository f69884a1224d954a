"""Errors of the library, which name arguments, in the flags of the command line."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing

import tyro

from raas_jax import checks


def note(text: str) -> None:
    """Says on stderr what a user should know beside the results."""
    print(f"raas-jax: note: {checks.printable(text)}", file=sys.stderr)


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
