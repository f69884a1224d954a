"""The configuration of a training run, as `configs/lemma.yaml` writes it."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path

from raas_jax import files
from raas_jax.config import ModelConfig
from raas_jax.files import Fields
from raas_jax.lab.tasks.lemma.language import WORDS
from raas_jax.lab.train.batches import Bucket

_REMEDY = "See configs/lemma.yaml."
_COUNTS = ("warmup_steps", "validate_every", "checkpoint_every")
_NUMBERS = ("matrix_learning_rate", "other_learning_rate", "attention_scale")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Weights with which each step, from step `start` on, draws one of the buckets."""

    start: int
    weights: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A training run, as `configs/lemma.yaml` writes it."""

    seed: int
    steps: int
    model: ModelConfig
    buckets: tuple[Bucket, ...]
    stages: tuple[Stage, ...]
    validation: tuple[Bucket, ...]
    matrix_learning_rate: float  # Muon
    other_learning_rate: float  # AdamW: embedding and norms
    warmup_steps: int
    decay_from: int  # the step at which the learning rates begin to fall, linearly to 0 at `steps`
    clip_norm: float
    average_decay: float
    attention_scale: float  # initial value of the q and k norm weights
    validate_every: int
    checkpoint_every: int
    checkpoints: str

    @classmethod
    def from_file(cls, path: str | Path) -> TrainConfig:
        """Read a YAML file.

        Raises:
          FileNotFoundError: there is no such file. FileError: a field is unknown, missing, of a
            wrong type or out of range, or a stage has not one weight for each bucket.
        """
        found = files.read_yaml(path, _REMEDY)
        known = {field.name for field in dataclasses.fields(cls)}
        fields = Fields(found, path, remedy=_REMEDY)
        if set(found) != known:
            raise fields.error(
                f"unknown fields {sorted(set(found) - known)}, missing fields "
                f"{sorted(known - set(found))}"
            )
        model = ModelConfig.from_hf(fields.inner("model").values, path)
        if not model.qk_norm or model.vocab_size < len(WORDS):
            what = f"model is a {model.model_type} of {model.vocab_size} words"
            raise fields.error(f"{what}; training wants a qwen3 of at least {len(WORDS)}")
        if model.window_layers:
            what = f"model has layers that see a window, of {model.window} tokens"
            raise fields.error(f"{what}; training wants layers that all see everything")
        steps = fields.integer("steps", 1)
        buckets = tuple(each.build(Bucket) for each in fields.each("buckets"))
        return cls(
            model=model,
            buckets=buckets,
            validation=tuple(each.build(Bucket) for each in fields.each("validation")),
            stages=_stages(fields, len(buckets)),
            seed=fields.integer("seed", 0),
            steps=steps,
            decay_from=fields.integer("decay_from", 0, steps),
            clip_norm=fields.real("clip_norm", "a number >= 1e-6", 1e-6),
            average_decay=fields.real("average_decay", "a number from 0 to 1", 0, 1),
            checkpoints=fields.text("checkpoints"),
            **{name: fields.integer(name, 1) for name in _COUNTS},
            **{name: fields.real(name, "a number >= 0", 0) for name in _NUMBERS},
        )

    def bucket(self, step: int) -> Bucket:
        """The bucket of this step: a draw of its own, so it does not depend on the past."""
        stage = [stage for stage in self.stages if stage.start <= step][-1]
        source = random.Random(f"bucket/{self.seed}/{step}")
        return source.choices(self.buckets, stage.weights)[0]


def _stages(fields: Fields, buckets: int) -> tuple[Stage, ...]:
    """Those of a file: the first starts at step 0, each has one weight for each bucket."""
    found = [
        Stage(stage.integer("start", 0), tuple(stage.reals("weights", "a share >= 0", 0)))
        for stage in fields.each("stages")
    ]
    starts = [stage.start for stage in found]
    if starts[:1] != [0] or starts != sorted(starts):
        raise fields.error(f"stages start at {starts}; the first must start at 0, others later")
    for stage in found:
        if len(stage.weights) != buckets or not 0 < sum(stage.weights) < math.inf:
            raise fields.error(
                f"the stage that starts at {stage.start} has {len(stage.weights)} weights for "
                f"{buckets} buckets; give one to each, with a finite sum above 0"
            )
    return tuple(found)
