"""`raas-jax convert`: from Hugging Face to Orbax, and back to safetensors."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

import raas_jax
from raas_jax.cli.options import unset


@dataclasses.dataclass
class Convert:
    """Convert weights between safetensors and Orbax."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Model to convert: hub id, Hugging Face or Orbax folder, or demo."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder to make; it appears only once it is complete."""
    to: Annotated[Literal["orbax", "hf"] | None, unset("{orbax,hf}")] = None
    """Format to write; by default the one that SRC does not have."""
    dtype: Literal["source", "float32", "bfloat16", "float16"] = "source"
    """Data type of the weights; source keeps the one they have."""

    def run(self) -> int:
        """Writes DST."""
        raas_jax.convert(self.src, self.dst, to=self.to, dtype=self.dtype)
        print(f"Wrote {self.dst}", file=sys.stderr)
        return 0
