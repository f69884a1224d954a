"""Section `prefill`: how long prompts take to be read, beside their arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from raas_jax.config import ModelConfig
from raas_jax.lab.bench.arithmetic import multiplier
from raas_jax.lab.bench.turns import endless, random_prompts, timed
from raas_jax.lab.device_check.check import Check, median
from raas_jax.model import MATRICES
from raas_jax.params import Params
from raas_jax.policies import RaaS
from raas_jax.session import Session
from raas_jax.weights import separates


def run(check: Check) -> None:
    """One prompt of each length."""
    sizes, config = check.sizes, check.config()
    operation_seconds = median(multiplier(check.dtype))
    params = Params.random(config, dtype=check.dtype)
    params = params.separate() if separates() else params
    for tokens in sizes.prompts:
        what = f"prompt of {tokens:,} tokens"
        with check.journal.attempt(what):
            session = Session.create(params, RaaS(sizes.budget), [tokens], sizes.budget)
            prompts = random_prompts(params, 1, tokens).tolist()
            read = partial(session.start, prompts, endless(1))
            _, compile_seconds = timed(read)
            seconds = median(partial(_seconds, read), 3)
            check.journal.figure(
                what,
                1e3 * seconds,
                "ms",
                floor=1e3 * operations(config, params, tokens) * operation_seconds,
                tokens_per_second=tokens / seconds,
                compile_seconds=compile_seconds,
            )


def _seconds(call: Callable[[], Any]) -> float:
    return timed(call)[1]


def operations(config: ModelConfig, params: Params, tokens: int) -> int:
    """Multiplies and adds of a prompt: products with weights, half a square of attention, or what
    windows leave of it, and the logits of its last token.
    """
    layers = params.stacked().weights["layers"]
    in_layers = sum(int(layers[name].size) for name in MATRICES if name in layers)
    if config.num_experts:
        # Each token goes through those that are chosen for it: gate, up and down of each.
        widths = len(config.expert_layers) * config.num_experts_per_tok
        widths *= config.moe_intermediate_size
        widths += len(config.plain_layers) * config.intermediate_size
        in_layers += 3 * config.hidden_size * widths
    pairs = config.full_layers * _pairs(tokens, tokens)
    pairs += len(config.window_layers) * _pairs(tokens, config.window)
    attention = 2 * 2 * config.num_attention_heads * config.head_dim * pairs
    return 2 * tokens * in_layers + attention + 2 * config.vocab_size * config.hidden_size


def _pairs(tokens: int, window: int) -> int:
    """A query and a key that it sees, of a text whose tokens see so many, themselves included."""
    beyond = max(0, tokens - window)
    return (tokens * (tokens + 1) - beyond * (beyond + 1)) // 2
