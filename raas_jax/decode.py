"""Prefill, token step and page scan: pure functions from state to state.

    prefill ──► DecodeState ──► decode_pages ──► DecodeState ──► ...
                                 outer scan over pages: inner scan over P tokens, one commit

The prompt and the kept pages are read-only within a page, so they are loop invariants of the inner
scan; what changes per token is one offset of the current page and the policy's small meta.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import Target
from raas_jax.attention import Reader, causal_attention, prompt_mass
from raas_jax.cache import (
    Bounds,
    Cache,
    Kept,
    CurrentPage,
    Prompt,
    commit,
    page_bounds,
    write_token,
)
from raas_jax.config import ModelConfig
from raas_jax.model import block_graph, merge, rope_rotation
from raas_jax.params import Params
from raas_jax.policies.base import (
    Boundary,
    Bounded,
    Evidence,
    Metadata,
    Page,
    Policy,
    PromptPages,
    Selection,
    pages_for,
)
from raas_jax.policies.dense import bucket
from raas_jax.sampling import Sampler

EVICTION_STREAM = 0x52616153  # Apart from the stream that sampling draws from the same row keys.


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is fixed before a decode is compiled.

    Attributes:
      policy: which pages to keep.
      prompt_slots: `Sp`, pages of the longest prompt's bucket.
      slots: `S`, slots of kept pages, for each of the policy's groups of layers.
      samples: rows that share one prompt, `B / B'`; rows of one prompt are neighbours.
      target: what the decode is compiled for; None is the default backend, without a mesh.
    """

    policy: Policy
    prompt_slots: int
    slots: tuple[int, ...]
    samples: int = 1
    target: Target | None = None

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        policy: Policy,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        samples: int = 1,
        target: Target | None = None,
    ) -> Plan:
        """For prompts of these lengths; raises ValueError if the policy cannot take one."""
        policy.check_prompts(prompt_tokens)
        groups = policy.groups(config.num_hidden_layers)
        if any(part.evicts_prompt != policy.evicts_prompt for _, part in groups):
            raise ValueError(
                f"policy is {policy!r}; either all of its layers evict the prompt, or none may."
            )
        return cls(
            policy,
            bucket(pages_for(max(prompt_tokens), policy.page_size)),
            tuple(part.slots(prompt_tokens, max_new_tokens) for _, part in groups),
            samples,
            target,
        )

    @property
    def page_size(self) -> int:
        """`P`."""
        return self.policy.page_size


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """Everything that a decode carries; its size does not depend on how far it has come.

    Attributes:
      cache: keys and values.
      meta: the policy's metadata, one entry per group of layers.
      token: int32 `[B]`, the last token drawn, not yet fed to the model.
      generated: int32 `[B]`, tokens drawn so far, `token` included; frozen once done.
      limit: int32 `[B]`, how many may be drawn.
      done: bool `[B]`, a stop token was drawn or the limit reached. A done row computes on, unseen.
      committed: int32 `[B]`, pages that left the current page while the row was running.
      evicted: int32 `[B]`, pages that were overwritten or released while the row was running; the
        most of any layer and head.
      stop_tokens: int32 `[any]`, padded with -1.
      sampler: how each row draws.
    """

    cache: Cache
    meta: tuple[Metadata, ...]
    token: jax.Array
    generated: jax.Array
    limit: jax.Array
    done: jax.Array
    committed: jax.Array
    evicted: jax.Array
    stop_tokens: jax.Array
    sampler: Sampler


class Sampled(NamedTuple):
    """What one step drew, or several.

    Attributes:
      tokens: int32 `[B]` or `[T, B]`; -1 for a row that was done.
      logprobs: float32, their log-probabilities.
    """

    tokens: jax.Array
    logprobs: jax.Array


class _Request(NamedTuple):
    """What the caller asks of each row, see `DecodeState`."""

    limit: jax.Array
    stop_tokens: jax.Array
    sampler: Sampler


def request(limit: jax.Array, stop_tokens: Sequence[int], sampler: Sampler) -> _Request:
    """Bundles limits int32 `[B]`, stop tokens and the sampler; pads the stop tokens to a bucket."""
    padded = list(stop_tokens) + [-1] * (-len(stop_tokens) % 8 or 8 * (not stop_tokens))
    return _Request(jnp.asarray(limit, jnp.int32), jnp.asarray(padded, jnp.int32), sampler)


