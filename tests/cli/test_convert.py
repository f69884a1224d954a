"""`raas-jax convert`."""

from pathlib import Path

from raas_jax.cli.main import main


def test_convert_there_and_back_changes_no_byte(model, tmp_path):
    assert main(["convert", model, str(tmp_path / "orbax")]) == 0
    assert main(["convert", str(tmp_path / "orbax"), str(tmp_path / "hf")]) == 0
    name = "model.safetensors"
    assert (tmp_path / "hf" / name).read_bytes() == (Path(model) / name).read_bytes()
