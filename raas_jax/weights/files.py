"""Small things that every kind of checkpoint folder shares."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from raas_jax.checks import first_line as first_line
from raas_jax.params import Params

Shape = tuple[int, ...]
# What belongs to a tokenizer or to the generation defaults, and so travels with the weights.
COMPANIONS = (
    *("generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.*"),
)


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


def check_vacant(folder: Path, argument: str) -> None:
    """Raises FileExistsError unless `folder` is absent or empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{argument} is {str(folder)!r}, which exists and is not an empty folder. "
            "Choose another one, or remove it first."
        )


@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields a temporary folder that takes the name `folder` only once all of it is written.

    With several processes each must call this; the first one makes and renames the folder.

    Raises:
      FileExistsError: `folder` is there and not empty.
      OSError: it cannot be written, in the words of the operating system.
    """
    folder = Path(folder).expanduser().absolute()
    check_vacant(folder, "folder")
    first, several = jax.process_index() == 0, jax.process_count() > 1
    suffix = "" if several else f"-{os.getpid()}"
    partial = folder.with_name(f".{folder.name}.partial{suffix}")
    try:
        if first:
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        _meet("raas_jax: folder made", several)
        yield partial
        _meet("raas_jax: folder written", several)
        if first:
            os.replace(partial, folder)
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


def _meet(name: str, several: bool) -> None:
    if several:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)
