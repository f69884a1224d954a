"""Hugging Face folders: what goes in, what comes out, and what is refused."""

import dataclasses
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, Checkpoint
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file, save_file

from raas_jax.files import FileError
from raas_jax.params import Params
from raas_jax.weights import hf, load, save_hf
from raas_jax.weights.safetensors import read_header


def test_tensors_go_where_the_table_says(checkpoint):
    params = load(checkpoint.write(), layers="stacked")
    t, w = checkpoint.tensors, params.weights
    layer = "model.layers.1."
    np.testing.assert_array_equal(w["embedding"], t["model.embed_tokens.weight"])
    np.testing.assert_array_equal(w["head"], t["lm_head.weight"])
    np.testing.assert_array_equal(w["layers"]["gate"][1], t[layer + "mlp.gate_proj.weight"])
    q = t[layer + "self_attn.q_proj.weight"]
    # Row 6 of the matrix is the first row of head 1.
    np.testing.assert_array_equal(w["layers"]["q"][1, 1, 0], q[6])
    o = t[layer + "self_attn.o_proj.weight"]
    np.testing.assert_array_equal(w["layers"]["o"][1, :, 6], o[:, 6])
    np.testing.assert_array_equal(
        w["layers"]["k_bias"][1].reshape(-1), t[layer + "self_attn.k_proj.bias"]
    )
    assert params.source == str(checkpoint.folder)
    assert params.config == CONFIG


@pytest.mark.parametrize("shards", [1, 3])
def test_round_trip_keeps_every_byte(tmp_path, any_dtype, shards):
    source = Checkpoint(tmp_path / "source", dtype=any_dtype)
    params = load(source.write(shards), dtype="source")
    assert params.weights["embedding"].dtype == any_dtype == params.config.dtype
    save_hf(params, tmp_path / "copy")
    written = _tensors(tmp_path / "copy")
    assert written.keys() == source.tensors.keys()
    for name, tensor in source.tensors.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].tobytes() == tensor.tobytes(), name
    assert json.loads((tmp_path / "copy/config.json").read_text())["dtype"] == any_dtype.name


