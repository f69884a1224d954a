"""Which form of a product of a few rows with a weight a device runs fastest.

    python -m raas_jax.lab.bench.products --rows 1,8 --dtype bfloat16

Of a model's layers, one weight each, one after the other, as a decode reads them: out of a stack by
number, or as arrays of their own. `raas_jax.products.project` chooses by these times.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax import products

FORMS: dict[str, Callable[..., jax.Array]] = {
    "product": products._matmul,
    "product on a CPU": products._matmul_on_cpu,
}


@partial(jax.jit, static_argnames="form")
def _stacked(x: jax.Array, weights: jax.Array, form: str) -> jax.Array:
    def layer(number: jax.Array, x: jax.Array) -> jax.Array:
        weight = jax.lax.dynamic_index_in_dim(weights, number, keepdims=False)
        return _next(x, _product(weight, form, x))

    found: jax.Array = jax.lax.fori_loop(0, weights.shape[0], layer, x)
    return found


@partial(jax.jit, static_argnames="form")
def _separate(x: jax.Array, weights: Sequence[jax.Array], form: str) -> jax.Array:
    branches = [partial(_product, weight, form) for weight in weights]

    def layer(number: jax.Array, x: jax.Array) -> jax.Array:
        return _next(x, jax.lax.switch(number, branches, x))

    found: jax.Array = jax.lax.fori_loop(0, len(weights), layer, x)
    return found


def _product(weight: jax.Array, form: str, x: jax.Array) -> jax.Array:
    return FORMS[form](x, weight, dtype=x.dtype)


def _next(x: jax.Array, out: jax.Array) -> jax.Array:
    return out[:, : x.shape[1]] * jnp.asarray(0.01, x.dtype)


def _milliseconds(call: Callable[[], Any], repetitions: int) -> float:
    jax.block_until_ready(call())
    times = []
    for _ in range(repetitions):
        began = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - began)
    return 1e3 * median(times)


def measure(rows: Sequence[int], dtype: str, shape: tuple[int, int, int], repetitions: int) -> str:
    """A table of milliseconds for all layers, by form and number of rows.

    `shape` is `(layers, out, in)` of the weights.
    """
    layers, _, width = shape
    key = jax.random.key(0)
    weights = jax.random.normal(key, shape, jnp.float32).astype(dtype)
    apart = [weights[number] for number in range(layers)]
    lines = []
    for count in rows:
        x = jax.random.normal(key, (count, width), jnp.float32).astype(dtype)
        for form in FORMS:
            times = (
                _milliseconds(partial(_stacked, x, weights, form), repetitions),
                _milliseconds(partial(_separate, x, apart, form), repetitions),
            )
            lines.append([str(count), form, *(f"{each:.2f}" for each in times)])
    heads = ["Rows", "Form", "stacked, ms", "separate, ms"]
    table = [heads, ["---:", "---", "---:", "---:"], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in table)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", default="1,2,8,16,64", help="rows, with commas")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--shape", default="30,1536,576", help="layers, outputs, inputs")
    parser.add_argument("--repetitions", type=int, default=7)
    given = parser.parse_args()
    layers, outputs, inputs = map(int, given.shape.split(","))
    rows = [int(part) for part in given.rows.split(",")]
    print(measure(rows, given.dtype, (layers, outputs, inputs), given.repetitions), end="")


if __name__ == "__main__":
    main()
