"""Rotary position embedding: its frequencies, and the rotation of queries and keys."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from raas_jax.config import ModelConfig
from raas_jax.rope import Rope

Rotation = tuple[jax.Array, ...]
"""cos and sin of angles, and what queries grow by if they do; see `rope_rotation`."""


def frequencies(
    rope: Rope,
    head_dim: int,
    seen: jax.Array | None = None,
    total: jax.Array | None = None,
) -> jax.Array:
    """Angular frequencies of the rotated pairs, float32 `[..., R / 2]`, radians per position.

    Args:
      rope: its settings.
      head_dim: `H`, of which `R = rope.rotated(H)` are rotated.
      seen: int32 `[...]`, tokens of the text so far, by which a dynamic rope goes; None is within
        the original context.
      total: int32 `[...]`, tokens that the text will have at most, by which longrope goes.
    """
    size = rope.rotated(head_dim)
    exponent = jnp.arange(0, size, 2, dtype=jnp.float32) / size
    original = rope.original_max_position_embeddings
    if rope.kind == "dynamic" and seen is not None:
        length = jnp.maximum(seen, original).astype(jnp.float32)
        grown = rope.factor * length / original - (rope.factor - 1)
        theta = rope.theta * grown ** (size / (size - 2))
        return 1.0 / theta[..., None] ** exponent
    plain = 1.0 / rope.theta**exponent
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "longrope":
        short, long = (jnp.asarray(x, jnp.float32) for x in (rope.short_factor, rope.long_factor))
        chosen = short
        if total is not None:
            chosen = jnp.where((total > original)[..., None], long, short)
        return plain / chosen
    if rope.kind == "llama3":
        turns = original * plain / (2 * jnp.pi)
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
        return (1 - kept) * plain / rope.factor + kept * plain
    if rope.kind == "yarn":
        first, last = _blended(rope, size)
        pairs = jnp.arange(size // 2, dtype=jnp.float32)
        divided = jnp.clip((pairs - first) / (last - first), 0.0, 1.0)
        return plain / rope.factor * divided + plain * (1 - divided)
    return plain


def _blended(rope: Rope, size: int) -> tuple[float, float]:
    """The pairs between which yarn goes from plain to divided frequencies."""

    def pair_that_turns(times: float) -> float:
        wavelengths = rope.original_max_position_embeddings / (times * 2 * math.pi)
        return size * math.log(wavelengths) / (2 * math.log(rope.theta))

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, size - 1)
    return first, last + 0.001 if first == last else last


def rope_rotation(
    rope: Rope,
    head_dim: int,
    positions: jax.Array,
    *,
    seen: jax.Array | None = None,
    total: jax.Array | None = None,
) -> Rotation:
    """cos and sin of every angle, float32 `[B, T, 1, R / 2]`, times the attention factor.

    Of a rope whose queries grow, also by how much: float32 `[B, T, 1, 1]`.
    Positions are absolute, also where pages are evicted: what is kept turns as in the dense model.
    Two kinds depend on how long the text is. A dynamic rope grows with it, token by token, as in
    transformers; keys that are in the cache stay as they were turned. Longrope is chosen once for
    a text, by what it may become, so that all that is in the cache is turned alike.

    Args:
      rope: its settings.
      head_dim: `H`.
      positions: int32 `[B, T]`.
      seen: int32 `[B, 1]` or `[B, T]`, tokens of the text when these are read; None: up to the last
        of the positions.
      total: int32 `[B, 1]`, tokens that the text may come to have; None: those that are seen.
    """
    if rope.kind in ("dynamic", "longrope"):
        if seen is None:
            seen = jnp.max(positions, axis=-1, keepdims=True) + 1
        total = seen if total is None else total
        frequency = frequencies(rope, head_dim, seen, total)[..., None, :]
    else:
        frequency = frequencies(rope, head_dim)
    angle = positions.astype(jnp.float32)[..., None, None] * frequency
    turn = rope.attention_factor * jnp.cos(angle), rope.attention_factor * jnp.sin(angle)
    if not rope.query_growth:
        return turn
    times = positions // rope.original_max_position_embeddings
    growth = 1 + rope.query_growth * jnp.log1p(times.astype(jnp.float32))
    return *turn, growth[..., None, None]


def rotations_of(
    config: ModelConfig,
    positions: jax.Array,
    *,
    seen: jax.Array | None = None,
    total: jax.Array | None = None,
) -> dict[str, Rotation]:
    """`rope_rotation` for each kind of the model's layers."""

    def of(rope: Rope) -> Rotation:
        return rope_rotation(rope, config.head_dim, positions, seen=seen, total=total)

    full = of(config.rope)
    return {"full": full, "window": of(config.window_rope) if config.window_rope else full}


def rotate(x: jax.Array, rotation: Rotation) -> jax.Array:
    """Rotates the two halves of what is rotated of each head of `x [B, T, heads, H]`.

    The layout is that of Hugging Face: the first `R` numbers in two halves; the rest stays.
    """
    cos, sin = rotation[:2]
    size = 2 * cos.shape[-1]
    a, b = jnp.split(x[..., :size].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
    return turned if size == x.shape[-1] else jnp.concatenate([turned, x[..., size:]], axis=-1)
