"""What proves policies, on models with layers that see a window, and on models of these alone."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
import written_out
from tiny import ALL_WINDOWS, VOCAB, WINDOWS, prompts_of, random_params

from raas_jax import Dense
from raas_jax.calibrate import calibrate
from raas_jax.decode import empty_state
from raas_jax.lab.allotments import effect
from raas_jax.lab.bench import policies as bench_policies
from raas_jax.lab.bench.far import at_length
from raas_jax.lab.bench.steps import step_bytes
from raas_jax.lab.fidelity import run
from raas_jax.lab.fidelity.oracle import Oracle
from raas_jax.lab.fidelity.texts import Text
from raas_jax.lab.trace import trace
from raas_jax.plan import Plan
from raas_jax.policies import RaaS
from raas_jax.session import Session

P, PROMPT = 4, 6


@pytest.fixture(scope="module")
def params():
    return random_params(WINDOWS, 3, 3.0)


def texts_of(lengths):
    return [Text("any", str(n), tuple(ids)) for n, ids in enumerate(prompts_of(lengths, 2))]


def compared(params, tried, out):
    """The mean divergence of each policy, of a whole comparison."""
    points = run.plan_points(params, tried, PROMPT, 46)
    asked = {"model": "tiny", "prompt_tokens": PROMPT, "rows": 2}
    results = run.run(params, texts_of([46, 46]), points, out, **asked)
    return {
        point.label: np.mean(
            [sum(each["kl"]) for each in results.samples.values() if each["policy"] == point.label]
        )
        / 39
        for point in points
    }


def test_a_comparison_on_full_layers(params, tmp_path):
    """What forgets there loses, and what does not is the dense model, sinks and windows with it."""
    tried = [Oracle(16, page_size=P), RaaS(64, page_size=P)]
    little, nothing = compared(params, tried, tmp_path / "run").values()
    assert little > 1e-3 and nothing < 1e-6


def test_windows_alone_lose_nothing(tmp_path):
    """Whatever the policy: nothing is under it."""
    params = random_params(ALL_WINDOWS, 3, 3.0)
    found = compared(params, [RaaS(8, page_size=P), Oracle(8, page_size=P)], tmp_path / "run")
    assert len(found) == 2 and max(found.values()) < 1e-6


@pytest.mark.parametrize(
    "asked",
    [
        lambda params: calibrate(params, [[1, 2, 3]]),
        lambda params: trace(params, "a = 4; ? a", RaaS(8, page_size=P)),
        lambda params: bench_policies.compare(params, {"raas": RaaS(8, page_size=P)}),
    ],
    ids=["calibrate", "trace", "bench"],
)
def test_what_is_about_full_layers_refuses_a_model_without(asked):
    with pytest.raises(ValueError, match="2 layers, all with a window of 7 tokens.*in constant"):
        asked(random_params(ALL_WINDOWS))


def test_centres_are_of_the_layers_that_see_everything(params):
    """Means of queries that are turned back by hand, behind windows and sinks written out."""
    sequences, half = prompts_of([9, 40], 1), WINDOWS.head_dim // 2

    def attended(layer, q, k, v, _):
        return written_out.plainly(layer, q, k, v)[0], q

    seen = []
    for ids in sequences:
        _, q = jax.jit(partial(written_out.run, params, attended=attended))(np.asarray(ids))
        turned = np.float64(q[..., :half]) + 1j * np.float64(q[..., half:])
        angle = np.arange(len(ids))[:, None] * WINDOWS.rope.theta ** (-np.arange(half) / half)
        seen.append(turned * np.exp(-1j * angle)[:, None])
    seen = np.concatenate(seen, axis=1)
    found = calibrate(params, sequences, progress=False)
    mean = seen.mean(axis=1)
    wanted = np.concatenate([mean.real, mean.imag], axis=-1)
    assert found.centre.shape == (2, 4, WINDOWS.head_dim)
    np.testing.assert_allclose(found.centre, wanted, atol=1e-5)
    np.testing.assert_allclose(found.length, abs(seen).mean(axis=1), atol=1e-5)


def test_a_shrunken_layer_is_one_of_those_that_see_everything():
    policy = effect.Narrowed(16, page_size=P)
    plan = Plan.create(WINDOWS, policy, [5, 5], 40)
    state = empty_state(WINDOWS, plan, 2, np.float32)
    found = effect._narrowing([(1, None), (0, 1)], 2)(state)
    assert np.asarray(found.meta[0].slots).tolist() == [[[4, 4], [4, 2]], [[2, 2], [4, 4]]]
    assert found.meta[1] is state.meta[1] and len(found.meta) == 2


@pytest.mark.parametrize("pages", [0, 9])
def test_a_step_reads_a_window_of_windows(params, pages):
    """The floor of bytes: a prompt of five in full layers only, windows up to ten tokens."""
    session = Session.create(params, RaaS(16, page_size=P), [5, 5], 80)
    state = at_length(session, 5, 1 + pages * P)
    weights = params.size * 4 - VOCAB * WINDOWS.hidden_size * 4  # All but the embedding.
    kept = min(4 * P, pages * P)
    # Two full layers, two with a window; the current page is half.
    tokens = 2 * (5 + kept + P // 2) + 2 * min(10, 5 + pages * P + P // 2)
    per_token = 2 * WINDOWS.num_key_value_heads * WINDOWS.head_dim * 4
    assert step_bytes(params, state) == weights + 2 * tokens * per_token


def test_slots_are_those_of_the_layers_that_see_everything(params):
    """And a window of the same size is what a policy's step is compared with."""
    assert bench_policies._slots(params, RaaS(32, page_size=P), 5, 400) == 8
    assert bench_policies._window(params, RaaS(32, page_size=P), 5, 400).size == 32
    assert bench_policies._window(params, RaaS(32, page_size=P, dense_layers=1), 5, 400) is None
    assert bench_policies._window(params, Dense(page_size=P), 5, 400) is None
