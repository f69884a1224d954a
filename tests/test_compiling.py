"""What a compiler is told is told for its own device alone, and changes no program's arguments."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from tiny import prompts_of, random_params

from raas_jax import RaaS, compiling
from raas_jax.decode import RowRequest, decode_pages
from raas_jax.session import Session

P, NEW = 4, 13
PROMPTS = prompts_of([5, 2])


def session():
    policy = RaaS(3 * P, alpha=0.12, page_size=P)
    return Session.create(random_params(), policy, [len(prompt) for prompt in PROMPTS], NEW)


@pytest.fixture
def tell(monkeypatch):
    """Sets what the compiler for the CPU is told."""

    def to(**options):
        kind = jax.devices()[0].device_kind
        monkeypatch.setattr(compiling, "_OPTIONS", {kind: options})
        compiling.on_one_device.cache_clear()

    yield to
    compiling.on_one_device.cache_clear()


def test_others_run_the_functions_themselves():
    for kind in ("cpu", "TPU v6 lite", "NVIDIA H100 80GB HBM3"):
        assert compiling.compiler_options(kind) == {}
        assert compiling.on_one_device(decode_pages, kind) is decode_pages
    assert compiling.compiler_options("TPU7x")


def run():
    one = session()
    before, first = one.start(PROMPTS, RowRequest.create([NEW] * 2, ()))
    after, progress = one.advance(before, 2)
    assert before.cache.current.k.is_deleted()
    _, outputs = one.feed(after, np.ones((P, 2), np.int32))
    assert after.cache.current.k.is_deleted()
    return np.concatenate([one.read(first).tokens, one.read(progress).tokens]), outputs


def test_the_same_decode_with_options(tell):
    tokens, outputs = run()
    tell(xla_cpu_enable_fast_math=False)
    again, outputs_again = run()
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_allclose(outputs_again, outputs, atol=1e-5)


def test_options_reach_the_compiler(tell):
    tell(no_such_option="1")
    with pytest.raises(jax.errors.JaxRuntimeError, match="no_such_option"):
        session().lower_advance().compile()
