"""What runs on the device: rows that come and go in a decode of fixed shape.

    admissions ──► admit ──► DecodeState ──► advance ──► DecodeState, Seen ──► ...

Both functions are given the state for good and write into its memory; a row that joins overwrites
what its predecessor left, of the size of one row, and no other row is touched.
"""

from __future__ import annotations

import dataclasses
import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raas_jax.config import ModelConfig
from raas_jax.decode import (
    DecodeState,
    Plan,
    Sampled,
    decode_pages,
    empty_cache,
    init_metadata,
    prefill,
    request,
)
from raas_jax.params import Params
from raas_jax.policies.base import Metadata
from raas_jax.sampling import Sampler
from raas_jax.sharding import RULES, state_shardings


class Admissions(NamedTuple):
    """Prompts of one bucket that join at a page boundary, and the rows that answer them.

    The `B` rows come in `B'` groups of `samples`, which share a prompt.

    Attributes:
      tokens: int32 `[n, T]`, prompts at the left, padded at the right.
      lengths: int32 `[n]`, true lengths.
      groups: int32 `[n]`, the group that answers each, in 0..B'-1.
      new_prompt: bool `[n]`, the group begins with this prompt; else it has it already.
      fresh: bool `[n, samples]`, rows that begin; the others of the group are left alone.
      seed: int32 `[n]`, of the prompt.
      sample: int32 `[n, samples]`, folded with the seed.
      limit: int32 `[n]`, tokens that each row may draw.
      temperature, top_k, top_p, min_p: `[n]`, see `Sampling`.
    """

    tokens: Any
    lengths: Any
    groups: Any
    new_prompt: Any
    fresh: Any
    seed: Any
    sample: Any
    limit: Any
    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any


def empty_admissions(size: int, bucket: int, samples: int) -> Admissions:
    """Admissions of this shape, to be filled in: a line that is not starts no row."""
    by_line = lambda dtype, value=0: np.full(size, value, dtype)  # noqa: E731
    return Admissions(
        tokens=np.zeros((size, bucket), np.int32),
        lengths=by_line(np.int32, 1),
        groups=by_line(np.int32),
        new_prompt=by_line(np.bool_),
        fresh=np.zeros((size, samples), np.bool_),
        seed=by_line(np.int32),
        sample=np.zeros((size, samples), np.int32),
        limit=by_line(np.int32),
        temperature=by_line(np.float32),
        top_k=by_line(np.int32),
        top_p=by_line(np.float32, 1.0),
        min_p=by_line(np.float32),
    )


class Seen(NamedTuple):
    """What the host looks at: `Sampled` `[T, B]`, and `committed` and `evicted` of the state."""

    drawn: Sampled
    committed: jax.Array
    evicted: jax.Array


def empty_state(
    config: ModelConfig, plan: Plan, rows: int, dtype: Any, stop_tokens: tuple[int, ...]
) -> DecodeState:
    """A state in which no row runs."""
    cache = empty_cache(config, plan, rows, dtype)
    # Of one token, since no prompt is empty; it is never seen.
    lengths = jnp.ones_like(cache.prompt.lengths)
    integers = lambda: jnp.ones(rows, jnp.int32)  # noqa: E731
    sampler = Sampler(
        jnp.zeros(rows, jnp.float32),
        jnp.zeros(rows, jnp.int32),
        jnp.ones(rows, jnp.float32),
        jnp.zeros(rows, jnp.float32),
        jax.random.split(jax.random.key(0), rows),
    )
    asked = request(integers(), stop_tokens, sampler)
    return DecodeState(
        cache=dataclasses.replace(cache, prompt=dataclasses.replace(cache.prompt, lengths=lengths)),
        meta=init_metadata(config, plan, rows),
        token=integers(),
        generated=integers(),
        limit=asked.limit,
        done=jnp.ones(rows, jnp.bool_),
        committed=jnp.zeros(rows, jnp.int32),
        evicted=jnp.zeros(rows, jnp.int32),
        stop_tokens=asked.stop_tokens,
        sampler=sampler,
    )


