"""TriAttention: which keys suit the queries to come, by their centres (arXiv 2604.04921)."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks, files
from raas_jax.policies.base import Boundary, Metadata
from raas_jax.policies.budgeted import Batched


class Centres(NamedTuple):
    """What is known of a model's queries before their rotation, as pairs of one frequency each.

    Attributes:
      centre: float32 `[L, N, H]`, the mean query; its halves are real and imaginary parts.
      length: float32 `[L, N, H / 2]`, the mean length of each pair.
      frequency: float32 `[H / 2]`, radians by which a position turns each pair.
    """

    centre: np.ndarray
    length: np.ndarray
    frequency: np.ndarray

    def write(self, file: str | Path) -> None:
        """Saves them as safetensors, where `TriAttention(calibration=file)` finds them."""
        from safetensors.numpy import save

        files.replace_bytes(file, save(self._asdict()))

    @classmethod
    def read(cls, file: str | Path) -> Centres:
        """The inverse of `write`. Raises FileNotFoundError, or FileError for another file."""
        from safetensors import SafetensorError
        from safetensors.numpy import load

        try:
            data = files.read_bytes(file)
        except FileNotFoundError:
            what = f"calibration is {str(file)!r}; there is no such file."
            raise FileNotFoundError(what) from None
        try:
            found = cls(**load(data))
            found._check()
        except (SafetensorError, TypeError, ValueError, KeyError) as error:
            raise files.FileError(
                file,
                f"is no calibration that `raas-jax calibrate` wrote ({error}). Make it anew, for "
                "this model.",
            ) from error
        return found

    def _check(self) -> None:
        shapes = [array.shape for array in self]
        L, N, H = shapes[0] if len(shapes[0]) == 3 else (0, 0, 0)
        if not L * N * H or shapes != [(L, N, H), (L, N, H // 2), (H // 2,)]:
            raise ValueError(f"its arrays have the shapes {shapes}")
        if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in self):
            raise ValueError("its arrays are not all finite float32 numbers")


@dataclasses.dataclass(frozen=True)
class TriAttention(Batched):
    """Every `every` tokens, keeps the tokens that the queries to come will suit best.

    Before their rotation, the queries of a head lie round a centre that hardly depends on the text.
    Turned to a position to come, the centre is the query to expect there: its product with a key is
    the trigonometric part of the key's score, averaged over distances 1, 2, 4, ... up to `horizon`.
    The other part takes each pair of the key's components as often as queries stray from the
    centre: the pair's length times the mean length of queries there less that of the centre.
    Scores are standardised for each query head over the generated tokens that are kept, the largest
    head of a key/value head counts, and layers are averaged. A page scores as its best token does.

    Keys are taken as they lie in the cache, rotated: turning the centre by the positions to come
    and not by the distances gives the same products, with nothing to turn back.

    Departs from the authors' code: the newest page stays, and granularity "layer" averages heads.

    Attributes:
      calibration: file of the model's `Centres`, made by `raas-jax calibrate`.
      recent: newest tokens that are never evicted, in whole pages, at least one.
      horizon: tokens ahead, the longest distance.
      across_layers: average the scores of all layers (but dense ones), so that a head keeps the
        same tokens in each; else each layer decides.
      digest: of the file's contents, found out here: what is compiled and saved depends on them.
    """

    every: int = 128
    recent: int = 1
    calibration: str = ""
    horizon: int = 65536
    across_layers: bool = True
    digest: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.across_layers and self.allotment is not None:
            raise ValueError(
                "across_layers is True, by which all layers keep the same tokens, but an allotment "
                "gives each a size of its own. Use across_layers=False."
            )
        checks.integer("horizon", self.horizon, 1, checks.MOST_TOKENS)
        if not self.calibration:
            raise ValueError(
                "calibration is not given, but TriAttention needs to know the model's queries. "
                "Make its file with `raas-jax calibrate --model MODEL --out FILE`."
            )
        Centres.read(self.calibration)
        digest = hashlib.blake2b(Path(self.calibration).read_bytes(), digest_size=8).hexdigest()
        if self.digest not in ("", digest):
            raise ValueError(
                f"calibration is {self.calibration!r}, whose contents have changed since this "
                "policy was made; make the policy anew."
            )
        object.__setattr__(self, "digest", digest)

    def check_model(self, config: Any) -> None:
        super().check_model(config)
        found = (*_cached_centres(self.calibration, self.digest).centre.shape,)
        here = config.full_layers, config.num_attention_heads, config.head_dim
        if found != here:
            raise ValueError(
                f"calibration is {self.calibration!r}, of a model with {_sizes(*found)}; this one "
                f"has {_sizes(*here)}. Make it with the same model."
            )

    def page_scores(self, meta: Metadata, boundary: Boundary, candidates: jax.Array) -> jax.Array:
        L, _, K, _ = boundary.fill.shape
        valid = jnp.arange(self.page_size) < boundary.fill[..., None]
        position = boundary.prompt_lengths + boundary.now - 1
        centres = self._centres(L, K)
        query, stray = expected_queries(centres, position, self.horizon)

        def of_layer(layer: tuple[jax.Array, ...]) -> jax.Array:
            number, query, stray, valid = layer
            score = score_keys(boundary.k(number).astype(jnp.float32), query, stray)
            return jnp.max(standardised(score, valid[:, :, None]), axis=2)

        # One layer at a time: the float32 copy of the keys is a layer's, not the cache's.
        of_token = jax.lax.map(of_layer, (jnp.arange(L), query, stray, valid))
        if self.across_layers:
            of_token = jnp.broadcast_to(jnp.mean(of_token, axis=0), of_token.shape)
        return jnp.max(jnp.where(valid, of_token, -jnp.inf), axis=-1)

    def _centres(self, L: int, K: int) -> Centres:
        """Those of the last `L` layers, as dense ones come first; heads are `[L, K, G, ...]`."""
        centre, length, frequency = _cached_centres(self.calibration, self.digest)
        centre, length = (x[-L:].reshape(L, K, x.shape[1] // K, -1) for x in (centre, length))
        return Centres(centre, length, frequency)


@functools.lru_cache(maxsize=8)
def _cached_centres(file: str, digest: str) -> Centres:
    return Centres.read(file)


def _sizes(layers: int, heads: int, width: int) -> str:
    return f"{layers} layers, {heads} query heads and head dim {width}"


def expected_queries(
    centres: Centres, position: jax.Array, horizon: int
) -> tuple[jax.Array, jax.Array]:
    """The mean query to come, rotated, and how much queries stray from their centre.

    Of centres with heads as `[L, K, G, ...]`, at positions int32 `[B]`, the tokens so far in each
    row, and up to the distance `horizon`: float32 `[L, B, K, G, H]`, and `[L, K, G, H / 2]`.
    """
    distance = 2.0 ** np.arange(int(horizon).bit_length())
    # In float64, once: a distance turns a pair many thousand times.
    turn = np.mean(np.exp(1j * distance[:, None] * centres.frequency.astype(np.float64)), axis=0)
    halves = np.split(centres.centre.astype(np.float64), 2, axis=-1)
    centre = halves[0] + 1j * halves[1]
    ahead = (centre * turn)[:, None]
    real, imaginary = (jnp.asarray(x, jnp.float32) for x in (ahead.real, ahead.imag))
    angle = position.astype(jnp.float32)[:, None, None, None] * jnp.asarray(centres.frequency)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    query = jnp.concatenate([real * cos - imaginary * sin, imaginary * cos + real * sin], axis=-1)
    return query, jnp.asarray(centres.length - np.abs(centre), jnp.float32)


def score_keys(k: jax.Array, query: jax.Array, stray: jax.Array) -> jax.Array:
    """Scores of rotated keys k `[B, K, S, P, H]` for query `[B, K, G, H]`: `[B, K, G, S, P]`."""
    toward = jnp.einsum("bksph,bkgh->bkgsp", k, query)
    real, imaginary = jnp.split(k, 2, axis=-1)
    length = jnp.sqrt(real * real + imaginary * imaginary)
    return toward + jnp.einsum("bkspf,kgf->bkgsp", length, stray)


def standardised(score: jax.Array, valid: jax.Array) -> jax.Array:
    """Less the mean and over the standard deviation of the valid ones, over the last two axes."""
    count = jnp.sum(valid, axis=(-2, -1), keepdims=True).astype(jnp.float32)
    count = jnp.maximum(count, 1.0)
    mean = jnp.sum(jnp.where(valid, score, 0.0), axis=(-2, -1), keepdims=True) / count
    apart = jnp.where(valid, score - mean, 0.0)
    deviation = jnp.sqrt(jnp.sum(apart * apart, axis=(-2, -1), keepdims=True) / count)
    return apart / jnp.maximum(deviation, 1e-6)
