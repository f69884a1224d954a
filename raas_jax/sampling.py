"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, per row.

All settings are arrays, so that changing them compiles nothing anew; what a batch does not use is
skipped at run time by `lax.cond`. Randomness: one typed key per row, folded with the index of the
token, so a row's tokens do not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks

_INT32 = np.iinfo(np.int32)
_TINY = float(np.finfo(np.float32).tiny)
_COLDEST, _HOTTEST = 1e-6, 1e30  # Where logits divided by a temperature stay finite.
SEEDS = (-(2**63), 2**63 - 1)
"""The least and the largest seed."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 is greedy; otherwise logits are divided by it.
      top_k: keep the k likeliest tokens; 0 keeps all.
      top_p: keep the likeliest tokens that together reach this probability, in (0, 1].
      min_p: keep tokens at least this likely relative to the likeliest, in [0, 1).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        numbers = {
            "temperature": ("a finite number from 0 (greedy) to 1e30", 0.0, _HOTTEST),
            "top_p": ("in (0, 1] (1: all tokens)", _TINY, 1.0),
            "min_p": ("in [0, 1) (0: all tokens)", 0.0, math.nextafter(1.0, 0.0)),
        }
        for name, (wanted, least, most) in numbers.items():
            object.__setattr__(
                self, name, checks.real(name, getattr(self, name), wanted, least, most)
            )
        object.__setattr__(self, "top_k", checks.integer("top_k", self.top_k, 0))


def log_probability(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of logits float32 `[..., V]`, the log-probability of tokens int32 `[...]`."""
    chosen = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampler:
    """`Sampling` of every row as arrays `[B]`, with a typed key `[B]` each."""

    temperature: jax.Array
    top_k: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    keys: Any

    @classmethod
    def create(cls, rows: Sequence[Sampling], keys: jax.Array | None) -> Sampler:
        """One row per entry, on the host; keys: typed `[B]`, or None where they come later."""

        def column(name: str, dtype: Any) -> Any:
            return np.asarray([getattr(row, name) for row in rows], dtype)

        numbers = {name: column(name, np.float32) for name in ("temperature", "top_p", "min_p")}
        return cls(top_k=column("top_k", np.int32), keys=keys, **numbers)

    def __call__(self, logits: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Draws one token per row.

        Args:
          logits: float32 `[B, V]`.
          index: int32 `[B]`, number of the token within its row's answer; no two draws of a row
            may share one.

        Returns:
          Token ids int32 `[B]`, and their log-probabilities float32 `[B]` under the model itself:
          at temperature 1 and before the filters.
        """
        greedy = _first_of_the_most(logits)
        tokens = jax.lax.cond(
            jnp.any(self.temperature > 0), lambda: self._draw(logits, index, greedy), lambda: greedy
        )
        return tokens, log_probability(logits, tokens)

    def _draw(self, logits: jax.Array, index: jax.Array, greedy: jax.Array) -> jax.Array:
        warm = self.temperature > 0
        scaled = logits / jnp.where(warm, jnp.maximum(self.temperature, _COLDEST), 1.0)[:, None]
        filters = (self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0)
        scaled = jax.lax.cond(jnp.any(filters & warm), lambda: self._filter(scaled), lambda: scaled)
        keys = jax.vmap(jax.random.fold_in)(self.keys, index)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        drawn = _first_of_the_most(scaled + noise)
        return jnp.where(warm, drawn, greedy)

    def _filter(self, scaled: jax.Array) -> jax.Array:
        """Sets what top-k, top-p or min-p exclude to -inf; the likeliest token always stays."""
        rank = _ordered(scaled)
        # Each filter sees what the ones before it left, as in Hugging Face's order.
        most = jnp.where(self.top_k > 0, self.top_k, scaled.shape[-1])
        keep = rank >= _top_k_bound(rank, most)
        probability = jax.nn.softmax(jnp.where(keep, scaled, -jnp.inf), axis=-1)
        highest = jnp.max(rank, axis=-1, keepdims=True)
        bound = jnp.minimum(_top_p_bound(rank, probability, self.top_p), highest)
        keep = keep & ((rank >= bound) | (self.top_p >= 1)[:, None])
        floor = jnp.max(scaled, axis=-1, keepdims=True) + jnp.log(self.min_p)[:, None]
        return jnp.where(keep & (scaled >= floor), scaled, -jnp.inf)


def _first_of_the_most(x: jax.Array) -> jax.Array:
    """The argmax of `[B, V]`, int32 `[B]`, as two plain reductions.

    On CPUs XLA runs its own, which carries pairs, one number at a time: three times slower, and a
    small vocabulary's takes half a minute to compile.
    """
    V = x.shape[-1]
    is_most = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_most, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


def _ordered(x: jax.Array) -> jax.Array:
    """int32 in the order of the float32 numbers that they are made from."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ _INT32.max, bits)


# What lies above a bound, in number or in probability, only shrinks as the bound rises. So 32
# halvings of int32 find the least bound that is good enough, with no sort, which on a TPU takes
# most of the time to compile and to draw a token.
def _top_k_bound(rank: jax.Array, k: jax.Array) -> jax.Array:
    """The `k`-th highest rank, int32 `[B, 1]`: the least bound with fewer than `k [B]` above."""
    return _smallest(lambda bound: jnp.sum(rank > bound[:, None], axis=-1) < k, len(k))


def _top_p_bound(rank: jax.Array, probability: jax.Array, p: jax.Array) -> jax.Array:
    """The rank at which the likeliest tokens together reach `p [B]`: less than `p` lies above."""
    return _smallest(
        lambda bound: jnp.sum(jnp.where(rank > bound[:, None], probability, 0), axis=-1) < p, len(p)
    )


def _smallest(holds: Callable[[jax.Array], jax.Array], rows: int) -> jax.Array:
    """The smallest int32 of each row for which `holds`, and then for all above: `[rows, 1]`."""

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)  # Their mean, which cannot overflow.
        return jnp.where(holds(middle), low, middle + 1), jnp.where(holds(middle), middle, high)

    ends = jnp.full(rows, _INT32.min, jnp.int32), jnp.full(rows, _INT32.max, jnp.int32)
    smallest: jax.Array = jax.lax.fori_loop(0, 32, halve, ends)[1]
    return smallest[:, None]


def row_keys(seed: int | jax.Array | Sequence[int], rows: int) -> jax.Array:
    """Typed keys `[rows]`: from an int or one typed key, folded with the row, or an int for each.

    Raises TypeError for anything else, raw uint32 keys included, and ValueError for a number of
    seeds that is not that of the rows, or a seed beyond 64 bits.
    """
    given: Any = seed
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        if seed.shape == (rows,):
            return seed
        if seed.shape != ():
            raise ValueError(
                f"seed holds {seed.shape} keys; give one, or one for each of {rows} rows."
            )
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(seed, jnp.arange(rows))
    if isinstance(seed, Sequence) and not isinstance(seed, str | bytes):
        if len(seed) != rows:
            raise ValueError(
                f"seed holds {len(seed)} ints; give one, or one for each of {rows} rows."
            )
        numbers = [checks.integer(f"seed[{i}]", each, *SEEDS) for i, each in enumerate(seed)]
        return jnp.stack([jax.random.fold_in(jax.random.key(number), 0) for number in numbers])
    if getattr(given, "ndim", 0):
        raise TypeError(
            f"seed is an array of {given.dtype}{list(given.shape)}; it must be an int, a key from "
            f"jax.random.key, or {rows} ints."
        )
    return row_keys(jax.random.key(checks.integer("seed", given, *SEEDS)), rows)
