"""Attention: over a whole prompt, and of one token over the three segments of the cache."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from pallas_kernels import (
    CacheAttention,
    DecodeAttention,
    Ranges,
    Segment,
    Target,
    cache_attention,
    decode_attention,
    page_bound,
    prefill_attention,
    ragged_decode_attention,
    selected_decode_attention,
)
from pallas_kernels.cache_attention.reference import merge_segments
from pallas_kernels.cache_attention.segments import by_prompt, by_row, join_sink
from raas_jax.cache import (
    Bounds,
    Cache,
    CurrentPage,
    Kept,
    Prompt,
    layer_pages,
    page_bounds,
)
from raas_jax.policies.base import Bounded, Selection
from raas_jax.windows import Ring, newest_first

MOST_SCORES = 1 << 26
"""In memory at once while the mass of a prompt's pages is summed: 0.25 GiB in float32."""


def causal_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segments: jax.Array | None = None,
    window: int | None = None,
    sink: jax.Array | None = None,
    target: Target | None = None,
) -> jax.Array:
    """Causal attention of q `[B, T, N, H]` over k, v `[B, T, K, H]` → `[B, T, N, H]`.

    A token sees `window` tokens, itself included; a `sink [N]` joins the softmax of each head.
    """
    return prefill_attention(q, k, v, segments, window=window, sink=sink, target=target)


