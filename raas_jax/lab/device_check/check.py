"""What every section is given."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from pathlib import Path

from raas_jax.config import ModelConfig
from raas_jax.lab.device_check import shapes
from raas_jax.lab.device_check.journal import Journal
from raas_jax.lab.device_check.shapes import Sizes

RESULTS = "results.jsonl"
MODEL = "model"


@dataclasses.dataclass(frozen=True)
class Check:
    """One section of a check.

    Attributes:
      folder: where everything is written.
      journal: where its figures go.
    """

    folder: Path
    journal: Journal

    @classmethod
    def of(cls, folder: Path, section: str) -> Check:
        """A section of the check whose results are in a folder."""
        return cls(folder, Journal(folder / RESULTS, section))

    @property
    def model(self) -> Path:
        """The folder with the shape's config.json."""
        return self.folder / MODEL

    def config(self) -> ModelConfig:
        """The shape that all sections share: the one on disk, or else what fits this device."""
        if not (self.model / "config.json").is_file():
            from raas_jax.session import device_memory

            dtype = self.dtype
            name = shapes.fitting(device_memory()) if dtype == "bfloat16" else "tiny"
            shapes.write(shapes.SHAPES[name], self.model, dtype)
        return ModelConfig.from_file(self.model / "config.json")

    @property
    def dtype(self) -> str:
        """Of weights and cache: bfloat16 on accelerators."""
        from raas_jax.weights.hf import wanted_dtype

        return wanted_dtype(None, "").name

    @property
    def sizes(self) -> Sizes:
        """How much of everything."""
        return shapes.sizes_of(self.config())


def median(measure: Callable[[], float], turns: int = 5) -> float:
    """Of so many turns."""
    return statistics.median(measure() for _ in range(turns))
