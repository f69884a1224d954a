"""Fixtures of the tests of weights."""

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import Checkpoint


@pytest.fixture
def checkpoint(tmp_path) -> Checkpoint:
    return Checkpoint(tmp_path / "model")


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def any_dtype(request) -> np.dtype:
    return np.dtype(jnp.dtype(request.param))
