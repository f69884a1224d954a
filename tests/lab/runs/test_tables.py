"""Tables and CSV, as they are written."""

from raas_jax.lab.runs.points import Point
from raas_jax.lab.runs.statistics import estimate
from raas_jax.lab.runs.tables import heading, points_csv, points_markdown
from raas_jax.lab.tasks.base import Column


def test_markdown_and_csv():
    columns = (Column("correct", "Exact", "share"), Column("kv_bytes", "KV bytes", "bytes"))
    samples = [{"correct": index < 8, "kv_bytes": 2048} for index in range(10)]
    figures = {column.name: estimate(column, [[each] for each in samples]) for column in columns}
    headings = {column.name: heading(column) for column in columns}
    points = [Point("lemma", "raas", "raas 64", 64, samples, figures)]
    head, rule, row = points_markdown(points, headings).splitlines()
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "raas",
        "64",
        "10",
        "80.0 % [49.0, 94.3]",
        "2 KiB",
    ]
    assert len(head) == len(rule) == len(row) and rule.endswith(":|") is False
    names, values = points_csv(points, exact=["kv_bytes"]).splitlines()
    assert names == "policy,budget,samples,correct,correct_low,correct_high,kv_bytes"
    assert values.startswith("raas,64,10,0.8,0.490")
    assert points_markdown([], headings) == "No samples yet.\n"
