"""Studies: equal bytes, going on after a kill, tables, differences and pictures."""

import json
from pathlib import Path

import pytest
import yaml

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab.runs import Results, report
from raas_jax.lab.runs.equal_bytes import TOLERANCE
from raas_jax.lab.runs.planning import CEILING, plan_study, run_study
from raas_jax.lab.runs.points import Findings
from raas_jax.lab.runs.speed import measure_steps
from raas_jax.lab.runs.study import Study
from raas_jax.policies import Allotment
from raas_jax.weights import DEMO

FIELDS = {
    "page_size": 4,
    "rows": 4,
    "reference": "RaaS",
    "controls": ["Recent"],
    "tasks": {
        "tiny": {"smallest": 3, "largest": 3, "problems": 3, "max_new_tokens": 24, "budgets": [8]}
    },
    "policies": [
        {"label": "Dense", "policy": "dense"},
        {"label": "RaaS", "policy": "raas"},
        {"label": "Recent", "policy": "recent"},
        {"label": "SnapKV", "policy": "snapkv", "window": 16},
    ],
    "ceiling": 0.1,
    "ablations": {
        "alpha": {
            "budget": {"tiny": 8},
            "policies": [{"label": "alpha 0.2", "policy": "raas", "alpha": 0.2}],
        }
    },
}
CONFIGS = Path(__file__).resolve().parents[3] / "configs"


