"""The engine with budgets that differ by layer and head. On a mesh: `on_mesh.py`."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from test_engine import answers
from tiny import QWEN3, allotment_of, prompts_of, random_params

import raas_jax
from raas_jax import Engine, RaaS, Request, Sampling
from raas_jax.decode import RowRequest
from raas_jax.policies import H2O
from raas_jax.session import Session

POLICY = RaaS(
    28, alpha=0.12, page_size=4, score="bound", prompt="included", allotment=allotment_of()
)
NEW = 40
OPTIONS = {"policy": POLICY, "rows": 4, "samples": 2, "max_new_tokens": NEW}
OTHER = dataclasses.replace(QWEN3, num_hidden_layers=3)


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


def requests():
    return [
        Request(
            i, prompt, Sampling(temperature=i % 2), seed=i, max_new_tokens=40 - 9 * (i % 3), n=2
        )
        for i, prompt in enumerate(prompts_of([8, 3, 7, 8, 5]))
    ]


def test_samples_of_prompts_paused_and_resumed(params, tmp_path):
    """As `generate` answers each alone; a save knows its allotment, and refuses another one."""
    engine = Engine(params, **OPTIONS, max_prompt_tokens=8)
    assert engine.plan.groups[0].ranges is not None
    found = {}
    for result in engine.run(requests()):
        found[result.id, result.sample] = result.tokens
        if len(found) == 3:
            engine.save(tmp_path)
            break
    assert engine._schedule.busy()
    again = Engine.restore(tmp_path, params)
    assert again.plan == engine.plan
    found |= answers(again, requests())
    for request in requests():
        alone = raas_jax.generate(
            params,
            [request.prompt] * 2,
            policy=POLICY,
            sampling=request.sampling,
            seed=request.seed,
            max_new_tokens=NEW,
        )
        for sample, output in enumerate(alone):
            assert found[request.id, sample] == output.tokens[: request.max_new_tokens]
    POLICY.allotment.write(tmp_path / "allotment.json")
    same = dataclasses.replace(POLICY, allotment=str(tmp_path / "allotment.json"))
    assert Engine.restore(tmp_path, params, policy=same).plan == engine.plan
    for other in (None, allotment_of(seed=1), POLICY.allotment.by_layer()):
        with pytest.raises(ValueError, match="was saved with .*Give that one, or none"):
            Engine.restore(tmp_path, params, policy=dataclasses.replace(POLICY, allotment=other))


def test_saves_without_an_allotment_are_as_before(params, tmp_path):
    """So that those of earlier versions, which know no such option, go on."""
    policy = dataclasses.replace(POLICY, allotment=None)
    engine = Engine(params, **{**OPTIONS, "policy": policy}, max_prompt_tokens=8)
    engine.save(tmp_path)
    book = json.loads((tmp_path / "1" / "book" / "metadata").read_text())
    assert "allotment" not in book["policy"]["options"]
    assert Engine.restore(tmp_path, params).plan == engine.plan


def test_a_session_saved_and_restored(params, tmp_path):
    """By one of the same plan; the same shapes under another allotment are another plan's. Of the
    prompt there is an empty array, since its pages lie among the kept ones."""
    prompts, policy = prompts_of([5, 8]), H2O(16, prompt="evict", page_size=4)
    session, again, other = (
        Session.create(params, dataclasses.replace(policy, allotment=each), [5, 8], NEW)
        for each in (allotment_of(), allotment_of(), allotment_of(seed=1))
    )
    state, _ = session.start(prompts, RowRequest.create([NEW] * 2))
    state, _ = session.advance(state, 4)
    session.save(state, tmp_path / "state")
    wanted = session.read(session.advance(state, 4)[1])
    found = again.read(again.advance(again.restore(tmp_path / "state"), 4)[1])
    np.testing.assert_array_equal(found.tokens, wanted.tokens)
    np.testing.assert_array_equal(found.logprobs, wanted.logprobs)
    with pytest.raises(ValueError, match="another plan, .*Allotment"):
        other.restore(tmp_path / "state")


def test_requests_that_do_not_fit_are_refused(params):
    """A prompt that leaves no head its least; and a model of another shape."""
    with pytest.raises(ValueError, match="allotment is of a model with 3 layers"):
        Engine(
            params,
            **{**OPTIONS, "policy": RaaS(16, page_size=4, allotment=allotment_of(OTHER))},
            max_prompt_tokens=8,
        )
    engine = Engine(params, **OPTIONS, max_prompt_tokens=24)
    (result,) = engine.run([Request("long", [1] * 24)])
    assert "leaves less than the 2 pages" in result.error
