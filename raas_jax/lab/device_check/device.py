"""Section `device`: what it is, and which versions drive it."""

from __future__ import annotations

import importlib.metadata
import platform

import jax

from raas_jax import __version__
from raas_jax.accelerators import missed
from raas_jax.lab.bench.arithmetic import multiplier
from raas_jax.lab.bench.bandwidth import copier, reader
from raas_jax.lab.device_check import shapes
from raas_jax.lab.device_check.check import Check, median
from raas_jax.session import device_memory

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "numpy"),
    *("torch", "transformers", "vllm"),
)


def run(check: Check) -> None:
    """Writes the facts, and the shape that the other sections then decode."""
    device, tell = jax.devices()[0], check.journal.fact
    tell("device", device.device_kind)
    tell("platform", device.platform)
    tell("devices", jax.device_count())
    tell("memory", device_memory())
    if capability := getattr(device, "compute_capability", None):
        tell("compute capability", str(capability))
    tell("raas-jax", __version__)
    tell("python", platform.python_version())
    for package in PACKAGES:
        try:
            tell(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            continue
    # Said here too, since what follows would be a check of the wrong device.
    if (why := missed()) is not None:
        check.journal.write("missing", "the accelerator", why=why)
    config = check.config()
    tell("model", shapes.name_of(config))
    tell("dtype", check.dtype)


def limits(check: Check) -> None:
    """Section `limits`: how fast memory and arithmetic are, by large calls."""
    journal = check.journal
    with journal.attempt("copy"):
        seconds = median(copier())
        journal.figure("copy, read and written", 1e-9 / seconds, "GB/s")
    with journal.attempt("read"):
        journal.figure("read", 1e-9 / median(reader()), "GB/s")
    with journal.attempt("product"):
        seconds = median(multiplier(check.dtype))
        journal.figure(f"product of matrices, {check.dtype}", 1e-12 / seconds, "TFLOP/s")
