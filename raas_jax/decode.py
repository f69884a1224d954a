"""Prefill, token step and page scan: pure functions from state to state.

    prefill ──► DecodeState ──► decode_pages ──► DecodeState ──► ...
                                 outer scan over pages: inner scan over P tokens, one commit

The prompt and the kept pages are read-only within a page, so they are loop invariants of the inner
scan; what changes per token is one offset of the current page and the policy's small metadata.
`raas_jax.session.Session` drives these functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint

from pallas_kernels import Target
from raas_jax.attention import Reader, causal_attention, prompt_mass
from raas_jax.cache import (
    Bounds,
    Cache,
    CurrentPage,
    Kept,
    Prompt,
    as_pool,
    commit,
    layer_pages,
    page_bounds,
    write_token,
)
from raas_jax.chunks import in_chunks
from raas_jax.config import ModelConfig
from raas_jax.model import Body, Layer, ends, run_layers
from raas_jax.params import Params
from raas_jax.plan import Group, Plan
from raas_jax.policies import pages_for
from raas_jax.policies.base import (
    Boundary,
    Bounded,
    Evidence,
    Metadata,
    Page,
    PromptPages,
    Selection,
)
from raas_jax.rotation import Rotation, rotations_of
from raas_jax.sampling import Sampler, Sampling, log_probability, row_keys
from raas_jax.windows import filled, first_positions, last_pages, newest_first

EVICTION_STREAM = 0x52616153  # Apart from the stream that sampling draws from the same row keys.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What each row is about; every array begins with the axis `B`.

    Attributes:
      token: int32 `[B]`, the last token sampled, not yet fed to the model.
      generated: int32 `[B]`, tokens sampled so far, `token` included; frozen once done.
      limit: int32 `[B]`, how many may be sampled.
      done: bool `[B]`, a stop token was sampled, the limit reached, or logits were not finite. A
        done row computes on, unseen.
      committed: int32 `[B]`, pages that left the current page while the row was running.
      evicted: int32 `[B]`, pages that were overwritten or emptied while the row was running; the
        most of any layer and head.
      sampler: how each row samples.
    """

    token: jax.Array
    generated: jax.Array
    limit: jax.Array
    done: jax.Array
    committed: jax.Array
    evicted: jax.Array
    sampler: Sampler


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that a decode carries; its size does not depend on how far it has come.

    Attributes:
      cache: keys and values.
      meta: the policy's metadata, one entry per group of layers.
      rows: what each row is about.
      stop_tokens: int32 `[any]`, padded with -1.
    """

    cache: Cache
    meta: tuple[Metadata, ...]
    rows: Rows
    stop_tokens: jax.Array


class Sampled(NamedTuple):
    """Tokens that were sampled.

    Attributes:
      tokens: int32 `[B]`, or with further axes; -1 for a row that was done, or whose logits were
        not finite.
      logprobs: float32, their log-probabilities; NaN where the logits were not finite.
    """

    tokens: jax.Array
    logprobs: jax.Array


class Progress(NamedTuple):
    """What `T` steps gave out, and where the rows then were: all that a host needs to see.

    Attributes:
      tokens: int32 `[T, B]`, sampled or forced; -1 for a row that was done, or whose logits were
        not finite, which ends it.
      logprobs: float32 `[T, B]`, under the model at temperature 1, before any filter; NaN where
        the logits were not finite.
      committed, evicted, done: `[B]`, see `Rows`.
      greedy: bool `[T, B]`, whether the token is the likeliest; None unless tokens were forced.
      probed: what a `Probe` saw; None without one.
    """

    tokens: jax.Array
    logprobs: jax.Array
    committed: jax.Array
    evicted: jax.Array
    done: jax.Array
    greedy: jax.Array | None = None
    probed: Probed | None = None


class Probe(NamedTuple):
    """Functions of the state whose results are given out; static, equal ones share a program.

    Attributes:
      page: called before each page; its results are stacked to `[pages, ...]`.
      step: called after each token; its results are stacked to `[pages, P, ...]`.
      hidden: called with the last layer's output for each token, `[B, D]`; stacked likewise.
    """

    page: Callable[[DecodeState], Any] | None = None
    step: Callable[[DecodeState], Any] | None = None
    hidden: Callable[[jax.Array], Any] | None = None


class Probed(NamedTuple):
    """The results of a `Probe`'s functions, stacked as it says; None of those that it lacks."""

    page: Any
    step: Any
    hidden: Any


