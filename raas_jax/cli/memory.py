"""`raas-jax memory`: what a run takes, without running it."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from raas_jax.cli import options

if TYPE_CHECKING:
    from raas_jax.aot.memory import Compiled
    from raas_jax.aot.memory import Memory as Account


@dataclasses.dataclass
class Memory:
    """Say what a run takes in memory, without running it."""

    config: options.File = None
    """Shape of the model: a config.json, or YAML with the same fields."""
    model: Annotated[str | None, options.unset("SOURCE", aliases=["-m"])] = None
    """Model in place of --config: hub id (only config.json is fetched), folder, or demo."""
    batch: options.Rows = 1
    """Sequences at once."""
    prompt_tokens: options.Tokens = 128
    """Length of every prompt."""
    max_new_tokens: Annotated[options.Tokens, tyro.conf.arg(aliases=["-n"])] = 32768
    """Tokens generated per sequence."""
    dtype: Annotated[options.DtypeName | None, options.unset("{float32,bfloat16,float16}")] = None
    """Data type of weights and cache; by default the model's own."""
    layers: options.Layers = None
    """Number of layers, in place of the model's own."""
    target: Annotated[str | None, options.unset("KIND:SHAPE")] = None
    """Hardware to compile for, in place of what is at hand, such as v5e:2x4; nothing is run."""
    mesh: options.Mesh = None
    json: bool = False
    """Print JSON instead of a table."""
    policy: options.PolicyOptions = dataclasses.field(default_factory=options.PolicyOptions)

    def run(self) -> int:
        """Prints the table, or the JSON object."""
        if self.target is not None:
            # Nothing is run, so no device is looked for.
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
        from raas_jax.aot.memory import memory
        from raas_jax.params import Params
        from raas_jax.suited import suited

        file = self._file()
        config = options.read_config(file, self.layers)
        # Weights are not wanted for an account; the folder may have an allotment.
        without_weights = Params({}, config, str(Path(file).parent))
        account = memory(
            config,
            suited(self.policy.create(), without_weights),
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
            dtype=self.dtype,
            target=self.target,
            **options.parse_mesh(self.mesh),
        )
        print(json.dumps(dataclasses.asdict(account), indent=2) if self.json else table(account))
        return 0

    def _file(self) -> str:
        """The model's configuration."""
        if (self.config is None) == (self.model is None):
            raise ValueError("give one of --config FILE and --model SOURCE.")
        return self.config if self.config is not None else config_file(str(self.model))


def config_file(source: str) -> str:
    """The config.json of a model, the only file that is fetched. Raises FileNotFoundError."""
    from raas_jax.weights import locate

    if source == "demo" or Path(source).exists() or source.count("/") != 1:
        return str(locate(source) / "config.json")
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(source, "config.json")
    except Exception as error:  # The hub's client has many, for what is one thing to the user.
        raise FileNotFoundError(
            f"--model is {source!r}; there is no such folder, and config.json could not be "
            f"fetched from the hub ({str(error).splitlines()[0]})."
        ) from error


def table(account: Account) -> str:
    """The account in lines, largest parts first."""
    rows = [
        ("weights", account.weights, ""),
        ("keys and values", account.kv, ""),
        ("  prompt", account.prompt, ""),
        ("  kept", account.kept, ""),
        ("  current", account.current, ""),
        ("  metadata", account.metadata, ""),
        ("  of it padding", account.padding, "no token of this run can fill it"),
        ("dense cache instead", account.dense, f"{account.dense / account.kv:.1f} x as much"),
        *_compiled("decode", account.decode, account.platform),
        *_compiled("prefill", account.prefill, account.platform),
    ]
    lines = [
        f"{name:22}{options.readable_bytes(size):>10}  {size:>16,} {note}".rstrip()
        for name, size, note in rows
    ]
    if account.devices > 1:
        shape = f"data={account.data},model={account.model}"
        lines.insert(0, f"on each of {account.devices} devices of {account.platform} ({shape})")
    if account.fits is not None:
        lines.append(_verdict(account))
    elif account.refusal:
        lines.append(f"not compiled: {account.refusal}")
    return "\n".join(lines)


def _verdict(account: Account) -> str:
    room = f" of {options.readable_bytes(account.available)}" if account.available else ""
    if account.fits:
        peaks = [part.peak for part in (account.decode, account.prefill) if part is not None]
        taken = options.readable_bytes(max(peaks)) if peaks else "all"
        return f"fits                  {taken:>10}{room} on {account.platform}"
    return f"does not fit {account.platform}{room}: {account.refusal}"


def _compiled(name: str, compiled: Compiled | None, platform: str) -> list[tuple[str, int, str]]:
    if compiled is None:
        return []
    return [
        (f"{name}, compiled", compiled.peak, f"at its peak, for {platform}"),
        ("  arguments", compiled.arguments, ""),
        ("  temporary", compiled.temporaries, ""),
        ("  aliased", compiled.aliases, "updated in place"),
    ]
