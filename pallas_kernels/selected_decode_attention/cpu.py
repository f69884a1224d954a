"""`selected_decode_attention` on CPUs: gathers the pages, then attends as a CPU does best."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.arrays import as_bits, from_bits
from pallas_kernels.decode_attention.cpu import decode_attention_cpu
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.selected_decode_attention.reference import chosen_pages


def selected_decode_attention_cpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    slots: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str = "",
) -> DecodeAttention:
    """See `api.selected_decode_attention`, which checks the arguments."""
    k, v, chosen = chosen_pages(as_bits(k_pages), as_bits(v_pages), fill, slots, layer)
    k, v = (from_bits(x, k_pages.dtype) for x in (k, v))
    return decode_attention_cpu(q, k, v, chosen, jnp.zeros((), jnp.int32), scale=scale)