class RowRequest(NamedTuple):
    """What is asked of each row, see `Rows`."""

    limit: jax.Array
    stop_tokens: jax.Array
    sampler: Sampler

    @classmethod
    def create(
        cls,
        limits: Sequence[int] | jax.Array,
        stop_tokens: Sequence[int] = (),
        sampling: Sampling | Sequence[Sampling] | None = None,
        seed: int | jax.Array | Sequence[int] = 0,
    ) -> RowRequest:
        """Requests of rows.

        Args:
          limits: tokens that each row may have, int32 `[B]`.
          stop_tokens: ids that end a row; padded to a bucket.
          sampling: greedy by default; one for all rows, or one for each.
          seed: as for `raas_jax.sampling.row_keys`.
        """
        rows = len(limits)
        if sampling is None or isinstance(sampling, Sampling):
            sampling = [sampling or Sampling()] * rows
        padded = [*stop_tokens, *[-1] * (-len(stop_tokens) % 8 or 8 * (not stop_tokens))]
        return cls(
            jnp.asarray(limits, jnp.int32),
            jnp.asarray(padded, jnp.int32),
            Sampler.create(sampling, row_keys(seed, rows)),
        )


def pad_prompts(prompts: Sequence[Sequence[int]], plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 `[B', Sp * P]`, padded at the right, and lengths `[B']`, for `prefill`."""
    tokens = np.zeros((len(prompts), plan.prompt_slots * plan.page_size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def empty_cache(config: ModelConfig, plan: Plan, rows: int, dtype: Any) -> Cache:
    """A cache of zeros: `rows` is `B`, of which every `plan.samples` share a prompt."""
    K, H, P = config.num_key_value_heads, config.head_dim, plan.page_size

    def pages(*shape: int) -> jax.Array:
        return jnp.zeros((*shape, P, H), dtype)

    def bounds(wanted: bool, *shape: int) -> Bounds | None:
        shape = (*shape, H)
        return Bounds(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) if wanted else None

    slots = 0 if plan.policy.evicts_prompt else plan.prompt_slots
    prompt = (config.full_layers, rows // plan.samples, K, slots)
    bounded = any(group.policy.needs_prompt_bounds for group in plan.groups)

    def kept(group: Group) -> Kept:
        marks = group.layers, rows, K, group.slots
        shape = marks if group.ranges is None else (rows, group.ranges.total)
        own = bounds(group.policy.needs_bounds, *shape)
        return Kept(pages(*shape), pages(*shape), jnp.zeros(marks, jnp.int32), own)

    return Cache(
        prompt=Prompt(
            pages(*prompt),
            pages(*prompt),
            jnp.zeros(prompt[1], jnp.int32),
            bounds(bounded, *prompt),
        ),
        kept=tuple(map(kept, plan.groups)),
        current=CurrentPage(*(pages(config.num_hidden_layers, rows, K) for _ in "kv")),
    )


def init_metadata(config: ModelConfig, plan: Plan, rows: int) -> tuple[Metadata, ...]:
    """The policy's metadata of an empty cache, one entry per group of layers."""
    K = config.num_key_value_heads
    return tuple(group.policy.init((group.layers, rows, K, group.slots)) for group in plan.groups)


def empty_state(
    config: ModelConfig, plan: Plan, rows: int, dtype: Any, stop_tokens: Sequence[int] = ()
) -> DecodeState:
    """A state in which no row runs."""
    cache = empty_cache(config, plan, rows, dtype)
    # Of one token, since no prompt is empty; it is never seen.
    prompt = dataclasses.replace(cache.prompt, lengths=jnp.ones_like(cache.prompt.lengths))
    asked = RowRequest.create([1] * rows, stop_tokens)
    return DecodeState(
        cache=dataclasses.replace(cache, prompt=prompt),
        meta=init_metadata(config, plan, rows),
        rows=_first_rows(asked, jnp.ones(rows, jnp.int32), jnp.zeros(rows, jnp.int32)),
        stop_tokens=asked.stop_tokens,
    )


def _first_rows(request: RowRequest, token: jax.Array, evicted: jax.Array) -> Rows:
    """Rows that have sampled one token, or none (-1) where the logits were not finite."""
    generated = jnp.ones_like(token)
    done = _is_done(token, generated, request.limit, request.stop_tokens)
    zero = jnp.zeros_like(token)
    return Rows(
        jnp.maximum(token, 0), generated, request.limit, done, zero, evicted, request.sampler
    )


@partial(jax.jit, static_argnames="plan")
def prefill(
    params: Params,
    tokens: jax.Array,
    lengths: jax.Array,
    request: RowRequest,
    *,
    plan: Plan,
    force: jax.Array | None = None,
) -> tuple[DecodeState, Progress]:
    """Reads the prompts and samples the first token of every row.

    Args:
      params: the model.
      tokens: int32 `[B', T]` with `T <= Sp * P`, prompts at the left, padded at the right.
      lengths: int32 `[B']`, true lengths.
      request: limits, stop tokens and sampler of the `B = B' * samples` rows.
      plan: fixed shapes.
      force: int32 `[B]`, first tokens to take instead of sampling; -1 samples.

    Returns:
      The state at the start of the first page, and the first tokens, `T = 1`.
    """
    config, P = params.config, plan.page_size
    dtype = params.dtype
    rows = tokens.shape[0] * plan.samples
    padded = jnp.pad(tokens, ((0, 0), (0, plan.prompt_slots * P - tokens.shape[1])))
    positions = jnp.broadcast_to(jnp.arange(padded.shape[1], dtype=jnp.int32), padded.shape)
    total = jnp.max(request.limit.reshape(-1, plan.samples), axis=1) + lengths
    lasting = {"seen": lengths[:, None], "total": total[:, None]}
    rotations = rotations_of(config, positions, **lasting)
    queries = plan.policy.prompt_queries

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, Any]:
        rotation = rotations[layer.kind]
        q, k, v = in_chunks(lambda x, *angles: layer.qkv(x, angles), x, *rotation)
        attended = causal_attention(q, k, v, target=plan.target, **layer.sight)
        x = in_chunks(layer.finish, x, attended)
        if layer.kind == "window":
            assert plan.windows is not None
            slots = plan.windows.slots
            return x, tuple(last_pages(each, lengths, slots, P) for each in (k, v))
        mass = prompt_mass(q, k, lengths, P, queries, layer.sink) if queries else None
        return x, (_as_pages(k, P), _as_pages(v, P), mass)

    model = ends(config, params.weights)
    layers = partial(run_layers, target=plan.target)
    x, found = layers(config, params.weights, body, model.embed(padded))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = jnp.repeat(model.logits(last), plan.samples, axis=0)
    lengths = lengths.astype(jnp.int32)
    cache = empty_cache(config, plan, rows, dtype)
    meta, evicted = init_metadata(config, plan, rows), jnp.zeros(rows, jnp.int32)
    k, v, mass = found.get("full", (cache.prompt.k, cache.prompt.v, None))
    prompt = Prompt(k, v, lengths, None)
    if plan.windows:
        cache, meta = _fill_ring(cache, meta, found["window"], lengths, plan)
    if plan.policy.evicts_prompt:
        cache, meta, evicted = _insert_prompt(cache, meta, prompt, mass, plan)
        prompt = dataclasses.replace(cache.prompt, lengths=prompt.lengths)
    elif cache.prompt.bounds is not None:
        fill = jnp.broadcast_to(prompt.fill()[None], k.shape[:4])
        prompt = dataclasses.replace(prompt, bounds=page_bounds(k, fill))
    token, logprob, greedy = _choose(request.sampler, logits, jnp.zeros(rows, jnp.int32), force)
    state = DecodeState(
        cache=dataclasses.replace(cache, prompt=prompt),
        meta=meta,
        rows=_first_rows(request, token, evicted),
        stop_tokens=request.stop_tokens,
    )
    return state, _progress(state, jax.tree.map(lambda x: x[None], (token, logprob, greedy)))


