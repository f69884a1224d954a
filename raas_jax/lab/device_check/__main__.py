"""One section of a check: `python -m raas_jax.lab.device_check SECTION --out FOLDER`.

`raas-jax device-check` starts all of them; one alone is for looking into what failed.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from raas_jax.lab.device_check.check import Check


def _of(module: str, name: str = "run", **options: object) -> Callable[[Check], None]:
    """A function that is imported when it is called: a rival's section needs no JAX."""

    def run(check: Check) -> None:
        from importlib import import_module

        getattr(import_module(f"raas_jax.lab.device_check.{module}"), name)(check, **options)

    return run


RUN: dict[str, Callable[[Check], None]] = {
    "device": _of("device"),
    "limits": _of("device", "limits"),
    "kernels": _of("kernels"),
    "decode-1": _of("decoding", batch=1),
    "decode-8": _of("decoding", batch=8),
    "decode-64": _of("decoding", batch=64),
    "sampling": _of("sampling"),
    "prefill": _of("prefilling"),
    "kernel-times": _of("kernel_times"),
    "torch-1": _of("rivals", "by_torch", batch=1),
    "torch-64": _of("rivals", "by_torch", batch=64),
    "vllm": _of("rivals", "by_vllm"),
}


def _watch(parent: int) -> None:
    """Ends this process once the one that started it is gone: nobody would wait for it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def main() -> int:
    """Runs the section; what it finds is in the folder."""
    parser = argparse.ArgumentParser("python -m raas_jax.lab.device_check", description=__doc__)
    parser.add_argument("section", choices=RUN)
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args()
    watching = partial(_watch, os.getppid())
    threading.Thread(target=watching, daemon=True).start()
    RUN[given.section](Check.of(given.out, given.section))
    return 0


if __name__ == "__main__":
    sys.exit(main())
