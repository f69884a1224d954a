"""Token ids in, text out, as it becomes certain."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from raas_jax.params import Params
from raas_jax.tokenizer.folder import load, sound
from raas_jax.tokenizer.increments import increments, special_ids
from raas_jax.tokenizer.stops import StopFinder, stop_strings


class Detokenizer:
    """Token ids in, text out, as it becomes certain.

    A piece never ends inside a character, and text that may yet become a stop string is held back.
    All pieces together, with that of `finish`, are `text`: the text of the ids, cut before the
    first stop string. Special tokens are no text, but stop strings may name them.

    Attributes:
      text: what was given out so far.
      count: tokens taken so far, up to and with the one that completed a stop string.
    """

    def __init__(self, params: Params, stop: str | Iterable[str] | None = None):
        self.text = ""
        self.count = 0
        self._tokenizer = load(params)
        self._special = special_ids(self._tokenizer)
        self._increments = increments(self._tokenizer)
        stops = stop_strings(stop)
        self._stops = StopFinder(stops)
        self._searching = bool(stops)

    @property
    def stopped(self) -> str | None:
        """The stop string that was met, or None."""
        return self._stops.found

    def push(self, ids: Iterable[int]) -> str:
        """Takes more ids and returns the text that they make certain; nothing after a stop."""
        with sound(self._tokenizer):
            return self._give("".join(self._pieces(ids)))

    def _pieces(self, ids: Iterable[int]) -> Iterator[str]:
        for index in map(int, ids):
            if self.stopped is not None:
                break
            self.count += 1
            if index not in self._special:
                yield self._stops.push(self._increments.push(index))
                if self._searching and self.stopped is None:
                    yield self._stops.foresee(self._increments.likely())
            elif self._searching:
                name = str(self._tokenizer.convert_ids_to_tokens(index))
                yield self._stops.foresee(self._increments.rest(), name)
                if self.stopped is None:
                    yield self._stops.push(name, shown=False)

    def finish(self) -> str:
        """The rest, once no more ids will come."""
        if self.stopped is not None:
            return ""
        with sound(self._tokenizer):
            return self._give(self._stops.push(self._increments.rest()) + self._stops.finish())

    def _give(self, piece: str) -> str:
        self.text += piece
        return piece
