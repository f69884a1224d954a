"""What a run takes in memory, before it is started: nothing is allocated here.

The bytes of weights and cache follow from the shapes. What the compiled decode allocates is asked
of the compiler itself, for the platform at hand.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax.config import ModelConfig
from raas_jax.decode import Plan, cache_bytes, decode_pages, dense_bytes, prefill, request
from raas_jax.generate import TOKENS_PER_LOOK
from raas_jax.params import Params
from raas_jax.policies import Policy
from raas_jax.sampling import Sampler, Sampling, row_keys
from raas_jax.weights.hf import flat_shapes, unflatten


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
    """Bytes of a run.

    Attributes:
      weights: the parameters.
      prompt, kept, open: keys and values of the three segments, padding included.
      metadata: page fills, representative keys and the policy's marks.
      padding: of `prompt` and `kept`, what no token of this run can fill.
      kv: prompt + kept + open + metadata.
      dense: keys and values of all tokens, nothing dropped or padded.
      decode, prefill: the compiler's account; None where it gives none.
      platform: what was compiled for.
    """

    weights: int
    prompt: int
    kept: int
    open: int
    metadata: int
    padding: int
    kv: int
    dense: int
    decode: Compiled | None
    prefill: Compiled | None
    platform: str


def memory(
    config: ModelConfig,
    policy: Policy,
    *,
    prompt_tokens: int,
    max_new_tokens: int,
    batch: int = 1,
    dtype: Any = None,
) -> Memory:
    """Accounts for a run of `batch` rows with prompts of one length.

    Args:
      config: shape of the model.
      policy: which pages to keep.
      prompt_tokens: length of every prompt.
      max_new_tokens: tokens generated per row.
      batch: rows.
      dtype: of weights and cache; the config's by default.

    Raises:
      ValueError: a number below 1, or a prompt that the policy cannot take.
    """
    numbers = {"prompt_tokens": prompt_tokens, "max_new_tokens": max_new_tokens, "batch": batch}
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    dtype = jnp.dtype(dtype or config.dtype)
    params = Params(unflatten(flat_shapes(config, dtype.name)), config)
    plan = Plan.create(config, policy, [prompt_tokens] * batch, max_new_tokens)
    args = _prefill_arguments(params, plan, batch, max_new_tokens)
    state, _ = jax.eval_shape(partial(prefill, plan=plan), *args)
    pages = max(1, TOKENS_PER_LOOK // plan.page_size)
    cache = state.cache
    prompt, opened = _bytes(cache.prompt.k, cache.prompt.v), _bytes(cache.open.k, cache.open.v)
    groups = [_bytes(group.k, group.v) for group in cache.kept]
    # What lies in the slots when the run ends, or when they are all taken.
    tokens = [slots * plan.page_size for slots in plan.slots]
    among_kept = prompt_tokens if policy.evicts_prompt else 0
    spare = sum(
        size - size // room * min(room, among_kept + max_new_tokens)
        for size, room in zip(groups, tokens, strict=True)
    )
    kv = cache_bytes(state)
    return Memory(
        weights=_bytes(params.weights),
        prompt=prompt,
        kept=sum(groups),
        open=opened,
        metadata=kv - prompt - sum(groups) - opened,
        padding=prompt - batch * dense_bytes(config, prompt_tokens - among_kept, dtype) + spare,
        kv=kv,
        dense=batch * dense_bytes(config, prompt_tokens + max_new_tokens, dtype),
        decode=_account(decode_pages.lower(params, state, plan=plan, pages=pages)),
        prefill=_account(prefill.lower(*args, plan=plan)),
        platform=jax.default_backend(),
    )


def _prefill_arguments(params: Params, plan: Plan, batch: int, max_new_tokens: int) -> Any:
    """The arguments of `prefill`, with shapes in the place of arrays."""
    sampler = Sampler.create([Sampling()] * batch, row_keys(0, batch))
    asked = request(jnp.full(batch, max_new_tokens), params.config.eos_token_ids, sampler)
    tokens = jax.ShapeDtypeStruct((batch, plan.prompt_slots * plan.page_size), jnp.int32)
    return params, tokens, jax.ShapeDtypeStruct((batch,), jnp.int32), asked


def _account(lowered: Any) -> Compiled | None:
    found = lowered.compile().memory_analysis()
    if found is None:
        return None
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    aliases, temporaries = found.alias_size_in_bytes, found.temp_size_in_bytes
    peak = arguments + outputs + temporaries - aliases
    return Compiled(arguments, outputs, aliases, temporaries, peak)


def _bytes(*trees: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
