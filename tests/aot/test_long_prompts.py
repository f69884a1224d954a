"""Prefill of a prompt of 32k tokens through the compilers: besides the cache it takes little."""

from __future__ import annotations

import jax
import pytest

from raas_jax import ModelConfig, RaaS
from raas_jax.aot.memory import abstract_session, target_mesh
from raas_jax.chunks import MOST_TOKENS

T = 32_768


def test_a_long_prompt_takes_little_besides_its_cache(shared):
    """Of Qwen3-8B: a few times the tokens of one layer, a chunk of its mlp, its weights, scores."""
    config = ModelConfig.from_file(shared / "configs" / "Qwen3-8B" / "config.json")
    try:
        mesh = target_mesh(config, "h100", 1, 1)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    session = abstract_session(config, RaaS(1024), [T], 4096, "bfloat16", mesh)
    # JAX's own attention mixes dtypes.
    with jax.numpy_dtype_promotion("standard"):
        found = session.lower_start().compile().memory_analysis()
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    N, K = config.num_attention_heads, config.num_key_value_heads
    # Two of x and of what is attended to, and q, k and v.
    tokens = T * 2 * (2 * D + 3 * N * H + 2 * K * H)
    chunk = MOST_TOKENS * 2 * 3 * F
    layer = 2 * 3 * D * F
    assert found.temp_size_in_bytes < tokens + chunk + layer