def _fill_ring(
    cache: Cache,
    meta: tuple[Metadata, ...],
    pages: tuple[jax.Array, jax.Array],
    lengths: jax.Array,
    plan: Plan,
) -> tuple[Cache, tuple[Metadata, ...]]:
    """Puts the prompts' last pages `[L, B', K, S, P, H]` into the ring of every row."""
    empty, P = cache.kept[-1], plan.page_size
    k, v = (jnp.repeat(each, plan.samples, axis=1) for each in pages)
    first = first_positions(jnp.repeat(lengths, plan.samples), k.shape[3], P)
    first = jnp.broadcast_to(first[:, None], empty.fill.shape)
    ring = dataclasses.replace(empty, k=k, v=v, fill=filled(first, P))
    return dataclasses.replace(cache, kept=(*cache.kept[:-1], ring)), (*meta[:-1], first)


def _insert_prompt(
    cache: Cache,
    meta: tuple[Metadata, ...],
    prompt: Prompt,
    mass: jax.Array | None,
    plan: Plan,
) -> tuple[Cache, tuple[Metadata, ...], jax.Array]:
    """Puts the prompt's pages among the kept ones; also, how many had no place, int32 `[B]`."""

    def by_row(x: jax.Array, axis: int) -> jax.Array:
        return jnp.repeat(x, plan.samples, axis=axis)

    def placed_in(group: Group, x: jax.Array, pages: jax.Array) -> jax.Array:
        """The `pages [L, B, K, S]` of the prompt, as the kept ones lie."""
        x = by_row(x[group.part], 1)
        if group.ranges is None:
            return jnp.take_along_axis(x, pages[..., None, None], axis=3)
        layer, head, _ = group.ranges.places
        row = jnp.arange(x.shape[1])[:, None]
        found: jax.Array = x[layer, row, head, as_pool(pages, group.ranges)]
        return found

    fill, lengths = by_row(prompt.fill()[:, 0], 0), by_row(prompt.lengths, 0)
    kept, placed = [], []
    evicted = jnp.zeros(lengths.shape, jnp.int32)
    for group, old, of_group in zip(plan.groups, cache.kept, meta, strict=True):
        if group.ring:
            kept.append(old)
            placed.append(of_group)
            continue
        of_layers = None if mass is None else by_row(mass[group.part], 1)
        room = group.policy.capacity(lengths, group.counts(old.fill.shape[2]))
        pages, of_group = group.policy.insert_prompt(
            of_group, PromptPages(lengths, fill, of_layers, room)
        )
        wanted = jnp.maximum(pages, 0)
        filled = jnp.broadcast_to(fill[:, None], (*wanted.shape[:3], fill.shape[-1]))
        filled = jnp.where(pages < 0, 0, jnp.take_along_axis(filled, wanted, axis=-1))
        k, v = (placed_in(group, x, wanted) for x in (prompt.k, prompt.v))
        bounds = None
        if old.bounds is not None:
            lying = filled if group.ranges is None else as_pool(filled, group.ranges)
            bounds = page_bounds(k, lying)
        kept.append(Kept(k, v, filled, bounds))
        placed.append(of_group)
        lost = jnp.sum(fill > 0, axis=-1)[:, None] - jnp.sum(filled > 0, axis=-1)
        evicted = jnp.maximum(evicted, jnp.max(lost, axis=(0, 2)).astype(jnp.int32))
    return dataclasses.replace(cache, kept=tuple(kept)), tuple(placed), evicted


