"""The diary of a policy against the bytes of the cache, and recall against its definition."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiles import compiled
from pools import by_heads
from tiny import QWEN3, allotment_of, prompts_of, random_params

import raas_jax
from raas_jax.decode import RowRequest, cache_bytes, commit_page, token_step
from raas_jax.lab.inspect.recording import Recorded, Recording, row_bytes
from raas_jax.lab.runs import record
from raas_jax.lab.tasks.lemma import Knobs, draw, liveness
from raas_jax.lab.tasks.lemma.milestones import recall, written
from raas_jax.policies import Dense, RaaS
from raas_jax.session import Session

TOKENS = 38
POLICIES = [
    RaaS(12, page_size=4, alpha=0.1),
    RaaS(8, page_size=2, top_fraction=0.5, dense_layers=1),
    Dense(page_size=4),
    RaaS(12, page_size=4, alpha=0.1, allotment=allotment_of()),
]


@pytest.fixture(scope="module")
def params():
    return random_params(QWEN3)


def pages_by_content(params, prompts, policy):
    """Which pages are in which cache, from the keys alone: bool `[page now, L, B, K, page]`."""
    session = Session.create(params, policy, [len(each) for each in prompts], TOKENS)
    plan = session.plan
    state, _ = session.start(prompts, RowRequest.create([TOKENS] * len(prompts)))
    step = jax.jit(partial(token_step, plan=plan))
    commit = jax.jit(partial(commit_page, plan=plan))
    written_pages, seen = [], []
    count = -(-(TOKENS - 1) // plan.page_size)
    for page in range(count):
        keys = np.concatenate(_padded(state.cache.kept, plan), axis=0)
        held = [(keys == each[:, :, :, None]).all((-1, -2)).any(-1) for each in written_pages]
        held += [np.ones(keys.shape[:3], bool)]
        held += [np.zeros(keys.shape[:3], bool)] * (count - page - 1)
        seen.append(np.stack(held, axis=-1))
        for offset in range(plan.page_size):
            state, *_ = step(params, state, jnp.int32(offset))
        written_pages.append(np.asarray(state.cache.current.k))
        state = commit(state)
    return np.stack(seen)


def _padded(kept, plan):
    """The keys of groups of layers, with as many slots each, so that they can be joined."""
    most = max(plan.slots)
    each = [by_heads(k.k, group.ranges) for k, group in zip(kept, plan.groups, strict=True)]
    more = [((0, 0),) * 3 + ((0, most - k.shape[3]),) + ((0, 0),) * 2 for k in each]
    return [np.pad(*pair, constant_values=np.nan) for pair in zip(each, more, strict=True)]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_recorded_pages_are_those_in_the_cache(params, policy):
    prompts = prompts_of([5, 9])
    wanted = pages_by_content(params, prompts, policy)
    found = dict(
        record(params, prompts, [TOKENS] * 2, policy, stop_tokens=(), rows=3, every_step=True)
    )
    assert sorted(found) == [0, 1]
    plain = raas_jax.generate(params, prompts, policy=policy, max_new_tokens=TOKENS)
    for row, recording in found.items():
        np.testing.assert_array_equal(recording.present, wanted[:, :, row])
        assert recording.tokens == plain[row].tokens
        assert recording.finish_reason == "length"
        if isinstance(policy, Dense):
            assert recording.stamps is None
            assert recording.held(TOKENS - 1, 0).all()
            continue
        assert not recording.present[-1].all()
        # A stamp lies between the page's end and now, and only pages that are kept have one.
        first = getattr(policy, "dense_layers", 0)
        stamps = recording.stamps[: TOKENS - 1, first:]
        step = np.arange(TOKENS - 1)
        kept = recording.present[step // policy.page_size][:, first:]
        kept[step, :, :, step // policy.page_size] = False  # The current page has no stamp.
        np.testing.assert_array_equal(stamps >= 0, kept)
        assert (stamps <= 1 + step[:, None, None, None]).all()


def test_bytes_are_those_of_a_run_without_the_diary(params):
    for policy in POLICIES:
        session = Session.create(params, policy, [7], 30)
        request = RowRequest.create([30])
        state, _ = jax.eval_shape(partial(session.start, [[1] * 7], request))
        assert row_bytes(params.config, policy, 7, 30, "float32") == cache_bytes(state)


def test_stop_tokens_end_a_recording(params):
    # The same shapes as above, so that nothing is compiled anew.
    prompts, options = prompts_of([5, 9]), {"rows": 3, "every_step": True}
    whole = dict(record(params, prompts, [TOKENS] * 2, POLICIES[0], stop_tokens=(), **options))
    stop = whole[1].tokens[11]
    end = whole[1].tokens.index(stop) + 1
    with compiled() as names:
        found = dict(
            record(params, prompts, [TOKENS] * 2, POLICIES[0], stop_tokens=(stop,), **options)
        )
    assert "decode_pages" not in str(names)
    assert found[1].tokens == whole[1].tokens[:end]
    assert found[1].finish_reason == "stop"
    np.testing.assert_array_equal(
        found[1].present, whole[1].present[: -(-(end - 1) // 4), :, :, : -(-(end - 1) // 4)]
    )
    with pytest.raises(ValueError, match="wanted 0 <= source < token"):
        found[1].held(end, 0)


def a_recording(problem, keep):
    """Of the right derivation in pages of 4, where a past page is kept with probability `keep`."""
    length = len(problem.derivation_words)
    pages = -(-(length - 1) // 4)
    present = np.random.default_rng(0).random((pages, 3, 2, pages)) < keep
    present &= np.tri(pages, dtype=bool)[:, None, None]
    present[np.arange(pages), :, :, np.arange(pages)] = True
    return Recording([0] * length, "length", 4, present, None, 0.0)


def test_recall_is_one_where_nothing_is_evicted():
    problem = draw("test", 0, 0, Knobs(6, 6))
    found = recall(problem, a_recording(problem, 1.0), problem.derivation_words)
    assert found.lookups == len(liveness(problem).lookups) > 0
    assert found.served == found.served_anywhere == found.lookups
    assert found.written_served == found.written_lookups == found.lookups


def test_recall_counts_what_was_forgotten_up_to_the_first_slip():
    problem = draw("test", 0, 0, Knobs(9, 9))
    recording = a_recording(problem, 0.2)
    words, meta = list(problem.derivation_words), liveness(problem)
    found = recall(problem, recording, words)
    shares = []
    for lookup in meta.lookups:
        token = lookup.position - meta.prompt_tokens
        sources = {(each - meta.prompt_tokens) // 4 for each in lookup.sources}
        shares.append(recording.present[(token - 1) // 4][..., sorted(sources)].any(-1).mean())
    assert found.lookups == len(shares)
    assert found.served == pytest.approx(sum(shares)) and 0 < found.served < len(shares)
    assert found.served_anywhere == sum(share > 0 for share in shares)
    # A wrong value at the third look-up: that one still counts, and none after it.
    words[meta.lookups[2].position - meta.prompt_tokens] = "?"
    cut = recall(problem, recording, words)
    assert cut.lookups == 3 and cut.served == pytest.approx(sum(shares[:3]))
    # The whole answer goes on; what is no value is no look-up there.
    assert cut.written_lookups == len(shares) - 1
    assert cut.written_served <= sum(shares) - shares[2] + 1e-9


def test_marks_of_a_written_derivation_are_those_of_the_right_one():
    for index in range(5):
        problem = draw("test", 1, index, Knobs(5, 20))
        meta = liveness(problem)
        assert written(meta.prompt_tokens, problem.derivation_words) == meta


def test_recorded_passes_everything_on():
    policy = RaaS(64, page_size=4, score="bound", prompt="included")
    wrapped = Recorded(policy)
    assert wrapped.page_size == 4 and wrapped.needs_bounds
    assert wrapped.slots([9], 400) == policy.slots([9], 400)
    with pytest.raises(ValueError, match="at least 80"):
        wrapped.check_prompts([72])
    assert hash(wrapped) == hash(Recorded(RaaS(64, page_size=4, score="bound", prompt="included")))


def test_a_policy_of_another_model_is_refused(params):
    """As it is without the diary."""
    other = dataclasses.replace(QWEN3, num_hidden_layers=3)
    policy = RaaS(12, page_size=4, allotment=allotment_of(other))
    with pytest.raises(ValueError, match="allotment is of a model with 3 layers"):
        next(record(params, prompts_of([5]), [TOKENS], policy, stop_tokens=()))
