"""What a run takes in memory, before it is started: nothing is allocated here.

The bytes of weights and cache follow from the shapes. What the compiled decode allocates is asked
of the compiler itself, for the platform at hand or for one that is not (`raas_jax.aot.targets`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from raas_jax.aot.targets import DEVICE_MEMORY, target_devices
from raas_jax.config import ModelConfig
from raas_jax.decode import dense_bytes, token_bytes
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.model import abstract_weights
from raas_jax.params import Params
from raas_jax.policies import Policy
from raas_jax.session import Session
from raas_jax.sharding import make_mesh, weight_shardings

CPU_NUMBERS = 2**35
"""The compiler of jax 0.11 and 0.12 for CPUs dies of larger arrays, and takes the process along."""


@dataclasses.dataclass
class Compiled:
    """The compiler's own account of one program, in bytes.

    Attributes:
      arguments: weights and state that it is given.
      outputs: what it returns, aliased parts included.
      aliases: outputs that lie in the memory of donated arguments.
      temporaries: what it allocates besides.
      peak: arguments + outputs + temporaries - aliases.
    """

    arguments: int
    outputs: int
    aliases: int
    temporaries: int
    peak: int


@dataclasses.dataclass
class Memory:
    """Bytes of a run, on each device.

    Attributes:
      weights: the parameters.
      prompt, kept, current: keys and values of the three segments, padding included.
      windows: those of layers that see a window, whose prompt is among them.
      metadata: page fills, representative keys and the policy's meta.
      padding: of `prompt`, `kept` and `windows`, what no token of this run can fill.
      kv: prompt + kept + windows + current + metadata.
      dense: keys and values of all tokens that can be seen, nothing dropped or padded.
      decode, prefill: the compiler's account; None where it gives none, or refuses.
      platform: what was compiled for.
      devices: how many of them share the run.
      data, model: into how many parts the rows, and the heads and mlp width, are split.
      available: what one device has; None where that is not known.
      fits: whether the compiler finds room for decode and prefill; None where it cannot know.
      refusal: what it said if not, or why it was not asked.
    """

    weights: int
    prompt: int
    kept: int
    windows: int
    current: int
    metadata: int
    padding: int
    kv: int
    dense: int
    decode: Compiled | None
    prefill: Compiled | None
    platform: str
    devices: int = 1
    data: int = 1
    model: int = 1
    available: int | None = None
    fits: bool | None = None
    refusal: str | None = None


def memory(
    config: ModelConfig,
    policy: Policy,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    batch: int = 1,
    dtype: Any = None,
    target: str | None = None,
    data: int | None = None,
    model: int | None = None,
) -> Memory:
    """Accounts for a run of `batch` rows with prompts of one length.

    Args:
      config: shape of the model.
      policy: which pages to keep.
      prompt_tokens: length of every prompt.
      max_new_tokens: tokens generated per row.
      batch: rows.
      dtype: of weights and cache; the config's by default.
      target: compile for this, see `raas_jax.aot.targets`; by default for the first device at hand.
      data, model: with a target, the axes of the mesh. By default all of its devices: `model` as
        large as divides the key/value heads, `data` the rest.

    Raises:
      ValueError: a number below 1, a prompt that the policy cannot take, an unknown target, more
        devices than it has, or a mesh without a target.
      ModuleNotFoundError: the target's compiler is not installed.
    """
    numbers = {"prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "batch": batch}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    mesh = None if target is None else target_mesh(config, target, data, model)
    if mesh is None and (data or model):
        raise ValueError("a mesh is given but no target; name one, for instance 'v5e:2x4'.")
    dtype = jnp.dtype(dtype or config.dtype)
    session = abstract_session(config, policy, [prompt_tokens] * batch, max_new_tokens, dtype, mesh)
    plan, cache = session.plan, session.shape.cache
    prompt = _bytes(cache.prompt.k, cache.prompt.v)
    current = _bytes(cache.current.k, cache.current.v)
    kept = windows = spare = 0
    for of_group, group in zip(cache.kept, plan.groups, strict=True):
        size = _bytes(of_group.k, of_group.v)
        rooms = group.counts(config.num_key_value_heads) * plan.page_size
        # What lies in the slots when the run ends, or when they are all taken.
        among_them = prompt_tokens if group.ring or policy.evicts_prompt else 0
        empty = np.maximum(rooms - among_them - max_new_tokens, 0)
        spare += size // int(rooms.sum()) * int(empty.sum())
        if group.ring:
            windows += size
        else:
            kept += size
    kv = _bytes(cache, session.shape.meta)
    # How much of the whole cache a device holds, the same share of its every token.
    share = _bytes(cache.current.k) / (cache.current.k.size * dtype.itemsize)
    of_token = token_bytes(config, dtype) * config.full_layers
    filled = 0 if policy.evicts_prompt else prompt_tokens * of_token
    dense = dense_bytes(config, prompt_tokens + max_new_tokens, dtype)
    decode = first = refused = refused_first = None
    on_cpu = mesh is None and jax.default_backend() == "cpu"
    if on_cpu and max(leaf.size for leaf in jax.tree.leaves(cache)) > CPU_NUMBERS:
        refused = f"an array has more than {CPU_NUMBERS:,} numbers"
    else:
        decode, refused = _account(session.lower_advance(max(1, TOKENS_PER_SYNC // plan.page_size)))
        first, refused_first = _account(session.lower_start())
    kind = None if mesh is None else mesh.devices.flat[0].device_kind
    axes = {"data": 1, "model": 1} if mesh is None else mesh.shape
    return Memory(
        weights=_bytes(session.params.weights),
        prompt=prompt,
        kept=kept,
        windows=windows,
        current=current,
        metadata=kv - prompt - kept - windows - current,
        padding=prompt - round(share * batch * filled) + spare,
        kv=kv,
        dense=round(share * batch * dense),
        decode=decode,
        prefill=first,
        platform=kind or jax.default_backend(),
        devices=axes["data"] * axes["model"],
        data=axes["data"],
        model=axes["model"],
        available=DEVICE_MEMORY.get(kind or ""),
        fits=None if mesh is None else not (refused or refused_first),
        refusal=refused or refused_first,
    )


def abstract_session(
    config: ModelConfig,
    policy: Policy,
    prompt_tokens: Sequence[int],
    max_new_tokens: int,
    dtype: Any,
    mesh: Mesh | None,
) -> Session:
    """A session with shapes in the place of weights, to compile for devices that need not be there.

    Arguments as of `memory`, but for `prompt_tokens`, a length for each row, and `mesh`, the
    devices; None is the default one.
    """
    weights = abstract_weights(config, jnp.dtype(dtype).name)
    if mesh is not None:
        shardings = weight_shardings(config, mesh)
        weights = jax.tree.map(lambda x, where: x.update(sharding=where), weights, shardings)
    return Session.create(Params(weights, config), policy, prompt_tokens, max_new_tokens, mesh=mesh)


def target_mesh(
    config: ModelConfig, target: str, data: int | None = None, model: int | None = None
) -> Mesh:
    """A mesh of a target's devices; see `memory` for its axes where they are not given."""
    devices = target_devices(target)
    if model is None:
        model = math.gcd(len(devices) // (data or 1), config.num_key_value_heads)
    if data is None:
        data = max(1, len(devices) // model)
    return make_mesh(data, model, devices)


def _account(lowered: Any) -> tuple[Compiled | None, str | None]:
    """The compiler's account, or why it refuses."""
    try:
        found = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None, str(error).splitlines()[0]
    return (None, None) if found is None else (compiled(found), None)


def compiled(found: Any) -> Compiled:
    """From what `memory_analysis` of a compiled program gives."""
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    aliases, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
    peak = arguments + outputs + temporaries - aliases
    return Compiled(arguments, outputs, aliases, temporaries, peak)


def _bytes(*trees: Any) -> int:
    """Bytes on one device."""
    total = 0
    for leaf in jax.tree.leaves(trees):
        sharding = getattr(leaf, "sharding", None)
        shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
        total += math.prod(shape) * leaf.dtype.itemsize
    return total
