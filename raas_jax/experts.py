"""Mixtures of experts: of many multilayer perceptrons each token goes through a few.

The weights of all layers' experts lie in stacks, and only those that are chosen are read, where
they lie. A router's shares are those of Mixtral (arXiv 2401.04088) and Qwen3-MoE.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import Target

NAMES = ("expert_gate", "expert_up", "expert_down")
"""The stacks, as the weights of a model name them."""
BLOCK, LARGE_BLOCK = 16, 128
"""Tokens of one expert that are multiplied at a time, on a CPU and on a GPU."""
FEW_ROWS = 256
"""Up to so many rows a GPU is as fast at multiplying them by all experts as at reading these."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of one layer, in the stacks of all layers.

    Attributes:
      gate, up: `[L, E, F, D]`.
      down: `[L, E, D, F]`.
      number: int32 scalar, the layer's.
      target: what is compiled for; on its mesh the width `F` of every expert is split (static).
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    number: jax.Array
    target: Target | None = dataclasses.field(default=None, metadata={"static": True})

    def weights(self, expert: jax.Array) -> list[jax.Array]:
        """Gate, up and down of one expert, of this layer."""
        at = self.number, expert, 0, 0
        return [
            jax.lax.dynamic_slice(stack, at, (1, 1, *stack.shape[2:]))[0, 0]
            for stack in (self.gate, self.up, self.down)
        ]


def share_read(experts: int, per_token: int, rows: int) -> float:
    """Of all experts of a layer, the share that a step reads where no two rows choose the same."""
    return min(1.0, rows * per_token / experts) if experts else 1.0


