"""Orbax checkpoints: a folder that holds all that is needed to run the model again.

config.json          shape and dtype of the model, as Hugging Face writes it
orbax/               the arrays
tokenizer.json, ...  the tokenizer and generation files of the source, where it had them
"""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path

import jax
from jax.typing import DTypeLike

from raas_jax.config import ModelConfig
from raas_jax.params import Params
from raas_jax.weights.files import new_folder, write_companions
from raas_jax.weights.hf import (
    Shardings,
    flat_shapes,
    flat_shardings,
    flatten,
    unflatten,
    wanted_dtype,
)

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
    folder: str | Path, *, dtype: DTypeLike | None = None, sharding: Shardings = None
) -> Params:
    """Restores what `save_orbax` wrote; the arguments are those of `load_hf`.

    Raises:
      FileNotFoundError: no config.json, or no arrays.
      ValueError: arrays that do not fit the config (all in one message), or a damaged folder.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).expanduser().absolute()
    config = ModelConfig.from_file(folder)
    if not is_orbax(folder):
        raise FileNotFoundError(f"No Orbax arrays in {folder}; expected a folder {ARRAYS!r} there.")
    shardings = flat_shardings(config, sharding)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = flatten(checkpointer.metadata(folder / ARRAYS).item_metadata.tree)
            found = {path: tuple(array.shape) for path, array in stored.items()}
        except Exception as error:  # Orbax lets through whatever its storage raised.
            raise _damaged(folder, error) from error
        _check_fit(folder, config, found)
        to = wanted_dtype(dtype, config.dtype)
        abstract = partial(jax.ShapeDtypeStruct, dtype=to)
        target = {
            path: abstract(leaf.shape, sharding=shardings[path] or default)
            for path, leaf in flat_shapes(config, to.name).items()
        }
        try:
            weights = checkpointer.restore(folder / ARRAYS, unflatten(target))
        except Exception as error:
            raise _damaged(folder, error) from error
    return Params(weights, dataclasses.replace(config, dtype=to.name), str(folder))


def _damaged(folder: Path, error: Exception) -> ValueError:
    reason = (next(iter(str(error).splitlines()), "") or type(error).__name__)[:200]
    return ValueError(
        f"The Orbax arrays in {folder / ARRAYS} cannot be read ({reason}); the folder is damaged "
        "or not complete. Copy or convert it again."
    )


def _check_fit(folder: Path, config: ModelConfig, found: dict[str, tuple[int, ...]]) -> None:
    """Orbax would pad or drop what does not fit; here it is an error that lists everything."""
    expected = {path: leaf.shape for path, leaf in flat_shapes(config, "float32").items()}
    problems = [f"unknown: {path}" for path in found if path not in expected]
    problems += [f"missing: {path}" for path in expected if path not in found]
    problems += [
        f"misshapen: {path} is {list(found[path])}, expected {list(shape)}"
        for path, shape in expected.items()
        if path in found and found[path] != shape
    ]
    if problems:
        raise ValueError(
            f"The Orbax arrays in {folder} do not fit its config.json:\n  " + "\n  ".join(problems)
        )
