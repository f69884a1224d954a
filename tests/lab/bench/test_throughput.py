"""`raas-jax throughput` on a tiny model: what is counted adds up."""

from __future__ import annotations

import json

import pytest
from tiny_lemma import save_tiny

from raas_jax.cli.main import main
from raas_jax.lab.bench.throughput import mixed_problems


@pytest.mark.once
def test_the_tables_add_up(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    options = ["--problems", "6", "--definitions", "2-4", "--rows", "2", "--budget", "32"]
    small = ["--old", "48", "--samples", "2", "--page-size", "8", "--prompt-tokens", "32"]
    assert main(["throughput", "--model", model, *options, *small, "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in found] == ["Throughput", "Throughput", "Age", "Sharing"]
    engine, plain, age, sharing = found
    assert (engine["how"], plain["how"]) == ("engine", "plain batches")
    assert engine["prompts"] == plain["prompts"] == 6
    # The same answers, since a row does not depend on its batch.
    assert engine["tokens"] == plain["tokens"] and engine["right"] == plain["right"]
    for way in (engine, plain):
        assert way["useful"] == (way["tokens"] - 6) / way["row_steps"] and way["seconds"] > 0
        assert 0 < way["useful"] <= 1
    assert (age["young"], age["old"]) == (48, 48) and age["ratio"] > 0
    assert sharing["unshared_bytes"] == 2 * sharing["shared_bytes"]


def test_prompts_of_ones_own(tmp_path, capsys):
    model = save_tiny(tmp_path / "model")
    file = tmp_path / "prompts.txt"
    file.write_text('a=1; b=a+2; ? b\n{"prompt": [4, 5, 6]}\na=3; ? a\n')
    options = ["--prompt-file", str(file), "-n", "20", "--rows", "2", "--budget", "32"]
    assert main(["throughput", "--model", model, *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"3 prompts of {file}, at most 20 tokens each, float32, RaaS")
    assert text.count("| engine ") == text.count("| plain batches ") == 1 and "ms/step" not in text
    assert main(["throughput", "--model", model, "-n", "20"]) == 2
    assert "--max-new-tokens goes with --prompt-file" in capsys.readouterr().err


def test_sizes_are_mixed():
    sizes = [len(problem.definitions) for problem in mixed_problems(40, 2, 48)]
    assert min(sizes) < 8 and max(sizes) > 40


def test_numbers_below_one_are_refused(capsys):
    assert main(["throughput", "--rows", "0"]) == 2
    assert "--rows is 0; it must be an int of at least 1" in capsys.readouterr().err