def pad_prompts(prompts: Sequence[Sequence[int]], plan: Plan) -> tuple[jax.Array, jax.Array]:
    """Tokens int32 `[B', Sp * P]`, padded at the right, and lengths `[B']`, for `prefill`."""
    tokens = np.zeros((len(prompts), plan.prompt_slots * plan.page_size), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(tokens), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def empty_cache(config: ModelConfig, plan: Plan, rows: int, dtype: Any) -> Cache:
    """A cache of zeros: `rows` is `B`, of which every `plan.samples` share a prompt."""
    K, H, P = config.num_key_value_heads, config.head_dim, plan.page_size
    groups = plan.policy.groups(config.num_hidden_layers)
    bounded = any(policy.needs_prompt_bounds for _, policy in groups)

    def pages(*shape: int) -> jax.Array:
        return jnp.zeros((*shape, P, H), dtype)

    def bounds(wanted: bool, *shape: int) -> Bounds | None:
        zeros = lambda: jnp.zeros((*shape, H), dtype)  # noqa: E731
        return Bounds(zeros(), zeros()) if wanted else None

    L = config.num_hidden_layers
    prompt_slots = 0 if plan.policy.evicts_prompt else plan.prompt_slots
    prompt = (L, rows // plan.samples, K, prompt_slots)
    kept = [(n, rows, K, S) for (n, _), S in zip(groups, plan.slots, strict=True)]
    return Cache(
        prompt=Prompt(
            pages(*prompt),
            pages(*prompt),
            jnp.zeros(prompt[1], jnp.int32),
            bounds(bounded, *prompt),
        ),
        kept=tuple(
            Kept(
                pages(*shape),
                pages(*shape),
                jnp.zeros(shape, jnp.int32),
                bounds(policy.needs_bounds, *shape),
            )
            for shape, (_, policy) in zip(kept, groups, strict=True)
        ),
        current=CurrentPage(pages(L, rows, K), pages(L, rows, K)),
    )


def init_metadata(config: ModelConfig, plan: Plan, rows: int) -> tuple[Metadata, ...]:
    """The policy's metadata of an empty cache, one entry per group of layers."""
    groups = plan.policy.groups(config.num_hidden_layers)
    return tuple(
        policy.init((layers, rows, config.num_key_value_heads, S))
        for (layers, policy), S in zip(groups, plan.slots, strict=True)
    )


@partial(jax.jit, static_argnames="plan")
def prefill(
    params: Params, tokens: jax.Array, lengths: jax.Array, asked: _Request, *, plan: Plan
) -> tuple[DecodeState, Sampled]:
    """Reads the prompts and draws the first token of every row.

    Args:
      params: the model.
      tokens: int32 `[B', T]` with `T <= Sp * P`, prompts at the left, padded at the right.
      lengths: int32 `[B']`, true lengths.
      asked: limits, stop tokens and sampler of the `B = B' * samples` rows.
      plan: fixed shapes.

    Returns:
      The state at the start of the first page, and the first tokens, `[B]`.
    """
    config = params.config
    model = merge(config, params.weights)
    dtype = params.weights["embedding"].dtype
    rows = tokens.shape[0] * plan.samples
    padded = jnp.pad(tokens, ((0, 0), (0, plan.prompt_slots * plan.page_size - tokens.shape[1])))
    T = padded.shape[1]
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), padded.shape)
    rotation = rope_rotation(config.rope, config.head_dim, positions)
    graph = block_graph(config, dtype.name)
    queries = plan.policy.prompt_queries

    def layer(
        x: jax.Array, weights: Any
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array | None]]:
        block = nnx.merge(graph, weights)
        q, k, v = block.qkv(x, rotation)
        x = block.finish(x, causal_attention(q, k, v, target=plan.target))
        mass = prompt_mass(q, k, lengths, plan.page_size, queries) if queries else None
        return x, (_as_pages(k, plan.page_size), _as_pages(v, plan.page_size), mass)

    x, (k, v, mass) = jax.lax.scan(layer, model.embed(padded), params.weights["layers"])
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)[:, 0]
    logits = jnp.repeat(model.logits(last), plan.samples, axis=0)
    empty = empty_cache(config, plan, rows, dtype)
    meta, evicted = init_metadata(config, plan, rows), jnp.zeros(rows, jnp.int32)
    prompt = Prompt(k, v, lengths.astype(jnp.int32), None)
    if plan.policy.evicts_prompt:
        empty, meta, evicted = _place_prompt(config, empty, meta, prompt, mass, plan)
        prompt = dataclasses.replace(empty.prompt, lengths=prompt.lengths)
    elif empty.prompt.bounds is not None:
        fill = jnp.broadcast_to(prompt.fill()[None], k.shape[:4])
        prompt = dataclasses.replace(prompt, bounds=page_bounds(k, fill))
    index = jnp.zeros(rows, jnp.int32)
    token, logprob = asked.sampler(logits, index)
    generated = index + 1
    state = DecodeState(
        cache=dataclasses.replace(empty, prompt=prompt),
        meta=meta,
        token=token,
        generated=generated,
        limit=asked.limit,
        done=_is_done(token, generated, asked.limit, asked.stop_tokens),
        committed=jnp.zeros(rows, jnp.int32),
        evicted=evicted,
        stop_tokens=asked.stop_tokens,
        sampler=asked.sampler,
    )
    return state, Sampled(token, logprob)


