"""What it really does to a model's next tokens that one head, or one layer, has few pages.

All heads keep everything but those of one place, which are held to a few pages, and the measure is
KL(dense || changed) at the end of the model: nothing is approximated, and the model is run as often
as there are places, sizes and texts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.decode import DecodeState
from raas_jax.lab.fidelity.measure import Followed, dense_outputs, follow
from raas_jax.params import Params
from raas_jax.policies import Boundary, Evidence, Page, RaaS
from raas_jax.policies.base import Metadata

ROWS = 32
"""Pairs of a place and a text that are fed at once."""

Place = tuple[int, int | None]
"""A layer, of those that see everything, and a key/value head of it; None for all."""


class Held(NamedTuple):
    """Metadata: RaaS's own, and how many slots each head may use, int32 `[L, B, K]`."""

    inner: Metadata
    slots: jax.Array


@dataclasses.dataclass(frozen=True)
class Narrowed(RaaS):
    """RaaS where each row's heads may use fewer slots than there are, by data."""

    def init(self, shape: tuple[int, int, int, int]) -> Any:
        return Held(super().init(shape), jnp.full(shape[:3], shape[3], jnp.int32))

    def observe(self, meta: Any, evidence: Evidence, now: jax.Array) -> Any:
        return meta._replace(inner=super().observe(meta.inner, evidence, now))

    def commit(self, meta: Any, slot: jax.Array, page: Page, now: jax.Array) -> Any:
        return meta._replace(inner=super().commit(meta.inner, slot, page, now))

    def victim(self, meta: Any, boundary: Boundary) -> jax.Array:
        within = jnp.arange(boundary.fill.shape[-1]) < meta.slots[..., None]
        narrowed = boundary._replace(allowed=boundary.allowed & within)
        return super().victim(meta.inner, narrowed)

    def stamps(self, meta: Any) -> jax.Array | None:
        return super().stamps(meta.inner)


def effects(
    params: Params,
    texts: Sequence[Sequence[int]],
    places: Sequence[Place],
    policy: RaaS,
    pages: int,
    *,
    prompt_tokens: int,
    rows: int = ROWS,
) -> Iterator[tuple[Place, int, float]]:
    """For each place and text: their numbers, and the mean KL over the tokens after the prompt.

    Args:
      params: the model.
      texts: of one length.
      places: which heads are held to so many pages, one place at a time.
      policy: decides what these keep.
      pages: of the policy's size.
      prompt_tokens: how many of the first tokens are kept whatever happens.
      rows: pairs of a place and a text that are fed at once.
    """
    P = policy.page_size
    options = {**policy.options(), "budget": -(-len(texts[0]) // P) * P}
    narrowed = Narrowed(**options)
    outputs = [dense_outputs(params, text) for text in texts]
    pairs = [(place, number) for place in places for number in range(len(texts))]
    for first in range(0, len(pairs), rows):
        batch = pairs[first : first + rows]
        full = batch + [batch[-1]] * (rows - len(batch))  # One shape, one program.
        narrowing = _narrowing([place for place, _ in full], pages)
        fed = [texts[number] for _, number in full], [outputs[number] for _, number in full]
        for step in follow(params, narrowed, *fed, prompt_tokens, prepare=narrowing):
            if isinstance(step, list):
                yield from _of_batch(batch, step)


def _of_batch(
    batch: Sequence[tuple[Place, int]], found: Sequence[Followed]
) -> Iterator[tuple[Place, int, float]]:
    for (place, number), followed in zip(batch, found, strict=False):
        yield place, number, float(np.mean(followed.differences.kl, dtype=np.float64))


def _narrowing(places: Sequence[Place], pages: int) -> Any:
    def prepare(state: DecodeState) -> DecodeState:
        held, *ring = state.meta
        slots = np.array(held.slots)
        for row, (layer, head) in enumerate(places):
            slots[layer, row, slice(None) if head is None else head] = pages
        return dataclasses.replace(state, meta=(held._replace(slots=jnp.asarray(slots)), *ring))

    return prepare
