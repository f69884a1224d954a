"""Orbax checkpoints: a folder that holds all that is needed to run the model again.

config.json          shape and dtype of the model, as Hugging Face writes it
orbax/               the arrays
tokenizer.json, ...  the tokenizer and generation files of the source, where it had them
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
from jax.typing import DTypeLike

from raas_jax.config import ModelConfig
from raas_jax.files import FileError
from raas_jax.params import Params
from raas_jax.weights import hf
from raas_jax.weights.files import Shape, first_line, listed, misfits, new_folder, write_companions

ARRAYS = "orbax"


def is_orbax(folder: str | Path) -> bool:
    """Whether a folder was written by `save_orbax`."""
    return (Path(folder) / ARRAYS).is_dir()


def save_orbax(params: Params, folder: str | Path) -> None:
    """Saves weights, config and tokenizer files. The folder appears only once it is complete.

    Sharded arrays are written by the processes that hold them; every process must call this.

    Raises:
      FileExistsError: the folder is there and not empty.
      OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    with new_folder(folder) as unfinished:
        if jax.process_index() == 0:
            write_companions(params, params.dtype, unfinished)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(unfinished / ARRAYS, params.stacked().weights)


def load_orbax(
    folder: str | Path, *, dtype: DTypeLike | None = None, sharding: hf.Shardings = None
) -> Params:
    """Restores what `save_orbax` wrote; the arguments are those of `load_hf`.

    Raises:
      FileNotFoundError: no config.json, or no arrays.
      ValueError: arrays that do not fit the config, all in one message.
      FileError: a damaged folder.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).expanduser().absolute()
    config = ModelConfig.from_file(folder)
    if not is_orbax(folder):
        raise FileNotFoundError(f"No Orbax arrays in {folder}; expected a folder {ARRAYS!r} there.")
    shardings = hf.flat_shardings(config, sharding)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:

        def shapes() -> dict[str, Shape]:
            metadata = checkpointer.metadata(folder / ARRAYS).item_metadata
            if metadata is None:
                raise ValueError("its metadata are missing or damaged")
            return {path: tuple(a.shape) for path, a in hf.flatten(metadata.tree).items()}

        # Orbax would pad or drop what does not fit.
        expected = {path: leaf.shape for path, leaf in hf.flat_shapes(config, "float32").items()}
        if problems := misfits(read_orbax(folder / ARRAYS, shapes), expected):
            what = f"The Orbax arrays in {folder} do not fit its config.json:{listed(problems)}"
            raise ValueError(what)
        to = hf.wanted_dtype(dtype, config.dtype)
        target = hf.unflatten(
            {
                path: jax.ShapeDtypeStruct(shape, to, sharding=shardings[path] or default)
                for path, shape in expected.items()
            }
        )
        weights = read_orbax(folder / ARRAYS, lambda: checkpointer.restore(folder / ARRAYS, target))
    return Params(weights, dataclasses.replace(config, dtype=to.name), str(folder))


def read_orbax(arrays: Path, read: Callable[[], Any]) -> Any:
    """What `read` finds in a folder of Orbax arrays.

    Raises FileError, and nothing else is said: of damage Orbax would print thousands of lines.
    """
    _ignore_closed_loops()
    with _quiet():
        try:
            return read()
        except Exception as error:  # Orbax lets through whatever its storage raised.
            reason = first_line(error)[:200]
        # Its coroutines, which the error held, complain as they are collected.
        gc.collect()
    raise FileError(
        arrays,
        f"cannot be read ({reason}); the folder is damaged or not complete. Copy or convert it "
        "again.",
    )


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
def _ignore_closed_loops() -> None:
    """Threads of the storage that end after an error find Orbax's loop closed, at any time."""
    hook = sys.excepthook

    def quieter(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            hook(kind, error, trace)

    sys.excepthook = quieter
