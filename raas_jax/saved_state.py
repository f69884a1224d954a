"""A decode state as arrays on disk, and back: what Orbax is given, and what it is asked for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax import arrays_on_disk, files, identity
from raas_jax.decode import DecodeState
from raas_jax.files import Fields, FileError
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.weights.files import new_folder

ARRAYS, SAID = "state", "identity.json"
VERSION = 1
"""Of a folder of `save_state`."""


def as_arrays(state: DecodeState) -> DecodeState:
    """What Orbax can store: key data in the place of typed keys, and None of empty arrays."""
    numbers = _with_keys(state, jax.random.key_data(state.rows.sampler.keys))
    arrays: DecodeState = jax.tree.map(lambda leaf: leaf if leaf.size else None, numbers)
    return arrays


def from_arrays(arrays: DecodeState, shape: DecodeState) -> DecodeState:
    """The inverse of `as_arrays`, for a state of this shape."""

    def filled(like: Any, leaf: Any) -> jax.Array:
        found: jax.Array = leaf
        return jnp.zeros(like.shape, like.dtype, device=like.sharding) if leaf is None else found

    state = _with_keys(arrays, jax.random.wrap_key_data(arrays.rows.sampler.keys))
    whole: DecodeState = jax.tree.map(filled, shape, state)
    return whole


def arrays_like(shape: DecodeState) -> DecodeState:
    """What Orbax is asked for: shapes and shardings of `as_arrays` of such a state."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def wanted(leaf: Any) -> jax.ShapeDtypeStruct | None:
        if not leaf.size:
            return None
        like = leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            like = jax.eval_shape(jax.random.key_data, leaf)
        return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=leaf.sharding or here)

    like: DecodeState = jax.tree.map(wanted, shape)
    return like


def save_state(state: DecodeState, folder: str | Path, params: Params, plan: Plan) -> None:
    """Writes a state of this plan into a new folder, which appears only once it is complete.

    Raises:
      FileExistsError: the folder is there and not empty. OSError: it cannot be written.
    """
    import orbax.checkpoint as ocp

    arrays = as_arrays(state)
    said = {
        "version": VERSION,
        "model": identity.of_model(params),
        "plan": _said(plan),
        "arrays": identity.of_arrays(arrays),
    }
    with new_folder(folder) as partial, ocp.StandardCheckpointer() as checkpointer:
        if jax.process_index() == 0:
            files.replace_text(partial / SAID, json.dumps(said) + "\n")
        checkpointer.save(partial / ARRAYS, arrays)


def restore_state(
    folder: str | Path, shape: DecodeState, params: Params, plan: Plan
) -> DecodeState:
    """The state in a folder of `save_state`, with the shapes and shardings of `shape`.

    Raises:
      FileNotFoundError: there is none.
      FileError: it is another model's, plan's or version's, has other shapes, or is damaged.
    """
    path = Path(folder).expanduser().absolute()
    if not (path / ARRAYS).is_dir():
        raise FileNotFoundError(f"folder is {str(folder)!r}, which holds no saved state.")
    said = Fields(files.read_json(path / SAID), path / SAID, remedy="Save the state anew.")
    if said.integer("version", 1) != VERSION:
        raise said.error(f"version is {said.values['version']}; expected {VERSION}")
    if said.text("model") != identity.of_model(params):
        raise FileError(path, "was saved with another model; give params of the same weights.")
    if (there := said.text("plan")) != _said(plan):
        raise FileError(path, f"was saved with another plan, {there}; here it is {_said(plan)}.")
    return read_arrays(path / ARRAYS, shape, said.text("arrays"))


def read_arrays(folder: Path, shape: DecodeState, digest: str) -> DecodeState:
    """A state from its arrays, with the shapes and shardings of `shape`.

    Raises FileError where there are none, others, or damaged ones.
    """
    import orbax.checkpoint as ocp

    like = arrays_like(shape)

    def arrays() -> Any:
        """The arrays; None where they have other shapes, which Orbax would pad or cut."""
        stored = checkpointer.metadata(folder).item_metadata.tree
        shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(stored)]
        same = sorted(shapes) == sorted(leaf.shape for leaf in jax.tree.leaves(like))
        return checkpointer.restore(folder, like) if same else None

    with ocp.StandardCheckpointer() as checkpointer:
        found = arrays_on_disk.read(folder, arrays)
    if found is None:
        what = "holds a state of other shapes; restore it with the plan and the rows of the save."
        raise FileError(folder, what)
    if identity.of_arrays(found) != digest:
        raise FileError(folder, "is damaged: its arrays are not those that were saved.")
    return from_arrays(found, shape)


def _said(plan: Plan) -> str:
    """A plan in words, whatever it is compiled for."""
    return repr(dataclasses.replace(plan, target=None))


def _with_keys(state: DecodeState, keys: Any) -> DecodeState:
    sampler = dataclasses.replace(state.rows.sampler, keys=keys)
    return dataclasses.replace(state, rows=dataclasses.replace(state.rows, sampler=sampler))
