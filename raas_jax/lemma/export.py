"""Exporting trained weights as an ordinary Hugging Face folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from safetensors.flax import save_file

from raas_jax.config import ModelConfig
from raas_jax.lemma.tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer
from raas_jax.lemma.train import TrainConfig, initial_state, restore

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}


def hf_tensors(config: ModelConfig, weights: dict[str, Any]) -> dict[str, jax.Array]:
    """Tensors of a tied Qwen3 model under transformers' names, bfloat16, `[out, in]`."""
    width = config.hidden_size
    tensors = {
        "model.embed_tokens.weight": weights["embedding"],
        "model.norm.weight": weights["norm"],
    }
    for ours, theirs in _LAYER_NAMES.items():
        for layer, value in enumerate(weights["layers"][ours]):
            if ours in ("q", "k", "v"):
                value = value.reshape(-1, width)
            elif ours == "o":
                value = value.reshape(width, -1)
            tensors[f"model.layers.{layer}.{theirs}.weight"] = value
    return {name: jnp.asarray(value, jnp.bfloat16) for name, value in tensors.items()}


def export(config: ModelConfig, weights: dict[str, Any], folder: Path) -> None:
    """Write config, bfloat16 weights, tokenizer and generation defaults into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = dataclasses.replace(
        config, dtype="bfloat16", bos_token_id=BOS_ID, eos_token_ids=(EOS_ID,)
    )
    generation = {
        "bos_token_id": BOS_ID,
        "eos_token_id": [EOS_ID],
        "pad_token_id": PAD_ID,
        "do_sample": False,
        "max_new_tokens": 1024,
    }
    save_file(hf_tensors(config, weights), folder / "model.safetensors", {"format": "pt"})
    for name, content in (
        ("config.json", stored.to_hf() | {"pad_token_id": PAD_ID}),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    save_tokenizer(folder)


def export_checkpoint(
    config_path: str, folder: Path, *, checkpoints: str | None = None, step: int | None = None
) -> int:
    """Export the averaged weights of a checkpoint, by default the newest; gives its step."""
    config = TrainConfig.from_file(config_path)
    source = Path(checkpoints or config.checkpoints).expanduser().absolute()
    with ocp.CheckpointManager(source) as manager:
        step = manager.latest_step() if step is None else step
        if step is None:
            raise ValueError(f"checkpoints={source}: holds no checkpoint; train first")
        state = restore(manager, initial_state(config), step)
    export(config.model, state["average"], folder)
    return step
