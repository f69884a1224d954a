"""Allotment: how many of a budget's pages each layer and key/value head is given.

Heads differ far more in how much they lose by a smaller cache than policies do in what they evict.
An allotment knows, for every head, a curve: what it loses at each of several sizes. A budget is
shared out by going down the curves, always where the next page saves the most.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
import operator
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from raas_jax import checks, files

VERSION = 1
"""Of the file."""
_TOKENS = np.unique(np.geomspace(1, 32768, 240).astype(int))
"""Sizes of curves that stand for shares."""
_REMEDY = "Make it anew with `raas-jax allot`."


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Allotment:
    """What each layer and key/value head of one model loses at several sizes of its cache.

    Immutable and hashable; equal if all of it is.

    Attributes:
      sizes: tokens of generated text that a head keeps, ascending, int64 `[n]`.
      losses: float64 `[L, K, n]`, 0 or more, in any unit that can be added over heads.
      model: what `raas_jax.identity.likeness` says of the model; "" fits any of the same shape.
      made: how it was found, JSON values; for the reader only.
      parts: into how many equal shares of heads, with equally many pages each, it is cut (`split`).
      together: whether all heads of a layer are given the same (`by_layer`).

    Raises:
      ValueError: arrays that are not as said.
    """

    sizes: np.ndarray
    losses: np.ndarray
    model: str = ""
    made: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    parts: int = 1
    together: bool = False

    def __post_init__(self) -> None:
        sizes, losses = _whole_numbers(self.sizes), np.array(self.losses, np.float64)
        ascending = (
            sizes.ndim == 1 and len(sizes) > 1 and sizes[0] > 0 and np.all(np.diff(sizes) > 0)
        )
        if not ascending:
            raise ValueError(f"sizes are {sizes.tolist()}; they must be two or more and ascend.")
        if sizes[-1] > checks.MOST_TOKENS:
            raise ValueError(f"sizes go up to {sizes[-1]}; they may to {checks.MOST_TOKENS}.")
        if losses.ndim != 3 or losses.shape[-1] != len(sizes) or not losses.size:
            raise ValueError(
                f"losses have shape {list(losses.shape)}; it must be [L, K, {len(sizes)}], one for "
                "every size."
            )
        if not np.all(np.isfinite(losses) & (losses >= 0)):
            raise ValueError("losses are not all finite numbers of 0 or more.")
        if self.parts < 1 or losses.shape[1] % self.parts:
            raise ValueError(f"parts is {self.parts}; it must divide the {losses.shape[1]} heads.")
        for name, array in (("sizes", sizes), ("losses", losses)):
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    @classmethod
    def proportional(cls, weights: np.ndarray, model: str, made: Mapping[str, Any]) -> Allotment:
        """Gives every head pages in proportion to its weight, 0 or more, `[L, K]`.

        Going down curves of `-weight * log(tokens)`, the next page saves all heads the same when
        their pages are as their weights.
        """
        weights = np.asarray(weights, np.float64)
        return cls(_TOKENS, weights[..., None] * np.log(_TOKENS[-1] / _TOKENS), model, made)

    @functools.cached_property
    def digest(self) -> str:
        """Of all that decides what it gives: 16 hexadecimal digits."""
        said = hashlib.blake2b(digest_size=8)
        for part in (
            self.sizes,
            self.losses,
            np.asarray([*self.losses.shape, self.parts, self.together]),
        ):
            said.update(np.ascontiguousarray(part).tobytes())
        said.update(self.model.encode())
        return said.hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Allotment) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Allotment({self.digest})"

    @property
    def layers(self) -> int:
        """`L`."""
        return int(self.losses.shape[0])

    @property
    def heads(self) -> int:
        """`K`."""
        return int(self.losses.shape[1])

    def last(self, layers: int) -> Allotment:
        """That of the last layers alone, as the first may be dense."""
        return dataclasses.replace(self, losses=self.losses[-layers:])

    def split(self, parts: int) -> Allotment:
        """The same, shared out within each of so many parts of the heads for itself."""
        return dataclasses.replace(self, parts=parts)

    def by_layer(self) -> Allotment:
        """The same for all heads of a layer, by what they lose together."""
        return dataclasses.replace(self, together=True)

    def pages(self, mean: int, page_size: int, least: int = 1) -> np.ndarray:
        """Shares out `mean * L * K` pages.

        A larger mean gives no head less. Heads whose next pages save the same share them evenly,
        and so do all where the curves end or are level. No head is given less than the smallest
        size: what it would lose is not known.

        Args:
          mean: pages per layer and head.
          page_size: `P`.
          least: pages that every head has, but not more than `mean`.

        Returns:
          int64 `[L, K]`, of mean `mean` in every part.
        """
        sizes, least = self.sizes / page_size, max(least, -(-int(self.sizes[0]) // page_size))
        least = min(least, mean)
        if self.together:
            of_layer = np.sum(self.losses, axis=1, keepdims=True)
            given = least + _shared(sizes, of_layer, least, mean - least)
            return np.repeat(given, self.heads, axis=1)
        parts = np.split(self.losses, self.parts, axis=1)
        shares = [_shared(sizes, losses, least, mean - least) for losses in parts]
        found: np.ndarray = least + np.concatenate(shares, axis=1)
        return found

    def loss(self, pages: np.ndarray, page_size: int) -> float:
        """What all heads lose together with so many pages each, `[L, K]`, by their curves."""
        return float(np.sum(self.lost(pages * page_size)))

    def lost(self, tokens: np.ndarray) -> np.ndarray:
        """What each head loses with so many tokens, `[L, K]`, by its curve; the same shape."""
        found = np.empty(tokens.shape)
        for head in np.ndindex(tokens.shape):
            found[head] = np.interp(tokens[head], self.sizes, self.losses[head])
        return found

    def fitted(self, pages: np.ndarray, most: int) -> np.ndarray:
        """At most so many for each head, int64 `[L, K]`, and still equally many in every part.

        A part whose heads wanted less beyond `most` is given more than it asked for.
        """
        parts = np.split(np.minimum(pages, most), self.parts, axis=1)
        largest = max(int(np.sum(part)) for part in parts)
        added = [_evenly(most - part.reshape(-1), largest - int(np.sum(part))) for part in parts]
        filled = [part + more.reshape(part.shape) for part, more in zip(parts, added, strict=True)]
        found: np.ndarray = np.concatenate(filled, axis=1)
        return found

    def described(self) -> dict[str, Any]:
        """All of it as JSON values, but for the parts, which a mesh decides."""
        return {
            "version": VERSION,
            "model": self.model,
            "made": dict(self.made),
            "sizes": self.sizes.tolist(),
            "losses": self.losses.tolist(),
            "together": self.together,
        }

    @classmethod
    def of(cls, described: Mapping[str, Any]) -> Allotment:
        """The inverse of `described`. Raises ValueError for what is none."""
        try:
            version, model, made = (described[name] for name in ("version", "model", "made"))
            if version != VERSION:
                raise ValueError(f"version is {version}; expected {VERSION}")
            if not isinstance(model, str) or not isinstance(made, dict):
                raise ValueError("model must be a text and made an object")
            together = described.get("together", False)
            if not isinstance(together, bool):
                raise ValueError("together must be true or false")
            return cls(described["sizes"], described["losses"], model, made, together=together)
        except KeyError as error:
            raise ValueError(f"{error} is missing") from None
        except (TypeError, OverflowError) as error:
            raise ValueError(str(error)) from None

    def write(self, file: str | os.PathLike[str]) -> None:
        """Writes it as JSON. Raises OSError if that fails."""
        files.replace_text(file, json.dumps(self.described()) + "\n")

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> Allotment:
        """The inverse of `write`.

        Raises:
          FileNotFoundError: there is none. FileError: it is no allotment.
        """
        try:
            values = files.read_fields(file, _REMEDY)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"allotment is {os.fspath(file)!r}; there is no such file. Make it with "
                f"`raas-jax allot MODEL --out {os.fspath(file)}`."
            ) from None
        try:
            return cls.of(values)
        except ValueError as error:
            what = f"is no allotment ({checks.first_line(error)}). {_REMEDY}"
            raise files.FileError(file, what) from error


def _whole_numbers(sizes: Any) -> np.ndarray:
    given = np.array(sizes)
    if given.dtype.kind not in "iu":  # Rounded, they would be other sizes.
        raise ValueError("sizes are not whole numbers of at most 64 bits.")
    return given.astype(np.int64)


def _shared(sizes: np.ndarray, losses: np.ndarray, least: int, mean: int) -> np.ndarray:
    """`mean` pages per head beyond `least`, where they save the most; int64 `[L, K]`.

    Of each curve only its lower convex hull counts: a step that saves much may lie behind one that
    saves little, and is then reckoned with the pages of both.
    """
    shape, left = losses.shape[:2], mean * losses.shape[0] * losses.shape[1]
    given = np.zeros(shape, np.int64)
    steps = []
    for head in np.ndindex(shape):
        for pages, saved in _hull(sizes, losses[head], least):
            steps.append((-saved, head, pages))
    # Each head's own steps come in order, as they save less and less.
    for _, alike in itertools.groupby(sorted(steps), key=operator.itemgetter(0)):
        heads, rooms = zip(*(step[1:] for step in alike), strict=True)
        taken = _evenly(np.asarray(rooms), left)
        given[tuple(zip(*heads, strict=True))] += taken
        left -= int(np.sum(taken))
    given += _evenly(np.full(given.size, left), left).reshape(shape)
    return given


def _evenly(rooms: np.ndarray, left: int) -> np.ndarray:
    """Up to `left` pages for all, one for each in turn that has room for more."""
    if np.sum(rooms) <= left:
        return rooms

    def taken(turns: int) -> int:
        return int(np.sum(np.minimum(rooms, turns)))

    turns = bisect.bisect_right(range(int(np.max(rooms)) + 1), left, key=taken) - 1
    given: np.ndarray = np.minimum(rooms, turns)
    given[np.flatnonzero(rooms > turns)[: left - taken(turns)]] += 1
    return given


def _hull(sizes: np.ndarray, losses: np.ndarray, least: int) -> list[tuple[int, float]]:
    """Steps down the lower convex hull of a curve from `least` on: (pages, saved per page)."""
    # Of whole pages a line can bend only at those on either side of a size.
    beside = {int(page) for page in (*np.floor(sizes), *np.ceil(sizes)) if page > least}
    at = np.asarray([least, *sorted(beside)], np.float64)
    # A curve never rises in truth; where it does, it was noise.
    loss = np.minimum.accumulate(np.interp(at, sizes, losses))
    hull = [0]
    for point in range(1, len(at)):
        while len(hull) > 1 and _slope(at, loss, hull[-2], hull[-1]) >= _slope(
            at, loss, hull[-1], point
        ):
            hull.pop()
        hull.append(point)
    edges = itertools.pairwise(hull)
    steps = [(int(at[b] - at[a]), -_slope(at, loss, a, b)) for a, b in edges]
    return [(pages, saved) for pages, saved in steps if saved > 0]


def _slope(x: np.ndarray, y: np.ndarray, a: int, b: int) -> float:
    return float((y[b] - y[a]) / (x[b] - x[a]))
