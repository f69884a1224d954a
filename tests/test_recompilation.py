"""One compilation serves every prompt of a bucket, every seed and every setting of the sampler."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import pytest
from compiles import compiled
from tiny import prompts_of, random_params

import raas_jax
from raas_jax import Dense, RaaS, Sampling, session


@pytest.fixture(scope="module")
def params():
    return random_params()


@pytest.fixture
def traced_once(monkeypatch):
    """`generate` over fresh jits of its two programs, either of which may be traced only once."""
    chex.clear_trace_counter()
    for name, static in ("prefill", ["plan"]), ("decode_pages", ["plan", "pages", "probe"]):
        plain = chex.assert_max_traces(getattr(session, name).__wrapped__, n=1)
        donated = ["state"] if name == "decode_pages" else []
        jitted = jax.jit(plain, static_argnames=static, donate_argnames=donated)
        monkeypatch.setattr(session, name, jitted)


def test_what_a_caller_varies_compiles_nothing(params, traced_once):
    policy = RaaS(16, page_size=4)

    def ask(lengths=(6, 3), text=0, new=40, seed=0, **sampling):
        return raas_jax.generate(
            params,
            prompts_of(lengths, text),
            policy=policy,
            max_new_tokens=new,
            seed=seed,
            sampling=Sampling(**sampling),
        )

    first = ask()
    with compiled() as names:
        assert ask(text=1)[0].tokens != first[0].tokens
        ask(lengths=(5, 8))
        ask(new=39)
        ask(new=600)  # Far beyond the budget: the slots stay the same.
        ask(temperature=0.7)
        ask(temperature=0.7, seed=1)
        ask(temperature=1.3, top_p=0.9, top_k=5, min_p=0.1, seed=2)
        assert ask()[0].tokens == first[0].tokens
    assert names == []


def test_the_check_can_fail(params, traced_once):
    """Another bucket of prompts, and another policy, are other programs."""
    ask = {"policy": RaaS(16, page_size=4), "max_new_tokens": 9}
    raas_jax.generate(params, [1, 2, 3], **ask)
    with pytest.raises(AssertionError, match="prefill.* is traced > 1 times"):
        raas_jax.generate(params, [1] * 9, **ask)
    raas_jax.generate(params, [1, 2], **ask)
    with compiled() as names:
        jax.jit(lambda x: x * 3 + 1)(3)
    assert len(names) == 1


def test_within_a_bucket_of_lengths_dense_compiles_nothing(params, traced_once):
    for new in (33, 40, 47, 48):
        out = raas_jax.generate(params, [1, 2, 3], policy=Dense(page_size=4), max_new_tokens=new)
        assert len(out.tokens) == new


def test_within_the_budget_few_prompt_lengths_compile_anew(params, traced_once):
    """The paper's accounting gives each prompt length other slots; those are rounded up."""
    for length in (1, 3, 4):
        raas_jax.generate(
            params, [1] * length, policy=RaaS(64, prompt="included", page_size=4), max_new_tokens=70
        )


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"params": None}, "params is a NoneType"),
        ({"tokens": [[1, 2]]}, "tokens is a list"),
        ({"tokens": jnp.zeros((0, 3), jnp.int32)}, "tokens is int32.0, 3."),
        ({"lengths": [2]}, "lengths is a list"),
        ({"lengths": jnp.ones(3, jnp.int32)}, "lengths is int32.3."),
        ({"policy": RaaS}, "policy is <class"),
        ({"sampling": 0.5}, "sampling is 0.5"),
        ({"stop_token_ids": (3, 10**6)}, r"stop_token_ids\[1\] is 1000000"),
        ({"stop_token_ids": "a"}, r"stop_token_ids\[0\] is 'a'"),
        ({"seed": (1, 2)}, "seed is a tuple"),
        ({"seed": 1.0}, "seed is a float32"),
        ({"seed": jax.random.PRNGKey(1)}, "seed is a uint32"),
    ],
    ids=str,
)
def test_generate_ids_names_what_is_wrong(params, wrong, said):
    given = {"params": params, "tokens": jnp.ones((1, 3), jnp.int32), "max_new_tokens": 2}
    with pytest.raises((TypeError, ValueError), match=said):
        raas_jax.generate_ids(**given | wrong)


def test_generate_ids_takes_arrays_of_any_value(params):
    ask = {"policy": RaaS(16, page_size=4), "max_new_tokens": 12, "sampling": Sampling(1.0)}
    run = chex.assert_max_traces(
        lambda tokens, lengths, seed: raas_jax.generate_ids(
            params, tokens, lengths, seed=seed, **ask
        ),
        n=1,
    )
    run = jax.jit(run)
    for seed in range(3):
        tokens = jax.numpy.asarray(prompts_of([6, 6], seed), jax.numpy.int32)
        run(tokens, jax.numpy.asarray([6 - seed, 5]), jax.random.key(seed))
