"""A folder that was made before options of policies had their names of today goes on under them."""

import dataclasses
import json

import pytest

from raas_jax.cli.main import main
from raas_jax.lab.runs import LemmaTask, RecordedDecoding, Results, run
from raas_jax.lab.runs.results import migrated, migrated_label
from raas_jax.policies import RaaS

TASK = LemmaTask(problems=2, smallest=4, largest=4, max_new_tokens=24)
TRIED = [
    RaaS(96, page_size=4, granularity="layer", prompt="included"),
    RaaS(96, page_size=4),
]
OLD_NAME = "raas (page_size=4, share=layer, prompt=within)"
NEW_NAME = "raas (page_size=4, granularity=layer, prompt=included)"


def ask(params, folder):
    decoding = RecordedDecoding(2)
    return run(params, TASK, TRIED, folder, model="tiny", decoding=decoding, progress=False)


@pytest.fixture
def old(params, tmp_path):
    """A run in the words of version 1, killed before its last sample; and what it should give."""
    ask(params, tmp_path / "new")
    config = json.loads((tmp_path / "new" / "run.json").read_text())["config"]
    for policy in config["policies"]:
        policy["share"] = policy.pop("granularity")
        policy["prompt"] = {"excluded": "beside", "included": "within"}[policy["prompt"]]
    config["policies"][0] |= {"label": f"{OLD_NAME} 96", "Policy": OLD_NAME}
    del config["fingerprint"]
    config["columns"][4]["title"] = "Recall to the first slip"
    lines = (tmp_path / "new" / "samples.jsonl").read_text().splitlines()
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": config, "starts": [{"jax": "0"}]}))
    text = "\n".join(lines[:3]).replace(f"{NEW_NAME} 96", f"{OLD_NAME} 96")
    (folder / "samples.jsonl").write_text(text + '\n{"task": "lemma", "poli')
    return folder, Results.read(tmp_path / "new")


def test_an_old_folder_is_read_and_left_as_it_is(old, capsys):
    folder, new = old
    before = {file: file.read_bytes() for file in folder.iterdir()}
    found = Results.read(folder)
    assert found.version == 1 and len(found.bad) == 1
    assert found.config == {k: v for k, v in new.config.items() if k != "fingerprint"}
    assert found.samples == dict(list(new.samples.items())[:3])
    assert len(found.of("lemma", f"{NEW_NAME} 96")) == 2
    assert all(file.read_bytes() == text for file, text in before.items())
    assert main(["report", str(folder)]) == 0
    assert f"| {NEW_NAME} |" in capsys.readouterr().out
    assert "Recall to the first error" in (folder / "table.md").read_text()


def test_an_old_folder_goes_on_under_the_new_names(params, old):
    folder, new = old
    ask(params, folder)
    written = json.loads((folder / "run.json").read_text())
    assert written["version"] == 3 and written["config"] == new.config
    assert len(written["starts"]) == 2 and written["starts"][0] == {"jax": "0"}
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["policy"] for line in lines] == [f"{NEW_NAME} 96"] * 2 + [
        "raas (page_size=4) 96"
    ] * 2
    found = Results.read(folder)
    assert found.version == 3 and not found.bad and found.samples.keys() == new.samples.keys()
    assert all(each["text"] == new.samples[key]["text"] for key, each in found.samples.items())


def test_one_weight_that_differs_is_another_run(params, tmp_path):
    """Which a digest of some of the weights may pass over."""
    ask(params, tmp_path)
    layers = params.stacked().weights["layers"]
    touched = {**layers, "down": layers["down"].at[1, 3, 5].add(1e-6)}
    other = dataclasses.replace(params, weights={**params.weights, "layers": touched})
    with pytest.raises(ValueError, match=r"another run(.*\n)*.*fingerprint: "):
        ask(other, tmp_path)


def test_the_fingerprint_alone_decides(params, tmp_path):
    """The digest of some weights changes with the fields that a config has in some version."""
    ask(params, tmp_path)
    file = tmp_path / "run.json"
    run = json.loads(file.read_text())
    file.write_text(json.dumps({**run, "config": {**run["config"], "weights": "of old"}}))
    ask(params, tmp_path)
    assert json.loads(file.read_text())["config"] == run["config"]


def test_a_study_keeps_the_labels_of_its_file(tmp_path):
    """They are the user's own words, and the file still has them."""
    policy = {"label": "RaaS (share=layer)", "policy": "raas", "share": "layer", "alpha": 0.1}
    cell = {"label": "RaaS (share=layer) 8", "policy": {"share": "kv_head", "prompt": "evict"}}
    config = {"kind": "study", "study": {"policies": [policy]}, "cells": [cell]}
    (tmp_path / "run.json").write_text(json.dumps({"config": config}))
    sample = {"task": "tiny", "policy": "RaaS (share=layer) 8", "item": "0", "sample": 0}
    sample["correct"] = True
    (tmp_path / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    found = Results.read(tmp_path)
    wanted = {"label": "RaaS (share=layer)", "policy": "raas", "alpha": 0.1, "granularity": "layer"}
    assert found.config["study"]["policies"] == [wanted]
    assert found.config["cells"][0]["policy"] == {"granularity": "kv_head", "prompt": "evict"}
    assert found.of("tiny", "RaaS (share=layer) 8") == [sample]


def test_only_options_are_renamed():
    for label in ("raas (page_size=4) 64", "Mine (my_share=layer)", "raas (granularity=layer) 8"):
        assert migrated_label(label) == label
    assert migrated_label("h2o (prompt=beside, share=layer) 8") == (
        "h2o (prompt=excluded, granularity=layer) 8"
    )
    config = {"share": 4, "prompt": "evict", "asking": [{"seed": 1}], "title": "Tokens"}
    assert migrated(config) == config


def test_a_later_version_is_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"version": 4, "config": {}}))
    with pytest.raises(ValueError, match=r"has version 4.*use the one that wrote it"):
        Results.read(tmp_path)
    with pytest.raises(ValueError, match="has version 4"):
        Results.open(tmp_path, {}, {})
    assert main(["report", str(tmp_path)]) == 2 and "version 4" in capsys.readouterr().err
