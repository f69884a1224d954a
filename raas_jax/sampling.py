"""Choosing the next token: greedy, temperature, top-k, top-p, min-p, per row.

All settings are arrays, so that changing them compiles nothing anew; what a batch does not use is
skipped at run time, but on GPUs, which would have to ask the host. Randomness: one typed key per
row, folded with the index of the token, so a row's tokens do not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks

_SIGN = np.uint32(1 << 31)
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
        tokens = jax.lax.platform_dependent(
            self,
            logits,
            index,
            greedy,
            cpu=partial(_draw, way=_ON_CPU),
            tpu=partial(_draw, way=_ON_TPU),
            default=partial(_draw, way=_ON_GPU),
        )
        return tokens, log_probability(logits, tokens)


@dataclasses.dataclass(frozen=True)
class _Way:
    """How a platform finds a bound, and whether it may skip what no row asks for.

    Attributes:
      bits: how many of a bound's bits a pass over the logits finds, by `2 ** bits - 1` thresholds.
        More are fewer passes and more work.
      skips: a branch is taken where the program runs. A GPU has to ask the host for it.
      unrolled: passes follow each other without a loop, so that a GPU can launch all as one graph.
      across: in a sum over the vocabulary the thresholds are the last axis: on a GPU the lanes
        that then compare one number to many thresholds share its reading.
    """

    bits: int
    skips: bool
    unrolled: bool
    across: bool

    def where_any(
        self, asked: jax.Array, found: Callable[[], jax.Array], otherwise: Callable[[], jax.Array]
    ) -> jax.Array:
        """`found()`, or `otherwise()` where no row asked and this platform may skip it."""
        if not self.skips:
            return found()
        either: jax.Array = jax.lax.cond(jnp.any(asked), found, otherwise)
        return either


_ON_CPU = _Way(bits=1, skips=True, unrolled=False, across=False)
_ON_TPU = _Way(bits=4, skips=True, unrolled=True, across=False)
_ON_GPU = _Way(bits=4, skips=False, unrolled=True, across=True)


def _draw(
    sampler: Sampler, logits: jax.Array, index: jax.Array, greedy: jax.Array, *, way: _Way
) -> jax.Array:
    """A token of every row, int32 `[B]`: `greedy` of those at temperature 0."""
    warm = jnp.asarray(sampler.temperature) > 0

    def drawn() -> jax.Array:
        temperature = jnp.where(warm, jnp.maximum(sampler.temperature, _COLDEST), 1.0)
        scaled = _filter(sampler, logits, temperature[:, None], warm, way)
        keys = jax.vmap(jax.random.fold_in)(sampler.keys, index)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:], jnp.float32))(keys)
        return jnp.where(warm, _first_of_the_most(scaled + noise), greedy)

    return way.where_any(warm, drawn, lambda: greedy)


def _filter(
    sampler: Sampler, logits: jax.Array, temperature: jax.Array, warm: jax.Array, way: _Way
) -> jax.Array:
    """Logits over `temperature [B, 1]`, and -inf where top-k, top-p or min-p exclude a token.

    The likeliest token always stays.
    """
    scaled, most = logits / temperature, jnp.max(logits, axis=-1, keepdims=True) / temperature
    by_rank, by_mass = sampler.top_k > 0, sampler.top_p < 1
    # Each filter sees what the ones before it left, as in Hugging Face's order.
    least = way.where_any(
        by_rank & warm,
        lambda: _kth_highest(logits, jnp.where(by_rank, sampler.top_k, logits.shape[-1]), way),
        lambda: jnp.full_like(most, -jnp.inf),
    )
    ranked = jnp.where(logits >= least, scaled, -jnp.inf)

    def reaching() -> jax.Array:
        # Written once, since every pass reads it.
        mass = jax.lax.optimization_barrier(jnp.exp(ranked - most))
        bound = _least_reaching(mass, sampler.top_p * jnp.sum(mass, axis=-1), way)
        keep = (mass >= bound) | (scaled == most) | ~by_mass[:, None]
        return jnp.where(keep, ranked, -jnp.inf)

    reached = way.where_any(by_mass & warm, reaching, lambda: ranked)
    return jnp.where(scaled >= most + jnp.log(sampler.min_p)[:, None], reached, -jnp.inf)


def _first_of_the_most(x: jax.Array) -> jax.Array:
    """The argmax of `[B, V]`, int32 `[B]`, as two plain reductions.

    On CPUs XLA runs its own, which carries pairs, one number at a time: three times slower, and a
    small vocabulary's takes half a minute to compile.
    """
    V = x.shape[-1]
    is_most = x == jnp.max(x, axis=-1, keepdims=True)
    return jnp.min(jnp.where(is_most, jnp.arange(V, dtype=jnp.int32), V - 1), axis=-1)


# What lies above a bound, in number or in probability, only shrinks as the bound rises, and floats
# lie in the order of their bits. So the bits of the least bound that is good enough are found from
# the highest on, a few in each pass over the numbers, with no sort, which on a TPU takes most of
# the time to compile and to draw a token. A pass tries every value that these bits can have.
def _kth_highest(x: jax.Array, k: jax.Array, way: _Way) -> jax.Array:
    """Of `x [B, V]` the `k [B]`-th highest, float32 `[B, 1]`: fewer than k are above."""

    def enough(bounds: jax.Array) -> jax.Array:
        above = _over(x, _of_order(bounds), way, lambda _, above: above.astype(jnp.int32))
        return above < k[:, None]

    return _of_order(_smallest(enough, x.shape[0], 32, way))


def _least_reaching(mass: jax.Array, wanted: jax.Array, way: _Way) -> jax.Array:
    """The least of `mass [B, V]`, in 0 to 1, that the largest need to reach `wanted [B]`: `[B, 1]`.

    Less than wanted lies above it.
    """

    def enough(bounds: jax.Array) -> jax.Array:
        least = jax.lax.bitcast_convert_type(bounds, jnp.float32)
        above = _over(mass, least, way, lambda mass, above: jnp.where(above, mass, 0))
        return above < wanted[:, None]

    # 1 and all below it are numbers of 30 bits.
    return jax.lax.bitcast_convert_type(_smallest(enough, mass.shape[0], 30, way), jnp.float32)


def _of_order(order: jax.Array) -> jax.Array:
    """The float32 that has this place, uint32, in the order of all; beyond infinity, infinity."""
    positive = order >= _SIGN
    x = jax.lax.bitcast_convert_type(jnp.where(positive, order ^ _SIGN, ~order), jnp.float32)
    return jnp.where(jnp.isnan(x), jnp.where(positive, jnp.inf, -jnp.inf), x)


def _over(
    x: jax.Array, bounds: jax.Array, way: _Way, count: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Sums `count(x, x > bound)` over `x [B, V]` for each of `bounds [B, J]`: `[B, J]`."""
    if way.across:
        x, bounds, axis = x[:, :, None], bounds[:, None, :], 1
    else:
        x, bounds, axis = x[:, None, :], bounds[:, :, None], 2
    return jnp.sum(count(x, x > bounds), axis=axis)


def _smallest(
    enough: Callable[[jax.Array], jax.Array], rows: int, bits: int, way: _Way
) -> jax.Array:
    """The smallest number of so many bits that is enough, as then are all above: `[rows, 1]`.

    `enough` says it of numbers `[rows, J]`, all uint32.
    """

    def narrow(bound: jax.Array, shift: jax.Array) -> tuple[jax.Array, None]:
        # The largest number for each value of the next bits but their last, which is enough.
        next_bits = jnp.arange(2**way.bits - 1, dtype=jnp.uint32)
        tried = bound + (next_bits << shift) + ((jnp.uint32(1) << shift) - 1)
        tried = jnp.minimum(tried, jnp.uint32(2**bits - 1))
        short = jnp.sum(~enough(tried), axis=-1, keepdims=True, dtype=jnp.uint32)
        return bound + (short << shift), None

    passes = -(-bits // way.bits)
    shifts = jnp.arange(passes - 1, -1, -1, dtype=jnp.uint32) * way.bits
    zero = jnp.zeros((rows, 1), jnp.uint32)
    return jax.lax.scan(narrow, zero, shifts, unroll=passes if way.unrolled else 1)[0]


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
