"""The engine's own business: rows, programs, memory, errors, pauses."""

from __future__ import annotations

import dataclasses

import jax
import pytest
from compiles import compiled
from tiny import VOCAB, prompts_of, random_params

import raas_jax
from raas_jax import Engine, RaaS, Request, Sampling, checks, policies
from raas_jax.engine.checkpoint import Saver
from raas_jax.session import Session

POLICY = RaaS(16, alpha=0.12, page_size=4)
OPTIONS = {"policy": POLICY, "rows": 4, "max_new_tokens": 44, "max_prompt_tokens": 12}


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


def requests_of(count=14, **options):
    """Short and long, greedy and sampled."""
    return [
        Request(
            index,
            prompt,
            Sampling(temperature=1.0 if index % 2 else 0.0),
            seed=index,
            max_new_tokens=3 + 13 * index % 42,
            **options,
        )
        for index, prompt in enumerate(prompts_of([1 + 5 * i % 12 for i in range(count)]))
    ]


def answers(engine, requests, **options):
    """Tokens by (id, sample); each comes once."""
    found = {}
    for result in engine.run(requests, **options):
        assert result.error is None, result
        assert found.setdefault((result.id, result.sample), result) is result
    return {key: result.tokens for key, result in found.items()}


@pytest.fixture(scope="module")
def undisturbed(params):
    return answers(Engine(params, **OPTIONS), requests_of())


def test_nothing_compiles_during_a_run(params, undisturbed):
    engine = Engine(params, **OPTIONS)
    engine.warm_up()
    assert engine.compiles == engine.most_compiles == 2 + 2 * len(engine.buckets)
    with compiled() as names:
        assert answers(engine, requests_of()) == undisturbed
        answers(engine, [Request(f"again {i}", p) for i, p in enumerate(prompts_of([9, 2, 4]))])
    assert names == []
    with compiled() as names:
        jax.jit(lambda x: x * 3 + 1)(3)
    assert len(names) == 1, "the check cannot fail"


def test_neither_order_nor_rows_nor_looks_matter(params, undisturbed):
    backwards = requests_of()[::-1]
    late = Engine(params, **{**OPTIONS, "rows": 3}, sync_every=8, overlap=True)
    assert answers(late, iter(backwards)) == undisturbed
    assert late.usage.useful_row_steps == sum(len(tokens) - 1 for tokens in undisturbed.values())


def test_samples_share_a_prompt_and_are_rows_of_generate(params):
    """Groups of two rows; five answers to one prompt keep both rows of a group busy."""
    requests = requests_of(5, n=2)
    requests[1] = dataclasses.replace(requests[1], n=5)
    engine = Engine(params, **OPTIONS, samples=2)
    found = answers(engine, requests)
    assert len(found) == 4 * 2 + 5
    for request in requests:
        alone = raas_jax.generate(
            params,
            [request.prompt] * request.n,
            policy=POLICY,
            sampling=request.sampling,
            seed=request.seed,
            max_new_tokens=request.max_new_tokens,
        )
        for sample, output in enumerate(alone):
            assert found[request.id, sample] == output.tokens
    alone = Engine(params, **OPTIONS)
    assert alone.session.shape.cache.prompt.k.shape[1] == 4
    assert engine.session.shape.cache.prompt.k.shape[1] == 2


class Unspeakable:
    """Like an array that JAX has deleted."""

    def __index__(self):
        raise RuntimeError("deleted")

    __repr__ = __index__


class Broken(list):
    """A prompt of one's own that fails in a way of its own."""

    def __len__(self):
        raise RuntimeError("what nobody foresaw")


