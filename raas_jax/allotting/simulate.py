"""What a policy would keep of texts, of which a dense pass knows the attention.

The hidden states stay the dense model's: only what each head would still see is followed, at
several sizes of its cache at once. The policy is the library's own, driven as a decode drives it;
every pair of a size and a key/value head is a head of its own to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.policies import Allotment, Boundary, Budgeted, Evidence, Page, TriAttention
from raas_jax.policies.base import Metadata


class Sums(NamedTuple):
    """Of the tokens after the prompt, `t` of them on `n` pages: sums over what they attend to.

    Attributes:
      always: float32 `[B, K, G, t]`, over what is never forgotten: the whole prompt, and a sink.
      page: float32 `[B, K, G, t, n]`, over each page of later tokens.
    """

    always: jax.Array
    page: jax.Array


class Seen(NamedTuple):
    """What the tokens after the prompt see in one layer of a dense pass.

    Attributes:
      mass: of the softmax.
      k, v: `[B, K, n, P, H]`, keys and values of the pages of later tokens.
    """

    mass: Sums
    k: jax.Array
    v: jax.Array


class _Sizes(Allotment):
    """Gives the first loss of each head as its pages, whatever the mean."""

    @classmethod
    def of(cls, sizes: Sequence[int], heads: int) -> _Sizes:  # type: ignore[override]
        """So many pages for each of so many heads, `[sizes * heads]`."""
        each = np.repeat(np.asarray(sizes), heads)
        return cls(np.asarray([1, 2]), np.stack([each, each], axis=-1)[None])

    def pages(self, mean: int, page_size: int, least: int = 1) -> np.ndarray:
        given: np.ndarray = self.losses[..., 0].astype(np.int64)
        return given


def simulated(policy: Any) -> Budgeted:
    """The policy as `simulate` takes it: each head for itself, with the prompt beside the budget.

    Raises:
      ValueError: it has no budget, or looks at more than attention, keys and values.
    """
    if not isinstance(policy, Budgeted):
        raise ValueError(f"policy is {policy!r}, which has no budget to share out; use raas.")
    if isinstance(policy, TriAttention) or policy.needs_bounds or policy.selects:
        raise ValueError(
            f"policy is {policy!r}, which looks at more than attention, keys and values. Find the "
            "allotment with another, such as raas; every policy with a budget can use it."
        )
    return dataclasses.replace(
        policy, granularity="kv_head", prompt="excluded", dense_layers=0, allotment=None
    )


@partial(jax.jit, static_argnames=("policy", "sizes"))
def simulate(policy: Budgeted, sizes: tuple[int, ...], seen: Seen) -> jax.Array:
    """Which pages each head could read while each page was written, under several budgets.

    Args:
      policy: of `simulated`.
      sizes: budgets in pages, each at least the policy's `least_pages`.
      seen: the dense attention of one layer.

    Returns:
      bool `[n, B, sizes, K, n]`: `[i, ..., j]` says whether page j can be read while page i is
      written. The current page, which always can, is not among them.
    """
    B, K, _, _, n = seen.mass.page.shape
    P, heads, S = seen.k.shape[3], len(sizes) * K, max(sizes) + policy.buffer_pages
    policy = dataclasses.replace(policy, allotment=_Sizes.of(sizes, K))
    lengths = jnp.ones(B, jnp.int32)  # Of prompts, which lie beside the budget.
    room = policy.budget_pages(lengths, 1, heads) + policy.buffer_pages
    allowed = jnp.arange(S) < room[..., None]
    rows = jax.vmap(jax.random.key)(jnp.arange(B))

    def by_head(x: jax.Array) -> jax.Array:
        """`[B, K, ...]` → `[B, sizes * K, ...]`."""
        return jnp.tile(x, (1, len(sizes)) + (1,) * (x.ndim - 2))

    def slots_of(pages: jax.Array, number: jax.Array) -> jax.Array:
        """Of `[B, K, n, P, H]` those in the slots, whose numbers are `[B, sizes * K, S]`."""
        where = jnp.maximum(number, 0)[..., None, None]
        return jnp.take_along_axis(by_head(pages), where, axis=2)

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        """Entry `index` of the axis of tokens."""
        return by_head(jax.lax.dynamic_index_in_dim(x, index, 3, keepdims=False))

    def page_of(
        carry: tuple[Metadata, jax.Array], current: jax.Array
    ) -> tuple[tuple[Metadata, jax.Array], jax.Array]:
        meta, number = carry
        fill = jnp.where(number >= 0, P, 0)

        def step(meta: Metadata, offset: jax.Array) -> tuple[Metadata, None]:
            token = current * P + offset
            mass, always = at(seen.mass.page, token), at(seen.mass.always, token)
            of_current = jax.lax.dynamic_index_in_dim(mass, current, 3, keepdims=False)
            kept = jnp.take_along_axis(mass, jnp.maximum(number, 0)[:, :, None], axis=-1)
            kept = jnp.where((number >= 0)[:, :, None], kept, 0.0)
            visible = always + of_current + jnp.sum(kept, axis=-1)
            evidence = Evidence(kept / visible[..., None], None, fill, of_current / visible)
            of_layer = policy.observe(_without_layers(meta), evidence, _clock(B, token + 1))
            return jax.tree.map(lambda x: x[None], of_layer), None

        meta, _ = jax.lax.scan(step, meta, jnp.arange(P))
        now = _clock(B, (current + 1) * P + 1)

        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows, current)

        def boundary(fill: jax.Array, number: jax.Array) -> Boundary:
            k, v = (lambda _, pages=pages: slots_of(pages, number) for pages in (seen.k, seen.v))
            return Boundary(now, fill[None], allowed, k, v, keys, lengths)

        slot = policy.victim(meta, boundary(fill, number))
        pages = (seen.k, seen.v)
        written = (jax.lax.dynamic_index_in_dim(x, current, 2, keepdims=False) for x in pages)
        meta = policy.commit(meta, slot, Page(*(by_head(x)[None] for x in written)), now)
        after = jnp.where(jnp.arange(S) == slot[0, ..., None], current, number)
        emptied = policy.evict_many(meta, boundary(jnp.where(after >= 0, P, 0), after))
        if emptied is not None:
            after = jnp.where(emptied[0], -1, after)
        present = jnp.any(number[..., None] == jnp.arange(n), axis=2)
        return (meta, after), present.reshape(B, len(sizes), K, n)

    start = policy.init((1, B, heads, S)), jnp.full((B, heads, S), -1)
    held: jax.Array = jax.lax.scan(page_of, start, jnp.arange(n))[1]
    return held


def _clock(rows: int, now: jax.Array) -> jax.Array:
    return jnp.full(rows, now, jnp.int32)


def _without_layers(meta: Metadata) -> Metadata:
    return jax.tree.map(lambda x: x[0], meta)
