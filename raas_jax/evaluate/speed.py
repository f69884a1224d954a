"""Time per token and memory at growing lengths of the answer, for a study's plots."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from raas_jax.bench import bench
from raas_jax.evaluate.results import write
from raas_jax.params import Params
from raas_jax.policies import Policy

SPEED = "speed.json"


@dataclasses.dataclass(frozen=True)
class Speed:
    """What to measure: these policies, at these lengths of the answer.

    Attributes:
      policies: labels of policies of the study.
      lengths: generated tokens.
      budget: tokens, of those that have one.
      prompt_tokens: length of the prompt.
      batch: rows at once.
      repetitions: timed turns; the median counts.
    """

    policies: tuple[str, ...]
    lengths: tuple[int, ...]
    budget: int
    prompt_tokens: int = 128
    batch: int = 1
    repetitions: int = 9

    def __post_init__(self) -> None:
        for name in ("policies", "lengths"):  # Lists, where they come from a file.
            object.__setattr__(self, name, tuple(getattr(self, name)))


def measure_speed(
    params: Params,
    speed: Speed,
    tried: Mapping[str, Policy],
    folder: Path,
    progress: bool | None = None,
) -> None:
    """Adds to `speed.json`, policy by policy, what is not there yet."""
    file = folder / SPEED
    found: dict[str, list[dict[str, Any]]] = json.loads(file.read_text()) if file.is_file() else {}
    missing = [label for label in tried if label not in found]
    hidden = None if progress is None else not progress
    for label in tqdm(missing, desc="time per token", unit="policy", disable=hidden):
        measured = bench(
            params,
            tried[label],
            prompt_tokens=speed.prompt_tokens,
            lengths=speed.lengths,
            batch=speed.batch,
            repetitions=speed.repetitions,
        )
        found[label] = [
            {
                "tokens": timing.generated,
                "ms_per_token": round(timing.ms_per_token, 4),
                "kv_bytes": timing.kv_bytes,
            }
            for timing in measured.timings
        ]
        write(file, json.dumps(found, indent=1) + "\n")