@partial(jax.jit, static_argnames=("plan", "pages", "probe"), donate_argnames="state")
def decode_pages(
    params: Params,
    state: DecodeState,
    *,
    plan: Plan,
    pages: int,
    force: jax.Array | None = None,
    probe: Probe | None = None,
) -> tuple[DecodeState, Progress]:
    """Generates `pages * P` tokens. The state is donated: it is the memory, and must not be copied.

    Args:
      params: the model.
      state: at a page boundary.
      plan: fixed shapes.
      pages: how many.
      force: int32 `[pages * P, B]`, tokens to take instead of sampling; -1 samples.
      probe: functions of the state whose results are given out.

    Returns:
      The state at the next page boundary, and what the steps gave.
    """
    if force is not None:
        force = force.reshape(pages, plan.page_size, -1)

    def page(state: DecodeState, force: jax.Array | None) -> tuple[DecodeState, Any]:
        before = probe.page(state) if probe and probe.page else None
        state, (sampled, (step, hidden)) = decode_page(params, state, plan, force, probe)
        return state, (sampled, Probed(before, step, hidden))

    state, (sampled, probed) = jax.lax.scan(page, state, force, length=pages)
    sampled = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), sampled)
    return state, _progress(state, sampled, None if probe is None else probed)


def decode_until_done(
    params: Params, state: DecodeState, first: Progress, plan: Plan, max_new_tokens: int
) -> tuple[DecodeState, Sampled]:
    """The whole answer in one compiled loop, for use inside a `jax.jit`; stops when all rows have.

    From the state that `prefill` left and what it sampled first, gives the last state, and what was
    sampled: `[max_new_tokens, B]`, -1 after the end of a row. No row's limit may be larger.
    """
    P = plan.page_size
    pages = pages_for(max_new_tokens - 1, P)
    after = ((0, pages * P), (0, 0))
    buffers = (
        jnp.pad(first.tokens, after, constant_values=-1),
        jnp.pad(first.logprobs, after),
    )

    def going(carry: tuple[DecodeState, Any, jax.Array]) -> jax.Array:
        state, _, page = carry
        return (page < pages) & ~jnp.all(state.rows.done)

    def body(carry: tuple[DecodeState, Any, jax.Array]) -> tuple[DecodeState, Any, jax.Array]:
        state, buffers, page = carry
        state, ((*sampled, _), _) = decode_page(params, state, plan)
        at = (1 + page * P, jnp.int32(0))
        pairs = zip(buffers, sampled, strict=True)
        return state, tuple(jax.lax.dynamic_update_slice(*pair, at) for pair in pairs), page + 1

    state, buffers, _ = jax.lax.while_loop(going, body, (state, buffers, jnp.int32(0)))
    return state, Sampled(*(buffer[:max_new_tokens] for buffer in buffers))


