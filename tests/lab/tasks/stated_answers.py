"""Grades the stated answers beside this file: `python tests/lab/tasks/stated_answers.py`."""

import json
from collections import Counter
from pathlib import Path

from raas_jax.lab.tasks.grading import GraderPool

CORPUS = Path(__file__).with_suffix(".jsonl")


def graded():
    """Every line of the corpus with its `mark`."""
    cases = [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]
    with GraderPool(1, time_limit=60) as graders:
        marks = [graders.submit(case["gold"], case["text"]) for case in cases]
        return [case | {"mark": mark.result()} for case, mark in zip(cases, marks, strict=True)]


def table(cases):
    """False marks by kind, in Markdown."""
    asked = Counter((case["kind"], case["right"]) for case in cases)
    false = Counter(
        (case["kind"], case["right"]) for case in cases if case["mark"].correct != case["right"]
    )
    kinds = [*dict.fromkeys(case["kind"] for case in cases)]
    rows = [
        f"| {kind} | {false[kind, False]} of {asked[kind, False]} "
        f"| {false[kind, True]} of {asked[kind, True]} |"
        for kind in kinds
    ]
    sums = [sum(count[kind, right] for kind in kinds) for right in (False, True)
            for count in (false, asked)]  # fmt: skip
    rows.append(f"| all | {sums[0]} of {sums[1]} | {sums[2]} of {sums[3]} |")
    return "\n".join(["| stated answers | false right | false wrong |", "|---|---:|---:|", *rows])


if __name__ == "__main__":
    print(table(graded()))
