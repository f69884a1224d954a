"""Passes of whole texts through one layer: forwards and backwards, with what its attention saw.

Of the dense model, or as it decodes when it forgets: then each token reads what is held by then.

Attention is taken in blocks of queries, each with the keys up to its end, or as many of them as the
layer's window holds: at most half of the square, and never all of it at once. Its derivative is
written out, since the shares and `g · v` of every pair of tokens, which it needs, are also what the
losses are made of. A sink has no value: it takes its share of the softmax, and the derivative by
scores is the same with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.allotting.simulate import Seen, Sums
from raas_jax.attention import shares_of
from raas_jax.model import Layer, ends, run_layers
from raas_jax.params import Params
from raas_jax.rotation import Rotation, rotations_of

QUERIES = 512
"""Tokens of a block, about."""
_NEVER = -1e30


@jax.jit
def embed(params: Params, tokens: jax.Array) -> jax.Array:
    """Token ids `[T]` → the first layer's input `[1, T, D]`."""
    return ends(params.config, params.weights).embed(tokens)[None]


class Block(NamedTuple):
    """Queries from `first` to before `end`, and keys from `start` on: 0 but in a window's layer.

    Attributes:
      q: `[t, K, G, H]`.
      shares: of the softmax over all tokens so far, or in the window, `[K, G, t, end - start]`.
      read: the same over those that are visible.
      sink: share of the softmax that the sink takes from `shares`, `[K, G, t]`; 0 without one.
    """

    first: int
    end: int
    start: int
    q: jax.Array
    shares: jax.Array
    read: jax.Array
    sink: jax.Array


class Visible(NamedTuple):
    """What a decode that forgets can see.

    Attributes:
      held: bool `[n, K, n]`: `[i, :, j]` says whether page j can be read while page i is written.
      prompt: the number of the first tokens that are one, whole pages of `P`.
    """

    held: jax.Array
    prompt: int
    P: int


@partial(jax.jit, static_argnames=("kind", "prompt", "P"))
def forward(
    params: Params,
    x: jax.Array,
    number: jax.Array,
    held: jax.Array | None = None,
    *,
    kind: str = "full",
    prompt: int = 0,
    P: int = 1,
) -> jax.Array:
    """x `[1, T, D]` through layer `number`; for `held`, `prompt` and `P` see `Visible`.

    `kind` is the layer's own in `ModelConfig.layer_kinds`, here and in `backward_through`; `look`,
    `backward` and `pages_seen` are of layers that see everything.
    """
    visible = None if held is None else Visible(held, prompt, P)
    return _through(params, x, number, _nothing, visible=visible, kind=kind)[0]


@partial(jax.jit, static_argnames="see")
def look(
    params: Params, x: jax.Array, number: jax.Array, see: Callable[..., Any], *data: Any
) -> tuple[jax.Array, list[Any]]:
    """x `[1, T, D]` through layer `number`, and what `see(block, *data)` gives of every `Block`."""
    return _through(params, x, number, see, *data)


class Backward(NamedTuple):
    """A layer's pass backwards.

    Attributes:
      at_input: gradient at the layer's input, `[1, T, D]`.
      seen: of the tokens after the prompt.
      worth: each page's part of `g · out`, g being the gradient at what the attention gives. A
        sink has none.
    """

    at_input: jax.Array
    seen: Seen
    worth: Sums


