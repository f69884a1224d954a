"""Runs the sections of a check one after the other, each in a process of its own.

The driver itself never starts JAX's backend: a TPU serves one process at a time, and a GPU's memory
belongs to the section that runs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from raas_jax.lab.device_check.check import RESULTS
from raas_jax.lab.device_check.journal import Journal, Row, read
from raas_jax.lab.device_check.table import table

TABLE = "table.md"
LEAST_SECONDS = 10.0
"""A section that would have less is not begun: importing and compiling alone take as long."""
GRACE_SECONDS = 3.0
LOOK_SECONDS = 0.2
"""How often what a section found is told."""


class Section(NamedTuple):
    """A part of a check.

    Attributes:
      name: as `python -m raas_jax.lab.device_check` takes it.
      share: of the time; what one leaves over, the later ones get.
      needs: packages without which it is left out.
    """

    name: str
    share: float
    needs: tuple[str, ...] = ()


SECTIONS = (
    Section("device", 30),
    Section("limits", 30),
    Section("kernels", 100),
    Section("decode-1", 110),
    Section("decode-64", 110),
    Section("sampling", 30),
    Section("prefill", 50),
    Section("decode-8", 70),
    Section("kernel-times", 50),
    Section("torch-1", 100, ("torch", "transformers")),
    Section("torch-64", 100, ("torch", "transformers")),
    Section("vllm", 120, ("vllm",)),
)
"""In the order of their worth."""
ENVIRONMENT = {
    # Else JAX takes most of a GPU at once, and a section that just ended may not have let go of it.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
    # What one section compiled, such as the copy and the weights, the others need not.
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
}
PROGRAMS = "programs"
"""Compiled by this check alone, so that the seconds it took are true."""
RIVALS = {"JAX_PLATFORMS": "cpu"}
"""Where the device belongs to others."""


def run(
    folder: Path,
    seconds: float,
    tell: Callable[[Row], None],
    sections: Sequence[Section] = SECTIONS,
    command: Sequence[str] = (sys.executable, "-m", "raas_jax.lab.device_check"),
) -> list[Row]:
    """Runs the sections and gives all rows; `folder` has them too, with the table.

    Args:
      folder: is there, and has no results yet.
      seconds: for all sections together.
      tell: is given every row the moment it is seen.
      sections: in their order.
      command: what runs a section, whose name and `--out FOLDER` follow.

    Ctrl-C ends the section that runs, writes the table, and is raised again.
    """
    end = time.monotonic() + seconds
    told = 0
    here = [section for section in sections if _is_here(section)]

    def hear() -> list[Row]:
        nonlocal told
        rows = read(folder / RESULTS)
        for row in rows[told:]:
            tell(row)
        told = len(rows)
        return rows

    try:
        for number, section in enumerate(here):
            left = end - time.monotonic()
            limit = left * section.share / sum(each.share for each in here[number:])
            began, how = time.monotonic(), "interrupted"
            try:
                if left < LEAST_SECONDS:
                    how = "not begun, no time was left"
                else:
                    how = _run_one(folder, section, command, max(LEAST_SECONDS, limit), hear)
            finally:
                journal = Journal(folder / RESULTS, section.name)
                seconds = time.monotonic() - began
                journal.write("status", "end", how=how, seconds=seconds, failed=how != "done")
                hear()
    finally:
        rows = hear()
        (folder / TABLE).write_text(table(rows), encoding="utf-8")
        shutil.rmtree(folder / PROGRAMS, ignore_errors=True)
    return rows


def _is_here(section: Section) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in section.needs)


def _run_one(
    folder: Path,
    section: Section,
    command: Sequence[str],
    limit: float,
    hear: Callable[[], object],
) -> str:
    """Runs a section, hears what it finds, and says how it ended."""
    environment = {**ENVIRONMENT, **os.environ, **(RIVALS if section.needs else {})}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(folder / PROGRAMS)
    end = time.monotonic() + limit
    with open(folder / f"{section.name}.log", "wb") as log:
        process = subprocess.Popen(
            [*command, section.name, "--out", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # So that all that it starts ends with it.
        )
        try:
            while (left := end - time.monotonic()) > 0:
                try:
                    return _ended(process.wait(min(LOOK_SECONDS, left)), Path(log.name))
                except subprocess.TimeoutExpired:
                    hear()
            return f"timed out after {limit:.0f} s"
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a section and whatever it has started; its driver may first let go of the device."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):  # Nothing of it is left.
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
    process.wait()


def _ended(code: int, log: Path) -> str:
    if code == 0:
        return "done"
    last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2][:200]
    if code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"ended by {name}" + (f" ({last})" if last else "")
    return f"failed ({last})" if last else f"failed with exit code {code}"
