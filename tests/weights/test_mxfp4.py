"""MXFP4: numbers by hand and as transformers has them, and checkpoints that are packed so."""

import dataclasses
import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Checkpoint
from safetensors.numpy import save_file
from test_peak import MIB, SCRIPT, SLACK

from raas_jax import identity, make_mesh
from raas_jax.config import ModelConfig
from raas_jax.files import FileError
from raas_jax.weights import hf, load, mxfp4, save_hf

CONFIG = ModelConfig(
    vocab_size=32,
    hidden_size=64,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=6,
    qkv_bias=True,
    output_bias=True,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    norm_topk_prob=True,
    expert_bias=True,
    swiglu_limit=7.0,
    sinks=True,
    model_type="gpt_oss",
)
MXFP4 = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}


def number(half_byte: int, scale: int) -> float:
    """A sign, two bits of exponent, one of mantissa; times a power of two."""
    sign, exponent, mantissa = half_byte >> 3, half_byte >> 1 & 3, half_byte & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return (-size if sign else size) * 2.0 ** (scale - 127)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_number_with_every_scale(dtype):
    """By hand: 16 bytes that hold every half, under each of the 256 scales."""
    block = np.asarray([i | (i * 7 + 3) % 16 << 4 for i in range(16)], np.uint8)
    halves = [half for byte in block.tolist() for half in (byte & 15, byte >> 4)]
    assert {*halves[::2]} == {*halves[1::2]} == {*range(16)}
    scales = np.arange(256, dtype=np.uint8).reshape(2, 64, 2)
    found = mxfp4.unpack(np.broadcast_to(block, (*scales.shape, 16)), scales, jnp.dtype(dtype))
    assert found.shape == (2, 64, 64) and found.dtype == jnp.dtype(dtype)
    wanted = [number(half, scale) for scale in range(256) for half in halves]
    with np.errstate(over="ignore"):
        wanted = np.asarray(wanted).astype(dtype).reshape(found.shape)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(wanted))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_numbers_are_those_of_transformers(dtype):
    torch = pytest.importorskip("torch", reason="torch is the reference of this test")
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (3, 85, 2, 16), np.uint8)
    # The last has no meaning, by the standard.
    scales = np.arange(3 * 85 * 2, dtype=np.int64).reshape(3, 85, 2) % 255
    scales = scales.astype(np.uint8)
    wanted = convert_moe_packed_tensors(
        torch.tensor(blocks), torch.tensor(scales), dtype=getattr(torch, dtype)
    )
    found = np.swapaxes(mxfp4.unpack(blocks, scales, jnp.dtype(dtype)), -1, -2)
    assert wanted.shape == found.shape
    bits = torch.int32 if dtype == "float32" else torch.int16
    wanted = wanted.view(bits).numpy()
    np.testing.assert_array_equal(np.ascontiguousarray(found).view(wanted.dtype), wanted)


class PackedCheckpoint(Checkpoint):
    """A checkpoint of gpt-oss whose experts are packed; `plain` are the numbers of all tensors."""

    def __init__(self, folder, config=CONFIG):
        super().__init__(folder, config, jnp.bfloat16)
        self.plain, random = dict(self.tensors), np.random.default_rng(1)
        for name in [name for name in self.tensors if name.endswith("_proj")]:
            experts, given, out = self.tensors.pop(name).shape
            shape = experts, out, given // 32
            blocks = random.integers(0, 256, (*shape, 16), np.uint8)
            scales = random.integers(118, 126, shape, np.uint8)
            self.tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            unpacked = mxfp4.unpack(blocks, scales, np.dtype(jnp.bfloat16))
            self.plain[name] = np.ascontiguousarray(np.swapaxes(unpacked, 1, 2))

    def write(self, shards=1, **changes):
        super().write(shards)
        fields = {**self.config.to_hf(), **MXFP4, **changes}
        (self.folder / "config.json").write_text(json.dumps(fields))
        return self.folder


@pytest.fixture
def packed(tmp_path):
    return PackedCheckpoint(tmp_path / "packed")


