"""The configuration of a training run, as `configs/lemma.yaml` writes it."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

from raas_jax.config import ModelConfig
from raas_jax.files import read_yaml
from raas_jax.lab.train.batches import Bucket


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
          FileNotFoundError: there is no such file. ValueError: a field is unknown or missing, or a
            stage has not one weight for each bucket.
        """
        fields = read_yaml(path)
        known = {field.name for field in dataclasses.fields(cls)}
        if set(fields) != known:
            raise ValueError(
                f"{path}: unknown fields {sorted(set(fields) - known)}, missing fields "
                f"{sorted(known - set(fields))}; see configs/lemma.yaml."
            )
        fields["model"] = ModelConfig.from_hf(fields["model"], path)
        fields["buckets"] = tuple(Bucket(**each) for each in fields["buckets"])
        fields["validation"] = tuple(Bucket(**each) for each in fields["validation"])
        fields["stages"] = tuple(
            Stage(each["start"], tuple(map(float, each["weights"]))) for each in fields["stages"]
        )
        for stage in fields["stages"]:
            if len(stage.weights) != len(fields["buckets"]):
                raise ValueError(
                    f"{path}: the stage that starts at {stage.start} has {len(stage.weights)} "
                    f"weights for {len(fields['buckets'])} buckets; give one to each."
                )
        return cls(**fields)

    def bucket(self, step: int) -> Bucket:
        """The bucket of this step: a draw of its own, so it does not depend on the past."""
        stage = [stage for stage in self.stages if stage.start <= step][-1]
        source = random.Random(f"bucket/{self.seed}/{step}")
        return source.choices(self.buckets, stage.weights)[0]
