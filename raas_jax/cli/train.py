"""`raas-jax train`: the demo model, or one like it."""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated

import tyro

from raas_jax.checks import INT32_MAX
from raas_jax.cli.options import Within, unset


@dataclasses.dataclass
class Train:
    """Train a small reasoner; a stopped run goes on."""

    config: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
    """Configuration of the run, such as configs/lemma.yaml."""
    until: Annotated[int | None, unset("INT"), Within(1, INT32_MAX)] = None
    """Stop after this many steps in all; by default the configuration's."""
    fresh: bool = False
    """Refuse to go on from checkpoints."""

    def run(self) -> int:
        """Trains; Ctrl-C stops, and the newest checkpoint stays."""
        from raas_jax.lab.train.train import main

        folder = main(self.config, until=self.until, fresh=self.fresh)
        print(f"Checkpoints are in {folder}", file=sys.stderr)
        return 0
