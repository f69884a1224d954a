"""Killed at random moments, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import life
import pytest
from tiny import random_params

from raas_jax import Engine

KILLS = 20
HERE = Path(__file__).parent


@pytest.mark.once
def test_killed_twenty_times(tmp_path):
    draws = random.Random(7)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [HERE.parent, *sys.path]))}
    process = subprocess.Popen(
        [sys.executable, HERE / "life.py", tmp_path],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    told: list[str] = []

    def hear() -> str:
        told.append(process.stdout.readline().strip())
        return told[-1]

    def start(pause: float) -> int:
        process.stdin.write(f"{pause}\n")
        process.stdin.flush()
        return int(hear())

    for kill in range(KILLS):
        child = start(0.05)
        if kill % 5 == 4:  # While it starts.
            time.sleep(draws.uniform(0.0, 1.0))
        else:
            assert hear() in ("new", "restored")
            time.sleep(draws.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        while hear() != "gone":
            assert told[-1] in ("new", "restored"), "the run was over before the last kill"
    start(0.0)
    while hear() != "gone":
        pass
    assert told[-2:] == ["finished", "gone"]
    process.stdin.close()
    assert process.wait() == 0
    assert told.count("restored") > KILLS // 3

    engine = Engine(random_params(sharpness=3.0), **life.OPTIONS)
    undisturbed = {(r.id, r.sample): r for r in engine.run(life.REQUESTS)}
    found = life.finished(tmp_path / "results.jsonl")
    assert sorted(found) == sorted(undisturbed)
    assert len(found) == sum(request.n for request in life.REQUESTS)
    for key, result in undisturbed.items():
        assert found[key]["tokens"] == result.tokens
        assert found[key]["finish_reason"] == result.finish_reason
        assert found[key]["error"] == result.error
