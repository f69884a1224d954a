"""Stop strings, found in text while it comes."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import compress

from raas_jax import checks


def stop_strings(stop: str | Iterable[str] | None) -> tuple[str, ...]:
    """A caller's stop strings as a tuple.

    Raises:
      TypeError: not strings. ValueError: an empty one, which would stop at once, or one with half
        of a character, which would never stop.
    """
    if not (stop is None or isinstance(stop, str) or checks.is_many(stop)):
        raise TypeError(f"stop is {checks.short(stop)}; expected a string or a list of them.")
    found = (stop,) if isinstance(stop, str) else tuple(() if stop is None else stop)
    for i, item in enumerate(found):
        if not isinstance(item, str):
            raise TypeError(f"stop[{i}] is {checks.short(item)}; expected a string.")
        if not item:
            raise ValueError(f"stop[{i}] is empty, which would stop at once; leave it out.")
        checks.whole_text(f"stop[{i}]", item)
    return tuple(str(item) for item in found)


class StopFinder:
    """Finds the stop string that is complete first, and holds back what may become one.

    It looks in the text that is shown, and in the text with the special tokens between.

    Attributes:
      found: the stop string that was met, or None.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.found: str | None = None
        self._stops = stops
        # What may be the beginning of a stop string, and for each character whether it is shown.
        self._held = ""
        self._shown = b""

    def push(self, text: str, *, shown: bool = True) -> str:
        """Adds text, not shown for a special token; gives what can belong to no stop string."""
        if not self._stops:
            return text if shown else ""
        self._held += text
        self._shown += bytes([shown]) * len(text)
        before = self._find(self._held, self._shown)
        if before is not None:
            return before
        cut = self._certain()
        certain = "".join(compress(self._held[:cut], self._shown))
        self._held, self._shown = self._held[cut:], self._shown[cut:]
        return certain

    def foresee(self, text: str, special: str = "") -> str:
        """Stops if text that is not certain yet, and a special token after it, complete a stop.

        Gives the shown text before the stop string, and nothing if there is none.
        """
        if not text and not special:
            return ""
        shown = self._shown + b"\1" * len(text) + b"\0" * len(special)
        return self._find(self._held + text + special, shown) or ""

    def finish(self) -> str:
        """What was held back, once no more text will come."""
        rest = "".join(compress(self._held, self._shown))
        self._held, self._shown = "", b""
        return rest

    def _find(self, text: str, shown: bytes) -> str | None:
        """The shown text before a stop string, if there is one."""
        visible = "".join(compress(text, shown))
        hits = []
        for stop in self._stops:
            if (at := visible.find(stop)) >= 0:
                hits.append((at + len(stop), at, stop))
            if (at := text.find(stop)) >= 0:
                hits.append((sum(shown[: at + len(stop)]), sum(shown[:at]), stop))
        if not hits:
            return None
        _, at, self.found = min(hits)
        self._held, self._shown = "", b""
        return visible[:at]

    def _certain(self) -> int:
        """How much of the held text belongs to no stop string."""
        places = list(compress(range(len(self._held)), self._shown))
        visible = "".join(compress(self._held, self._shown))
        begun = self._begun(visible)
        cut = len(self._held) - self._begun(self._held)
        return min(cut, places[-begun]) if begun else cut

    def _begun(self, text: str) -> int:
        """Length of the longest end of `text` that is a beginning of a stop string."""
        return max(_overlap(text, stop) for stop in self._stops)


def _overlap(text: str, stop: str) -> int:
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
