"""The contract of a policy: which pages of generated tokens to keep.

A policy is a frozen dataclass: static, hashable, and so part of what a compiled decode is compiled
for. Its methods are pure functions of arrays. A new one subclasses `Policy` and overrides what it
needs; it works wherever the built-in ones do, without being registered.

The clock `now` counts the tokens that a row has generated, so that what a policy does to a row does
not depend on the rest of the batch. Axis letters: `L` layers of the group, `B` rows, `K` key/value
heads, `G` query heads per key/value head, `S` page slots, `P` tokens per page, `H` head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from raas_jax import checks
from raas_jax.policies.sizes import pages_for as pages_for

Check = Callable[[str, Any], Any]

Metadata = Any
"""A policy's metadata: a pytree of arrays with leading axes `[L, B, K]`, most of them `[.., S]`."""

MOST_PAGE = 4096
"""Tokens: a page is the unit in which attention is read."""
_INT32 = np.iinfo(np.int32)


class Evidence(NamedTuple):
    """What the attention of one token saw of the kept pages, in one layer.

    Attributes:
      mass: float32 `[B, K, G, S]`, share of the whole softmax (prompt, kept and current pages
        together) that each page received from each query head; 0 for an empty slot.
      bound: float32 `[B, K, G, S]`, softmax over all pages of Quest's upper bound of the page's
        scores; 0 for an empty slot. None unless the policy sets `needs_bounds`.
      fill: int32 `[B, K, S]`, tokens in each slot; 0 marks an empty one.
      current_mass: float32 `[B, K, G]`, the share that the page being written received.
    """

    mass: jax.Array
    bound: jax.Array | None
    fill: jax.Array
    current_mass: jax.Array | None = None


class Bounded(NamedTuple):
    """Quest's upper bounds of the pages' scores, for a policy that reads only some pages.

    Attributes:
      prompt: float32 `[B, K, G, Sp]`; -inf for an empty page. None unless `needs_prompt_bounds`.
      kept: float32 `[B, K, G, S]`; -inf for an empty slot. None unless `needs_bounds`.
    """

    prompt: jax.Array | None
    kept: jax.Array | None


class Selection(NamedTuple):
    """Pages to read: distinct slots int32 `[B, K, any]`, -1 where there are fewer; None: all."""

    prompt: jax.Array | None = None
    kept: jax.Array | None = None


class PromptPages(NamedTuple):
    """The prompt, for a policy that keeps it among its pages and may evict it.

    Attributes:
      lengths: int32 `[B]`, tokens.
      fill: int32 `[B, Sp]`, tokens in each page; the last one may be partly filled.
      mass: float32 `[L, B, K, G, Sp]`, attention to each page, summed over the prompt's last
        `prompt_queries` tokens. None where that is 0.
      room: int32, broadcasts to `[L, B, K]`: slots that each head may use, see `Policy.capacity`.
    """

    lengths: jax.Array
    fill: jax.Array
    mass: jax.Array | None
    room: jax.Array


class Page(NamedTuple):
    """The page just written: k, v `[L, B, K, P, H]`, keys already rotated."""

    k: jax.Array
    v: jax.Array


