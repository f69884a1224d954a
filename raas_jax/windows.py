"""Layers that see a window: a ring of pages, of which each token sees what is near enough.

A ring holds the last pages of its row, the prompt's among them. Pages lie in it with their newest
token first, so that what has left the window is at their end, as what is not yet written is at the
end of any other page: attention needs no mask but the number of tokens in each page.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from raas_jax.config import ModelConfig
from raas_jax.policies.base import Boundary, Metadata, Page, Policy
from raas_jax.policies.sizes import pages_for


@dataclasses.dataclass(frozen=True)
class Ring(Policy):
    """Keeps what a window of so many tokens can see, whatever the user's policy does elsewhere.

    Its metadata is the position of each page's first token, int32 `[L, B, K, S]`; it lies before
    the text (below 0) where tokens are missing.
    """

    window: int = dataclasses.field(kw_only=True)

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        P = self.page_size
        seen = pages_for(self.window - 1, P)
        whole = pages_for(max(prompt_tokens), P) + pages_for(max_new_tokens, P)
        return max(1, min(seen, whole))

    def init(self, shape: tuple[int, int, int, int]) -> Metadata:
        # All of a page before the text: empty.
        return jnp.full(shape, -self.page_size, jnp.int32)

    def victim(self, meta: Metadata, boundary: Boundary) -> jax.Array:
        oldest: jax.Array = jnp.argmin(meta, axis=-1).astype(jnp.int32)
        return oldest

    def commit(self, meta: Metadata, slot: jax.Array, page: Page, now: jax.Array) -> Metadata:
        following = jnp.max(meta, axis=-1, keepdims=True) + self.page_size
        written = jnp.arange(meta.shape[-1]) == slot[..., None]
        return jnp.where(written, following, meta)

    def in_sight(self, first: jax.Array, position: jax.Array) -> jax.Array:
        """Tokens of each page that a token at `position [B]` sees: int32, shaped like `first`."""
        lowest = jnp.maximum(position - self.window + 1, 0)[:, None, None]
        return filled(first - lowest, self.page_size)


def check_some_see_all(config: ModelConfig) -> None:
    """Raises ValueError for a model of windows alone, of which policies have nothing to decide."""
    if not config.full_layers:
        raise ValueError(
            f"the model has {config.num_hidden_layers} layers, all with a window of "
            f"{config.window} tokens, and none that sees everything: policies decide nothing "
            "there. It decodes in constant memory as it is, under any of them."
        )


def newest_first(pages: jax.Array) -> jax.Array:
    """Pages `[..., P, H]` as a ring holds them, or back."""
    return jnp.flip(pages, axis=-2)


def last_pages(x: jax.Array, lengths: jax.Array, slots: int, page_size: int) -> jax.Array:
    """The ring after prompts of these lengths, `[B]`, of their k or v `[B, T, K, H]`.

    `[B, K, S, P, H]`, oldest page first: its first token has the position `lengths - S * P`, and
    what would lie before the text is anything.
    """
    size = slots * page_size
    wanted = lengths[:, None] - size + jnp.arange(size, dtype=jnp.int32)
    tokens = jnp.take_along_axis(x, jnp.maximum(wanted, 0)[..., None, None], axis=1)
    B, _, K, H = x.shape
    by_head = jnp.swapaxes(tokens, 1, 2).reshape(B, K, slots, page_size, H)
    return newest_first(by_head)


def filled(first: jax.Array, page_size: int) -> jax.Array:
    """Tokens in pages whose first ones are at these positions, of which those below 0 are none."""
    return jnp.clip(first + page_size, 0, page_size)


def first_positions(lengths: jax.Array, slots: int, page_size: int) -> jax.Array:
    """The metadata of such a ring: int32 `[B, S]`."""
    return lengths[:, None] + (jnp.arange(slots, dtype=jnp.int32) - slots) * page_size
