"""A run's folder: going on after a kill, refusing another run, reports, and the command."""

import json

import pytest

from raas_jax.cli.main import main
from raas_jax.cli.options import parse_policies, parse_range
from raas_jax.lab.differences import differences
from raas_jax.lab.runs import LemmaTask, RecordedDecoding, Results, report, run, table
from raas_jax.lab.runs.points import Findings
from raas_jax.policies import Dense, RaaS

TASK = LemmaTask(problems=5, smallest=4, largest=4, max_new_tokens=24)
TRIED = [Dense(page_size=4), RaaS(8, page_size=4)]
KEY = {"task": "lemma", "policy": "raas 8", "item": "0", "sample": 0}
RAAS = {"Policy": "raas", "label": "raas 8", "budget": 8}
CONFIG = {"task": {"name": "lemma"}, "policies": [RAAS]}


@pytest.fixture(scope="module")
def whole(params, tmp_path_factory):
    """An undisturbed run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(params, TASK, TRIED, folder, model="tiny", decoding=RecordedDecoding(3), progress=False)
    return Results.read(folder)


def without_time(results):
    return {
        key: {name: value for name, value in sample.items() if name != "seconds"}
        for key, sample in results.samples.items()
    }


def test_a_whole_run(whole):
    assert len(whole.samples) == 10 and not whole.remarks()
    for sample in whole.of("lemma", "dense (page_size=4)"):
        assert sample["served"] == sample["lookups"] == sample["served_anywhere"]
        assert sample["capped"] == (sample["tokens"] == 24)
    dense, raas = Findings(whole).points
    assert len(dense.samples) == len(raas.samples) == 5
    assert (raas.policy, raas.budget) == ("raas (page_size=4)", 8)
    assert f"| {raas.policy} " in table(whole)
    assert raas.figures["kv_bytes"].value < dense.figures["kv_bytes"].value


@pytest.mark.parametrize("kill_after", [0, 4, 9])
def test_a_killed_run_goes_on_where_it_was(params, whole, tmp_path, killed, kill_after):
    folder = tmp_path / "run"
    with killed(kill_after):
        run(params, TASK, TRIED, folder, model="tiny", decoding=RecordedDecoding(3), progress=False)
    before = Results.read(folder)
    assert len(before.samples) == kill_after and len(before.bad) == 1
    report(folder)
    assert Results.read(folder).bad  # A report leaves the file as it is.
    run(params, TASK, TRIED, folder, model="tiny", decoding=RecordedDecoding(3), progress=False)
    after = Results.read(folder)
    assert not after.bad and not after.repeated
    assert without_time(after) == without_time(whole)
    lines = (folder / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 10
    assert (folder / "samples.bad.jsonl").read_text().count("\n") == 1
    assert len(json.loads((folder / "run.json").read_text())["starts"]) == 2


def test_a_folder_may_be_given_more_policies_later(params, whole, tmp_path):
    options = {"model": "tiny", "decoding": RecordedDecoding(3), "progress": False}
    for tried in (TRIED[1:], TRIED[:1], TRIED[1:]):
        run(params, TASK, tried, tmp_path / "run", **options)
    grown = Results.read(tmp_path / "run")
    assert without_time(grown) == without_time(whole) and len(grown.starts) == 3
    assert [point.label for point in Findings(grown).points] == [
        "raas (page_size=4) 8",
        "dense (page_size=4)",
    ]
    changed = RaaS(8, page_size=4, recent=4)
    run(params, TASK, [changed], tmp_path / "run", **options)
    assert len(Results.read(tmp_path / "run").samples) == 15


def test_another_run_is_refused_with_what_differs(params, whole, tmp_path):
    with pytest.raises(ValueError, match=r"task\.problems: 5 → 6") as error:
        other = LemmaTask(problems=6, smallest=4, largest=4, max_new_tokens=24)
        run(params, other, TRIED, whole.folder, model="tiny", progress=False)
    assert "another run" in str(error.value)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="no folder of a run"):
        Results.open(tmp_path, CONFIG, {})
    with pytest.raises(ValueError, match="is a file"):
        Results.open(tmp_path / "notes.txt", CONFIG, {})
    with pytest.raises(FileNotFoundError, match="holds no run.json"):
        Results.read(tmp_path)


def test_differences_are_readable():
    here = {"task": {"name": "lemma"}, "policies": [RAAS | {"budget": 16}], "x": 1}
    assert differences(CONFIG, here) == ["policies[0].budget: 8 → 16", "x: (none) → 1"]
    assert differences({"p": [1]}, {"p": [1, 2]}) == ["p: [1] → [1, 2]"]


def test_bad_and_repeated_lines_are_left_out_and_named(tmp_path):
    results = Results.open(tmp_path / "run", CONFIG, {})
    results.add({**KEY, "correct": True})
    with pytest.raises(ValueError, match="is there already"):
        results.add(KEY)
    with (tmp_path / "run" / "samples.jsonl").open("a") as file:
        file.write(json.dumps({**KEY, "correct": False}) + "\n")
        file.write(json.dumps({**KEY, "policy": "raas 9", "correct": True}) + "\n")
        file.write('not json\n[1]\n{"item": "1"}\n' + json.dumps({**KEY, "item": "12"}))
    found = Results.read(tmp_path / "run")
    assert found.of("lemma", "raas 8") == [{**KEY, "correct": True}]
    assert len(found.bad) == 4 and found.repeated == 1
    said = " ".join(found.remarks())
    assert "4 unreadable" in said and "1 repeated" in said
    assert "1 sample(s) of a task or policy that run.json does not have" in said


def test_a_full_disk_leaves_what_was_written(tmp_path, monkeypatch):
    results = Results.open(tmp_path / "run", CONFIG, {})
    results.add(KEY)
    file = tmp_path / "run" / "samples.jsonl"
    before = file.read_bytes()
    real = type(file).open

    class Full:
        def __init__(self, stream):
            self.stream = stream

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.stream.close()

        def tell(self):
            return self.stream.tell()

        def write(self, data):
            self.stream.write(data[:5])
            self.stream.flush()
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(file), "open", lambda self, *args, **kw: Full(real(self, *args, **kw)))
        with pytest.raises(OSError, match="the 1 samples before are safe"):
            results.add({**KEY, "item": "1"})
    assert file.read_bytes() == before


def test_the_command_prints_and_saves_the_table(model, tmp_path, capsys):
    out = str(tmp_path / "out")
    args = ["eval", "lemma", "--model", model, "--policies", "raas", "--budgets", "8"]
    args += ["--page-size", "4", "--problems", "2", "--definitions", "4", "-n", "24", "--rows", "3"]
    args += ["-o", out]
    assert main(args) == 0
    printed = capsys.readouterr().out
    assert "Milestone recall" in printed and "raas (page_size=4)" in printed
    assert main(["report", out]) == 0
    assert capsys.readouterr().out == printed == (tmp_path / "out" / "table.md").read_text()
    assert (tmp_path / "out" / "table.csv").read_text().count("\n") == 2
    assert main([*args, "--seed", "1"]) == 2
    assert "task.seed: 0 → 1" in capsys.readouterr().err


def test_bad_options(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    for args, said in [
        (["lema"], "Did you mean lemma?"),
        (["lemma", "--policies", "rass"], "Did you mean raas"),
        (["lemma", "--policies", "raas:alhpa=1"], "Did you mean alpha"),
        (["lemma", "--budgets", "32;64"], "write for example 32,64,128"),
        (["lemma", "--budgets", "40"], "not a multiple"),
        (["lemma", "--definitions", "many"], "24-48"),
        (["lemma", "--problems", "0"], "at least 1"),
        (["lemma", "--split", "train"], "test or validation"),
    ]:
        assert main(["eval", *args, *out]) == 2
        assert said in capsys.readouterr().err, args
    assert main(["report", str(tmp_path)]) == 2
    assert "run.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_policies_are_crossed_with_budgets():
    found = parse_policies("dense, raas:alpha=0.03:granularity=layer", "32,64", 8)
    assert found == [
        Dense(page_size=8),
        RaaS(32, alpha=0.03, granularity="layer", page_size=8),
        RaaS(64, alpha=0.03, granularity="layer", page_size=8),
    ]
    assert parse_policies("raas:budget=48", "32", None) == [RaaS(48)]
    assert parse_range("64") == (64, 64) and parse_range("24-48") == (24, 48)
