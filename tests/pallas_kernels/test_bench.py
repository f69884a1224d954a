"""The bench of the kernels prints each result as it comes."""

from __future__ import annotations

import json

import pytest

from pallas_kernels import bench


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(bench.MODELS, "small", (2, 1, 2, 16))
    monkeypatch.setitem(bench.SHAPES, "small", bench.Shape("small", 1, 64))
    monkeypatch.setattr(bench, "COPIED_BYTES", {"cpu": 2**20})


def test_every_operation_is_timed(capsys):
    assert bench.main(["--shapes", "small", "--repetitions", "1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["operation"] for row in rows] == list(bench.OPERATIONS)
    for row in rows:
        assert row["device"] == "cpu" and row["xla_ms"] > 0 and row["copy_bandwidth"] > 0
        assert (row["ms"] is None) == (row["why"] is not None)
        assert (row["of_bandwidth"] is None) == (row["operation"] == "prefill_attention")


def test_the_table_says_why_there_is_no_kernel(capsys):
    operations = "decode_attention,page_bound"
    assert bench.main(["--shapes", "small", "--op", operations, "--repetitions", "1"]) == 0
    out = capsys.readouterr().out
    assert "| decode_attention | small |" in out and "A copy reads and writes" in out
    assert "No kernel for page_bound: implementation is 'cpu'" in out


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--op", "page_bund"])
    assert "page_bund: --list prints those there are" in capsys.readouterr().err
