"""`raas-jax bench`, and the baseline that it times on GPUs."""

import json
import os
import re
import sys

import jax
import pytest

from raas_jax.cli.bench import Bench
from raas_jax.cli.main import main


def test_bench_measures_every_length(model, capsys):
    args = ["bench", "--config", model, "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "64,192", "--repetitions", "2", "--layers", "1"]
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [timing["generated"] for timing in report["timings"]] == [64, 192]
    for timing in report["timings"]:
        assert timing["over_floor"] == pytest.approx(timing["ms_per_token"] / timing["floor_ms"])
        assert timing["compile_seconds"] > 0
        assert timing["others"] == {}
    # Everything but the embedding table would be read; this one is tied.
    read = report["timings"][-1]["floor_ms"] / 1e3 * report["read_bandwidth"]
    assert report["weight_bytes"] < read < report["weight_bytes"] + 200 * 2 * 2 * 8 * 4
    assert main(args) == 0
    text = capsys.readouterr().out
    assert "| generated |" in text and "float32" in text


def test_bench_against_transformers(model, capsys):
    pytest.importorskip("torch", reason="the comparison runs transformers, which needs torch")
    args = ["bench", "--config", model, "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "64", "--repetitions", "1", "--against", "transformers", "--json"]
    assert main(args) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    theirs = timing["others"]["transformers"]
    assert theirs["ratio"] == pytest.approx(theirs["ms_per_token"] / timing["ms_per_token"])
    assert theirs["whole_run_ratio"] > 0


def test_bench_against_a_dense_cache_and_the_rows_that_fit(model, capsys, monkeypatch):
    asked = []

    def largest(account, together, limit):
        """Instead of the search, which the engine's tests have: the numbers in seven rows."""
        (program,) = account(7)
        asked.append(sum(leaf.size for leaf in jax.tree.leaves(program.in_avals)))
        return 7

    monkeypatch.setattr("raas_jax.engine.autosize.largest_batch", largest)
    args = ["bench", "--config", model, "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "128", "--repetitions", "1", "--layers", "1", "--against", "dense"]
    assert main([*args, "--largest-batch", "--json"]) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    dense = timing["others"]["dense"]
    assert dense["ratio"] == pytest.approx(dense["ms_per_token"] / timing["ms_per_token"])
    assert dense["kv_bytes"] > timing["kv_bytes"]
    assert timing["largest_batch"] == timing["dense_largest_batch"] == 7
    ours, theirs = asked
    assert ours < theirs


def test_a_baseline_that_is_not_installed_is_left_out(model, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    args = ["bench", "--config", model, "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "64", "--repetitions", "1", "--layers", "1"]
    assert main([*args, "--against", "transformers,llama.cpp,dense"]) == 0
    out, err = capsys.readouterr()
    assert "transformers is left out: it needs torch" in err
    assert "llama.cpp is left out: it needs llama-cpp-python" in err
    assert "dense ms" in out and "transformers" not in out and "llama.cpp" not in out


def test_what_is_known_is_said_at_once_and_memory_that_ends_costs_one_baseline(
    model, capsys, monkeypatch
):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE", raising=False)

    def full(name, params, prompt_tokens):
        # Before JAX takes all memory of a GPU, as it does unless it is told not to.
        assert os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false"
        said.append(capsys.readouterr().err)
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 MiB")

    said = []
    monkeypatch.setattr("raas_jax.lab.bench.baselines.of_name", full)
    args = ["bench", "--config", model, "--budget", "64", "--prompt-tokens", "20", "--layers", "1"]
    args += ["--lengths", "64", "--repetitions", "1", "--against", "transformers"]
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert re.search(r"raas-jax, 64 generated: [\d.]+ ms/token at first\n", said[0])
    assert "transformers is left out: there is no memory left for it" in err
    assert json.loads(out)["timings"][0]["others"] == {}


def test_on_an_accelerator_it_is_bfloat16(config, monkeypatch):
    bench = Bench(config="unread")
    assert bench._params(config).dtype == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert bench._params(config).dtype == "bfloat16"
    assert Bench(config="unread", dtype="float32")._params(config).dtype == "float32"
