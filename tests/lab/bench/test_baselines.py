"""What transformers does beside a policy."""

from __future__ import annotations

import numpy as np
import pytest

from raas_jax.lab.bench.baselines import StaticCache


def test_a_static_cache_decodes_as_a_growing_one():
    """The baseline that is timed on GPUs, without its compiler: every step sees all tokens."""
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 50, (2, 12))
    baseline = StaticCache(model, tokens, 6, compiled=False)
    seen = []
    baseline.forward = lambda token, **kwargs: seen.append(token) or model(token, **kwargs)
    for _ in range(2):
        seen.clear()
        assert baseline.time_chunk() > 0
        with torch.no_grad():
            wanted = model.generate(
                torch.as_tensor(tokens),
                attention_mask=torch.ones(2, 12, dtype=torch.long),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(torch.cat(seen[1:], 1), wanted[:, 12:])
