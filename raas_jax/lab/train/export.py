"""Exporting trained weights as an ordinary Hugging Face folder."""

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from raas_jax import files
from raas_jax.config import ModelConfig
from raas_jax.lab.tasks.lemma.tokenizer import BOS_ID, EOS_ID, PAD_ID, save_tokenizer
from raas_jax.params import Params
from raas_jax.weights import save_hf

GENERATION = {
    "bos_token_id": BOS_ID,
    "eos_token_id": [EOS_ID],
    "pad_token_id": PAD_ID,
    "do_sample": False,
    "max_new_tokens": 1024,
}


def export(config: ModelConfig, weights: dict[str, Any], folder: Path) -> None:
    """Write config, bfloat16 weights, tokenizer and generation defaults into `folder`.

    Other files there, such as the model card, stay.
    """
    config = dataclasses.replace(config, bos_token_id=BOS_ID, eos_token_ids=(EOS_ID,))
    rounded = jax.tree.map(lambda value: value.astype(jnp.bfloat16), weights)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        complete = Path(scratch) / "model"
        save_hf(Params(rounded, config), complete)
        for file in complete.iterdir():
            files.replace_bytes(folder / file.name, file.read_bytes())
    files.replace_text(folder / "generation_config.json", json.dumps(GENERATION, indent=2) + "\n")
    save_tokenizer(folder)
