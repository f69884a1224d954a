"""The command that compares every family with transformers."""

from __future__ import annotations

import dataclasses
import importlib.util

import pytest

from raas_jax import make_mesh
from raas_jax.families import FAMILIES
from raas_jax.lab.parity import __main__ as command
from raas_jax.lab.parity.measure import POLICIES, REFUSED, Parity, compare, made
from raas_jax.lab.parity.models import CASES
from raas_jax.lab.parity.table import BEGIN, END, table, write

GOOD = Parity(1e-6, True, None, True, True, True, tuple(POLICIES))


def test_every_family_has_a_variant():
    assert {family for family, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.once
def test_a_model_is_compared():
    pytest.importorskip("torch", reason="torch is the reference")
    with made("smollm3") as model:
        found = compare(model, mesh=make_mesh())
        assert found.holds and found == dataclasses.replace(GOOD, logits=found.logits)
        weights = dict(model.ours.weights)
        weights["norm"] = weights["norm"].at[0].multiply(1.5)
        other = dataclasses.replace(model.ours, weights=weights)
        found = compare(model._replace(ours=other), whole=False)
        assert found.logits > 0.01 and not found.greedy and not found.holds
        assert found.exported and (found.engine, found.mesh, found.policies) == (None, None, None)


@pytest.mark.parametrize(
    "change",
    [
        {"logits": 3e-4},
        {"greedy": False},
        {"windowed": False},
        {"exported": False},
        {"engine": False},
        {"mesh": False},
        {"policies": ("raas", "quest")},
    ],
    ids=str,
)
def test_whatever_differs_is_told(change):
    assert GOOD.holds
    bad = dataclasses.replace(GOOD, **change)
    assert not bad.holds
    before, after = (cells({"llama": [GOOD, each]}) for each in (GOOD, bad))
    assert before == ["`llama`", "2", "1e-06", "equal", "-", "equal", "equal", "equal", "4 of 4"]
    assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_what_is_refused_differs():
    assert not REFUSED.holds
    found = cells({"llama": [GOOD, REFUSED]})
    assert found[2:6] == ["inf", "differ in 1 of 2", "-", "differ in 1 of 2"]


def cells(found):
    """Of the last line."""
    return [cell.strip() for cell in table(found).splitlines()[-1].strip("|").split("|")]


def test_a_family_without_variants_has_a_line():
    assert cells({"new": []}) == ["`new`", "0", *["-"] * 7]


def test_the_table_has_its_place_in_a_page(tmp_path):
    page, bad = tmp_path / "page.md", dataclasses.replace(GOOD, greedy=False)
    first = table({"b": [GOOD], "a": [GOOD]})
    write(page, first)
    assert page.read_text() == f"{first.strip()}\n"
    page.write_text(f"before\n\n{BEGIN}\n{END}\n\nafter\n")
    write(page, first)
    whole = table({"a": [GOOD], "b": [GOOD]}).strip()
    assert page.read_text() == f"before\n\n{BEGIN}\n{whole}\n{END}\n\nafter\n"
    # Of what is measured again, and what is new, the lines of others stay.
    write(page, table({"c": [GOOD], "b": [bad]}))
    whole = table({"a": [GOOD], "b": [bad], "c": [GOOD]}).strip()
    assert page.read_text() == f"before\n\n{BEGIN}\n{whole}\n{END}\n\nafter\n"
    page.write_text(f"{BEGIN}\n")
    with pytest.raises(ValueError, match="page.md has 1 lines .* and 0 lines"):
        write(page, first)


def test_what_cannot_be_run_is_said(capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        command.main(["lama"])
    assert "no family is called lama; there are " in (said := capsys.readouterr().err)
    assert all(family in said for family in FAMILIES)
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else found(name)
    )
    with pytest.raises(SystemExit, match="2"):
        command.main(["llama"])
    assert "torch is not installed: " in (said := capsys.readouterr().err) and "'.[dev]'" in said
