"""Weights from anywhere: a hub id, a Hugging Face folder, an Orbax folder, or the demo."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from pathlib import Path
from typing import Literal

import jax
from jax.typing import DTypeLike

from raas_jax import checks
from raas_jax.model import separate
from raas_jax.params import Params
from raas_jax.weights.files import COMPANIONS, check_vacant
from raas_jax.weights.finite import check_finite
from raas_jax.weights.hf import ADAPTER, INDEX, SINGLE, Shardings, load_hf, save_hf
from raas_jax.weights.orbax import is_orbax, load_orbax, save_orbax

__all__ = ["convert", "load", "load_hf", "load_orbax", "save_hf", "save_orbax"]

DEMO = Path(__file__).resolve().parent.parent / "demo"
# All that is ever downloaded: no pickles, no code, no second copy in another format. An adapter is
# refused, and so it has to be seen.
DOWNLOADED = ["config.json", *ADAPTER, SINGLE, "model-*-of-*.safetensors", INDEX, *COMPANIONS]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load(
    source: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    sharding: Shardings = None,
    layers: Literal["stacked", "separate"] | None = None,
) -> Params:
    """Loads a model.

    Args:
      source: a hub id ("Qwen/Qwen2.5-Math-7B-Instruct"; cached files are used where they are
        complete), a local Hugging Face folder, an Orbax folder of `convert`, or "demo". A local
        folder goes before a hub id of the same name; a folder called demo is "./demo".
      dtype: float32, float16 or bfloat16; "source" keeps that of the files; None is bfloat16 on an
        accelerator and float32 on a CPU.
      sharding: None for the default device; a `jax.sharding.Mesh`, on which the weights lie by
        their logical axes; one `Sharding` for every array; a tree of them in the structure of
        `Params.weights`; or a function from the config to any of these.
      layers: how the layers are stored: "stacked" in one array of each kind, or "separate", which a
        CPU decodes faster, since XLA copies there what it takes out of a stack. None is "separate"
        on a CPU, where no sharding is given, and "stacked" elsewhere.

    Returns:
      `Params`, with `source` the folder in which its tokenizer is found.

    Raises:
      FileNotFoundError: nothing found; the message names what was tried, and near matches.
      ValueError: an unsupported model, damaged files, tensors that do not fit the model, or weights
        that are not finite. Where it is about one file, it is a `raas_jax.files.FileError`.
    """
    if layers not in (None, "stacked", "separate"):
        raise ValueError(f"layers is {layers!r}; expected 'stacked', 'separate' or None.")
    folder = locate(source)
    if layers is None:
        layers = "separate" if sharding is None and separates() else "stacked"
    if is_orbax(folder):
        params = load_orbax(folder, dtype=dtype, sharding=sharding)
        if layers == "separate":
            weights = separate(params.weights, consume=True)
            params = dataclasses.replace(params, weights=weights)
    else:
        params = load_hf(folder, dtype=dtype, sharding=sharding, layers=layers)
    check_finite(params)
    return params


def separates() -> bool:
    """Whether `load` stores layers separately where nothing is said."""
    return jax.default_backend() == "cpu"


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    to: str | None = None,
    dtype: DTypeLike | None = "source",
) -> None:
    """Converts between formats; by default from Hugging Face to Orbax, or back to safetensors.

    Args:
      src: anything that `load` takes.
      dst: the new folder; it appears only once it is complete.
      to: "orbax", "hf", or None for the format that `src` does not have.
      dtype: as for `load`, but kept as it is by default.

    Raises:
      ValueError: an unknown `to`, or whatever `load` raises.
      FileExistsError: `dst` is there and not empty. OSError: it cannot be written.
    """
    writers = {"orbax": save_orbax, "hf": save_hf}
    if to is not None and to not in writers:
        raise ValueError(f"to is {to!r}; expected 'orbax', 'hf' or None.")
    target = Path(dst).expanduser()
    check_vacant(target, "dst")
    folder = locate(src)
    to = to or ("hf" if is_orbax(folder) else "orbax")
    writers[to](load(folder, dtype=dtype, layers="stacked"), target)


def locate(source: str | os.PathLike[str]) -> Path:
    """The local folder of a source, downloaded first where it is a hub id."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(f"source is {source!r}; expected a hub id, a folder or 'demo', as text.")
    name = os.fspath(source)
    if name == "demo":
        if not DEMO.is_dir():
            raise FileNotFoundError(f"The demo model is not in this installation ({DEMO}).")
        return DEMO
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(f"source is {name!r}, which is a file; give the folder it is in.")
    if isinstance(source, str) and _HUB_ID.fullmatch(name):
        return _download(name)
    raise FileNotFoundError(
        f"source is {name!r}; tried the folder {path.absolute()}, which does not exist, and it is "
        f"not a hub id (owner/name).{_near(name)}"
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=DOWNLOADED))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = checks.first_line(error).rstrip(".") + "."
        raise FileNotFoundError(
            f"source is {name!r}; tried the folder {Path(name).absolute()}, which does not exist, "
            f"and the Hugging Face hub: {reason}{_near(name)} Check the name and the connection; "
            "for a model with restricted access, log in with `hf auth login`."
        ) from error


def _near(name: str) -> str:
    """The names on this machine that are close to one that was not found, as a sentence."""
    from huggingface_hub.constants import HF_HUB_CACHE

    parent = Path(name).expanduser().absolute().parent
    folders = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    close = difflib.get_close_matches(Path(name).name, folders)
    near = [str(Path(name).parent / match) for match in close]
    cached = (p.name.removeprefix("models--") for p in Path(HF_HUB_CACHE).glob("models--*"))
    near += difflib.get_close_matches(name, ["demo", *(p.replace("--", "/") for p in cached)])
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
