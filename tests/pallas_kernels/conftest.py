"""Pallas' checking interpreter for TPU kernels."""

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
