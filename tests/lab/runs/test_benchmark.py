"""Benchmarks on the engine: the same samples after a kill, a lock, a full disk, and the report."""

import json
import re
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab.runs import Asking, EngineDecoding, LemmaTask, Results, report, run
from raas_jax.lab.runs.decoding import item_seed
from raas_jax.lab.runs.progress import Bar
from raas_jax.lab.tasks.benchmarks.lemma import ends_in, lemma_benchmark
from raas_jax.policies import RaaS
from raas_jax.sampling import Sampling

TASK = lemma_benchmark(LemmaTask(problems=3, smallest=4, largest=4, max_new_tokens=14))
SAMPLING = Sampling(temperature=1.0)
ASKING = Asking(samples=3, sampling=SAMPLING, seed=5)
POLICY = RaaS(8, page_size=4)
LABEL = "raas (page_size=4) 8"
TIMES = ("seconds", "start", "elapsed")


@pytest.fixture(scope="module")
def ask(params):
    def ask(folder, asking=ASKING):
        decoding = EngineDecoding(asking, rows=4, keep_tokens=True)
        return run(params, TASK, [POLICY], folder, model="tiny", decoding=decoding, progress=False)

    return ask


@pytest.fixture(scope="module")
def whole(ask, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    ask(folder)
    return Results.read(folder)


def without_times(results):
    return {
        key: {name: value for name, value in sample.items() if name not in TIMES}
        for key, sample in results.samples.items()
    }


def test_samples_are_those_of_generate(params, whole):
    assert len(whole.samples) == 9 and not whole.remarks()
    for index, problem in enumerate(TASK.questions):
        outputs = raas_jax.generate(
            params,
            [problem.prompt] * 3,
            policy=POLICY,
            sampling=SAMPLING,
            max_new_tokens=14,
            seed=item_seed(5, index),
        )
        found = [each for each in whole.of("lemma", LABEL) if each["item"] == str(index)]
        assert [each["sample"] for each in found] == [0, 1, 2]
        for sample, output in zip(found, outputs, strict=True):
            assert sample["token_ids"] == output.tokens and sample["text"] == output.text
            assert sample["tokens"] == len(output.tokens) and sample["gold"] == problem.answer
            assert sample["capped"] == (output.finish_reason == "length")
            right = ends_in(problem.answer, output.text)
            assert sample["correct"] == (right and not sample["capped"])
    texts = {tuple(sample["token_ids"]) for sample in whole.samples.values()}
    assert len(texts) == 9  # Every sample draws for itself.


def test_the_right_answer_ends_in():
    assert ends_in("answer c 3", "c = a + b , a 4 b 9 , c 3 ; answer c 3")
    assert not ends_in("answer c 3", "answer c 3 ; answer c 4")
    assert not ends_in("answer c 3", "")


@pytest.mark.parametrize("kill_after", [1, 5])
def test_a_killed_run_goes_on_where_it_was(ask, whole, tmp_path, killed, kill_after):
    folder = tmp_path / "run"
    with killed(kill_after):
        ask(folder)
    assert len(Results.read(folder).samples) == kill_after
    ask(folder)
    after = Results.read(folder)
    assert without_times(after) == without_times(whole)
    assert not after.repeated and not after.bad
    assert {sample["start"] for sample in after.samples.values()} == {0, 1}
    kept = (folder / "samples.bad.jsonl").read_text()
    assert kept.startswith('{"task": "lemma"') and kept.count("\n") == 1


def test_the_bar(capsys):
    engine = SimpleNamespace(rows=4, usage=SimpleNamespace(useful_row_steps=0))
    with Bar(6, 1, True) as bar:
        bar.start("raas 8", 6, [True])
        bar.watch(engine)
        engine.usage.useful_row_steps = 30
        bar.count(False)
        bar.count(True)
        time.sleep(1.2)  # It moves while nothing comes.
        shown = capsys.readouterr().err
        assert "raas 8:  50%" in shown and "3/6" in shown
        assert re.search(r"3 rows, \d\d tokens/s, right 2/3", shown)
    assert "3 rows, right 2/3" in capsys.readouterr().err


def test_what_is_there_is_not_asked_again(ask, whole, monkeypatch):
    monkeypatch.setattr("raas_jax.lab.runs.decoding.Engine", None)
    assert without_times(ask(whole.folder)) == without_times(whole)


def test_another_way_of_asking_is_another_run(ask, whole):
    with pytest.raises(ValueError, match=r"asking\.seed: 5 → 6"):
        ask(whole.folder, asking=Asking(3, SAMPLING, 6))
    with pytest.raises(ValueError, match="set a temperature"):
        Asking(samples=2)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        Asking(max_new_tokens=0)


def test_a_full_disk_leaves_what_was_written(ask, whole, tmp_path):
    """The kernel itself refuses to make the file longer, in the middle of a line."""
    folder = tmp_path / "run"
    file = folder / "samples.jsonl"
    size = (whole.folder / "samples.jsonl").stat().st_size // 2
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        with pytest.raises(OSError, match=r"the \d samples before are safe"):
            ask(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    written = Results.read(folder)
    assert 0 < len(written.samples) < 9 and not written.bad
    assert file.read_text().count("\n") == len(written.samples)
    ask(folder)
    assert without_times(Results.read(folder)) == without_times(whole)


HOLD = """
import sys, time
from filelock import FileLock
lock = FileLock(sys.argv[1]); lock.acquire()
print("held", flush=True)
time.sleep(600)
"""


def test_two_processes_do_not_add_to_one_folder(ask, whole):
    lock = str(whole.folder / ".lock")
    other = subprocess.Popen([sys.executable, "-c", HOLD, lock], stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="in use by another process"):
            ask(whole.folder)
        report(whole.folder)  # Reading is always possible.
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    ask(whole.folder)  # A process that was killed leaves no lock.


def test_the_report(whole):
    pytest.importorskip("matplotlib", reason="needs matplotlib (the extra plots)")
    text, remarks = report(whole.folder)
    assert text == (whole.folder / "table.md").read_text()
    assert "3 sample(s) each at temperature 1" in text and "pass@2 | " in text
    assert len(remarks) == 1 and "accuracy.png" in remarks[0]
    for name in ("accuracy", "time", "memory", "lengths"):
        assert (whole.folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    heads, values = (whole.folder / "table.csv").read_text().splitlines()
    row = dict(zip(heads.split(","), values.split(","), strict=True))
    samples = whole.of("lemma", LABEL)
    assert row["samples"] == "9" and row["budget"] == "8"
    assert float(row["tokens"]) == sum(each["tokens"] for each in samples) / 9
    assert float(row["capped"]) == sum(each["capped"] for each in samples) / 9
    ends = max(each["elapsed"] for each in samples)
    assert float(row["seconds_per_answer"]) == pytest.approx(ends / 9)
    total = sum(each["tokens"] for each in samples)
    assert float(row["tokens_per_second"]) == pytest.approx(total / ends)
    assert float(row["kv_bytes"]) == samples[0]["kv_bytes"]


def test_a_report_names_what_has_no_mark(whole, tmp_path):
    with Results.open(tmp_path / "run", whole.config, {}) as results:
        for sample in whole.samples.values():
            if sample["item"] == "0":
                sample = sample | {"error": "no mark within 10 s", "correct": False}
            if sample["item"] == "1":
                sample = sample | {"error": "too long", "finish_reason": "error", "tokens": 0}
            results.add(sample)
    text, _ = report(tmp_path / "run")
    assert f"- {LABEL}: 3 × no mark within 10 s\n- {LABEL}: 3 × too long\n" in text
    lengths = [each["tokens"] for each in whole.samples.values() if each["item"] != "1"]
    heads, values = (tmp_path / "run" / "table.csv").read_text().splitlines()
    row = dict(zip(heads.split(","), values.split(","), strict=True))
    assert float(row["tokens"]) == sum(lengths) / 6 and row["samples"] == "9"


def test_a_report_compares_on_the_same_problems_and_names_what_is_unfinished(whole, tmp_path):
    (raas,) = whole.config["policies"]
    more = [raas | {"label": "dense", "Budget": "–"}, raas, raas | {"label": "recent 8"}]
    more[2] |= {"Policy": "recent"}
    del more[0]["budget"]
    config = whole.config | {"policies": more}
    with Results.open(tmp_path / "run", config, {}) as results:
        for sample in whole.samples.values():
            first = sample["sample"] == 0
            results.add(sample | {"correct": first})
            results.add(sample | {"policy": "dense", "correct": True})
            if sample["item"] != "2":
                results.add(sample | {"policy": "recent 8", "correct": not first})
    text, _ = report(tmp_path / "run")
    lines = [line.split("|") for line in text.split("differences in")[1].splitlines()]
    of_raas, of_recent = (line for line in lines if len(line) == 6 and line[2].strip() == "8")
    assert of_raas[3].split()[0] == "-66.7" and of_raas[4].strip() == "–"
    # On two problems of three samples: two more right, one less.
    assert of_recent[3].split()[0] == "-33.3" and of_recent[4].split()[0] == "+33.3"
    assert "are not like the others:\n\n- recent 8: 6 of 9\n" in text


def test_the_command(model, whole, tmp_path, capsys):
    pytest.importorskip("math_verify", reason="needs math-verify (the extra eval)")
    data = tmp_path / "mine.jsonl"
    rows = [{"prompt": problem.prompt, "answer": "4"} for problem in TASK.questions]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    args = ["eval", str(data), "--model", model, "--policies", "raas", "--budgets", "8"]
    args += ["--page-size", "4", "-n", "14", "--rows", "4", "--graders", "1", "--limit", "3"]
    args += ["--samples", "3", "--temperature", "1", "--seed", "5"]
    out = tmp_path / "out"
    assert main([*args, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "on 3 problems of mine, 3 sample(s)" in printed
    samples = Results.read(out).samples.values()
    assert [each["text"] for each in Results.read(out).of("mine", LABEL)] == [
        each["text"] for each in whole.of("lemma", LABEL)
    ]
    for sample in samples:
        assert "token_ids" not in sample and sample["error"] is None
    assert main(["report", str(out)]) == 0
    assert capsys.readouterr().out == printed
    data.write_text(json.dumps(rows[1]) + "\n")
    assert main([*args, "-o", str(out)]) == 2
    assert "task.data: " in capsys.readouterr().err


def test_bad_options(tmp_path, capsys):
    out = ["--out", str(tmp_path / "out")]
    data = tmp_path / "data.jsonl"
    data.write_text('{"problem": "1+1?", "answr": "2"}\n')
    good = tmp_path / "good.jsonl"
    good.write_text('{"problem": "1+1?", "answer": "2"}\n')
    for args, said in [
        (["gsm"], "Did you mean gsm8k?"),
        (["gsm8k"], "or give data, a JSONL file"),  # Tests are offline.
        (["math500", "--data", str(data)], "Is 'answr' meant to be 'answer'?"),
        (["math500", "--data", str(data), "--problems", "3"], "--problems is not an option of"),
        (["lemma", "--limit", "3"], "--limit is not an option of the task lemma"),
        (["lemma", "--samples", "2"], "set a temperature"),
        (["lemma", "--rows", "auto"], "give a number"),
        (["lemma", "--mesh", "1x1"], "give a number"),
        (["math500", "--data", str(good), "--mesh", "2"], "--mesh is '2'; write for example data"),
        (["math500", "--data", str(good), "--mesh", "9x9"], "81 devices"),
        (["gone.jsonl"], "there is no such file"),
        (["gsm8k", "--limit", "0"], "--limit is 0"),
    ]:
        assert main(["eval", *args, *out]) == 2
        assert said in capsys.readouterr().err, args
    assert main(["eval", "lemma"]) == 2 and "--out DIR is missing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_grader_can_be_checked(tmp_path, capsys):
    pytest.importorskip("math_verify", reason="needs math-verify (the extra eval)")
    data = tmp_path / "data.jsonl"
    data.write_text('{"question": "How many?", "answer": "1+1=<<1+1=2>>2\\n#### 2"}\n')
    args = ["eval", "gsm8k", "--data", str(data), "--check-grader", "--grading-seconds", "60"]
    assert main(args) == 0
    assert "| the reference solution | right | 1 of 1 |" in capsys.readouterr().out
    assert main(["eval", "lemma", "--check-grader"]) == 2


def test_every_seed_and_problem_draws_its_own():
    drawn = [item_seed(seed, index) for seed in (-1, 0, 1, 2**63) for index in (0, 1)]
    assert len(set(drawn)) == len(drawn) and all(0 <= seed < 2**31 for seed in drawn)
