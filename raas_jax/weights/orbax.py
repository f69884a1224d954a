"""Orbax checkpoints: a folder that holds all that is needed to run the model again.

config.json          shape and dtype of the model, as Hugging Face writes it
orbax/               the arrays
tokenizer.json, ...  the tokenizer and generation files of the source, where it had them
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.typing import DTypeLike

from raas_jax.config import ModelConfig
from raas_jax.params import Params
from raas_jax.weights import hf
from raas_jax.weights.files import first_line, listed, misfits, new_folder, write_companions

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
      ValueError: arrays that do not fit the config (all in one message), or a damaged folder.
    """
    import orbax.checkpoint as ocp

    folder = Path(folder).expanduser().absolute()
    config = ModelConfig.from_file(folder)
    if not is_orbax(folder):
        raise FileNotFoundError(f"No Orbax arrays in {folder}; expected a folder {ARRAYS!r} there.")
    shardings = hf.flat_shardings(config, sharding)
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = hf.flatten(checkpointer.metadata(folder / ARRAYS).item_metadata.tree)
            found = {path: tuple(array.shape) for path, array in stored.items()}
        except Exception as error:  # Orbax lets through whatever its storage raised.
            raise _damaged(folder, error) from error
        # Orbax would pad or drop what does not fit.
        expected = {path: leaf.shape for path, leaf in hf.flat_shapes(config, "float32").items()}
        if problems := misfits(found, expected):
            what = f"The Orbax arrays in {folder} do not fit its config.json:{listed(problems)}"
            raise ValueError(what)
        to = hf.wanted_dtype(dtype, config.dtype)
        target = {
            path: jax.ShapeDtypeStruct(shape, to, sharding=shardings[path] or default)
            for path, shape in expected.items()
        }
        try:
            weights = checkpointer.restore(folder / ARRAYS, hf.unflatten(target))
        except Exception as error:
            raise _damaged(folder, error) from error
    return Params(weights, dataclasses.replace(config, dtype=to.name), str(folder))


def _damaged(folder: Path, error: Exception) -> ValueError:
    return ValueError(
        f"The Orbax arrays in {folder / ARRAYS} cannot be read ({first_line(error)[:200]}); the "
        "folder is damaged or not complete. Copy or convert it again."
    )
