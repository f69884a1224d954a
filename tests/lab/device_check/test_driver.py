"""Sections in processes of their own: what each may do wrong costs itself alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from raas_jax.lab.device_check import driver
from raas_jax.lab.device_check.driver import Section
from raas_jax.lab.device_check.journal import Journal, read

# A section of any name: what it does is in the environment.
PART = """
    import json, os, pathlib, signal, subprocess, sys, time
    name, _, out = sys.argv[1:]
    def write(what, value):
        row = dict(kind="figure", section=name, what=what, value=value, unit="ms", floor=None)
        with open(out + "/results.jsonl", "a") as file:
            file.write(json.dumps(row | {"over_floor": None}) + "\\n")
    write("first", 1.5)
    if name == "hangs":
        # With a child of its own, which must not outlive it.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        pathlib.Path(out, "pid").write_text(str(child.pid))
        time.sleep(600)
    if name == "dies":
        with open(out + "/results.jsonl", "a") as file:
            file.write('{"kind": "figure", "sect')
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "fails":
        sys.exit("no such device")
    write("last", 2.5)
"""


@pytest.fixture
def command(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(driver, "LEAST_SECONDS", 1.0)
    file = tmp_path_factory.mktemp("part") / "part.py"
    file.write_text(textwrap.dedent(PART))
    return [sys.executable, "-S", str(file)]


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_crash_a_failure_and_a_hang_cost_one_section(tmp_path, command):
    names = ["dies", "fails", "hangs", "works"]
    sections = [*map(Section, names, [1] * 4), Section("absent", 1, ("no_such_package",))]
    told = []
    rows = driver.run(tmp_path, 8, told.append, sections, command)
    ends = {row["section"]: row["how"] for row in rows if row["kind"] == "status"}
    assert list(ends) == names
    assert ends["dies"].startswith("ended by SIGSEGV") and ends["works"] == "done"
    assert ends["fails"] == "failed (no such device)" and ends["hangs"].startswith("timed out afte")
    figures = [(row["section"], row["value"]) for row in rows if row["kind"] == "figure"]
    # What a process wrote with its last breath is half a line, and hides nothing after it.
    assert figures == [
        ("dies", 1.5),
        ("fails", 1.5),
        ("hangs", 1.5),
        ("works", 1.5),
        ("works", 2.5),
    ]
    assert told == rows == read(tmp_path / "results.jsonl")
    assert not alive(int((tmp_path / "pid").read_text()))
    text = (tmp_path / "table.md").read_text()
    assert "| works   | last  |" in text and "- hangs: timed out" in text


def test_without_time_a_section_is_not_begun(tmp_path, command):
    rows = driver.run(tmp_path, 0.5, lambda row: None, [Section("works", 1)], command)
    assert [row["how"] for row in rows] == ["not begun, no time was left"]


def test_what_one_leaves_over_the_others_get(tmp_path, command, monkeypatch):
    limits = []
    monkeypatch.setattr(
        driver, "_run_one", lambda f, section, c, limit, hear: limits.append(limit) or "done"
    )
    sections = [Section("one", 30), Section("other", 10), Section("last", 20)]
    driver.run(tmp_path, 60, lambda row: None, sections, command)
    assert limits == pytest.approx([30, 20, 60], abs=0.5)


def test_rivals_have_the_device_to_themselves(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    show = "import json, os, sys; json.dump(dict(os.environ), open(sys.argv[1] + '.json', 'w'))"
    monkeypatch.chdir(tmp_path)
    sections = [Section("ours", 1), Section("theirs", 1, ("json",))]
    driver.run(tmp_path, 30, lambda row: None, sections, [sys.executable, "-c", show])
    ours, theirs = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("ours", "theirs")
    )
    assert ours["XLA_PYTHON_CLIENT_PREALLOCATE"] == "false" and "JAX_PLATFORMS" not in ours
    assert ours["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"  # Asked for by the user.
    assert theirs["JAX_PLATFORMS"] == "cpu"


def test_ctrl_c_ends_the_section_and_keeps_what_was_known(tmp_path, command):
    code = (
        "import signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from raas_jax.cli import device_check\n"
        "from raas_jax.cli.main import main\n"
        "from raas_jax.lab.device_check import driver\n"
        "run, out, *command = driver.run, *sys.argv[1:]\n"
        "sections = [driver.Section('hangs', 1), driver.Section('works', 1)]\n"
        "driver.run = lambda folder, s, tell: run(folder, s, tell, sections, command)\n"
        "sys.exit(main(['device-check', '--out', out]))\n"
    )
    out = tmp_path / "out"
    path = {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(out), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | path,
    )
    deadline = time.monotonic() + 60
    while not (out / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "| hangs   | first |" in said and "- hangs: interrupted" in said
    assert "raas-jax: interrupted; this is what was known" in err and "Traceback" not in err
    assert not alive(int((out / "pid").read_text()))


def test_half_a_line_and_what_json_cannot_say(tmp_path):
    file = tmp_path / "results.jsonl"
    journal = Journal(file, "section")
    with journal.attempt("a figure"):
        raise MemoryError("all of it")
    with journal.attempt("another"):
        raise ValueError("one\ntwo")
    with pytest.raises(KeyboardInterrupt), journal.attempt("a third"):
        raise KeyboardInterrupt
    journal.figure("none", float("nan"), "ms", floor=2.0)
    file.write_text(file.read_text() + '{"kind": "fig')
    rows = read(file)
    assert [row.get("why") for row in rows] == ["out of memory", "ValueError: one", None]
    assert rows[2]["value"] == rows[2]["over_floor"] == "nan"
    assert read(tmp_path / "absent") == []