def route(logits: jax.Array, per_token: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Which experts a token goes through, and how much each counts.

    Of float32 logits `[R, E]`: the `per_token` largest shares of their softmax, float32 `[R, k]`,
    of a sum of one if they are to be normalised, and the numbers of their experts, int32 `[R, k]`.
    """
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), per_token)
    return shares / jnp.sum(shares, axis=-1, keepdims=True) if normalise else shares, chosen


def mixture(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """Sum of what the chosen experts make of x `[R, D]`, each by its share → `[R, D]`.

    Up to as many choices as there are experts, one after the other is read. Beyond, tokens are
    brought together by their experts, so that each expert is read once.
    """
    target = experts.target or Target("")
    mesh, heads, rows = target.mesh, target.heads, target.rows
    if mesh is None or target.head_ways == 1 or experts.gate.shape[2] % target.head_ways:
        return _mix(x, shares, chosen, experts)
    split = mesh.shape.get(rows, 1)
    by_row = PartitionSpec(rows if x.shape[0] % split == 0 else None)
    outward, inward = PartitionSpec(None, None, heads), PartitionSpec(None, None, None, heads)
    specs: Any = {"gate": outward, "up": outward, "down": inward, "number": PartitionSpec()}
    by_width = dataclasses.replace(experts, **specs)

    def on_each(*operands: Any) -> jax.Array:
        part: jax.Array = jax.lax.psum(_mix(*operands), heads)
        return part

    summed: jax.Array = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(by_row, by_row, by_row, by_width),
        out_specs=by_row,
        check_vma=False,
    )(x, shares, chosen, experts)
    return summed


def _mix(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    operands = x, shares, chosen, experts
    if chosen.size <= experts.gate.shape[1]:
        out = _one_by_one(*operands)
    else:
        on_gpu = _by_all if x.shape[0] <= FEW_ROWS else partial(_in_blocks, size=LARGE_BLOCK)
        ways = {"default": _grouped, "cpu": _in_blocks, "cuda": on_gpu}
        out = jax.lax.platform_dependent(*operands, **ways)
    return out.astype(x.dtype)


def _one_by_one(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """A product at a time: nothing is read but the experts that are chosen."""

    def add(out: jax.Array, choice: Any) -> tuple[jax.Array, None]:
        row, expert, share = choice
        one = jax.lax.dynamic_index_in_dim(x, row, keepdims=False)
        y = _perceptron(_row_product, one, *experts.weights(expert))
        return out.at[row].add(share * y.astype(jnp.float32)), None

    rows = jnp.repeat(jnp.arange(x.shape[0], dtype=jnp.int32), chosen.shape[1])
    choices = rows, chosen.reshape(-1), shares.reshape(-1)
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), choices)[0]


def _perceptron(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    inner = jax.nn.silu(product(x, gate)) * product(x, up)
    out: jax.Array = product(inner.astype(x.dtype), down)
    return out


def _row_product(x: jax.Array, weight: jax.Array) -> jax.Array:
    """float32 product of x `[in]` with a weight `[out, in]` that is read where it lies."""
    found: jax.Array = jax.lax.platform_dependent(x, weight, default=_sums, tpu=_product)
    return found


def _sums(x: jax.Array, weight: jax.Array) -> jax.Array:
    # A product of matrices would first copy the weight out of its stack.
    return jnp.sum(weight.astype(jnp.float32) * x.astype(jnp.float32), axis=-1)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    dims = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, dims, preferred_element_type=jnp.float32)


def _sorted(chosen: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Choices in the order of their experts: which ones, their experts, and their rows."""
    order = jnp.argsort(chosen.reshape(-1), stable=True).astype(jnp.int32)
    return order, chosen.reshape(-1)[order], order // chosen.shape[1]


def _grouped(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """Products of all groups in one, as XLA has them for accelerators."""
    L, E = experts.gate.shape[:2]
    order, expert, row = _sorted(chosen)
    # The experts of the other layers have no tokens, and so are not read.
    sizes = jnp.bincount(experts.number * E + expert, length=L * E).astype(jnp.int32)
    dims = jax.lax.RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))

    def product(rows: jax.Array, stack: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot_general(
            rows,
            stack.reshape(L * E, *stack.shape[2:]),
            sizes,
            dims,
            preferred_element_type=jnp.float32,
        )

    y = _perceptron(product, x[row], experts.gate, experts.up, experts.down)
    return jnp.zeros(x.shape, jnp.float32).at[row].add(shares.reshape(-1)[order][:, None] * y)


def _by_all(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """Products with every expert, of which those that are not chosen count nothing."""
    gate, up, down = (
        jax.lax.dynamic_index_in_dim(stack, experts.number, keepdims=False)
        for stack in (experts.gate, experts.up, experts.down)
    )
    row = jnp.arange(x.shape[0])[:, None]
    counts = jnp.zeros((x.shape[0], gate.shape[0]), jnp.float32).at[row, chosen].add(shares)

    def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)

    inner = jax.nn.silu(product("rd,efd->erf", x, gate)) * product("rd,efd->erf", x, up)
    inner = (inner * counts.T[..., None]).astype(x.dtype)
    return product("erf,edf->rd", inner, down)


def _in_blocks(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    experts: Experts,
    size: int = BLOCK,
) -> jax.Array:
    """Products of up to `size` tokens of one expert, one after the other.

    XLA's grouped product multiplies every token by every expert, but on TPUs.
    """
    R, E = x.shape[0], experts.gate.shape[1]
    order, expert, row = _sorted(chosen)
    sizes = jnp.bincount(expert, length=E).astype(jnp.int32)
    blocks = -(-sizes // size)
    last = jnp.cumsum(blocks)
    # Every expert's choices begin with a block of their own.
    rank = jnp.arange(order.size, dtype=jnp.int32) - (jnp.cumsum(sizes) - sizes)[expert]
    place = (last - blocks)[expert] * size + rank
    most = -(-order.size // size) + E
    rows = jnp.full(most * size, R, jnp.int32).at[place].set(row).reshape(most, size)
    share = jnp.zeros(most * size, jnp.float32).at[place].set(shares.reshape(-1)[order])
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])

    owner = jnp.searchsorted(last, jnp.arange(most, dtype=jnp.int32), side="right")

    def multiply(block: tuple[jax.Array, jax.Array, jax.Array], out: jax.Array) -> jax.Array:
        own, rows, share = block
        y = _perceptron(_product, padded[rows], *experts.weights(own))
        return out.at[rows].add(share[:, None] * y, mode="drop")

    def add(out: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return jax.lax.cond(block[0] < E, multiply, lambda _, out: out, block, out), None

    blocks_of = owner, rows, share.reshape(most, size)
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), blocks_of)[0]
