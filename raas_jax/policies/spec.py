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

from raas_jax import checks
from raas_jax.policies.base import Policy
from raas_jax.policies.dense import Dense
from raas_jax.policies.h2o import H2O
from raas_jax.policies.lazy_eviction import LazyEviction
from raas_jax.policies.quest import Quest
from raas_jax.policies.raas import RaaS
from raas_jax.policies.raas_quest import RaaSQuest
from raas_jax.policies.random import RandomEviction
from raas_jax.policies.recent import Recent
from raas_jax.policies.rkv import RKV
from raas_jax.policies.sink import Sink
from raas_jax.policies.snapkv import SnapKV
from raas_jax.policies.tova import TOVA
from raas_jax.policies.triattention import TriAttention
from raas_jax.policies.vase import VaSE

_BY_NAME: dict[str, type[Policy]] = {
    "dense": Dense,
    "fifo": Recent,  # The same at any page size, see `Recent`.
    "h2o": H2O,
    "lazy_eviction": LazyEviction,
    "quest": Quest,
    "raas": RaaS,
    "raas_quest": RaaSQuest,
    "random": RandomEviction,
    "recent": Recent,
    "rkv": RKV,
    "sink": Sink,
    "snapkv": SnapKV,
    "tova": TOVA,
    "triattention": TriAttention,
    "vase": VaSE,
}
_WORDS = {"none": None, "null": None, "true": True, "false": False}
_KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def available() -> tuple[str, ...]:
    """Names that the command line and configuration files accept."""
    return tuple(sorted(_BY_NAME))


def by_name(name: str, more: Mapping[str, type[Policy]] = {}) -> type[Policy]:
    """The class of a named policy, or of `module:Class` and `path/to/file.py:Class`.

    Modules are found as Python finds them, and in the current folder; `more` are names beside the
    `available` ones. Raises ValueError, with near matches for an unknown name.
    """
    known = _BY_NAME | dict(more)
    if ":" in name:
        return _import(name, known)
    if name not in known:
        names = ", ".join(sorted(known))
        raise ValueError(f"policy is {checks.short(name)}; there are {names}.{_near(name, known)}")
    return known[name]


def create(name: str, **options: Any) -> Policy:
    """A named policy with its options; those that it does not have raise TypeError."""
    return by_name(name)(**options)


def parse(text: str, more: Mapping[str, type[Policy]] = {}, /, **options: Any) -> Policy:
    """A policy as the command line takes it: `h2o:recent_fraction=0.25`, `file.py:Mine:budget=64`.

    Args:
      text: a name, or an import path as in `by_name`, and options.
      more: see `by_name`.
      options: more options, by the names of the policy's fields.

    Raises:
      ValueError: for an unknown name or option (with near matches), a value of the wrong kind, an
        option given twice, and whatever the policy refuses.
    """
    parts = text.split(":")
    kind = by_name(":".join(part for part in parts if "=" not in part), more)
    for pair in parts:
        name, given, value = pair.partition("=")
        name = name.strip().replace("-", "_")
        if given and name in options:
            raise ValueError(f"option {name} of policy {parts[0]} is given twice; give it once.")
        if given:
            options[name] = _literal(value)
    fields = {field.name for field in dataclasses.fields(kind) if field.repr}
    hints = typing.get_type_hints(kind)
    for option, value in options.items():
        if option not in fields:
            raise ValueError(
                f"{option or repr(option)} is not an option of the policy {parts[0]}, which has "
                f"{', '.join(sorted(fields))}.{_near(option, fields)}"
            )
        if not _fits(value, hints[option]):
            wanted = _say(hints[option])
            raise ValueError(
                f"{option} of the policy {parts[0]} is {checks.short(value)}; expected {wanted}."
            )
    return kind(**options)


def _literal(text: str) -> Any:
    """A number, none, true or false; any other text is itself."""
    text = text.strip()
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return text


def _import(path: str, named: Iterable[str]) -> type[Policy]:
    module_name, _, name = path.rpartition(":")
    if module_name.partition(":")[0] in named:
        raise ValueError(f"policy is {path!r}; write its options as NAME:OPTION=VALUE.")
    is_file = module_name.endswith(".py")
    if is_file and not Path(module_name).is_file():
        raise ValueError(f"policy lies in {module_name!r}, but there is no such file.")
    # The folder of a command is not on the path, but that is where its user's module lies.
    sys.path.insert(0, "")
    try:
        module = _load_file(Path(module_name)) if is_file else importlib.import_module(module_name)
    except Exception as error:  # A user's own module raises whatever is wrong with it.
        why = f"{type(error).__name__}: {checks.first_line(error)}"
        raise ValueError(f"policy is {path!r}, which cannot be imported ({why}).") from error
    finally:
        sys.path.remove("")
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Policy)):
        kinds = (value for value in vars(module).values() if isinstance(value, type))
        own = (kind for kind in kinds if kind.__module__ == module.__name__)
        ours = [kind.__name__ for kind in own if issubclass(kind, Policy)]
        raise ValueError(
            f"policy is {path!r}; {module_name} has no policy {name}, "
            f"but {', '.join(ours) or 'none at all'}. A policy is a subclass of raas_jax.Policy."
        )
    return found


def _load_file(file: Path) -> types.ModuleType:
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
    if hint in (int, float):
        numbers = (int, float) if hint is float else (int,)
        return isinstance(value, numbers) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, type(None)) else True


def _say(hint: Any) -> str:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, parts))
    return " or ".join(map(_say, parts)) if parts else _KINDS.get(hint, "None")
