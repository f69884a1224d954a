"""`raas-jax convert`: from Hugging Face to Orbax, and back to safetensors."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Literal

import tyro

import raas_jax


@dataclasses.dataclass
class Convert:
    """Convert weights between Hugging Face safetensors and Orbax."""

    src: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Hub id, Hugging Face or Orbax folder, or demo."""
    dst: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """The folder to make; it appears only once it is complete."""
    to: Annotated[
        Literal["orbax", "hf"] | None,
        tyro.conf.arg(metavar="{orbax,hf}", help_behavior_hint=""),
    ] = None
    """The format to write; by default the one that SRC does not have."""
    dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"],
        tyro.conf.arg(metavar="{source,float32,bfloat16,float16}"),
    ] = "source"
    """Of the weights."""

    def run(self) -> int:
        """Writes DST."""
        raas_jax.convert(self.src, self.dst, to=self.to, dtype=self.dtype)
        print(f"Wrote {self.dst}", file=sys.stderr)
        return 0
