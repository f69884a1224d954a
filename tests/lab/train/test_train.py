"""The trainer: exact resume, the curriculum, and a forward pass that is the model's own."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import yaml
from tiny_lemma import TRAINING as TINY

import raas_jax
from raas_jax import model
from raas_jax.files import FileError
from raas_jax.lab.tasks.lemma.draws import split_of
from raas_jax.lab.tasks.lemma.tokenizer import BOS_ID, decode
from raas_jax.lab.train.batches import Bucket, batch
from raas_jax.lab.train.config import TrainConfig
from raas_jax.lab.train.forward import forward
from raas_jax.lab.train.metrics import Metrics, read_metrics
from raas_jax.lab.train.train import (
    arrays_of,
    export_checkpoint,
    initial_state,
    main,
    restore,
    train_steps,
)


@pytest.fixture
def config_file(tmp_path):
    def write(name, **changes):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(TINY | {"checkpoints": str(tmp_path / name)} | changes))
        return path

    return write


def test_two_steps_and_resume_are_four_in_a_row(config_file):
    path = config_file("resumed")
    config = TrainConfig.from_file(path)
    *_, (straight, _) = train_steps(config, initial_state(config), 4)
    straight = jax.tree.map(np.asarray, straight)

    main(str(path), until=2)
    folder = main(str(path))
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == 4
        resumed = restore(manager, initial_state(config))
    jax.tree.map(np.testing.assert_array_equal, straight, jax.tree.map(np.asarray, resumed))
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 2
    assert export_checkpoint(str(path), folder.with_name("by-hand")) == 4
    for name in ("resumed-model", "by-hand"):
        exported = raas_jax.load(folder.with_name(name)).weights["embedding"]
        np.testing.assert_allclose(exported, straight["average"]["embedding"], rtol=0.01)
    with pytest.raises(ValueError, match="holds checkpoints"):
        main(str(path), fresh=True)


def test_a_killed_run_has_the_metrics_of_an_undisturbed_one(config_file, monkeypatch):
    """Field by field: lines after the checkpoint, and half a line, are as if they never were."""
    whole = main(str(config_file("whole")))
    path, real = str(config_file("killed")), Metrics.write

    def kill(self, line):
        real(self, line | {"step": 3})  # The checkpoint is of step 2.
        with (self._file).open("a") as file:
            file.write(json.dumps(line)[:30])
        raise KeyboardInterrupt

    monkeypatch.setattr(Metrics, "write", kill)
    with pytest.raises(KeyboardInterrupt):
        main(path)
    monkeypatch.setattr(Metrics, "write", real)
    killed = main(path)
    metrics = [read_metrics(folder / "metrics.jsonl") for folder in (whole, killed)]
    without_time = [[{**line, "seconds": 0} for line in found] for found in metrics]
    assert without_time[0] == without_time[1] and len(metrics[0]) == 1
    assert (killed / "metrics.jsonl").read_text().count("\n") == 1

    other = config_file("killed", clip_norm=2.0)
    with pytest.raises(FileError, match=r"another configuration.*\n  clip_norm: 1\.0 → 2\.0"):
        main(str(other))
    config_file("killed")
    for file in (killed / "4").rglob("*"):  # A disk that was full, or a copy that was cut.
        if file.is_file() and "METADATA" not in file.name:
            file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(FileError, match="killed/4 cannot be read .* Remove this folder"):
        main(path)


def test_forward_is_the_models_own(config_file):
    config = TrainConfig.from_file(config_file("forward"))
    weights = initial_state(config)["weights"]
    arrays = arrays_of(batch(config.buckets[1], "train", 0, 0))
    tokens, there = arrays["tokens"][:, :-1], arrays["segments"] > 0
    ours = forward(config.model, weights, tokens, arrays["positions"], arrays["segments"])
    own = model.forward(config.model, weights, tokens, arrays["positions"], arrays["segments"])
    assert jnp.abs(jnp.where(there[..., None], ours - own, 0)).max() < 1e-5


def test_batches_hold_whole_problems_of_their_split():
    item = batch(Bucket(4, 6, 320, 3), "validation", 5, 7)
    again = batch(Bucket(4, 6, 320, 3), "validation", 5, 7)
    np.testing.assert_array_equal(item.tokens, again.tokens)
    found = 0
    for row in range(3):
        starts = np.flatnonzero(item.tokens[row] == BOS_ID)
        for segment, start in enumerate(starts, 1):
            inside = np.flatnonzero(item.segments[row] == segment)
            assert inside[0] == start
            np.testing.assert_array_equal(item.positions[row, inside], np.arange(len(inside)))
            prompt = inside[~item.scored[row, inside]][0], inside[item.scored[row, inside]][0]
            text = decode(item.tokens[row, prompt[0] : prompt[1] + 1])
            assert text.endswith(":") and split_of(text) == "validation"
            found += 1
    assert found == item.problems


def test_config_names_what_is_wrong(tmp_path):
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(TINY | {"lerning_rate": 1}))
    with pytest.raises(FileError, match="lerning_rate.*checkpoints"):
        TrainConfig.from_file(path)
    bucket = TINY["buckets"][0]
    near = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    for change, said in [
        ({"steps": "many"}, "steps is 'many'; it must be an int"),
        ({"steps": 10**30}, "steps is 1000000"),
        ({"clip_norm": float("nan")}, "clip_norm is nan"),
        ({"model": [1]}, r"model is \[1\]; expected named fields"),
        ({"model": {"model_type": "gpt2"}}, "model_type is 'gpt2'"),
        ({"buckets": 3}, "buckets is 3; it must be a list"),
        ({"buckets": [bucket | {"rows": 10**12}, bucket]}, r"buckets\[0\]: rows is 10000"),
        ({"buckets": [bucket | {"row": 1}, bucket]}, r"buckets\[0\]\.row .*did you mean rows"),
        ({"stages": [{"start": 0, "weights": [1]}]}, "1 weights for 2 buckets"),
        ({"stages": [{"start": 5, "weights": [1, 1]}]}, "first must start at 0"),
        ({"stages": [{"start": 0, "weights": [1, "x"]}]}, r"stages\[0\]\.weights\[1\] is 'x'"),
        ({"checkpoints": 5}, "checkpoints is 5; it must be text"),
        ({"stages": [{"start": 0, "weights": [1e308, 1e308]}]}, "with a finite sum above 0"),
        ({"decay_from": TINY["steps"] + 1}, "decay_from is .* at most"),
        ({"average_decay": 2.0}, "average_decay is 2.0; it must be a number from 0 to 1"),
        ({"clip_norm": 0}, "clip_norm is 0"),
        ({"model": TINY["model"] | {"model_type": "llama"}}, "model is a llama .* wants a qwen3"),
        (
            {"model": TINY["model"] | near},
            "layers that see a window, of 8 tokens; training wants layers that all see everything",
        ),
        ({"model": TINY["model"] | {"vocab_size": 99}}, "a qwen3 of 99 words; .* at least 119"),
    ]:
        path.write_text(yaml.safe_dump(TINY | {"checkpoints": "here"} | change))
        with pytest.raises(FileError, match=said):
            TrainConfig.from_file(path)
    with pytest.raises(ValueError, match="wanted at least 1224"):
        Bucket(4, 64, 1024, 1)
