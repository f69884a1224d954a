"""Killed again and again, everything ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest
from forks import KILLS, Lives
from works import WORKS, prepare


def bytes_in(folder: Path) -> int:
    """Bytes of the files that lie in it at this moment."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += os.stat(os.path.join(place, name)).st_size
    return total


def wait_for_a_write(folder: Path, before: int, at_most: float) -> None:
    """Returns as soon as the folder holds something else than `before` bytes."""
    end = time.monotonic() + at_most
    while bytes_in(folder) == before and time.monotonic() < end:
        time.sleep(0.005)


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
        before = bytes_in(out)
        child = lives.start(out)
        if (kills + number) % 2:
            time.sleep(draws.uniform(0.0, whole))
        else:
            # Starting takes most of a short life, so that a random moment seldom finds it at work.
            wait_for_a_write(out, before, at_most=whole)
            time.sleep(draws.uniform(0.0, 0.1))
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