@pytest.mark.parametrize("shards", [1, 3])
def test_a_packed_checkpoint_is_the_unpacked_one(packed, tmp_path, shards):
    """Also where its blocks and its scales lie in two files; what is written is not packed."""
    plain = Checkpoint(tmp_path / "plain", CONFIG)
    plain.tensors = packed.plain
    params = load(packed.write(shards), dtype="source")
    assert params.config == dataclasses.replace(CONFIG, dtype="bfloat16")
    wanted = identity.of_model(load(plain.write(), dtype="source"))
    assert identity.of_model(params) == wanted
    for options in ({"layers": "stacked"}, {"sharding": make_mesh()}):
        assert identity.of_model(load(packed.folder, dtype="source", **options)) == wanted
    gate = packed.plain["model.layers.1.mlp.experts.gate_up_proj"][2, :, 10]
    np.testing.assert_array_equal(params.weights["expert_gate"][1, 2, 5], gate)
    save_hf(params, tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    save_hf(load(plain.folder, dtype="source"), tmp_path / "wanted")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "wanted")]
    assert files[0] == files[1]


def test_transformers_reads_the_same_of_a_packed_checkpoint(packed):
    torch = pytest.importorskip("torch", reason="torch is the reference of this test")
    from transformers import AutoModelForCausalLM, Mxfp4Config

    params = load(packed.write(), dtype="float32", layers="stacked")
    model = AutoModelForCausalLM.from_pretrained(
        packed.folder, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    theirs = model.state_dict()
    for name, place in hf.destinations(params.config).items():
        ours = [hf.flatten(params.weights)[path][place.at] for path in place.paths]
        ours = place.together([np.asarray(each) for each in ours])
        np.testing.assert_array_equal(ours, theirs[name].numpy(), name)


def test_packed_tensors_that_do_not_fit_are_named(packed):
    tensors, layer = packed.tensors, "model.layers.0.mlp.experts."
    tensors[f"{layer}down_proj"] = packed.plain[f"{layer}down_proj"]
    layer = "model.layers.1.mlp.experts."
    tensors[f"{layer}gate_up_proj_scales"] = np.zeros((3, 64), np.uint8)
    del tensors[f"{layer}down_proj_scales"]
    with pytest.raises(ValueError) as error:
        load(packed.write())
    assert str(error.value).splitlines()[1:] == [
        f"  misshapen: {layer}gate_up_proj_blocks and _scales are U8 [3, 64, 2, 16] and U8 "
        "[3, 64], expected U8, and [..., 16] for [...]",
        "  unknown: model.layers.0.mlp.experts.down_proj_blocks",
        "  unknown: model.layers.0.mlp.experts.down_proj_scales",
        f"  unknown: {layer}down_proj_blocks",
        f"  missing: {layer}gate_up_proj",
        f"  missing: {layer}down_proj",
    ]


def test_packed_experts_of_another_width_are_named(packed):
    name = "model.layers.1.mlp.experts.down_proj"
    packed.tensors[f"{name}_blocks"] = np.zeros((3, 64, 2, 16), np.uint8)
    packed.tensors[f"{name}_scales"] = np.zeros((3, 64, 2), np.uint8)
    named = rf"misshapen: {name} is \[3, 64, 64\], expected \[3, 32, 64\]"
    with pytest.raises(ValueError, match=named):
        load(packed.write())


def test_other_ways_to_pack_are_refused(packed, checkpoint):
    with pytest.raises(FileError, match="quantised .'gptq'.*mxfp4 of gpt_oss"):
        load(packed.write(quantization_config={"quant_method": "gptq"}))
    folder = checkpoint.write()
    (folder / "config.json").write_text(json.dumps({**checkpoint.config.to_hf(), **MXFP4}))
    with pytest.raises(FileError, match="quantised .'mxfp4'"):
        load(folder)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_one_expert_is_unpacked_at_a_time(tmp_path):
    large = dataclasses.replace(
        CONFIG, hidden_size=1024, moe_intermediate_size=1024, intermediate_size=1024, num_experts=12
    )
    PackedCheckpoint(tmp_path / "small").write()
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps({**large.to_hf(), **MXFP4}))
    tensors = {}
    for name, place in hf.destinations(large).items():
        if name.endswith("_proj"):
            experts, given, out = place.shape
            tensors[f"{name}_blocks"] = np.zeros((experts, out, given // 32, 16), np.uint8)
            tensors[f"{name}_scales"] = np.zeros((experts, out, given // 32), np.uint8)
        else:
            tensors[name] = np.zeros(place.shape, jnp.bfloat16)
    save_file(tensors, tmp_path / "large" / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, "-c", SCRIPT, tmp_path / "small", tmp_path / "large", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["model"] > 140 * MIB
    # Of an expert: gate and up of float32, were they not unpacked in parts, and twice of bfloat16.
    expert = 2 * 1024 * 1024 * (4 + 2 + 2)
    layer = 12 * 2 * 1024 * 1024 * 2
    assert found["peak"] - found["model"] <= expert + SLACK < layer, found
