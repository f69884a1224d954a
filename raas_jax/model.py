"""The transformer: one decoder-only network for every family of `raas_jax.families`.

Flax NNX declares every parameter once, with its shape, its initial values and its logical axes.
The layers are declared stacked (`[L, ...]`), and `run_layers` is the one loop over them. Weights
keep Hugging Face's `[out, in]` order: loading transposes nothing, and a matrix-vector product
reads them in memory order, which is what decoding on a CPU is bound by.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import Target
from raas_jax import experts
from raas_jax.attention import causal_attention
from raas_jax.config import ModelConfig
from raas_jax.experts import Experts, mixture, route
from raas_jax.products import OfLayer, OfStack, Weight, look_up, project, project_all
from raas_jax.rotation import Rotation, rotate, rotations_of

Attend = Callable[..., jax.Array]
"""Attention over a whole text, `(q, k, v, segments=) -> out`, as `causal_attention`; it is given
`window` and `sink` of a layer that has them."""
Weights = dict[str, Any]
"""Arrays of a model: `embedding`, `norm`, `head`, stacks of experts and, stacked or separate,
`layers`."""
MATRICES = ("q", "k", "v", "o", "gate", "up", "down", "router")
"""A layer's weights that are multiplied by; the others are small."""
ACTIVATE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
"""Of multilayer perceptrons, by their names in a config.json."""
INWARD = ("o", "down")
"""Those of which a mesh that splits heads and mlp width cuts what is summed over."""


