"""Every script of `examples/` runs, and prints what it promises."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
PROMISED = {
    "page_by_page.py": "pages kept",
    "score_policies.py": "least likely",
    "own_policy.py": "LongestKeys: a = 4",
}


def test_all_are_here():
    assert {file.name for file in EXAMPLES.glob("*.py")} == set(PROMISED)


@pytest.mark.parametrize("name", PROMISED)
def test_it_runs(name, capsys):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert PROMISED[name] in capsys.readouterr().out
