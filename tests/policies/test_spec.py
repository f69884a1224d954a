"""Policies from text, as commands and configuration files take them."""

from __future__ import annotations

import json

import pytest
import tyro
from tiny import allotment_of

from raas_jax import Dense, RaaS, policies
from raas_jax.cli.options import PolicyOptions
from raas_jax.lab.runs.experiment import policy_identity

MINE = """
from __future__ import annotations

import dataclasses

from raas_jax.policies import Recent


@dataclasses.dataclass(frozen=True)
class Mine(Recent):
    power: float = 1.0
"""


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("dense", Dense()),
        ("raas:budget=64:alpha=1e-2", RaaS(64, 0.01)),
        ("raas: top-fraction = 0.5 ", RaaS(top_fraction=0.5)),
        ("raas:top_fraction=none:granularity=layer", RaaS(granularity="layer")),
        (
            "h2o:recent_fraction=0.25:prompt=evict",
            policies.H2O(recent_fraction=0.25, prompt="evict"),
        ),
        ("h2o:recent_fraction=0", policies.H2O(recent_fraction=0)),
        ("raas_jax.policies.tova:TOVA:budget=32", policies.TOVA(32)),
    ],
    ids=str,
)
def test_texts(text, wanted):
    assert policies.parse(text) == wanted


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("snap_kv", "policy is 'snap_kv'.*Did you mean snapkv"),
        (
            "h2o:recent_fractoin=0.5",
            "recent_fractoin is not an option.*Did you mean recent_fraction",
        ),
        ("dense:budget=64", "budget is not an option of the policy dense, which has page_size"),
        ("raas:budget=many", "budget of the policy raas is 'many'; expected a whole number"),
        ("raas:budget=64.0", "expected a whole number"),
        ("raas:top_fraction=half", "expected a number or None"),
        ("raas:granularity=head", "granularity is 'head'; choose one of"),
        ("raas:budget=32:budget=64", "budget of policy raas is given twice"),
        ("raas:budget=33", "budget is 33, not a multiple"),
        ("raas:budget=-5", "budget is -5, less than two pages of page_size=16. Use at least 32"),
        ("raas:", "policy is 'raas:'; write its options as NAME:OPTION=VALUE"),
        ("raas:budget", "policy is 'raas:budget'; write its options as NAME:OPTION=VALUE"),
        ("raas:=3", "'' is not an option"),
        ("nowhere_to_be_found:Mine", "nowhere_to_be_found:Mine', which cannot be imported"),
        ("raas_jax.policies.tova:Tova", "has no policy Tova, but TOVA"),
        ("/nowhere/mine.py:Mine", "there is no such file"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(ValueError, match=said):
        policies.parse(text)


def test_more_names_are_known_where_they_are_given():
    more = {"mine": policies.Sink}
    assert policies.parse("mine:budget=64", more) == policies.Sink(64)
    with pytest.raises(ValueError, match="lazy_eviction, mine, quest.*Did you mean mine"):
        policies.parse("mien", more)
    with pytest.raises(ValueError, match="write its options as NAME:OPTION=VALUE"):
        policies.parse("mine:budget", more)
    with pytest.raises(ValueError, match="policy is 'mine'"):
        policies.parse("mine")


def test_a_policy_of_ones_own(tmp_path, monkeypatch):
    """By file from anywhere, by module from its folder; as often as wanted, always the same."""
    (tmp_path / "my_policy.py").write_text(MINE)
    mine = policies.parse(f"{tmp_path}/my_policy.py:Mine:power=2", budget=64)
    assert type(mine).__name__ == "Mine" and (mine.budget, mine.power) == (64, 2)
    assert policies.parse(f"{tmp_path}/my_policy.py:Mine:power=2", budget=64) == mine
    monkeypatch.chdir(tmp_path)
    assert policies.parse("my_policy:Mine:power=2:budget=64") == mine
    with pytest.raises(ValueError, match="has no policy Yours, but Mine"):
        policies.parse("my_policy:Yours")


def options(*args):
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)
    return tyro.cli(PolicyOptions, args=args, config=config).create()


def test_flags():
    assert options() == RaaS()
    assert options("--budget", "64", "--policy", "h2o", "--prompt-pages", "evict") == policies.H2O(
        64, prompt="evict"
    )
    chosen = options("--policy", "rkv:mix=0.07", "--policy-option", "every=64", "--page-size", "8")
    assert chosen == policies.RKV(every=64, mix=0.07, page_size=8)
    twice = ["--policy-option", "every=64", "--policy-option", "recent=32"]
    assert options("--policy", "rkv", *twice) == policies.RKV(every=64, recent=32)


def test_allotments(tmp_path):
    """By file, in a text or by a flag; "auto" waits for the model, and results tell one from
    another and know none where there is none."""
    allotment, file = allotment_of(), tmp_path / "allotment.json"
    allotment.write(file)
    wanted = RaaS(64, allotment=allotment)
    assert policies.parse(f"raas:allotment={file}:budget=64") == wanted
    assert policies.parse(f"raas:allotment={file}", budget=64) != RaaS(64)
    assert options("--allotment", str(file), "--budget", "64") == wanted
    assert options("--allotment", "auto") == RaaS(allotment="auto")
    assert policies.parse("raas:allotment=none") == RaaS()
    for args in ["--policy", f"raas:allotment={file}x"], ["--allotment", f"{file}x"]:
        with pytest.raises(FileNotFoundError, match="there is no such file. Make it with"):
            options(*args)
    file.write_text("{}")
    with pytest.raises(ValueError, match="allotment.json is no allotment .*'version' is missing"):
        options("--allotment", str(file))
    with pytest.raises(ValueError, match="allotment is not an option of the policy dense"):
        options("--policy", "dense", "--allotment", "auto")

    said = policy_identity(wanted)
    assert said["allotment"] == allotment.digest and said["label"].endswith("64")
    assert said["Policy"] == f"raas (allotment={allotment.digest[:8]})"
    json.dumps(said)
    others = policy_identity(RaaS(64, allotment=allotment_of(seed=1))), policy_identity(RaaS(64))
    assert len({said["label"], *(other["label"] for other in others)}) == 3
    assert "allotment" not in others[1]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--policy", "dense", "--prompt-pages", "included"], "--prompt-pages is not an option"),
        (["--policy-option", "every"], "--policy-option is 'every'; write OPTION=VALUE"),
        (["--policy-option", "every=64"], "every is not an option of the policy raas"),
        (["--policy", "raas:budget=64", "--budget", "32"], "budget of policy raas is given twice"),
        (["--policy", "recent", "--prompt-pages", "evict"], "--prompt-pages is 'evict'; choose"),
    ],
    ids=str,
)
def test_wrong_flags(args, said):
    with pytest.raises(ValueError, match=said):
        options(*args)