@partial(jax.jit, static_argnames=("shape", "dtype"))
def _normal(key: jax.Array, divisor: Any, *, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Normal numbers over `divisor`; one program, so that no float32 array of the shape is made."""
    drawn: jax.Array = (jax.random.normal(key, shape, jnp.float32) / divisor).astype(dtype)
    return drawn


class Plain(NamedTuple):
    """A perceptron that every token goes through, in some of the layers of a model with experts.

    Attributes:
      here: bool scalar, whether this layer has it.
      only: it, as the one expert of the layer.
    """

    here: jax.Array
    only: Experts

    def perceptron(self, h: jax.Array) -> jax.Array:
        """What it makes of h `[..., D]`."""
        rows = h.reshape(-1, h.shape[-1])
        shares = jnp.ones((len(rows), 1), jnp.float32)
        found: jax.Array = mixture(rows, shares, jnp.zeros((len(rows), 1), jnp.int32), self.only)
        return found.reshape(h.shape)


class Block(nnx.Module):
    """A stack of `L` transformer layers, or one of them once `lax.scan` has sliced the stack."""

    def __init__(self, config: ModelConfig, *, dtype: Any, rngs: nnx.Rngs):
        c, L = config, config.num_hidden_layers
        D, F, H = c.hidden_size, c.intermediate_size, c.head_dim
        N, K = c.num_attention_heads, c.num_key_value_heads
        self.config = config

        def normal(
            shape: tuple[int, ...], axes: tuple[str, ...], fan_in: int
        ) -> nnx.Param[jax.Array]:
            value = _normal(rngs.params(), math.sqrt(fan_in), shape=(L, *shape), dtype=dtype)
            return nnx.Param(value, logical_axes=("layers", *axes))

        def full(
            fill: float, shape: tuple[int, ...], axes: tuple[str, ...]
        ) -> nnx.Param[jax.Array]:
            return nnx.Param(jnp.full((L, *shape), fill, dtype), logical_axes=("layers", *axes))

        one = 0.0 if c.centred_norms else 1.0
        if c.norms != "after":
            self.attention_norm = full(one, (D,), ("embed",))
        self.q = normal((N, H, D), ("heads", "head_dim", "embed"), D)
        self.k = normal((K, H, D), ("kv_heads", "head_dim", "embed"), D)
        self.v = normal((K, H, D), ("kv_heads", "head_dim", "embed"), D)
        # Flat, since a last pair of (heads, head_dim) would be laid out anew on a TPU.
        self.o = normal((D, N * H), ("embed", "joined_heads"), N * H)
        if c.qkv_bias:
            self.q_bias = full(0.0, (N, H), ("heads", "head_dim"))
            self.k_bias = full(0.0, (K, H), ("kv_heads", "head_dim"))
            self.v_bias = full(0.0, (K, H), ("kv_heads", "head_dim"))
        if c.output_bias:
            self.o_bias = full(0.0, (D,), ("embed",))
        if c.sinks:
            self.sink = full(0.0, (N,), ("heads",))
        if c.joined_qk_norm:
            self.q_norm = full(one, (N, H), ("heads", "head_dim"))
            self.k_norm = full(one, (K, H), ("kv_heads", "head_dim"))
        elif c.qk_norm:
            self.q_norm = full(one, (H,), ("head_dim",))
            self.k_norm = full(one, (H,), ("head_dim",))
        if c.norms != "after":
            self.mlp_norm = full(one, (D,), ("embed",))
        if c.norms != "before":
            self.attended_norm = full(one, (D,), ("embed",))
            self.mlp_out_norm = full(one, (D,), ("embed",))
        if c.num_experts:
            self.router = normal((c.num_experts, D), ("experts", "embed"), D)
            if c.expert_bias:
                self.router_bias = full(0.0, (c.num_experts,), ("experts",))
            return
        self.gate = normal((F, D), ("mlp", "embed"), D)
        self.up = normal((F, D), ("mlp", "embed"), D)
        self.down = normal((D, F), ("embed", "mlp"), F)
        if c.mlp_bias:
            self.gate_bias = full(0.0, (F,), ("mlp",))
            self.up_bias = full(0.0, (F,), ("mlp",))
            self.down_bias = full(0.0, (D,), ("embed",))

    def qkv(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`[B, T, D]` → rotated q `[B, T, N, H]`, rotated k and plain v `[B, T, K, H]`."""
        c = self.config
        h = x if c.norms == "after" else _norm(c, x, self.attention_norm)
        q, k, v = self._products(h, self.q, self.k, self.v)
        if c.qkv_bias:
            q, k, v = q + self.q_bias[...], k + self.k_bias[...], v + self.v_bias[...]
        if c.qk_norm or c.joined_qk_norm:
            q, k = _norm(c, q, self.q_norm), _norm(c, k, self.k_norm)
        q, k = rotate(q, rotation), rotate(k, rotation)
        for growth in rotation[2:]:
            q = q * growth.astype(q.dtype)
        if c.attention_multiplier is not None:
            # Attention divides by the root of the head dim.
            q = _times(q, c.attention_multiplier * c.head_dim**0.5)
        return q, k, v

    def finish(
        self,
        x: jax.Array,
        attended: jax.Array,
        experts: Experts | None = None,
        plain: Plain | None = None,
    ) -> jax.Array:
        """Output projection of `attended [B, T, N, H]`, the residuals and the MLP → `[B, T, D]`."""
        c = self.config
        flat = attended.reshape(*x.shape[:-1], -1)
        (out,) = self._products(flat, self.o)
        if c.output_bias:
            out = out + self.o_bias[...]
        if c.norms != "before":
            out = _norm(c, out, self.attended_norm)
        x = x + _times(out, c.residual_multiplier)
        h = x if c.norms == "after" else _norm(c, x, self.mlp_norm)
        if experts is None:
            out = self._perceptron(h)
        elif plain is None:
            out = self._mixture(h, experts)
        else:
            # A condition, since such layers are few, and follow no pattern.
            with_choice = partial(self._mixture, experts=experts)
            out = jax.lax.cond(plain.here, plain.perceptron, with_choice, h)
        if c.norms != "before":
            out = _norm(c, out, self.mlp_out_norm)
        return x + _times(out, c.residual_multiplier)

    def _perceptron(self, h: jax.Array) -> jax.Array:
        c = self.config
        gate, up = self._products(h, self.gate, self.up)
        if c.mlp_bias:
            gate, up = gate + self.gate_bias[...], up + self.up_bias[...]
        (out,) = self._products(ACTIVATE[c.hidden_act](gate) * up, self.down)
        return out + self.down_bias[...] if c.mlp_bias else out

    def _mixture(self, h: jax.Array, experts: Experts) -> jax.Array:
        c, rows = self.config, h.reshape(-1, h.shape[-1])
        (logits,) = project_all(rows, [self.router.get_value()], jnp.float32)
        if c.expert_bias:
            logits = logits + self.router_bias[...].astype(jnp.float32)
        routed = route(logits, c.num_experts_per_tok, c.norm_topk_prob)
        found: jax.Array = mixture(rows, *routed, experts).reshape(h.shape)
        return found

    def _products(self, x: jax.Array, *weights: nnx.Param[Any]) -> list[jax.Array]:
        return project_all(x, [weight.get_value() for weight in weights])


class Ends(nnx.Module):
    """What comes before and after the layers: embedding, final norm and output head."""

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        V, D = config.vocab_size, config.hidden_size
        self.config = config

        def table() -> nnx.Param[jax.Array]:
            value = _normal(rngs.params(), math.sqrt(D), shape=(V, D), dtype=dtype)
            return nnx.Param(value, logical_axes=("vocab", "embed"))

        self.embedding = table()
        one = 0.0 if config.centred_norms else 1.0
        self.norm = nnx.Param(jnp.full((D,), one, dtype), logical_axes=("embed",))
        if not config.tie_word_embeddings:
            self.head = table()

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 `[...]` → `[..., D]` in the weights' dtype."""
        c, factor = self.config, self.config.embedding_multiplier
        if c.scaled_embeddings:
            # Rounded before it multiplies: the root of 640 is 25.25 in bfloat16.
            factor *= float(np.asarray(c.hidden_size**0.5, self.embedding[...].dtype))
        return _times(look_up(self.embedding[...], tokens), factor)

    def logits(self, x: jax.Array, target: Target | None = None) -> jax.Array:
        """Hidden states `[..., D]` → float32 logits `[..., V]`; target as of `run_layers`."""
        head = self.embedding if self.config.tie_word_embeddings else self.head
        h = _norm(self.config, x, self.norm)
        weight: Weight = head[...]
        if in_place := _in_place(self.config, target):
            weight = OfStack(head[...][None], jnp.int32(0), in_place)
        logits = project(h, weight, dtype=jnp.float32)
        if self.config.logits_scaling != 1:
            logits = logits / self.config.logits_scaling
        if cap := self.config.final_logit_softcapping:
            logits = cap * jnp.tanh(logits / cap)
        return logits


class Transformer(Ends):
    """The whole model, which declares every parameter: `Ends` and `L` stacked layers.

    Only its structure is used: weights are kept as nested dictionaries, and run by `ends` and
    `run_layers`.
    """

    def __init__(self, config: ModelConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        super().__init__(config, dtype=dtype, rngs=rngs)
        self.layers = Block(config, dtype=dtype, rngs=rngs)
        if not config.num_experts:
            return
        shape = len(config.expert_layers), config.num_experts

        def stacks(count: int, each: int, F: int) -> list[nnx.Param[jax.Array]]:
            D = config.hidden_size
            outward, inward = ((F, D), ("mlp", "embed")), ((D, F), ("embed", "mlp"))
            found = []
            for size, axes in (outward, outward, inward):
                whole = count, each, *size
                value = _normal(rngs.params(), math.sqrt(size[1]), shape=whole, dtype=dtype)
                found.append(nnx.Param(value, logical_axes=("layers", "experts", *axes)))
            return found

        # Beside the layers, and always in stacks: of a layer only what is chosen is read.
        D, F = config.hidden_size, config.moe_intermediate_size
        self.expert_gate, self.expert_up, self.expert_down = stacks(*shape, F)
        if plain := len(config.plain_layers):
            own = stacks(plain, 1, config.intermediate_size)
            self.plain_gate, self.plain_up, self.plain_down = own
        if config.expert_bias:

            def zeros(size: int, axis: str) -> nnx.Param[jax.Array]:
                value = jnp.zeros((*shape, size), dtype)
                return nnx.Param(value, logical_axes=("layers", "experts", axis))

            self.expert_gate_bias, self.expert_up_bias = zeros(F, "mlp"), zeros(F, "mlp")
            self.expert_down_bias = zeros(D, "embed")


@functools.cache
def _abstract(kind: Any, config: ModelConfig, dtype: str) -> tuple[Any, Any]:
    """Structure and `ShapeDtypeStruct`s of a module; nothing is allocated."""
    make = partial(kind, config, dtype=jnp.dtype(dtype))
    return nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))


