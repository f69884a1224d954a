"""Benchmarks and tasks of one's own: what is read, and what is wrong with a file."""

import dataclasses
import json
import sys

import pytest

from raas_jax.lab.runs import LemmaTask
from raas_jax.lab.tasks.benchmarks import DATASETS, open_benchmark
from raas_jax.lab.tasks.benchmarks.lemma import lemma_benchmark


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize(("name", "count"), [("gsm8k", 1319), ("math500", 500), ("aime24", 30)])
def test_the_whole_benchmark(shared, name, count):
    problems = open_benchmark(name, shared / "data" / name / "test.jsonl").questions
    assert len(problems) == count
    assert [problem.name for problem in problems] == [str(i) for i in range(count)]
    end = "Let's think step by step and output in latex format."
    if name != "math500":
        end = "Make sure the final answer is standalone and in latex format."
    for problem in problems:
        assert problem.prompt.endswith("\n" + end)
        assert problem.answer.strip() and "####" not in problem.answer


def test_gsm8k_answers():
    rows = [{"question": "How many?", "answer": "2*600=<<2*600=1200>>1200\n#### 1,200"}]
    (problem,) = DATASETS["gsm8k"].of(rows).questions
    assert problem.answer == "1200" and problem.solution.endswith("#### 1,200")


def test_the_hub_is_asked_by_default(monkeypatch):
    pytest.importorskip("datasets", reason="needs datasets (the extra eval)")
    import datasets

    def load(path, name, split):
        assert (path, name, split) == ("openai/gsm8k", "main", "test")
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    (problem,) = open_benchmark("gsm8k").questions
    assert problem.answer == "2" and problem.prompt.startswith("1+1?\n")


def test_no_hub_and_no_library(monkeypatch):
    pytest.importorskip("datasets", reason="needs datasets (the extra eval)")
    with pytest.raises(OSError, match=r"openai/gsm8k.*give data, a JSONL"):  # Tests are offline.
        open_benchmark("gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"\[eval\].*give data, a JSONL"):
        open_benchmark("math500")


def test_a_file_of_ones_own(tmp_path):
    # A line separator inside a string ends no line of JSON.
    file = write(tmp_path / "mine.jsonl", [{"prompt": "1+1=\u2028", "answer": 2}])
    benchmark = open_benchmark(file)
    (problem,) = benchmark.questions
    assert benchmark.name == "mine"
    assert (problem.prompt, problem.answer) == ("1+1=\u2028", "2")
    other = write(tmp_path / "other.jsonl", [{"prompt": "1+1=", "answer": 3}])
    assert benchmark.digest() != open_benchmark(other).digest()


def test_a_python_file_of_ones_own(tmp_path):
    file = tmp_path / "sums.py"
    file.write_text("def problems(): return [{'prompt': '1+1=', 'answer': 2}]\n")
    benchmark = open_benchmark(str(file))
    (problem,) = benchmark.questions
    assert benchmark.name == "sums" and benchmark.grader is None and problem.answer == "2"
    before = dataclasses.replace(benchmark, grader=file).digest()
    file.write_text(
        "def problems(data): return [{'prompt': open(data).read(), 'answer': '2'}]\n"
        "def grade(gold, text): return gold in text\n"
    )
    (tmp_path / "data.txt").write_text("2+0=")
    benchmark = open_benchmark(str(file), str(tmp_path / "data.txt"))
    (problem,) = benchmark.questions
    assert benchmark.grader == file and problem.prompt == "2+0="
    assert benchmark.digest() != before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"prompt": "a", "answer": "\xff"}\n', "is not UTF-8"),
        (b'{"prompt": "a", "answer": "1"}\n{"prompt": "b", "ans', "line 2: not valid JSON"),
        (b'["a", "1"]\n', "line 1: is a list"),
        (b"[" * 100_000, "line 1: not valid JSON .*nested more than"),
        (b'{"prompt": "\\ud800", "answer": "1"}\n', "half of a character"),
        (b'{"prompt": "a", "anwser": "1"}\n', "Is 'anwser' meant to be 'answer'?"),
        (b'\n{"prompt": "a"}\n', "line 2: there is no column 'answer'; the row has 'prompt'"),
        (b'{"prompt": "", "answer": "1"}\n', "'prompt' is ''"),
        (b'{"prompt": "a", "answer": null}\n', "'answer' is None"),
        (b'{"prompt": ["a"], "answer": "1"}\n', "expected text"),
    ],
)
def test_bad_files(tmp_path, text, said):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(text)
    with pytest.raises(ValueError, match=said.replace("?", r"\?")):
        open_benchmark(str(file))


def test_files_that_are_not_there(tmp_path):
    for name in ("gone.jsonl", "gone.py"):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            open_benchmark(str(tmp_path / name))
    with pytest.raises(ValueError, match="is a folder, a pipe"):
        open_benchmark("gsm8k", tmp_path)
    with pytest.raises(ValueError, match="leave data out"):
        open_benchmark("mine.jsonl", "other.jsonl")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "does not define `problems"),
        ("def problems(): return []", "gives no problems"),
        ("def problems(): return ['a']", "expected a dictionary"),
        ("def problems(): return [{'prompt': 'a'}]", "no column 'answer'"),
        ("def problems(): return [].no", "failed: .*'no'"),
        ("1 / 0", "failed: ZeroDivisionError"),
        ("exit()", "failed: SystemExit"),
        ("def problems(:", "failed: SyntaxError"),
    ],
)
def test_bad_python_files(tmp_path, text, said):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        open_benchmark(str(file))


def test_what_was_cut_off_has_an_answer_only_if_it_states_one(tmp_path):
    gsm8k = DATASETS["gsm8k"].of([])
    assert gsm8k.has_answer(r"so it is \boxed{5}. Let me check: 5")
    assert not gsm8k.has_answer("Let me see, 3 + 2 = 5")
    own = dataclasses.replace(gsm8k, grader=tmp_path / "mine.py")
    assert own.has_answer("anything: its grader decides")
    assert not lemma_benchmark(LemmaTask(1)).has_answer("answer c 3")  # It may have gone on.