class Boundary(NamedTuple):
    """What a policy may look at when it chooses a victim, at a page boundary.

    Attributes:
      now: int32 `[B]`, tokens generated so far in each row.
      fill: int32 `[L, B, K, S]`, tokens in each slot; 0 marks an empty one.
      allowed: bool, broadcasts to `[L, B, K, S]`: slots within `Policy.capacity`.
      k, v: functions from the number of a layer of the group, an int32 scalar, to its kept pages
        themselves, `[B, K, S, P, H]`; what an empty slot holds there means nothing.
      keys: typed keys `[B]`, fresh at every boundary and the same whatever else is in the batch.
      prompt_lengths: int32 `[B]`, tokens in each row's prompt.
    """

    now: jax.Array
    fill: jax.Array
    allowed: jax.Array
    k: Callable[[jax.Array], jax.Array]
    v: Callable[[jax.Array], jax.Array]
    keys: jax.Array
    prompt_lengths: jax.Array


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of all policies. `page_size` is P, tokens per page."""

    page_size: int = dataclasses.field(default=16, kw_only=True)

    def __post_init__(self) -> None:
        """Checks the kind of every option; subclasses check their ranges after this."""
        kind: Any = type(self)
        for name, check in _kinds_of(kind).items():
            object.__setattr__(self, name, check(name, getattr(self, name)))
        checks.integer("page_size", self.page_size, 1, MOST_PAGE)

    @property
    def needs_bounds(self) -> bool:
        """Whether bounds of the kept pages are wanted; they cost two keys per page of memory."""
        return False

    @property
    def needs_prompt_bounds(self) -> bool:
        """Whether bounds of the prompt's pages are wanted."""
        return self.needs_bounds

    @property
    def selects(self) -> bool:
        """Whether `select` chooses the pages to read; otherwise all are read."""
        return False

    @property
    def evicts_prompt(self) -> bool:
        """Whether prompt pages lie among the kept ones (`insert_prompt`); all groups or none."""
        return False

    @property
    def prompt_queries(self) -> int:
        """The number of last tokens of the prompt that `PromptPages.mass` sums; 0 costs nothing."""
        return 0

    def options(self) -> dict[str, Any]:
        """What it was made of, by name, as saves and run folders keep it."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def groups(self, num_layers: int) -> tuple[tuple[int, Policy], ...]:
        """(number of layers, policy) for consecutive groups of layers, first layers first."""
        return ((num_layers, self),)

    def suited(self, likeness: Callable[[], str], own: Callable[[], Any]) -> Policy:
        """The same for one model: what stands for something of the model's own is replaced by it.

        `likeness` gives what tells the model from others of its shape, "" where that cannot be
        known; `own` its own `Allotment`. Both are called only where they are wanted.
        """
        return self

    def split(self, parts: int) -> Policy:
        """The same where a mesh splits the heads into so many parts of equal memory."""
        return self

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        """`S`, fixed before compiling, for prompts of these lengths."""
        raise NotImplementedError

    def slots_by_head(
        self, layers: int, heads: int, prompt_tokens: Sequence[int], max_new_tokens: int
    ) -> np.ndarray:
        """The same for every layer of the group and key/value head: integers `[L, K]`."""
        return np.full((layers, heads), self.slots(prompt_tokens, max_new_tokens))

    def capacity(self, prompt_lengths: jax.Array, slots: np.ndarray) -> jax.Array:
        """Slots that each row may use of those of `slots_by_head`, all of them by default.

        int32, broadcasts to `[L, B, K]`.
        """
        return jnp.asarray(slots, jnp.int32)[:, None]

    def check_model(self, config: Any) -> None:
        """Raises ValueError for a model, by its `ModelConfig`, that this policy does not suit."""

    def check_prompts(self, prompt_tokens: Sequence[int]) -> None:
        """Raises ValueError for a prompt that this policy cannot take."""

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        """Metadata of empty slots; `shape` is `(L, B, K, S)`."""
        return ()

    def insert_prompt(self, meta: Metadata, prompt: PromptPages) -> tuple[jax.Array, Metadata]:
        """Only if `evicts_prompt`: the prompt's page in each slot, `[L, B, K, S]`, -1 for none."""
        raise NotImplementedError

    def select(self, meta: Metadata, bounded: Bounded) -> Selection:
        """Only if `selects`: before the attention of every token, in every layer (no axis `L`)."""
        raise NotImplementedError

    def observe(self, meta: Metadata, evidence: Evidence, now: jax.Array) -> Metadata:
        """After every token, of every layer: its metadata (`[B, K, S]`), now `[B]`.

        Mapped over the layers by `jax.vmap`, so that all are seen at once.
        """
        return meta

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        """After `page` was written to `slot [L, B, K]`; now `[B]`."""
        return meta

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        """Slot to overwrite, int32 `[L, B, K]`: an empty allowed one while there is one."""
        raise NotImplementedError

    def evict_many(self, meta: Metadata, boundary: Boundary) -> jax.Array | None:
        """Slots to empty, bool `[L, B, K, S]`, after the page was written; None: never any."""
        return None

    def stamps(self, meta: Metadata) -> jax.Array | None:
        """Clock of each page's last use, int32 `[..., K, S]`, for traces; None if none is kept."""
        return None


def _integer(name: str, value: Any) -> int:
    return checks.integer(name, value, -checks.MOST_TOKENS, checks.MOST_TOKENS)


def _real(name: str, value: Any) -> float:
    # A Python int stays one, so that a policy is written as it was given.
    number = checks.real(name, value, "a finite number", -math.inf)
    return value if type(value) is int else number


def _flag(name: str, value: Any) -> bool:
    if not checks.is_bool(value):
        raise TypeError(f"{name} is {checks.short(value)}; it must be True or False.")
    return bool(value)


_KINDS: dict[Any, Check] = {int: _integer, float: _real, bool: _flag}


def _optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


@functools.cache
def _kinds_of(kind: Any) -> dict[str, Check]:
    """A check for each option that is a number or a flag, or None where that is allowed."""
    try:
        hints = typing.get_type_hints(kind)
    except NameError:  # A policy of one's own may name types that only a type checker sees.
        return {"page_size": _integer}
    found: dict[str, Check] = {}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        if hint in _KINDS:
            found[field.name] = _KINDS[hint]
        elif len(parts) == 1 and parts[0] in _KINDS:
            found[field.name] = _optional(_KINDS[parts[0]])
    return found


def lowest(score: jax.Array, boundary: Boundary) -> jax.Array:
    """The slot with the lowest score `[L, B, K, S]`; empty slots first, ties to the lowest slot."""
    floating = jnp.issubdtype(score.dtype, jnp.floating)
    low, high = (-jnp.inf, jnp.inf) if floating else (_INT32.min, _INT32.max)
    score = jnp.where(boundary.fill == 0, low, score)
    score = jnp.where(boundary.allowed, score, high)
    return jnp.argmin(score, axis=-1).astype(jnp.int32)


def set_slot(meta: jax.Array, slot: jax.Array, value: ArrayLike) -> jax.Array:
    """Sets `meta[l, b, k, slot[l, b, k]]` to `value`, which broadcasts to `[L, B, K]`."""
    chosen = jnp.arange(meta.shape[-1]) == slot[..., None]
    return jnp.where(chosen, jnp.broadcast_to(value, slot.shape)[..., None], meta)
