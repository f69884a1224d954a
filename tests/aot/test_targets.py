"""Targets by name, and `raas-jax memory` for them, as far as no compiler is needed."""

from __future__ import annotations

import importlib.util

import pytest

from raas_jax.aot import hopper
from raas_jax.aot.targets import DEVICE_MEMORY, target_devices, target_names
from raas_jax.cli.main import main


@pytest.mark.parametrize(
    ("name", "near"), [("v5x:2x4", "v5e:2x4"), ("v5e", "v5e:"), ("v5e-8", "v5e:"), ("", "v4:2x2x1")]
)
def test_an_unknown_target_gets_near_ones(name, near):
    with pytest.raises(ValueError, match=near) as caught:
        target_devices(name)
    assert repr(name) in str(caught.value)


def test_without_the_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    # Not one that another test has asked for already.
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[tpu\]'"):
        target_devices("v6e:8x16")
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e '\.\[cuda13\]'"):
        hopper.hopper_devices()


def test_names_are_of_chips_and_shapes():
    assert len(set(target_names())) == len(target_names())
    slices = [name for name in target_names() if not name.startswith("h100")]
    assert all(":" in name and "x" in name for name in slices)
    assert all(size > 1 << 33 for size in DEVICE_MEMORY.values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--target", "v5x:2x4"], "near it are"),
        (["--mesh", "data=2"], "no target"),
        (["--target", "v5e:2x4", "--mesh", "rows=2"], "data=2,model=4"),
        (["--target", "v5e:2x4", "--mesh", "data=0"], "data=2,model=4"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(options, named, capsys):
    assert main(["memory", "--model", "demo", *options]) != 0
    error = capsys.readouterr().err
    assert named in error and "Traceback" not in error
