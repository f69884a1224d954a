"""`raas-jax memory`."""

import json

from tiny import allotment_of

from raas_jax.cli.main import main


def test_memory_does_not_depend_on_the_length(model, capsys):
    accounts = []
    for tokens in ("1024", "65536"):
        args = ["memory", "--model", model, "--budget", "256", "-n", tokens, "--json"]
        assert main(args) == 0
        accounts.append(json.loads(capsys.readouterr().out))
    short, long = accounts
    assert short["dense"] < long["dense"]
    del short["dense"], long["dense"]
    assert short == long
    assert short["kv"] == sum(short[name] for name in ("prompt", "kept", "current", "metadata"))
    # Prompt, kept and current pages of two layers, two heads of 8, keys and values, float32.
    assert short["kept"] == 2 * 2 * 256 * 8 * 2 * 4
    assert short["decode"]["aliases"] >= short["kv"]


def test_memory_prints_a_table(model, capsys):
    assert main(["memory", "--model", model, "--policy", "dense", "-n", "1000"]) == 0
    text = capsys.readouterr().out
    for name in ("weights", "prompt", "kept", "current", "metadata", "padding", "dense", "decode"):
        assert name in text


def test_memory_of_budgets_that_differ(model, config, tmp_path, capsys):
    """As many pages as without, where the answer needs them all; a short one needs fewer."""
    allotment_of(config, 16, most=32).write(tmp_path / "allotment.json")
    args = ["memory", "--model", model, "--budget", "256", "--json"]
    args += ["--allotment", str(tmp_path / "allotment.json")]
    found = []
    for tokens in ("1024", "64"):
        assert main([*args, "-n", tokens]) == 0
        found.append(json.loads(capsys.readouterr().out))
    long, short = found
    assert long["kept"] == 2 * 2 * 256 * 8 * 2 * 4 > short["kept"]
    assert long["padding"] == short["padding"]  # Of the prompt; all slots fill up.
    assert long["kv"] == sum(long[name] for name in ("prompt", "kept", "current", "metadata"))
    assert long["decode"]["aliases"] >= long["kv"]
