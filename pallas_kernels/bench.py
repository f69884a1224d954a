"""Times every operation: `python -m pallas_kernels.bench`.

Each is timed against the reference as XLA compiles it, and against the bandwidth of a large copy,
measured on the same device in the same run; over ranges of a pool also against the same operation
over a rectangle that holds as many pages. Shapes are those of real models. One program runs an
operation many times, each time on another layer of its buffers, so that launching it does not count
and what one call left in the cache does not help the next; programs take turns, and medians are
printed, each as soon as it is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import (
    Ranges,
    Segment,
    Target,
    cache_attention,
    decode_attention,
    grouped_product,
    page_bound,
    page_commit,
    prefill_attention,
    ragged_decode_attention,
    ragged_page_commit,
    selected_decode_attention,
    stacked_product,
)

PAGE = 16
PROGRAM_SECONDS = 0.05
"""A program runs its operation as often as fills this time, on an accelerator."""
ROTATED_BYTES = 256e6
"""The layers that calls take turns on hold at least this: more than any cache."""
MODELS = {
    "qwen2.5-1.5b": (28, 2, 6, 128),
    "qwen2.5-7b": (28, 4, 7, 128),
    "qwen3-4b": (36, 8, 4, 128),
    "llama-3.1-8b": (32, 8, 4, 128),
    "qwen3-32b": (64, 8, 8, 128),
}
"""Layers, key/value heads, query heads for each, head dim."""
COPIED_BYTES = {"cpu": 2**28}
"""What the large copy reads, and writes; 2^30 where not named."""
MOST_PREFILLED = 8
"""Rows of a prefill; with more, the inputs alone would fill a device."""
SPREAD = (1 / 8, 4, 1 / 4, 1 / 2, 1 / 8, 7 / 4, 1 / 4, 1)
"""Pages of heads that differ, as shares of the mean; a few of them already differ a lot."""
GROUP_ROWS, MOST_GROUPS = 8, 32
"""Rows of a block, each of an expert of its own, and experts at most."""
BATCHES = (1, 8, 32, 128, 256)
BUDGETS = (512, 1024, 2048, 8192)


class Shape(NamedTuple):
    """One model, batch and number of tokens in the cache; `budget` is also a prompt's length."""

    model: str
    batch: int
    budget: int


SHAPES = {f"{m}/b{b}/{t}": Shape(m, b, t) for m in MODELS for b in BATCHES for t in BUDGETS}
QUICK = ("qwen2.5-7b/b1/512", "qwen2.5-7b/b1/2048", "qwen2.5-7b/b8/512")
"""Small enough for a CPU."""


@dataclasses.dataclass
class Case:
    """What to time."""

    step: Callable[[Any, Any, jax.Array], Any]  # (carry, arrays, layer) -> carry, one call
    carry: Any  # its first value; it keeps the calls in order
    arrays: Any  # what the calls read
    layers: int  # that the calls take turns on
    bytes: int  # read and written by one call, each input and each output once


@dataclasses.dataclass
class Measurement:
    """One operation at one shape.

    Attributes:
      operation, shape: names.
      bytes: read and written by a call.
      ms: median milliseconds of a call by the kernel; None where none serves it here.
      xla_ms: the same by XLA's path; None where that does not fit into memory.
      over_xla: `xla_ms / ms`, above 1 where the kernel is faster.
      over_rectangle: `ms` (or else `xla_ms`) over the time that the operation takes where all heads
        have the mean number of pages: what it costs that they differ. None for other operations.
      copy_bandwidth: bytes that a large copy reads and writes in a second, measured in turn.
      of_bandwidth: bytes over `ms` (or else `xla_ms`), as a share of the copy bandwidth; None where
        arithmetic is the bound.
      why: why there is no kernel.
    """

    operation: str
    shape: str
    bytes: int
    ms: float | None
    xla_ms: float | None
    over_xla: float | None
    over_rectangle: float | None
    copy_bandwidth: float
    of_bandwidth: float | None
    why: str | None


def _turns(shape: Shape, of_layer: int) -> int:
    """Layers to take turns on, each of so many bytes."""
    return min(MODELS[shape.model][0], max(2, math.ceil(ROTATED_BYTES / of_layer)))


