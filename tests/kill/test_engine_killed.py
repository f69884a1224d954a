"""Killed at random moments, a run ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import signal
import time

import engine_run
import pytest
from forks import KILLS, Lives
from tiny import random_params

from raas_jax import Engine


@pytest.mark.once
def test_killed_again_and_again(tmp_path):
    draws = random.Random(7)
    lives = Lives("engine_run.py", tmp_path)
    told, hear = lives.told, lives.hear
    for kill in range(3 * KILLS):  # Short lives, of which the first ones only compile.
        child = lives.start(0.05)
        if kill % 5 == 4:  # While it starts.
            time.sleep(draws.uniform(0.0, 1.0))
        else:
            assert hear() in ("new", "restored")
            time.sleep(draws.uniform(0.0, 0.3))
        os.kill(child, signal.SIGKILL)
        while hear() != "gone":
            assert told[-1] in ("new", "restored"), "the run was over before the last kill"
    lives.finish(0.0)
    lives.close()
    assert told.count("restored") > KILLS // 3, "hardly a life went on from a save"

    whole = Engine(random_params(sharpness=3.0), **engine_run.OPTIONS)
    undisturbed = {(r.id, r.sample): r for r in whole.run(engine_run.REQUESTS)}
    found = engine_run.finished(tmp_path / "results.jsonl")
    assert sorted(found) == sorted(undisturbed)
    assert len(found) == sum(request.n for request in engine_run.REQUESTS)
    for key, result in undisturbed.items():
        assert found[key]["tokens"] == result.tokens
        assert found[key]["finish_reason"] == result.finish_reason
        assert found[key]["error"] == result.error
