"""H100s that are not there: what XLA has to know of one to compile for it ahead of time."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

import jax
from jax.experimental import topologies

DEVICE_MEMORY = 84942979072
DEVICE_KIND = "NVIDIA H100 80GB HBM3"

# Of an H100 SXM: CUDA's device properties, and 85 GB of memory as the driver reports it.
_TARGET = f"""
gpu_device_info {{
  name: "{DEVICE_KIND}"
  cuda_compute_capability {{ major: 9 minor: 0 }}
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  clock_rate_ghz: 1.98 l2_cache_size: 52428800 memory_bandwidth: 3352320000000
  device_memory_size: {DEVICE_MEMORY}
}}
platform_name: "CUDA"
device_description_str: "{DEVICE_KIND}"
"""


def _has_ptxas() -> bool:
    """Whether CUDA's assembler is where XLA looks: on PATH, in CUDA's own place, or from pip."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    if shutil.which("ptxas", path=path):
        return True
    return any(next(Path(place).glob("nvidia/*/bin/ptxas"), None) for place in sys.path if place)


def hopper_devices(count: int = 1) -> list[jax.Device]:
    """Devices of one host to compile for; nothing can be put on them or run on them.

    Raises:
      ModuleNotFoundError: JAX's CUDA plugin or `ptxas` is not installed; the message says how to.
    """
    if importlib.util.find_spec("jax_cuda13_plugin") is None or not _has_ptxas():
        raise ModuleNotFoundError(
            "target is 'h100', and the compiler for GPUs is not installed: in the checkout of "
            "raas_jax, pip install -e '.[cuda13]'; or, with ptxas of CUDA 13 on PATH, "
            f"pip install --no-deps jax-cuda13-plugin=={jax.__version__} "
            f"jax-cuda13-pjrt=={jax.__version__}. It needs no GPU."
        )
    described = topologies.get_topology_desc(
        platform="cuda", topology=f"1x1x{count}", target_config=_TARGET
    )
    return list(described.devices)
