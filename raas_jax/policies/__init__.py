"""Policies: which pages to keep. One file each; `base.py` says what a policy is."""

from __future__ import annotations

import difflib
from typing import Any

from raas_jax.policies.base import Boundary, Evidence, Page, Policy, lowest, pages_for, put
from raas_jax.policies.dense import Dense
from raas_jax.policies.raas import RaaS

_BY_NAME: dict[str, type[Policy]] = {"dense": Dense, "raas": RaaS}


def available() -> tuple[str, ...]:
    """Names that the command line and configuration files accept."""
    return tuple(sorted(_BY_NAME))


def by_name(name: str) -> type[Policy]:
    """The class of a named policy. Raises ValueError with near matches for an unknown name."""
    if name in _BY_NAME:
        return _BY_NAME[name]
    near = difflib.get_close_matches(str(name).lower(), available(), n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise ValueError(f"policy is {name!r}; there are {', '.join(available())}.{hint}")


def create(name: str, **options: Any) -> Policy:
    """A named policy with its options; those that it does not have raise TypeError."""
    return by_name(name)(**options)


__all__ = [
    "Boundary",
    "Dense",
    "Evidence",
    "Page",
    "Policy",
    "RaaS",
    "available",
    "by_name",
    "create",
    "lowest",
    "pages_for",
    "put",
]