def shares_of(scores: jax.Array, sink: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """The softmax with a sink in it.

    Of float32 scores `[..., K, G, t, s]` over their last axis and a sink `[N]` or None: the shares,
    and what of each sum the sink takes, `[..., K, G, t]`; 0 without one.
    """
    if sink is None:
        return jax.nn.softmax(scores, axis=-1), jnp.zeros(scores.shape[:-1], scores.dtype)
    own = sink.astype(scores.dtype).reshape(*scores.shape[-4:-2], 1, 1)
    beside = jnp.broadcast_to(own, (*scores.shape[:-1], 1))
    shares = jax.nn.softmax(jnp.concatenate([scores, beside], axis=-1), axis=-1)
    return shares[..., :-1], shares[..., -1]


def prompt_mass(
    q: jax.Array,
    k: jax.Array,
    lengths: jax.Array,
    page_size: int,
    queries: int,
    sink: jax.Array | None = None,
) -> jax.Array:
    """Causal attention that each page of a prompt receives from its last tokens, summed over them.

    Of q `[B, T, N, H]` and k `[B, T, K, H]`, T a multiple of P, with true lengths int32 `[B]`, over
    the last `queries` tokens: float32 `[B, K, G, T / P]`, shares of the softmax with a `sink [N]`
    in it.
    """
    B, T, N, H = q.shape
    K, block = k.shape[2], min(T, 256, max(16, MOST_SCORES // (B * N * T)))
    blocks = -(-T // block)
    padded = jnp.pad(q, ((0, 0), (0, blocks * block - T), (0, 0), (0, 0)))
    grouped = padded.reshape(B, blocks, block, K, N // K, H)
    first = lengths - queries

    def of_block(total: jax.Array, index: jax.Array) -> tuple[jax.Array, None]:
        part = jax.lax.dynamic_index_in_dim(grouped, index, 1, keepdims=False)
        scores = jnp.einsum("btkgh,bskh->bkgts", part, k, preferred_element_type=jnp.float32)
        token = index * block + jnp.arange(block)
        causal = jnp.arange(T) <= token[:, None]
        share, _ = shares_of(jnp.where(causal, scores * H**-0.5, -jnp.inf), sink)
        counts = (token < lengths[:, None]) & (token >= first[:, None])
        share = jnp.where(counts[:, None, None, :, None], share, 0.0)
        pages = share.reshape(B, K, N // K, block, T // page_size, page_size)
        return total + jnp.sum(pages, axis=(3, 5)), None

    # Block by block: no T * T scores in memory.
    zero = jnp.zeros((B, K, N // K, T // page_size), jnp.float32)
    return jax.lax.scan(of_block, zero, jnp.arange(blocks))[0]


_ALL = Selection()


@dataclasses.dataclass(frozen=True)
class Reader:
    """One layer's view of the cache, for the last token written to the current page.

    Attributes:
      cache: all segments; `cache.current` holds the token's own key and value already.
      group: index of the layer's group in `cache.kept`.
      layer: int32 scalar, the layer's number in the model.
      layer_in_group: int32 scalar, its number in the group.
      layer_in_prompt: int32 scalar, its number in `cache.prompt`; None where it has no part of it.
      sink: logit of each query head that joins its softmax, `[N]`; None without.
      fill: int32 `[B, K, S]`, tokens in each kept slot of this layer.
      prompt_fill: int32 `[B', 1, Sp]`, tokens in each page of the prompts.
      written: int32 scalar, tokens of the current page, 1..P; formed once for all layers.
      samples: rows that share one prompt, `B / B'`.
      ranges: of the heads in a pool of kept pages; None where all have the same number.
      target: what is compiled for; None is the default backend.
    """

    cache: Cache
    group: int
    layer: jax.Array
    layer_in_group: jax.Array
    layer_in_prompt: jax.Array | None
    sink: jax.Array | None
    fill: jax.Array
    prompt_fill: jax.Array
    written: jax.Array
    samples: int
    ranges: Ranges | None = None
    target: Target | None = None

    def attend(
        self, q: jax.Array, selection: Selection = _ALL
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attention of q `[B, N, H]` over everything, or the selected pages and the current one.

        Returns:
          The attended values `[B, N, H]` in q's dtype, and the exact share of the softmax that each
          kept page, float32 `[B, N, S]`, and the current page, `[B, N]`, received.
        """
        if selection.kept is None and selection.prompt is None:
            return self._attend_all(q)
        current = self.cache.current
        of_kept = self._over_kept(q, selection.kept)
        page = CurrentPage(current.k[:, :, :, None], current.v[:, :, :, None])
        written = jnp.broadcast_to(self.written, (1, 1, 1))
        of_current = self._over(page, q, written, self.layer)
        of_prompt = self._attend_prompt(q, selection.prompt)
        parts = [of_kept, of_current] if of_prompt is None else [of_prompt, of_kept, of_current]
        out, lse = join_sink(*merge_segments(parts), self.sink)
        mass = jnp.exp(of_kept.page_lse - lse[..., None])
        if selection.kept is not None:
            mass = _at_slots(mass, selection.kept, self.fill.shape[-1])
        return out.astype(q.dtype), mass, jnp.exp(of_current.page_lse[..., 0] - lse)

    def _attend_all(self, q: jax.Array) -> CacheAttention:
        prompt, kept, current = self.cache.prompt, self.cache.kept[self.group], self.cache.current
        at = self.layer_in_prompt
        return cache_attention(
            q,
            None if at is None else Segment(prompt.k, prompt.v, prompt.lengths, at),
            Segment(kept.k, kept.v, kept.fill, self.layer_in_group),
            Segment(current.k, current.v, self.written, self.layer),
            ranges=self.ranges,
            sink=self.sink,
            dtype=q.dtype,
            target=self.target,
        )

    def attend_page(self, q: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Attention of all tokens of the current page, q `[B, P, N, H]`, over what each can see.

        Returns:
          The attended values, float32 `[B, P, N, H]`, and the exact shares of the softmax, as
          `attend` gives them, of each token: `[P, B, K, G, S]` and `[P, B, K, G]`.
        """
        B, P, N, H = q.shape
        K = self.fill.shape[1]
        # The tokens become more query heads of each group, as the rows of one prompt do.
        by_head = jnp.moveaxis(q.reshape(B, P, K, N // K, H), 1, 3)
        many = by_head.reshape(B, K * (N // K) * P, H)
        parts = [
            self._attend_prompt(many, None),
            self._over_kept(many),
            self._within_page(by_head),
        ]
        merged = merge_segments([part for part in parts if part is not None])
        out, lse = join_sink(*merged, None if self.sink is None else jnp.repeat(self.sink, P))
        of_kept, of_current = (
            jnp.exp(part.page_lse - lse[..., None]) for part in parts[1:] if part is not None
        )

        def by_token(x: jax.Array, *axes: int) -> jax.Array:
            return jnp.moveaxis(x.reshape(B, K, N // K, P, *axes), 3, 0)

        attended = jnp.moveaxis(by_token(out, H), 0, 1).reshape(B, P, N, H)
        return attended, by_token(of_kept, of_kept.shape[-1]), by_token(of_current)

    def attend_page_in_ring(
        self, q: jax.Array, ring: Ring, first: jax.Array, positions: jax.Array
    ) -> jax.Array:
        """The same for a ring with this metadata, of whose tokens each token sees others.

        Of q `[B, P, N, H]` at `positions [B, P]`: the attended values, float32 `[B, P, N, H]`.
        """
        (B, P, N, H), K = q.shape, first.shape[1]
        kept, current = self.cache.kept[self.group], self.cache.current

        def tokens(of_ring: jax.Array, of_page: jax.Array) -> jax.Array:
            """The ring's, the newest of a page first, and the current page's, the oldest first."""
            pages = layer_pages(of_ring, self.layer_in_group, None).reshape(B, K, -1, H)
            page = jax.lax.dynamic_index_in_dim(of_page, self.layer, 0, keepdims=False)
            return jnp.concatenate([pages, page], axis=2)

        k, v = tokens(kept.k, current.k), tokens(kept.v, current.v)
        in_ring = newest_first(first[..., None, None] + jnp.arange(P, dtype=jnp.int32)[:, None])
        in_page = jnp.broadcast_to(positions[:, None], (B, K, P))
        at = jnp.concatenate([in_ring.reshape(B, K, -1), in_page], axis=-1)[:, :, None]
        now = positions[:, None, :, None]
        seen = (at >= 0) & (at <= now) & (at > now - ring.window)
        by_head = q.reshape(B, P, K, N // K, H)
        scores = jnp.einsum("bpkgh,bksh->bkgps", by_head, k, preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, :, None], scores * H**-0.5, -jnp.inf)
        shares = shares_of(scores, self.sink)[0].astype(v.dtype)
        out = jnp.einsum("bkgps,bksh->bpkgh", shares, v, preferred_element_type=jnp.float32)
        return out.reshape(B, P, N, H)

    def _within_page(self, q: jax.Array) -> DecodeAttention:
        """Causal attention within the current page of q `[B, K, G, P, H]`, as `K * G * P` heads."""
        k, v = (
            jax.lax.dynamic_index_in_dim(each, self.layer, 0, keepdims=False)
            for each in (self.cache.current.k, self.cache.current.v)
        )
        B, K, G, P, H = q.shape
        scores = jnp.einsum("bkgph,bksh->bkgps", q, k, preferred_element_type=jnp.float32)
        causal = jnp.arange(P) <= jnp.arange(P)[:, None]
        scores = jnp.where(causal, scores * H**-0.5, -jnp.inf).reshape(B, K * G * P, P)
        peak = jnp.max(scores, axis=-1)
        shares = jnp.exp(scores - peak[..., None])
        total = jnp.sum(shares, axis=-1)
        grouped = shares.reshape(B, K, G * P, P).astype(v.dtype)
        out = jnp.einsum("bkts,bksh->bkth", grouped, v, preferred_element_type=jnp.float32)
        lse = (peak + jnp.log(total))[..., None]
        return DecodeAttention(out.reshape(B, K * G * P, H), peak, total, lse)

    def _attend_prompt(self, q: jax.Array, slots: jax.Array | None) -> DecodeAttention | None:
        prompt, layer = self.cache.prompt, self.layer_in_prompt
        heads = prompt.k.shape[2]
        if layer is None or not prompt.k.shape[3]:
            return None
        if slots is not None:
            return self._over(prompt, q, self.prompt_fill, layer, slots)
        together = by_prompt(q, heads, self.samples)
        shared = self._over(prompt, together, self.prompt_fill, layer)
        of_row: DecodeAttention = jax.tree.map(
            partial(by_row, heads=heads, samples=self.samples), shared
        )
        return of_row

    def _over_kept(self, q: jax.Array, slots: jax.Array | None = None) -> DecodeAttention:
        kept = self.cache.kept[self.group]
        if self.ranges is None:
            return self._over(kept, q, self.fill, self.layer_in_group, slots)
        if slots is not None:
            raise ValueError("A policy that selects among the kept pages takes no allotment.")
        pool, own = (q, kept.k, kept.v, self.fill, self.layer_in_group), self.ranges
        return ragged_decode_attention(*pool, ranges=own, target=self.target)

    def _over(
        self,
        pages: Prompt | Kept | CurrentPage,
        q: jax.Array,
        fill: jax.Array,
        layer: jax.Array,
        slots: jax.Array | None = None,
    ) -> DecodeAttention:
        """Attention over a segment, or over some of its slots."""
        if slots is None:
            return decode_attention(q, pages.k, pages.v, fill, layer, target=self.target)
        return selected_decode_attention(
            q, pages.k, pages.v, fill, slots, layer, target=self.target
        )

    def _bound(self, bounds: Bounds, q: jax.Array, layer: jax.Array) -> jax.Array:
        return page_bound(q, bounds.key_min, bounds.key_max, layer, target=self.target)

    def _bound_kept(self, bounds: Bounds, q: jax.Array) -> jax.Array:
        if self.ranges is None:
            return self._bound(bounds, q, self.layer_in_group)
        # Bounds are few: those of a layer may be copied.
        of_layer: Bounds = jax.tree.map(
            lambda x: layer_pages(x, self.layer_in_group, self.ranges)[None], bounds
        )
        return self._bound(of_layer, q, jnp.int32(0))

    def bounded(self, q: jax.Array) -> Bounded:
        """Quest's bound of every page that has one, `[B, N, Sp]` and `[B, N, S]`; -inf if empty."""
        prompt, kept = self.cache.prompt, self.cache.kept[self.group]
        heads, N = prompt.k.shape[2], q.shape[1]
        of_prompt = of_kept = None
        if prompt.bounds is not None and self.layer_in_prompt is not None:
            together = by_prompt(q, heads, self.samples)
            of_prompt = by_row(
                self._bound(prompt.bounds, together, self.layer_in_prompt), heads, self.samples
            )
            filled = jnp.repeat(self.prompt_fill > 0, self.samples, axis=0)
            of_prompt = jnp.where(filled, of_prompt, -jnp.inf)
        if kept.bounds is not None:
            filled = jnp.repeat(self.fill > 0, N // heads, axis=1)
            of_kept = self._bound_kept(kept.bounds, q)
            of_kept = jnp.where(filled, of_kept, -jnp.inf)
        return Bounded(of_prompt, of_kept)

    def bound(self, q: jax.Array) -> jax.Array:
        """Softmax, over all pages, of Quest's bound; the kept pages' part, float32 `[B, N, S]`."""
        of_prompt, of_kept = self.bounded(q)
        assert of_prompt is not None and of_kept is not None
        current_k = jax.lax.dynamic_index_in_dim(self.cache.current.k, self.layer, 0)[:, :, :, None]
        written = jnp.broadcast_to(self.written, current_k.shape[:4])
        bounds = page_bounds(current_k, written)
        of_current = page_bound(q, bounds.key_min, bounds.key_max, 0, implementation="xla")
        pages = [of_kept, of_prompt, of_current]
        share = jax.nn.softmax(jnp.concatenate(pages, axis=-1), axis=-1)
        return share[..., : of_kept.shape[-1]]


def _at_slots(mass: jax.Array, slots: jax.Array, size: int) -> jax.Array:
    """Masses `[B, N, C]` of the pages at `slots [B, K, C]`, by slot: `[B, N, S]`."""
    B, N, _ = mass.shape
    # A slot of -1 would count from the end; one past the end is dropped.
    where = jnp.repeat(jnp.where(slots < 0, size, slots), N // slots.shape[1], axis=1)
    row, head = jnp.arange(B)[:, None, None], jnp.arange(N)[:, None]
    return jnp.zeros((B, N, size), mass.dtype).at[row, head, where].add(mass, mode="drop")