def _tensors(folder):
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_export_in_shards_with_an_index(checkpoint, tmp_path):
    params = load(checkpoint.write())
    save_hf(params, tmp_path / "copy", shard_bytes=4000)
    index = json.loads((tmp_path / "copy/model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 3
    assert files == {file.name for file in (tmp_path / "copy").glob("*.safetensors")}
    assert index["metadata"]["total_size"] == 4 * params.size
    for file in files:
        entries, _ = read_header(tmp_path / "copy" / file)
        assert sum(entry.size for entry in entries.values()) <= 4000 or len(entries) == 1
    _same_weights(load(tmp_path / "copy"), params)


def _same_weights(a: Params, b: Params) -> None:
    assert a.config == b.config
    jax.tree.map(np.testing.assert_array_equal, a.weights, b.weights)


def test_the_tokenizer_travels_along(checkpoint, tmp_path):
    folder = checkpoint.write()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    save_hf(load(folder), tmp_path / "copy")
    assert sorted(os.listdir(tmp_path / "copy")) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    ]


def test_dtypes(tmp_path, any_dtype):
    checkpoint = Checkpoint(tmp_path, dtype=any_dtype)
    folder = checkpoint.write()
    assert load(folder).weights["embedding"].dtype == jnp.float32  # the default on a CPU
    for dtype in ("float32", jnp.bfloat16, np.float16):
        params = load(folder, dtype=dtype)
        assert {leaf.dtype for leaf in jax.tree.leaves(params.weights)} == {jnp.dtype(dtype)}
        assert params.config.dtype == jnp.dtype(dtype).name
        np.testing.assert_array_equal(
            params.weights["norm"], checkpoint.tensors["model.norm.weight"].astype(dtype)
        )


@pytest.mark.parametrize("dtype", ["int8", "float64", "no such", 3])
def test_bad_dtype(checkpoint, dtype):
    with pytest.raises(ValueError, match="dtype is .*expected float32"):
        load(checkpoint.write(), dtype=dtype)


def test_files_of_several_dtypes(checkpoint):
    name = "model.norm.weight"
    checkpoint.tensors[name] = checkpoint.tensors[name].astype(np.float16)
    params = load(checkpoint.write(), dtype="source")
    np.testing.assert_array_equal(params.weights["norm"], checkpoint.tensors[name])
    assert params.weights["norm"].dtype == jnp.float32


def test_onto_a_mesh(checkpoint):
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    heads = NamedSharding(mesh, PartitionSpec(None, "model"))
    whole = NamedSharding(mesh, PartitionSpec())

    def tree(config):
        paths = hf.flat_shapes(config, "float32")
        return hf.unflatten({p: heads if p == "layers.q" else whole for p in paths})

    expected = load(checkpoint.write()).stacked()
    for sharding in (tree, tree(CONFIG)):
        params = load(checkpoint.folder, sharding=sharding)
        assert params.weights["layers"]["q"].sharding.is_equivalent_to(heads, 4)
        assert params.weights["norm"].sharding == whole
        _same_weights(params, expected)
    apart = load(checkpoint.folder, sharding=tree, layers="separate")
    assert all(own["q"].sharding.spec == PartitionSpec("model") for own in apart.weights["layers"])
    _same_weights(apart.stacked(), expected)
    device = SingleDeviceSharding(jax.devices()[0])
    _same_weights(load(checkpoint.folder, sharding=device), expected)
    with pytest.raises(ValueError, match="sharding.*differs in norm"):
        load(checkpoint.folder, sharding={k: v for k, v in tree(CONFIG).items() if k != "norm"})
    layers = NamedSharding(mesh, PartitionSpec("model"))
    with pytest.raises(ValueError, match="splits the layers axis"):
        load(checkpoint.folder, sharding=layers)


def test_all_that_does_not_fit_is_one_error(checkpoint):
    tensors = checkpoint.tensors
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.3.input_layernorm.weight"] = np.zeros(12, np.float32)
    tensors["model.vision.weight"] = np.zeros(2, np.float32)
    tensors["model.norm.weight"] = np.zeros(13, np.float32)
    tensors["model.layers.0.mlp.up_proj.bias"] = np.zeros(20, np.int32)
    checkpoint.write(shards=2)
    first, second = sorted(checkpoint.folder.glob("*.safetensors"))
    again = "model.layers.2.mlp.up_proj.weight"
    for file in (first, second):
        save_file({**load_file(file), again: tensors[again]}, file)
    with pytest.raises(ValueError) as error:
        load(checkpoint.folder)
    assert str(error.value).splitlines()[1:] == [
        f"  duplicate: {again} is in {first.name} and in {second.name}",
        "  unknown: model.layers.3.input_layernorm.weight",
        "  unknown: model.vision.weight",
        "  missing: model.layers.0.self_attn.q_proj.weight",
        "  missing: lm_head.weight",
        "  misshapen: model.norm.weight is [13], expected [12]",
        "  unsupported dtype: model.layers.0.mlp.up_proj.bias is I32, expected F32, F16, BF16",
    ]


def test_a_name_twice_in_one_file(checkpoint):
    file = checkpoint.write() / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].decode().rstrip()
    entry = json.loads(header)["model.norm.weight"]
    header = header[:-1] + f',"model.norm.weight":{json.dumps(entry)}}}'
    file.write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + length :])
    with pytest.raises(ValueError, match="duplicate: model.norm.weight|not a whole safetensors"):
        load(checkpoint.folder)


def test_a_tied_head_may_be_saved_or_not(checkpoint):
    checkpoint.config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["model.embed_tokens.weight"]
    saved = load(checkpoint.write())
    assert "head" not in saved.weights
    checkpoint.tensors["lm_head.weight"] = checkpoint.tensors["lm_head.weight"] + 1
    with pytest.raises(ValueError, match="lm_head.weight differs.*tie_word_embeddings"):
        load(checkpoint.write())
    del checkpoint.tensors["lm_head.weight"]
    _same_weights(load(checkpoint.write()), saved)


def test_buffers_of_the_rotary_embedding_are_ignored(checkpoint):
    expected = load(checkpoint.write())
    for layer in range(3):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        checkpoint.tensors[name] = np.ones(3, np.float32)
    _same_weights(load(checkpoint.write()), expected)


def test_a_pickle_is_refused(checkpoint):
    folder = checkpoint.write()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pickle \(pytorch_model.bin\).*[Cc]onvert"):
        load(folder)


def test_no_weights_no_config(checkpoint):
    folder = checkpoint.write()
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="No weights in .*model.safetensors"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'.*Supported are .*llama, .*mistral.*qwen3"),
        (
            {"rope_scaling": {"rope_type": "mrope", "factor": 2.0}},
            "'mrope'.*'default', 'linear', 'dynamic'",
        ),
    ],
)
def test_unsupported_models_are_named(checkpoint, change, message):
    folder = checkpoint.write()
    (folder / "config.json").write_text(json.dumps({**CONFIG.to_hf(), **change}))
    with pytest.raises(ValueError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, 0.5, -1])
