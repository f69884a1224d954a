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
    from raas_jax.aot.decode_traffic import DecodeTraffic, Part
    from raas_jax.aot.memory import Compiled
    from raas_jax.aot.memory import Memory as Account
    from raas_jax.config import ModelConfig
    from raas_jax.policies import Policy


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
    traffic: bool = False
    """Print what a decode step reads and writes, against the least, by a reading of its program."""
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
        policy = suited(self.policy.create(), without_weights)
        if self.traffic:
            return self._traffic(config, policy)
        account = memory(
            config,
            policy,
            prompt_tokens=self.prompt_tokens,
            max_new_tokens=self.max_new_tokens,
            batch=self.batch,
            dtype=self.dtype,
            target=self.target,
            **options.parse_mesh(self.mesh),
        )
        print(json.dumps(dataclasses.asdict(account), indent=2) if self.json else table(account))
        return 0

    def _traffic(self, config: ModelConfig, policy: Policy) -> int:
        """Prints what a decode step moves."""
        from raas_jax.aot.decode_traffic import decode_traffic
        from raas_jax.aot.memory import abstract_session, target_mesh

        mesh, given = None, options.parse_mesh(self.mesh)
        if self.target is not None:
            mesh = target_mesh(config, self.target, **given)
        elif given:
            raise ValueError("a mesh is given but no target; name one, for instance 'v5e:2x4'.")
        dtype = self.dtype or config.dtype
        prompts = [self.prompt_tokens] * self.batch
        session = abstract_session(config, policy, prompts, self.max_new_tokens, dtype, mesh)
        found = decode_traffic(session)
        if self.json:
            print(json.dumps({**dataclasses.asdict(found), "floor": found.floor}, indent=2))
        else:
            print(traffic_lines(found))
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


def traffic_lines(found: DecodeTraffic) -> str:
    """What a step moves, in lines."""

    def row(name: str, size: float, note: str = "") -> str:
        return f"{name:22}{size / 1e9:>9.3f} GB  {note}".rstrip()

    devices = f", on each of {found.devices} devices" if found.devices > 1 else ""
    moved = found.reads + found.writes
    weights, cache = found.weights_read / found.weights, found.cache_read / found.cache
    lines = [
        f"estimated from the program for {found.platform}, nothing was run; "
        f"per step of {found.rows} rows{devices}",
        row("read", found.reads, f"weights {weights:.2f} times, cache {cache:.2f} times"),
        row("written", found.writes),
        row("floor", found.floor, f"weights {found.weights / 1e9:.3f}, cache once"),
        f"{'over the floor':22}{found.ratio:>9.2f} x"
        f"   {found.least / found.floor:.2f} x where the sampler has the least to do",
        row("in layers", found.layers, f"{found.layers / moved:.0%}"),
        row("outside of layers", found.outside, f"{found.outside / moved:.0%}"),
        row("at page boundaries", found.boundary, "their share of a step"),
        row("once per call", found.call, "likewise"),
        f"{'operations':22}{found.operations_per_layer:>9.1f} per layer, "
        f"{found.operations_outside:.0f} outside, {found.operations_at_boundary:.0f} per page; "
        f"{found.conditions} conditions",
    ]
    per_layer = {**found.kernels, **found.collectives}
    if per_layer:
        named = ", ".join(f"{name} {count:g}" for name, count in per_layer.items())
        lines.append(f"  of them per layer: {named}")
    if found.unknown:
        lines.append(f"  loops of unknown length, counted once: {', '.join(found.unknown)}")
    if found.copies:
        lines.append("copies of weights or of the cache, per step:")
        lines += [_part(each) for each in found.copies]
    lines.append("largest, per step:")
    lines += [_part(each) for each in found.largest if not each.copies or each.writes == 0]
    return "\n".join(lines)


def _part(part: Part) -> str:
    name, of = part.what.split("/")[0] or part.op, part.of or part.name
    return f"  {of:22}{part.reads / 1e9:>7.3f} GB read {part.writes / 1e9:>9.3f} written  {name}"


def table(account: Account) -> str:
    """The account in lines, largest parts first."""
    rows = [
        ("weights", account.weights, ""),
        ("keys and values", account.kv, ""),
        ("  prompt", account.prompt, ""),
        ("  kept", account.kept, ""),
        *([("  windows", account.windows, "")] if account.windows else []),
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
