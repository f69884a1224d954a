"""`selected_decode_attention` on CPUs: gathers the pages, then attends as a CPU does best."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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
    chosen = chosen_pages(k_pages, v_pages, fill, slots, layer)
    return decode_attention_cpu(q, *chosen, jnp.zeros((), jnp.int32), scale=scale)