def test_a_bad_request_fails_alone(params, undisturbed):
    bad = [
        (Request("empty", []), "prompt is empty"),
        (Request("long", [1] * 13), "13 tokens, but the engine was made for at most 12"),
        (Request("no text", 3.5), "prompt is a float"),
        (Request("text", "without a tokenizer"), "params has no tokenizer"),
        (Request("far", [1], max_new_tokens=45), "max_new_tokens is 45, but the engine"),
        (Request("none", [1], max_new_tokens=0), "max_new_tokens is 0"),
        (Request("endless", [1], max_new_tokens=10**12), "max_new_tokens is 1000000000000"),
        (Request("many", [1], n=10**9), "n is 1000000000; it must be an int of at most"),
        (Request("digits", [1], n=10**5000), "n is a number of too many digits"),
        (Request("far seed", [1], seed=10**30), "seed is 1000"),
        (Request("stop", [1], stop=5), "stop is 5"),
        (Request("odd", Broken()), "what nobody foresaw"),
        (Request("strange", [VOCAB]), "outside the vocabulary"),
        (Request("n", [1], n=0), "n is 0"),
        (Request("seed", [1], seed="x"), "seed is 'x'"),
        (Request("sampling", [1], sampling=1.0), "sampling is 1.0"),
        (Request(3, [1]), "id 3 was used before"),
        (Request(None, [1]), "id is None"),
        (Request(True, [1]), "id is True; it must be a string or an int"),
        (Request(10**5000, [1]), "id is a number of too many digits"),
        (Request("\ud800", [1]), "which is no Unicode text"),  # A save of it could not be read.
        (Request(Unspeakable(), [1]), "id is <Unspeakable instance"),
        (Request("unspeakable", [1], n=Unspeakable()), "n is <Unspeakable instance"),
    ]
    results = list(Engine(params, **OPTIONS).run(requests_of() + [request for request, _ in bad]))
    failed = [result for result in results if result.finish_reason == "error"]
    assert len(failed) == len(bad)
    for result, (request, why) in zip(failed, bad, strict=True):
        assert why in result.error and result.tokens == [] and result.stats is None
        assert result.id in (request.id, checks.short(request.id))
    good = {(r.id, r.sample): r.tokens for r in results if r.finish_reason != "error"}
    assert good == undisturbed


def test_within_a_budget_long_prompts_fail_alone(params):
    """The plan is that of the engine; what a row may use follows from its own prompt."""
    policy = policies.create("raas", budget=24, prompt="included", page_size=4)
    engine = Engine(params, policy=policy, rows=2, max_new_tokens=30, max_prompt_tokens=24)
    assert engine.plan.slots == (5,)
    requests = [Request(len(ids), ids, max_new_tokens=30) for ids in prompts_of([17, 16, 3])]
    found = {result.id: result for result in engine.run(requests)}
    assert "leaves less than" in found[17].error
    for request in requests[1:]:
        alone = raas_jax.generate(params, request.prompt, policy=policy, max_new_tokens=30)
        assert found[request.id].tokens == alone.tokens
        assert found[request.id].stats.kept_pages == alone.stats.kept_pages


def test_ctrl_c_gives_what_is_done(params, undisturbed):
    class Pressed:
        """Requests, and then a key."""

        def __iter__(self):
            yield from requests_of()[:6]
            raise KeyboardInterrupt

    engine = Engine(params, **OPTIONS)
    results = {result.id: result for result in engine.run(Pressed())}
    reasons = [result.finish_reason for result in results.values()]
    assert {*reasons} == {"length", "interrupted"} and len(reasons) >= 4
    for result in results.values():
        whole = undisturbed[result.id, 0]
        assert result.tokens == whole[: len(result.tokens)]
    assert answers(engine, requests_of(20)[14:]) is not None  # It works on.


def test_what_cannot_work_is_refused(params):
    for options, named in [
        ({"rows": 3, "samples": 2}, "rows is 3; it must be 'auto' or a multiple of 2"),
        ({"rows": 0}, "rows is 0"),
        ({"samples": 0}, "samples is 0"),
        ({"rows": 10**9}, "rows is 1000000000; it must be an int of at most 65536"),
        ({"max_new_tokens": 10**12}, "max_new_tokens is 1000000000000; .* at most"),
        ({"max_prompt_tokens": 1.5}, "max_prompt_tokens is 1.5"),
        ({"save_every": 3.0}, "save_every is 3.0; give save_to"),
        ({"save_to": "x", "save_every": float("nan")}, "save_every is nan"),
        ({"save_to": "x", "save_every": "often"}, "save_every is 'often'"),
        ({"save_to": __file__}, "test_engine.py is a file; give a folder"),
        ({"rows": "auto", "memory_limit": "80G"}, "memory_limit is '80G'"),
        ({"rows": "auto", "memory_limit": 1000}, "already 1 rows take .* of 1000"),
    ]:
        with pytest.raises((TypeError, ValueError), match=named):
            Engine(params, **{**OPTIONS, **options})
    with pytest.raises(TypeError, match="policy is 'raas'"):
        Engine(params, policy="raas")
    with pytest.raises(TypeError, match="done is 5; it must hold pairs"):
        next(Engine(params, **OPTIONS).run(done=5))


