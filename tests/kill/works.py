"""What may be killed, beside the engine: each is begun anew in the same folder until it is done."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import yaml
from forks import serve
from tiny_lemma import TRAINING, save_tiny

import raas_jax
from raas_jax.cli.main import main
from raas_jax.lab.runs import Asking, EngineDecoding, LemmaTask, Results, run
from raas_jax.lab.tasks.benchmarks.lemma import lemma_benchmark
from raas_jax.lab.train import train
from raas_jax.policies import RaaS
from raas_jax.sampling import Sampling
from raas_jax.weights import convert

# Slow enough that a kill may come between any two samples or steps.
PAUSE = 0.02
TIMES = ("seconds", "start", "elapsed")
STUDY = {
    "page_size": 4,
    "rows": 4,
    "reference": "RaaS",
    "controls": ["Recent"],
    "tasks": {"tiny": {"smallest": 3, "largest": 3, "problems": 6, "budgets": [8]}},
    "policies": [{"label": name, "policy": name.lower()} for name in ("Dense", "RaaS", "Recent")],
}
LONGER = {"steps": 60, "checkpoint_every": 7, "validate_every": 30, "decay_from": 30}


def prepare(folder: Path) -> None:
    """Writes what the works read."""
    save_tiny(folder / "model")
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (folder / "training.yaml").write_text(
        yaml.safe_dump(TRAINING | LONGER | {"checkpoints": "unused"})
    )
    prompts = [{"prompt": list(range(3, 8 + index))} for index in range(4)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))


def study(given: Path, out: Path) -> None:
    files = "--config", given / "study.yaml", "--model", given / "model", "--out", out
    assert main(["eval", "lemma", *map(str, files)]) == 0


def benchmark(given: Path, out: Path) -> None:
    task = lemma_benchmark(LemmaTask(problems=6, smallest=3, largest=3, max_new_tokens=10))
    asking = Asking(samples=3, sampling=Sampling(temperature=1.0), seed=5)
    decoding = EngineDecoding(asking, rows=4, keep_tokens=True)
    params = raas_jax.load(given / "model")
    run(params, task, [RaaS(8, page_size=4)], out, model="tiny", decoding=decoding, progress=False)


def training(given: Path, out: Path) -> None:
    train.main(str(given / "training.yaml"), checkpoints=str(out / "checkpoints"))


def conversion(given: Path, out: Path) -> None:
    if not (out / "orbax").exists():
        convert(given / "model", out / "orbax")
    if not (out / "hf").exists():
        convert(out / "orbax", out / "hf")


def calibration(given: Path, out: Path) -> None:
    files = "--model", given / "model", "--prompts", given / "prompts.jsonl"
    out.mkdir(exist_ok=True)
    wanted = *map(str, files), "--out", str(out / "centres.safetensors"), "-n", "6"
    assert main(["calibrate", *wanted]) == 0


def samples_in(out: Path) -> object:
    """Every field of every sample, but for times; and the configuration."""
    found = Results.read(out)
    assert not found.bad
    samples = {
        key: {name: value for name, value in sample.items() if name not in TIMES}
        for key, sample in found.samples.items()
    }
    return samples, found.config


def metrics_in(out: Path) -> object:
    """Every line of the metrics, but for times, and the weights."""
    lines = (out / "checkpoints" / "metrics.jsonl").read_text().splitlines()
    metrics = [{**json.loads(line), "seconds": None} for line in lines]
    model = raas_jax.load(out / "checkpoints-model")
    return metrics, {name: leaf.tobytes() for name, leaf in arrays_of(model).items()}


def models_in(out: Path) -> object:
    """The bytes of both copies."""
    found = [arrays_of(raas_jax.load(out / name)) for name in ("orbax", "hf")]
    return [{name: leaf.tobytes() for name, leaf in each.items()} for each in found]


def centres_in(out: Path) -> object:
    """The bytes of the file."""
    return (out / "centres.safetensors").read_bytes()


def arrays_of(params: raas_jax.Params) -> dict[str, np.ndarray]:
    """The weights by their paths."""
    from raas_jax.weights.hf import flatten

    return {name: np.asarray(leaf) for name, leaf in flatten(params.stacked().weights).items()}


WORKS = {
    "study": (study, samples_in),
    "benchmark": (benchmark, samples_in),
    "training": (training, metrics_in),
    "conversion": (conversion, models_in),
    "calibration": (calibration, centres_in),
}


def slowed(function):
    """The same, after a pause."""

    def slow(*arguments, **options):
        time.sleep(PAUSE)
        return function(*arguments, **options)

    return slow


if __name__ == "__main__":
    work, given = WORKS[sys.argv[1]][0], Path(sys.argv[2])
    Results.add = slowed(Results.add)
    train.batch = slowed(train.batch)
    serve(lambda out: work(given, Path(out)), given / "compiled")
