"""Mixtures of experts: of many multilayer perceptrons each token goes through a few.

The weights of all layers' experts lie in stacks, and only those that are chosen are read, where
they lie. A router's shares are those of Mixtral (arXiv 2401.04088) and Qwen3-MoE; biases and limits
are those of gpt-oss (arXiv 2508.10925).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from pallas_kernels import Target, grouped_product
from pallas_kernels.grouped_product import reads_in_place
from raas_jax.config import ModelConfig

NAMES = ("expert_gate", "expert_up", "expert_down")
BIASES = ("expert_gate_bias", "expert_up_bias", "expert_down_bias")
STACKS = (*NAMES, *BIASES)
"""The stacks, as the weights of a model name them; not all models have biases."""
PLAIN = ("plain_gate", "plain_up", "plain_down")
"""Stacks of the layers without a choice, which are mixtures of one expert."""
BESIDE = (*STACKS, *PLAIN)
"""All that lies in stacks beside the layers."""
BLOCK, LARGE_BLOCK, LEAST_BLOCK = 16, 128, 8
"""Tokens of one expert that are multiplied at a time: on a CPU, a GPU, and at least in a kernel."""
MOST_COMPARED = 2**12
"""Choices up to which all pairs of them are compared; more are sorted."""
FEW_ROWS = 256
"""Up to so many rows a GPU is as fast at multiplying them by all experts as at reading these."""


@dataclasses.dataclass(frozen=True)
class Limits:
    """Of the numbers within an expert, as gpt-oss has them in the place of SiLU's plain product.

    They become `(up + 1) * gate * sigmoid(alpha * gate)`, after gates are cut off above `most`, and
    the others above `most` and below `-most`.
    """

    most: float
    alpha: float


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """The experts of one layer, in the stacks of all layers.

    Attributes:
      gate, up: `[L, E, F, D]`.
      down: `[L, E, D, F]`.
      number: int32 scalar, the layer's.
      gate_bias, up_bias: `[L, E, F]`, or None.
      down_bias: `[L, E, D]`, or None.
      limits: of what is within; None is SiLU's plain product (static).
      target: what is compiled for; on its mesh the width `F` of every expert is split (static).
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array
    number: jax.Array
    gate_bias: jax.Array | None = None
    up_bias: jax.Array | None = None
    down_bias: jax.Array | None = None
    limits: Limits | None = dataclasses.field(default=None, metadata={"static": True})
    target: Target | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def of_layer(
        cls,
        config: ModelConfig,
        weights: Mapping[str, Any],
        number: jax.Array,
        target: Target | None = None,
    ) -> Experts:
        """Those of a layer, in the weights of a model."""
        own: dict[str, Any] = {name.removeprefix("expert_"): weights.get(name) for name in STACKS}
        most = config.swiglu_limit
        limits = None if most is None else Limits(most, config.swiglu_alpha)
        return cls(**own, number=number, limits=limits, target=target)

    @classmethod
    def of_plain_layer(
        cls, weights: Mapping[str, Any], number: jax.Array, target: Target | None = None
    ) -> Experts:
        """The one perceptron of a layer without a choice, by its number among such layers."""
        gate, up, down = (weights[name] for name in PLAIN)
        return cls(gate, up, down, number, target=target)

    def weights(self, expert: jax.Array) -> list[jax.Array]:
        """Gate, up and down of one expert, of this layer."""
        at = self.number, expert, 0, 0
        return [
            jax.lax.dynamic_slice(stack, at, (1, 1, *stack.shape[2:]))[0, 0]
            for stack in (self.gate, self.up, self.down)
        ]

    def within(self, gate: jax.Array, up: jax.Array, expert: jax.Array) -> jax.Array:
        """What goes through `down`: of float32 products `[..., F]` with gate and up, of one expert.

        Or of several, whose numbers `[...]` are given.
        """
        if self.gate_bias is not None and self.up_bias is not None:
            gate, up = gate + self._of(self.gate_bias, expert), up + self._of(self.up_bias, expert)
        if self.limits is None:
            return jax.nn.silu(gate) * up
        gate = jnp.minimum(gate, self.limits.most)
        up = jnp.clip(up, -self.limits.most, self.limits.most)
        return (up + 1) * gate * jax.nn.sigmoid(self.limits.alpha * gate)

    def added(self, shares: jax.Array, chosen: jax.Array) -> jax.Array | None:
        """The biases of `down` of the chosen experts, each by its share: float32 `[R, D]`."""
        if self.down_bias is None:
            return None
        # No product of matrices, which accelerators would round.
        return jnp.sum(shares[..., None] * self._of(self.down_bias, chosen), axis=1)

    def _of(self, biases: jax.Array, expert: jax.Array) -> jax.Array:
        return biases[self.number, expert].astype(jnp.float32)


def share_read(experts: int, per_token: int, rows: int) -> float:
    """Of all experts of a layer, the share that a step reads where no two rows choose the same."""
    return min(1.0, rows * per_token / experts) if experts else 1.0


