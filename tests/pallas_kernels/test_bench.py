"""The bench of the kernels prints each result as it comes."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

from pallas_kernels import bench, ragged_decode_attention


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
        over, rectangle = row["over_rectangle"], row["operation"] in bench.RECTANGLES
        assert (over is not None and over > 0) if rectangle else over is None


def test_the_table_says_why_there_is_no_kernel(capsys):
    operations = "decode_attention,page_bound"
    assert bench.main(["--shapes", "small", "--op", operations, "--repetitions", "1"]) == 0
    out = capsys.readouterr().out
    assert "| decode_attention | small |" in out and "A copy reads and writes" in out
    assert "No kernel for page_bound: implementation is 'cpu'" in out


@pytest.mark.parametrize("shape", ["qwen2.5-7b/b1/512", "qwen2.5-1.5b/b8/2048"])
def test_ranges_hold_what_the_rectangle_holds_and_differ_a_lot(shape):
    layers, heads, _, _ = bench.MODELS[bench.SHAPES[shape].model]
    mean = bench.SHAPES[shape].budget // bench.PAGE
    ranges = bench._ranges(layers, heads, mean)
    assert ranges == bench._ranges(layers, heads, mean)
    assert (ranges.layers, ranges.heads, ranges.total) == (layers, heads, layers * heads * mean)
    assert mean / 8 <= ranges.sizes[0] < mean / 6 and 3.8 * mean < ranges.most <= 4 * mean
    # Branches of the form for CPUs, which are compiled one by one.
    assert len(ranges.sizes) <= 16
    # Most layers have heads of different sizes.
    counts = np.asarray(ranges.counts)
    assert np.mean(counts.max(axis=1) > counts.min(axis=1)) > 0.6


@pytest.mark.parametrize(("mean", "layers", "heads"), [(1, 2, 2), (4, 2, 2), (8, 3, 2)])
def test_few_pages_are_shared_out_too(mean, layers, heads):
    ranges = bench._ranges(layers, heads, mean)
    assert ranges.total == layers * heads * mean
    assert ranges.sizes == (1,) if mean == 1 else ranges.most >= 2 * ranges.sizes[0]


def test_equal_pages_are_counted_as_equal_bytes():
    shape = bench.Shape("small", 2, 256)
    even, ragged = (
        build(shape, "float32", jax.random.key(0)).bytes
        for build in (bench._decode_attention, bench._ragged_decode_attention)
    )
    # But for a mark, and what is said of the softmax by each of two query heads, of each slot.
    slots = bench._ranges(2, 1, 256 // bench.PAGE).most - 256 // bench.PAGE
    assert ragged - even == 2 * slots * 4 * (1 + 2)


@pytest.mark.parametrize("full", [("xla",), ("xla", "cpu")])
def test_what_does_not_fit_is_left_out(full, monkeypatch, capsys):
    def attention(*args, implementation, **how):
        if implementation in full:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return ragged_decode_attention(*args, implementation=implementation, **how)

    monkeypatch.setattr(bench, "ragged_decode_attention", attention)
    arguments = ["--shapes", "small", "--op", "ragged_decode_attention", "--repetitions", "1"]
    assert bench.main(arguments) == 0
    out, err = capsys.readouterr()
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if "| small |" in line]
    if "cpu" in full:
        assert not rows and "ragged_decode_attention, small: out of memory" in err
    else:
        ((_, _, _, own, xla, faster, over, _),) = rows
        assert float(own) > 0 and over.endswith(" x") and xla == faster == "-"


def test_an_unknown_name_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--op", "page_bund"])
    assert "page_bund: --list prints those there are" in capsys.readouterr().err