def _buffers(
    shape: Shape, dtype: Any, key: jax.Array, *page: int
) -> tuple[int, jax.Array, jax.Array, jax.Array]:
    """Layers to take turns on, q, and two buffers `[layers, B, K, S, *page, H]`."""
    _, K, G, H = MODELS[shape.model]
    sizes = (shape.batch, K, shape.budget // PAGE, *page, H)
    layers = _turns(shape, 2 * math.prod(sizes) * jnp.dtype(dtype).itemsize)
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (shape.batch, K * G, H), dtype)
    one, other = (jax.random.normal(each, (layers, *sizes), dtype) for each in keys[1:])
    return layers, q, one, other


def _ranges(layers: int, heads: int, mean: int) -> Ranges:
    """Ranges of so many pages on average, of which heads have very different shares."""
    count = layers * heads
    shares = np.random.default_rng(0).permutation(np.resize(SPREAD, count))
    # Every head has one; the others are shared out.
    ends = np.rint((mean - 1) * count * np.cumsum(shares) / np.sum(shares)).astype(int)
    counts = 1 + np.diff(ends, prepend=0)
    return Ranges(tuple(map(tuple, counts.reshape(layers, heads).tolist())))


def _pool(pages: jax.Array) -> tuple[jax.Array, Ranges]:
    """As many random pages `[layers, B, K, S, P, H]` as a pool, and whose they are."""
    layers, B, K, S = pages.shape[:4]
    return pages.reshape(B, -1, *pages.shape[4:]), _ranges(layers, K, S)


def _add(total: jax.Array, part: Any) -> jax.Array:
    """A carry that needs every result of a call."""
    return total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(part))


def _summed(operation: Callable[..., Any], how: dict[str, Any]) -> Callable[..., jax.Array]:
    """A step that calls `operation` on one layer of its buffers."""
    return lambda total, arrays, layer: _add(total, operation(*arrays, layer, **how))


def _attention_bytes(q: jax.Array, pages: int, fill: jax.Array) -> int:
    """Of a call that reads so many bytes of pages, and gives back the softmax of each."""
    results = 4 * q.size + 4 * q.shape[0] * q.shape[1] * (2 + fill.shape[-1])
    return pages + q.nbytes + 4 * math.prod(fill.shape[-3:]) + results


