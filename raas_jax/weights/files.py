"""Small things that every kind of checkpoint folder shares."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from raas_jax.files import is_leftover, temporary_name
from raas_jax.params import Params

Shape = tuple[int, ...]
# What belongs to a tokenizer or to the generation defaults, and so travels with the weights.
COMPANIONS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.*"),
)
MOST_LISTED = 50  # problems in one message
STALE_SECONDS = 3600


def write_companions(params: Params, dtype: np.dtype, folder: Path) -> None:
    """Writes config.json for weights of `dtype`, and copies the companions that the source has."""
    config = dataclasses.replace(params.config, dtype=dtype.name)
    (folder / "config.json").write_text(json.dumps(config.to_hf(), indent=2) + "\n")
    if params.source is None:
        return
    for pattern in COMPANIONS:
        for file in Path(params.source).glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)


def misfits(found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> list[str]:
    """A line for every array that is unknown, missing or misshapen."""
    problems = [f"unknown: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [f"missing: {name}" for name in expected if name not in found]
    return problems + [
        f"misshapen: {name} is {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]


def listed(problems: list[str]) -> str:
    """The problems as indented lines, the first of them where they are many."""
    more = [f"and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
    return "".join(f"\n  {line}" for line in [*problems[:MOST_LISTED], *more])


def check_vacant(folder: Path, argument: str) -> None:
    """Raises FileExistsError unless `folder` is absent, or empty but for leftovers of a kill."""
    if folder.exists() and not (folder.is_dir() and all(map(is_leftover, os.listdir(folder)))):
        raise FileExistsError(
            f"{argument} is {str(folder)!r}, which exists and is not an empty folder. "
            "Choose another one, or remove it first."
        )


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the name `folder` only once all of it is written.

    With several processes each must call this; the first one makes and renames the folder. What a
    killed process had begun to write for the same folder, an hour ago or more, is removed.

    Raises:
      FileExistsError: `folder` is there and not empty.
      OSError: it cannot be written, in the words of the operating system.
    """
    target = Path(folder).expanduser()
    check_vacant(target, "folder")
    target = Path(
        os.path.realpath(target)
    )  # A link to an empty folder stays, and its folder is filled.
    first, several = jax.process_index() == 0, jax.process_count() > 1
    partial = target.with_name(_from_first(temporary_name(target.name), several))
    try:
        if first:
            partial.parent.mkdir(parents=True, exist_ok=True)
            _remove_stale(target)
            partial.mkdir()
        _meet("raas_jax: folder made", several)
        yield partial
        _meet("raas_jax: folder written", several)
        if first:
            for leftover in target.iterdir() if target.exists() else ():
                if is_leftover(leftover.name):
                    _remove(leftover)
            os.replace(partial, target)
        _meet("raas_jax: folder renamed", several)
    except OSError as error:
        raise OSError(
            error.errno,
            f"folder is {str(folder)!r}, which cannot be written ({error.strerror or error}). "
            "Choose a folder on a disk with room where you may write",
        ) from error
    finally:
        if first:
            shutil.rmtree(partial, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Removes what killed processes left; what another one still writes has changed of late."""
    for leftover in target.parent.iterdir():
        # The name less its end, ".<16 digits>.tmp".
        if is_leftover(leftover.name) and leftover.name[:-21] == f".{target.name[:200]}":
            with contextlib.suppress(OSError):  # Another process may be at it.
                times = [each.lstat().st_mtime for each in (leftover, *leftover.rglob("*"))]
                if time.time() - max(times) > STALE_SECONDS:
                    _remove(leftover)


def _remove(path: Path) -> None:
    """Removes a file, a folder or a link, but not what the link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _from_first(name: str, several: bool) -> str:
    """The name that the first process has drawn, in all of them."""
    if not several:
        return name
    from jax.experimental import multihost_utils

    encoded = np.frombuffer(os.fsencode(name), np.uint8)
    return os.fsdecode(bytes(np.asarray(multihost_utils.broadcast_one_to_all(encoded))))


def _meet(name: str, several: bool) -> None:
    if several:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
