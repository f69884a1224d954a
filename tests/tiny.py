"""Tiny networks with random weights, made in NumPy: initialising one with jax compiles for long."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax.config import ModelConfig
from raas_jax.model import abstract_weights
from raas_jax.params import Params
from raas_jax.policies import Allotment
from raas_jax.policies.triattention import Centres
from raas_jax.rotation import frequencies

VOCAB = 19
FOLDER = tempfile.TemporaryDirectory()
QWEN3 = ModelConfig(VOCAB, 6, 10, 2, 4, 2, 4, qk_norm=True, model_type="qwen3")
ALL_WINDOWS = dataclasses.replace(QWEN3, window=7, window_layers=(0, 1))
MOE = dataclasses.replace(
    QWEN3,
    model_type="qwen3_moe",
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=4,
    norm_topk_prob=True,
)
WINDOWS = dataclasses.replace(
    QWEN3,
    num_hidden_layers=4,
    window=10,
    window_layers=(0, 2),
    window_rope=dataclasses.replace(QWEN3.rope, theta=100.0),
    sinks=True,
)


def random_params(config=QWEN3, seed=0, sharpness=2.0, flat=False):
    """Random weights, norms and biases. `sharpness` multiplies the queries, and `flat` makes every
    key zero, so that all tokens are attended to alike."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        if name.endswith("norm"):
            value = rng.uniform(0.7, 1.3, leaf.shape)
        elif name.endswith("bias"):
            value = rng.normal(0, 0.3, leaf.shape)
        elif name == "sink":
            value = rng.normal(0, 1.0, leaf.shape)
        else:
            value = rng.normal(0, leaf.shape[-1] ** -0.5, leaf.shape)
        if name == ("q_norm" if config.qk_norm else "q"):
            value = value * sharpness
        if flat and name.startswith("k"):
            value = value * 0
        return jnp.asarray(value, leaf.dtype)

    shapes = abstract_weights(config, "float32")
    return Params(jax.tree_util.tree_map_with_path(draw, shapes), config)


def prompts_of(lengths, seed=0):
    """Random prompts of these lengths, as lists of ids."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length).tolist() for length in lengths]


@functools.cache
def calibration(config=QWEN3):
    """A file of random centres, such as no model has, so that they matter."""
    rng, c = np.random.default_rng(4), config
    centre = rng.normal(size=(c.num_hidden_layers, c.num_attention_heads, c.head_dim))
    length = rng.uniform(2.0, 4.0, (*centre.shape[:2], c.head_dim // 2))
    file = Path(FOLDER.name) / f"{c.head_dim}.safetensors"
    frequency = np.asarray(frequencies(c.rope, c.head_dim))
    Centres(centre.astype(np.float32), length.astype(np.float32), frequency).write(file)
    return str(file)


def allotment_of(config=QWEN3, page_size=4, seed=0, most=14, **options):
    """Random curves that end after `most` pages, of heads that differ a good deal."""
    rng = np.random.default_rng(seed)
    shape = config.num_hidden_layers, config.num_key_value_heads
    losses = np.sort(rng.random((*shape, most)))[..., ::-1] * rng.random((*shape, 1))
    return Allotment(page_size * np.arange(1, most + 1), losses, **options)


def shares_of(allotment, budget, page_size, dense_layers=0, granularity="kv_head", **_):
    """The pages of every layer and head, by how many each has on average: at least one."""
    allotment = allotment.last(allotment.layers - dense_layers)
    if granularity == "layer":
        allotment = allotment.by_layer()
    shares = [allotment.pages(mean, page_size, 1) for mean in range(budget // page_size + 1)]
    return np.pad(np.stack(shares), ((0, 0), (dense_layers, 0), (0, 0)))
