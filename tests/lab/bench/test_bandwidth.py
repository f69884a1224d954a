"""What memory allows: bytes that are really moved, in calls that launching does not slow down."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hlo import computations

from pallas_kernels import Target
from pallas_kernels import bench as kernels
from raas_jax.lab.bench import bandwidth


def test_calls_are_of_a_gigabyte_on_accelerators():
    assert bandwidth.READ_BYTES >= 1e9
    assert {kernels.COPIED_BYTES.get(platform, 2**30) for platform in ("gpu", "tpu")} == {2**30}


def test_every_pass_reads_everything_anew():
    """Inside the loop: what does not change would be computed once, before it."""
    array = jax.ShapeDtypeStruct((256, 1024), jnp.float32)
    program = bandwidth._read.lower(array, jax.ShapeDtypeStruct((), jnp.float32)).compile()
    found = computations(program.as_text())
    (loop,) = (each for body in found.values() for each in body if each.op == "while")
    inside, left = set(), list(loop.called)
    while left:
        inside.add(name := left.pop())
        left += [called for each in found[name] for called in each.called if called not in inside]
    reducing = {name for name, body in found.items() if any(each.op == "reduce" for each in body)}
    assert reducing and reducing <= inside


@pytest.mark.parametrize("make", [lambda: bandwidth.device_reader(2**20), bandwidth.copier])
def test_seconds_for_each_byte(make, monkeypatch):
    monkeypatch.setattr(kernels, "COPIED_BYTES", {"cpu": 2**20})
    seconds = make()
    # Between a disk and a register.
    assert 1e-13 < seconds() < 1e-6


def test_the_copy_copies(monkeypatch):
    monkeypatch.setattr(kernels, "COPIED_BYTES", {"cpu": 2**12})
    program = kernels.copying(Target("cpu"))
    before = float(program.carry[5])
    program.seconds()
    assert program.carry.shape == (2**10,) and float(program.carry[5]) == before + 1
    assert program.case.bytes == 2 * program.carry.nbytes
