"""What must hold for every policy there is, and for one that a user writes."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import CONFIG
from every import EVERY, LENGTHS, NEW, P, ample, params, run, tight
from tiny import prompts_of
from tiny_lemma import save_tiny

import raas_jax
from raas_jax import Dense, policies
from raas_jax.decode import Probe, RowRequest
from raas_jax.lab import runs as evaluate
from raas_jax.lab.inspect.recording import record
from raas_jax.plan import Plan
from raas_jax.policies import Boundary, Budgeted, Evidence, Page, lowest, set_slot
from raas_jax.session import Session


@functools.cache
def dense():
    return run(Dense(page_size=P), prompts_of(LENGTHS, 1), [5, 6, 7])[:2]


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_row_alone_and_the_bytes(name, options):
    """A row of a ragged batch is what it is alone; and what is reported is what is allocated."""
    policy, prompts = tight(name, options), prompts_of(LENGTHS, 1)
    tokens, logprobs, state, reported, allocated = run(policy, prompts, [5, 6, 7])
    assert reported == allocated
    alone = run(policy, prompts[1:2], [6])
    np.testing.assert_array_equal(alone[0][0], tokens[1])
    np.testing.assert_allclose(alone[1][0], logprobs[1], rtol=1e-3, atol=1e-4)
    assert int(alone[2].rows.evicted[0]) == int(state.rows.evicted[1])
    keeps_all = name in ("dense", "quest")
    assert np.all((np.asarray(state.rows.evicted) > 0) != keeps_all)
    assert name == "dense" or not np.allclose(logprobs, dense()[1], atol=1e-3)
    # The last group: the others are dense.
    kept = np.sum(np.asarray(state.cache.kept[-1].fill) > 0, axis=-1)
    assert np.all(kept == kept[:1, :, :1]) and np.all(kept <= plan_slots(policy))
    assert state.cache.prompt.k.shape[3] == (0 if policy.evicts_prompt else 6)


def plan_slots(policy):
    return Plan.create(CONFIG, policy, LENGTHS, NEW).slots[-1]


@pytest.mark.parametrize(("name", "options"), EVERY)
def test_a_budget_that_covers_the_length_is_dense(name, options):
    if name == "dense":
        pytest.skip("is itself")
    prompts = prompts_of(LENGTHS, 1)
    tokens, logprobs, state, _, _ = run(ample(name, options), prompts, [5, 6, 7])
    np.testing.assert_array_equal(tokens, dense()[0])
    np.testing.assert_allclose(logprobs, dense()[1], rtol=1e-3, atol=1e-4)
    assert not np.any(state.rows.evicted)


def test_a_trace_shows_the_clocks_of_policies_that_keep_them():
    shape, names = (2, 3, 2, 6), set()
    for name, options in (each.values for each in EVERY):
        policy = tight(name, options)
        if (stamps := policy.stamps(policy.init(shape))) is not None:
            assert stamps.shape == shape and stamps.dtype == jnp.int32
            names.add(name)
    assert names == {"raas", "raas_quest", "recent", "fifo", "sink"}
    soft = tight("raas", {"half_life": 8.0})
    assert soft.stamps(soft.init(shape)) is None


@dataclasses.dataclass(frozen=True)
class LongestKeys(Budgeted):
    """A user's policy: pages with long keys stay, weighed by the best attention they ever got."""

    power: float = 1.0

    def init(self, shape):
        return jnp.zeros(shape), jnp.zeros(shape)

    def observe(self, meta, evidence: Evidence, now):
        length, best = meta
        return length, jnp.maximum(best, self.pool(evidence.mass, jnp.max))

    def commit(self, meta, slot, page: Page, now):
        length, best = meta
        norm = jnp.mean(jnp.linalg.norm(page.k, axis=-1), axis=-1)
        return set_slot(length, slot, norm), set_slot(best, slot, jnp.zeros_like(norm))

    def victim(self, meta, boundary: Boundary):
        length, best = meta
        return lowest(length**self.power * best, boundary)


def test_a_policy_of_ones_own_works_without_registration():
    policy = LongestKeys(12, power=0.5, page_size=P)
    prompts = prompts_of([5, 2], 2)
    outs = raas_jax.generate(params(), prompts, policy=policy, max_new_tokens=30)
    for out in outs:
        assert len(out.tokens) == 30
        assert out.stats.kept_pages == 6 and out.stats.evicted_pages > 0
    assert "longestkeys" not in policies.available()
    # As the evaluation runs it.
    recorded = dict(record(params(), prompts, [30, 30], policy, stop_tokens=[]))
    assert [recorded[row].tokens for row in (0, 1)] == [out.tokens for out in outs]


