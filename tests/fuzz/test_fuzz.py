"""A minute of random damage; `fuzz.py` goes on for longer by hand."""

from __future__ import annotations

import pytest
from fuzz import fuzz
from targets import TARGETS

SECONDS = 60


@pytest.mark.once
@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_clearly(name):
    ends, failures = fuzz(name, SECONDS / len(TARGETS), seed=0)
    assert not failures, "\n".join(failures)
    assert ends["refused"] > 0
