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

from raas_jax import arrays_on_disk
from raas_jax.config import ModelConfig
from raas_jax.params import Params
from raas_jax.weights import hf
from raas_jax.weights.files import Shape, listed, misfits, new_folder, write_companions

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
        if problems := misfits(arrays_on_disk.read(folder / ARRAYS, shapes), expected):
            what = f"The Orbax arrays in {folder} do not fit its config.json:{listed(problems)}"
            raise ValueError(what)
        to = hf.wanted_dtype(dtype, config.dtype)
        target = hf.unflatten(
            {
                path: jax.ShapeDtypeStruct(shape, to, sharding=shardings[path] or default)
                for path, shape in expected.items()
            }
        )
        weights = arrays_on_disk.read(
            folder / ARRAYS, lambda: checkpointer.restore(folder / ARRAYS, target)
        )
    return Params(weights, dataclasses.replace(config, dtype=to.name), str(folder))
