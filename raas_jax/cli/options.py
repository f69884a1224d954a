"""Options that several commands share, and how they become the library's objects."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from raas_jax import policies
from raas_jax.config import ModelConfig, read_yaml
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
        str,
        tyro.conf.arg(
            metavar="NAME[:OPTION=VALUE...]",
            help=f"One of {', '.join(policies.available())}; or your own, as file.py:MyPolicy.",
        ),
    ] = "raas"
    policy_option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="OPTION=VALUE")
    ] = ()
    """Any other option of the policy, such as recent=64; may be repeated. A wrong one lists all."""
    budget: Int = None
    """Tokens kept for each sequence, layer and key/value head; 1024."""
    page_size: Int = None
    """Tokens per page, the unit that is kept or forgotten; 16."""
    share: Annotated[
        Literal["kv_head", "layer"] | None,
        tyro.conf.arg(metavar="{kv_head,layer}", help_behavior_hint=""),
    ] = None
    """Decide per key/value head or once per layer; kv_head (tova: layer)."""
    prompt_pages: Annotated[
        Literal["excluded", "included", "evict"] | None,
        tyro.conf.arg(metavar="{beside,within,evict}", help_behavior_hint=""),
    ] = None
    """The prompt is kept beside the budget, or within it, or (h2o, sink, tova) may go as published;
    beside."""
    dense_layers: Int = None
    """This many first layers keep everything; 0."""
    alpha: Float = None
    """raas, lazy_eviction: a page with a larger share of the attention is in use (paper: 1e-4)."""
    top_fraction: Float = None
    """raas: this share of the pages is in use, those of the most attention; 0.25."""
    score: Annotated[
        Literal["mass", "bound"] | None,
        tyro.conf.arg(metavar="{mass,bound}", help_behavior_hint=""),
    ] = None
    """raas: exact attention (mass), or the paper's upper bound; mass."""

    def create(self) -> policies.Policy:
        """The policy with the options that were given.

        Raises ValueError for an unknown policy or option (near matches), and for a wrong value.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        spec = ":".join([given.pop("policy"), *given.pop("policy_option")])
        for pair in self.policy_option:
            if "=" not in pair:
                raise ValueError(f"--policy-option is {pair!r}; write OPTION=VALUE.")
        if "prompt_pages" in given:
            given["prompt"] = given.pop("prompt_pages")
        known = {field.name for field in dataclasses.fields(_kind(spec))}
        for name in set(given) - known:
            flag = "prompt-pages" if name == "prompt" else name.replace("_", "-")
            raise ValueError(
                f"--{flag} is not an option of the policy {self.policy}; leave it out."
            )
        return policies.parse(spec, **given)


def parse_policies(names: str, budgets: str, page_size: int | None) -> list[policies.Policy]:
    """Every named policy, once for each budget if it has one.

    Args:
      names: separated by commas, each with options, as in
        `dense,raas:alpha=0.01:granularity=layer`.
      budgets: whole numbers, separated by commas.
      page_size: of all policies that do not name their own; None is each one's default.

    Raises:
      ValueError: for an unknown policy or option (near matches), and for a wrong value.
    """
    sizes = _whole_numbers(budgets)
    found: list[policies.Policy] = []
    for spec in split_names(names):
        given: dict[str, int] = {}
        if page_size is not None and not _names(spec, "page_size"):
            given["page_size"] = page_size
        has_budget = any(field.name == "budget" for field in dataclasses.fields(_kind(spec)))
        if has_budget and not _names(spec, "budget"):
            found += [policies.parse(spec, budget=budget, **given) for budget in sizes]
        else:
            found.append(policies.parse(spec, **given))
    if not found:
        raise ValueError(f"--policies is {names!r}; name at least one, as in dense,raas.")
    return found


def _kind(spec: str) -> type[policies.Policy]:
    return policies.by_name(":".join(part for part in spec.split(":") if "=" not in part))


def _names(spec: str, option: str) -> bool:
    parts = (part.partition("=")[0].strip().replace("-", "_") for part in spec.split(":")[1:])
    return option in parts


def _whole_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in split_names(text)]
    except ValueError:
        raise ValueError(f"--budgets is {text!r}; write for example 32,64,128.") from None


def split_names(text: str) -> list[str]:
    """What stands between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


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
        fields = read_yaml(path)
        config = ModelConfig.from_hf(fields.get("model", fields))
    return config if layers is None else dataclasses.replace(config, num_hidden_layers=layers)


def readable_bytes(count: float) -> str:
    """`3.1 MiB`: three digits or so, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
