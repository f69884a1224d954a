"""`cache_attention` for TPU (Pallas, Mosaic): one pass over all segments, flash style.

The grid is over prompts, blocks of heads, and steps. The first steps take blocks of pages of the
prompt, for all of its rows at once; the others take blocks of kept pages, row by row, and the last
of a row its current page, too. What one step does is what one of `decode_attention` does, and as
there a block without a live page is not fetched.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.arrays import pad_groups, result
from pallas_kernels.cache_attention.reference import prompt_fill
from pallas_kernels.cache_attention.segments import Attended, Segment, by_prompt
from pallas_kernels.decode_attention.tpu import (
    Softmax,
    accumulate,
    attend_block,
    chunk_tokens,
    fetched_blocks,
)
from pallas_kernels.decode_attention.tuning import CORES, TpuBlocks, tpu_blocks
from pallas_kernels.tpu import check_served, check_whole_words, dot, padded_rows, precision_for

QUERIES_AT_MOST = 256
"""Of all rows of a prompt, for one key/value head: their scores must fit besides the pages."""


def cache_attention_tpu(
    q: jax.Array,
    prompt: Segment | None,
    kept: Segment,
    current: Segment,
    starts: jax.Array | None,
    counts: jax.Array | None,
    *,
    sizes: tuple[int, ...] | None,
    scale: float,
    device_kind: str = "",
    blocks: TpuBlocks | None = None,
) -> Attended:
    """See `api.cache_attention`, which checks the arguments; `blocks` replaces the heuristic's.

    Of a rectangle of kept pages, so that there are no ranges; `ragged_tpu.py` has those of a pool.

    Raises:
      NotImplementedError: a dtype that the kernel does not take, no kept pages at all, pages of one
        token of 16 bits, or less work than the chip has cores.
    """
    assert starts is None and counts is None and sizes is None
    (B, N, H), (_, _, K, S, P, _) = q.shape, kept.k.shape
    check_served(kept.k, S)
    prompts = B if prompt is None else prompt.k.shape[1]
    samples, G, rows = B // prompts, N // K, padded_rows(N // K)
    if P == 1:
        check_whole_words(kept.k)
    if samples * rows > QUERIES_AT_MOST:
        raise NotImplementedError(f"{samples} rows share a prompt, and {rows} queries a head")
    if blocks is None:
        pages = max(S, 0 if prompt is None else prompt.k.shape[3])
        blocks = tpu_blocks(device_kind, B, K, pages, P, H, kept.k.dtype.itemsize)
    heads, cores = blocks.heads, CORES.get(device_kind, 1)
    if prompts * (K // heads) % cores and 2 * cores > prompts * K // heads:
        raise NotImplementedError(f"{prompts * K} prompts and heads are too few for {cores} cores")
    shape = Shape(prompts, samples, K // heads, heads, rows)

    fill = jax.lax.dynamic_index_in_dim(kept.tokens, kept.layer, 0, keepdims=False)
    of_kept = Cut.of(fill, min(blocks.pages, S), P)
    filled = None if prompt is None else prompt_fill(prompt)[:, None]
    of_prompt = None if filled is None else Cut.of(filled, min(blocks.pages, filled.shape[2]), P)
    first = 0 if of_prompt is None else of_prompt.blocks
    # Of a block of heads, those that live in any head; of the prompt they are the same in all.
    live = of_kept.live.reshape(prompts, samples, K // heads, heads, of_kept.blocks)
    live = jnp.any(jnp.moveaxis(live, 1, 2), axis=3)
    fetched = fetched_blocks(live.reshape(-1))
    prompt_fetched = jnp.zeros((1,), jnp.int32)
    if of_prompt is not None:
        repeated = jnp.broadcast_to(of_prompt.live, (prompts, K // heads, first))
        prompt_fetched = fetched_blocks(repeated.reshape(-1))

    def sample_of(j: Any) -> Any:
        return jax.lax.div(jnp.maximum(j - first, 0), of_kept.blocks)

    def of_row(*tail: int, layer: int | None = None) -> pl.BlockSpec:
        """What there is one of for each row, and block of heads."""

        def index(p: Any, h: Any, j: Any, *scalars: Any) -> Any:
            at = p * samples + sample_of(j), h, *(0 for _ in tail)
            return at if layer is None else (scalars[0][layer], *at)

        return pl.BlockSpec((*((1,) * (layer is not None)), 1, heads, *tail), index)

    def of_block(*tail: int) -> pl.BlockSpec:
        """What there is one of for each block of kept pages."""

        def index(p: Any, h: Any, j: Any, *_: Any) -> Any:
            block = jax.lax.rem(jnp.maximum(j - first, 0), of_kept.blocks)
            return p * samples + sample_of(j), h, block, *(0 for _ in tail)

        return pl.BlockSpec((1, heads, 1, *tail), index)

    def kept_index(p: Any, h: Any, j: Any, numbers: Any, fetched: Any, *_: Any) -> Any:
        at = fetched[shape.kept_number(p, h, jnp.maximum(j - first, 0), of_kept.blocks)]
        (p, h, rest) = shape.split(at, samples * of_kept.blocks)
        row = p * samples + jax.lax.div(rest, of_kept.blocks)
        return numbers[1], row, h, jax.lax.rem(rest, of_kept.blocks)

    def prompt_index(p: Any, h: Any, j: Any, numbers: Any, _: Any, fetched: Any) -> Any:
        at = fetched[(p * (K // heads) + h) * first + jnp.minimum(j, first - 1)]
        (p, h, block) = shape.split(at, first)
        return numbers[0], p, h, block

    def pages_spec(cut: Cut, index: Any) -> pl.BlockSpec:
        tail = (H,) if P == 1 else (P, H)
        return pl.BlockSpec(
            (1, 1, heads, cut.pages, *tail), lambda *at: (*index(*at), *(0 for _ in tail))
        )

    specs: list[Any] = [
        pl.BlockSpec((1, heads, samples * rows, H), lambda p, h, j, *_: (p, h, 0, 0)),
        of_block(*of_kept.chunked),
        [pages_spec(of_kept, kept_index)] * 2,
        [of_row(P, H, layer=2)] * 2,
    ]
    operands: list[Any] = [
        _by_head(q, shape),
        of_kept.fills,
        [in_hbm(_flat(x, P)) for x in (kept.k, kept.v)],
        [in_hbm(x) for x in (current.k, current.v)],
    ]
    if prompt is not None and of_prompt is not None:
        specs += [
            pl.BlockSpec(
                (1, 1, 1, *of_prompt.chunked),
                lambda p, h, j, *_: (p, 0, jnp.minimum(j, first - 1), 0, 0),
            ),
            [pages_spec(of_prompt, prompt_index)] * 2,
        ]
        operands += [of_prompt.fills, [in_hbm(_flat(x, P)) for x in (prompt.k, prompt.v)]]
    of_prompt_layer = current.layer if prompt is None else prompt.layer
    numbers = jnp.stack([of_prompt_layer, kept.layer, current.layer, current.tokens])
    out, stats, lse = pl.pallas_call(
        partial(_kernel, shape=shape, first=first, blocks=of_kept.blocks, scale=scale),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(prompts, K // heads, first + samples * of_kept.blocks),
            in_specs=specs,
            out_specs=[
                of_row(rows, H),
                of_row(rows, 2),
                of_block(of_kept.chunked[0], rows, of_kept.chunked[1]),
            ],
            scratch_shapes=[Softmax.scratch(heads, samples * rows, H=H)],
        ),
        out_shape=[
            result(B, K, rows, H),
            result(B, K, rows, 2),
            result(B, K, of_kept.blocks, of_kept.chunked[0], rows, of_kept.chunked[1]),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        cost_estimate=_cost(q, prompt, kept, current),
        name="cache_attention",
    )(numbers, fetched, prompt_fetched, *operands)
    # Blocks, chunks and pages in a chunk are, in this order, the slots.
    lse = jnp.moveaxis(lse, 4, 2).reshape(B, K, rows, -1)[:, :, :G, :S]
    return Attended(
        out[:, :, :G].reshape(B, N, H),
        stats[:, :, :G, 0].reshape(B, N),
        lse.reshape(B, N, S),
        stats[:, :, :G, 1].reshape(B, N),
    )


class Shape(NamedTuple):
    """The grid, and what one step computes with."""

    prompts: int
    samples: int
    head_blocks: int
    heads: int
    rows: int  # of the queries of one head

    def kept_number(self, p: Any, h: Any, step: Any, blocks: int) -> Any:
        return (p * self.head_blocks + h) * (self.samples * blocks) + step

    def split(self, number: Any, steps: int) -> tuple[Any, Any, Any]:
        """The prompt, block of heads and step of a number that counts them all."""
        outer = jax.lax.div(number, steps)
        p, h = jax.lax.div(outer, self.head_blocks), jax.lax.rem(outer, self.head_blocks)
        return p, h, jax.lax.rem(number, steps)


class Cut(NamedTuple):
    """How the pages of a segment are cut into blocks."""

    pages: int  # per block
    blocks: int
    chunked: tuple[int, int]  # chunks per block, pages per chunk
    fills: jax.Array  # [B, K, blocks, *chunked]
    live: jax.Array  # bool [B, K, blocks]

    @classmethod
    def of(cls, fill: jax.Array, pages: int, P: int) -> Cut:
        B, K, S = fill.shape
        blocks, chunk = -(-S // pages), chunk_tokens(pages, P)
        chunked = pages * P // chunk, chunk // P
        padded = jnp.pad(fill, ((0, 0), (0, 0), (0, blocks * pages - S)))
        by_block = padded.reshape(B, K, blocks, pages)
        live = jnp.any(by_block > 0, axis=-1)
        return cls(pages, blocks, chunked, padded.reshape(B, K, blocks, *chunked), live)


def _by_head(q: jax.Array, shape: Shape) -> jax.Array:
    """The queries `[B, N, H]` as `[B', K, samples * rows, H]`."""
    K = shape.head_blocks * shape.heads
    padded = pad_groups(q, K, shape.rows)
    B, H = q.shape[0], q.shape[2]
    return by_prompt(padded.reshape(B, K * shape.rows, H), K, shape.samples).reshape(
        shape.prompts, K, shape.samples * shape.rows, H
    )


def _flat(pages: jax.Array, P: int) -> jax.Array:
    """Pages of one token lie as one long page would; so they are said to be."""
    return pages.reshape(*pages.shape[:4], pages.shape[5]) if P == 1 else pages


def in_hbm(pages: jax.Array) -> jax.Array:
    """Left to itself, XLA may move all layers' pages into VMEM, and back, in every layer."""
    # Outside of a program there is nobody to say it to.
    traced = isinstance(pages, jax.core.Tracer)
    return pltpu.with_memory_space_constraint(pages, pltpu.HBM) if traced else pages


