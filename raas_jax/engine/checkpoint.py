"""An engine on disk: the decode state as Orbax arrays, the host's book as JSON beside it.

    folder/<number>/state    arrays
    folder/<number>/book     requests, rows, results not yet given out

A save appears under its number only once it is complete; the last two are kept. The book has a
digest of itself, of the arrays and of the model, so that what was damaged since is recognised.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from raas_jax import checks, files, identity, policies
from raas_jax.decode import DecodeState
from raas_jax.files import Fields, FileError
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Allotment, Policy
from raas_jax.saved_state import as_arrays, read_arrays
from raas_jax.suited import suited

COUNTS = ("max_new_tokens", "max_prompt_tokens", "samples", "sync_every", "prefill_rows")
STATE, HOST_STATE = "state", "book"
VERSION = 3  # Of what is saved; 1 had other names, 2 no digests.


class Saver:
    """Saves into one folder, in the background."""

    def __init__(self, folder: str | Path, every: float):
        """Makes the folder. Raises FileError for a file, OSError if it cannot be made."""
        import orbax.checkpoint as ocp

        path = Path(folder).expanduser()
        if path.exists() and not path.is_dir():
            raise FileError(folder, "is a file; give a folder to save in.")
        self._arguments = ocp.args
        self._every = every
        # What a killed process had begun to write is removed.
        options = ocp.CheckpointManagerOptions(max_to_keep=2, cleanup_tmp_directories=True)
        self._manager = ocp.CheckpointManager(
            path.absolute(), options=options, item_names=(STATE, HOST_STATE)
        )
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
        arrays = as_arrays(state)
        host_state = _plain(
            {**host_state, "version": VERSION, "arrays": identity.of_arrays(arrays)}
        )
        host_state["digest"] = identity.of_json(host_state)
        self._number += 1
        self._manager.save(
            self._number,
            args=self._arguments.Composite(
                **{
                    STATE: self._arguments.StandardSave(arrays),
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
      FileNotFoundError: there is none. FileError: another version wrote it, or it is damaged.
    """
    newest = _newest(folder)
    try:
        host_state = files.read_fields(newest / HOST_STATE / "metadata")
    except (ValueError, OSError) as error:
        raise damaged(newest, error) from error
    said = Fields(host_state, newest)
    version = said.integer("version", 1, default=1)
    if version != VERSION:
        raise FileError(
            folder,
            f"was saved by another version of raas_jax (its format is {version}, here it is "
            f"{VERSION}); finish it with that version, or start anew.",
        )
    if host_state.pop("digest", None) != identity.of_json(host_state):
        raise damaged(newest, "its digest is another one")
    options = said.inner("options")
    options.integer("rows", 1, checks.MOST_ROWS)
    for name in COUNTS:
        options.integer(name, 1, checks.MOST_TOKENS)
    if odd := sorted(options.values.keys() ^ {"rows", "stop_token_ids", *COUNTS}):
        raise options.error(f"options have {', '.join(odd)}, or lack it")
    for name in ("policy", "model", "schedule", "usage"):
        said.inner(name)
    said.text("arrays")
    return host_state


def damaged(save: str | Path, why: object) -> FileError:
    """The error for a save that cannot be used."""
    what = f"is a damaged save of an engine ({checks.first_line(why)})"
    return FileError(save, f"{what}; remove it to go on from the one before it.")


def read_state(folder: str | Path, shape: DecodeState, digest: str) -> DecodeState:
    """The state of the last complete save, with the shapes and shardings of `shape`.

    Raises FileError if it is not there, or its arrays do not have this digest.
    """
    newest = _newest(folder)
    try:
        return read_arrays(newest / STATE, shape, digest)
    except (ValueError, OSError) as error:
        raise damaged(newest, error) from error


def _newest(folder: str | Path) -> Path:
    """The folder of the last complete save. Raises FileNotFoundError if there is none."""
    path = Path(folder).expanduser().absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of a saved engine; there is none.")
    # What is being written has another name until it is complete.
    numbers = [int(each.name) for each in path.iterdir() if each.name.isdecimal()]
    if not numbers:
        raise FileNotFoundError(f"{folder} holds no complete save of an engine.")
    return path / str(max(numbers))


def describe(policy: Policy) -> dict[str, Any]:
    """A policy as JSON values."""
    options = {
        name: value.described() if isinstance(value, Allotment) else value
        for name, value in policy.options().items()
    }
    return {"kind": type(policy).__name__, "options": options}


def policy_of(
    host_state: dict[str, Any], given: Policy | None, params: Params, folder: str | Path
) -> Policy:
    """The policy of a save, which suits the model; `given`, if that is it.

    Raises:
      ValueError: it is another one, or one that has to be given.
    """
    saved = host_state["policy"]
    kind, said = saved.get("kind"), saved.get("options")
    if not isinstance(kind, str) or not isinstance(said, dict):
        raise damaged(folder, f"its policy is {checks.short(saved)}")
    if given is None:
        kinds = {policies.by_name(name).__name__: name for name in policies.available()}
        if kind not in kinds:
            raise ValueError(
                f"{folder} has the policy {kind}, which raas_jax.policies does not know by name; "
                f"give policy={kind}(...)."
            )
        options: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in said.items()
        }
        try:
            if "allotment" in options:
                options["allotment"] = Allotment.of(options["allotment"])
            given = suited(policies.create(kinds[kind], **options), params)
            given.check_model(params.config)
        except (TypeError, ValueError) as error:
            raise damaged(folder, error) from error
    if _plain(describe(given)) != saved:
        raise ValueError(
            f"policy is {given!r}; {folder} was saved with {saved}. Give that one, or none."
        )
    return given


def pools_of(plan: Plan) -> list[Any]:
    """Where the pages of each group's heads lie, as JSON values; None where all have as many."""
    ranges = [group.ranges for group in plan.groups]
    return [each and {"counts": each.counts, "parts": each.parts} for each in ranges]


def check_pools(host_state: dict[str, Any], plan: Plan, folder: str | Path) -> None:
    """Raises ValueError if the pages of a save lie elsewhere than this plan's would."""
    here = _plain(pools_of(plan))
    if host_state.get("pools", [None] * len(here)) != here:
        raise ValueError(
            f"{folder} was saved on a mesh that splits the heads of an allotment otherwise, so "
            "that they have other budgets; restore it on one with the same model axis."
        )


def model_of(params: Params) -> dict[str, Any]:
    """What tells one model from another, as JSON values."""
    return {
        "config": _plain(dataclasses.asdict(params.config)),
        "dtype": params.dtype.name,
        "weights": identity.of_model(params),
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


def _plain(value: Any) -> Any:
    """As it comes back from JSON."""
    return json.loads(json.dumps(value))
