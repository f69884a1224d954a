"""Which model is decoded, and how far: the largest of a few real shapes that fits the device."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import jax

from raas_jax.config import ModelConfig
from raas_jax.decode import cache_bytes
from raas_jax.model import abstract_weights
from raas_jax.params import Params
from raas_jax.policies import RaaS
from raas_jax.rope import Rope
from raas_jax.session import Session

BATCHES = (1, 8, 64)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How much of everything.

    Attributes:
      prompt: tokens of the prompt of a decode.
      budget: generated tokens that RaaS keeps.
      near, far: generated tokens at which steps are timed.
      pages: in a chunk that is timed.
      turns: timed chunks; the median counts.
      prompts: lengths of the prompts that are read.
    """

    prompt: int = 128
    budget: int = 1024
    near: int = 1024
    far: int = 16384
    pages: int = 4
    turns: int = 5
    prompts: tuple[int, ...] = (512, 4096, 16384)


SMALL = Sizes(prompt=16, budget=64, near=64, far=512, pages=1, turns=2, prompts=(16, 64))


def _qwen3(D: int, F: int, L: int, N: int, *, tied: bool) -> ModelConfig:
    return ModelConfig(
        vocab_size=151936,
        hidden_size=D,
        intermediate_size=F,
        num_hidden_layers=L,
        num_attention_heads=N,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        rope=Rope(theta=1e6),
        tie_word_embeddings=tied,
        qk_norm=True,
        model_type="qwen3",
    )


TINY = ModelConfig(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
    tie_word_embeddings=True,
    qk_norm=True,
    model_type="qwen3",
)
SHAPES: dict[str, ModelConfig] = {
    "Qwen3-8B": _qwen3(4096, 12288, 36, 32, tied=False),
    "Qwen3-4B": _qwen3(2560, 9728, 36, 32, tied=True),
    "Qwen3-1.7B": _qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-0.6B": _qwen3(1024, 3072, 28, 16, tied=True),
    "tiny": TINY,
}
"""Largest first; the last one is what a CPU decodes."""
ROOM = 0.85
"""Share of a device's memory for weights and cache; the rest is for what comes in between."""


def taken(config: ModelConfig, rows: int, sizes: Sizes, dtype: str = "bfloat16") -> int:
    """Bytes of weights, and of the cache of so many rows under RaaS."""
    weights = abstract_weights(config, dtype)
    prompts = [sizes.prompt] * rows
    session = Session.create(Params(weights, config), RaaS(sizes.budget), prompts, sizes.far)
    of_weights = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(weights))
    total: int = of_weights + cache_bytes(session.shape)
    return total


def fitting(memory: int) -> str:
    """Name of the largest shape of which the largest batch fits into so many bytes."""
    for name, config in SHAPES.items():
        if taken(config, max(BATCHES), Sizes()) <= ROOM * memory:
            return name
    return list(SHAPES)[-1]


def sizes_of(config: ModelConfig) -> Sizes:
    """Small ones for the tiny shape."""
    return SMALL if name_of(config) == "tiny" else Sizes()


def name_of(config: ModelConfig) -> str:
    """What a table calls the model."""
    plain = dataclasses.replace(config, dtype="float32", bos_token_id=None, eos_token_ids=())
    return next((name for name, shape in SHAPES.items() if shape == plain), config.model_type)


def write(config: ModelConfig, folder: Path, dtype: str) -> None:
    """Writes the shape as a Hugging Face folder without weights, for all sections and rivals."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = dataclasses.replace(config, dtype=dtype).to_hf()
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
