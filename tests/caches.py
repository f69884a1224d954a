"""Caches of random tokens in which nothing else lives, and attention over them by the book."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_kernels import Segment

LAYERS = 2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one case; with `ranges` a pool, whose layer 1 is read."""

    B: int = 1
    samples: int = 1
    K: int = 1
    G: int = 1
    H: int = 64
    P: int = 8
    S: int = 2
    Sp: int = 2
    dtype: type = jnp.float32
    ranges: object = None


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Keys and values that live, float64: of each row and key/value head a list of pages."""

    prompt: list
    kept: list
    current: list


def drawn_cache(sizes, seed=0):
    """q, the three segments with NaN wherever no token lives, and the tokens in them.

    Pages are empty, partly filled and full; a row's prompt may be short, and a head have no kept
    page at all.
    """
    rng = np.random.default_rng(seed)
    B, K, P, H = sizes.B, sizes.K, sizes.P, sizes.H
    prompts = B // sizes.samples

    def number(*shape):
        # As the cache would hold it.
        return np.asarray(jnp.asarray(rng.normal(size=shape), sizes.dtype), np.float64)

    fill = rng.integers(0, P + 1, (LAYERS, B, K, sizes.S))
    fill[rng.random(fill.shape) < 0.3] = 0
    fill[rng.random(fill.shape) < 0.3] = P
    fill[1, 0, 0] *= rng.integers(0, 2)
    if sizes.ranges is not None:
        fill *= np.arange(sizes.S) < np.asarray(sizes.ranges.counts)[:, None, :, None]
    lengths = rng.integers(min(sizes.Sp, 1), sizes.Sp * P + 1, prompts)
    written = int(rng.integers(1, P + 1))

    def nothing(*shape):
        return np.full((2, *shape), np.nan)

    of_prompt = nothing(LAYERS + 1, prompts, K, sizes.Sp * P, H)
    of_kept = nothing(LAYERS, B, K, sizes.S, P, H)
    of_current = nothing(LAYERS + 1, B, K, P, H)
    pool = None if sizes.ranges is None else nothing(B, sizes.ranges.total, P, H)
    for row, head in np.ndindex(prompts, K):
        of_prompt[:, 2, row, head, : lengths[row]] = number(2, lengths[row], H)
    for row, head in np.ndindex(B, K):
        of_current[:, 2, row, head, :written] = number(2, written, H)
        for slot, count in enumerate(fill[1, row, head]):
            of_kept[:, 1, row, head, slot, :count] = number(2, count, H)
            if pool is not None and count:
                pool[:, row, sizes.ranges.starts[1, head] + slot] = of_kept[:, 1, row, head, slot]
    tokens = Tokens(
        [[of_prompt[:, 2, b // sizes.samples, k, : lengths[b // sizes.samples]]
          for k in range(K)] for b in range(B)],
        [[[of_kept[:, 1, b, k, s, :count] for s, count in enumerate(fill[1, b, k])]
          for k in range(K)] for b in range(B)],
        [[of_current[:, 2, b, k, :written] for k in range(K)] for b in range(B)],
    )  # fmt: skip

    def segment(pages, alive, layer):
        k, v = jnp.asarray(pages, sizes.dtype)
        return Segment(k, v, jnp.asarray(alive, jnp.int32), jnp.int32(layer))

    q = number(B, K * sizes.G, H)
    paged = of_prompt.reshape(2, LAYERS + 1, prompts, K, sizes.Sp, P, H)
    segments = (
        segment(paged, lengths, 2) if sizes.Sp else None,
        segment(of_kept if pool is None else pool, fill, 1),
        segment(of_current, written, 2),
    )
    return jnp.asarray(q, sizes.dtype), *segments, tokens


def by_the_book(q, tokens, sizes, scale, sink=None):
    """Attended values, the share of each kept page, and that of the current one: float64."""
    q = np.asarray(q, np.float64)
    B, N, _ = q.shape
    out, kept, current = np.zeros(q.shape), np.zeros((B, N, sizes.S)), np.zeros((B, N))
    for b, n in np.ndindex(B, N):
        head = n // sizes.G
        pages = [*tokens.kept[b][head], tokens.current[b][head], tokens.prompt[b][head]]
        keys, values = (np.concatenate([page[side] for page in pages]) for side in (0, 1))
        scores = scale * keys @ q[b, n]
        none = [] if sink is None else [float(sink[n])]
        weights = np.exp(scores - np.max([*scores, *none]))
        total = weights.sum() + np.sum(np.exp(none - np.max([*scores, *none])))
        out[b, n] = weights @ values / total
        ends = np.cumsum([len(page[0]) for page in pages])
        masses = [part.sum() / total for part in np.split(weights, ends[:-1])]
        kept[b, n], current[b, n] = masses[: sizes.S], masses[sizes.S]
    return out, kept, current
