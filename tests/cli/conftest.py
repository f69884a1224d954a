"""A small model as a folder, for the commands."""

import pytest

import raas_jax
from raas_jax.lab.tasks.lemma.tokenizer import save_tokenizer
from raas_jax.weights import save_hf

CONFIG = raas_jax.ModelConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=100_000,
    tie_word_embeddings=True,
    qk_norm=True,
    model_type="qwen3",
    # No token ends an answer of random weights before its time.
    eos_token_ids=(127,),
)


@pytest.fixture(scope="session")
def config() -> raas_jax.ModelConfig:
    return CONFIG


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Hugging Face folder with random weights and a word-level tokenizer."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_hf(raas_jax.Params.random(CONFIG), folder)
    save_tokenizer(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace('"eos_token": "<eos>",', ""))
    return str(folder)


@pytest.fixture
def short(model: str) -> list[str]:
    """Options that keep a generation quick, and the same compiled program for all tests."""
    return ["--model", model, "--budget", "32", "--max-new-tokens", "80"]
