"""What the kernels for TPUs have in common."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

LANES = 128
SUBLANES = 8


def check_served(k_pages: jax.Array, slots: int) -> None:
    """Raises NotImplementedError for a dtype that the kernel does not take, or no slots at all."""
    if k_pages.dtype not in (jnp.bfloat16, jnp.float32):
        raise NotImplementedError(f"caches are bfloat16 or float32, not {k_pages.dtype}")
    if not slots:
        raise NotImplementedError("there are no slots to read")


def check_whole_words(pages: jax.Array) -> None:
    """Raises NotImplementedError for pages that are not whole words of 32 bits in every lane."""
    P = pages.shape[-2]
    if P * pages.dtype.itemsize % 4:
        raise NotImplementedError(
            f"a page of {P} {pages.dtype} token{'s' * (P > 1)} is not whole words of 32 bits; "
            "use an even page_size, or float32"
        )


def padded_rows(group: int) -> int:
    """Query heads per key/value head, with those that only fill the tiles."""
    return -(-group // SUBLANES) * SUBLANES


def precision_for(pages: jax.Array) -> Any:
    """Full products for a float32 cache; a bfloat16 one needs no more than the plain ones."""
    return jax.lax.Precision.HIGHEST if pages.dtype == jnp.float32 else None


def dot(a: jax.Array, b: jax.Array, axes: tuple[int, int], precision: Any = None) -> jax.Array:
    """Contracts one axis of each of two matrices, summed in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((axes[0],), (axes[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.float32,
    )
