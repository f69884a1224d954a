"""A bar of a run that moves by itself, since a long answer takes minutes."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from tqdm.auto import tqdm

from raas_jax.engine import Engine


class Bar:
    """Samples of all cells, and of the cell in work: rows in flight, tokens per second, right."""

    def __init__(self, total: int, done: int, progress: bool | None):
        """Shows nothing yet; `progress` None shows it on a terminal only."""
        self._bar = tqdm(
            total=total,
            initial=done,
            unit="sample",
            disable=None if progress is None else not progress,
        )
        self._engine: Engine | None = None
        self._seen = 0, 0.0  # Tokens of the engine, and when.
        self._total = self._done = self._right = 0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Bar:
        if not self._bar.disable:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        self._show()
        self._bar.close()

    def start(self, cell: str, total: int, done: Sequence[bool]) -> None:
        """Another cell, of so many samples; `done` says which of those there were right."""
        self._engine, self._total, self._done, self._right = None, total, len(done), sum(done)
        self._bar.set_description(cell)

    def watch(self, engine: Engine) -> None:
        """What answers the cell, from now on."""
        self._engine, self._seen = engine, (engine.usage.useful_row_steps, time.perf_counter())

    def count(self, right: bool) -> None:
        """One more sample."""
        self._done += 1
        self._right += right
        self._bar.update()

    def _tick(self) -> None:
        while not self._end.wait(1.0):
            speed = None
            if self._engine is not None:
                tokens, then = self._seen
                self._seen = self._engine.usage.useful_row_steps, time.perf_counter()
                speed = (self._seen[0] - tokens) / (self._seen[1] - then)
            self._show(speed)

    def _show(self, speed: float | None = None) -> None:
        rows = rate = ""
        if self._engine is not None:
            rows = f"{min(self._engine.rows, self._total - self._done)} rows, "
            rate = "" if speed is None else f"{speed:.0f} tokens/s, "
        self._bar.set_postfix_str(f"{rows}{rate}right {self._right}/{self._done}")
