"""Intervals against numbers worked by hand."""

import math

import pytest

from raas_jax.lab.runs.tables import Column, Line, Table, estimate, mean, ratio, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # 8 of 10: centre (0.8 + 0.19207) / 1.38415 = 0.71674, half width 0.22657.
    [(8, 10, 0.49016, 0.94332), (0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0)],
)
def test_wilson(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert found.low == pytest.approx(low, abs=1e-5)
    assert found.high == pytest.approx(high, abs=1e-5)


def test_wilson_refuses_nonsense():
    for successes, trials in ((3, 2), (0, 0), (-1, 2)):
        with pytest.raises(ValueError, match="wanted 0 <= successes"):
            wilson(successes, trials)


def test_mean_and_ratio():
    # 1, 2, 3, 4: variance 5 / 3, standard error sqrt(5 / 12) = 0.645497, times 1.959964.
    found = mean([1, 2, 3, 4])
    assert found.value == 2.5
    assert found.high - 2.5 == pytest.approx(1.265151, abs=1e-6)
    assert mean([7]).low is None
    # 3 of 4 and 1 of 4: ratio 1/2, residuals 1 and -1, error sqrt(2 * 2) / 8 = 0.25.
    found = ratio([3, 1], [4, 4])
    assert (found.value, found.low) == (0.5, pytest.approx(0.5 - 1.959964 * 0.25, abs=1e-6))
    assert math.isnan(ratio([0, 0], [0, 0]).value)
    samples = [{"served": 4, "lookups": 4}, {"served": 3, "lookups": 4}]
    clipped = estimate(Column("served", "Recall", "ratio", per="lookups"), samples)
    assert clipped.value == 0.875 and clipped.high == 1.0


def test_markdown_and_csv():
    columns = (Column("correct", "Exact", "share"), Column("kv_bytes", "KV bytes", "bytes"))
    samples = [{"correct": index < 8, "kv_bytes": 2048} for index in range(10)]
    figures = tuple(estimate(column, samples) for column in columns)
    table = Table(columns, (Line({"Policy": "raas", "Budget": "64"}, 10, figures),))
    head, rule, row = table.markdown().splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "raas",
        "64",
        "10",
        "80.0 % [49.0, 94.3]",
        "2 KiB",
    ]
    assert len(head) == len(rule) == len(row) and rule.endswith(":|") is False
    names, values = table.csv().splitlines()
    assert names == "policy,budget,samples,correct,correct_low,correct_high,kv_bytes"
    assert values.startswith("raas,64,10,0.8,0.490")
    assert Table(columns, ()).markdown() == "No samples yet.\n"
