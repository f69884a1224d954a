"""Options that several commands share, and how they become the library's objects."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro
import yaml

from raas_jax import policies
from raas_jax.config import ModelConfig
from raas_jax.sampling import Sampling

# Options that are left to the library's defaults; "None" in a help text would explain nothing.
Int = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Float = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"] | None,
    tyro.conf.arg(metavar="{float32,bfloat16,float16}", help_behavior_hint=""),
]


@dataclasses.dataclass
class PolicyOptions:
    """Which keys and values to keep."""

    policy: Annotated[
        str, tyro.conf.arg(metavar="NAME", help=f"One of {', '.join(policies.available())}.")
    ] = "raas"
    budget: Int = None
    """Tokens kept for each sequence, layer and key/value head; raas: 1024."""
    page_size: Int = None
    """Tokens per page, the unit that is kept or forgotten; 16."""
    alpha: Float = None
    """raas: a page with a larger share of the attention is in use; 1e-4."""
    top_fraction: Float = None
    """raas: instead of alpha, this share of the pages is in use."""
    score: Annotated[
        Literal["mass", "bound"] | None,
        tyro.conf.arg(metavar="{mass,bound}", help_behavior_hint=""),
    ] = None
    """raas: exact attention (mass), or the paper's upper bound; mass."""
    share: Annotated[
        Literal["kv_head", "layer"] | None,
        tyro.conf.arg(metavar="{kv_head,layer}", help_behavior_hint=""),
    ] = None
    """raas: decide per key/value head or once per layer; kv_head."""
    prompt_pages: Annotated[
        Literal["beside", "within"] | None,
        tyro.conf.arg(metavar="{beside,within}", help_behavior_hint=""),
    ] = None
    """raas: is the prompt beside the budget or within it, as in the paper; beside."""
    dense_layers: Int = None
    """raas: this many first layers keep everything; 0."""

    def create(self) -> policies.Policy:
        """The policy with the options that were given.

        Raises ValueError for an unknown policy, and for an option that it does not have.
        """
        kind = policies.by_name(self.policy)
        given = {name: value for name, value in vars(self).items() if value is not None}
        del given["policy"]
        if "prompt_pages" in given:
            given["prompt"] = given.pop("prompt_pages")
        known = {field.name for field in dataclasses.fields(kind)}
        for name in given:
            if name not in known:
                flag = "prompt-pages" if name == "prompt" else name.replace("_", "-")
                raise ValueError(
                    f"--{flag} is not an option of the policy {self.policy}; leave it out."
                )
        return kind(**given)


@dataclasses.dataclass
class SamplingOptions:
    """How the next token is drawn."""

    temperature: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 0.0
    """0 is greedy."""
    top_k: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """Only the k likeliest tokens; 0 is all."""
    top_p: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 1.0
    """Only the likeliest tokens that reach this probability together."""
    min_p: Annotated[float, tyro.conf.arg(metavar="FLOAT")] = 0.0
    """Only tokens at least this likely relative to the likeliest."""
    seed: Annotated[int, tyro.conf.arg(metavar="INT")] = 0
    """The same seed gives the same text."""

    def create(self) -> Sampling:
        """The settings. Raises ValueError for one that is out of range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


def read_config(file: str, layers: int | None = None) -> ModelConfig:
    """The model's shape from a Hugging Face config.json, its folder, or YAML with the same fields.

    A YAML file may hold the shape under `model:`, as the training configurations do.

    Args:
      file: the path.
      layers: replaces the number of layers.

    Raises:
      FileNotFoundError: there is no such file. ValueError: it is not such a configuration.
    """
    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        config = ModelConfig.from_file(path)
    else:
        if not path.is_file():
            raise FileNotFoundError(f"--config is {file!r}; there is no such file.")
        try:
            fields = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is not valid YAML ({error}).") from error
        if not isinstance(fields, dict):
            raise ValueError(f"{file} holds a {type(fields).__name__}; expected named fields.")
        config = ModelConfig.from_hf(fields.get("model", fields))
    return config if layers is None else dataclasses.replace(config, num_hidden_layers=layers)


def readable_bytes(count: float) -> str:
    """`3.1 MiB`: three digits or so, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
