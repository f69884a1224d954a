"""`ragged_decode_attention` in the form that XLA runs fastest on CPUs.

Shapes must be static and ranges differ, so there is one program for each size of a range, and every
head of a layer branches to that of its own. Nothing beyond a head's range is read.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import as_bits
from pallas_kernels.decode_attention.cpu import attend_pairs
from pallas_kernels.decode_attention.reference import DecodeAttention

MOST_UNROLLED = 4
"""Heads up to which each has branches of its own: a loop over few costs more than it saves."""


def ragged_decode_attention_cpu(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    fill: jax.Array,
    starts: jax.Array,
    counts: jax.Array,
    layer: jax.Array,
    *,
    sizes: tuple[int, ...],
    scale: float,
    device_kind: str = "",
) -> DecodeAttention:
    """See `api.ragged_decode_attention`, which checks the arguments, and `reference`."""
    B, N, H = q.shape
    _, T, P, _ = k_pool.shape
    K, S = fill.shape[1:]
    dtype = k_pool.dtype
    k_bits, v_bits = (as_bits(x).reshape(B, T * P, H) for x in (k_pool, v_pool))
    # On a mesh each device has its own part of the pool.
    start = starts[layer] % T
    kind = jnp.searchsorted(jnp.asarray(sizes, jnp.int32), counts[layer])

    def of_size(
        pages: int, q: jax.Array, fill: jax.Array, start: jax.Array
    ) -> tuple[jax.Array, ...]:
        """Attention of one head, q `[B, G, H]` and fill `[B, S]`, over its first `pages`."""

        def part(pool: jax.Array, first: jax.Array | int, rows: int, shift: jax.Array) -> jax.Array:
            at = (first, (start + shift) * P, 0)
            return jax.lax.dynamic_slice(pool, at, (rows, pages * P, H))

        read_k, read_v = (functools.partial(part, bits) for bits in (k_bits, v_bits))
        found = attend_pairs(q, fill[:, :pages], P, read_k, read_v, dtype, scale)
        beyond = ((0, 0), (0, 0), (0, S - pages))
        lse = jnp.pad(found.page_lse, beyond, constant_values=-jnp.inf)
        return found.out, found.max, found.sum, lse

    branches = [functools.partial(of_size, pages) for pages in sizes]
    by_head = jnp.swapaxes(q.reshape(B, K, N // K, H), 0, 1)

    def of_head(head: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        kind, *own = head
        found: tuple[jax.Array, ...] = jax.lax.switch(kind, branches, *own)
        return found

    heads = kind, by_head, jnp.swapaxes(fill, 0, 1), start
    if K <= MOST_UNROLLED:
        each = [of_head(jax.tree.map(lambda x, head=head: x[head], heads)) for head in range(K)]
        found = tuple(map(jnp.stack, zip(*each, strict=True)))
    else:
        found = jax.lax.map(of_head, heads)
    whole = (jnp.swapaxes(x, 0, 1).reshape(B, N, *x.shape[3:]) for x in found)
    return DecodeAttention(*whole)
