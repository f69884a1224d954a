"""The oracle: what eviction could do at equal bytes if it knew the text. No policy for users.

It evicts the page that the rest of the text will look at least, by the dense model's attention on
that text. As with the ceiling of studies, the future is that of a dense run, so that this is a very
good eviction, and not provably the best one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.allotting.dense import Block, embed, forward, look
from raas_jax.decode import DecodeState
from raas_jax.lab.inspect.ceiling import scripted_slot
from raas_jax.params import Params
from raas_jax.plan import Group, Plan
from raas_jax.policies import Boundary, Budgeted, Policy, pages_for
from raas_jax.policies.base import Metadata


@dataclasses.dataclass(frozen=True)
class Oracle(Budgeted):
    """Evicts the page of the least attention to come, as a script says that `foresee` makes.

    Metadata: the slot to overwrite at each boundary, int32 `[L, B, K, boundaries]`; none until
    then, since it is no memory that a policy would need.
    """

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        return scripted_slot(meta, boundary.now, self.page_size)


NAMES: Mapping[str, type[Policy]] = {"oracle": Oracle}
"""Where a text is known, also the oracle has a name."""


def foresee(
    params: Params,
    plan: Plan,
    state: DecodeState,
    texts: Sequence[Sequence[int]],
    prompt_tokens: int,
) -> DecodeState:
    """The state that prefill left, with a script for each of its rows; any without an oracle as is.

    Args:
      params: the model.
      plan: of the state.
      state: whose rows are to be fed the texts, each with so many first tokens as its prompt.
      texts: token ids.
      prompt_tokens: of every text.
    """
    if not any(isinstance(group.policy, Oracle) for group in plan.groups):
        return state
    rows = [tuple(ids) for ids in texts]
    longest = max(map(len, rows))
    # The same text may fill several rows.
    scripts = {ids: _of_text(params, plan, ids, longest, prompt_tokens) for ids in set(rows)}
    meta = [
        jnp.asarray(np.stack([scripts[ids][group.part] for ids in rows], axis=1))
        if isinstance(group.policy, Oracle)
        else own
        for group, own in zip(plan.groups, state.meta, strict=True)
    ]
    return dataclasses.replace(state, meta=tuple(meta))


def _of_text(
    params: Params, plan: Plan, ids: Sequence[int], longest: int, prompt_tokens: int
) -> np.ndarray:
    """The script of one text, int32 `[L, K, n]`, of the layers that see everything.

    Of layers without an oracle it says nothing.
    """
    n, K = pages_for(longest - prompt_tokens, plan.page_size), params.config.num_key_value_heads
    # Texts of several lengths share a program; causal attention never sees what lies behind one.
    tokens = np.zeros(longest, np.int32)
    tokens[: len(ids)] = ids
    page = np.full(longest, -1, np.int32)
    page[prompt_tokens : len(ids)] = np.arange(len(ids) - prompt_tokens) // plan.page_size
    x, member = embed(params, jnp.asarray(tokens)), jax.nn.one_hot(page, n)
    script = np.zeros((params.config.full_layers, K, n), np.int32)
    owners = {
        number: (group, index)
        for group in plan.groups
        for index, number in enumerate(group.numbers)
    }
    for number, kind in enumerate(params.config.layer_kinds):
        group, index = owners[number]
        if not isinstance(group.policy, Oracle):
            x = forward(params, x, jnp.int32(number), kind=kind)
            continue
        x, found = look(params, x, jnp.int32(number), between_pages, member)
        mass = np.sum([np.asarray(each, np.float64) for each in found], axis=0)
        if group.policy.granularity == "layer":
            mass = np.broadcast_to(np.sum(mass, axis=0), mass.shape)
        slots = _slots(group, K, prompt_tokens)[index]
        script[group.first + index] = least_to_come(mass, slots)
    return script


def between_pages(block: Block, member: jax.Array) -> jax.Array:
    """Mass that each page's tokens spend on each page, float32 `[K, n, n]`, over the group's heads.

    `member`, float32 `[T, n]`, is 1 where a token is on a page.
    """
    shares = jnp.sum(block.shares, axis=1)
    queries, keys = member[block.first : block.end], member[: block.end]
    return jnp.einsum("kts,ti,sj->kij", shares, queries, keys, precision="highest")


def _slots(group: Group, heads: int, prompt_tokens: int) -> np.ndarray:
    """Slots that each layer and head may use, integers `[L, K]`."""
    room = group.policy.capacity(jnp.asarray([prompt_tokens]), group.counts(heads))
    return np.broadcast_to(np.asarray(room), (group.layers, 1, heads))[:, 0]


def least_to_come(mass: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """The slot that page 0, 1, ... is written to, where the future is known.

    Args:
      mass: `[..., n, n]`; `[..., i, j]` is the attention of page i's tokens to page j.
      slots: integers `[...]`, how many each head has for pages that are finished; 1 or more.

    Returns:
      int32 `[..., n]`: an empty slot while there is one, then that of the page which all later
      tokens together attend to least; of equal ones that of the page written first.
    """
    n, S = mass.shape[-1], int(np.max(slots))
    to_come = np.zeros((*mass.shape[:-2], n + 1, n))
    to_come[..., :n, :] = np.cumsum(mass[..., ::-1, :], axis=-2, dtype=np.float64)[..., ::-1, :]
    held = np.full((*slots.shape, S), -1)  # Number of the page in each slot.
    beyond = np.arange(S) >= slots[..., None]
    script = np.zeros((*slots.shape, n), np.int32)
    for page in range(n):
        left = np.take_along_axis(to_come[..., page + 1, :], np.maximum(held, 0), axis=-1)
        left = np.where(beyond, np.inf, np.where(held < 0, -1.0, left))
        least = left == np.min(left, axis=-1, keepdims=True)
        # Pages are numbered as they were written: the smaller number breaks a tie.
        chosen = np.argmin(np.where(least, held, n), axis=-1)
        script[..., page] = chosen
        np.put_along_axis(held, chosen[..., None], page, axis=-1)
    return script
