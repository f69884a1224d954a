"""Joins what the blocks of one row and head found in their shares, on Hopper: a second launch.

XLA would take four: for the weights of the shares, their sums, the output, and its transposition.
"""

from __future__ import annotations

from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.arrays import finite, result
from pallas_kernels.decode_attention.hopper_block import by_head, index
from pallas_kernels.hopper import COMPILER, TILE, load, store

TOGETHER = 8
"""Shares whose parts are on their way at once."""


class Parts(NamedTuple):
    """What the blocks found in each share, float32, in global memory."""

    out: Any  # [blocks, splits, H, group], not normalised
    max: Any  # [blocks, splits, group]; -inf where the share was empty
    sum: Any  # [blocks, splits, group]


class Merged(NamedTuple):
    """In global memory."""

    out: Any  # [B * K, G, H], normalised; of any dtype
    lse: Any  # float32 [blocks, group]


def merge_parts(parts: Parts, G: int, chunks: int, dtype: Any, interpret: Any) -> Merged:
    """Joins the shares of every block; H is a multiple of 64, `G` heads are in so many blocks."""
    blocks, _, H, group = parts.out.shape
    (merged,) = plgpu.kernel(
        partial(_merge_block, chunks=chunks),
        out_type=[Merged(result(blocks // chunks, G, H, dtype=dtype), result(blocks, group))],
        grid=(blocks, H // TILE),
        grid_names=("block", "rows"),
        kernel_name="merge_parts",
        compiler_params=COMPILER,
        interpret=interpret,
    )(parts)
    found: Merged = merged
    return found


def _merge_block(read: Parts, write: Merged, *, chunks: int) -> None:
    """Joins 64 channels of the group of query heads of a block."""
    block, part = lax.axis_index("block"), lax.axis_index("rows")
    splits, group, G = read.out.shape[1], read.out.shape[3], write.out.shape[1]
    rows = pl.ds(part * TILE, TILE)
    by_column = plgpu.Layout.WGMMA.reduce(0)

    def add(shares: list[Any], carry: Any) -> Any:
        out, peak, total = carry
        peaks, sums = (
            [load(ref.at[block, at], by_column) for at in shares] for ref in (read.max, read.sum)
        )
        outs = [load(read.out.at[block, at, rows], plgpu.Layout.WGMMA) for at in shares]
        top = reduce(jnp.maximum, peaks, peak)
        factors = [jnp.exp(each - finite(top)) for each in (peak, *peaks)]
        out = reduce(
            jnp.add, (x * by_head(f, TILE) for x, f in zip((out, *outs), factors, strict=True))
        )
        total = reduce(jnp.add, (x * f for x, f in zip((total, *sums), factors, strict=True)))
        return out, top, total

    def zeros(*shape: int, layout: Any, value: float = 0.0) -> jax.Array:
        filled: jax.Array = plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
        return filled

    carry = (
        zeros(TILE, group, layout=plgpu.Layout.WGMMA),
        zeros(group, layout=by_column, value=-jnp.inf),
        zeros(group, layout=by_column),
    )
    whole = splits // TOGETHER

    def several(number: jax.Array, carry: Any) -> Any:
        return add([number * TOGETHER + each for each in range(TOGETHER)], carry)

    if whole:
        carry = lax.fori_loop(0, whole, several, carry)
    if splits % TOGETHER:
        carry = add([jnp.int32(at) for at in range(whole * TOGETHER, splits)], carry)
    out, top, total = carry
    out = out * by_head(1 / total, TILE)

    @pl.when(part == 0)
    def _() -> None:
        store(write.lse.at[block], top + jnp.log(total))

    pair, first = lax.div(block, jnp.int32(chunks)), lax.rem(block, jnp.int32(chunks)) * group
    for head in range(min(group, G)):
        column = jnp.sum(jnp.where(index(group, 1) == head, out, 0), axis=1)
        target = write.out.at[pair, first + head, rows]
        pl.when(first + head < G)(partial(store, target, column.astype(target.dtype)))
