"""`raas-jax device-check` as a user calls it, on a CPU: all tiny, in processes of its own."""

from __future__ import annotations

import json
import sys

import pytest

from raas_jax.cli.main import main
from raas_jax.lab.device_check import driver


def test_the_command(tmp_path, capsys, monkeypatch):
    """Two sections in full; the others are tested one by one, in one process."""
    wanted = [each for each in driver.SECTIONS if each.name in ("device", "sampling")]
    run = driver.run
    monkeypatch.setattr(driver, "run", lambda *given: run(*given, sections=wanted))
    out = tmp_path / "new" / "folder"
    assert main(["device-check", "--minutes", "4", "--out", str(out)]) == 0
    said, told = capsys.readouterr()
    assert said == (out / "table.md").read_text()
    assert said.startswith("### raas-jax device-check\n\ncpu (cpu), ")
    assert "tiny's shape, float32" in said
    assert "| sampling | greedy, batch 64, vocabulary 512 " in said
    assert f"results go to {out}" in told and "\ndevice: done, " in told
    assert "\nsampling: top-p, batch 8, vocabulary 512: " in told
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == {"device", "sampling"}
    # The results are those of one check.
    assert main(["device-check", "--out", str(out)]) == 2
    assert "is not empty; give a new folder" in capsys.readouterr().err


def test_a_wrong_kernel_is_the_exit_code(tmp_path, capsys, monkeypatch):
    code = (
        "import sys; from pathlib import Path; name, _, out = sys.argv[1:]\n"
        "from raas_jax.lab.device_check.journal import Journal\n"
        "Journal(Path(out, 'results.jsonl'), name).kernel('an_operation, B1', False, 0.5, 'out')\n"
    )
    run = driver.run
    part = [driver.Section("kernels", 1)]
    monkeypatch.setattr(
        driver, "run", lambda *given: run(*given, part, [sys.executable, "-c", code])
    )
    assert main(["device-check", "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().out
    assert "0 of 1 right" in said and "WRONG: out" in said


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--minutes", "0"], "--minutes is 0.0; it must be a number from 0.5 to 1440"),
        (["--minutes", "nan"], "--minutes is nan; it must be"),
        (["--out", "FILE"], "which is a file; give a folder"),
        (["--out", "FILE/below"], "not a directory"),
        (["--config", "/nowhere/config.json"], "/nowhere/config.json"),
    ],
)
def test_careless_use_is_a_line(args, said, tmp_path, capsys, monkeypatch):
    def never(*given):
        raise AssertionError("nothing is measured")

    monkeypatch.setattr(driver, "run", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["device-check", *(each.replace("FILE", "file") for each in args)]) == 2
    err = capsys.readouterr().err
    assert said in err and len(err.splitlines()) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
