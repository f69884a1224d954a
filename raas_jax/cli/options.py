"""Options that several commands share, and how they become the library's objects."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

import tyro

from raas_jax import checks, files
from raas_jax.config import ModelConfig
from raas_jax.lab.limits import MOST_DEFINITIONS, MOST_PROBLEMS, MOST_ROWS, MOST_TURNS, SEEDS

if TYPE_CHECKING:
    from raas_jax.policies import Policy
    from raas_jax.sampling import Sampling


def unset(metavar: str, default: str = "", **more: Any) -> Any:
    """An option that None leaves to the library, whose own default the help text shows."""

    def hint(value: str) -> str:
        shown = default if value == "None" else value
        return f"(default: {shown})" if shown else ""

    return tyro.conf.arg(metavar=metavar, help_behavior_hint=hint, **more)


class Within(NamedTuple):
    """The range of a number, checked before a command begins."""

    least: float
    most: float


def check_ranges(options: Any) -> None:
    """Raises ValueError for a number of a command, or of one of its groups, out of its range."""
    for name, hint in get_type_hints(type(options), include_extras=True).items():
        value, flag = getattr(options, name), "--" + name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            check_ranges(value)
        for within in (each for each in get_args(hint) if isinstance(each, Within)):
            if isinstance(value, float):
                wanted = f"a number from {within.least:g} to {within.most:g}"
                checks.real(flag, value, wanted, within.least, within.most)
            elif isinstance(value, int):
                checks.integer(flag, value, int(within.least), int(within.most))


Tokens = Annotated[int, Within(1, checks.MOST_TOKENS)]
Rows = Annotated[int, Within(1, MOST_ROWS)]
Problems = Annotated[int, Within(1, MOST_PROBLEMS)]
Turns = Annotated[int, Within(1, MOST_TURNS)]
Layers = Annotated[int | None, unset("INT"), Within(1, 10_000)]
File = Annotated[str | None, unset("FILE")]
PageSize = Annotated[int | None, unset("INT", "16"), Within(1, checks.MOST_TOKENS)]
MaxNewTokens = Annotated[int | None, unset("INT", aliases=["-n"]), Within(1, checks.MOST_TOKENS)]
Definitions = Annotated[str, tyro.conf.arg(metavar="FROM-TO")]
SOURCE = "Hub id, Hugging Face or Orbax folder, or demo."
Model = Annotated[str, tyro.conf.arg(aliases=["-m"], metavar="SOURCE", help=SOURCE)]
DTYPE = "Data type of the weights; by default bfloat16 on accelerators, float32 on CPUs."
DtypeName = Literal["float32", "bfloat16", "float16"]
Dtype = Annotated[DtypeName | None, unset("{float32,bfloat16,float16}", help=DTYPE)]
TEXTS = "Text files, or JSONL of questions and answers; by default Python's own sources and manual."
Texts = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="[KIND=]FILE ...", help=TEXTS, help_behavior_hint="(default: sources, manual)"
    ),
]
MESH = "Devices that split rows (data) and heads (model), as in data=4,model=2, or 4x2 for short."
Mesh = Annotated[str | None, unset("data=INT,model=INT", help=MESH)]


def policy_help() -> str:
    """The help text of `--policy`, asked for only where it is shown."""
    from raas_jax.policies import available

    return f"Name of the policy: {', '.join(available())}; or your own, as file.py:MyPolicy."


@dataclasses.dataclass
class PolicyOptions:
    """Which keys and values to keep."""

    policy: Annotated[str, tyro.conf.arg(metavar="NAME[:OPTION=VALUE...]", help=policy_help())] = (
        "raas"
    )
    policy_option: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="OPTION=VALUE")
    ] = ()
    """Any other option of the policy, such as recent=64; a wrong one lists all."""
    budget: Annotated[int | None, unset("INT", "1024")] = None
    """Tokens kept for each sequence, layer and key/value head."""
    page_size: PageSize = None
    """Tokens per page, the unit that is kept or forgotten."""
    granularity: Annotated[
        Literal["kv_head", "layer"] | None, unset("{kv_head,layer}", "kv_head; tova: layer")
    ] = None
    """Decide per key/value head, or once per layer."""
    prompt_pages: Annotated[
        Literal["excluded", "included", "evict"] | None,
        unset("{excluded,included,evict}", "excluded"),
    ] = None
    """Keep the prompt on top of the budget, as part of it, or evict it too (h2o, sink, tova)."""
    allotment: Annotated[str | None, unset("FILE|auto", "the same for all")] = None
    """Gives each layer and head a budget of its own, of mean --budget; made by raas-jax allot."""
    dense_layers: Annotated[int | None, unset("INT", "0")] = None
    """Number of first layers that keep everything."""
    alpha: Annotated[float | None, unset("FLOAT")] = None
    """Share of the attention above which a page is in use (raas, lazy_eviction; paper: 1e-4)."""
    top_fraction: Annotated[float | None, unset("FLOAT", "0.25")] = None
    """Share of the pages that are in use, those of the most attention (raas)."""
    score: Annotated[Literal["mass", "bound"] | None, unset("{mass,bound}", "mass")] = None
    """Attention of a page: exact (mass), or the paper's upper bound (raas)."""

    def create(self) -> Policy:
        """The policy. Raises ValueError for an unknown policy or option, or a wrong value."""
        from raas_jax import policies

        given = {name: value for name, value in vars(self).items() if value is not None}
        spec = ":".join([given.pop("policy"), *given.pop("policy_option")])
        for pair in self.policy_option:
            if "=" not in pair:
                raise ValueError(f"--policy-option is {pair!r}; write OPTION=VALUE.")
        if "prompt_pages" in given:
            given["prompt"] = given.pop("prompt_pages")
        try:
            return policies.parse(spec, **given)
        except ValueError as error:
            if self.prompt_pages is None:
                raise
            raise ValueError(re.sub("^prompt is", "--prompt-pages is", str(error))) from error


