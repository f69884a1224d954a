"""`raas-jax bench`, and the baseline that it times on GPUs."""

import json

import jax
import numpy as np
import pytest

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
        assert timing["transformers_ms_per_token"] is None
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
    theirs, ours = timing["transformers_ms_per_token"], timing["ms_per_token"]
    assert timing["speedup"] == pytest.approx(theirs / ours)
    assert timing["whole_run_speedup"] > 0


def test_bench_against_a_dense_cache_and_the_rows_that_fit(model, capsys, monkeypatch):
    asked = []

    def largest(account, together, limit):
        """Instead of the search, which the engine's tests have: the numbers in seven rows."""
        (program,) = account(7)
        asked.append(sum(leaf.size for leaf in jax.tree.leaves(program.in_avals)))
        return 7

    monkeypatch.setattr("raas_jax.lab.bench.baselines.largest", largest)
    args = ["bench", "--config", model, "--budget", "64", "--prompt-tokens", "20"]
    args += ["--lengths", "128", "--repetitions", "1", "--layers", "1", "--against", "dense"]
    assert main([*args, "--largest-batch", "--json"]) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    assert timing["over_dense"] == pytest.approx(
        timing["dense_ms_per_token"] / timing["ms_per_token"]
    )
    assert timing["dense_kv_bytes"] > timing["kv_bytes"]
    assert timing["largest_batch"] == timing["dense_largest_batch"] == 7
    ours, dense = asked
    assert ours < dense


def test_a_static_cache_decodes_as_a_growing_one():
    """The baseline that is timed on GPUs, without its compiler: every step sees all tokens."""
    torch = pytest.importorskip("torch", reason="transformers needs torch")
    import transformers

    from raas_jax.lab.bench.baselines import _StaticCache
    from raas_jax.lab.bench.run import Run

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    rng = np.random.default_rng(0)
    prompt, tokens = rng.integers(0, 50, (2, 7)), rng.integers(0, 50, (2, 5))
    baseline = _StaticCache(model, prompt, Run(None, None, 6, tokens, 0.0, 0.0), compiled=False)
    seen = []
    baseline.forward = lambda token, **kwargs: seen.append(token) or model(token, **kwargs)
    for _ in range(2):
        seen.clear()
        assert baseline.time_chunk() > 0
        with torch.no_grad():
            wanted = model.generate(
                torch.as_tensor(np.concatenate([prompt, tokens], 1)),
                attention_mask=torch.ones(2, 12, dtype=torch.long),
                max_new_tokens=5,
                min_new_tokens=5,
                do_sample=False,
                pad_token_id=0,
            )
        np.testing.assert_array_equal(torch.cat(seen[1:], 1), wanted[:, 12:])