def _cost(q: jax.Array, prompt: Segment | None, kept: Segment, current: Segment) -> pl.CostEstimate:
    N = q.shape[1]
    segments = [x for x in (prompt, kept, current) if x is not None]
    size = sum(x.k.size // len(x.k) for x in segments)
    # Each key of a head meets the queries of its group.
    met = size // current.k.shape[2] * N
    return pl.CostEstimate(
        flops=4 * met,
        bytes_accessed=2 * size * kept.k.dtype.itemsize,
        transcendentals=met // q.shape[2],
    )


def _kernel(
    numbers_ref: Any,
    fetched_ref: Any,
    prompt_fetched_ref: Any,
    q_ref: Any,
    fill_ref: Any,
    kept_refs: Any,
    current_refs: Any,
    *refs: Any,
    shape: Shape,
    first: int,
    blocks: int,
    scale: float,
) -> None:
    *of_prompt, out_ref, stats_ref, lse_ref, softmax = refs
    p, h, j = (pl.program_id(axis) for axis in range(3))
    pl.when(j == 0)(softmax.clear)

    if first:
        prompt_fill_ref, prompt_refs = of_prompt
        block = (p * shape.head_blocks + h) * first + jnp.minimum(j, first - 1)

        @pl.when((j < first) & (prompt_fetched_ref[block] == block))
        def attend_prompt() -> None:
            for head in range(shape.heads):
                kv = [ref.at[0, 0, head] for ref in prompt_refs]
                own = q_ref.at[0, head], kv, prompt_fill_ref.at[0, 0, 0], None
                attend_block(*own, softmax.of_head(head), scale)

    step = j - first
    number = shape.kept_number(p, h, jnp.maximum(step, 0), blocks)
    sample = jax.lax.div(jnp.maximum(step, 0), blocks)
    mine = pl.ds(pl.multiple_of(sample * shape.rows, shape.rows), shape.rows)

    def of_sample(head: int) -> tuple[Any, Softmax]:
        return q_ref.at[0, head, mine], Softmax(*(ref.at[head, mine] for ref in softmax))

    @pl.when((step >= 0) & (fetched_ref[number] != number))
    def dead() -> None:
        lse_ref[...] = jnp.full_like(lse_ref, -jnp.inf)

    @pl.when((step >= 0) & (fetched_ref[number] == number))
    def attend_kept() -> None:
        for head in range(shape.heads):
            q, own = of_sample(head)
            kv = [ref.at[0, 0, head] for ref in kept_refs]
            attend_block(q, kv, fill_ref.at[0, head, 0], lse_ref.at[0, head, 0], own, scale)

    @pl.when((step >= 0) & (jax.lax.rem(jnp.maximum(step, 0), blocks) == blocks - 1))
    def finish() -> None:
        for head in range(shape.heads):
            q, own = of_sample(head)
            kv = [ref.at[0, 0, head] for ref in current_refs]
            page_lse = attend_current(q, kv, numbers_ref[3], own, scale)
            total = own.total[:, 0:1]
            out_ref[0, head] = own.acc[...] / total
            stats_ref[0, head, :, 0:1] = own.peak[:, 0:1] + jnp.log(total)
            stats_ref[0, head, :, 1:2] = page_lse


def attend_current(
    q_ref: Any, kv_refs: Any, written: jax.Array, softmax: Softmax, scale: float
) -> jax.Array:
    """A page `[P, H]` of which so many tokens are written; gives its log-sum-exp, `[rows, 1]`."""
    k, v = (ref[...] for ref in kv_refs)
    precision = precision_for(k)
    scores = scale * dot(q_ref[...], k, (1, 1), precision)
    lane = jax.lax.broadcasted_iota(jnp.int32, (1, k.shape[0]), 1)
    sublane = jax.lax.broadcasted_iota(jnp.int32, (k.shape[0], 1), 0)
    scores = jnp.where(lane < written, scores, -jnp.inf)
    v = jnp.where(sublane < written, v, 0)
    weights, peak = accumulate(softmax, scores, v, precision)
    return jnp.log(jnp.sum(weights, axis=1, keepdims=True)) + peak
