"""Options that several commands share."""

import json
from pathlib import Path

import pytest

from raas_jax.cli.options import parse_mesh, read_config, readable_bytes


def test_config_files_may_be_yaml(config, tmp_path):
    file = tmp_path / "shape.yaml"
    file.write_text(
        "model:\n" + "\n".join(f"  {k}: {json.dumps(v)}" for k, v in config.to_hf().items())
    )
    assert read_config(str(file)) == config
    assert read_config(str(file), layers=7).num_hidden_layers == 7
    shapes = Path(__file__).resolve().parents[2] / "configs"
    assert read_config(str(shapes / "bench_25m.yaml")).num_hidden_layers == 8


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1024, "1.0 KiB"), (150 * 2**20, "150 MiB"), (2**40, "1.0 TiB")],
)
def test_bytes_are_readable(count, text):
    assert readable_bytes(count) == text


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("data=2,model=4", {"data": 2, "model": 4}),
        ("model=4, data=2", {"data": 2, "model": 4}),
        ("2x4", {"data": 2, "model": 4}),
        ("model=8", {"model": 8}),
        (None, {}),
    ],
)
def test_a_mesh_is_read(text, sizes):
    assert parse_mesh(text) == sizes


@pytest.mark.parametrize("text", ["", "2", "rows=2", "data=0", "0x4", "2x4x1", "data=2,data=2"])
def test_what_is_no_mesh_is_refused(text):
    with pytest.raises(ValueError, match=f"--mesh is '{text}'; write for example data=2,model=4"):
        parse_mesh(text)