def test_a_file_cut_short_is_named(checkpoint, keep):
    file = checkpoint.write() / "model.safetensors"
    data = file.read_bytes()
    keep = int(keep * len(data)) if isinstance(keep, float) else keep
    file.write_bytes(data[:keep])
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load(checkpoint.folder)


@pytest.mark.parametrize(
    "head", [b"\xff" * 8, (20).to_bytes(8, "little"), b"version https://git-lfs.github.com"]
)
def test_a_file_that_is_something_else_is_named(checkpoint, head):
    file = checkpoint.write() / "model.safetensors"
    file.write_bytes(head + file.read_bytes()[len(head) :])
    with pytest.raises(ValueError, match=f"{file} is not a whole safetensors file"):
        load(checkpoint.folder)


def test_missing_shards_are_named(checkpoint):
    folder = checkpoint.write(shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks 1 of the 3.*model-00002-of-00003"):
        load(folder)
    checkpoint.write_index({"model.norm.weight": "x" * 5000})  # Longer than the system takes.
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the 1.*'xxx.*\.\.\.xxx"):
        load(folder)


@pytest.mark.parametrize(
    "name",
    ["/ABSOLUTE", "../secret/x", "sub/../../secret/x", "..\\secret", "a\0b", "", 7, None, [1]],
)
def test_an_index_that_points_outside_is_refused(checkpoint, tmp_path, name):
    folder = checkpoint.write(shards=2)
    (tmp_path / "secret").mkdir()
    file = tmp_path / "secret" / "x"
    shutil.copyfile(folder / "model-00001-of-00002.safetensors", file)
    name = str(file) if name == "/ABSOLUTE" else name
    index = folder / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    checkpoint.write_index({**weights, "model.norm.weight": name})
    with pytest.raises(FileError, match=f"{index} .* in weight_map is no name of a file in its"):
        load(folder)


@pytest.mark.parametrize("what", ["file", "folder", "the whole model"])
def test_the_links_of_a_user_are_followed(checkpoint, tmp_path, what):
    folder = checkpoint.write(shards=2)
    expected = load(folder)
    first, elsewhere = "model-00001-of-00002.safetensors", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.move(folder / first, elsewhere / first)
    if what == "folder":
        (folder / "linked").symlink_to(elsewhere)
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        names = {k: f"linked/{v}" if v == first else v for k, v in index.items()}
        checkpoint.write_index(names)
    else:
        (folder / first).symlink_to(elsewhere / first)
    if what == "the whole model":
        (tmp_path / "link").symlink_to(folder)
        folder = tmp_path / "link"
    _same_weights(load(folder), expected)


def test_a_link_to_nothing_is_named(checkpoint, tmp_path):
    file = checkpoint.write() / "model.safetensors"
    file.unlink()
    file.symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match=str(file)):
        load(checkpoint.folder)


def test_the_links_of_the_hub_cache_are_followed(checkpoint, tmp_path):
    expected = load(checkpoint.write(shards=2))
    model = tmp_path / "models--some--model"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "abc").mkdir(parents=True)
    for number, file in enumerate(checkpoint.folder.iterdir()):
        shutil.copyfile(file, model / "blobs" / str(number))
        (model / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{number}")
    _same_weights(load(model / "snapshots" / "abc"), expected)
    (tmp_path / "mine").symlink_to(model / "snapshots" / "abc")
    _same_weights(load(tmp_path / "mine"), expected)


@pytest.mark.parametrize(
    "index",
    [
        *("[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', '{"weight_map": [1]}', "{"),
        *('{"weight_map": NaN}', '{"weight_map": ' + "[" * 100_000, "\0"),
    ],
    ids=lambda text: text[:20],
)
def test_a_broken_index(checkpoint, index):
    folder = checkpoint.write(shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ValueError, match="is not an index of shards.*again"):
        load(folder)


def test_nothing_is_left_of_a_failed_export(checkpoint, tmp_path, monkeypatch):
    params = load(checkpoint.write())

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hf.safetensors, "write_file", fail)
    with pytest.raises(OSError, match="folder is .*cannot be written .No space left"):
        save_hf(params, tmp_path / "out" / "copy")
    assert list((tmp_path / "out").iterdir()) == []


def test_an_occupied_or_unwritable_folder(checkpoint, tmp_path):
    params = load(checkpoint.write())
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        save_hf(params, checkpoint.folder)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        save_hf(params, file / "copy")
    empty = tmp_path / "empty"
    empty.mkdir()
    save_hf(params, empty)
    _same_weights(load(empty), params)
