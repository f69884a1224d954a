"""Policies: which pages to keep. One file each; `base.py` says what a policy is."""

from __future__ import annotations

from typing import Any

from raas_jax.policies import spec as _spec
from raas_jax.policies.base import (
    Boundary,
    Bounded,
    Evidence,
    Page,
    Policy,
    PromptPages,
    Selection,
    lowest,
    set_slot,
)
from raas_jax.policies.budgeted import Batched, Budgeted, best
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
from raas_jax.policies.sizes import bucket, pages_for
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


def available() -> tuple[str, ...]:
    """Names that the command line and configuration files accept."""
    return tuple(sorted(_BY_NAME))


def by_name(name: str) -> type[Policy]:
    """The class of a named policy, or of `module:Class` and `path/to/file.py:Class`.

    Raises ValueError, with near matches for an unknown name.
    """
    return _spec.kind(name, _BY_NAME)


def create(name: str, **options: Any) -> Policy:
    """A named policy with its options; those that it does not have raise TypeError."""
    return by_name(name)(**options)


def parse(text: str, **options: Any) -> Policy:
    """A policy as the command line takes it: `h2o:recent_fraction=0.25`, `file.py:Mine:budget=64`.

    Args:
      text: a name, or an import path as in `by_name`, and options.
      options: more options, by the names of the policy's fields.

    Raises:
      ValueError: for an unknown name or option (with near matches), a value of the wrong kind, an
        option given twice, and whatever the policy refuses.
    """
    return _spec.from_text(text, _BY_NAME, options)


__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "Batched",
    "Boundary",
    "Bounded",
    "Budgeted",
    "Dense",
    "Evidence",
    "LazyEviction",
    "Page",
    "Policy",
    "PromptPages",
    "Quest",
    "RaaS",
    "RaaSQuest",
    "RandomEviction",
    "Recent",
    "Selection",
    "Sink",
    "SnapKV",
    "TriAttention",
    "VaSE",
    "available",
    "best",
    "bucket",
    "by_name",
    "create",
    "lowest",
    "pages_for",
    "parse",
    "set_slot",
]
