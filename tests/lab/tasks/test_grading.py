"""GraderPool: right answers right, near misses wrong, and what becomes of one that hangs or
dies."""

import time

import pytest

pytest.importorskip("math_verify", reason="needs math-verify (the extra eval)")

from stated_answers import graded, table

from raas_jax.lab.tasks.benchmarks import DATASETS, open_benchmark
from raas_jax.lab.tasks.benchmarks.check_grader import check_grader
from raas_jax.lab.tasks.grading import GraderPool
from raas_jax.lab.tasks.grading.mathematics import Verdict, grade, stated, word
from raas_jax.lab.tasks.grading.statement import boxes

OWN = """
import os, time
def grade(gold, text):
    if text == "die": os._exit(3)
    if text == "kill": os.kill(os.getpid(), 9)
    if text == "print": print("not an answer")
    if text == "raise": raise KeyError("mine")
    while text == "hang": pass
    if text == "sleep": time.sleep(60)
    return gold == text
"""


def test_reference_answers_are_right_and_near_misses_wrong(shared):
    # All of them: `raas-jax eval NAME --check-grader`; the docs have the figures.
    problems = [
        problem
        for name in DATASETS
        for problem in open_benchmark(name, shared / "data" / name / "test.jsonl").questions[5::97]
    ]
    assert len(problems) == 14 + 6 + 1
    with GraderPool(1, time_limit=60) as graders:
        table, bad = check_grader(problems, graders, progress=False)
    assert not bad, bad
    assert "| in a box | right | 21 of 21 |" in table and "| a near miss | wrong | 1" in table


def test_a_check_reports_a_bad_grader(tmp_path):
    file = tmp_path / "kind.py"
    file.write_text("def grade(gold, text): return 'boxed' in text")
    problem = DATASETS["gsm8k"].of([{"question": "?", "answer": "#### 7"}])
    with GraderPool(1, time_limit=60, file=file) as graders:
        table, bad = check_grader(problem.questions, graders, progress=False)
    assert "| bold | right | 0 of 1 |" in table and "| a number near it | wrong | 0 of 4 |" in table
    assert any("'7' should be wrong" in line for line in bad)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (r"\boxed{\frac{1}{\sqrt{2}}} is it", [r"\frac{1}{\sqrt{2}}"]),
        (r"\boxed{3}" + "\nso \\boxed{4} and \\boxed{5}", ["4", "5"]),
        (r"\boxed{3}, that is, \boxed{3.0}", ["3.0"]),
        (r"\boxed{\{1, 2\}}", [r"\{1, 2\}"]),
        (r"\boxed{7} but \boxed{8", ["7"]),
        ("nothing", []),
    ],
)
def test_boxes_match_their_braces(text, wanted):
    assert boxes(text) == wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("<think>\\boxed{1}</think> The answer is 2.", "2"),
        ("x\n#### 1,234\n\nthanks", "1,234"),
        ("The answer is: $3.5$. Done.", "$3.5$"),
        ("**Answer:** .25", ".25"),
        ("So \\boxed{5}? No. \\boxed{}", ""),
    ],
)
def test_what_a_text_states(text, wanted):
    assert stated(text).text == wanted


def test_a_last_sentence_is_not_stated():
    assert stated("It is 7.") is None


@pytest.mark.parametrize(
    ("gold", "text"),
    [
        ("42", "The answer is 42 dollars."),
        ("42", "She pays $42 in all."),
        ("1200", r"\boxed{1,200}"),
        (r"\frac12", r"\boxed{0.5}"),
        ("1,-2", r"$x = \boxed{1}$ or $x = \boxed{-2}$"),
        ("52_8", r"\boxed{52_{8}}"),
        ("073", r"\boxed{\textbf{(073)}}"),
        (r"\text{(C)}", r"\boxed{C}"),
        ("Paris", r"\boxed{\text{paris}}"),
        (r"\{1\pm\sqrt{5},-2\}", r"\boxed{-2, 1-\sqrt 5, 1+\sqrt 5}"),
    ],
)
def test_other_ways_to_put_it(gold, text):
    assert grade(gold, text).correct


def test_stated_answers():
    # Decided by a reader: none may be right that is wrong, and few the other way round.
    cases = graded()
    assert not [case for case in cases if case["mark"].error]
    assert not [case for case in cases if case["mark"].correct and not case["right"]]
    unread = [case["text"] for case in cases if case["right"] and not case["mark"].correct]
    assert len(unread) <= 11, unread
    assert f"| all | 0 of 527 | {len(unread)} of 479 |" in table(cases)


def test_words_are_words():
    assert word(r"$\textbf{(C) }$") == "c" and word("New  York.") == "new york"
    assert word("2k") is None and word(r"\sqrt{x}") is None
    assert not grade("east", r"\boxed{seat}").correct  # As formulas they would be equal.


def test_a_grader_that_hangs_or_dies_costs_one_answer(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    with GraderPool(1, time_limit=0.5, file=file) as graders:
        texts = ["a", "die", "b", "kill", "hang", "sleep", "raise", "print", "a"]
        found = [graders.submit("a", text) for text in texts]
        marks = [each.result() for each in found]
    assert [mark.correct for mark in marks] == [True, *[False] * 7, True]
    assert [mark.error for mark in marks] == [
        None,
        "the grading process ended with code 3",
        None,
        "the grading process was ended by signal 9",
        "no mark within 0.5 s of computing",
        "no mark within 3 s, twice",
        "KeyError: 'mine'",
        None,
        None,
    ]


def test_a_grader_may_wait_long_for_the_next_answer(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(OWN)
    with GraderPool(1, time_limit=0.1, file=file) as graders:
        assert graders.submit("a", "a").result().correct
        time.sleep(2.5)  # Longer than any limit on one.
        assert graders.submit("a", "a").result() == Verdict(True)


def test_math_that_never_ends_is_cut_off():
    with GraderPool(1, time_limit=4) as graders:
        marks = [graders.submit("5", rf"\boxed{{{x}}}") for x in ("5", "99999999!", "5")]
        assert [mark.result() for mark in marks] == [
            Verdict(True, "5"),
            Verdict(False, None, "no mark within 4 s of computing"),
            Verdict(True, "5"),
        ]


def test_graders_that_cannot_start(tmp_path):
    (tmp_path / "bad.py").write_text("import not_there")
    with pytest.raises(ValueError, match=r"does not start.*not_there"):
        GraderPool(1, file=tmp_path / "bad.py")
    with pytest.raises(ValueError, match="at least 1 worker"):
        GraderPool(0)
    with pytest.raises(ValueError, match="above 0 seconds"):
        GraderPool(1, time_limit=0)
