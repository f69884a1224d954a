"""A state after prefill without compiling a prefill for every policy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from tiny import VOCAB

from raas_jax import Dense, Sampling
from raas_jax.cache import page_bounds
from raas_jax.config import ModelConfig
from raas_jax.decode import Plan, empty_cache, init_metadata, prefill, request
from raas_jax.sampling import Sampler, row_keys

CONFIG = ModelConfig(VOCAB, 6, 10, 2, 4, 2, 8, qk_norm=True, model_type="qwen3")


def start(params, plan, prompts, *, seed, setting=None):
    """State and first tokens; `prefill` itself where the policy has a part in it, else Dense's."""
    P, rows = plan.page_size, len(prompts)
    tokens = np.zeros((rows, plan.prompt_slots * P), np.int32)
    for line, prompt in zip(tokens, prompts, strict=True):
        line[: len(prompt)] = prompt
    lengths = jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)
    setting = setting or Sampling(temperature=1.5)
    sampler = Sampler.create([setting] * rows, row_keys(seed, rows))
    asked = request(jnp.full(rows, 10_000), (), sampler)
    plain = plan
    if not plan.policy.evicts_prompt:
        plain = Plan(Dense(page_size=P), plan.prompt_slots, (1,))
    state, first = prefill(params, jnp.asarray(tokens), lengths, asked, plan=plain)
    if plain is plan:
        return state, first
    empty = empty_cache(params.config, plan, rows, state.cache.prompt.k.dtype)
    prompt = state.cache.prompt
    if empty.prompt.bounds is not None:
        fill = jnp.broadcast_to(prompt.fill()[None], prompt.k.shape[:4])
        prompt = dataclasses.replace(prompt, bounds=page_bounds(prompt.k, fill))
    cache = dataclasses.replace(empty, prompt=prompt)
    meta = init_metadata(params.config, plan, rows)
    return dataclasses.replace(state, cache=cache, meta=meta), first
