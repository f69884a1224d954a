"""How far policies are from the dense model on given text, at equal bytes."""

from pathlib import Path

from raas_jax.lab.fidelity.report import report
from raas_jax.lab.runs.results import Results

__all__ = ["is_folder", "report"]


def is_folder(folder: str | Path) -> bool:
    """Whether a folder holds such a comparison. Raises as `Results.read`."""
    return Results.read(folder).layout.kind == "fidelity"