def decode_page(
    params: Params,
    state: DecodeState,
    plan: Plan,
    force: jax.Array | None = None,
    probe: Probe | None = None,
) -> tuple[DecodeState, Any]:
    """One page: P token steps with the big buffers read-only, then one commit.

    Returns:
      The state, and `(tokens, logprobs, greedy)` `[P, B]` with what the probe saw of each token.
    """

    def step(state: DecodeState, scanned: Any) -> tuple[DecodeState, Any]:
        state, sampled, x = token_step(params, state, scanned[0], plan, scanned[1])
        after = probe.step(state) if probe and probe.step else None
        hidden = probe.hidden(x) if probe and probe.hidden else None
        return state, (sampled, (after, hidden))

    offsets = jnp.arange(plan.page_size, dtype=jnp.int32)
    state, given = jax.lax.scan(step, state, (offsets, force))
    return commit_page(state, plan), given


def token_step(
    params: Params,
    state: DecodeState,
    offset: jax.Array,
    plan: Plan,
    force: jax.Array | None = None,
) -> tuple[DecodeState, tuple[jax.Array, jax.Array, jax.Array | None], jax.Array]:
    """Feeds each row's token, writes it at `offset` of the current page, and samples the next.

    Returns:
      The state; the tokens, log-probabilities and, where forced, whether they are the likeliest,
      `[B]` each; and the last layer's output `[B, D]`.
    """
    config, rows = params.config, state.rows
    model = ends(config, params.weights)
    position = prompt_lengths(state, plan) + rows.generated - 1
    total = total_lengths(state, plan)[:, None]
    rotations = rotations_of(config, position[:, None], total=total)
    seen = _in_sight(state, plan, position)
    body_of = partial(_step_body, seen, plan, rotations=rotations, offset=offset)
    x, current, shown = run_groups(params, seen, plan, body_of, model.embed(rows.token)[:, None])
    meta = tuple(_observe(state, plan, *group) for group in enumerate(shown))
    logits = model.logits(x[:, 0], plan.target or Target.of())
    token, logprob, greedy = _choose(rows.sampler, logits, rows.generated, force)
    sampled = jnp.where(rows.done, -1, token), jnp.where(rows.done, 0.0, logprob), greedy
    over = rows.done | (token < 0)
    generated = jnp.where(over, rows.generated, rows.generated + 1)
    done = over | _is_done(token, generated, rows.limit, state.stop_tokens)
    token = jnp.where(over, rows.token, token)
    stepped = dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, current=current),
        meta=meta,
        rows=dataclasses.replace(rows, token=token, generated=generated, done=done),
    )
    return stepped, sampled, x[:, 0]


