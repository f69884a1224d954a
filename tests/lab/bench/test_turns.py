"""Contenders take turns; a decode can be timed again and again."""

from __future__ import annotations

import itertools

import jax
import numpy as np
import pytest
from tiny import prompts_of, random_params

from raas_jax import RaaS
from raas_jax.lab.bench.steps import bench
from raas_jax.lab.bench.turns import Contender, TimedDecode, median_ratio, take_turns
from raas_jax.session import Session


def test_turns_go_to_and_fro():
    clock = itertools.count(1.0)
    contenders = [Contender(name, 0, lambda: next(clock)) for name in "abc"]
    assert take_turns(contenders, 3) == [[1, 6, 7], [2, 5, 8], [3, 4, 9]]
    assert median_ratio([1.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == 1.0


def test_timing_leaves_the_decode_as_it_is():
    prompts = prompts_of([5, 7])
    session = Session.create(random_params(), RaaS(16, page_size=4), [5, 7], 64)
    decode = TimedDecode.start(session, prompts, 9, pages=2)
    before = jax.device_get(decode.state.rows.generated)
    assert decode.chunk == 8 and before.tolist() == [17, 17]  # The prompt's, and two chunks.
    assert decode.time_chunk() > 0 and decode.time_chunk() > 0
    np.testing.assert_array_equal(before, decode.state.rows.generated)
    assert decode.after(1).state.rows.generated.tolist() == [25, 25]


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="lengths are"):
        bench(random_params(), RaaS(64), prompt_tokens=8, lengths=[8])
    with pytest.raises(ValueError, match="'transformers', 'llama.cpp', 'dense'"):
        bench(random_params(), RaaS(64), prompt_tokens=8, lengths=[64], against=["vllm"])