def route(logits: jax.Array, per_token: int, normalise: bool) -> tuple[jax.Array, jax.Array]:
    """Which experts a token goes through, and how much each counts.

    Of float32 logits `[R, E]`: the `per_token` largest shares of their softmax, float32 `[R, k]`,
    of a sum of one if they are to be normalised, and the numbers of their experts, int32 `[R, k]`.
    """
    if normalise:
        # The same shares, since a softmax goes by differences alone.
        largest, chosen = jax.lax.top_k(logits, per_token)
        return jax.nn.softmax(largest, axis=-1), chosen
    shares, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), per_token)
    return shares, chosen


def mixture(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """Sum of what the chosen experts make of x `[R, D]`, each by its share → `[R, D]`.

    Up to as many choices as there are experts, one after the other is read. Beyond, tokens are
    brought together by their experts, so that each expert is read once.
    """
    out = _mix(x, shares, chosen, experts)
    if (biases := experts.added(shares, chosen)) is not None:
        out = out.astype(jnp.float32) + biases
    return out.astype(x.dtype)


def _mix(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """The same without the biases of `down`, of which devices that share an expert add none."""
    target = experts.target or Target("")
    mesh, heads, rows = target.mesh, target.heads, target.rows
    if mesh is None or mesh.size == 1 or experts.gate.shape[2] % target.head_ways:
        return _mix_here(x, shares, chosen, experts)
    split, heads = mesh.shape.get(rows, 1), heads if target.head_ways > 1 else ""
    by_row = PartitionSpec(rows if x.shape[0] % split == 0 else None)
    width = heads or None
    outward, inward = PartitionSpec(None, None, width), PartitionSpec(None, None, None, width)
    specs: Any = {"gate": outward, "up": outward, "down": inward, "number": PartitionSpec()}
    if experts.gate_bias is not None:
        specs |= {"gate_bias": outward, "up_bias": outward}
    experts = dataclasses.replace(experts, down_bias=None)
    by_width = dataclasses.replace(experts, **specs)

    def on_each(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
        # A device computes its own part: what it calls has no mesh to split anything over.
        own = dataclasses.replace(experts, target=dataclasses.replace(target, mesh=None))
        part = _mix_here(x, shares, chosen, own).astype(x.dtype)
        summed: jax.Array = jax.lax.psum(part, heads) if heads else part
        return summed

    summed: jax.Array = jax.shard_map(
        on_each,
        mesh=mesh,
        in_specs=(by_row, by_row, by_row, by_width),
        out_specs=by_row,
        check_vma=False,
    )(x, shares, chosen, experts)
    return summed


def _mix_here(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    operands = x, shares, chosen, experts
    if experts.target is not None and _has_kernel(experts.target, x, experts):
        return _by_kernel(*operands)
    if chosen.size <= experts.gate.shape[1]:
        # In a branch, since XLA on CPUs takes 16-bit floats from a float32 copy of the stack, which
        # it would make for all layers before it enters their loop.
        found: jax.Array = jax.lax.platform_dependent(
            *operands, default=_one_by_one, cpu=partial(_one_by_one, in_a_branch=True)
        )
        return found
    on_gpu = _by_all if x.shape[0] <= FEW_ROWS else partial(_in_blocks, size=LARGE_BLOCK)
    ways = {"default": _grouped, "cpu": _in_blocks, "cuda": on_gpu}
    out: jax.Array = jax.lax.platform_dependent(*operands, **ways)
    return out


def _one_by_one(
    x: jax.Array,
    shares: jax.Array,
    chosen: jax.Array,
    experts: Experts,
    in_a_branch: bool = False,
) -> jax.Array:
    """A product at a time: nothing is read but the experts that are chosen."""

    def of_choice(row: jax.Array, expert: jax.Array) -> jax.Array:
        one = jax.lax.dynamic_index_in_dim(x, row, keepdims=False)
        within = partial(experts.within, expert=expert)
        y = _perceptron(_row_product, one, within, *experts.weights(expert))
        return y.astype(jnp.float32)

    def nothing(row: jax.Array, expert: jax.Array) -> jax.Array:
        return jnp.zeros(x.shape[1:], jnp.float32)

    def add(out: jax.Array, choice: Any) -> tuple[jax.Array, None]:
        row, expert, share = choice
        if in_a_branch:
            y = jax.lax.cond(share != 0, of_choice, nothing, row, expert)
        else:
            y = of_choice(row, expert)
        return out.at[row].add(share * y), None

    rows = jnp.repeat(jnp.arange(x.shape[0], dtype=jnp.int32), chosen.shape[1])
    choices = rows, chosen.reshape(-1), shares.reshape(-1)
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), choices)[0]


def _perceptron(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    within: Callable[[jax.Array, jax.Array], jax.Array],
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
) -> jax.Array:
    inner = within(product(x, gate), product(x, up))
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

    within = partial(experts.within, expert=expert)
    y = _perceptron(product, x[row], within, experts.gate, experts.up, experts.down)
    return jnp.zeros(x.shape, jnp.float32).at[row].add(shares.reshape(-1)[order][:, None] * y)


def _has_kernel(target: Target, x: jax.Array, experts: Experts) -> bool:
    F, D = experts.gate.shape[2:]
    return reads_in_place(target, LEAST_BLOCK, x.dtype, [D, F])


def _by_kernel(x: jax.Array, shares: jax.Array, chosen: jax.Array, experts: Experts) -> jax.Array:
    """Products of blocks of tokens of one expert, all at once."""
    R, k = chosen.shape
    size = block_rows(R, k, experts.gate.shape[1])
    blocks = _in_order(chosen, experts.gate.shape[1], size)
    product = partial(
        grouped_product, owner=blocks.owner, layer=experts.number, target=experts.target
    )
    # The rows that fill up a block are any, and nobody asks for what comes of them.
    found = product(x.at[blocks.rows].get(mode="clip"), [experts.gate, experts.up])
    gate, up = (each.astype(jnp.float32) for each in found)
    inner = experts.within(gate, up, blocks.owner[:, None])
    (y,) = product(inner.astype(x.dtype), [experts.down])
    own = y.reshape(-1, y.shape[-1])[blocks.place].reshape(R, k, -1)
    return jnp.sum(shares[..., None] * own.astype(jnp.float32), axis=1)


def block_rows(rows: int, per_token: int, experts: int) -> int:
    """Tokens in a block of the kernel: three times as many as an expert has on an average.

    The weights of an expert with more of them are read again, by then out of the cache. No expert
    has more than all rows.
    """
    wanted = min(rows, -(-3 * rows * per_token // experts), LARGE_BLOCK)
    return -(-wanted // LEAST_BLOCK) * LEAST_BLOCK


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

    each = jnp.arange(gate.shape[0])[:, None]
    inner = experts.within(product("rd,efd->erf", x, gate), product("rd,efd->erf", x, up), each)
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
    E = experts.gate.shape[1]
    blocks = _in_order(chosen, E, size)
    share = jnp.zeros(blocks.rows.size, jnp.float32).at[blocks.place].set(shares.reshape(-1))
    padded = jnp.concatenate([x, jnp.zeros((1, x.shape[1]), x.dtype)])

    def multiply(block: tuple[jax.Array, jax.Array, jax.Array], out: jax.Array) -> jax.Array:
        own, rows, share = block
        within = partial(experts.within, expert=own)
        y = _perceptron(_product, padded[rows], within, *experts.weights(own))
        return out.at[rows].add(share[:, None] * y, mode="drop")

    def add(out: jax.Array, block: Any) -> tuple[jax.Array, None]:
        return jax.lax.cond(block[0] < E, multiply, lambda _, out: out, block, out), None

    blocks_of = blocks.owner, blocks.rows, share.reshape(blocks.rows.shape)
    return jax.lax.scan(add, jnp.zeros(x.shape, jnp.float32), blocks_of)[0]


class _Blocks(NamedTuple):
    """Choices in the order of their experts, each of which begins with a block of its own."""

    owner: jax.Array  # int32 [blocks], the expert; E where there is none
    rows: jax.Array  # int32 [blocks, size], the row of each choice; R where there is none
    place: jax.Array  # int32 [R * k], where each choice is among all rows of the blocks


def _in_order(chosen: jax.Array, E: int, size: int) -> _Blocks:
    """Arranges choices `[R, k]` in blocks of `size`, enough of them for any routing.

    By comparisons, where these are few: each is one operation of a device that has many at once.
    """
    flat, count, every = chosen.reshape(-1), chosen.size, jnp.arange(E, dtype=jnp.int32)
    blocks = -(-jnp.sum(flat[:, None] == every, axis=0, dtype=jnp.int32) // size)
    # The blocks of all experts up to each one, itself included.
    last = jnp.sum(jnp.where(every[:, None] >= every, blocks, 0), axis=1, dtype=jnp.int32)
    place = (last - blocks)[flat] * size + _rank(flat, E)
    busy = min(count, E)
    most = busy + (count - busy) // size
    row = jnp.arange(count, dtype=jnp.int32) // chosen.shape[1]
    rows = jnp.full(most * size, chosen.shape[0], jnp.int32).at[place].set(row)
    owner = jnp.sum(jnp.arange(most)[:, None] >= last, axis=1, dtype=jnp.int32)
    return _Blocks(owner, rows.reshape(most, size), place)


def _rank(flat: jax.Array, E: int) -> jax.Array:
    """How many choices before each one are of the same expert, int32."""
    number = jnp.arange(flat.size, dtype=jnp.int32)
    if flat.size <= MOST_COMPARED:
        before = (flat[:, None] == flat) & (number[:, None] > number)
        return jnp.sum(before, axis=1, dtype=jnp.int32)
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sizes = jnp.bincount(flat, length=E).astype(jnp.int32)
    ranks = number - (jnp.cumsum(sizes) - sizes)[flat[order]]
    return jnp.zeros_like(flat).at[order].set(ranks)
