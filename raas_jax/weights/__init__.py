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

from raas_jax.model import separate
from raas_jax.params import Params
from raas_jax.weights.files import check_vacant
from raas_jax.weights.hf import Shardings, load_hf, save_hf
from raas_jax.weights.orbax import is_orbax, load_orbax, save_orbax

__all__ = ["convert", "load", "load_hf", "load_orbax", "save_hf", "save_orbax"]

DEMO = Path(__file__).resolve().parent.parent / "demo"
# All that is ever downloaded: no pickles, no code, no second copy in another format.
DOWNLOADED = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
)
LAYERS: dict[str, Literal["stacked", "separate"]] = {}
"""How layers are stored on a backend where that is not "stacked"; decided once, as they are
loaded."""
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
      layers: how the layers are stored. "stacked" layers are scanned, so that compile time does not
        grow with depth; "separate" ones are unrolled. None is what suits the backend.

    Returns:
      `Params`, with `source` the folder in which its tokenizer is found.

    Raises:
      FileNotFoundError: nothing found; the message names what was tried, and near matches.
      ValueError: an unsupported model, damaged files, or tensors that do not fit the model.
    """
    folder = locate(source)
    reader = load_orbax if is_orbax(folder) else load_hf
    check_layers(layers)
    params = reader(folder, dtype=dtype, sharding=sharding)
    if (layers or LAYERS.get(jax.default_backend(), "stacked")) == "stacked":
        return params
    weights = separate(params.weights, consume=True)
    return dataclasses.replace(params, weights=weights)


def check_layers(layers: str | None) -> None:
    """Raises ValueError for a way to store layers that does not exist."""
    if layers not in (None, "stacked", "separate"):
        raise ValueError(f"layers is {layers!r}; expected 'stacked', 'separate' or None.")


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
    writers[to](load(folder, dtype=dtype), target)


def locate(source: str | os.PathLike[str]) -> Path:
    """The local folder of a source, downloaded first where it is a hub id."""
    if not isinstance(source, str | os.PathLike) or not os.fspath(source):
        raise ValueError(
            f"source is {source!r}; expected a hub id, a folder, or 'demo', as a string or a path."
        )
    name = os.fspath(source)
    if name == "demo":
        if not DEMO.is_dir():
            raise FileNotFoundError(f"The demo model is not in this installation ({DEMO}).")
        return DEMO
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise FileNotFoundError(
            f"source is {name!r}, which is a file; give the folder with its config.json."
        )
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
        return Path(snapshot_download(name, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".") + "."
        raise FileNotFoundError(
            f"source is {name!r}; tried the folder {Path(name).absolute()}, which does not exist, "
            f"and the Hugging Face hub: {reason}{_near(name)} Check the name and the connection; "
            "for a model with restricted access, log in with `hf auth login`."
        ) from error


def _near(name: str) -> str:
    """The names on this machine that are close to one that was not found, as a sentence."""
    parent = Path(name).expanduser().absolute().parent
    folders = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(name).name, folders)
    near = [str(Path(name).parent / match) for match in near]
    near += difflib.get_close_matches(name, ["demo", *_cached()])
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _cached() -> list[str]:
    """Hub ids in the local cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    prefix = "models--"
    folders = Path(HF_HUB_CACHE).glob(prefix + "*")
    return [folder.name.removeprefix(prefix).replace("--", "/") for folder in folders]