def test_what_was_taken_from_a_source_that_fails_is_answered_later(params, undisturbed):
    def source():
        yield from requests_of()[:6]
        raise OSError("the source is gone")

    engine, found = Engine(params, **OPTIONS), {}
    with pytest.raises(OSError, match="the source is gone"):
        for result in engine.run(source()):
            found[result.id, result.sample] = result.tokens
    # As JSON keeps them.
    done = [list(key) for key in found]
    assert found | answers(engine, requests_of(), done=done) == undisturbed


@pytest.mark.once
def test_as_many_rows_as_fit(params):
    """By the compiler's account: so many fit, and a few more do not."""

    def peak(rows):
        session = Session(params, engine.plan, rows, stop_tokens=engine.stop_tokens)
        programs = (
            session.lower_advance(1),
            session.lower_admit(engine._sizes[0], engine.buckets[-1]),
        )
        found = [program.compile().memory_analysis() for program in programs]
        return max(
            x.argument_size_in_bytes
            + x.output_size_in_bytes
            + x.temp_size_in_bytes
            - x.alias_size_in_bytes
            for x in found
        )

    limit = 200_000
    engine = Engine(params, **{**OPTIONS, "rows": "auto", "samples": 2, "memory_limit": limit})
    assert engine.rows % 2 == 0 and engine.rows > 4
    assert peak(engine.rows) <= limit < peak(engine.rows + max(2, engine.rows // 32 * 2))


def test_paused_in_the_middle(params, undisturbed, tmp_path):
    engine = Engine(params, **OPTIONS)
    found = {}
    for number, result in enumerate(engine.run(requests_of())):
        found[result.id, 0] = result.tokens
        if number == 4:
            engine.save(tmp_path)  # Counts this result and those before as given.
            break
    assert engine._schedule.busy()
    again = Engine.restore(tmp_path, params)
    rest = answers(again, requests_of())
    assert not set(rest) & set(found)
    assert found | rest == undisturbed
    # One that was not given out in the end comes again, and none that was.
    third = Engine.restore(tmp_path, params)
    some = {key: tokens for key, tokens in found.items() if key[0] != 0}
    assert some | answers(third, requests_of(), done=some) == undisturbed


def test_a_save_of_something_else_is_refused(params, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is none"):
        Engine.restore(tmp_path / "none", params)
    with pytest.raises(FileNotFoundError, match="no complete save"):
        Engine.restore(tmp_path, params)
    engine = Engine(params, **OPTIONS)
    engine.save(tmp_path)
    with pytest.raises(ValueError, match="another model .weights differ"):
        Engine.restore(tmp_path, random_params(seed=1))
    with pytest.raises(ValueError, match="policy is Dense.*Give that one, or none"):
        Engine.restore(tmp_path, params, policy=raas_jax.Dense(page_size=4))
    with pytest.raises(TypeError, match="policy is .*RaaS.*; expected a policy"):
        Engine.restore(tmp_path, params, policy=RaaS)
    saver = Saver(tmp_path, every=0.0)
    assert saver.due() and not Saver(tmp_path / "other", every=60.0).due()


def test_a_save_of_another_version_is_refused(params, tmp_path, monkeypatch):
    """With both versions in the message, and nothing else attempted."""
    engine = Engine(params, **OPTIONS)
    with monkeypatch.context() as older:
        older.setattr("raas_jax.engine.checkpoint.VERSION", 1)
        engine.save(tmp_path)
    with pytest.raises(ValueError, match="another version of raas_jax .*format is 1, here it is 3"):
        Engine.restore(tmp_path, params)
