"""What the kernels for GPUs of compute capability 9.0 have in common."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

TILE = 64
"""Tokens or pages per tile: the long side of one warpgroup product."""
ROWS = 8
"""Rows that lie together in shared memory: what is copied begins and ends on a multiple of them."""
MULTIPROCESSORS = 132
"""An H100 SXM and an H200 have so many; where there are fewer, each has more to do."""
TILE_BYTES = 96 * 1024
"""For the tiles in flight, per block: two blocks fit on one multiprocessor."""
OUTPUT = 4096
"""Query heads times head dim that one block serves: more would not fit its registers."""
# Layouts are stated where they matter, not inferred; jax 0.10 and 0.12 differ in the default.
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)
NAMES = ("H100", "H200", "H800", "H20", "GH200")


def require_hopper(device_kind: str) -> None:
    """Raises NotImplementedError unless this is a GPU of compute capability 9.0.

    A name that is not known is looked up among the devices of this process.
    """
    words = device_kind.upper().replace("-", " ").split()
    if any(name in words for name in NAMES):
        return
    for device in jax.devices():
        capability = str(getattr(device, "compute_capability", ""))
        if device.device_kind == device_kind and capability == "9.0":
            return
    raise NotImplementedError(
        f"{device_kind!r} is no GPU of compute capability 9.0 (such as {', '.join(NAMES)})"
    )


def require_head_dim(head_dim: int) -> None:
    """Raises NotImplementedError for a head dim that the tiles cannot hold."""
    if head_dim % 16 or not 16 <= head_dim <= 256:
        raise NotImplementedError(f"the head dim is {head_dim}, no multiple of 16 up to 256")


def require_rows(what: str, rows: int) -> None:
    """Raises NotImplementedError for fewer rows than a tile, or a number that is not whole."""
    if rows < TILE or rows % ROWS:
        raise NotImplementedError(
            f"{what} is {rows}, not a multiple of {ROWS} that is at least {TILE}"
        )


def grouping(heads: int, head_dim: int) -> tuple[int, int]:
    """Query heads per block, padded to a multiple of 8, and blocks for this many heads."""
    chunks = -(-heads // (OUTPUT // head_dim // 8 * 8))
    return -(-heads // (8 * chunks)) * 8, chunks


def choose_splits(blocks: int, tiles: int) -> int:
    """Into how many parts to cut the tiles of each block, so that the chip is filled twice."""
    wanted = max(1, min(-(-2 * MULTIPROCESSORS // blocks), tiles))
    # No part without a tile.
    return -(-tiles // -(-tiles // wanted))


def choose_ragged_splits(blocks: int, tiles: int, mean: int) -> int:
    """The same where blocks differ in their tiles: at most `tiles`, and `mean` on an average.

    No part has more tiles than an average block, so that none of a long one ends long after the
    others; nor more than its share where there are few blocks.
    """
    each = max(1, min(mean, -(-blocks * mean // (2 * MULTIPROCESSORS))))
    return -(-tiles // each)


def choose_stages(head_dim: int) -> int:
    """Pairs of bfloat16 tiles in flight."""
    return max(2, min(6, TILE_BYTES // (2 * TILE * head_dim * 2)))


def tile_width(head_dim: int) -> int:
    """Columns of a matrix that lie together in shared memory, in bfloat16."""
    return next(width for width in (64, 32, 16) if head_dim % width == 0)


def tile_memory(*sizes: int, width: int, dtype: Any = jnp.bfloat16) -> Any:
    """Shared memory for matrices, in the order in which the tensor cores read them."""
    swizzle = width * jnp.dtype(dtype).itemsize
    transforms = (plgpu.TilingTransform((ROWS, width)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(sizes, dtype, transforms=transforms)


def product(factors: Sequence[tuple[Any, Any]], rows: int, columns: int) -> jax.Array:
    """The sum of `left · right` over pairs of matrices in shared memory, float32, in registers."""

    def multiply(total: Any) -> Any:
        for left, right in factors:
            plgpu.wgmma(total, left, right)
        return total[...]

    total = plgpu.WGMMAAccumulatorRef((rows, columns), jnp.float32)
    summed: jax.Array = pl.run_scoped(multiply, total)
    return summed


def store(memory: Any, x: jax.Array) -> None:
    """Writes to shared memory, with bank conflicts if need be; jax 0.12 wants that allowed."""
    if hasattr(plgpu, "store"):
        plgpu.store(memory, x, optimized=False)
    else:
        memory[...] = x


_INDEX = inspect.signature(plgpu.load).parameters.get("idx")
_LOAD_WANTS_INDEX = _INDEX is not None and _INDEX.default is inspect.Parameter.empty


def load(memory: Any, layout: Any) -> jax.Array:
    """Reads registers from memory, global memory too; jax 0.10 wants an index, 0.12 takes none."""
    index = (...,) if _LOAD_WANTS_INDEX else ()
    found: jax.Array = plgpu.load(memory, *index, layout=layout, optimized=False)
    return found


def commit_memory() -> None:
    """Shows what was written to shared memory to the tensor cores and to copies out of it."""
    plgpu.commit_smem()


def says_it_reads(size: int) -> Any:
    """A scope in whose name an account of the program finds the bytes that a kernel reads.

    Mosaic GPU drops a kernel's `cost_estimate`.
    """
    return jax.named_scope(f"reads_{size}_bytes")
