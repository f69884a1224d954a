"""Pallas' checking interpreter for TPU kernels."""

import sys

import jax
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu


@pytest.fixture
def checked():
    """Runs a function in the interpreter; any race fails."""

    def run(function, *args, **kwargs):
        with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
            out = jax.block_until_ready(function(*args, **kwargs))
        assert interpreter.races is not None and not interpreter.races.races_found
        return out

    return run


@pytest.fixture(autouse=True)
def no_race_on_a_gpu():
    """What the interpreter of GPU kernels only prints, fails: a race in the last call of a test."""
    yield
    # Of jax 0.12, and only where a test called it.
    callbacks = sys.modules.get("jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks")
    if callbacks is not None:
        assert callbacks._races is None or not callbacks._races.races_found
