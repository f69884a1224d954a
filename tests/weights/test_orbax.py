"""Orbax folders: complete in themselves, whole or refused."""

import gc
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import CONFIG, Checkpoint
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from raas_jax.params import Params
from raas_jax.weights import convert, load, orbax, save_orbax


def same(a: Params, b: Params) -> None:
    assert a.config == b.config
    a, b = a.stacked(), b.stacked()
    jax.tree.map(np.testing.assert_array_equal, a.weights, b.weights)
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail(str(x.dtype)), a.weights, b.weights)


def test_there_and_back(tmp_path, any_dtype):
    source = Checkpoint(tmp_path / "hf", dtype=any_dtype)
    convert(source.write(shards=2), tmp_path / "orbax")
    same(load(tmp_path / "orbax", dtype="source"), load(tmp_path / "hf", dtype="source"))
    convert(tmp_path / "orbax", tmp_path / "again")
    same(load(tmp_path / "again", dtype="source"), load(tmp_path / "hf", dtype="source"))
    assert (tmp_path / "again" / "model.safetensors").is_file()


def test_dtypes(checkpoint, tmp_path):
    params = load(checkpoint.write())
    save_orbax(params, tmp_path / "orbax")
    half = load(tmp_path / "orbax", dtype="bfloat16")
    assert half.config.dtype == "bfloat16"
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a, b.astype(jnp.bfloat16)),
        half.weights,
        params.weights,
    )
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        load(tmp_path / "orbax", dtype="int8")


def test_the_folder_is_self_contained(checkpoint, tmp_path):
    folder = checkpoint.write()
    (folder / "tokenizer.json").write_text("{}")
    convert(folder, tmp_path / "orbax")
    shutil.rmtree(folder)
    (tmp_path / "orbax").rename(tmp_path / "moved")
    params = load(tmp_path / "moved")
    assert params.source == str(tmp_path / "moved")
    names = ["config.json", "orbax", "tokenizer.json"]
    assert sorted(os.listdir(tmp_path / "moved")) == names


MESH_SCRIPT = """
import sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from raas_jax.sharding import make_mesh
from raas_jax.weights import load, save_hf, save_orbax

mesh = make_mesh(model=2)
plain = load(sys.argv[1], layers="stacked")
for source in sys.argv[1:3]:
    params = load(source, sharding=mesh)
    k = params.weights["layers"]["k"]
    assert k.sharding.spec == P(None, "model", None, None), k.sharding
    assert [s.data.shape[1] for s in k.addressable_shards] == [1, 1]
    jax.tree.map(np.testing.assert_array_equal, params.weights, plain.weights)
save_orbax(params, sys.argv[3])
save_hf(params, sys.argv[4])
for saved in sys.argv[3:]:
    jax.tree.map(np.testing.assert_array_equal, load(saved).stacked().weights, plain.weights)
"""


def test_onto_a_mesh_of_two(checkpoint, tmp_path):
    convert(checkpoint.write(), tmp_path / "orbax")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=2"
    folders = [checkpoint.folder, *(tmp_path / name for name in ("orbax", "orbax2", "hf2"))]
    done = subprocess.run(
        [sys.executable, "-c", MESH_SCRIPT, *folders],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_onto_a_mesh_of_one(checkpoint, tmp_path):
    params = load(checkpoint.write())
    save_orbax(params, tmp_path / "orbax")
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    restored = load(tmp_path / "orbax", sharding=sharding)
    assert restored.weights["norm"].sharding == sharding
    same(restored, params)


def test_arrays_that_do_not_fit_are_one_error(checkpoint, tmp_path):
    folder = tmp_path / "orbax"
    convert(checkpoint.write(), folder)
    fields = {**CONFIG.to_hf(), "num_hidden_layers": 2, "mlp_bias": False, "model_type": "qwen3"}
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError) as error:
        load(folder)
    lines = str(error.value).splitlines()
    assert "  unknown: layers.gate_bias" in lines
    assert "  missing: layers.q_norm" in lines
    assert "  misshapen: layers.q is [3, 4, 6, 12], expected [2, 4, 6, 12]" in lines


