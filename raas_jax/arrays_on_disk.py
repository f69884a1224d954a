"""Reading what Orbax has written: one error for whatever its storage raises, and a quiet stderr."""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from raas_jax import checks
from raas_jax.files import FileError


def read(arrays: Path, reader: Callable[[], Any], remedy: str = "Copy it again.") -> Any:
    """What `reader` finds in a folder of Orbax arrays.

    Raises FileError, and nothing else is said: of damage Orbax would print thousands of lines.
    """
    _check_regular(arrays)
    _ignore_late_complaints()
    with _quiet():
        try:
            return reader()
        except Exception as error:  # Orbax lets through whatever its storage raised.
            reason = checks.first_line(error)
        # Its coroutines, which the error held, complain as they are collected.
        gc.collect()
    raise FileError(
        arrays,
        f"cannot be read ({reason}); the folder is damaged or not complete. {remedy}",
    )


def _check_regular(folder: Path) -> None:
    """Raises FileError for a folder with a pipe or the like in it, for which Orbax would wait."""
    for parent, _, names in os.walk(folder):
        for name in names:
            if not os.path.isfile(os.path.join(parent, name)):
                what = "is a pipe, a device or a broken link; expected a regular file."
                raise FileError(os.path.join(parent, name), what)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax's log and the complaints of its coroutines off stderr."""
    logger, hook = logging.getLogger("absl"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        logger.setLevel(level)
        sys.unraisablehook = hook


@functools.cache
def _ignore_late_complaints() -> None:
    """Threads of the storage that end after an error find Orbax's loop closed, at any time.

    Python tells one of its two hooks of it, which one depends on who called; and where the loop was
    still open, asyncio logs the storage's error as one that nobody asked for.
    """
    unraised, raised = sys.unraisablehook, sys.excepthook

    def is_late(kind: type[BaseException], error: BaseException | None) -> bool:
        return kind is RuntimeError and str(error) == "Event loop is closed"

    def quieter_unraised(found: Any) -> None:
        if not is_late(found.exc_type, found.exc_value):
            unraised(found)

    def quieter_raised(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not is_late(kind, error):
            raised(kind, error, trace)

    def is_no_late_one(record: logging.LogRecord) -> bool:
        said = record.getMessage().lower()
        of_storage = any(name in said for name in ("orbax", "tensorstore", "zarr"))
        return not (of_storage and "never retrieved" in said)

    sys.unraisablehook, sys.excepthook = quieter_unraised, quieter_raised
    logging.getLogger("asyncio").addFilter(is_no_late_one)
