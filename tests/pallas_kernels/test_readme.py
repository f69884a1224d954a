"""The example in the README of the kernels runs as it stands, and says what is true."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

import pallas_kernels

README = Path(pallas_kernels.__file__).with_name("README.md")


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(example.splitlines()) <= 14
    names: dict = {}
    exec(compile(example, str(README), "exec"), names)
    assert capsys.readouterr().out.startswith("(3, 8, 64) [")
    np.testing.assert_allclose(names["mass"].sum(-1), 1, rtol=1e-5)
    # By plain attention over the 37 living tokens of layer 1.
    q, k, v = (np.asarray(names[name], np.float64) for name in "qkv")
    for b, n in np.ndindex(3, 8):
        keys, values = (x[1, b, n // 4].reshape(-1, 64)[:37] for x in (k, v))
        weights = np.exp(keys @ q[b, n] / 8)
        wanted = weights @ values / weights.sum()
        np.testing.assert_allclose(names["attended"][b, n], wanted, atol=1e-5)


def test_every_operation_is_in_the_table():
    operations = re.findall(r"^\| `(\w+)` \|", README.read_text(encoding="utf-8"), re.MULTILINE)
    public = {name for name in pallas_kernels.__all__ if name.islower()}
    assert set(operations) == public
