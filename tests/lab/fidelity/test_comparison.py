"""A comparison from texts to tables: the command, going on, and what it refuses."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab import fidelity
from raas_jax.lab.fidelity import run, texts
from raas_jax.lab.fidelity.findings import Findings
from raas_jax.lab.runs.results import Results
from raas_jax.policies import Dense, Quest, RaaS, Recent

LENGTH, PROMPT, PAGE = 150, 20, 4


@pytest.fixture(scope="module")
def params():
    return raas_jax.load("demo")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "sums.txt"
    file.write_text("".join(f"a = {n} ; b = a + {n} ; c = b + a ;\n" for n in range(200)))
    return file


def command(source, out, *more):
    return main(
        [
            *("eval", "fidelity", "demo", "--out", str(out), "--text", f"sums={source}"),
            *("--length", str(LENGTH), "--prompt-tokens", str(PROMPT), "--page-sizes", str(PAGE)),
            *("--texts", "3", "--rows", "2", "--policies", "raas,recent", "--budgets", "32"),
            *more,
        ]
    )


def table(out):
    return list(csv.DictReader((out / "table.csv").open()))


def test_the_command(source, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(source, out) == 0
    shown = capsys.readouterr()
    assert "3 texts of 150 tokens" in shown.out and "raas (page_size=4)" in shown.out
    assert {file.name for file in out.glob("*.png")} == {"kl_along.png"}  # Of one budget.
    first = (out / "samples.jsonl").read_text()
    assert len(first.splitlines()) == 3 * 3  # Dense and two policies.
    half = [row for row in table(out) if row["part"] == "second half"]
    assert next(row["policy"] for row in half).startswith(("raas", "recent"))
    assert all(0 < float(row["kl"]) < 20 for row in half)
    # More policies and more texts join; nothing that is there is computed again.
    assert command(source, out, "--policies", "raas,quest", "--texts", "4") == 0
    later = (out / "samples.jsonl").read_text()
    assert later.startswith(first)
    added = [json.loads(line) for line in later[len(first) :].splitlines()]
    assert sorted((each["policy"].split()[0], each["item"]) for each in added) == [
        ("dense", "sums 3"),
        *(("quest", f"sums {n}") for n in range(4)),
        ("raas", "sums 3"),
    ]
    assert command(source, out, "--texts", "1", "--budgets", "48") == 0
    assert {file.name for file in out.glob("*.png")} == {"kl_bytes.png", "kl_along.png"}
    assert main(["report", str(out)]) == 0
    assert "recent (page_size=4)" in capsys.readouterr().out


def test_sums_are_those_of_the_tokens(params, source, tmp_path):
    given = texts.windows(params, "sums", [source], LENGTH, 2)
    points = run.plan_points(params, [RaaS(32, page_size=PAGE)], PROMPT, LENGTH)
    results = run.run(
        params, given, points, tmp_path / "run", model="demo", prompt_tokens=PROMPT, rows=2
    )
    findings = Findings(results)
    (point,) = findings.points
    from raas_jax.scoring import score

    ids = list(given[1].tokens)
    scored = score(params, ids[:PROMPT], ids[PROMPT:], policy=points[0].policy)
    assert (findings.dense_nll + point.sums["excess"])[1].sum() == pytest.approx(
        -scored.logprobs[1:].sum(dtype=np.float64), rel=1e-4
    )
    assert findings.tokens.sum() == LENGTH - PROMPT - 1


def test_equal_bytes(params):
    tried = [RaaS(64, page_size=PAGE), Recent(64, page_size=PAGE), Quest(64, page_size=PAGE)]
    tried += [RaaS(64, page_size=8), Dense(page_size=PAGE)]
    raas, recent, quest, larger = run.plan_points(params, tried, PROMPT, 400)
    assert recent.described["bytes"] <= raas.described["bytes"] < quest.described["bytes"]
    assert recent.policy.budget >= 64 and quest.policy.budget == 64
    assert larger.described["bytes"] <= raas.described["bytes"] * 1.02
    with pytest.raises(ValueError, match="no budget among them"):
        run.plan_points(params, [Dense()], PROMPT, LENGTH)
    with pytest.raises(ValueError, match="policies repeat"):
        run.plan_points(params, [RaaS(64), RaaS(64)], PROMPT, LENGTH)


def test_a_folder_of_other_texts_is_refused(params, source, tmp_path, capsys):
    out = tmp_path / "run"
    assert command(source, out, "--texts", "1") == 0
    other = tmp_path / "sums.txt"
    other.write_text("b = 3 ; c = b + 4 ;\n" * 300)
    assert command(other, out, "--texts", "1") == 2
    assert "holds another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--text", "nowhere.txt"), "no such file"),
        (("--text", "=x"), "write FILE or KIND=FILE"),
        (("--texts", "500"), "500 are wanted"),
        (("--length", "21"), "must be above the 20"),
        (("--budgets", "4"), "budget is 4"),
        (("--policies", "dense"), "no budget among them"),
        (("--page-sizes", "x"), "--page-sizes is 'x'"),
    ],
)
def test_what_is_refused(source, tmp_path, capsys, more, said):
    assert command(source, tmp_path / "run", *more) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_kinds_are_named(tmp_path):
    for name in ("gsm8k/test.jsonl", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    given = [str(tmp_path / "gsm8k/test.jsonl"), str(tmp_path / "notes.txt")]
    given += [f"more={given[1]}", f"more={given[0]}"]
    assert [(kind, len(files)) for kind, files in texts.given_sources(given)] == [
        *(("gsm8k", 1), ("notes", 1), ("more", 2)),
    ]


def test_questions_and_answers(params, tmp_path):
    file = tmp_path / "test.jsonl"
    lines = [{"question": f"a = {n} ; ? a :", "answer": f"a = {n} ;"} for n in range(400)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    first, second = texts.windows(params, "sums", [file], 40, 2)
    skipped = texts.windows(params, "sums", [file], 40, 1, skip=1)
    assert skipped == [second] and first != second
    assert len(first.tokens) == 40
    # Each begins with a line, and so with the same first tokens.
    assert first.tokens[:2] == second.tokens[:2]
    file.write_text('{"question": "x"}\n')
    with pytest.raises(ValueError, match="line 1 is no question with its answer"):
        texts.windows(params, "sums", [file], 40, 1)


def test_every_machine_has_default_texts():
    kinds = dict(texts.default_sources())
    assert len(kinds["python"]) >= 6 and kinds["manual"][0].is_file()


def test_the_kind_of_a_folder(source, tmp_path, capsys):
    assert command(source, tmp_path / "run", "--texts", "1") == 0
    assert fidelity.is_folder(tmp_path / "run")
    assert Results.read(tmp_path / "run").layout.kind == "fidelity"
    with pytest.raises(FileNotFoundError):
        fidelity.is_folder(tmp_path)