def _in_sight(state: DecodeState, plan: Plan, position: jax.Array) -> DecodeState:
    """The state as tokens at `position [B]` see it: what has left a window is out of its ring."""
    if plan.windows is None or plan.windows.ring is None:
        return state
    fill = plan.windows.ring.in_sight(state.meta[-1], position)
    kept = *state.cache.kept[:-1], dataclasses.replace(state.cache.kept[-1], fill=fill)
    return dataclasses.replace(state, cache=dataclasses.replace(state.cache, kept=kept))


def run_groups(
    params: Params, state: DecodeState, plan: Plan, body_of: Callable[[int], Body], x: jax.Array
) -> tuple[jax.Array, CurrentPage, tuple[Any, ...]]:
    """Runs x `[B, any, D]` through all layers: of each group those of the body for its number.

    Returns:
      The last layer's output, the current page of every layer, and of every group what the body
      gave for its layers, stacked.
    """
    bodies = [body_of(number) for number in range(len(plan.groups))]

    def body(layer: Layer, carry: Any, x: Any) -> tuple[Any, Any]:
        given: tuple[Any, Any] = bodies[layer.kind](layer, carry, x)
        return given

    (x, current), given = run_layers(
        params.config,
        params.weights,
        body,
        (x, state.cache.current),
        {number: (kept.fill, state.meta[number]) for number, kept in enumerate(state.cache.kept)},
        kinds=plan.kinds,
        by_number=True,
        target=plan.target or Target.of(),
    )
    return x, current, tuple(given[number] for number in range(len(plan.groups)))


def reader_of(cache: Cache, plan: Plan, number: int, layer: Layer, **seen: Any) -> Reader:
    """A layer's view of the cache, in the group with this number; `seen` are its other fields."""
    group = plan.groups[number]
    return Reader(
        cache=cache,
        group=number,
        layer=layer.number,
        layer_in_group=layer.place,
        layer_in_prompt=None if group.ring else layer.place + group.first,
        sink=layer.sink,
        samples=plan.samples,
        ranges=group.ranges,
        target=plan.target,
        **seen,
    )


