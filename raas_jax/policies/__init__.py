"""Policies: which pages to keep. One file each; `base.py` says what a policy is."""

from __future__ import annotations

from raas_jax.policies.allotment import Allotment
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
from raas_jax.policies.spec import available, by_name, create, parse
from raas_jax.policies.tova import TOVA
from raas_jax.policies.triattention import TriAttention
from raas_jax.policies.vase import VaSE

__all__ = [
    "Allotment",
    "Boundary",
    "Bounded",
    "Evidence",
    "Page",
    "Policy",
    "PromptPages",
    "Selection",
]
__all__ += ["Batched", "Budgeted", "best", "bucket", "lowest", "pages_for", "set_slot"]
__all__ += ["H2O", "RKV", "TOVA", "Dense", "LazyEviction", "Quest", "RaaS", "RaaSQuest"]
__all__ += ["RandomEviction", "Recent", "Sink", "SnapKV", "TriAttention", "VaSE"]
__all__ += ["available", "by_name", "create", "parse"]
