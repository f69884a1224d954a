"""An engine on disk: the decode state as Orbax arrays, the host's book as JSON beside it.

    folder/<number>/state    arrays
    folder/<number>/book     requests, rows, results not yet given out

A save appears under its number only once it is complete; the last two are kept.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from raas_jax import policies
from raas_jax.decode import DecodeState
from raas_jax.params import Params
from raas_jax.policies import Policy
from raas_jax.saved_state import arrays_like, as_arrays, from_arrays

STATE, HOST_STATE = "state", "book"
VERSION = 2  # Of what is saved; 1 had other names.


class Saver:
    """Saves into one folder, in the background."""

    def __init__(self, folder: str | Path, every: float):
        import orbax.checkpoint as ocp

        self._arguments = ocp.args
        self._every = every
        # What a killed process had begun to write is removed.
        self._manager = _manager(folder, create=True, cleanup_tmp_directories=True)
        self._last = time.monotonic()
        self._number = self._manager.latest_step() or 0

    def due(self) -> bool:
        """Whether `every` seconds have passed since the last save; the same in every process."""
        late = time.monotonic() - self._last >= self._every
        if jax.process_count() == 1:
            return late
        from jax.experimental import multihost_utils

        return bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))

    def save(self, state: DecodeState, host_state: dict[str, Any]) -> None:
        """Takes a copy to the host, and writes it while the caller goes on.

        Raises:
          OSError: an earlier save, or this one, could not be written.
        """
        self._number += 1
        self._manager.save(
            self._number,
            args=self._arguments.Composite(
                **{
                    STATE: self._arguments.StandardSave(as_arrays(state)),
                    HOST_STATE: self._arguments.JsonSave(host_state),
                }
            ),
        )
        self._last = time.monotonic()

    def wait(self) -> None:
        """Until what was begun is written. Raises OSError if that failed."""
        self._manager.wait_until_finished()


def read_host_state(folder: str | Path) -> dict[str, Any]:
    """What the host kept at the last complete save.

    Raises:
      FileNotFoundError: there is none. ValueError: another version wrote it.
    """
    import orbax.checkpoint as ocp

    if not Path(folder).is_dir():
        raise FileNotFoundError(f"{folder} is no folder of a saved engine; there is none.")
    with _manager(folder) as manager:
        number = manager.latest_step()
        if number is None:
            raise FileNotFoundError(f"{folder} holds no complete save of an engine.")
        found = manager.restore(
            number, args=ocp.args.Composite(**{HOST_STATE: ocp.args.JsonRestore()})
        )
    host_state: dict[str, Any] = found[HOST_STATE]
    if host_state.get("version") != VERSION:
        raise ValueError(
            f"{folder} was saved by another version of raas_jax (its format is "
            f"{host_state.get('version', 1)}, here it is {VERSION}); finish it with that version, "
            "or start anew."
        )
    return host_state


def read_state(folder: str | Path, shape: DecodeState) -> DecodeState:
    """The state of the last complete save, with the shapes and shardings of `shape`."""
    import orbax.checkpoint as ocp

    with _manager(folder) as manager:
        arguments = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(arrays_like(shape))})
        return from_arrays(manager.restore(manager.latest_step(), args=arguments)[STATE])


def describe(policy: Policy) -> dict[str, Any]:
    """A policy as JSON values."""
    return {"kind": type(policy).__name__, "options": dataclasses.asdict(policy)}


def policy_of(host_state: dict[str, Any], given: Policy | None) -> Policy:
    """The policy of a save; `given`, if that is it.

    Raises:
      ValueError: it is another one, or one that has to be given.
    """
    saved = host_state["policy"]
    if given is None:
        kinds = {policies.by_name(name).__name__: name for name in policies.available()}
        if saved["kind"] not in kinds:
            raise ValueError(
                f"The save has the policy {saved['kind']}, which raas_jax.policies does not know "
                f"by name; give policy={saved['kind']}(...)."
            )
        options = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in saved["options"].items()
        }
        given = policies.create(kinds[saved["kind"]], **options)
    if _plain(describe(given)) != saved:
        raise ValueError(f"policy is {given!r}; the save has {saved}. Give that one, or none.")
    return given


def model_of(params: Params) -> dict[str, Any]:
    """What tells one model from another, as JSON values."""
    first = np.asarray(params.weights["norm"], np.float64)
    return {
        "config": _plain(dataclasses.asdict(params.config)),
        "dtype": params.dtype.name,
        "norm": float(first.sum()),
    }


def check_model(host_state: dict[str, Any], params: Params, folder: str | Path) -> None:
    """Raises ValueError if a save belongs to another model."""
    here, there = model_of(params), host_state["model"]
    names = [name for name in here if here[name] != there.get(name)]
    if names:
        raise ValueError(
            f"{folder} was saved with another model ({', '.join(names)} differ); give params of "
            "the same weights."
        )


def _manager(folder: str | Path, **options: Any) -> Any:
    import orbax.checkpoint as ocp

    chosen = ocp.CheckpointManagerOptions(max_to_keep=2, **{"create": False, **options})
    return ocp.CheckpointManager(
        Path(folder).expanduser().absolute(), options=chosen, item_names=(STATE, HOST_STATE)
    )


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    import json

    return json.loads(json.dumps(value))
