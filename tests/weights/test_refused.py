"""Checkpoints that would load as a wrong model, or that are damaged, hostile or something else."""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.numpy import save_file

from raas_jax.files import FileError
from raas_jax.weights import convert, load, save_hf, save_orbax

pytestmark = pytest.mark.once


def test_a_quantised_config_is_named(checkpoint):
    folder = checkpoint.write()
    quantised = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_hf(), **quantised}))
    with pytest.raises(FileError, match="quantised .'awq'.*dequantize"):
        load(folder)


@pytest.mark.parametrize("ending", ["qweight", "weight_scale_inv", "weight.absmax", "SCB"])
def test_quantised_tensors_are_named(checkpoint, ending):
    name = f"model.layers.0.self_attn.q_proj.{ending}"
    checkpoint.tensors[name] = np.zeros(2, np.int32)
    del checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    with pytest.raises(FileError, match=f"quantised .'{name}'"):
        load(checkpoint.write())


def test_numbers_of_one_byte_are_named(checkpoint):
    name = "model.norm.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].astype(jnp.float8_e4m3fn)
    with pytest.raises(FileError, match=f"quantised .'{name}'"):
        load(checkpoint.write())


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("alone", [True, False])
def test_an_adapter_is_refused(checkpoint, file, alone):
    folder = checkpoint.write()
    (folder / file).write_text("{}")
    if alone:
        (folder / "config.json").unlink()
    with pytest.raises(FileError, match=f"{file} is an adapter.*merge_and_unload"):
        load(folder)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("form", ["hf", "orbax", "mesh"])
def test_weights_that_are_not_finite_are_named(checkpoint, tmp_path, number, form):
    for layer, name in ((1, "mlp.up_proj.weight"), (2, "self_attn.k_proj.bias")):
        checkpoint.tensors[f"model.layers.{layer}.{name}"].reshape(-1)[-1] = number
    checkpoint.tensors["model.embed_tokens.weight"][3, 4] = number
    folder, sharding = checkpoint.write(), None
    if form == "orbax":
        from raas_jax.weights import load_hf

        save_orbax(load_hf(folder), tmp_path / "orbax")
        folder = tmp_path / "orbax"
    elif form == "mesh":
        mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
        sharding = NamedSharding(mesh, PartitionSpec())
    named = r"NaN\) in model.embed_tokens.weight, model.layers.1.mlp.up_proj.weight, "
    with pytest.raises(ValueError, match=named + "model.layers.2.self_attn.k_proj.bias;"):
        load(folder, sharding=sharding)


def test_numbers_above_float16_are_named(checkpoint):
    checkpoint.tensors["lm_head.weight"][0, 0] = 1e5
    load(checkpoint.write())
    with pytest.raises(ValueError, match=r"lm_head.weight; load them as bfloat16"):
        load(checkpoint.folder, dtype="float16")


def test_a_config_of_a_far_larger_model_costs_nothing(checkpoint):
    folder = checkpoint.write()
    huge = {"num_hidden_layers": 1024, "vocab_size": 2**24, "hidden_size": 2**20, "head_dim": 2**14}
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_hf(), **huge}))
    start = time.monotonic()
    with pytest.raises(FileError, match="config.json describes a model of .*belongs to another"):
        load(folder)
    assert time.monotonic() - start < 20


def test_many_misfits_are_cut(checkpoint):
    checkpoint.tensors |= {f"x{i:03}": np.zeros(1, np.float32) for i in range(400)}
    with pytest.raises(ValueError, match="unknown: x048\n.*x049\n  and 350 more$"):
        load(checkpoint.write())


def _header(checkpoint, change) -> None:
    file = checkpoint.write() / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    text = change(json.loads(data[8 : 8 + length]))
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + data[8 + length :])


