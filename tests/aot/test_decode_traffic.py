"""What a decode step moves, of whole compiled decodes."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from raas_jax import ModelConfig, RaaS
from raas_jax.aot import traffic_table
from raas_jax.aot.decode_traffic import decode_traffic, floor
from raas_jax.aot.memory import abstract_session, target_mesh
from raas_jax.cli.main import main

# 19 words, 32 wide, 4 query heads on 2 key/value heads of 8.
SMALL = ModelConfig(19, 32, 48, 2, 4, 2, 8, qk_norm=True, model_type="qwen3")
ROWS, PROMPT, BUDGET, P = 3, 24, 64, 16
F32 = 4


def on_cpu(layers):
    config = dataclasses.replace(SMALL, num_hidden_layers=layers)
    return abstract_session(config, RaaS(BUDGET), [PROMPT] * ROWS, 256, "float32", None)


@pytest.fixture(scope="module")
def found():
    """Decodes of two and of five layers, compiled for the CPU."""
    return {layers: decode_traffic(on_cpu(layers)) for layers in (2, 5)}


def test_the_floor_by_hand():
    """Weights once, of the embeddings a row for each token; prompt, kept and current pages once."""
    weights, cache = floor(on_cpu(2))
    attention = 32 * 8 * (4 + 2 + 2 + 4)
    layer = attention + 3 * 32 * 48 + 2 * 32 + 2 * 8
    assert weights == F32 * (2 * layer + 32 + (19 + ROWS) * 32)
    values = 2 * 2 * 2 * 8 * ROWS * (32 + BUDGET + P)
    # Of every kept page its fill and two marks, and the lengths of the prompts.
    assert cache == F32 * (values + ROWS * (3 * 2 * 2 * BUDGET // P + 1))


def test_a_step_moves_at_least_the_floor(found):
    for each in found.values():
        assert each.floor < each.reads + each.writes
        assert each.least <= each.reads + each.writes
        assert each.weights <= each.weights_read and each.cache <= each.cache_read
        assert each.weights_read + each.cache_read <= each.reads
        parts = each.layers + each.outside + each.boundary + each.call
        assert np.isclose(parts, each.reads + each.writes)
        assert each.unknown == []


def test_what_is_in_layers_grows_with_them(found):
    """The same is launched for each; bytes are proportional, and the rest stays."""
    few, many = found[2], found[5]
    assert few.operations_per_layer == many.operations_per_layer > 10
    assert few.operations_outside == many.operations_outside
    # Stacks grow, too, and a little of what is done with them is per layer and per stack.
    assert many.layers / few.layers == pytest.approx(5 / 2, rel=0.02)
    # Outside, policies see all layers at once.
    assert 0 <= many.outside - few.outside < 0.02 * (many.layers - few.layers)


def test_the_command_says_it(tmp_path, capsys):
    config = tmp_path / "config.json"
    fields = {
        "model_type": "qwen3",
        "vocab_size": 19,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    config.write_text(json.dumps(fields))
    args = ["memory", "--config", str(config), "--batch", "3", "--prompt-tokens", "24"]
    args += ["-n", "256", "--budget", "64", "--dtype", "float32", "--traffic"]
    assert main([*args, "--json"]) == 0
    account = json.loads(capsys.readouterr().out)
    assert account["ratio"] == (account["reads"] + account["writes"]) / account["floor"]
    assert main(args) == 0
    text = capsys.readouterr().out
    assert f"{account['ratio']:.2f} x" in text
    assert f"{account['operations_per_layer']:.1f} per layer" in text
    assert main([*args, "--mesh", "1x2"]) == 2
    assert "no target" in capsys.readouterr().err


# Compilers of devices that are not here.

QWEN3_8B = ModelConfig(151_936, 4096, 12_288, 36, 32, 8, 128, qk_norm=True, model_type="qwen3")
LAUNCHES = 20
"""In a layer of it, for one row on a GPU."""


def on_target(target, rows, model=1, layers=QWEN3_8B.num_hidden_layers):
    config = dataclasses.replace(QWEN3_8B, num_hidden_layers=layers)
    mesh = target_mesh(config, target, 1, model)
    session = abstract_session(config, RaaS(1024), [512] * rows, 4096, "bfloat16", mesh)
    return decode_traffic(session)


def test_a_tpu_reads_weights_and_cache_once(tpu):
    tpu("v6e:2x2")
    # Of all TPUs it has the most room that XLA might move a cache into.
    found = on_target("v6e:2x2", rows=16, model=2)
    assert found.devices == 2
    assert 1 < found.ratio < 1.05
    assert found.weights_read == pytest.approx(found.weights, rel=0.01)
    assert found.cache_read == pytest.approx(found.cache, rel=0.03)
    assert found.collectives == {"all-reduce": 2}
    # Nothing of a weight is copied; the current page of all rows is, once per page.
    assert {part.of for part in found.copies} <= {"cache.current.k", "cache.current.v"}
    assert found.copies == [] or max(part.times for part in found.copies) <= 1 / P


@pytest.mark.parametrize("model", [1, 2])
def test_a_call_begins_with_no_copy_of_weights(tpu, model):
    """Though the compiler for TPU v7x would like 16-bit weights in larger tiles."""
    tpu("tpu7x:2x2x1")
    found = on_target("tpu7x:2x2x1", rows=2, model=model, layers=2)
    assert found.weights_read == pytest.approx(found.weights, rel=0.01)
    assert found.copies == []
    assert found.call < 0.001 * found.weights


def test_a_gpu_launches_kernels():
    try:
        found = on_target("h100", rows=1)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    assert 1 < found.ratio < 1.15
    assert found.weights_read == pytest.approx(found.weights, rel=0.01)
    assert found.copies == []
    assert found.kernels["cache_attention"] == found.kernels["merge_parts"] == 1
    assert found.operations_per_layer == int(found.operations_per_layer) <= LAUNCHES


# The table.


def cell(ratio, **fields):
    moved = {"reads": ratio * 2e9, "writes": 0.0, "floor": 2_000_000_000, "least": 2e9}
    more = {"ratio": ratio, "copies": [], "operations_per_layer": 7.0, "operations_outside": 3.0}
    where = {"model": "m", "chip": "v5e", "rows": 1, "fits": True, "devices": 1}
    return {**moved, **more, **where, **fields}


def test_the_table_shows_before_and_now(tmp_path, capsys):
    now, before = tmp_path / "now.jsonl", tmp_path / "before.jsonl"
    copied = [{"reads": 1e9, "writes": 1e9}]
    before.write_text(json.dumps(cell(2.5, copies=copied)) + "\n")
    refused = {"model": "m", "chip": "v5e", "rows": 8, "refusal": "too large"}
    now.write_text(json.dumps(cell(1.1)) + "\n" + json.dumps(refused) + "\n")
    assert traffic_table.main(["--table", str(now), "--before", str(before)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "| Before | Now |" in lines[0]
    assert lines[2] == "| m | v5e | 1 | 2.00 | 2.20 | 2.50 (1.00) | 1.10 (1.00) | 0 | 7 | 3 |"
    assert "does not compile" in lines[3]
    assert len({line.count("|") for line in lines}) == 1


def test_cells_that_are_there_are_not_made_again(tmp_path, monkeypatch, capsys):
    asked = []

    def make(cell, config, options):
        asked.append(cell.rows)
        return {"model": cell.model, "chip": cell.chip, "rows": cell.rows, "refusal": "none"}

    monkeypatch.setattr(traffic_table, "_in_a_process", make)
    out = tmp_path / "cells.jsonl"
    args = ["--config", "m/config.json", "--targets", "v5e", "--out", str(out), "--batch"]
    assert traffic_table.main([*args, "1", "8"]) == 0
    assert traffic_table.main([*args, "1", "8", "16"]) == 0
    assert asked == [1, 8, 16]
    assert len(out.read_text().splitlines()) == 3
    assert "m v5e 16: none" in capsys.readouterr().out