@pytest.mark.filterwarnings("ignore:coroutine")
def test_every_damage_is_noticed(checkpoint, tmp_path, monkeypatch):
    """Whatever file is missing or cut, the result is an error or the right weights."""
    # Orbax leaves coroutines behind when it fails, whose end Python would report.
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    params = load(checkpoint.write())
    whole = tmp_path / "whole"
    save_orbax(params, whole)
    files = [file.relative_to(whole) for file in whole.rglob("*") if file.is_file()]
    noticed = 0
    for number, file in enumerate(files):
        for damage in ("missing", "cut", "changed"):
            folder = tmp_path / f"{damage}{number}"
            shutil.copytree(whole, folder)
            data = (folder / file).read_bytes()
            middle = len(data) // 2
            if damage == "missing":
                (folder / file).unlink()
            elif damage == "cut":
                (folder / file).write_bytes(data[:middle])
            else:
                changed = data[:middle] + bytes(255 - b for b in data[middle:])
                (folder / file).write_bytes(changed)
            try:
                same(load(folder), params)
            except (ValueError, FileNotFoundError) as error:
                noticed += 1
                assert str(folder) in str(error) or "config.json" in str(error)
    assert noticed > len(files)
    gc.collect()


QUIET_SCRIPT = """
import sys
import jax, numpy as np
from raas_jax.weights import load

whole = load(sys.argv[1])
for folder in sys.argv[2:]:
    try:
        found = load(folder)
    except ValueError as error:
        print(type(error).__name__, str(error).count("\\n"), error)
    else:  # A file may hold what no array needs.
        jax.tree.map(np.testing.assert_array_equal, found.weights, whole.weights)
        print("whole")
"""


def test_damage_is_one_line_and_nothing_on_stderr(checkpoint, tmp_path):
    save_orbax(load(checkpoint.write()), tmp_path / "whole")
    arrays = [*(tmp_path / "whole" / "orbax").rglob("d/*")]
    damaged = [*arrays, tmp_path / "whole/orbax/manifest.ocdbt", tmp_path / "whole/orbax/_METADATA"]
    folders = []
    for number, file in enumerate(damaged):
        folders.append(tmp_path / str(number))
        shutil.copytree(tmp_path / "whole", folders[-1])
        copy = folders[-1] / file.relative_to(tmp_path / "whole")
        copy.write_bytes(copy.read_bytes()[: copy.stat().st_size // 2])
    command = [sys.executable, "-c", QUIET_SCRIPT, tmp_path / "whole", *folders]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == len(damaged)
    refused = [line for line in lines if line != "whole"]
    assert len(refused) > 2 and "whole" not in lines[-2:]
    odd = [line for line in refused if "FileError 0" not in line or "cannot be read" not in line]
    assert not odd


def test_missing_parts(checkpoint, tmp_path):
    convert(checkpoint.write(), tmp_path / "orbax")
    with pytest.raises(FileNotFoundError, match="No Orbax arrays"):
        orbax.load_orbax(checkpoint.folder)
    (tmp_path / "orbax" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config.json"):
        load(tmp_path / "orbax")


def test_an_occupied_or_unwritable_folder(checkpoint, tmp_path):
    params = load(checkpoint.write())
    with pytest.raises(FileExistsError, match="exists and is not an empty folder"):
        save_orbax(params, checkpoint.folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be written"):
        save_orbax(params, tmp_path / "file" / "orbax")


def test_nothing_is_left_of_a_failed_save(checkpoint, tmp_path, monkeypatch):
    import orbax.checkpoint as ocp

    params = load(checkpoint.write())

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointer, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        save_orbax(params, tmp_path / "out" / "orbax")
    assert list((tmp_path / "out").iterdir()) == []
