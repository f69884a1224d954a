"""`load` and `convert`: where weights are looked for, and what is said when they are not there."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import raas_jax.weights as weights


def test_not_found_names_what_was_tried(tmp_path):
    (tmp_path / "qwen-small").mkdir()
    wrong = str(tmp_path / "qwen-smal")
    with pytest.raises(FileNotFoundError, match=f"tried the folder {wrong}.*Did you mean.*small'"):
        weights.load(wrong)
    with pytest.raises(FileNotFoundError, match="not a hub id.*Did you mean 'demo'"):
        weights.load("dmo")


def test_a_hub_id_that_is_not_there(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("cannot reach the hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match="tried the folder .*Face hub: .*[Cc]heck the name"):
        weights.load("someone/some-model")


def test_a_hub_id_downloads_no_code_and_no_pickle(checkpoint, monkeypatch):
    import fnmatch

    import huggingface_hub

    asked = {}

    def download(name, *, allow_patterns):
        asked[name] = allow_patterns
        return str(checkpoint.write())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    params = weights.load("someone/some-model")
    assert params.source == str(checkpoint.folder)
    [patterns] = asked.values()
    shards = ["model-00001-of-00002.safetensors", "model.safetensors.index.json"]
    wanted = ["config.json", "model.safetensors", *shards, "tokenizer.model"]
    others = ["pytorch_model.bin", "modeling_x.py", "consolidated.safetensors", "model.ckpt"]
    found = [file for pattern in patterns for file in fnmatch.filter(wanted + others, pattern)]
    assert set(found) == set(wanted)


@pytest.mark.parametrize("source", ["", 3, None])
def test_a_source_of_the_wrong_kind(source):
    with pytest.raises(ValueError, match="source is .*expected a hub id"):
        weights.load(source)


def test_a_file_is_not_a_folder(checkpoint):
    file = checkpoint.write() / "model.safetensors"
    with pytest.raises(FileNotFoundError, match="is a file; give the folder"):
        weights.load(file)


def test_convert_checks_before_it_reads(checkpoint, tmp_path):
    folder = checkpoint.write()
    with pytest.raises(ValueError, match="to is 'gguf'"):
        weights.convert(folder, tmp_path / "x", to="gguf")
    with pytest.raises(FileExistsError, match="dst is"):
        weights.convert(folder, folder)
    assert not (tmp_path / "x").exists()


def test_a_damaged_source_leaves_nothing_behind(checkpoint, tmp_path):
    file = checkpoint.write() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="cut short"):
        weights.convert(checkpoint.folder, tmp_path / "out" / "x")
    assert not (tmp_path / "out").exists()


def test_importing_is_light():
    code = (
        "import sys, raas_jax.weights, raas_jax.tokenizer; "
        "print([m for m in ('torch', 'transformers', 'orbax', 'huggingface_hub') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_demo_loads():
    if not weights.DEMO.is_dir():
        pytest.skip("the demo model is not in this checkout")
    params = weights.load("demo")
    assert params.source == str(weights.DEMO)


@pytest.mark.parametrize("layers", ["separate", "stacked", None])
def test_layers_are_stored_as_asked(layers):
    params = weights.load("demo", dtype="float32", layers=layers)
    apart = layers != "stacked"  # On a CPU, where these tests run, it is the default.
    assert isinstance(params.weights["layers"], tuple) == apart
    assert params.size == weights.load("demo").size
    jax.tree.map(
        np.testing.assert_array_equal,
        params.stacked().weights,
        weights.load("demo", dtype="float32", layers="stacked").weights,
    )


def test_another_way_to_store_layers_is_named():
    with pytest.raises(ValueError, match="layers is 'sideways'"):
        weights.load("demo", layers="sideways")