def test_a_policy_of_ones_own_is_evaluated(tmp_path):
    model = raas_jax.load(save_tiny(tmp_path / "model"))
    task = evaluate.LemmaTask(problems=2, smallest=4, largest=4, max_new_tokens=24)
    policy = LongestKeys(8, power=0.5, page_size=4)
    results = evaluate.run(model, task, [policy], tmp_path / "run", model="tiny", progress=False)
    samples = results.of("lemma", "LongestKeys (page_size=4, power=0.5) 8")
    assert len(samples) == 2 and all(sample["tokens"] > 8 for sample in samples)
    assert "LongestKeys" in evaluate.report(tmp_path / "run")[0]


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("sink", {"budget": 48}, "budget is 48, but with sinks=4.*at least 64"),
        ("sink", {"sinks": -1}, "sinks is -1; it must be an int of at least 0"),
        ("snapkv", {"budget": 32}, "budget is 32, but with window=32.*never evicts 2 pages.*48"),
        ("random", {"budget": 64}, "budget is 64, but with recent=64.*at least 80"),
        ("lazy_eviction", {"budget": 64}, "budget is 64, but with recent=64"),
        ("lazy_eviction", {"alpha": 2.0}, "alpha is 2.0"),
        ("rkv", {"every": 0}, "every is 0"),
        ("rkv", {"mix": 1.5}, "mix is 1.5"),
        ("vase", {"protected": 1.0}, "protected is 1.0"),
        ("vase", {"budget": 80}, "budget is 80, of which recent=64 and protected=0.25 leave"),
        ("h2o", {"recent_fraction": 1.0}, "recent_fraction is 1.0"),
        ("h2o", {"prompt": "evict", "dense_layers": 2}, "dense_layers is 2, but prompt='evict'"),
        ("recent", {"prompt": "evict"}, "prompt is 'evict'; choose one of 'excluded', 'included'"),
        ("triattention", {}, "calibration is not given.*raas-jax calibrate"),
        (
            "triattention",
            {"calibration": __file__},
            "no calibration that `raas-jax calibrate` wrote",
        ),
        ("triattention", {"horizon": 0}, "horizon is 0"),
        ("quest", {"budget": 40}, "budget is 40, not a multiple of page_size=16"),
        ("raas_quest", {"prompt_budget": 40}, "prompt_budget is 40, not a multiple"),
        ("raas_quest", {"prompt": "included"}, "prompt is 'included'"),
    ],
    ids=str,
)
def test_options_that_cannot_work_are_refused(name, options, named):
    with pytest.raises(ValueError, match=named):
        policies.create(name, **options)


def test_a_prompt_that_leaves_too_little_is_refused():
    policy = policies.create("snapkv", budget=96, prompt="included")
    policy.check_prompts([48])
    with pytest.raises(ValueError, match=r"49 tokens \(4 pages of 16\).*3 pages.*at least 112"):
        policy.check_prompts([49, 3])


def test_names_are_known_and_near_ones_are_suggested():
    with pytest.raises(ValueError, match="Did you mean snapkv"):
        policies.by_name("snap_kv")
    assert policies.create("tova", budget=32) == policies.TOVA(32)


@pytest.mark.once
@pytest.mark.parametrize(("name", "options"), EVERY)
def test_feeding_pages_is_feeding_tokens(name, options):
    """A page at once, or token by token: the same outputs, and the same state."""
    policy = tight(name, options)
    prompts, T = prompts_of(LENGTHS, seed=2), 6 * P
    session = Session.create(params(), policy, LENGTHS, T + 2)
    given = jnp.asarray(np.reshape(prompts_of([(T + 1) * 3], 5), (T + 1, 3)), jnp.int32)
    found = []
    for feed in (Session.feed, by_token):
        state, _ = session.start(prompts, RowRequest.create([T + 2] * 3), force=given[0])
        state, outputs = feed(session, state, given[1:])
        # A row that only feeding by tokens counts as done has the same cache all the same.
        found.append((outputs, [kept.fill for kept in state.cache.kept], state.meta, state.cache))
    (one, one_fill, *one_state), (other, other_fill, *other_state) = found
    np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, one_fill, other_fill)
    same = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(same, one_state, other_state)


def by_token(session, state, tokens):
    probe = Probe(hidden=as_it_is)
    state, progress = session.advance(state, len(tokens) // P, force=tokens, probe=probe)
    return state, progress.probed.hidden.reshape(*tokens.shape, -1)


def as_it_is(x):
    return x
