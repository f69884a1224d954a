"""Small random models of every family, as transformers makes them."""

from __future__ import annotations

import copy
from typing import Any

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short, so that the 40 positions tested turn through all three bands of the scaling.
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
GROWTH = {"llama_4_scaling_beta": 0.3, "original_max_position_embeddings": 8}
# The context is 256: only the 40 positions of the long one are beyond the original.
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}


def longrope(pairs: int, original: int = 16) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 500.0,
        "short_factor": [1.0 + i / 8 for i in range(pairs)],
        "long_factor": [2.0 + i / 2 for i in range(pairs)],
        "original_max_position_embeddings": original,
    }


def by_layer(full: dict[str, Any], window: dict[str, Any]) -> dict[str, Any]:
    return {"full_attention": full, "sliding_attention": window}


WINDOWS = ["sliding_attention", "sliding_attention", "full_attention"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-llama3-scaling": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear-scaling": ("llama", {"rope_parameters": LINEAR}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-one-query-per-kv": ("llama", {"num_key_value_heads": 4}),
    "llama-seven-queries-per-kv": (
        "llama",
        {"hidden_size": 56, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 10},
    ),
    # From position 8 on queries grow, four times within the 40 that are tested.
    "ministral3": (
        "ministral3",
        {"head_dim": 16, "rope_parameters": {**YARN, **GROWTH}, "tie_word_embeddings": True},
    ),
    "ministral3-windows": (
        "ministral3",
        {"head_dim": 10, "sliding_window": 6, "rope_parameters": {**YARN, **GROWTH}},
    ),
    "mistral-windows": ("mistral", {"sliding_window": 9}),
    "mixtral-windows": ("mixtral", {"num_local_experts": 4, "sliding_window": 6}),
    "qwen2-windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen3-windows": (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": WINDOWS, "head_dim": 12},
    ),
    "phi3-windows": ("phi3", {"sliding_window": 8}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-head-dim-10": ("mistral", {"sliding_window": None, "head_dim": 10}),
    "mistral-tied": ("mistral", {"sliding_window": None, "tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2-seven-queries-per-kv": (
        "qwen2",
        {"hidden_size": 56, "num_attention_heads": 7, "num_key_value_heads": 1},
    ),
    "qwen3": ("qwen3", {"head_dim": 80}),
    "qwen3-tied": ("qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "qwen3-biases": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-one-query-per-kv": ("qwen3", {"head_dim": 16, "num_key_value_heads": 4}),
    "qwen3-yarn": ("qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen2-dynamic": ("qwen2", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),
    "llama-longrope": ("llama", {"rope_parameters": longrope(6)}),
    "llama-longrope-short": ("llama", {"rope_parameters": longrope(6, 64)}),
    "granite-scaled": (
        "granite",
        {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.6}
        | {"logits_scaling": 2.0, "attention_bias": True, "mlp_bias": True},
    ),
    "exaone4": (
        "exaone4",
        {"num_hidden_layers": 4, "sliding_window": 7, "tie_word_embeddings": True},
    ),
    "exaone4-no-windows": ("exaone4", {"sliding_window": None, "layer_types": WINDOWS[-1:] * 3}),
    "gemma3": ("gemma3_text", {"head_dim": 16, "sliding_window": 7, "layer_types": WINDOWS}),
    "gemma3-scaled": (
        "gemma3_text",
        {"head_dim": 20, "query_pre_attn_scalar": 9, "attention_bias": True}
        | {"num_hidden_layers": 7, "sliding_window": 16, "final_logit_softcapping": 3.0}
        | {"rope_parameters": by_layer(LINEAR, {"rope_type": "default", "rope_theta": 20.0})}
        | {"tie_word_embeddings": False},
    ),
    "gemma3-all-windows": ("gemma3_text", {"sliding_window": 5, "layer_types": WINDOWS[:1] * 3}),
    "gemma3-no-windows": ("gemma3_text", {"sliding_window": 5, "layer_types": WINDOWS[-1:] * 3}),
    "gemma3-long-windows": ("gemma3_text", {"sliding_window": 512, "layer_types": WINDOWS}),
    "olmo3": (
        "olmo3",
        {"num_hidden_layers": 5, "sliding_window": 8}
        | {"rope_parameters": by_layer(YARN, {"rope_type": "default", "rope_theta": 500.0})},
    ),
    "olmo3-biases": (
        "olmo3",
        {"attention_bias": True, "tie_word_embeddings": True, "num_key_value_heads": 1}
        | {"sliding_window": 1, "layer_types": WINDOWS[::-1]},
    ),
    "ministral": ("ministral", {"sliding_window": 11, "head_dim": 16}),
    "ministral-some": (
        "ministral",
        {"sliding_window": 9, "layer_types": WINDOWS, "tie_word_embeddings": True, "head_dim": 10},
    ),
    "glm": ("glm", {"head_dim": 16, "tie_word_embeddings": True}),
    "glm4": ("glm4", {"head_dim": 20, "attention_bias": False}),
    "glm4-biases": (
        "glm4",
        {"head_dim": 16, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2-biases": ("olmo2", {"attention_bias": True, "num_key_value_heads": 1}),
    "olmo2-tied": ("olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": (
        "qwen3_moe",
        {"head_dim": 16, "num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 24},
    ),
    "qwen3-moe-some-layers": (
        "qwen3_moe",
        {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 16}
        | {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "qwen3-moe-normalised": (
        "qwen3_moe",
        {"num_experts": 6, "num_experts_per_tok": 6, "moe_intermediate_size": 12}
        | {"norm_topk_prob": True, "attention_bias": True, "head_dim": 12},
    ),
    "gpt-oss": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 20}
        | {"num_hidden_layers": 4, "swiglu_limit": 1.5, "swiglu_alpha": 1.1}
        | {"rope_parameters": {**YARN, "truncate": False}},
    ),
    "gpt-oss-all-full": (
        "gpt_oss",
        {"head_dim": 10, "num_local_experts": 4, "num_experts_per_tok": 1}
        | {"attention_bias": False, "tie_word_embeddings": True}
        | {"layer_types": ["full_attention"] * 3, "rope_parameters": {"rope_type": "default"}},
    ),
    "gpt-oss-all-window": (
        "gpt_oss",
        {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 4, "sliding_window": 17}
        | {"layer_types": ["sliding_attention"] * 3, "num_hidden_layers": 3},
    ),
    "phi3": ("phi3", {}),
    "phi3-part-of-a-head": (
        "phi3",
        {"hidden_size": 64, "rope_parameters": {"partial_rotary_factor": 0.75}}
        | {"tie_word_embeddings": True},
    ),
    "phi3-longrope": (
        "phi3",
        {"hidden_size": 64, "original_max_position_embeddings": 16}
        | {"rope_parameters": {**longrope(6), "partial_rotary_factor": 0.75}},
    ),
    "seed-oss": ("seed_oss", {"head_dim": 16, "num_key_value_heads": 1}),
    "seed-oss-biases": (
        "seed_oss",
        {"head_dim": 10, "attention_bias": False, "attention_out_bias": True, "mlp_bias": True},
    ),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "smollm3-biases": (
        "smollm3",
        {"no_rope_layers": [0, 1, 0], "attention_bias": True, "mlp_bias": True}
        | {"tie_word_embeddings": False, "rope_parameters": YARN},
    ),
}
"""Variants by their names: the family, and what differs from `BASE`."""
BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    # None of the tokens, so that greedy generations go on to their full length.
    "eos_token_id": None,
    "pad_token_id": 0,
}


def make_model(case: str) -> Any:
    """A random model of transformers, its weights large enough for logits of order one.

    Raises ImportError without torch.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # A copy, since transformers writes into the dictionaries that it is given.
    kind, changes = copy.deepcopy(CASES[case])
    torch.manual_seed(sum(map(ord, case)))
    config = AutoConfig.for_model(kind, **{**BASE, **changes})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
                if "gemma" in kind:
                    parameter -= 1  # They multiply by one more than their weights.
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "embed" in name or "lm_head" in name:
                parameter.normal_(std=0.5)
            else:
                parameter.normal_(std=1.5 / parameter.shape[-1] ** 0.5)
    return model
