"""Counts that the laboratory takes: NumPy's ints as Python's, and nothing beyond their ranges."""

import json

import numpy as np
import pytest

from raas_jax.lab.bench.throughput import mixed_problems
from raas_jax.lab.bench.turns import check_positive
from raas_jax.lab.runs import Asking, EngineDecoding, LemmaTask, RecordedDecoding
from raas_jax.lab.runs.speed import Speed
from raas_jax.lab.tasks.benchmarks import DATASETS
from raas_jax.lab.train.batches import Bucket

TAKEN = {
    LemmaTask: ("problems", "smallest", "largest", "late_facts", "seed", "max_new_tokens"),
    Asking: ("samples", "seed", "max_new_tokens"),
    RecordedDecoding: ("rows",),
    EngineDecoding: ("rows", "share"),
    Bucket: ("smallest", "largest", "tokens", "rows"),
    Speed: ("budget", "prompt_tokens", "batch", "repetitions"),
}
GIVEN = {
    Bucket: {"smallest": 4, "largest": 4, "tokens": 128, "rows": 1},
    Speed: {"policies": ["RaaS"], "lengths": [64], "budget": 8},
    LemmaTask: {"smallest": 4, "largest": 4},
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, names in TAKEN.items() for name in names]
)
def test_counts_have_ranges(kind, name):
    given = GIVEN.get(kind, {})
    good = given.get(name, 1)
    made = kind(**given | {name: np.int64(good)})
    assert type(getattr(made, name)) is int
    json.dumps({name: getattr(made, name)})
    for wrong in (True, "3", 2.0, 10**30, float("nan")):
        with pytest.raises((TypeError, ValueError), match=f"^{name} is "):
            kind(**given | {name: wrong})


def test_functions_check_before_they_begin():
    for wrong in (0, 10**12, "3", None):
        with pytest.raises((TypeError, ValueError), match="problems is"):
            mixed_problems(wrong, 4, 4)
        with pytest.raises((TypeError, ValueError), match="turns is"):
            check_positive(turns=wrong)
    check_positive(turns=np.int32(3))
    with pytest.raises(ValueError, match="limit is 0"):
        DATASETS["gsm8k"].of([]).first(0)
    for wrong in (0, -1, float("nan"), float("inf"), "3", 10**9):
        with pytest.raises((TypeError, ValueError), match="grading_seconds is"):
            Asking(grading_seconds=wrong)
    with pytest.raises(ValueError, match=r"lengths is 1000"):
        Speed(["RaaS"], [10**12], 8)