@partial(jax.jit, static_argnames=("prompt", "P"))
def backward(
    params: Params,
    x: jax.Array,
    back: jax.Array,
    number: jax.Array,
    held: jax.Array | None = None,
    *,
    prompt: int,
    P: int,
) -> Backward:
    """From a layer's input and the gradient at its output, both `[1, T, D]`.

    `prompt`, the number of the first tokens that are one, and `T` are whole pages of `P` tokens.
    `held`, see `Visible`, says what the layer could read where that was not all; the sums are of
    attention to all in any case.
    """
    visible = None if held is None else Visible(held, prompt, P)
    pages = (x.shape[1] - prompt) // P

    def see(block: Block, at_shares: jax.Array) -> tuple[Sums, Sums]:
        worth = _by_page(block.first, block.shares * at_shares, prompt, P, pages)
        return _mass_by_page(block, prompt, P, pages), worth

    size = -(-QUERIES // P) * P
    at_input, k, v, found = _back(params, x, back, number, "full", size, see, visible)
    mass, worth = (_together(list(sums)) for sums in zip(*found, strict=True))
    k, v = (_in_pages(each, prompt, P) for each in (k, v))
    return Backward(at_input, Seen(mass, k, v), worth)


@partial(jax.jit, static_argnames="kind")
def backward_through(
    params: Params, x: jax.Array, back: jax.Array, number: jax.Array, *, kind: str
) -> jax.Array:
    """The gradient at a layer's input alone, from that at its output, both `[1, T, D]`."""
    return _back(params, x, back, number, kind, QUERIES, lambda *_: None)[0]


@partial(jax.jit, static_argnames=("prompt", "P"))
def pages_seen(params: Params, x: jax.Array, number: jax.Array, *, prompt: int, P: int) -> Seen:
    """What the tokens after the prompt would see in a layer, had all been kept there."""
    rotations = _rotations(params, x)

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, Seen]:
        q, k, v = _float32(layer.qkv(x, rotations[layer.kind]))
        pages = (x.shape[1] - prompt) // P
        blocks = _blocks(layer, q, k, -(-QUERIES // P) * P)
        mass = _together([_mass_by_page(block, prompt, P, pages) for block in blocks])
        return x, Seen(mass, _in_pages(k, prompt, P), _in_pages(v, prompt, P))

    found: Seen = _one_layer(params, body, x, number, "full")[1]
    return found


def _through(
    params: Params,
    x: jax.Array,
    number: jax.Array,
    see: Callable[..., Any],
    *data: Any,
    visible: Visible | None = None,
    kind: str = "full",
) -> tuple[jax.Array, list[Any]]:
    rotations = _rotations(params, x)

    def body(layer: Layer, x: jax.Array, _: None) -> tuple[jax.Array, list[Any]]:
        q, k, v = _float32(layer.qkv(x, rotations[layer.kind]))
        out, seen = _attend(layer, q, k, v, see, *data, visible=visible)
        return layer.finish(x, out.astype(x.dtype)), seen

    return _one_layer(params, body, x, number, kind)


def _back(
    params: Params,
    x: jax.Array,
    back: jax.Array,
    number: jax.Array,
    kind: str,
    size: int,
    see: Callable[[Block, jax.Array], Any],
    visible: Visible | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, list[Any]]:
    """The gradient at the input, k and v `[T, K, H]`, and what is seen of each block of a size.

    `see` is given the block and the gradient at its shares.
    """
    rotations = _rotations(params, x)

    def body(
        layer: Layer, back: jax.Array, _: None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array, list[Any]]]:
        qkv, pull_qkv = jax.vjp(lambda x: layer.qkv(x, rotations[layer.kind]), x)
        q, k, v = _float32(qkv)
        out = _attend(layer, q, k, v, _nothing, visible=visible)[0].astype(x.dtype)
        pull = jax.vjp(layer.finish, x, out)[1]
        residual, at_attention = pull(back)
        given = at_attention[0].astype(jnp.float32)
        at_qkv, seen = _pull_attention(layer, q, k, v, given, size, see, visible)
        (through,) = pull_qkv(tuple(each[None].astype(x.dtype) for each in at_qkv))
        return residual + through, (k, v, seen)

    at_input, found = _one_layer(params, body, back, number, kind)
    return at_input, *found


def _in_pages(x: jax.Array, prompt: int, P: int) -> jax.Array:
    """`[T, K, H]` → the pages after the prompt, `[K, n, P, H]`."""
    return jnp.swapaxes(x[prompt:], 0, 1).reshape(x.shape[1], -1, P, x.shape[-1])


def _rotations(params: Params, x: jax.Array) -> dict[str, Rotation]:
    return rotations_of(params.config, jnp.arange(x.shape[1], dtype=jnp.int32)[None])


def _float32(arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Of one row, without its axis."""
    return tuple(each[0].astype(jnp.float32) for each in arrays)


def _one_layer(
    params: Params, body: Any, carry: Any, number: jax.Array, kind: str
) -> tuple[jax.Array, Any]:
    layers = partial(run_layers, kinds=(kind,), first=number)
    carry, found = layers(params.config, params.weights, body, carry)
    return carry, jax.tree.map(lambda each: each[0], found[kind])


def _blocks(
    layer: Layer, q: jax.Array, k: jax.Array, size: int, visible: Visible | None = None
) -> Iterator[Block]:
    """A layer's attention of q `[T, N, H]` over k `[T, K, H]`."""
    (T, N, H), K = q.shape, k.shape[1]
    window = layer.sight.get("window", T)
    for first in range(0, T, size):
        start, end = max(first - window + 1, 0), min(first + size, T)
        grouped = q[first:end].reshape(end - first, K, N // K, H)
        scores = jnp.einsum("tkgh,skh->kgts", grouped * H**-0.5, k[start:end])
        distance = np.arange(first, end)[:, None] - np.arange(start, end)
        scores = jnp.where((distance >= 0) & (distance < window), scores, _NEVER)
        shares, of_sink = shares_of(scores, layer.sink)
        read = shares
        if visible is not None:
            left = jnp.where(_among(visible, first, end), shares, 0.0)
            read = left / (jnp.sum(left, axis=-1, keepdims=True) + of_sink[..., None])
        yield Block(first, end, start, grouped, shares, read, of_sink)


def _among(visible: Visible, first: int, end: int) -> jax.Array:
    """Whether tokens from `first` to before `end` can read those before `end`: `[K, 1, t, end]`."""
    page = (np.arange(end) - visible.prompt) // visible.P  # Below 0 in the prompt, which is kept.
    own = (page < 0) | (page == page[first:, None])
    held = visible.held[np.maximum(page[first:], 0)][..., np.maximum(page, 0)]
    among: jax.Array = jnp.moveaxis(held, 1, 0)[:, None] | own
    return among


def _attend(
    layer: Layer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    see: Callable[..., Any],
    *data: Any,
    visible: Visible | None = None,
) -> tuple[jax.Array, list[Any]]:
    """Output `[1, T, N, H]`, and what is seen of every block."""
    out, seen = [], []
    for block in _blocks(layer, q, k, QUERIES, visible):
        out.append(jnp.einsum("kgts,skh->tkgh", block.read, v[block.start : block.end]))
        seen.append(see(block, *data))
    return jnp.concatenate(out).reshape(1, *q.shape), seen


def _nothing(block: Block) -> None:
    """Sees nothing."""


def _pull_attention(
    layer: Layer,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    size: int,
    see: Callable[[Block, jax.Array], Any],
    visible: Visible | None,
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], list[Any]]:
    """From the gradient at the attention's output, `[T, N, H]`, those at q, k and v.

    Also what `see` gives of every block and of the gradient at its shares.
    """
    _, N, H = q.shape
    at_q, at_k, at_v, seen = [], jnp.zeros_like(k), jnp.zeros_like(v), []
    for block in _blocks(layer, q, k, size, visible):
        keys, read = slice(block.start, block.end), block.read
        given = g[block.first : block.end].reshape(block.q.shape)
        at_shares = jnp.einsum("tkgh,skh->kgts", given, v[keys])
        pulled = read * at_shares
        at_scores = (pulled - read * jnp.sum(pulled, axis=-1, keepdims=True)) * H**-0.5
        at_q.append(jnp.einsum("kgts,skh->tkgh", at_scores, k[keys]).reshape(-1, N, H))
        at_k = at_k.at[keys].add(jnp.einsum("kgts,tkgh->skh", at_scores, block.q))
        at_v = at_v.at[keys].add(jnp.einsum("kgts,tkgh->skh", read, given))
        seen.append(see(block, at_shares))
    return (jnp.concatenate(at_q), at_k, at_v), seen


def _mass_by_page(block: Block, prompt: int, P: int, pages: int) -> Sums:
    """`_by_page` of the shares; the sink's, which is never forgotten either, is with the prompt."""
    sums = _by_page(block.first, block.shares, prompt, P, pages)
    return sums._replace(always=sums.always + block.sink[..., max(prompt - block.first, 0) :])


def _by_page(first: int, x: jax.Array, prompt: int, P: int, pages: int) -> Sums:
    """Sums over the prompt, and over each of so many pages, of a block's `[K, G, t, end]`.

    Of its tokens after the prompt, if there are any; `first` is the block's own first one.
    """
    x = x[:, :, max(prompt - first, 0) :]
    later = x[..., prompt:]
    here = later.shape[-1] // P
    by_page = jnp.sum(later.reshape(*x.shape[:3], here, P), axis=-1)
    missing = ((0, 0),) * 3 + ((0, pages - here),)
    return Sums(jnp.sum(x[..., :prompt], axis=-1), jnp.pad(by_page, missing))


def _together(blocks: list[Sums]) -> Sums:
    """Of all tokens after the prompt."""
    return Sums(*(jnp.concatenate(parts, axis=2) for parts in zip(*blocks, strict=True)))
