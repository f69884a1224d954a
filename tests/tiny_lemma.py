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


def save_tiny(folder: Path) -> str:
    """Writes the model as a Hugging Face folder, and gives its path."""
    save_hf(raas_jax.Params.random(CONFIG, seed=3), folder)
    save_tokenizer(folder)
    return str(folder)