def parse_policies(
    names: str, budgets: str, page_size: int | None, more: Mapping[str, type[Policy]] = {}
) -> list[Policy]:
    """Every named policy, once for each budget if it has one.

    Args:
      names: names with commas, each with options, as in `dense,raas:alpha=0.01:granularity=layer`.
      budgets: whole numbers with commas.
      page_size: tokens per page where a policy does not name its own; None is its default.
      more: policies that have a name here beside the available ones.

    Raises:
      ValueError: for an unknown policy or option (near matches), and for a wrong value.
    """
    from raas_jax import policies

    sizes = whole_numbers("--budgets", budgets, "32,64,128")
    found: list[Policy] = []
    for spec in split_names(names):
        own = {part.partition("=")[0].strip().replace("-", "_") for part in spec.split(":")[1:]}
        given = {} if page_size is None or "page_size" in own else {"page_size": page_size}
        kind = policies.by_name(":".join(part for part in spec.split(":") if "=" not in part), more)
        has_budget = any(field.name == "budget" for field in dataclasses.fields(kind))
        if has_budget and "budget" not in own:
            found += [policies.parse(spec, more, budget=budget, **given) for budget in sizes]
        else:
            found.append(policies.parse(spec, more, **given))
    if not found:
        raise ValueError(f"--policies is {names!r}; name at least one, as in dense,raas.")
    return found


def whole_numbers(flag: str, text: str, example: str) -> list[int]:
    """`32,64` → `[32, 64]`. Raises ValueError, with flag and example, for anything else."""
    try:
        numbers = [int(part) for part in split_names(text)]
    except ValueError:
        raise ValueError(f"{flag} is {checks.short(text)}; write for example {example}.") from None
    return [checks.integer(flag, number, 1, checks.MOST_TOKENS) for number in numbers]


def parse_range(text: str) -> tuple[int, int]:
    """`24-48`, or `64` for 64-64. Raises ValueError."""
    found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
    smallest, largest = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= smallest <= largest <= MOST_DEFINITIONS:
        raise ValueError(
            f"--definitions is {checks.short(text)}; write for example 24-48, or 64, at most "
            f"{MOST_DEFINITIONS}."
        )
    return smallest, largest


def check_out(flag: str, file: str) -> None:
    """Raises ValueError for a file that could not be written, before anything is computed."""
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} is {file!r}; give a file in a folder that is there.")
    try:
        tempfile.TemporaryFile(dir=path.absolute().parent).close()
    except OSError as error:
        why = f"nothing can be written into its folder ({error.strerror})"
        raise ValueError(f"{flag} is {file!r}, but {why}; give another.") from None


def split_names(text: str) -> list[str]:
    """The parts between the commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def parse_mesh(text: str | None) -> dict[str, int]:
    """`data=2,model=4`, or `2x4`, as arguments of `make_mesh`. Raises ValueError."""
    if text is None:
        return {}
    short = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text.strip())
    parts = [f"data={short[1]}", f"model={short[2]}"] if short else split_names(text)
    found = [re.fullmatch(r"(data|model)=([1-9]\d{0,5})", part) for part in parts]
    sizes = {each[1]: int(each[2]) for each in found if each}
    if not parts or len(sizes) < len(parts):
        raise ValueError(f"--mesh is {text!r}; write for example data=2,model=4, or 2x4.")
    return sizes


@dataclasses.dataclass
class SamplingOptions:
    """How the next token is drawn."""

    temperature: float = 0.0
    """Temperature of the draw; 0 is greedy."""
    top_k: int = 0
    """Draw from this many likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that reach this probability together."""
    min_p: float = 0.0
    """Draw from the tokens at least this likely relative to the likeliest."""
    seed: Annotated[int, Within(*SEEDS)] = 0
    """Seed of the draws; the same one gives the same text."""

    def create(self) -> Sampling:
        """The settings. Raises ValueError for one that is out of range."""
        from raas_jax.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p)


def read_config(file: str, layers: int | None = None) -> ModelConfig:
    """The model's shape from a Hugging Face config.json, its folder, or YAML with the same fields.

    A YAML file may hold the shape under `model:`, as the training configurations do.

    Args:
      file: path of the file or folder.
      layers: number of layers, in place of the one in the file.

    Raises:
      FileNotFoundError: there is no such file. ValueError: it is not such a configuration.
    """
    path = Path(file)
    if path.suffix not in (".yaml", ".yml"):
        config = ModelConfig.from_file(path)
    else:
        fields = files.read_yaml(path)
        config = ModelConfig.from_hf(fields.get("model", fields), path)
    return config if layers is None else config.with_layers(layers)


def readable_bytes(count: float) -> str:
    """`3.1 MiB`: three digits or so, in binary units."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
