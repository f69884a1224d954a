"""A decode at a length that it has not come to token by token.

What a step costs depends on the shapes, on how full the pages are, and on what the policy has noted
of them; not on what the text says. So pages of random keys and values are committed one after the
other, by the function that commits them in a real decode, and the model in between is left out:
16,384 tokens take 1,024 commits. What a policy learns from attention is missing until the
first real step, so that RaaS has forgotten the pages in the order in which they were written.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from raas_jax.cache import CurrentPage, Kept
from raas_jax.config import ModelConfig
from raas_jax.decode import DecodeState, commit_page, empty_state
from raas_jax.lab.bench.turns import endless, timed
from raas_jax.plan import Plan
from raas_jax.session import Session
from raas_jax.windows import filled, first_positions


def at_length(session: Session, prompt_tokens: int, generated: int) -> DecodeState:
    """The state of greedy, endless rows after so many tokens, at the page boundary before.

    Args:
      session: with room for them; its policy keeps the prompt.
      prompt_tokens: of every row.
      generated: tokens after the prompt, of which the last is not yet fed.

    Raises:
      ValueError: the policy evicts the prompt.
    """
    plan, params = session.plan, session.params
    if plan.policy.evicts_prompt:
        raise ValueError(f"policy is {plan.policy!r}; one that keeps the prompt is wanted.")
    pages = (generated - 1) // plan.page_size
    begin = partial(_begun, params.config, plan, session.rows, params.dtype.name, prompt_tokens)
    state: DecodeState = timed(partial(_committed, begin(), pages, plan=plan))[0]
    return state


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _begun(
    config: ModelConfig, plan: Plan, rows: int, dtype: str, prompt_tokens: int
) -> DecodeState:
    """The state after a random prompt; the current page is random, too."""
    state = empty_state(config, plan, rows, jnp.dtype(dtype))
    cache, asked = state.cache, endless(rows)
    old = cache.prompt.k, cache.prompt.v, cache.current.k, cache.current.v
    keys = jax.random.split(jax.random.key(0), len(old))
    k, v, current_k, current_v = (
        jax.random.normal(key, x.shape, jnp.float32).astype(x.dtype)
        for key, x in zip(keys, old, strict=True)
    )
    lengths = jnp.full_like(cache.prompt.lengths, prompt_tokens)
    prompt = dataclasses.replace(cache.prompt, k=k, v=v, lengths=lengths)
    meta, kept = state.meta, cache.kept
    if plan.windows:
        positions, ring = _ring(kept[-1], prompt_tokens)
        meta, kept = (*meta[:-1], positions), (*kept[:-1], ring)
    current = CurrentPage(current_k, current_v)
    cache = dataclasses.replace(cache, prompt=prompt, kept=kept, current=current)
    started = dataclasses.replace(
        state.rows,
        token=jnp.zeros_like(state.rows.token),
        generated=jnp.ones_like(state.rows.generated),
        limit=asked.limit,
        done=jnp.zeros_like(state.rows.done),
        sampler=asked.sampler,
    )
    return dataclasses.replace(state, cache=cache, meta=meta, rows=started)


def _ring(empty: Kept, prompt_tokens: int) -> tuple[jax.Array, Kept]:
    """The ring's metadata, and the ring, after a random prompt, whose end lies in it."""
    S, P = empty.k.shape[3:5]
    lengths = jnp.full(empty.fill.shape[1], prompt_tokens, jnp.int32)
    first = jnp.broadcast_to(first_positions(lengths, S, P)[:, None], empty.fill.shape)
    k, v = (
        jax.random.normal(key, empty.k.shape, jnp.float32).astype(empty.k.dtype)
        for key in jax.random.split(jax.random.key(1))
    )
    return first, dataclasses.replace(empty, k=k, v=v, fill=filled(first, P))


@partial(jax.jit, static_argnames="plan", donate_argnums=0)
def _committed(state: DecodeState, pages: jax.Array | int, *, plan: Plan) -> DecodeState:
    """So many pages later."""

    def page(_: jax.Array, state: DecodeState) -> DecodeState:
        # Turned by one channel each time, since pages that are alike would all be attended alike.
        current = jax.tree.map(lambda x: jnp.roll(x, 1, axis=-1), state.cache.current)
        generated = state.rows.generated + plan.page_size
        written = dataclasses.replace(
            state,
            cache=dataclasses.replace(state.cache, current=current),
            rows=dataclasses.replace(state.rows, generated=generated),
        )
        return commit_page(written, plan)

    committed: DecodeState = jax.lax.fori_loop(0, pages, page, state)
    return committed


def step_seconds(
    session: Session, state: DecodeState, pages: int, turns: int
) -> tuple[list[float], float]:
    """Seconds per step of each of so many chunks of pages, which follow one another.

    Also the seconds of the chunk before them, in which the program is compiled. The memory of the
    state is given away; it has room for `(turns + 1) * pages` more pages.
    """
    steps = pages * session.plan.page_size
    (state, _), first = timed(partial(session.advance, state, pages))
    times = []
    for _ in range(turns):
        (state, _), seconds = timed(partial(session.advance, state, pages))
        times.append(seconds / steps)
    return times, first