def _place_prompt(
    config: ModelConfig,
    cache: Cache,
    meta: tuple[Metadata, ...],
    prompt: Prompt,
    mass: jax.Array | None,
    plan: Plan,
) -> tuple[Cache, tuple[Metadata, ...], jax.Array]:
    """Puts the prompt's pages among the kept ones; also, how many had no place, int32 `[B]`."""
    by_row = lambda x, axis: jnp.repeat(x, plan.samples, axis=axis)  # noqa: E731
    fill = by_row(prompt.fill()[:, 0], 0)
    lengths = by_row(prompt.lengths, 0)
    kept, placed_meta, first = [], [], 0
    evicted = jnp.zeros(lengths.shape, jnp.int32)
    for group, of_group, (layers, policy) in zip(
        cache.kept, meta, plan.policy.groups(config.num_hidden_layers), strict=True
    ):
        part = slice(first, first + layers)
        of_layers = None if mass is None else by_row(mass[part], 1)
        pages, of_group = policy.insert_prompt(of_group, PromptPages(lengths, fill, of_layers))
        wanted = jnp.maximum(pages, 0)
        of_page = lambda x, wanted=wanted: jnp.take_along_axis(  # noqa: E731
            by_row(x, 1), wanted[..., None, None], axis=3
        )
        filled = jnp.take_along_axis(
            jnp.broadcast_to(fill[:, None], (*wanted.shape[:3], fill.shape[-1])), wanted, axis=-1
        )
        filled = jnp.where(pages < 0, 0, filled)
        k = of_page(prompt.k[part])
        bounds = None if group.bounds is None else page_bounds(k, filled)
        kept.append(Kept(k, of_page(prompt.v[part]), filled, bounds))
        placed_meta.append(of_group)
        lost = jnp.sum(fill > 0, axis=-1)[:, None] - jnp.sum(filled > 0, axis=-1)
        evicted = jnp.maximum(evicted, jnp.max(lost, axis=(0, 2)).astype(jnp.int32))
        first += layers
    return dataclasses.replace(cache, kept=tuple(kept)), tuple(placed_meta), evicted


@partial(jax.jit, static_argnames=("plan", "pages"), donate_argnames="state")
def decode_pages(
    params: Params, state: DecodeState, *, plan: Plan, pages: int
) -> tuple[DecodeState, Sampled]:
    """Generates `pages * P` tokens. The state is donated: it is the memory, and must not be copied.

    Returns:
      The state at the next page boundary, and what was drawn: `[pages * P, B]`.
    """

    def page(state: DecodeState, _: None) -> tuple[DecodeState, Sampled]:
        return decode_page(params, state, plan)

    state, drawn = jax.lax.scan(page, state, None, length=pages)
    return state, jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), drawn)


