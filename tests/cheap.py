"""A state after prefill without compiling a prefill for every policy."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from tiny import VOCAB

from raas_jax import Dense, Sampling
from raas_jax.cache import page_bounds
from raas_jax.config import ModelConfig
from raas_jax.decode import RowRequest, empty_cache, init_metadata
from raas_jax.plan import Group, Plan
from raas_jax.session import Session

CONFIG = ModelConfig(VOCAB, 6, 10, 2, 4, 2, 8, qk_norm=True, model_type="qwen3")


def start(params, plan, prompts, *, seed, setting=None):
    """State and first tokens; `prefill` itself where the policy has a part in it, else Dense's."""
    rows = len(prompts)
    setting = setting or Sampling(temperature=1.5)
    request = RowRequest.create([10_000] * rows, (), setting, seed)
    plain = plan
    if not plan.policy.evicts_prompt:
        policy = Dense(page_size=plan.page_size)
        group = Group(tuple(range(params.config.num_hidden_layers)), 0, policy, 1)
        plain = Plan(policy, plan.prompt_slots, (group,))
    state, first = Session(params, plain, rows).start(prompts, request)
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
