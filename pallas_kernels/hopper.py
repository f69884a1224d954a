"""Facts about the one kind of GPU that the kernels are written for: compute capability 9.0."""

from __future__ import annotations

import jax

MULTIPROCESSORS = 132
"""Of an H100 SXM and an H200; a card with fewer just has more work for each."""
NAMES = ("H100", "H200", "H800", "H20", "GH200")


def require_hopper(device_kind: str) -> None:
    """Raises NotImplementedError unless this is a Hopper GPU.

    A name that is not known is looked up among the devices of this process.
    """
    words = device_kind.upper().replace("-", " ").split()
    if any(name in words for name in NAMES):
        return
    for device in jax.devices():
        if device.device_kind == device_kind and device.platform == "gpu":
            if str(getattr(device, "compute_capability", "")) == "9.0":
                return
    raise NotImplementedError(
        f"{device_kind!r} is no GPU of compute capability 9.0 (such as {', '.join(NAMES)})"
    )