def _decode_attention(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    layers, q, k, v = _buffers(shape, dtype, key, PAGE)
    fill = jnp.full(k.shape[1:4], PAGE, jnp.int32)
    size = _attention_bytes(q, 2 * k.nbytes // layers, fill)
    return Case(_summed(decode_attention, how), jnp.zeros(()), (q, k, v, fill), layers, size)


def _cache_attention(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    """As many kept pages, a quarter as many of the prompt, and a page half written."""
    layers, q, k, v = _buffers(shape, dtype, key, PAGE)
    fill = jnp.full(k.shape[:4], PAGE, jnp.int32)
    prompt = max(1, k.shape[3] // 4)
    lengths = jnp.full((shape.batch,), prompt * PAGE, jnp.int32)
    # Copies: one buffer must not be read from a cache where another has left it.
    pages = [(jnp.flip(x[:, :, :, :prompt], 3), jnp.flip(x[:, :, :, 0], 3)) for x in (k, v)]
    of_prompt, current = zip(*pages, strict=True)

    def step(total: jax.Array, arrays: Any, layer: jax.Array) -> jax.Array:
        q, *segments = arrays
        given = [Segment(k, v, tokens, layer) for k, v, tokens in segments]
        return _add(total, cache_attention(q, *given, **how))

    size = _attention_bytes(q, 2 * (k.nbytes + of_prompt[0].nbytes) // layers, fill)
    arrays = q, (*of_prompt, lengths), (k, v, fill), (*current, jnp.int32(PAGE // 2))
    return Case(step, jnp.zeros(()), arrays, layers, size)


def _selected_decode_attention(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    """A quarter of the pages."""
    layers, q, k, v = _buffers(shape, dtype, key, PAGE)
    _, B, K, S, _, _ = k.shape
    fill = jnp.full((B, K, S), PAGE, jnp.int32)
    order = jax.vmap(lambda key: jax.random.permutation(key, S))(jax.random.split(key, B * K))
    slots = order[:, : S // 4].reshape(B, K, S // 4).astype(jnp.int32)
    size = 2 * k.nbytes // layers // 4 + q.nbytes + slots.nbytes + 4 * q.size
    step = _summed(selected_decode_attention, how)
    return Case(step, jnp.zeros(()), (q, k, v, fill, slots), layers, size)


def _ragged_decode_attention(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    """As many pages, on average over the layers that calls take turns on."""
    layers, q, k, v = _buffers(shape, dtype, key, PAGE)
    (k, ranges), (v, _) = _pool(k), _pool(v)
    own = np.arange(ranges.most) < np.asarray(ranges.counts)[..., None]
    fill = jnp.asarray(np.repeat(PAGE * own[:, None], shape.batch, axis=1), jnp.int32)

    def step(total: jax.Array, arrays: Any, layer: jax.Array) -> jax.Array:
        q, k, v, fill = arrays
        of_layer = lax.dynamic_index_in_dim(fill, layer, 0, keepdims=False)
        part = ragged_decode_attention(q, k, v, of_layer, layer, ranges=ranges, **how)
        return _add(total, part)

    size = _attention_bytes(q, 2 * k.nbytes // layers, fill)
    return Case(step, jnp.zeros(()), (q, k, v, fill), layers, size)


def _page_bound(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    layers, q, low, high = _buffers(shape, dtype, key)
    size = 2 * low.nbytes // layers + q.nbytes + 4 * q.shape[0] * q.shape[1] * low.shape[3]
    return Case(_summed(page_bound, how), jnp.zeros(()), (q, low, high), layers, size)


def _page_commit(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    _, _, k, _ = _buffers(shape, dtype, key, PAGE)
    return _commits(partial(page_commit, **how), k, k[:, :, :, 0], k.shape[3], k.shape[3])


def _ragged_page_commit(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    _, _, k, _ = _buffers(shape, dtype, key, PAGE)
    pool, ranges = _pool(k)
    counts = jnp.asarray(ranges.counts, jnp.int32)[:, None]
    commit = partial(ragged_page_commit, ranges=ranges, **how)
    return _commits(commit, pool, k[:, :, :, 0], counts, k.shape[3])


def _commits(
    commit: Callable[..., jax.Array],
    pages: jax.Array,
    page: jax.Array,
    counts: jax.Array | int,
    turns: int,
) -> Case:
    """All layers at once, as at a page boundary, each time into other ones of `counts` slots."""

    def step(pages: jax.Array, arrays: Any, number: jax.Array) -> jax.Array:
        slot = jnp.broadcast_to((number * 7) % counts, arrays.shape[:3])
        return commit(pages, arrays, slot)

    return Case(step, pages, page, turns, 2 * page.nbytes)


def _prefill_attention(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    _, K, G, H = MODELS[shape.model]
    T = shape.budget
    size = shape.batch * T * H * (2 * K * G + 2 * K) * jnp.dtype(dtype).itemsize
    # Bound by arithmetic, not by memory: two inputs are enough to take turns on.
    q = jax.random.normal(key, (2, shape.batch, T, K * G, H), dtype)
    k = jax.random.normal(key, (2, shape.batch, T, K, H), dtype)

    def step(total: jax.Array, arrays: Any, number: jax.Array) -> jax.Array:
        q, k = (lax.dynamic_index_in_dim(x, number, 0, keepdims=False) for x in arrays)
        return _add(total, prefill_attention(q, k, k, **how))

    return Case(step, jnp.zeros(()), (q, k), 2, size)


def _stacked_product(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    """Of queries, keys and values, out of rows as wide as the queries."""
    _, K, G, H = MODELS[shape.model]
    width, outs = K * G * H, (K * G * H, K * H, K * H)
    of_layer = width * sum(outs) * jnp.dtype(dtype).itemsize
    layers = _turns(shape, of_layer)
    keys = jax.random.split(key, 4)
    x = jax.random.normal(keys[0], (shape.batch, width), dtype)
    stacks = [
        jax.random.normal(each, (layers, out, width), dtype)
        for each, out in zip(keys[1:], outs, strict=True)
    ]
    size = of_layer + shape.batch * (width + sum(outs)) * x.dtype.itemsize
    return Case(_summed(stacked_product, how), jnp.zeros(()), (x, stacks), layers, size)


def _grouped_product(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    """Of gate and up of twice as many experts as there are blocks, as wide as the queries."""
    _, K, G, H = MODELS[shape.model]
    width, out, blocks = K * G * H, K * H, min(shape.batch, MOST_GROUPS)
    of_layer = 2 * blocks * out * width * jnp.dtype(dtype).itemsize
    layers = _turns(shape, 2 * of_layer)
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (blocks, GROUP_ROWS, width), dtype)
    stacks = [jax.random.normal(each, (layers, 2 * blocks, out, width), dtype) for each in keys[1:]]
    owner = 2 * jnp.arange(blocks, dtype=jnp.int32)
    size = of_layer + blocks * GROUP_ROWS * (width + 2 * out) * x.dtype.itemsize
    return Case(_summed(grouped_product, how), jnp.zeros(()), (x, stacks, owner), layers, size)


OPERATIONS: dict[str, Callable[..., Case]] = {
    "cache_attention": _cache_attention,
    "decode_attention": _decode_attention,
    "selected_decode_attention": _selected_decode_attention,
    "ragged_decode_attention": _ragged_decode_attention,
    "page_bound": _page_bound,
    "page_commit": _page_commit,
    "ragged_page_commit": _ragged_page_commit,
    "prefill_attention": _prefill_attention,
    "stacked_product": _stacked_product,
    "grouped_product": _grouped_product,
}
RECTANGLES = {
    "ragged_decode_attention": "decode_attention",
    "ragged_page_commit": "page_commit",
}
"""The same where all heads have equally many pages."""


class Program:
    """Many calls in one program; `seconds()` runs it once."""

    def __init__(self, case: Case, least: float) -> None:
        self.case = case
        self.carry = case.carry
        self.calls = case.layers
        self._compile()
        self.seconds()
        self.calls *= max(1, min(1000, math.ceil(least / (self.seconds() * self.calls))))
        if self.calls > case.layers:
            self._compile()
            self.seconds()

    def _compile(self) -> None:
        case, calls = self.case, self.calls

        def run(carry: Any, arrays: Any) -> Any:
            def body(number: jax.Array, carry: Any) -> Any:
                return case.step(carry, arrays, lax.rem(number, jnp.int32(case.layers)))

            return lax.fori_loop(jnp.int32(0), jnp.int32(calls), body, carry)

        self.run = jax.jit(run, donate_argnums=0).lower(self.carry, case.arrays).compile()

    def seconds(self) -> float:
        """Seconds that one call takes."""
        _wait_for((self.carry, self.case.arrays))
        start = time.perf_counter()
        self.carry = _wait_for(self.run(self.carry, self.case.arrays))
        return (time.perf_counter() - start) / self.calls


def _wait_for(arrays: Any) -> Any:
    return jax.block_until_ready(arrays)


def copying(target: Target) -> Program:
    """A copy of a large array, which says how fast memory is; each number is read and written."""
    numbers = jnp.zeros((COPIED_BYTES.get(target.platform, 2**30) // 4,), jnp.float32)
    copied = Case(lambda carry, one, _: carry + one, numbers, jnp.ones(()), 1, 2 * numbers.nbytes)
    return Program(copied, _least(target))


def _least(target: Target) -> float:
    """Seconds that a program takes at least."""
    return 0.0 if target.platform == "cpu" else PROGRAM_SECONDS


def bench(
    operations: Sequence[str], shapes: Sequence[str], *, dtype: str, repetitions: int = 7
) -> Iterator[Measurement]:
    """Measures every operation at every shape, one after the other.

    Args:
      operations, shapes: names, of `OPERATIONS` and of `SHAPES`.
      dtype: of queries and cache.
      repetitions: timed turns; medians count.
    """
    target = Target.of()
    least, copy = _least(target), copying(target)
    for shape, name in itertools.product(shapes, operations):
        if name == "prefill_attention" and SHAPES[shape].batch > MOST_PREFILLED:
            continue
        if (row := _measured(name, shape, dtype, target, copy, least, repetitions)) is not None:
            yield row
        else:
            print(f"{name}, {shape}: out of memory", file=sys.stderr)


def _measured(
    name: str,
    shape: str,
    dtype: str,
    target: Target,
    copy: Program,
    least: float,
    repetitions: int,
) -> Measurement | None:
    """None where nothing fits into memory."""
    programs, missing = {"copy": copy}, {}
    wanted: dict[str, tuple[str, Any]] = {"xla": (name, "xla"), "own": (name, target.platform)}
    if name in RECTANGLES:
        wanted["rectangle"] = (RECTANGLES[name], None)
    for each, (operation, implementation) in wanted.items():
        how = {"implementation": implementation, "target": target}
        build = partial(OPERATIONS[operation], SHAPES[shape], dtype, jax.random.key(0), **how)
        try:
            programs[each] = Program(build(), least)
        except ValueError as error:
            missing[each] = str(error).rpartition(f"{target.platform}: ")[2].rstrip(".")
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            missing[each] = "out of memory"
    if (timed := programs.get("own", programs.get("xla"))) is None:
        return None
    times: dict[str, list[float]] = {each: [] for each in programs}
    for _ in range(repetitions):
        for each, program in programs.items():
            times[each].append(program.seconds())
    seconds = {each: statistics.median(of) for each, of in times.items()}
    xla, own = seconds.get("xla"), seconds.get("own")
    size, bandwidth = timed.case.bytes, copy.case.bytes / seconds["copy"]
    of_bandwidth = _over(size / bandwidth, own or xla)
    return Measurement(
        operation=name,
        shape=shape,
        bytes=size,
        ms=_over(own, 1e-3),
        xla_ms=_over(xla, 1e-3),
        over_xla=_over(xla, own),
        over_rectangle=_over(own or xla, seconds.get("rectangle")),
        copy_bandwidth=bandwidth,
        of_bandwidth=None if name == "prefill_attention" else of_bandwidth,
        why=missing.get("own"),
    )


def _over(part: float | None, whole: float | None) -> float | None:
    return None if part is None or whole is None else part / whole


TABLE = """
| operation | shape | MB | kernel ms | XLA ms | faster | over rectangle | of copy bandwidth |
|---|---|---:|---:|---:|---:|---:|---:|"""


def table_line(row: Measurement) -> str:
    """The row as Markdown."""

    def cell(value: float | None, form: str) -> str:
        return "-" if value is None else form.format(value)

    cells = [
        *(row.operation, row.shape, f"{row.bytes / 1e6:.1f}"),
        *(cell(ms, "{:.4f}") for ms in (row.ms, row.xla_ms)),
        *(cell(ratio, "{:.2f} x") for ratio in (row.over_xla, row.over_rectangle)),
        cell(row.of_bandwidth, "{:.0%}"),
    ]
    return f"| {' | '.join(cells)} |"


def names_of(known: Mapping[str, Any]) -> Callable[[str], list[str]]:
    """Reads names with commas between them."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: --list prints those there are")
        return text.split(",")

    return names


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = argparse.ArgumentParser("python -m pallas_kernels.bench", description=__doc__)
    parser.add_argument("--op", type=names_of(OPERATIONS), help="names, with commas; else all")
    parser.add_argument("--shapes", type=names_of(SHAPES), help="names, with commas")
    dtypes = "bfloat16, and float32 on a CPU, which has no bfloat16 units"
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help=dtypes)
    parser.add_argument("--repetitions", type=int, default=7, help="timed turns (default 7)")
    parser.add_argument("--quick", action="store_true", help="a few small shapes, as on a CPU")
    parser.add_argument("--json", action="store_true", help="print a JSON object a line, no table")
    parser.add_argument("--list", action="store_true", help="print all names")
    given = parser.parse_args(arguments)
    if given.list:
        print("\n".join([*OPERATIONS, *SHAPES]))
        return 0
    if given.repetitions < 1:
        parser.error(f"--repetitions is {given.repetitions}; it must be at least 1.")
    target = Target.of()
    operations, shapes = given.op or list(OPERATIONS), given.shapes or list(SHAPES)
    if not given.shapes and (given.quick or target.platform == "cpu"):
        shapes = QUICK
        # Prefill takes seconds for each call on a CPU.
        operations = given.op or [name for name in operations if name != "prefill_attention"]
        print(f"{len(QUICK)} shapes of {len(SHAPES)}; --shapes names others.", file=sys.stderr)
    dtype = given.dtype or ("float32" if target.platform == "cpu" else "bfloat16")
    about = {
        "device": target.device_kind or target.platform,
        "jax": jax.__version__,
        "dtype": dtype,
    }
    if not given.json:
        print("{device}, jax {jax}, {dtype}".format(**about), TABLE, sep="\n", flush=True)
    rows = []
    for row in bench(operations, shapes, dtype=dtype, repetitions=given.repetitions):
        line = json.dumps(about | dataclasses.asdict(row)) if given.json else table_line(row)
        print(line, flush=True)
        rows.append(row)
    if rows and not given.json:
        bandwidth = statistics.median(row.copy_bandwidth for row in rows)
        print(f"\nA copy reads and writes {bandwidth / 1e9:,.1f} GB/s.")
        for reason in sorted({f"{row.operation}: {row.why}" for row in rows if row.why}):
            print(f"No kernel for {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