def _step_body(
    state: DecodeState,
    plan: Plan,
    number: int,
    rotations: dict[str, Rotation],
    offset: jax.Array,
) -> Body:
    """What a layer of group `number` does with x `[B, 1, D]` and the current page.

    It gives what its policy wants to see, if that keeps metadata: its mass, bound and current mass.
    """
    cache, group = state.cache, plan.groups[number]
    policy, rotation = group.policy, rotations[group.kind]
    prompt_fill, written = cache.prompt.fill(), offset + 1

    def body(
        layer: Layer,
        carry: tuple[jax.Array, CurrentPage],
        own: tuple[jax.Array, Metadata],
    ) -> tuple[tuple[jax.Array, CurrentPage], Any]:
        (x, current), (fill, meta) = carry, own
        q, k, v = layer.qkv(x, rotation)
        current = write_token(current, k[:, 0], v[:, 0], layer.number, offset)
        now = dataclasses.replace(cache, current=current)
        seen = {"fill": fill, "prompt_fill": prompt_fill, "written": written}
        reader = reader_of(now, plan, number, layer, **seen)
        by_head = partial(_by_head, heads=k.shape[2])
        selection = Selection()
        if policy.selects:
            bounded: Bounded = jax.tree.map(by_head, reader.bounded(q[:, 0]))
            selection = policy.select(meta, bounded)
        out, mass, current_mass = reader.attend(q[:, 0], selection)
        shown = None
        if jax.tree.leaves(meta) and not group.ring:
            bound = reader.bound(q[:, 0]) if policy.needs_bounds else None
            shown = jax.tree.map(by_head, (mass, bound, current_mass))
        return (layer.finish(x, out[:, None].astype(x.dtype)), current), shown

    return body


def _observe(state: DecodeState, plan: Plan, number: int, shown: Any) -> Metadata:
    """The metadata of group `number` after a token, of all its layers at once.

    In the loop over layers, what is so small costs a GPU launches and a TPU operations in each.
    """
    meta = state.meta[number]
    if shown is None:
        return meta
    mass, bound, current_mass = shown
    evidence = Evidence(mass, bound, state.cache.kept[number].fill, current_mass)
    observe = jax.vmap(plan.groups[number].policy.observe, in_axes=(0, 0, None))
    observed: Metadata = observe(meta, evidence, state.rows.generated)
    return observed


def _choose(
    sampler: Sampler, logits: jax.Array, index: jax.Array, force: jax.Array | None
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The next token of every row, its log-probability and, where forced, whether it is greedy.

    Where the logits are not finite they are -1 and NaN: one NaN or infinity among them makes the
    log-probability of whatever was sampled one, too.
    """
    token, logprob = sampler(logits, index)
    finite, greedy = jnp.isfinite(logprob), None
    if force is not None:
        token = jnp.where(force < 0, token, force)
        logprob, greedy = log_probability(logits, token), token == jnp.argmax(logits, axis=-1)
    return jnp.where(finite, token, -1), jnp.where(finite, logprob, jnp.nan), greedy


def _progress(
    state: DecodeState,
    sampled: tuple[jax.Array, jax.Array, jax.Array | None],
    probed: Probed | None = None,
) -> Progress:
    tokens, logprobs, greedy = sampled
    rows = state.rows
    return Progress(tokens, logprobs, rows.committed, rows.evicted, rows.done, greedy, probed)


def commit_page(state: DecodeState, plan: Plan) -> DecodeState:
    """The page boundary: each (layer, row, head) writes its current page over its victim's slot."""
    now, lengths = state.rows.generated, prompt_lengths(state, plan)
    written = state.rows.committed + 1
    if plan.policy.evicts_prompt:
        written += -(-lengths // plan.page_size)
    kept, meta, current = [], [], state.cache.current
    evicted = jnp.zeros(now.shape, jnp.int32)
    for number, group in enumerate(plan.groups):
        policy, old = group.policy, state.cache.kept[number]
        room = policy.capacity(lengths, group.counts(old.fill.shape[2]))
        boundary = Boundary(
            now=now,
            fill=old.fill,
            allowed=jnp.arange(group.slots) < room[..., None],
            k=partial(layer_pages, old.k, ranges=group.ranges),
            v=partial(layer_pages, old.v, ranges=group.ranges),
            keys=_boundary_keys(state.rows.sampler.keys, now, number),
            prompt_lengths=lengths,
        )
        slot = policy.victim(state.meta[number], boundary)
        page = Page(*(group.among_all(each) for each in (current.k, current.v)))
        if group.ring:
            page = Page(newest_first(page.k), newest_first(page.v))
        new = commit(old, page.k, page.v, slot, group.ranges, plan.target)
        of_group = policy.commit(state.meta[number], slot, page, now)
        after = boundary._replace(
            fill=new.fill,
            k=partial(layer_pages, new.k, ranges=group.ranges),
            v=partial(layer_pages, new.v, ranges=group.ranges),
        )
        emptied = policy.evict_many(of_group, after)
        if emptied is not None:
            new = dataclasses.replace(new, fill=jnp.where(emptied, 0, new.fill))
        kept.append(new)
        meta.append(of_group)
        if group.ring:
            continue  # What leaves a window is not the policy's doing.
        # Heads of different sizes lose pages at different boundaries, so that only sums compare.
        held = jnp.sum(new.fill > 0, axis=-1, dtype=jnp.int32)
        evicted = jnp.maximum(evicted, written - jnp.min(held, axis=(0, 2)))
    rows, running = state.rows, ~state.rows.done
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, kept=tuple(kept)),
        meta=tuple(meta),
        rows=dataclasses.replace(
            rows,
            committed=jnp.where(running, rows.committed + 1, rows.committed),
            evicted=jnp.where(running, evicted, rows.evicted),
        ),
    )