def abstract_weights(config: ModelConfig, dtype: str) -> Weights:
    """Shape and dtype of every array of the model, its layers stacked; nothing is allocated."""
    return _pure(_abstract(Transformer, config, dtype)[1])


def init_weights(config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32) -> Weights:
    """Random weights, their layers stacked, from a typed key.

    Each array is drawn by a program of its own, in `dtype`: no other memory of its size is taken.
    """
    model = Transformer(config, dtype=dtype, rngs=nnx.Rngs(params=key))
    return _pure(nnx.split(model)[1])


def logical_axes(config: ModelConfig) -> Weights:
    """The tree of `abstract_weights`, with each array replaced by the names of its axes."""

    def names(variable: Any) -> Any:
        return variable.get_metadata()["logical_axes"]

    def is_variable(leaf: Any) -> bool:
        return isinstance(leaf, nnx.Variable)

    state = _abstract(Transformer, config, "float32")[1]
    return _pure(jax.tree.map(names, state, is_leaf=is_variable))


def _pure(state: Any) -> Weights:
    found: Weights = nnx.to_pure_dict(state)
    return found


def ends(config: ModelConfig, weights: Weights) -> Ends:
    """The module over plain arrays; free, also inside a jit."""
    graph, _ = _abstract(Ends, config, weights["embedding"].dtype.name)
    others = {"layers", *experts.BESIDE}
    module: Ends = nnx.merge(graph, {k: v for k, v in weights.items() if k not in others})
    return module


