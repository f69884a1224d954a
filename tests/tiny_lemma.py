"""A tiny model with random weights that reads lemma problems."""

from pathlib import Path

import raas_jax
from raas_jax.lab.tasks.lemma.tokenizer import save_tokenizer
from raas_jax.weights import save_hf

CONFIG = raas_jax.ModelConfig(
    vocab_size=128,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    qk_norm=True,
    model_type="qwen3",
    eos_token_ids=(2,),
)

# What a training configuration says; the folder of its checkpoints is to be added.
TRAINING = {
    "seed": 3,
    "steps": 4,
    "checkpoint_every": 2,
    "validate_every": 4,
    "model": {
        "model_type": "qwen3",
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "matrix_learning_rate": 0.02,
    "other_learning_rate": 0.003,
    "warmup_steps": 2,
    "decay_from": 3,
    "clip_norm": 1.0,
    "average_decay": 0.9,
    "attention_scale": 1.5,
    "buckets": [
        {"smallest": 4, "largest": 5, "tokens": 128, "rows": 2},
        {"smallest": 4, "largest": 6, "tokens": 128, "rows": 2},
    ],
    "stages": [{"start": 0, "weights": [1, 0]}, {"start": 1, "weights": [1, 1]}],
    "validation": [{"smallest": 4, "largest": 5, "tokens": 128, "rows": 2}],
}


def save_tiny(folder: Path) -> str:
    """Writes the model as a Hugging Face folder, and gives its path."""
    save_hf(raas_jax.Params.random(CONFIG, seed=3), folder)
    save_tokenizer(folder)
    return str(folder)
