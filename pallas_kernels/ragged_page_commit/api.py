"""`ragged_page_commit`: write one full page into a chosen slot of every head's range of a pool."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.checks import check_integers
from pallas_kernels.decode_attention.tuning import prefers_xla
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.ragged_page_commit.cpu import ragged_page_commit_cpu
from pallas_kernels.ragged_page_commit.reference import ragged_page_commit_reference
from pallas_kernels.ranges import Ranges

# On GPUs the reference is one scatter in place already, and nothing else.
_BACKENDS = {
    "xla": ragged_page_commit_reference,
    "cpu": ragged_page_commit_cpu,
    "tpu": load("pallas_kernels.ragged_page_commit.tpu", "ragged_page_commit_tpu"),
}
_AXES = ("BTPH", "LBKPH", "LBK", "LK"), "BTPH"


def ragged_page_commit(
    pool: jax.Array,
    page: jax.Array,
    slot: jax.Array,
    *,
    ranges: Ranges,
    implementation: Implementation = None,
    target: Target | None = None,
) -> jax.Array:
    """Overwrites `pool[b, starts[l, k] + slot[l, b, k]]` with `page[l, b, k]`.

    Args:
      pool: `[B, T, P, H]`, laid out as `ranges` says; donate it, and the write happens in place.
      page: `[L, B, K, P, H]`, same dtype.
      slot: int32 `[L, B, K]`, each within its head's range (not checked: it is data).
      ranges: static; the pages of every layer and head.
      implementation: None picks by target and arguments; "xla", "cpu" or "tpu" forces one.
      target: what is compiled for; the default backend where not given. A mesh splits the heads
        only into as many parts as the ranges have.

    Returns:
      The updated `pool`.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    if pool.ndim != 4 or pool.shape[1] != ranges.total:
        raise ValueError(f"pool has shape {pool.shape}; it must be [B, {ranges.total}, P, H].")
    leading = ranges.layers, pool.shape[0], ranges.heads
    wanted = leading + pool.shape[2:]
    if page.shape != wanted or page.dtype != pool.dtype:
        raise ValueError(
            f"page is {page.dtype}{list(page.shape)}; it must be {pool.dtype}{list(wanted)}."
        )
    if slot.shape != leading:
        raise ValueError(
            f"slot is {slot.dtype}{list(slot.shape)}; it must be int32{list(leading)}."
        )
    check_integers("slot", slot, "the slot of each page")
    target = (Target.of() if target is None else target).in_parts(ranges.parts)
    return dispatch(
        "ragged_page_commit",
        _BACKENDS,
        implementation,
        target,
        (pool, page, slot.astype(jnp.int32), jnp.asarray(ranges.starts)),
        _AXES,
        prefers_xla=functools.partial(prefers_xla, P=pool.shape[2], H=pool.shape[3]),
    )
