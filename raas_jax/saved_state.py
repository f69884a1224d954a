"""A decode state as arrays on disk, and back: what Orbax is given, and what it is asked for."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax.decode import DecodeState
from raas_jax.weights.files import new_folder

ARRAYS = "state"


def as_arrays(state: DecodeState) -> DecodeState:
    """The state with key data in the place of typed keys, since Orbax stores numbers."""
    return _with_keys(state, jax.random.key_data(state.rows.sampler.keys))


def from_arrays(state: DecodeState) -> DecodeState:
    """The inverse of `as_arrays`."""
    return _with_keys(state, jax.random.wrap_key_data(state.rows.sampler.keys))


def arrays_like(shape: DecodeState) -> DecodeState:
    """What Orbax is asked for: shapes and shardings of `as_arrays` of such a state."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def wanted(leaf: Any) -> jax.ShapeDtypeStruct:
        like = leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            like = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=leaf.sharding or here)

    like: DecodeState = jax.tree.map(wanted, shape)
    return like


def save_state(state: DecodeState, folder: str | Path) -> None:
    """Writes a state into a new folder, which appears only once it is complete.

    Raises:
      FileExistsError: the folder is there and not empty. OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    with new_folder(folder) as partial, ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(partial / ARRAYS, as_arrays(state))


def restore_state(folder: str | Path, shape: DecodeState) -> DecodeState:
    """The state in a folder of `save_state`, with the shapes and shardings of `shape`.

    Raises:
      FileNotFoundError: there is none. ValueError: it has other shapes, or is damaged.
    """
    import orbax.checkpoint as ocp

    path = Path(folder).expanduser().absolute() / ARRAYS
    if not path.is_dir():
        raise FileNotFoundError(f"folder is {str(folder)!r}, which holds no saved state.")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            stored = checkpointer.metadata(path).item_metadata.tree
            shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(stored)]
        except Exception as error:  # Orbax lets through whatever its storage raised.
            raise ValueError(
                f"folder is {str(folder)!r}, which cannot be read ({error})."
            ) from None
        like = arrays_like(shape)
        if sorted(shapes) != sorted(leaf.shape for leaf in jax.tree.leaves(like)):
            raise ValueError(
                f"folder is {str(folder)!r}, whose state has other shapes; restore it with the "
                "plan and the rows that it was saved with."
            )
        return from_arrays(checkpointer.restore(path, like))


def _with_keys(state: DecodeState, keys: Any) -> DecodeState:
    sampler = dataclasses.replace(state.rows.sampler, keys=keys)
    return dataclasses.replace(state, rows=dataclasses.replace(state.rows, sampler=sampler))
