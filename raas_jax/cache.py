"""The cache of keys and values: three segments with three lifetimes.

`Prompt` is written once by prefill and never again, so nothing can evict it. `Kept` holds the pages
of generated tokens that the policy has not forgotten; one page is written per P tokens, over the
victim's slot. `CurrentPage` is the page being written, one token per step at the same offset in
every row. Between two page boundaries `Prompt` and `Kept` are read-only, which is why no compiler
copies them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import Ranges, Target, head_pages, page_commit, ragged_page_commit

_pytree = partial(jax.tree_util.register_dataclass)


@_pytree
@dataclasses.dataclass(frozen=True)
class Bounds:
    """Channel-wise smallest and largest key of every page, both `[L, B, K, S, H]`."""

    key_min: jax.Array
    key_max: jax.Array


@_pytree
@dataclasses.dataclass(frozen=True)
class Prompt:
    """The prompt's pages, in the layers that see everything: these are its `L`.

    Attributes:
      k, v: `[L, B', K, Sp, P, H]`; `B' < B` where several rows share one prompt.
      lengths: int32 `[B']`, true number of tokens, 1..Sp * P.
      bounds: of the pages, for a policy that asks for them.
    """

    k: jax.Array
    v: jax.Array
    lengths: jax.Array
    bounds: Bounds | None

    def fill(self) -> jax.Array:
        """Tokens in each page: int32 `[B', 1, Sp]`."""
        _, _, _, S, P, _ = self.k.shape
        left = self.lengths[:, None] - jnp.arange(S, dtype=jnp.int32) * P
        return jnp.clip(left, 0, P)[:, None]


@_pytree
@dataclasses.dataclass(frozen=True)
class Kept:
    """Pages of generated tokens, in no particular order.

    Where heads have different numbers of slots, a pool of `T` pages holds the ranges of all, and S
    is the most that a head has; slots beyond a head's range are empty for ever.

    Attributes:
      k, v: `[L, B, K, S, P, H]`, or a pool `[B, T, P, H]`.
      fill: int32 `[L, B, K, S]`, tokens in each slot; 0 marks an empty one.
      bounds: of the pages, for a policy that asks for them; of a pool, `[B, T, H]` each.
    """

    k: jax.Array
    v: jax.Array
    fill: jax.Array
    bounds: Bounds | None


@_pytree
@dataclasses.dataclass(frozen=True)
class CurrentPage:
    """The page being written: k, v `[L, B, K, P, H]`."""

    k: jax.Array
    v: jax.Array


@_pytree
@dataclasses.dataclass(frozen=True)
class Cache:
    """All keys and values of a decode.

    `kept` has one entry per group of layers that share a policy, see `raas_jax.plan.Group`.
    """

    prompt: Prompt
    kept: tuple[Kept, ...]
    current: CurrentPage


def page_bounds(k: jax.Array, fill: jax.Array) -> Bounds:
    """Bounds of pages k `[..., P, H]` with fill `[...]`, each `[..., H]`; zeros for empty pages."""
    valid = (jnp.arange(k.shape[-2]) < fill[..., None])[..., None]
    low = jnp.min(jnp.where(valid, k, jnp.inf), axis=-2)
    high = jnp.max(jnp.where(valid, k, -jnp.inf), axis=-2)
    some = fill[..., None] > 0
    return Bounds(jnp.where(some, low, 0).astype(k.dtype), jnp.where(some, high, 0).astype(k.dtype))


def write_token(
    current: CurrentPage, k: jax.Array, v: jax.Array, layer: jax.Array, offset: jax.Array
) -> CurrentPage:
    """Puts one token's k, v `[B, K, H]` at `offset` of the current page of one layer, in place."""
    zero = jnp.zeros((), jnp.int32)
    start = (layer, zero, zero, offset, zero)

    def write(page: jax.Array, token: jax.Array) -> jax.Array:
        token = token[None, :, :, None].astype(page.dtype)
        return jax.lax.dynamic_update_slice(page, token, start)

    return CurrentPage(write(current.k, k), write(current.v, v))


def write_page(current: CurrentPage, k: jax.Array, v: jax.Array, layer: jax.Array) -> CurrentPage:
    """Puts k, v `[B, P, K, H]` of a whole page into the current page of one layer, in place."""

    def write(page: jax.Array, tokens: jax.Array) -> jax.Array:
        by_head = jnp.swapaxes(tokens, 1, 2).astype(page.dtype)
        written: jax.Array = jax.lax.dynamic_update_index_in_dim(page, by_head, layer, 0)
        return written

    return CurrentPage(write(current.k, k), write(current.v, v))


def commit(
    kept: Kept,
    page_k: jax.Array,
    page_v: jax.Array,
    slot: jax.Array,
    ranges: Ranges | None = None,
    target: Target | None = None,
) -> Kept:
    """Writes a full page `[L, B, K, P, H]` over `slot [L, B, K]`: eviction and insertion in one."""
    P = page_k.shape[3]
    chosen = jnp.arange(kept.fill.shape[3]) == slot[..., None]
    bounds = kept.bounds
    if bounds is not None:
        page = page_bounds(page_k, jnp.full(slot.shape, P))
        bounds = jax.tree.map(partial(_commit_bound, chosen, ranges), page, bounds)
    if ranges is None:
        write = partial(page_commit, slot=slot, target=target)
    else:
        write = partial(ragged_page_commit, slot=slot, ranges=ranges, target=target)
    fill = jnp.where(chosen, P, kept.fill)
    return Kept(write(kept.k, page_k), write(kept.v, page_v), fill, bounds)


def _commit_bound(
    chosen: jax.Array, ranges: Ranges | None, page: jax.Array, old: jax.Array
) -> jax.Array:
    """Puts a page's keys `[L, B, K, H]` into the slots that are chosen, `[L, B, K, S]`."""
    if ranges is None:
        return jnp.where(chosen[..., None], page[:, :, :, None], old)
    layer, head, _ = ranges.places
    of_head = jnp.moveaxis(page[layer, :, head], 0, 1)
    return jnp.where(as_pool(chosen, ranges)[..., None], of_head, old)


def layer_pages(pages: jax.Array, layer: jax.Array, ranges: Ranges | None) -> jax.Array:
    """The pages of one layer, of `[L, B, K, S, ...]` or of a pool `[B, T, ...]`: `[B, K, S, ...]`.

    Beyond a head's range anything may lie there.
    """
    if ranges is None:
        of_layer: jax.Array = jax.lax.dynamic_index_in_dim(pages, layer, 0, keepdims=False)
        return of_layer
    return head_pages(pages, jnp.asarray(ranges.starts)[layer], ranges.most)


def as_pool(pages: jax.Array, ranges: Ranges) -> jax.Array:
    """Pages `[L, B, K, S, ...]` of which each head has those in its range: a pool `[B, T, ...]`."""
    layer, head, slot = ranges.places
    return jnp.moveaxis(pages[layer, :, head, slot], 0, 1)
