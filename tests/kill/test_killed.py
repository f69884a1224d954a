"""Killed at random moments, again and again, everything ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time

import pytest
from forks import KILLS, Lives
from works import WORKS, prepare


@pytest.mark.once
@pytest.mark.parametrize("name", WORKS)
def test_killed_again_and_again(name, tmp_path):
    result = WORKS[name][1]
    prepare(tmp_path)
    lives, draws = Lives("works.py", name, tmp_path), random.Random(7)
    lives.finish(tmp_path / "compiling")
    began = time.monotonic()
    lives.finish(tmp_path / "undisturbed")
    whole = time.monotonic() - began
    undisturbed = result(tmp_path / "undisturbed")
    assert result(tmp_path / "compiling") == undisturbed

    number, kills, begun = 0, 0, 0
    while kills < KILLS:
        out = tmp_path / f"killed{number}"
        begun += out.exists()
        child = lives.start(out)
        time.sleep(draws.uniform(0.0, whole))
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        if "finished" not in lives.rest():
            kills += 1
            continue
        assert result(out) == undisturbed  # The kill came too late.
        number += 1
    assert begun > KILLS // 4, "hardly a life found what an earlier one had left"
    lives.finish(out)
    lives.close()
    assert result(out) == undisturbed
