"""`raas-jax device-check`: what a GPU or a TPU does with this library, in one table.

Kernels against their references, bandwidth, decode steps, sampling and prefill; torch and vLLM
beside them where they are installed.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from raas_jax import checks
from raas_jax.cli import options
from raas_jax.cli.errors import FAILED, INTERRUPTED, note
from raas_jax.cli.streams import say

MOST_MINUTES = 24 * 60.0


@dataclasses.dataclass
class DeviceCheck:
    """Say whether a GPU or TPU computes right, and how fast."""

    minutes: Annotated[float, options.Within(0.5, MOST_MINUTES), tyro.conf.arg(metavar="FLOAT")] = (
        9.0
    )
    """Time for all parts together."""
    out: Annotated[str | None, options.unset("DIR", "device-check-DATE", aliases=["-o"])] = None
    """New or empty folder for results.jsonl, table.md and logs."""
    config: options.File = None
    """Shape to decode: a config.json, or YAML; by default Qwen3-8B's, or a smaller that fits."""

    def run(self) -> int:
        """Runs all parts; prints the table on stdout, and what comes in between on stderr."""
        from raas_jax.lab.device_check import driver, shapes
        from raas_jax.lab.device_check.check import MODEL
        from raas_jax.lab.device_check.table import failed, line, table, wrong

        config = None if self.config is None else options.read_config(self.config)
        folder = new_folder(self.out)
        if config is not None:
            shapes.write(config, folder / MODEL, config.dtype)
        note(f"results go to {folder}")

        def tell(row: dict[str, Any]) -> None:
            print(checks.printable(line(row)), file=sys.stderr, flush=True)

        try:
            rows = driver.run(folder, 60 * self.minutes, tell)
        except KeyboardInterrupt:
            print((folder / driver.TABLE).read_text(encoding="utf-8"), end="")
            say("interrupted; this is what was known")
            return INTERRUPTED
        print(table(rows), end="")
        return FAILED if wrong(rows) or failed(rows) else 0


def new_folder(out: str | None) -> Path:
    """The folder for the results, made where it is not there.

    Raises:
      ValueError: it is no folder, or not empty. OSError: it cannot be made, or written into.
    """
    name = time.strftime("device-check-%Y%m%d-%H%M%S") if out is None else out
    folder = Path(name).expanduser().absolute()
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out is {name!r}, which is a file; give a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    if next(folder.iterdir(), None) is not None:
        raise ValueError(f"--out is {name!r}, which is not empty; give a new folder.")
    (folder / "results.jsonl").touch()  # Raises OSError at once, and not after the first section.
    return folder