def _norm(**changes):
    def change(header):
        return json.dumps({**header, "model.norm.weight": header["model.norm.weight"] | changes})

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda header: '{"a":' * 100_000,
        lambda header: "[" * 100_000,
        lambda header: "[]",
        lambda header: json.dumps({**header, "a": 1}),
        _norm(data_offsets=[0, 48]),
        _norm(data_offsets=[-48, 0]),
        _norm(data_offsets=[48, 0]),
        _norm(data_offsets=[0, 2**70]),
        _norm(data_offsets="ab"),
        _norm(shape=[2**40, 2**40]),
        _norm(shape=[-12]),
        _norm(shape=[12.0]),
        _norm(dtype="F77"),
    ],
)
def test_a_damaged_header_is_named(checkpoint, change):
    _header(checkpoint, change)
    file = checkpoint.folder / "model.safetensors"
    with pytest.raises(FileError, match=f"{file} is not a whole safetensors file"):
        load(checkpoint.folder)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "model.safetensors.index.json", "config.json"]
)
def test_a_pipe_or_a_folder_is_named(checkpoint, name, make):
    folder = checkpoint.write(shards=2)
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(FileError, match=f"{folder / name} is a folder, a pipe or a device"):
        load(folder)


def test_a_broken_generation_config_is_named(checkpoint):
    from raas_jax import tokenizer

    file = checkpoint.write() / "generation_config.json"
    params = load(checkpoint.folder)
    for text in ("[" * 100_000, '{"eos_token_id": "2"}', '{"eos_token_id": [1.5]}', "[]"):
        file.write_text(text)
        with pytest.raises(FileError, match=str(file)):
            tokenizer.stop_token_ids(params)
    file.unlink()
    file.symlink_to("nothing")
    with pytest.raises(FileNotFoundError, match="generation_config.json"):
        tokenizer.stop_token_ids(params)


def _leftover(folder, age: float):
    left = folder.with_name(f".{folder.name}.0123456789abcdef.tmp")
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    for path in (left / "model.safetensors", left):
        os.utime(path, (time.time() - age,) * 2)
    return left


def test_leftovers_do_not_block_and_old_ones_go(checkpoint, tmp_path):
    out = tmp_path / "out" / "model"
    out.mkdir(parents=True)
    old, other = _leftover(out, 1e6), _leftover(out.with_name("other"), 1e6)
    inside = out / ".config.json.0123456789abcdef.tmp"
    inside.write_text("half")
    convert(checkpoint.write(), out, to="hf")
    assert not old.exists() and not inside.exists() and other.exists()
    assert load(out).config == CONFIG
    young = _leftover(tmp_path / "second", 10)
    convert(checkpoint.folder, tmp_path / "second", to="hf")
    assert young.exists()  # Another process may be writing it.


def test_a_planted_link_is_not_followed(checkpoint, tmp_path, monkeypatch):
    params = load(checkpoint.write())
    name = ".copy.0123456789abcdef.tmp"
    monkeypatch.setattr("raas_jax.weights.files.temporary_name", lambda _: name)
    (tmp_path / "theirs").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "theirs")
    with pytest.raises(OSError, match="cannot be written"):
        save_hf(params, tmp_path / "copy")
    assert not any((tmp_path / "theirs").iterdir())


def test_a_link_to_an_empty_folder_is_filled(checkpoint, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(checkpoint.write(), tmp_path / "link", to="hf")
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "disk").config == CONFIG
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(OSError, match="circle', which cannot be written"):
        convert(checkpoint.folder, tmp_path / "circle", to="hf")


def test_a_target_in_an_open_folder_of_another_name_is_kept(checkpoint, tmp_path):
    """Only what this library names so is taken for a leftover."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".config.json.tmp").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        save_hf(load(checkpoint.write()), tmp_path / "out")


def test_a_tensor_that_ends_early_is_named(checkpoint):
    from raas_jax.weights import safetensors

    file = checkpoint.write() / "model.safetensors"
    entries, _ = safetensors.read_header(file)
    last = max(entries.values(), key=lambda entry: entry.end)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(FileError, match="ended inside a tensor"):
        safetensors.read_tensor(last, np.dtype("float32"))


def test_a_dtype_of_no_use_is_listed(checkpoint):
    name = "model.norm.weight"
    file = checkpoint.write() / "model.safetensors"
    save_file({**checkpoint.tensors, name: np.zeros(12, np.float64)}, file)
    with pytest.raises(ValueError, match=f"unsupported dtype: {name} is F64"):
        load(checkpoint.folder)
