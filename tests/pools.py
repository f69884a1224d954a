"""Kept pages as they lie in a pool and by heads, and memory in which no token lies."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


def in_place(table, ranges):
    """What is said of every slot, `[L, B, K, S]`, of the pages as they lie: a pool's `[B, T]`."""
    table = np.asarray(table)
    if ranges is None:
        return table
    layer, head, slot = ranges.places
    return np.moveaxis(table[layer, :, head, slot], 0, 1)


def by_heads(pages, ranges):
    """Pages as they lie, as `[L, B, K, S, ...]`; zeros beyond a head's range."""
    pages = np.asarray(pages)
    if ranges is None:
        return pages
    layer, head, slot = ranges.places
    shape = ranges.layers, len(pages), ranges.heads, ranges.most, *pages.shape[2:]
    found = np.zeros(shape, pages.dtype)
    found[layer, :, head, slot] = np.moveaxis(pages, 1, 0)
    return found


def poisoned(state, plan):
    """NaN wherever no token lies: empty slots, ends of pages, padding of the prompt."""
    cache = state.cache

    def nan(x, dead):
        # In NumPy, since every shape would be compiled for.
        return jnp.array(np.where(dead, np.nan, x), x.dtype)

    def segment(found, fill):
        dead = (np.arange(plan.page_size) >= fill[..., None])[..., None]
        bounds = jax.tree.map(lambda x: nan(x, (fill == 0)[..., None]), found.bounds)
        return dataclasses.replace(found, k=nan(found.k, dead), v=nan(found.v, dead), bounds=bounds)

    prompt = np.broadcast_to(cache.prompt.fill(), cache.prompt.k.shape[:4])
    both = zip(cache.kept, plan.groups, strict=True)
    cache = dataclasses.replace(
        cache,
        prompt=segment(cache.prompt, prompt),
        kept=tuple(segment(kept, in_place(kept.fill, group.ranges)) for kept, group in both),
        current=jax.tree.map(lambda x: nan(x, True), cache.current),
    )
    return dataclasses.replace(state, cache=cache)


def living(rng, ranges, layer, fill, dtype, H, G, P):
    """Operands of attention over a pool that holds nothing but the living tokens of one layer.

    Of the fill `[B, K, S]` what lies beyond a head's range is left out.
    """
    B, counts = len(fill), np.asarray(ranges.counts)
    fill = np.where(np.arange(ranges.most) < counts[layer][:, None], fill, 0)
    k, v = (np.full((B, ranges.total, P, H), np.nan) for _ in range(2))
    for row, head, slot in np.argwhere(fill):
        page, count = ranges.starts[layer, head] + slot, fill[row, head, slot]
        for x in (k, v):
            x[row, page, :count] = rng.normal(size=(count, H))
    q = rng.normal(size=(B, ranges.heads * G, H))
    arrays = [jnp.asarray(x, dtype) for x in (q, k, v)]
    numbers = [jnp.asarray(x, jnp.int32) for x in (fill, ranges.starts, counts, layer)]
    return *arrays, *numbers
