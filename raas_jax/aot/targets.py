"""Accelerators to compile for, by name, without having one.

A name is a kind of chip and the shape of a slice: `v5e:2x4` is eight chips of TPU v5e, `h100:8`
eight GPUs of a host. The compiler comes with the plugin of the platform, and what its environment
needs is set here, before it loads.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import os
import re

import jax
from jax.experimental import topologies

from raas_jax.aot import hopper

TPU_TARGETS = (
    *("v4:2x2x1", "v4:2x2x2", "v4:4x4x4"),
    *("v5e:2x2", "v5e:2x4", "v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"),
    *("v5p:2x2x1", "v5p:2x2x2", "v5p:2x4x4", "v5p:4x4x4", "v5p:8x8x8"),
    *("v6e:2x2", "v6e:2x4", "v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"),
    *("tpu7x:2x2x1", "tpu7x:2x2x2", "tpu7x:2x4x4", "tpu7x:4x4x4"),
)
"""The usual slices; the compiler knows more."""

HOPPER_TARGETS = ("h100", "h100:2", "h100:4", "h100:8")
"""H100s of one host."""

_GIB = 1 << 30
DEVICE_MEMORY: dict[str, int] = {
    "TPU v4": int(15.25 * _GIB),  # One of a chip's two cores.
    "TPU v5 lite": int(15.75 * _GIB),
    "TPU v5": int(95.74 * _GIB),
    "TPU v6 lite": int(31.25 * _GIB),
    "TPU7x": int(94.75 * _GIB),  # One of a chip's two halves.
    hopper.DEVICE_KIND: hopper.DEVICE_MEMORY,
}
"""Bytes that the compiler has at its disposal, by `device_kind`."""

_LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",  # There is no cloud machine to ask about itself.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # Without a chip there is nothing to lock.
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def _tpu(name: str) -> list[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            f"target is {name!r}, and the compiler for TPUs is not installed: in the checkout of "
            "raas_jax, pip install -e '.[tpu]'. It needs no TPU."
        )
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    return topologies.get_topology_desc(platform="tpu", topology_name=name).devices


def target_names() -> list[str]:
    """Names to suggest."""
    return [*TPU_TARGETS, *HOPPER_TARGETS]


@functools.cache
def target_devices(name: str) -> tuple[jax.Device, ...]:
    """The devices of a target, such as `v5e:2x4`, to compile for; nothing can run on them.

    Asked twice, the devices are the same, so that meshes of them are equal.

    Raises:
      ValueError: there is no such target; the message has the nearest.
      ModuleNotFoundError: its compiler is not installed; the message says how to.
    """
    if name in HOPPER_TARGETS:
        return tuple(hopper.hopper_devices(int(name.partition(":")[2] or 1)))
    # Of a known chip, also slices that are not listed.
    chip = re.fullmatch(r"(\w+):\d+(x\d+)+", name)
    if chip is None or chip[1] not in {known.partition(":")[0] for known in TPU_TARGETS}:
        raise _unknown(name)
    try:
        return tuple(_tpu(name))
    except jax.errors.JaxRuntimeError as error:
        raise _unknown(name) from error


def _unknown(name: str) -> ValueError:
    known = target_names()
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return ValueError(f"target is {name!r}, which is unknown; near it are {', '.join(near)}.")
