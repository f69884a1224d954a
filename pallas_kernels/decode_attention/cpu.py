"""`decode_attention` in the form that XLA runs fastest on CPUs; the same sums as the reference.

XLA copies a layer's keys and values before it multiplies them. While such a copy is small it is
still in the processor's cache when it is read, and costs little more than the one pass over the
memory that there must be. So (row, head) pairs are taken in blocks, and values after the softmax.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import as_bits, from_bits
from pallas_kernels.decode_attention.reference import DecodeAttention, page_weights

BLOCK_BYTES = 4 * 2**20
"""Keys in a block: 2 MiB leave too little work for a second core, 16 MiB come from memory again."""

LATE_BYTES = 2**20
"""Keys in a copy that waits; smaller ones stay in the cache anyway, and may be made meanwhile."""

MOST_SINGLE = 4
"""Query heads of a group up to which one product each is the faster."""

Read = Callable[[jax.Array | int, int, jax.Array], jax.Array]


def decode_attention_cpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str = "",
) -> DecodeAttention:
    """See `api.decode_attention`, which checks the arguments; `device_kind` makes no difference."""
    B, N, H = q.shape
    L, _, K, S, P, _ = k_pages.shape
    pairs, dtype = B * K, k_pages.dtype
    k_bits, v_bits = (as_bits(x).reshape(L, pairs, S * P, H) for x in (k_pages, v_pages))

    def part(pages: jax.Array, first: jax.Array | int, count: int, shift: jax.Array) -> jax.Array:
        at = (layer + shift, first, 0, 0)
        return jax.lax.dynamic_slice(pages, at, (1, count, S * P, H))[0]

    read_k, read_v = (functools.partial(part, bits) for bits in (k_bits, v_bits))
    grouped, fill = q.reshape(pairs, N // K, H), fill.reshape(pairs, S)
    found = attend_pairs(grouped, fill, P, read_k, read_v, dtype, scale)
    return DecodeAttention(
        found.out.reshape(B, N, H),
        found.max.reshape(B, N),
        found.sum.reshape(B, N),
        found.page_lse.reshape(B, N, S),
    )


def attend_pairs(
    q: jax.Array,
    fill: jax.Array,
    page_size: int,
    read_k: Read,
    read_v: Read,
    dtype: Any,
    scale: float,
) -> DecodeAttention:
    """Attention of pairs of a row and a key/value head, each over its own pages.

    Args:
      q: `[n, G, H]`.
      fill: int32 `[n, S]`, tokens in each page.
      page_size: `P`.
      read_k, read_v: give the bits of the pages of some pairs, `[count, S * P, H]`: from the first
        pair on, `count` of them. What they are given last, int32, is 0, and moves the place that
        is read.
      dtype: of the pages.
      scale: factor on the scores.

    Returns:
      The attention, with leading axes `[n, G]`.
    """
    (pairs, G, H), (_, S), P = q.shape, fill.shape, page_size
    pair_bytes = S * P * H * jnp.dtype(dtype).itemsize
    size = block_size(pairs, pair_bytes)
    still = jnp.zeros((), jnp.int32)

    def of_block(first: jax.Array | int) -> DecodeAttention:
        own = jax.lax.dynamic_slice_in_dim(q, first, size)
        filled = jax.lax.dynamic_slice_in_dim(fill, first, size)
        valid = jnp.arange(P) < filled[..., None]
        scores = _scores(own, from_bits(read_k(first, size, still), dtype))
        softmax = page_weights(scores.reshape(size, G, S, P) * scale, valid[:, None])
        # Never true, but it makes the copy of the values wait until they are wanted. XLA drops an
        # `optimization_barrier` before it schedules: with one a call took 1.1 to 1.3 times as long.
        late = (softmax.sum[0, 0] < 0) & (size * pair_bytes >= LATE_BYTES)
        values = read_v(first, size, late.astype(jnp.int32))
        # A dead slot may hold anything, NaN included, and 0 * NaN is NaN.
        values = from_bits(jnp.where(valid.reshape(size, S * P, 1), values, 0), dtype)
        out = jnp.einsum(
            "ngt,nth->ngh",
            softmax.weights.reshape(size, G, S * P).astype(values.dtype),
            values,
            preferred_element_type=jnp.float32,
        )
        return DecodeAttention(out, softmax.max, softmax.sum, softmax.page_lse)

    if size == pairs:
        return of_block(0)
    found = jax.lax.map(of_block, jnp.arange(0, pairs, size))
    whole: DecodeAttention = jax.tree.map(lambda x: x.reshape(pairs, *x.shape[2:]), found)
    return whole


def block_size(pairs: int, pair_bytes: int) -> int:
    """How many (row, head) pairs to take at once: a divisor of `pairs`."""
    wanted = max(1, BLOCK_BYTES // max(1, pair_bytes))
    size = max(n for n in range(1, min(wanted, pairs) + 1) if pairs % n == 0)
    # Much smaller blocks than wanted cost more than they save.
    return size if 2 * size > min(wanted, pairs) else pairs


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q `[n, G, H]` times k `[n, T, H]` → float32 `[n, G, T]`."""
    if q.shape[1] > MOST_SINGLE:
        return jnp.einsum("ngh,nth->ngt", q, k, preferred_element_type=jnp.float32)
    # A product of matrices would first lay out the keys anew.
    single = [
        jnp.einsum("nh,nth->nt", q[:, head], k, preferred_element_type=jnp.float32)
        for head in range(q.shape[1])
    ]
    return jnp.stack(single, axis=1)
