"""Policies from text: `raas`, `h2o:recent_fraction=0.25`, `my_module:MyPolicy:budget=64`."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import importlib.util
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from raas_jax.policies.base import Policy

Kinds = Mapping[str, type[Policy]]
_WORDS = {"none": None, "null": None, "true": True, "false": False}


def from_text(spec: str, kinds: Kinds, given: Mapping[str, Any] | None = None) -> Policy:
    """The policy that a text names, with `given` options besides; see `raas_jax.policies.parse`."""
    parts = spec.split(":")
    named = [part for part in parts if "=" not in part]
    made = kind(":".join(named), kinds)
    options = dict(given or {})
    for pair in parts:
        if pair in named:
            continue
        name, _, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if name in options:
            raise ValueError(f"option {name} of policy {parts[0]} is given twice; give it once.")
        options[name] = literal(value)
    return make(made, options, parts[0])


def kind(name: str, kinds: Kinds) -> type[Policy]:
    """The class of a name, or of an import path: `module:Class`, or `path/to/file.py:Class`.

    Modules are found as Python finds them, and in the current folder. Raises ValueError.
    """
    if ":" in name:
        return _import(name)
    if name in kinds:
        return kinds[name]
    raise ValueError(
        f"policy is {name!r}; there are {', '.join(sorted(kinds))}.{_near(name, kinds)}"
    )


def make(kind: type[Policy], options: Mapping[str, Any], name: str) -> Policy:
    """The policy with these options, by the names of its fields; `name` is for the errors.

    Raises ValueError for an option that is unknown or whose value is of another kind.
    """
    fields = {field.name for field in dataclasses.fields(kind) if field.repr}
    hints = typing.get_type_hints(kind)
    for option, value in options.items():
        if option not in fields:
            raise ValueError(
                f"{option} is not an option of the policy {name}, which has "
                f"{', '.join(sorted(fields))}.{_near(option, fields)}"
            )
        if not _fits(value, hints.get(option, Any)):
            raise ValueError(
                f"{option} of the policy {name} is {value!r}; expected {_say(hints[option])}."
            )
    return kind(**options)


def literal(text: str) -> Any:
    """A number, none, true or false; any other text is itself."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _import(path: str) -> type[Policy]:
    module_name, _, name = path.rpartition(":")
    if module_name.endswith(".py"):
        module = _load_file(Path(module_name))
    else:
        # The folder of a command is not on the path, but that is where its user's module lies.
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(module_name)
        except ImportError as error:
            raise ValueError(f"policy is {path!r}, which cannot be imported ({error}).") from error
        finally:
            sys.path.remove("")
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        ours = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type)
            and issubclass(value, Policy)
            and value.__module__ == module.__name__
        ]
        raise ValueError(
            f"policy is {path!r}; {module_name} has no policy {name}, "
            f"but {', '.join(ours) or 'none at all'}. A policy is a subclass of raas_jax.Policy."
        )
    return found


def _load_file(file: Path) -> types.ModuleType:
    if not file.is_file():
        raise ValueError(f"policy lies in {str(file)!r}, but there is no such file.")
    name = file.stem
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__file__", None) == str(file.resolve()):
        return loaded
    spec = importlib.util.spec_from_file_location(name, file.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(name).lower(), sorted(known), n=3, cutoff=0.4)
    return f" Did you mean {' or '.join(near)}?" if near else ""


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint) or isinstance(value, str)  # It names its choices.
    if hint is type(None):
        return value is None
    if hint in (int, float):
        numbers = (int, float) if hint is float else (int,)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool) else True


def _say(hint: Any) -> str:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(_say(each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    return names.get(hint, "None")
