"""Options of the policies: what they mean for the memory, and what is refused, and how."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import QWEN3, random_params

import raas_jax
from raas_jax import Dense, RaaS, policies
from raas_jax.plan import Plan
from raas_jax.policies import bucket


@pytest.mark.parametrize(
    ("options", "named", "remedy"),
    [
        ({"budget": 100}, "budget is 100", "Use 96 or 112"),
        ({"budget": 7}, "budget is 7", "Use at least 32"),
        ({"budget": 16}, "budget is 16, less than two pages", "at least 32"),
        ({"budget": 0}, "budget is 0, less than two pages", "at least 32"),
        ({"budget": -32}, "budget is -32", "at least 32"),
        ({"budget": 64.0}, "budget is 64.0", "must be an int"),
        ({"budget": True}, "budget is True", "must be an int"),
        ({"alpha": -1e-9}, "alpha is -1e-09", r"in \[0, 1\]"),
        ({"alpha": 1.5}, "alpha is 1.5", r"in \[0, 1\]"),
        ({"budget": 10**30}, "budget is 1000", "at most"),
        ({"alpha": float("nan")}, "alpha is nan", "finite"),
        ({"alpha": "0.1"}, "alpha is '0.1'", "finite"),
        ({"half_life": 10**400}, "half_life is 1000", "finite"),
        ({"top_fraction": 0.0}, "top_fraction is 0.0", r"in \(0, 1\]"),
        ({"top_fraction": 1.1}, "top_fraction is 1.1", r"in \(0, 1\]"),
        ({"alpha": 0.1, "top_fraction": 0.5}, "alpha=0.1 and top_fraction=0.5", "Give one"),
        ({"score": "max"}, "score is 'max'", "'mass', 'bound'"),
        ({"granularity": "head"}, "granularity is 'head'", "'kv_head', 'layer'"),
        ({"prompt": "inside"}, "prompt is 'inside'", "'excluded', 'included'"),
        ({"dense_layers": -1}, "dense_layers is -1", "at least 0"),
        ({"page_size": 0}, "page_size is 0", "at least 1"),
        ({"page_size": 1.5}, "page_size is 1.5", "must be an int"),
    ],
    ids=str,
)
def test_options_out_of_range_name_themselves_and_the_remedy(options, named, remedy):
    with pytest.raises((TypeError, ValueError), match=named) as error:
        RaaS(**options)
    assert error.match(remedy)


def test_a_number_that_cannot_be_written():
    with pytest.raises(ValueError, match="budget is a number of too many digits.*at most"):
        RaaS(10**5000)


def test_numbers_of_numpy_are_taken_as_pythons():
    mine = RaaS(np.int64(64), np.float32(0.5), recent=np.int32(16), page_size=jnp.int32(8))
    assert mine == RaaS(64, 0.5, recent=16, page_size=8)
    assert [type(value) for value in (mine.budget, mine.alpha)] == [int, float]
    assert type(RaaS(64, 0).alpha) is int  # As it was given, since names are made of it.


def test_the_remedy_of_a_budget_works():
    for budget, page_size in ((100, 16), (7, 16), (17, 16), (5, 4), (33, 16)):
        with pytest.raises(ValueError) as error:
            RaaS(budget, page_size=page_size)
        said = str(error.value).split("Use ")[1].replace("at least", "").replace(",", " ").split()
        for number in [int(word.rstrip(".")) for word in said if word.rstrip(".").isdigit()]:
            assert RaaS(number, page_size=page_size).budget == number


def test_a_prompt_that_leaves_no_room():
    params = random_params()
    policy = RaaS.paper(64)
    for prompt in ([1] * 33, [[1, 2], [1] * 33]):
        with pytest.raises(ValueError, match="prompt takes 33 tokens .* at least 80, or prompt="):
            raas_jax.generate(params, prompt, policy=policy, max_new_tokens=5)
    with pytest.raises(ValueError, match="prompt takes 33 tokens"):
        raas_jax.generate_ids(params, jnp.ones((1, 33), jnp.int32), policy=policy, max_new_tokens=5)
    # The remedies that it gives.
    policy.check_prompts([32])
    RaaS.paper(80).check_prompts([33])
    dataclasses.replace(policy, prompt="excluded").check_prompts([1000])


def test_names():
    assert policies.available() == tuple(sorted(policies.available()))
    assert {"dense", "raas"} <= set(policies.available())
    assert policies.create("raas", budget=64) == RaaS(64)
    assert policies.by_name("dense") is Dense
    for name, near in ("rass", "raas"), ("RaaS", "raas"), ("dens", "dense"):
        with pytest.raises(ValueError, match=f"policy is {name!r}.*Did you mean .*{near}"):
            policies.create(name)
    with pytest.raises(ValueError, match="policy is 'xyzzy'; there are .*dense.*raas") as error:
        policies.create("xyzzy")
    assert "Did you mean" not in str(error.value)
    with pytest.raises(TypeError, match="budgte"):
        policies.create("raas", budgte=64)


def test_the_papers_setting():
    paper = RaaS.paper(512)
    assert (paper.budget, paper.prompt, paper.score) == (512, "included", "bound")
    assert (paper.alpha, paper.page_size, paper.top_fraction) == (1e-4, 16, None)
    assert paper.dense_layers == 0
    assert len({paper, RaaS.paper(512), RaaS(512)}) == 2


def test_slots():
    """The memory that a policy asks for: never more than the budget, nor than the answer needs."""

    def slots(policy, prompts, new):
        return Plan.create(QWEN3, policy, prompts, new).slots

    assert slots(RaaS(128), [20, 300], 100_000) == (8,)
    assert slots(RaaS(128), [20, 300], 33) == (3,)
    assert slots(RaaS(128, dense_layers=1), [20], 4096) == (256, 8)
    assert slots(RaaS(128, dense_layers=9), [20], 4096) == (256,)
    assert slots(RaaS(128, prompt="included"), [20, 90], 4096) == (6,)
    assert slots(Dense(), [20], 4096) == (256,)
    capacity = RaaS(128, prompt="included").capacity(
        jnp.asarray([1, 16, 17, 90]), np.full((2, 3), 7)
    )
    assert jnp.broadcast_to(capacity, (2, 4, 3))[1, :, 2].tolist() == [7, 7, 6, 2]
    for size in range(1, 300):
        assert size <= bucket(size) <= 1.5 * size
    assert len({bucket(size) for size in range(1, 4097)}) < 26