@pytest.fixture(scope="module")
def whole(params, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study") / "out"
    run_study(params, Study.parse(FIELDS), folder, model="tiny", progress=False)
    return folder


def test_everybody_gets_the_bytes_of_the_reference():
    """Also those with windows and buffers, which therefore keep fewer tokens."""
    study = Study.from_file(CONFIGS / "study_smoke.yaml")
    planned, impossible = plan_study(study, raas_jax.load("demo"))
    assert not impossible
    by_name = {(cell.described["entry"], cell.described["budget"]): cell for cell in planned}
    described = {key: cell.described for key, cell in by_name.items()}
    assert described["RaaS", 16]["own_budget"] == 16
    assert described["R-KV", 32]["own_budget"] < 32
    page = described["RaaS", 32]["bytes"] - described["RaaS", 16]["bytes"]
    for (entry, budget), each in described.items():
        if budget:
            target = described["RaaS", budget]["bytes"]
            assert each["bytes"] <= target * (1 + TOLERANCE)
            # And one page more would be too much.
            assert each["bytes"] + page / 4 > target or entry == "R-KV"
    assert described["Dense", 0]["bytes"] > described["RaaS", 32]["bytes"]
    # Options that are a share of the policy's own budget.
    rkv = by_name["R-KV", 32].policy
    assert rkv.every == rkv.budget // 2


def test_allotments_in_a_study():
    """ "auto" is the model's own; a cell says which by its digest, as JSON."""
    study = Study.from_file(CONFIGS / "study_allotted.yaml")
    planned, impossible = plan_study(study, raas_jax.load("demo"))
    assert not impossible and json.dumps([cell.described for cell in planned])
    own = Allotment.read(DEMO / "allotment.json")
    by_label = {(cell.task_label, cell.label): cell for cell in planned}
    assert len(by_label) == 27
    for (task, label), cell in by_label.items():
        allotted = "allotted" in label
        assert cell.policy.allotment == (own if allotted else None)
        assert cell.described["policy"].get("allotment") == (own.digest if allotted else None)
        target = by_label[task, f"RaaS {cell.described['budget']}"].described["bytes"]
        assert cell.described["bytes"] <= target * (1 + TOLERANCE)


def test_a_study_and_its_report(whole):
    made = Findings(Results.read(whole))
    assert {point.policy for point in made.points} == {
        "Dense",
        "RaaS",
        "Recent",
        CEILING,
        "alpha 0.2",
    }
    assert all(len(point.samples) == 3 for point in made.points)
    text, _ = report(whole)
    assert "difference from Recent" in text and "Ablation: alpha" in text
    # A policy whose window is larger than the budget is named with the reason, and not run.
    assert "SnapKV 8: the least budget that it can work with, 20, takes" in text
    for name in ("accuracy_bytes", "recall", "lengths", "ceiling", "ablations"):
        assert (whole / f"{name}.png").stat().st_size > 5_000
    lines = (whole / "table.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 and "minus Belady (oracle) low" in lines[0]


def test_times_are_measured_once(params, tmp_path):
    task = Study.parse(FIELDS).tasks[0].task
    tried = {"RaaS 8": raas_jax.RaaS(8, page_size=4)}
    measure_steps(params, "tiny", tried, task.items(params)[:2], tmp_path, progress=False)
    first = json.loads((tmp_path / "steps.json").read_text())["milliseconds"]
    assert 0 < first["RaaS 8"] < 1000
    tried["Dense"] = raas_jax.Dense(page_size=4)  # Takes turns with the first.
    measure_steps(params, "tiny", tried, task.items(params)[:2], tmp_path, progress=False)
    both = json.loads((tmp_path / "steps.json").read_text())["milliseconds"]
    assert list(both) == ["RaaS 8", "Dense"] and both["RaaS 8"] == first["RaaS 8"]


def test_a_killed_study_goes_on(params, whole, tmp_path, killed):
    study = Study.parse(FIELDS)
    with killed(7):
        run_study(params, study, tmp_path / "out", model="tiny", progress=False)
    assert len(Results.read(tmp_path / "out").samples) == 7
    run_study(params, study, tmp_path / "out", model="tiny", progress=False)
    there, here = Results.read(whole).samples, Results.read(tmp_path / "out").samples
    assert there.keys() == here.keys() and len(here) == 15
    assert all(there[key]["text"] == here[key]["text"] for key in here)
    other = Study.parse({**FIELDS, "ceiling": 0.2})
    with pytest.raises(ValueError, match=r"study\.ceiling: 0\.1 → 0\.2"):
        run_study(params, other, tmp_path / "out", model="tiny", progress=False)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"reference": "RAAS"}, "'RAAS' is not the label"),
        ({"pages": 4}, "pages is not a field of a study"),
        ({"policies": [{"label": "a", "policy": "raas", "alhpa": 1}]}, "'alhpa' is not an option"),
        ({"policies": [{"label": "a", "policy": "rass"}]}, "Did you mean raas"),
        ({"rows": None}, "it lacks rows"),
        ({"rows": 10**12}, "rows is 1000000000000; it must be an int of at most"),
        ({"tasks": [1]}, "tasks is [1]; expected named fields"),
        ({"tasks": {"tiny": {"problems": "3", "budgets": [8]}}}, "tasks.tiny: problems is '3'"),
        ({"tasks": {"tiny": {"sizes": 3, "budgets": [8]}}}, "tasks.tiny.sizes is not a field"),
        ({"tasks": {"tiny": {"budgets": [8, "x"]}}}, "tasks.tiny.budgets[1] is 'x'"),
        ({"policies": {"a": 1}}, "policies is {'a': 1}; it must be a list"),
        ({"policies": [{"label": "a", "policy": "raas", "alpha": [1]}]}, "alpha is [1]"),
        ({"controls": "Recent"}, "controls is 'Recent'; it must be a list of texts"),
        ({"ceiling": "high"}, "ceiling is 'high'"),
        ({"ablations": {"alpha": 3}}, "ablations.alpha is 3; expected named fields"),
        ({"speed": {"policies": ["RaaS"], "lengths": 64, "budget": 8}}, "speed: lengths is 64"),
    ],
    ids=str,
)
def test_a_study_that_makes_no_sense_is_refused(change, named, tmp_path, capsys):
    fields = {key: value for key, value in {**FIELDS, **change}.items() if value is not None}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(fields))
    args = ["eval", "lemma", "--config", str(tmp_path / "study.yaml")]
    assert main([*args, "-o", str(tmp_path / "out")]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_beside_a_file_are_refused(tmp_path, capsys):
    args = ["eval", "lemma", "--config", str(CONFIGS / "study_smoke.yaml"), "--problems", "3"]
    assert main([*args, "-o", str(tmp_path / "out")]) == 2
    assert "--problems is given beside --config" in capsys.readouterr().err
    assert main(["eval", "lemma", "--config", "nowhere.yaml", "-o", str(tmp_path / "out")]) == 2
    assert "nowhere.yaml: there is no such file" in capsys.readouterr().err


def test_the_committed_studies_can_be_planned():
    for file in CONFIGS.glob("study*.yaml"):
        study = Study.from_file(file)
        assert json.dumps(study.source)
        assert study.variant(study.reference).policy == "raas"
