"""llama.cpp, as the bench times it: it decodes the same model."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import random_params

from raas_jax.config import ModelConfig
from raas_jax.lab.bench.llama_cpp import LlamaCpp, write_gguf
from raas_jax.model import forward
from raas_jax.params import Params
from raas_jax.rope import Rope

LLAMA = ModelConfig(256, 64, 96, 2, 4, 2, 32, model_type="llama", tie_word_embeddings=True)
VARIANTS = {
    "llama": LLAMA,
    "linear rope": dataclasses.replace(LLAMA, rope=Rope(kind="linear", factor=2.0)),
    "biases": dataclasses.replace(
        LLAMA, model_type="qwen2", qkv_bias=True, head_dim=16, tie_word_embeddings=False
    ),
    "norms": dataclasses.replace(LLAMA, model_type="qwen3", qk_norm=True),
}


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("rows", [1, 2])
def test_it_decodes_the_same_model(config, rows):
    pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    params = random_params(config)
    tokens = np.random.default_rng(0).integers(0, 256, (rows, 40), dtype=np.int32)
    decode = LlamaCpp(params).begin(tokens, 8)
    assert decode.time_chunk() > 0
    found = decode.greedy(8)
    for token in found:
        logits = forward(params.config, params.weights, tokens)[:, -1]
        # Two may be equally likely, but for what its half-precision arithmetic rounds off.
        assert np.all(np.max(logits, axis=-1) - logits[np.arange(rows), token] < 0.02)
        tokens = np.concatenate([tokens, token[:, None]], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_file_has_every_number(tmp_path, dtype):
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    params = random_params(VARIANTS["biases"])
    weights = jax.tree.map(lambda leaf: leaf.astype(dtype), params.weights)
    params = dataclasses.replace(params, weights=weights)
    write_gguf(params, tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(stored) == 3 + 2 * 12
    found = stored["blk.1.ffn_down.weight"]
    assert found.tensor_type.name == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    wanted = np.asarray(weights["layers"]["down"][1], np.float32)
    values = gguf.quants.dequantize(found.data, found.tensor_type).reshape(wanted.shape)
    np.testing.assert_array_equal(values, wanted)


@pytest.mark.parametrize(
    ("change", "named"),
    [({"window": 8, "window_layers": (1,)}, "a window of 8 tokens"), ({"sinks": True}, "sinks")],
)
def test_windows_and_sinks_are_refused(change, named, tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    odd = Params({}, dataclasses.replace(LLAMA, **change))
    with pytest.raises(ValueError, match=f"not given models with {named}"):
        write_gguf(odd, tmp_path / "model.gguf")


def test_a_rope_that_it_would_read_otherwise_is_refused(tmp_path):
    pytest.importorskip("gguf", reason="needs gguf")
    params = random_params(LLAMA)
    rope = dataclasses.replace(
        Rope(), kind="llama3", factor=8.0, original_max_position_embeddings=64
    )
    odd = dataclasses.replace(params, config=dataclasses.replace(params.config, rope=rope))
    with pytest.raises(ValueError, match="rope of the type llama3"):
        write_gguf(odd, tmp_path / "model.gguf")