def admit(
    params: Params, state: DecodeState, admissions: Admissions, *, plan: Plan, mesh: Mesh | None
) -> tuple[DecodeState, Sampled]:
    """Reads the prompts of admissions and starts their rows, in the memory of the state.

    Returns:
      The state, and the first tokens of the admissions' rows, `[n * samples]`.
    """
    T = admissions.tokens.shape[1]
    samples = plan.samples
    by_row = partial(jnp.repeat, repeats=samples, axis=0)
    sampler = Sampler(
        by_row(admissions.temperature),
        by_row(admissions.top_k),
        by_row(admissions.top_p),
        by_row(admissions.min_p),
        jax.vmap(_row_key)(by_row(admissions.seed), admissions.sample.reshape(-1)),
    )
    asked = request(by_row(admissions.limit), (), sampler)._replace(stop_tokens=state.stop_tokens)
    bucket = dataclasses.replace(plan, prompt_slots=T // plan.page_size)
    part, first = prefill(params, admissions.tokens, admissions.lengths, asked, plan=bucket)
    places = admissions.groups, admissions.new_prompt, admissions.fresh
    if mesh is None:
        return _insert(state, part, *places, plan=plan), first
    whole = PartitionSpec()
    state_specs = jax.tree.map(lambda s: s.spec, state_shardings(state, mesh))
    part_specs = jax.tree.map(lambda s: s.spec, state_shardings(part, mesh, rows_divide=False))
    # Each device writes the rows that it holds; nothing is asked of the compiler.
    insert = jax.shard_map(
        partial(_insert, plan=plan, axis=RULES["rows"]),
        mesh=mesh,
        in_specs=(state_specs, part_specs, whole, whole, whole),
        out_specs=state_specs,
        check_vma=False,
    )
    return insert(state, part, *places), first


def _row_key(seed: jax.Array, sample: jax.Array) -> jax.Array:
    """The key of `sampling.row_keys`: a row of an engine draws what `generate` would."""
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
        segment = jax.tree.map(
            partial(prompt, 1),
            (cache.prompt.k, cache.prompt.v, cache.prompt.bounds),
            (new.prompt.k, new.prompt.v, new.prompt.bounds),
        )
        lengths = prompt(0, cache.prompt.lengths, new.prompt.lengths)
        kept = tuple(
            # What an empty slot holds is never read.
            jax.tree.map(partial(row, 1), old, fresh_kept)
            if plan.policy.evicts_prompt
            else dataclasses.replace(old, fill=row(1, old.fill, fresh_kept.fill))
            for old, fresh_kept in zip(cache.kept, new.kept, strict=True)
        )
        meta: tuple[Metadata, ...] = jax.tree.map(partial(row, 1), state.meta, part.meta)
        rest = lambda s: dataclasses.replace(  # noqa: E731
            s, cache=None, meta=None, stop_tokens=None
        )
        scalars = jax.tree.map(partial(row, 0), rest(state), rest(part))
        return dataclasses.replace(
            scalars,
            cache=dataclasses.replace(
                cache,
                prompt=dataclasses.replace(
                    cache.prompt, k=segment[0], v=segment[1], bounds=segment[2], lengths=lengths
                ),
                kept=kept,
            ),
            meta=meta,
            stop_tokens=state.stop_tokens,
        )

    return jax.lax.fori_loop(0, groups.shape[0], one, state)


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

    Args:
      wanted: bool `[size]`.
      size: length of a block along `axis`.
      to, at: int32 scalars.
      axis: of the rows or prompts. Along later axes `part` may be the shorter one.
      buffer: array to write into.
      part: array to read from.
    """
    if not part.size:
        return buffer
    new = jax.lax.dynamic_slice_in_dim(part, at * size, size, axis)
    start = [jnp.zeros((), jnp.int32)] * buffer.ndim
    start[axis] = to * size
    old = jax.lax.dynamic_slice(buffer, start, new.shape)
    mask = wanted.reshape(-1, *(1,) * (buffer.ndim - axis - 1))
    return jax.lax.dynamic_update_slice(buffer, jnp.where(mask, new, old), start)


def advance(
    params: Params, state: DecodeState, *, plan: Plan, pages: int
) -> tuple[DecodeState, Seen]:
    """Decodes some pages, in the memory of the state, and gives out what the host looks at."""
    state, drawn = decode_pages(params, state, plan=plan, pages=pages)
    return state, Seen(drawn, state.committed, state.evicted)


class Programs(NamedTuple):
    """The compiled functions of one engine, for its plan, rows and mesh.

    Attributes:
      empty: () → a state in which no row runs.
      admit: (params, state, admissions) → state, first tokens; compiled for each shape of
        admissions.
      advance: (params, state) → state, `Seen`.
      shape: the state as `ShapeDtypeStruct`s, with their shardings on a mesh.
    """

    empty: Any
    admit: Any
    advance: Any
    shape: DecodeState


@functools.lru_cache(maxsize=64)
def programs(
    config: ModelConfig,
    dtype: str,
    plan: Plan,
    rows: int,
    pages: int,
    stop_tokens: tuple[int, ...],
    mesh: Mesh | None,
) -> Programs:
    """The programs of an engine; equal engines share them, and what was compiled.

    Args:
      config, dtype: of the model, and of its weights.
      plan: fixed shapes.
      rows: `B`.
      pages: between two looks of the host.
      stop_tokens: of every row.
      mesh: None for one device.
    """
    empty = partial(empty_state, config, plan, rows, jnp.dtype(dtype), stop_tokens)
    shape = jax.eval_shape(empty)
    admit_rows, advance_rows = (
        partial(admit, plan=plan, mesh=mesh),
        partial(advance, plan=plan, pages=pages),
    )
    donated: dict[str, Any] = {"donate_argnums": 1}
    if mesh is None:
        return Programs(
            jax.jit(empty),
            jax.jit(admit_rows, **donated),
            jax.jit(advance_rows, **donated),
            shape,
        )
    placed = state_shardings(shape, mesh)
    # What the host reads is replicated, so that every process can.
    out: dict[str, Any] = {"out_shardings": (placed, NamedSharding(mesh, PartitionSpec()))}
    return Programs(
        jax.jit(empty, out_shardings=placed),
        jax.jit(admit_rows, **donated, **out),
        jax.jit(advance_rows, **donated, **out),
        jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shape,
            placed,
        ),
    )
