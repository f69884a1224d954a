"""Given tokens through a decode, a page at a time: the same state as token by token, sooner.

Within a page nothing is forgotten: what P tokens can see is the prompt, the kept pages, which stay
as they are, and those of the page itself that come before. So where the tokens are known, a page is
read as a short text is, with products of matrices in the place of P products with vectors; only a
policy's metadata, which is small, goes through its tokens one by one.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax.cache import CurrentPage, write_page
from raas_jax.decode import (
    DecodeState,
    commit_page,
    prompt_lengths,
    reader_of,
    run_groups,
    total_lengths,
)
from raas_jax.model import Body, Layer, ends
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies.base import Evidence, Metadata
from raas_jax.rotation import Rotation, rotations_of


def feeds_pages(plan: Plan) -> bool:
    """Whether the policy lets a page be read at once: none of its layers chooses pages by token."""
    return not any(group.policy.selects or group.policy.needs_bounds for group in plan.groups)


@partial(jax.jit, static_argnames="plan", donate_argnames="state")
def feed_pages(
    params: Params, state: DecodeState, tokens: jax.Array, *, plan: Plan
) -> tuple[DecodeState, jax.Array]:
    """Feeds each row's last token and all but the last of `tokens`, page by page.

    Args:
      params: the model.
      state: at a page boundary; its memory is given away. All rows run on, done or not.
      tokens: int32 `[pages * P, B]`, what follows each token that is fed; the last stays unfed.
      plan: fixed shapes, for which `feeds_pages` holds.

    Returns:
      The state at the next boundary, and the last layer's output for each fed token `[pages * P,
      B, D]`, from which the logits of `tokens` are made.
    """
    P, B = plan.page_size, tokens.shape[1]

    def page(state: DecodeState, following: jax.Array) -> tuple[DecodeState, jax.Array]:
        return _feed_page(params, state, following, plan)

    state, hidden = jax.lax.scan(page, state, tokens.reshape(-1, P, B))
    return state, hidden.reshape(-1, *hidden.shape[2:])


def _feed_page(
    params: Params, state: DecodeState, following: jax.Array, plan: Plan
) -> tuple[DecodeState, jax.Array]:
    config, rows, P = params.config, state.rows, plan.page_size
    model = ends(config, params.weights)
    fed = jnp.concatenate([rows.token[None], following[:-1]])
    first = prompt_lengths(state, plan) + rows.generated - 1
    positions = first[:, None] + jnp.arange(P, dtype=jnp.int32)
    length = {"seen": positions + 1, "total": total_lengths(state, plan)[:, None]}
    rotations = rotations_of(config, positions, **length)
    body_of = partial(_page_body, state, plan, rotations=rotations, positions=positions)
    x, current, meta = run_groups(params, state, plan, body_of, model.embed(fed.T))
    fed_state = dataclasses.replace(
        state,
        cache=dataclasses.replace(state.cache, current=current),
        meta=meta,
        rows=dataclasses.replace(rows, token=following[-1], generated=rows.generated + P),
    )
    return commit_page(fed_state, plan), jnp.swapaxes(x, 0, 1)


def _page_body(
    state: DecodeState,
    plan: Plan,
    number: int,
    rotations: dict[str, Rotation],
    positions: jax.Array,
) -> Body:
    """What a layer of group `number` does with x `[B, P, D]`, the current page and its metadata."""
    cache, group = state.cache, plan.groups[number]
    policy, ring, rotation = group.policy, group.ring, rotations[group.kind]
    prompt_fill, now = cache.prompt.fill(), state.rows.generated
    whole = jnp.int32(plan.page_size)

    def body(
        layer: Layer,
        carry: tuple[jax.Array, CurrentPage],
        own: tuple[jax.Array, Metadata],
    ) -> tuple[tuple[jax.Array, CurrentPage], Metadata]:
        (x, current), (fill, meta) = carry, own
        q, k, v = layer.qkv(x, rotation)
        current = write_page(current, k, v, layer.number)
        written = dataclasses.replace(cache, current=current)
        seen = {"fill": fill, "prompt_fill": prompt_fill, "written": whole}
        reader = reader_of(written, plan, number, layer, **seen)
        if ring:
            out = reader.attend_page_in_ring(q, ring, meta, positions)
            return (layer.finish(x, out.astype(x.dtype)), current), meta
        out, mass, current_mass = reader.attend_page(q)

        def observe(meta: Metadata, of_token: tuple[Any, ...]) -> tuple[Metadata, None]:
            step, of_kept, of_current = of_token
            return policy.observe(meta, Evidence(of_kept, None, fill, of_current), now + step), None

        if jax.tree.leaves(meta):
            steps = jnp.arange(plan.page_size, dtype=jnp.int32)
            meta, _ = jax.lax.scan(observe, meta, (steps, mass, current_mass))
        return (layer.finish(x, out.astype(x.dtype)), current), meta

    return body
