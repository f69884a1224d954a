"""Which pages of a pool belong to which layer and key/value head."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Contiguous ranges of a pool `[B, T, P, H]`, one for each layer and key/value head.

    A pool is made of `parts` of equal size, each with the ranges of an equal share of the heads, so
    that a mesh can split it where it splits the heads. In a part, ranges follow one another layer
    by layer, and in a layer head by head. Static and hashable.

    Attributes:
      counts: pages of every head of every layer, `[L][K]`, each at least 1.
      parts: into how many equal parts the heads, and with them the pool, can be split.

    Raises:
      ValueError: counts that are not as said, or parts that hold different numbers of pages.
    """

    counts: tuple[tuple[int, ...], ...]
    parts: int = 1

    def __post_init__(self) -> None:
        heads = {len(layer) for layer in self.counts}
        if len(heads) != 1 or not heads.pop() or min(min(layer) for layer in self.counts) < 1:
            raise ValueError(
                f"counts are {self.counts}; each layer must have the same heads, each head a page."
            )
        if self.parts < 1 or self.heads % self.parts:
            raise ValueError(f"parts is {self.parts}; it must divide the {self.heads} heads.")
        sizes = np.sum(self._by_part(), axis=(1, 2))
        if len(set(sizes.tolist())) > 1:
            raise ValueError(
                f"parts hold {sizes.tolist()} pages; all must hold the same number, or use parts=1."
            )

    @property
    def layers(self) -> int:
        """`L`."""
        return len(self.counts)

    @property
    def heads(self) -> int:
        """`K`."""
        return len(self.counts[0])

    @functools.cached_property
    def total(self) -> int:
        """`T`, pages of the pool."""
        return int(np.sum(self.counts))

    @functools.cached_property
    def most(self) -> int:
        """`S`, pages of the largest range."""
        return int(np.max(self.counts))

    @functools.cached_property
    def sizes(self) -> tuple[int, ...]:
        """The distinct numbers of pages, smallest first."""
        return tuple(sorted({count for layer in self.counts for count in layer}))

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """First page of every range, int32 `[L, K]`; within a part it is this modulo its size."""
        counts = self._by_part()
        ends = np.cumsum(counts.reshape(-1)).reshape(counts.shape)
        return self._by_layer(ends - counts)

    @functools.cached_property
    def places(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Layer, head, and slot in the head's range of every page of the pool: int32 `[T]` each."""
        layer, head, slot = (np.zeros(self.total, np.int32) for _ in range(3))
        for (of_layer, of_head), start in np.ndenumerate(self.starts):
            count = self.counts[of_layer][of_head]
            own = slice(start, start + count)
            layer[own], head[own], slot[own] = of_layer, of_head, np.arange(count)
        return layer, head, slot

    def _by_part(self) -> np.ndarray:
        """The counts as `[parts, L, K / parts]`."""
        counts = np.asarray(self.counts, np.int64)
        split = counts.reshape(self.layers, self.parts, self.heads // self.parts)
        return np.swapaxes(split, 0, 1)

    def _by_layer(self, x: np.ndarray) -> np.ndarray:
        """The inverse of `_by_part`, int32 `[L, K]`."""
        return np.swapaxes(x, 0, 1).reshape(self.layers, self.heads).astype(np.int32)