def separate(weights: Weights, *, consume: bool = False) -> Weights:
    """The weights with a dictionary of arrays for each layer, which no product has to copy.

    With `consume`, each stack is taken out of `weights` as it is cut, so that no more than one of
    them is in memory twice.
    """
    layers = weights["layers"]
    if isinstance(layers, tuple):
        return weights
    parts: list[Weights] = [{} for _ in range(layers["q"].shape[0])]
    for name in list(layers):
        stack = layers.pop(name) if consume else layers[name]
        for number, part in enumerate(parts):
            part[name] = stack[number]
    return {**weights, "layers": tuple(parts)}


def stacked(weights: Weights) -> Weights:
    """The inverse of `separate`: every array is `[L, ...]`, which `run_layers` scans."""
    layers = weights["layers"]
    return {**weights, "layers": _stack(layers)} if isinstance(layers, tuple) else weights


def _slice(tree: Any, index: int | slice) -> Any:
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _stack(trees: Sequence[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


class Layer(NamedTuple):
    """One layer, as `run_layers` gives it to a body.

    Attributes:
      block: its weights, ready to run.
      number: int32 scalar, its place in the model.
      kind: see `run_layers`.
      place: int32 scalar, its place among the layers of its kind.
      experts: in the place of its multilayer perceptron, or None.
      plain: in their place in some layers, of a model that has such.
    """

    block: Block
    number: jax.Array
    kind: Any
    place: jax.Array
    experts: Experts | None = None
    plain: Plain | None = None

    @property
    def sink(self) -> jax.Array | None:
        """Logit of each query head that joins its softmax, `[N]`; None without."""
        return self.block.sink[...] if self.block.config.sinks else None

    @property
    def sight(self) -> dict[str, Any]:
        """What attention over a whole text is told, of a layer of a kind of the config."""
        window = {"window": self.block.config.window} if self.kind == "window" else {}
        return window if self.sink is None else {**window, "sink": self.sink}

    def qkv(self, x: jax.Array, rotation: Rotation) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`Block.qkv`, rotated or not as this layer is."""
        if plain := self.block.config.unrotated_layers:
            turns = jnp.all(self.number != jnp.asarray(plain))
            cos, sin = rotation[:2]
            rotation = jnp.where(turns, cos, 1.0), jnp.where(turns, sin, 0.0)
        return self.block.qkv(x, rotation)

    def finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        """`Block.finish`, through this layer's experts where it has any."""
        return self.block.finish(x, attended, self.experts, self.plain)


Body = Callable[[Layer, Any, Any], tuple[Any, Any]]
"""What a layer does: (layer, carry, x) → carry, y; x and y are its own, as in `jax.lax.scan`."""


class Stage(NamedTuple):
    """Consecutive layers: a pattern of kinds, repeated.

    Attributes:
      first: how many layers come before.
      pattern: the kind of each layer in turn.
      repeats: how often.
      earlier: how many of the layers before are of each of its kinds.
    """

    first: int
    pattern: tuple[Any, ...]
    repeats: int
    earlier: Mapping[Any, int]

    @property
    def layers(self) -> int:
        """How many it has."""
        return len(self.pattern) * self.repeats

    def part(self, kind: Any) -> slice:
        """Its layers of a kind, among all of the kind."""
        start = self.earlier[kind]
        return slice(start, start + self.pattern.count(kind) * self.repeats)


def stages(kinds: Sequence[Any]) -> list[Stage]:
    """Cuts kinds of layers into stages: at each place, the pattern that goes on for longest."""
    found: list[Stage] = []
    first = 0
    while first < len(kinds):
        left = tuple(kinds[first:])
        best, repeats = left[:1], 1
        for size in range(1, len(left) // 2 + 1):
            pattern, times = left[:size], 1
            while left[size * times : size * (times + 1)] == pattern:
                times += 1
            if times > 1 and size * times > len(best) * repeats:
                best, repeats = pattern, times
        earlier = {kind: kinds[:first].count(kind) for kind in best}
        found.append(Stage(first, best, repeats, earlier))
        first += found[-1].layers
    return found


def run_layers(
    config: ModelConfig,
    weights: Weights,
    body: Body,
    carry: Any,
    xs: Mapping[Any, Any] | None = None,
    *,
    kinds: Sequence[Any] | None = None,
    first: Any = 0,
    by_number: bool = False,
    target: Target | None = None,
) -> tuple[Any, dict[Any, Any]]:
    """Runs a body through layers in their order: the only loop over them.

    It scans the repeats of a pattern, so that compile time hardly grows with depth.

    Args:
      config: shape of the model.
      weights: of the whole model.
      body: what each layer does.
      carry: what goes from layer to layer.
      xs: for a kind, arrays whose leading axis counts its layers; for others, None.
      kinds: of each layer that is run, static; `ModelConfig.layer_kinds` by default.
      first: number of the first layer to run; may be traced.
      by_number: read each layer out of the stack, as decoding does; a part, and layers that are
        separate, are always read so.
      target: what is compiled for; None is the default backend, with no mesh. Where layers are read
        by number, products have what is best there for few rows.

    Returns:
      The last carry, and for each kind what its layers gave, stacked.
    """
    parts = stages(config.layer_kinds if kinds is None else kinds)
    separate = isinstance(weights["layers"], tuple)
    # A slice of the stack would be a copy of it, so a part of it is read by number.
    whole = len(parts) == 1 and parts[0].layers == config.num_hidden_layers
    in_place = _in_place(config, target) if by_number and not separate else None
    stack = None if by_number or separate or not whole else weights["layers"]
    layer_of = partial(_layer_of, config, weights, target, in_place)
    given: dict[Any, list[Any]] = {}
    for stage in parts:
        of_stage = {kind: _slice((xs or {}).get(kind), stage.part(kind)) for kind in stage.earlier}
        carry, ys = _run_stage(stage, layer_of, body, carry, of_stage, stack, first + stage.first)
        for kind, own in ys.items():
            given.setdefault(kind, []).append(own)
    return carry, {kind: _join(own) for kind, own in given.items()}


def _run_stage(
    stage: Stage,
    layer_of: Callable[..., Layer],
    body: Body,
    carry: Any,
    xs: dict[Any, Any],
    stack: Any,
    first: Any,
) -> tuple[Any, dict[Any, Any]]:
    """The layers from number `first` on; of `xs`, and what they give, those of the stage."""
    size, counts = len(stage.pattern), {kind: stage.pattern.count(kind) for kind in stage.earlier}

    def fold(tree: Any, count: int) -> Any:
        """`[repeats * count, ...]` → `[repeats, count, ...]`."""
        if count == 1:
            return tree
        return jax.tree.map(lambda x: x.reshape(stage.repeats, count, *x.shape[1:]), tree)

    def repeat(counted: tuple[jax.Array, Any], scanned: Any) -> tuple[Any, dict[Any, Any]]:
        (turn, carry), (arrays, xs) = counted, scanned
        ys: dict[Any, list[Any]] = {kind: [] for kind in counts}
        for at, kind in enumerate(stage.pattern):
            done = len(ys[kind])
            number = turn * size + first + at
            place = turn * counts[kind] + stage.earlier[kind] + done
            layer = layer_of(number, kind, place, arrays if size == 1 else _slice(arrays, at))
            x = xs[kind] if counts[kind] == 1 else _slice(xs[kind], done)
            carry, y = body(layer, carry, x)
            ys[kind].append(y)
        return (turn + 1, carry), {k: _stack(y) if len(y) > 1 else y[0] for k, y in ys.items()}

    folded = fold(stack, size), {kind: fold(xs[kind], count) for kind, count in counts.items()}
    # Counted, since what is scanned would be sliced out in every layer.
    start = jnp.int32(0), carry
    (_, carry), ys = jax.lax.scan(repeat, start, folded, length=stage.repeats)

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(-1, *x.shape[2:])

    return carry, {k: jax.tree.map(flat, y) if counts[k] > 1 else y for k, y in ys.items()}


def _join(parts: list[Any]) -> Any:
    if len(parts) == 1:
        return parts[0]
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _layer_of(
    config: ModelConfig,
    weights: Weights,
    target: Target | None,
    in_place: Target | None,
    number: jax.Array,
    kind: Any,
    place: jax.Array,
    arrays: Any,
) -> Layer:
    """A layer of these arrays, or of those that are found by its number."""
    graph, _ = _abstract(Block, config, weights["embedding"].dtype.name)
    layers = weights["layers"]
    if arrays is None:
        arrays = _layer_by_number(layers, number)
    if in_place:
        arrays |= _matrices_in_place(layers, number, in_place)
    own = plain = None
    if config.num_experts:
        among = number
        if config.plain_layers:
            is_plain = np.isin(range(config.num_hidden_layers), config.plain_layers)
            here = jnp.asarray(is_plain)[number]
            earlier = jnp.asarray(np.cumsum(is_plain) - is_plain, jnp.int32)[number]
            among = number - earlier
            plain = Plain(here, Experts.of_plain_layer(weights, earlier, target))
        own = Experts.of_layer(config, weights, among, target)
    return Layer(nnx.merge(graph, arrays), number, kind, place, own, plain)


def _in_place(config: ModelConfig, target: Target | None) -> Target | None:
    """The target if its products are given whole stacks: a GPU, whose mesh cuts each weight."""
    if target is None or target.platform != "gpu":
        return None
    sizes = config.num_key_value_heads, config.intermediate_size, config.vocab_size
    return None if any(size % target.head_ways for size in sizes) else target


def _matrices_in_place(layers: Any, number: jax.Array, target: Target) -> dict[str, Any]:
    return {
        name: OfStack(layers[name], number, target, name in INWARD)
        for name in MATRICES
        if name in layers
    }


def _layer_by_number(layers: Any, number: jax.Array) -> dict[str, Any]:
    """The weights of one layer, of a stack or of separate ones."""
    if not isinstance(layers, tuple):
        at = partial(jax.lax.dynamic_index_in_dim, index=number, keepdims=False)
        arrays: dict[str, Any] = jax.tree.map(at, layers)
        return arrays
    small = [{name: leaf for name, leaf in own.items() if name not in MATRICES} for own in layers]
    arrays = jax.lax.switch(number, [partial(dict, own) for own in small])
    return arrays | {
        name: OfLayer(tuple(own[name] for own in layers), number)
        for name in MATRICES
        if name in layers[0]
    }


def hidden_states(
    config: ModelConfig,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    lengths: jax.Array | None = None,
    attend: Attend = causal_attention,
) -> jax.Array:
    """The causal forward pass up to the last layer's output `[B, T, D]`, before `Ends.logits`.

    Tokens, their positions (0..T-1 where not given) and segments (a token attends only within its
    own; None is one segment) are int32 `[B, T]`; `lengths`, int32 `[B]`, are those of padded texts,
    where they are known; `attend` is the attention of every layer.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    seen = None if lengths is None else lengths[:, None]
    rotations = rotations_of(config, positions, seen=seen)

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        q, k, v = layer.qkv(x, rotations[layer.kind])
        attended = attend(q, k, v, segments=segments, **layer.sight)
        return layer.finish(x, attended), None

    x, _ = run_layers(config, weights, body, ends(config, weights).embed(tokens))
    hidden: jax.Array = x
    return hidden


def forward(
    config: ModelConfig,
    weights: Weights,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segments: jax.Array | None = None,
    *,
    attend: Attend = causal_attention,
) -> jax.Array:
    """float32 logits `[B, T, V]` of the causal forward pass; arguments as in `hidden_states`."""
    x = hidden_states(config, weights, tokens, positions, segments, attend=attend)
    return ends(config, weights).logits(x)


def _times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def _norm(config: ModelConfig, x: jax.Array, weight: nnx.Param[Any]) -> jax.Array:
    return rms_norm(x, weight[...], config.rms_norm_eps, centred=config.centred_norms)


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, *, centred: bool = False) -> jax.Array:
    """Root-mean-square norm over the axes of `weight`, the last ones of `x`.

    It multiplies by the weight, or by one more where weights are centred at zero. Computed in
    float32, returned in x's dtype.
    """
    h, scale = x.astype(jnp.float32), weight.astype(jnp.float32)
    axes = tuple(range(-weight.ndim, 0))
    h = h * jax.lax.rsqrt(jnp.mean(h * h, axis=axes, keepdims=True) + eps)
    return ((1 + scale if centred else scale) * h).astype(x.dtype)