def _boundary_keys(keys: jax.Array, now: jax.Array, group: int) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, EVICTION_STREAM + group)
    return fold(keys, now)


def _is_done(
    token: jax.Array, generated: jax.Array, limit: jax.Array, stop_tokens: jax.Array
) -> jax.Array:
    stopped = jnp.any(token[:, None] == stop_tokens, axis=-1) | (token < 0)
    return stopped | (generated >= limit)


def prompt_lengths(state: DecodeState, plan: Plan) -> jax.Array:
    """Length of each row's prompt: int32 `[B]`."""
    return jnp.repeat(state.cache.prompt.lengths, plan.samples, axis=0)


def total_lengths(state: DecodeState, plan: Plan) -> jax.Array:
    """Tokens that rows may come to have, prompts included, the most of a prompt: int32 `[B]`."""
    most = jnp.max(state.rows.limit.reshape(-1, plan.samples), axis=1)
    return prompt_lengths(state, plan) + jnp.repeat(most, plan.samples)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    """`[B, N, ...]` → `[B, K, G, ...]`."""
    B, N, *rest = x.shape
    return x.reshape(B, heads, N // heads, *rest)


def _as_pages(x: jax.Array, page_size: int) -> jax.Array:
    """`[B, T, K, H]` → `[B, K, T / P, P, H]`."""
    B, T, K, H = x.shape
    pages = jnp.swapaxes(x, 1, 2).reshape(B, K, T // page_size, page_size, H)
    # Turned here, layer by layer: XLA would stack them as they come, and then turn a second copy.
    turned: jax.Array = with_layout_constraint(pages, Layout(tuple(range(pages.ndim))))
    return turned


def cache_bytes(state: DecodeState) -> int:
    """Bytes of all that the decode keeps for attention: the three segments and the metadata."""
    leaves = jax.tree.leaves((state.cache, state.meta))
    return sum(math.prod(leaf.shape) * int(leaf.dtype.itemsize) for leaf in leaves)


def dense_bytes(config: ModelConfig, tokens: int, dtype: Any) -> int:
    """Bytes of the keys and values of one sequence, nothing that can be seen dropped, or padded."""
    in_windows = len(config.window_layers) * min(tokens, config.window)
    return (tokens * config.full_layers + in_windows) * token_bytes(config, dtype)


def token_bytes(config: ModelConfig, dtype: Any) -> int:
    """Bytes of the key and value of one token in one layer."""
    return 2 * config.num_key_value_heads * config.head_dim * int(jnp.dtype(dtype).itemsize)
