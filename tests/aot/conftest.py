"""Ahead-of-time compiles for TPUs: the real compiler, and no TPU."""

from __future__ import annotations

import importlib.util

import pytest

from raas_jax.aot.targets import target_devices

# One of each kind.
TPUS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")


@pytest.fixture(scope="session")
def tpu():
    """Devices of a target by its name."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the compiler for TPUs (pip install -e '.[tpu]'), which is not here")
    return target_devices