def decode_until_done(
    params: Params, state: DecodeState, first: Sampled, plan: Plan, max_new_tokens: int
) -> tuple[DecodeState, Sampled]:
    """The whole answer in one compiled loop, for use inside a `jax.jit`; stops when all rows have.

    Args:
      params: the model.
      state: as `prefill` left it.
      first: the tokens that `prefill` drew, `[B]`.
      plan: fixed shapes.
      max_new_tokens: no row's limit may be larger.

    Returns:
      The last state, and what was drawn: `[max_new_tokens, B]`, -1 after the end of a row.
    """
    pages = pages_for(max_new_tokens - 1, plan.page_size)
    rows = first.tokens.shape[0]
    blank = Sampled(
        jnp.full((1 + pages * plan.page_size, rows), -1, jnp.int32),
        jnp.zeros((1 + pages * plan.page_size, rows), jnp.float32),
    )

    def write(buffers: Sampled, drawn: Sampled, start: jax.Array) -> Sampled:
        at = lambda buffer, part: jax.lax.dynamic_update_slice(buffer, part, (start, 0))  # noqa: E731
        return jax.tree.map(at, buffers, drawn)

    def going(carry: tuple[DecodeState, Sampled, jax.Array]) -> jax.Array:
        state, _, page = carry
        return (page < pages) & ~jnp.all(state.done)

    def body(
        carry: tuple[DecodeState, Sampled, jax.Array],
    ) -> tuple[DecodeState, Sampled, jax.Array]:
        state, buffers, page = carry
        state, drawn = decode_page(params, state, plan)
        return state, write(buffers, drawn, 1 + page * plan.page_size), page + 1

    buffers = write(blank, Sampled(first.tokens[None], first.logprobs[None]), jnp.int32(0))
    state, buffers, _ = jax.lax.while_loop(going, body, (state, buffers, jnp.int32(0)))
    return state, jax.tree.map(lambda buffer: buffer[:max_new_tokens], buffers)


def decode_page(params: Params, state: DecodeState, plan: Plan) -> tuple[DecodeState, Sampled]:
    """One page: P token steps with the big buffers read-only, then one commit. Sampled: `[P, B]`."""
    offsets = jnp.arange(plan.page_size, dtype=jnp.int32)
    step = lambda state, offset: token_step(params, state, offset, plan)  # noqa: E731
    state, drawn = jax.lax.scan(step, state, offsets)
    return commit_page(params.config, state, plan), drawn


def token_step(
    params: Params, state: DecodeState, offset: jax.Array, plan: Plan
) -> tuple[DecodeState, Sampled]:
    """Feeds `state.token`, writes it at `offset` of the current page, draws the next. Sampled: `[B]`."""
    config = params.config
    model = merge(config, params.weights)
    position = prompt_lengths(state, plan) + state.generated - 1
    rotation = rope_rotation(config.rope, config.head_dim, position[:, None])
    x, meta, first = model.embed(state.token)[:, None], [], 0
    stepped = state
    for group, (layers, _) in enumerate(plan.policy.groups(config.num_hidden_layers)):
        x, current, group_meta = _run_group(
            params, stepped, _Group(group, first, layers), x, rotation, offset, plan
        )
        stepped = dataclasses.replace(
            stepped, cache=dataclasses.replace(stepped.cache, current=current)
        )
        meta.append(group_meta)
        first += layers
    token, logprob = state.sampler(model.logits(x[:, 0]), state.generated)
    token = jnp.where(state.done, state.token, token)
    generated = jnp.where(state.done, state.generated, state.generated + 1)
    stepped = dataclasses.replace(
        stepped,
        meta=tuple(meta),
        token=token,
        generated=generated,
        done=state.done | _is_done(token, generated, state.limit, state.stop_tokens),
    )
    drawn = Sampled(jnp.where(state.done, -1, token), jnp.where(state.done, 0.0, logprob))
    return stepped, drawn


class _Group(NamedTuple):
    """Consecutive layers with one policy: its place in the plan, first layer, number of layers."""

    number: int
    first: int
    layers: int


