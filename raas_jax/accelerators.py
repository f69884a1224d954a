"""A GPU or a TPU that is there, while JAX computes on the CPU: said once, with what to install."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import warnings
from pathlib import Path

import jax

ROOT = Path("/")
CUDA13_DRIVER = 580
"""The first driver of NVIDIA's that serves CUDA 13."""
_GOOGLE = "0x1ae0"
_NO_TPU = ("0x01", "0x02")
"""Classes of PCI devices of Google's virtual machines: disks and networks."""


@functools.cache
def warn_if_unused() -> None:
    """Warns, in the first call, of an accelerator that is `missed`."""
    if (found := missed()) is not None:
        warnings.warn(found, stacklevel=2)


def missed() -> str | None:
    """What is `unused`, unless the platform was chosen (`JAX_PLATFORMS=cpu`) or is no CPU.

    To be asked where a device is needed anyway, since it starts JAX's backend.
    """
    if getattr(jax.config, "jax_platforms", None) or jax.default_backend() != "cpu":
        return None
    return unused()


def unused(root: Path = ROOT) -> str | None:
    """What this machine has that a JAX on the CPU does not use, and the remedy; None for nothing.

    Only names of files are looked at, below `root`: no driver and no library is loaded.
    """
    if has_nvidia(root):
        extra = cuda_extra(root)
        plugin = f"jax_{extra}_plugin"
        return _remedy("an NVIDIA GPU", extra, plugin)
    return _remedy("a TPU", "tpu", "libtpu") if has_tpu(root) else None


def _remedy(what: str, extra: str, plugin: str) -> str:
    start = f"this machine has {what}, and JAX computes on the CPU"
    if importlib.util.find_spec(plugin) is not None:
        return (
            f"{start}, though {plugin} is installed: `python -c 'import jax; jax.devices()'` says "
            "why. JAX_PLATFORMS=cpu, if that is meant, ends this warning."
        )
    return (
        f"{start}: in the checkout of raas_jax, pip install -e '.[{extra}]'. JAX_PLATFORMS=cpu, if "
        "that is meant, ends this warning."
    )


def has_nvidia(root: Path = ROOT) -> bool:
    """Whether there is an NVIDIA GPU that `CUDA_VISIBLE_DEVICES` does not hide."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1"):
        return False
    return any((root / "dev").glob("nvidia[0-9]*"))


def has_tpu(root: Path = ROOT) -> bool:
    """Whether there is a TPU: a device of its own driver, or one of Google's given to VFIO."""
    if any((root / "dev").glob("accel[0-9]*")):
        return True
    if not any((root / "dev" / "vfio").glob("[0-9]*")):
        return False
    devices = (root / "sys" / "bus" / "pci" / "devices").glob("*")
    return any(
        _text(device / "vendor") == _GOOGLE and not _text(device / "class").startswith(_NO_TPU)
        for device in devices
    )


def cuda_extra(root: Path = ROOT) -> str:
    """The extra for the driver of this machine: cuda13, or cuda12 where it is too old for that."""
    said = _text(root / "proc" / "driver" / "nvidia" / "version")
    version = re.search(r"Kernel Module\D*(\d+)\.", said)
    return "cuda12" if version and int(version[1]) < CUDA13_DRIVER else "cuda13"


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace").strip()
    except OSError:
        return ""
