"""Times every operation: `python -m pallas_kernels.bench`.

Each is timed against the reference as XLA compiles it, and against the bandwidth of a large copy,
measured on the same device in the same run. Shapes are those of real models. One program runs an
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
from jax import lax

from pallas_kernels import (
    Target,
    decode_attention,
    page_bound,
    page_commit,
    prefill_attention,
    selected_decode_attention,
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
      xla_ms: the same by XLA's path.
      over_xla: `xla_ms / ms`, above 1 where the kernel is faster.
      copy_bandwidth: bytes that a large copy reads and writes in a second, measured in turn.
      of_bandwidth: bytes over `ms` (or else `xla_ms`), as a share of the copy bandwidth; None where
        arithmetic is the bound.
      why: why there is no kernel.
    """

    operation: str
    shape: str
    bytes: int
    ms: float | None
    xla_ms: float
    over_xla: float | None
    copy_bandwidth: float
    of_bandwidth: float | None
    why: str | None


def _buffers(
    shape: Shape, dtype: Any, key: jax.Array, *page: int
) -> tuple[int, jax.Array, jax.Array, jax.Array]:
    """Layers to take turns on, q, and two buffers `[layers, B, K, S, *page, H]`."""
    layers, K, G, H = MODELS[shape.model]
    sizes = (shape.batch, K, shape.budget // PAGE, *page, H)
    of_layer = 2 * math.prod(sizes) * jnp.dtype(dtype).itemsize
    layers = min(layers, max(2, math.ceil(ROTATED_BYTES / of_layer)))
    keys = jax.random.split(key, 3)
    q = jax.random.normal(keys[0], (shape.batch, K * G, H), dtype)
    one, other = (jax.random.normal(each, (layers, *sizes), dtype) for each in keys[1:])
    return layers, q, one, other


def _add(total: jax.Array, part: Any) -> jax.Array:
    """A carry that needs every result of a call."""
    return total + sum(jnp.sum(leaf, dtype=jnp.float32) for leaf in jax.tree.leaves(part))


def _summed(operation: Callable[..., Any], how: dict[str, Any]) -> Callable[..., jax.Array]:
    """A step that calls `operation` on one layer of its buffers."""
    return lambda total, arrays, layer: _add(total, operation(*arrays, layer, **how))


def _decode_attention(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    layers, q, k, v = _buffers(shape, dtype, key, PAGE)
    fill = jnp.full(k.shape[1:4], PAGE, jnp.int32)
    results = 4 * q.size + 4 * q.shape[0] * q.shape[1] * (2 + k.shape[3])
    size = 2 * k.nbytes // layers + q.nbytes + fill.nbytes + results
    return Case(_summed(decode_attention, how), jnp.zeros(()), (q, k, v, fill), layers, size)


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


def _page_bound(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    layers, q, low, high = _buffers(shape, dtype, key)
    size = 2 * low.nbytes // layers + q.nbytes + 4 * q.shape[0] * q.shape[1] * low.shape[3]
    return Case(_summed(page_bound, how), jnp.zeros(()), (q, low, high), layers, size)


def _page_commit(shape: Shape, dtype: Any, key: jax.Array, **how: Any) -> Case:
    """All layers at once, as at a page boundary, each time into other slots."""
    _, _, k, _ = _buffers(shape, dtype, key, PAGE)
    page = k[:, :, :, 0]
    S = k.shape[3]

    def step(pages: jax.Array, arrays: Any, number: jax.Array) -> jax.Array:
        slot = jnp.broadcast_to((number * 7) % S, pages.shape[:3])
        return page_commit(pages, arrays, slot, **how)

    return Case(step, k, page, S, 2 * page.nbytes)


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


OPERATIONS: dict[str, Callable[..., Case]] = {
    "decode_attention": _decode_attention,
    "selected_decode_attention": _selected_decode_attention,
    "page_bound": _page_bound,
    "page_commit": _page_commit,
    "prefill_attention": _prefill_attention,
}


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
    least = 0.0 if target.platform == "cpu" else PROGRAM_SECONDS
    numbers = jnp.zeros((COPIED_BYTES.get(target.platform, 2**30) // 4,), jnp.float32)
    copied = Case(lambda carry, one, _: carry + one, numbers, jnp.ones(()), 1, 2 * numbers.nbytes)
    copy = Program(copied, least)
    for shape, name in itertools.product(shapes, operations):
        if name == "prefill_attention" and SHAPES[shape].batch > MOST_PREFILLED:
            continue
        build = partial(OPERATIONS[name], SHAPES[shape], dtype, jax.random.key(0), target=target)
        programs, why = {"xla": Program(build(implementation="xla"), least), "copy": copy}, None
        try:
            programs["own"] = Program(build(implementation=target.platform), least)
        except ValueError as error:
            why = str(error).rpartition(f"{target.platform}: ")[2].rstrip(".")
        times: dict[str, list[float]] = {each: [] for each in programs}
        for _ in range(repetitions):
            for each, program in programs.items():
                times[each].append(program.seconds())
        seconds = {each: statistics.median(of) for each, of in times.items()}
        xla, own = seconds["xla"], seconds.get("own")
        size, bandwidth = programs["xla"].case.bytes, copy.case.bytes / seconds["copy"]
        by_arithmetic = name == "prefill_attention"
        yield Measurement(
            operation=name,
            shape=shape,
            bytes=size,
            ms=None if own is None else 1e3 * own,
            xla_ms=1e3 * xla,
            over_xla=None if own is None else xla / own,
            copy_bandwidth=bandwidth,
            of_bandwidth=None if by_arithmetic else size / (own or xla) / bandwidth,
            why=why,
        )


TABLE = """
| operation | shape | MB | kernel ms | XLA ms | faster | of copy bandwidth |
|---|---|---:|---:|---:|---:|---:|"""


def table_line(row: Measurement) -> str:
    """The row as Markdown."""
    own = "-" if row.ms is None else f"{row.ms:.4f}"
    share = "-" if row.of_bandwidth is None else f"{row.of_bandwidth:.0%}"
    faster = "-" if row.over_xla is None else f"{row.over_xla:.2f} x"
    return (
        f"| {row.operation} | {row.shape} | {row.bytes / 1e6:.1f} | {own} | {row.xla_ms:.4f} "
        f"| {faster} | {share} |"
    )


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
    if not given.json:
        bandwidth = statistics.median(row.copy_bandwidth for row in rows)
        print(f"\nA copy reads and writes {bandwidth / 1e9:,.1f} GB/s.")
        for reason in sorted({f"{row.operation}: {row.why}" for row in rows if row.why}):
            print(f"No kernel for {reason}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
