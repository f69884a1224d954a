"""Small checkpoints, written with the library `safetensors` and not with our own writer."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from raas_jax.config import ModelConfig
from raas_jax.weights import hf

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=12,
    intermediate_size=20,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    qkv_bias=True,
    output_bias=True,
    mlp_bias=True,
    eos_token_ids=(2,),
)


class Checkpoint:
    """A Hugging Face folder that a test can spoil before it is written."""

    def __init__(self, folder: Path, config: ModelConfig = CONFIG, dtype=np.float32):
        self.folder = folder
        self.config = config
        random = np.random.default_rng(0)
        self.tensors = {
            name: random.standard_normal(place.shape).astype(dtype)
            for name, place in hf.destinations(config).items()
        }

    def write(self, shards: int = 1) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(self.config.to_hf()))
        if shards == 1:
            save_file(self.tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
            return self.folder
        names = list(self.tensors)
        weight_map = {}
        for number in range(shards):
            file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = names[number::shards]
            save_file({name: self.tensors[name] for name in part}, self.folder / file)
            weight_map.update(dict.fromkeys(part, file))
        self.write_index(weight_map)
        return self.folder

    def write_index(self, weight_map: object) -> None:
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (self.folder / "model.safetensors.index.json").write_text(index)
