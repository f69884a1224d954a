"""`decode_attention` for TPU (Pallas, Mosaic): one pass over the keys and values, flash style.

Each step of the grid takes a block of pages of one row and a few heads; Pallas fetches the next
block meanwhile. A block without a live page is not fetched: its step asks for the block that is
there already. Lanes hold tokens, so that one small product with a matrix of zeros and ones sums
each page (and another spreads each page's fill over its tokens).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import finite, merge_splits, pad_groups, result
from pallas_kernels.decode_attention.reference import DecodeAttention
from pallas_kernels.decode_attention.tuning import TpuBlocks, tpu_blocks
from pallas_kernels.tpu import LANES, check_served, dot, padded_rows, precision_for


def decode_attention_tpu(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    fill: jax.Array,
    layer: jax.Array,
    *,
    scale: float,
    device_kind: str = "",
    blocks: TpuBlocks | None = None,
) -> DecodeAttention:
    """See `api.decode_attention`, which checks the arguments; `blocks` replaces the heuristic's.

    Raises:
      NotImplementedError: a dtype that the kernel does not take, or no slots at all.
    """
    B, N, H = q.shape
    L, _, K, S, P, _ = k_pages.shape
    check_served(k_pages, S)
    if blocks is None:
        blocks = tpu_blocks(device_kind, B, K, S, P, H, k_pages.dtype.itemsize)
    heads, pages, splits = blocks.heads, blocks.pages, blocks.splits
    per_split = -(-S // (pages * splits))
    shape = (B, K // heads, splits, per_split)
    G, rows = N // K, padded_rows(N // K)

    chunk = chunk_tokens(pages, P)
    chunks, chunk_pages = pages * P // chunk, chunk // P
    whole = splits * per_split * pages
    padded = jnp.pad(fill, ((0, 0), (0, 0), (0, whole - S)))
    fills = padded.reshape(B, K, splits * per_split, chunks, chunk_pages)
    live = jnp.any(padded.reshape(B, K // heads, heads, -1, pages) > 0, axis=(2, 4))
    fetched = fetched_blocks(live.reshape(-1))

    def number(b: Any, h: Any, s: Any, j: Any) -> Any:
        return ((b * shape[1] + h) * splits + s) * per_split + j

    def pages_index(b: Any, h: Any, s: Any, j: Any, layer: Any, fetched: Any) -> Any:
        at = fetched[number(b, h, s, j)]
        block, at = jax.lax.rem(at, splits * per_split), jax.lax.div(at, splits * per_split)
        return layer[0], jax.lax.div(at, shape[1]), jax.lax.rem(at, shape[1]), block, 0, 0

    def of_split(*tail: int, steps: int = 1) -> pl.BlockSpec:
        def index(b: Any, h: Any, s: Any, j: Any, *_: Any) -> Any:
            return b, h, (s if steps == 1 else s * steps + j), *(0 for _ in tail)

        return pl.BlockSpec((1, heads, 1, *tail), index)

    of_block = functools.partial(of_split, steps=per_split)

    if P == 1:
        # Pages of one token lie as one long page would; so they are said to be.
        k_pages, v_pages = (x.reshape(L, B, K, S, H) for x in (k_pages, v_pages))
        kv = pl.BlockSpec((1, 1, heads, pages, H), lambda *at: pages_index(*at)[:5])
    else:
        kv = pl.BlockSpec((1, 1, heads, pages, P, H), pages_index)
    out, stats, lse = pl.pallas_call(
        functools.partial(_kernel, number=number, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=shape,
            in_specs=[
                pl.BlockSpec((1, heads, rows, H), lambda b, h, s, j, *_: (b, h, 0, 0)),
                [kv] * 2,
                of_block(chunks, chunk_pages),
            ],
            out_specs=[
                of_split(rows, H),
                of_split(rows, 2),
                of_block(chunks, rows, chunk_pages),
            ],
            scratch_shapes=[Softmax.scratch(heads, rows, H=H)],
        ),
        out_shape=[
            result(B, K, splits, rows, H),
            result(B, K, splits, rows, 2),
            result(B, K, splits * per_split, chunks, rows, chunk_pages),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * B * N * S * P * H,
            bytes_accessed=2 * B * K * S * P * H * k_pages.dtype.itemsize,
            transcendentals=B * N * S * P,
        ),
        name="decode_attention",
    )(layer.reshape(1), fetched, pad_groups(q, K, rows), [k_pages, v_pages], fills)
    # Blocks, chunks and pages in a chunk are, in this order, the slots.
    lse = jnp.moveaxis(lse, 4, 2).reshape(B, K, rows, whole)[:, :, :G, :S]
    peak, total = stats[..., :G, 0], stats[..., :G, 1]
    top, factor = merge_splits(peak, 2)
    return DecodeAttention(
        out=jnp.sum(out[..., :G, :] * factor[..., None], axis=2).reshape(B, N, H),
        max=top.reshape(B, N),
        sum=jnp.sum(total * factor, axis=2).reshape(B, N),
        page_lse=lse.reshape(B, N, S),
    )


def chunk_tokens(pages: int, P: int) -> int:
    """Tokens whose pages are summed by one product: whole pages, a row of lanes where it can be."""
    return LANES if LANES % P == 0 and pages * P % LANES == 0 else pages * P


def fetched_blocks(live: jax.Array) -> jax.Array:
    """The block that is in memory at each step: int32 `[steps]` from which blocks are live."""
    number = jnp.arange(live.size, dtype=jnp.int32)
    latest = jax.lax.cummax(jnp.where(live, number, -1))
    return jnp.where(latest < 0, jnp.argmax(live).astype(jnp.int32), latest)


class Softmax(NamedTuple):
    """The sums so far, in scratch: `acc [..., rows, H]`; `peak` and `total` in all of the lanes."""

    acc: Any
    peak: Any
    total: Any

    @classmethod
    def scratch(cls, *rows: int, H: int) -> Softmax:
        return cls(*(pltpu.VMEM((*rows, columns), jnp.float32) for columns in (H, LANES, LANES)))

    def clear(self) -> None:
        self.acc[...] = jnp.zeros_like(self.acc)
        self.peak[...] = jnp.full_like(self.peak, -jnp.inf)
        self.total[...] = jnp.zeros_like(self.total)

    def of_head(self, head: int) -> Softmax:
        return Softmax(*(ref.at[head] for ref in self))

    def write(self, out_ref: Any, stats_ref: Any) -> None:
        out_ref[...] = self.acc[...]
        stats_ref[..., 0:1] = self.peak[..., 0:1]
        stats_ref[..., 1:2] = self.total[..., 0:1]


def _kernel(
    layer_ref: Any,
    fetched_ref: Any,
    q_ref: Any,
    kv_refs: Any,
    fill_ref: Any,
    out_ref: Any,
    stats_ref: Any,
    lse_ref: Any,
    softmax: Softmax,
    *,
    number: Any,
    scale: float,
) -> None:
    at = [pl.program_id(axis) for axis in range(4)]
    step = number(*at)
    pl.when(at[3] == 0)(softmax.clear)

    @pl.when(fetched_ref[step] != step)
    def dead() -> None:
        lse_ref[...] = jnp.full_like(lse_ref, -jnp.inf)

    @pl.when(fetched_ref[step] == step)
    def attend() -> None:
        for head in range(q_ref.shape[1]):
            kv = [ref.at[0, 0, head] for ref in kv_refs]
            fill, lse = fill_ref.at[0, head, 0], lse_ref.at[0, head, 0]
            attend_block(q_ref.at[0, head], kv, fill, lse, softmax.of_head(head), scale)

    results = out_ref.at[0, :, 0], stats_ref.at[0, :, 0]
    pl.when(at[3] == pl.num_programs(3) - 1)(functools.partial(softmax.write, *results))


def attend_block(
    q_ref: Any, kv_refs: Any, fill_ref: Any, lse_ref: Any, softmax: Softmax, scale: float
) -> None:
    """One block of pages, k and v `[pages, P, H]` or, of single tokens, `[pages, H]`, of one head.

    q is `[rows, H]`, fill `[chunks, chunk_pages]`, lse `[chunks, rows, chunk_pages]` or None, where
    nobody asks.
    """
    (rows, H), (chunks, chunk_pages) = q_ref.shape, fill_ref.shape
    k, v = (ref[...].reshape(-1, H) for ref in kv_refs)
    chunk, precision = k.shape[0] // chunks, precision_for(k)
    page, cuts = chunk // chunk_pages, [slice(c * chunk, (c + 1) * chunk) for c in range(chunks)]
    scores = scale * dot(q_ref[...], k, (1, 1), precision)

    # member[t, p]: token t of a chunk lies in its page p.
    token = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk_pages), 0)
    owner = jax.lax.broadcasted_iota(jnp.int32, (chunk, chunk_pages), 1)
    inside = (token >= owner * page) & (token < owner * page + page)
    member = inside.astype(jnp.float32)
    # Counts up to 128 are exact in one pass.
    fill = fill_ref[...].astype(jnp.float32)
    live_row = dot(fill, member, (1, 1))
    live_column = dot(member, fill, (1, 1))
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, chunk), 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (chunk, 1), 0)
    place_row = jax.lax.rem(lane, page).astype(jnp.float32)
    place_column = jax.lax.rem(sublane, page).astype(jnp.float32)

    live = [place_row < live_row[c : c + 1] for c in range(chunks)]
    parts = [
        jnp.where(valid, scores[:, cut], -jnp.inf) for valid, cut in zip(live, cuts, strict=True)
    ]
    scores = join(parts, axis=1)

    # A dead token may hold anything, NaN included, and 0 * NaN is NaN.
    live = [place_column < live_column[:, c : c + 1] for c in range(chunks)]
    v = join([jnp.where(valid, v[cut], 0) for valid, cut in zip(live, cuts, strict=True)], axis=0)
    weights, peak = accumulate(softmax, scores, v, precision)
    if lse_ref is not None:
        stacked = join([weights[:, cut] for cut in cuts], axis=0)
        sums = dot(stacked, member, (1, 0), jax.lax.Precision.HIGHEST)
        lse_ref[...] = jnp.log(sums.reshape(chunks, rows, chunk_pages)) + peak


def accumulate(
    softmax: Softmax, scores: jax.Array, v: jax.Array, precision: Any
) -> tuple[jax.Array, jax.Array]:
    """Adds scores `[rows, T]` and values `[T, H]`, both without what is dead, to the sums.

    Returns:
      The weights `[rows, T]`, and the score `[rows, 1]` that they are relative to.
    """
    before = softmax.peak[:, 0:1]
    peak = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
    # The block has a live page, but with several heads not every head has.
    safe = finite(peak)
    weights = jnp.exp(scores - safe)
    shrink = jnp.exp(before - safe)
    values = dot(weights.astype(v.dtype), v, (1, 0), precision)
    softmax.acc[...] = softmax.acc[...] * shrink + values
    total = softmax.total[:, 0:1] * shrink + jnp.sum(weights, axis=1, keepdims=True)
    softmax.peak[...] = jnp.broadcast_to(peak, softmax.peak.shape)
    softmax.total[...] = jnp.broadcast_to(total, softmax.total.shape)
    return weights, safe


def join(parts: list[jax.Array], axis: int) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)
