"""Folders of runs that are damaged, half made or of another version: one error says which file."""

import json
import os

import pytest

from raas_jax.cli.main import main
from raas_jax.files import FileError
from raas_jax.lab.runs import Results, report
from raas_jax.lab.runs.layout import read_speed, read_steps
from raas_jax.lab.runs.results import RUN, SAMPLES

DEEP = "[" * 100_000
POLICY = {"label": "raas 8", "Policy": "raas", "Budget": "8", "budget": 8}
RECORDED = {
    "task": {"name": "lemma", "problems": 2},
    "model": "tiny",
    "dtype": "float32",
    "columns": [
        {"name": "correct", "title": "Exact answers", "kind": "share", "per": ""},
        {"name": "tokens", "title": "Tokens", "kind": "mean", "per": ""},
        {"name": "served", "title": "Recall", "kind": "ratio", "per": "lookups"},
    ],
    "policies": [POLICY],
}
ASKING = {"samples": 2, "sampling": {"temperature": 1.0}}
BENCHMARK = {"kind": "benchmark", "asking": ASKING, **RECORDED}
KEY = {"task": "lemma", "policy": "raas 8", "item": "0", "sample": 0, "correct": True}
SAMPLES_OF = {
    "recorded": (RECORDED, KEY | {"tokens": 5, "served": 1, "lookups": 2}),
    "benchmark": (
        BENCHMARK,
        KEY
        | {"tokens": 5, "capped": False, "finish_reason": "stop", "start": 0, "elapsed": 1.5}
        | {"seconds": 1.0, "kv_bytes": 64, "kv_bytes_of_length": 64, "error": None},
    ),
}


def write(folder, run, *samples):
    (folder / RUN).write_text(run if isinstance(run, str) else json.dumps(run))
    lines = (each if isinstance(each, str) else json.dumps(each) for each in samples)
    (folder / SAMPLES).write_text("".join(line + "\n" for line in lines))


@pytest.mark.parametrize("kind", SAMPLES_OF)
def test_a_sample_has_the_fields_of_its_kind(tmp_path, kind):
    """Else its line is kept aside, and the report is made of the others."""
    config, good = SAMPLES_OF[kind]
    needed = [name for name in good if name != "error"]
    lacking = [{k: v for k, v in good.items() if k != name} for name in needed]
    wrong = [good | {name: None} for name in needed]
    others = [good | {"sample": "0"}, good | {"correct": 1}, good | {"tokens": "5"}, 3, DEEP]
    others += ['{"item": "\\ud800"}', good | {"tokens": 10**400}, KEY, "not json"]
    if kind == "benchmark":
        others += [good | {"elapsed": -1.0}, good | {"seconds": 1e308}]
    bad = [*lacking, *wrong, *others]
    write(tmp_path, {"version": 2, "config": config, "starts": []}, good, *bad)
    found = Results.read(tmp_path)
    assert list(found.samples.values()) == [good] and len(found.bad) == len(bad)
    text, remarks = report(tmp_path)
    assert "| raas " in text and f"{len(bad)} unreadable" in remarks[0]
    with Results.open(tmp_path, config, {}):
        pass
    assert len((tmp_path / "samples.bad.jsonl").read_text().splitlines()) == len(bad)
    assert not Results.read(tmp_path).bad


def test_what_could_not_be_answered_needs_no_times(tmp_path):
    config, good = SAMPLES_OF["benchmark"]
    failed = {k: v for k, v in good.items() if k not in ("seconds", "kv_bytes")}
    failed |= {"finish_reason": "error", "error": "too long"}
    write(tmp_path, {"version": 2, "config": config}, failed)
    assert "1 × too long" in report(tmp_path)[0]


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ("", "not valid JSON"),
        ('{"version": 2, "conf', "not valid JSON"),
        (DEEP, "nested more than"),
        ("[]", "holds a list; expected named fields"),
        ({"version": 2}, "it lacks config"),
        ({"version": "2", "config": RECORDED}, "version is '2'; it must be an int"),
        ({"version": 4, "config": RECORDED}, "has version 4"),
        ({"version": 2, "config": [1]}, r"config is \[1\]; expected named fields"),
        ({"version": 2, "config": RECORDED, "starts": 3}, "starts is 3; it must be a list"),
        ({"version": 2, "config": RECORDED | {"kind": 5}}, "config.kind is 5"),
        ({"version": 2, "config": RECORDED | {"columns": [3]}}, r"columns\[0\] is 3"),
        ({"version": 2, "config": RECORDED | {"policies": None}}, "config.policies is None"),
        ({"version": 2, "config": RECORDED | {"policies": [{}]}}, r"config.policies\[0\].Policy"),
        ({"version": 2, "config": RECORDED | {"task": "lemma"}}, "config.task is 'lemma'"),
        ({"version": 2, "config": {"kind": "study", "columns": []}}, "columns lack capped"),
        ({"config": {"share": [], "Policy": 3, "prompt": {}}}, "it lacks config.model"),
    ],
)
def test_a_configuration_that_is_none(tmp_path, run, said, capsys):
    write(tmp_path, run)
    with pytest.raises(FileError, match=said) as error:
        report(tmp_path)
    assert error.value.path == tmp_path / RUN
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"raas-jax: error: {tmp_path / RUN} ")


def test_no_regular_file(tmp_path):
    """A pipe would hang, a folder has no lines: neither is a run without samples."""
    write(tmp_path, {"version": 2, "config": RECORDED})
    (tmp_path / SAMPLES).unlink()
    assert not Results.read(tmp_path).samples
    (tmp_path / SAMPLES).mkdir()
    with pytest.raises(FileError, match="samples.jsonl is a folder"):
        Results.read(tmp_path)
    (tmp_path / SAMPLES).rmdir()
    for name in (SAMPLES, RUN):
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(FileError, match=f"{name} is a folder, a pipe"):
            Results.read(tmp_path)
    with pytest.raises(FileError, match="run.json is a folder, a pipe"):
        Results.open(tmp_path, RECORDED, {})


def test_a_start_on_a_full_disk_is_no_run(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            Results.open(tmp_path, RECORDED, {})
    assert not [each for each in tmp_path.iterdir() if each.name != ".lock"]
    # What a kill left there, of this version and of earlier ones.
    (tmp_path / "run.json.new").write_text("{")
    (tmp_path / ".run.json.0123456789abcdef.tmp").write_text("{")
    with Results.open(tmp_path, RECORDED, {}) as results:
        results.add(SAMPLES_OF["recorded"][1])
    assert len(Results.read(tmp_path).samples) == 1


@pytest.mark.parametrize(
    ("speed", "steps"),
    [
        ("[", "["),
        (DEEP, DEEP),
        ("3", "3"),
        ('{"raas": 3}', '{"task": "t", "beside": "b"}'),
        ('{"raas": [{"tokens": 64}]}', '{"task": "t", "milliseconds": {"a": "1"}}'),
    ],
)
def test_times_that_are_none(tmp_path, speed, steps):
    assert read_speed(tmp_path) == read_steps(tmp_path) == {}
    (tmp_path / "speed.json").write_text(speed)
    (tmp_path / "steps.json").write_text(steps)
    for read in (read_speed, read_steps):
        with pytest.raises(FileError, match="Remove it, and the same command measures"):
            read(tmp_path)