def _run_group(
    params: Params,
    state: DecodeState,
    group: _Group,
    x: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    offset: jax.Array,
    plan: Plan,
) -> tuple[jax.Array, CurrentPage, Metadata]:
    """Runs x `[B, 1, D]` through the layers of a group, which write the current page and the meta."""
    config, cache = params.config, state.cache
    policy = plan.policy.groups(config.num_hidden_layers)[group.number][1]
    graph = block_graph(config, params.weights["embedding"].dtype.name)
    prompt_fill = cache.prompt.fill()

    def layer(
        carry: tuple[jax.Array, CurrentPage], scanned: Any
    ) -> tuple[tuple[jax.Array, CurrentPage], Metadata]:
        x, current = carry
        layer_in_group, fill, meta = scanned
        index = layer_in_group + group.first
        at_layer = partial(jax.lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
        block = nnx.merge(graph, jax.tree.map(at_layer, params.weights["layers"]))
        q, k, v = block.qkv(x, rotation)
        current = write_token(current, k[:, 0], v[:, 0], index, offset)
        reader = Reader(
            dataclasses.replace(cache, current=current),
            group.number,
            index,
            layer_in_group,
            fill,
            prompt_fill,
            offset,
            plan.samples,
            plan.target,
        )
        grouped = partial(_by_head, heads=config.num_key_value_heads)
        selection = Selection()
        if policy.selects:
            bounded: Bounded = jax.tree.map(grouped, reader.bounded(q[:, 0]))
            selection = policy.select(meta, bounded)
        out, mass, current_mass = reader.attend(q[:, 0], selection)
        if jax.tree.leaves(meta):
            bound = reader.bound(q[:, 0]) if policy.needs_bounds else None
            mass, bound, current_mass = jax.tree.map(grouped, (mass, bound, current_mass))
            evidence = Evidence(mass, bound, fill, current_mass)
            meta = policy.observe(meta, evidence, state.generated)
        return (block.finish(x, out[:, None].astype(x.dtype)), current), meta

    scanned = (
        jnp.arange(group.layers, dtype=jnp.int32),
        cache.kept[group.number].fill,
        state.meta[group.number],
    )
    (x, current), meta = jax.lax.scan(layer, (x, cache.current), scanned)
    return x, current, meta


def commit_page(config: ModelConfig, state: DecodeState, plan: Plan) -> DecodeState:
    """The page boundary: each (layer, row, head) writes its current page over its victim's slot."""
    now, lengths = state.generated, prompt_lengths(state, plan)
    kept, meta, first = [], [], 0
    evicted = jnp.zeros(now.shape, jnp.int32)
    for index, (layers, policy) in enumerate(plan.policy.groups(config.num_hidden_layers)):
        group, S = state.cache.kept[index], plan.slots[index]
        boundary = Boundary(
            now=now,
            fill=group.fill,
            allowed=jnp.arange(S) < policy.capacity(lengths, S)[:, None],
            k=group.k,
            v=group.v,
            keys=_boundary_keys(state.sampler.keys, now, index),
            prompt_lengths=lengths,
        )
        slot = policy.victim(state.meta[index], boundary)
        page = Page(
            *(x[first : first + layers] for x in (state.cache.current.k, state.cache.current.v))
        )
        filled = jnp.take_along_axis(group.fill, slot[..., None], axis=-1)[..., 0] > 0
        lost = filled.astype(jnp.int32)
        group = commit(group, page.k, page.v, slot, plan.target)
        group_meta = policy.commit(state.meta[index], slot, page, now)
        released = policy.evict_many(
            group_meta, boundary._replace(fill=group.fill, k=group.k, v=group.v)
        )
        if released is not None:
            lost = lost + jnp.sum(released & (group.fill > 0), axis=-1)
            group = dataclasses.replace(group, fill=jnp.where(released, 0, group.fill))
        evicted = jnp.maximum(evicted, jnp.max(lost, axis=(0, 2)))
        kept.append(group)
        meta.append(group_meta)
        first += layers
    running = ~state.done
    return dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, kept=tuple(kept)),
        meta=tuple(meta),
        committed=jnp.where(running, state.committed + 1, state.committed),
        evicted=jnp.where(running, state.evicted + evicted, state.evicted),
    )


def _boundary_keys(keys: jax.Array, now: jax.Array, group: int) -> jax.Array:
    fold = jax.vmap(jax.random.fold_in)
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, EVICTION_STREAM + group)
    return fold(keys, now)


def _is_done(
    token: jax.Array, generated: jax.Array, limit: jax.Array, stop_tokens: jax.Array
) -> jax.Array:
    return jnp.any(token[:, None] == stop_tokens, axis=-1) | (generated >= limit)


def prompt_lengths(state: DecodeState, plan: Plan) -> jax.Array:
    """Length of each row's prompt: int32 `[B]`."""
    return jnp.repeat(state.cache.prompt.lengths, plan.samples, axis=0)


def _by_head(x: jax.Array, heads: int) -> jax.Array:
    """`[B, N, ...]` → `[B, K, G, ...]`."""
    B, N, *rest = x.shape
    return x.reshape(B, heads, N // heads, *rest)


def _as_pages(x: jax.Array, page_size: int) -> jax.Array:
    """`[B, T, K, H]` → `[B, K, T / P, P, H]`."""
    B, T, K, H = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(B, K, T // page_size, page_size, H)


def cache_bytes(state: DecodeState) -> int:
    """Bytes of all that the decode keeps for attention: the three segments and the meta."""
    leaves = jax.tree.leaves((state.cache, state.meta))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def dense_bytes(config: ModelConfig, tokens: int, dtype: Any) -> int:
    """Bytes of the keys and values of one sequence, nothing dropped or padded."""
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return tokens * per_token * jnp.dtype(dtype).itemsize
