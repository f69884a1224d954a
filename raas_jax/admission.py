"""Rows that come and go in a decode of fixed shape.

A row that joins overwrites what its predecessor left, of the size of one row; no other row is
touched, and the state is written where it lies.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from raas_jax.cache import Kept
from raas_jax.decode import DecodeState, Progress, RowRequest, Rows, prefill
from raas_jax.params import Params
from raas_jax.plan import Group, Plan
from raas_jax.sampling import Sampler, Sampling
from raas_jax.sharding import RULES, state_shardings


class Admissions(NamedTuple):
    """Prompts of one bucket that join at a page boundary, and the rows that answer them.

    The `B` rows come in `B'` groups of `samples`, which share a prompt. All are NumPy arrays.

    Attributes:
      tokens: int32 `[n, T]`, prompts at the left, padded at the right; T in whole pages.
      lengths: int32 `[n]`, true lengths.
      groups: int32 `[n]`, the group that answers each, in 0..B'-1.
      new_prompt: bool `[n]`, the group begins with this prompt; else it has it already.
      fresh: bool `[n, samples]`, rows that begin; the others of the group are left alone.
      seed: int32 `[n]`, of the prompt.
      sample: int32 `[n, samples]`, folded with the seed.
      limit: int32 `[n]`, tokens that each row may have.
      sampler: how each prompt's rows sample, `[n]`, without keys.
    """

    tokens: Any
    lengths: Any
    groups: Any
    new_prompt: Any
    fresh: Any
    seed: Any
    sample: Any
    limit: Any
    sampler: Sampler


def empty_admissions(size: int, bucket: int, samples: int) -> Admissions:
    """Admissions of this shape, to be filled in: a line that is not starts no row."""
    return Admissions(
        tokens=np.zeros((size, bucket), np.int32),
        lengths=np.ones(size, np.int32),
        groups=np.zeros(size, np.int32),
        new_prompt=np.zeros(size, np.bool_),
        fresh=np.zeros((size, samples), np.bool_),
        seed=np.zeros(size, np.int32),
        sample=np.zeros((size, samples), np.int32),
        limit=np.zeros(size, np.int32),
        sampler=Sampler.create([Sampling()] * size, None),
    )


def admit(
    params: Params, state: DecodeState, admissions: Admissions, *, plan: Plan, mesh: Mesh | None
) -> tuple[DecodeState, Progress]:
    """Reads the prompts and starts their rows, in the memory of the state.

    Returns:
      The state, and the first tokens of the rows, `[1, n * samples]`.
    """
    by_row = partial(jnp.repeat, repeats=plan.samples, axis=0)
    seeds, samples = by_row(admissions.seed), admissions.sample.reshape(-1)
    sampler = dataclasses.replace(
        jax.tree.map(by_row, admissions.sampler), keys=jax.vmap(_row_key)(seeds, samples)
    )
    request = RowRequest(by_row(admissions.limit), state.stop_tokens, sampler)
    slots = admissions.tokens.shape[1] // plan.page_size
    bucket = dataclasses.replace(plan, prompt_slots=slots)
    part, first = prefill(params, admissions.tokens, admissions.lengths, request, plan=bucket)
    places = admissions.groups, admissions.new_prompt, admissions.fresh
    if mesh is None:
        return _insert(state, part, *places, plan=plan), first
    whole = PartitionSpec()
    state_specs = jax.tree.map(lambda s: s.spec, state_shardings(state, mesh))
    part_specs = jax.tree.map(lambda s: s.spec, state_shardings(part, mesh, rows_divide=False))
    empty = not state.cache.prompt.k.size

    def without(tree: Any) -> Any:
        """XLA of jax 0.11 dies of an array without numbers that a `shard_map` is given."""
        return _with_pages(tree, None, None, None) if empty else tree

    # Each device writes the rows that it holds; nothing is asked of the compiler.
    insert = jax.shard_map(
        partial(_insert, plan=plan, axis=RULES["rows"]),
        mesh=mesh,
        in_specs=(without(state_specs), without(part_specs), whole, whole, whole),
        out_specs=without(state_specs),
        check_vma=False,
    )
    joined = insert(without(state), without(part), *places)
    pages = state.cache.prompt
    return _with_pages(joined, pages.k, pages.v, pages.bounds) if empty else joined, first


def _with_pages(state: Any, k: Any, v: Any, bounds: Any) -> Any:
    """A state, or a tree like it, with these for the pages of its prompt."""
    prompt = dataclasses.replace(state.cache.prompt, k=k, v=v, bounds=bounds)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, prompt=prompt))


def _row_key(seed: jax.Array, sample: jax.Array) -> jax.Array:
    """The key of `sampling.row_keys`: a row that joins samples what `generate` would."""
    return jax.random.fold_in(jax.random.key(seed), sample)


def _insert(
    state: DecodeState,
    part: DecodeState,
    groups: jax.Array,
    new_prompt: jax.Array,
    fresh: jax.Array,
    *,
    plan: Plan,
    axis: str | None = None,
) -> DecodeState:
    """Copies each group of `part` into its place among the groups held here."""
    held = state.cache.prompt.lengths.shape[0]
    first = 0 if axis is None else jax.lax.axis_index(axis) * held

    def one(index: jax.Array, state: DecodeState) -> DecodeState:
        group = groups[index] - first
        here = (group >= 0) & (group < held)
        group = jnp.clip(group, 0, held - 1)
        prompt = partial(_copy, here & new_prompt[index][None], 1, group, index)
        row = partial(_copy, here & fresh[index], plan.samples, group, index)
        cache, new = state.cache, part.cache
        k, v, bounds = jax.tree.map(
            partial(prompt, 1),
            (cache.prompt.k, cache.prompt.v, cache.prompt.bounds),
            (new.prompt.k, new.prompt.v, new.prompt.bounds),
        )
        lengths = prompt(0, cache.prompt.lengths, new.prompt.lengths)

        def joined(of: Group, old: Kept, of_part: Kept) -> Kept:
            fill = row(1, old.fill, of_part.fill)
            if not (of.ring or plan.policy.evicts_prompt):
                # What lies in empty slots is never read.
                return dataclasses.replace(old, fill=fill)
            # A pool begins with the rows, all else with the layers.
            pages = ((each.k, each.v, each.bounds) for each in (old, of_part))
            k, v, bounds = jax.tree.map(partial(row, 1 if of.ranges is None else 0), *pages)
            return Kept(k, v, fill, bounds)

        kept = tuple(map(joined, plan.groups, cache.kept, new.kept))
        rows: Rows = jax.tree.map(partial(row, 0), state.rows, part.rows)
        return dataclasses.replace(
            state,
            cache=dataclasses.replace(
                cache,
                prompt=dataclasses.replace(cache.prompt, k=k, v=v, bounds=bounds, lengths=lengths),
                kept=kept,
            ),
            meta=jax.tree.map(partial(row, 1), state.meta, part.meta),
            rows=rows,
        )

    joined: DecodeState = jax.lax.fori_loop(0, groups.shape[0], one, state)
    return joined


def _copy(
    wanted: jax.Array,
    size: int,
    to: jax.Array,
    at: jax.Array,
    axis: int,
    buffer: jax.Array,
    part: jax.Array,
) -> jax.Array:
    """Overwrites, of block `to` of `buffer`, the `wanted` entries by those of block `at` of `part`.

    Blocks are `size` long along `axis`, that of the rows or prompts; wanted is bool `[size]`. Along
    later axes `part` may be the shorter one.
    """
    if not part.size:
        return buffer
    new = jax.lax.dynamic_slice_in_dim(part, at * size, size, axis)
    start = [jnp.zeros((), jnp.int32)] * buffer.ndim
    start[axis] = to * size
    old = jax.lax.dynamic_slice(buffer, start, new.shape)
    mask = wanted.reshape(-1, *(1,) * (buffer.ndim - axis - 1))
    return jax.lax.dynamic_update_slice(buffer, jnp.where(mask, new, old), start)
