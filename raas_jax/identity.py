"""Fingerprints: what tells one set of arrays from another, for all that is saved and goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.params import Params

_ODD = np.asarray([0x9E3779B1, 0xC2B2AE3D], np.uint32)


def of_model(params: Params) -> str:
    """Digest of a model's shape and of every bit of its weights: 32 hexadecimal digits.

    The same whether layers are stacked or separate, and on whatever devices the weights lie. They
    are read once, there; next to nothing comes to the host.
    """
    layers = params.weights["layers"]
    if isinstance(layers, tuple):
        each = jax.device_get([_sums(layer) for layer in layers])
        by_layer = {name: [sums[name].tolist() for sums in each] for name in each[0]}
    else:
        by_layer = {name: sums.tolist() for name, sums in jax.device_get(_sums_of(layers)).items()}
    ends = {name: leaf for name, leaf in params.weights.items() if name != "layers"}
    found = {name: sums.tolist() for name, sums in jax.device_get(_sums(ends)).items()}
    sums = sorted(found.items()), sorted(by_layer.items())
    return _digest(_set(params.config), params.dtype, *sums)


def likeness(params: Params) -> str:
    """Digest by which a model is known again in any dtype, whose bits `of_model` tells apart.

    Of its shape, and of a few of its numbers, rounded to bfloat16: all vectors of a layer (norms
    and biases), the first row of every matrix, and the embeddings of the first tokens. "" where
    there are no numbers, as inside a jit.
    """
    leaves = jax.tree.leaves(params.weights)
    known = [isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) for x in leaves]
    if not known or not all(known):
        return ""
    layers = params.weights["layers"]
    if isinstance(layers, tuple):
        by_layer = [{name: _first_row(leaf, 0) for name, leaf in own.items()} for own in layers]
        sample = {name: np.stack([own[name] for own in by_layer]) for name in layers[0]}
    else:
        sample = {name: _first_row(leaf, 1) for name, leaf in layers.items()}
    ends = {name: leaf for name, leaf in params.weights.items() if name != "layers"}
    sample |= {name: _first_row(leaf, 0) for name, leaf in ends.items()}
    shape = _set(dataclasses.replace(params.config, dtype="float32"))
    said = hashlib.blake2b(repr(shape).encode(), digest_size=8)
    for name, numbers in sorted(sample.items()):
        said.update(name.encode())
        said.update(np.asarray(numbers).astype(jnp.bfloat16).tobytes())
    return said.hexdigest()


def _first_row(leaf: jax.Array, before: int) -> np.ndarray:
    """The numbers along the last axis, at 0 of all others but the first `before`."""
    return np.asarray(leaf[(slice(None),) * before + (0,) * (leaf.ndim - 1 - before)])


def of_arrays(tree: Any) -> str:
    """Digest of the shape, dtype, place and every bit of the arrays in a tree."""
    leaves = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(tree)]
    sums = [each.tolist() for each in jax.device_get(jax.tree.leaves(_sums(tree)))]
    return _digest(jax.tree.structure(tree), leaves, sums)


def of_json(values: Any) -> str:
    """Digest of JSON values, whatever the order of their names."""
    return _digest(_ordered(values))


def _digest(*said: object) -> str:
    return hashlib.blake2b("\n".join(map(str, said)).encode(), digest_size=16).hexdigest()


def _set(config: Any) -> list[tuple[str, str]]:
    """Fields that differ from their defaults, so that a field to come changes no digest."""
    fields = [(field, getattr(config, field.name)) for field in dataclasses.fields(config)]
    return [(field.name, repr(value)) for field, value in fields if value != field.default]


def _ordered(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((name, _ordered(each)) for name, each in value.items())
    return [_ordered(each) for each in value] if isinstance(value, list) else value


@jax.jit
def _sums(tree: Any) -> Any:
    return jax.tree.map(_sum, tree)


@jax.jit
def _sums_of(stacks: Any) -> Any:
    """The same of every layer of stacks `[L, ...]`: `[L, 2]`."""
    return jax.tree.map(jax.vmap(_sum), stacks)


def _sum(x: jax.Array) -> jax.Array:
    """Two sums, uint32 `[2]`, of hashes of each element's bits and place; in any order the same."""
    if x.dtype == bool:
        x = x.astype(jnp.uint8)
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * min(4, x.dtype.itemsize)}")
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        stride = np.uint32(math.prod(bits.shape[axis + 1 :]) % 2**32)
        place = place + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * stride
    bits = bits.astype(jnp.uint32)
    hashes = [_mixed(bits * odd ^ _mixed(place + odd)) for odd in _ODD]
    return jnp.stack([jnp.sum(each, dtype=jnp.uint32) for each in hashes])


def _mixed(h: jax.Array) -> jax.Array:
    """Spreads every bit over the whole word."""
    h = (h ^ h >> 16) * np.uint32(0x7FEB352D)
    h = (h ^ h >> 15) * np.uint32(0x846CA68B)
    return h ^ h >> 16
