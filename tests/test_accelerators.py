"""A GPU or a TPU that JAX does not use is said once, with what to install; machines are fakes."""

from __future__ import annotations

import importlib.util
import re
import tomllib
import warnings
from pathlib import Path

import jax
import pytest
from tiny import random_params

from raas_jax import RaaS, accelerators
from raas_jax.accelerators import unused, warn_if_unused
from raas_jax.session import Session

OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build"
CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024"
VERSION = "proc/driver/nvidia/version"
PCI = "sys/bus/pci/devices/0000:00:0"


def machine(root, files):
    """A folder as the root of a machine that has these files."""
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    return root


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, None),
        ({"dev/nvidia0": ""}, "an NVIDIA GPU, .* '.[cuda13]'"),
        ({"dev/nvidia7": "", VERSION: OPEN}, "an NVIDIA GPU, .* '.[cuda13]'"),
        ({"dev/nvidia0": "", VERSION: CLOSED}, "an NVIDIA GPU, .* '.[cuda12]'"),
        ({"dev/nvidiactl": "", VERSION: OPEN}, None),
        ({"dev/accel0": ""}, "a TPU, .* '.[tpu]'"),
        ({"dev/accel/accel0": ""}, None),  # A laptop's.
        ({"dev/vfio/0": "", PCI + "4/vendor": "0x1ae0", PCI + "4/class": "0xff0000"}, "a TPU"),
        ({"dev/vfio/vfio": "", PCI + "4/vendor": "0x1ae0", PCI + "4/class": "0xff0000"}, None),
        ({"dev/vfio/0": "", PCI + "4/vendor": "0x1ae0", PCI + "4/class": "0x020000"}, None),
        ({"dev/vfio/0": "", PCI + "4/vendor": "0x8086", PCI + "4/class": "0xff0000"}, None),
    ],
)
def test_what_a_machine_has(tmp_path, files, wanted):
    found = unused(machine(tmp_path, files))
    if wanted is None:
        assert found is None
    else:
        start, _, end = wanted.partition(" .* ")
        assert found.startswith(f"this machine has {start}") and end in found
        assert "pip install -e" in found and "JAX_PLATFORMS=cpu" in found


def test_a_gpu_that_is_hidden_is_not_missed(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused(machine(tmp_path, {"dev/nvidia0": ""})) is None


def test_a_plugin_that_does_not_start_is_not_installed_again(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    found = unused(machine(tmp_path, {"dev/nvidia0": ""}))
    assert "jax_cuda13_plugin is installed" in found and "pip install" not in found


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A machine with a TPU, whose JAX was not told where to compute."""
    monkeypatch.setattr(
        accelerators.unused, "__defaults__", (machine(tmp_path, {"dev/accel0": ""}),)
    )
    before = jax.config.jax_platforms
    warn_if_unused.cache_clear()
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", before)
    warn_if_unused.cache_clear()


def begin():
    """What generate, score and the engine do, too."""
    return Session.create(random_params(), RaaS(32), [4], 8).empty()


def test_the_first_session_warns_and_no_other(asked):
    with pytest.warns(UserWarning, match="this machine has a TPU, and JAX computes on the CPU"):
        begin()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        begin()


@pytest.mark.parametrize("why", ["the CPU was chosen", "a GPU is used"])
def test_nothing_is_said_where_all_is_well(asked, why, monkeypatch):
    if why == "a GPU is used":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    else:
        jax.config.update("jax_platforms", "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_unused()


def test_what_is_to_be_installed_is_there_and_asked_of_no_index():
    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {"tpu", "cuda12", "cuda13"} <= set(extras)
    sources = [*(root / "raas_jax").rglob("*.py"), *root.glob("docs/*.md"), root / "README.md"]
    named = set()
    for file in sources:
        text = file.read_text()
        named |= set(re.findall(r"pip install -e '?\S*?\[(\w+)\]", text))
        assert not re.search(r"pip install ['\"]?raas[-_]jax", text), file
    assert {"tpu", "cuda12", "cuda13", "eval", "plots"} <= named <= set(extras)
