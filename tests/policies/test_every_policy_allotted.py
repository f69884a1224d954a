"""What must hold for every policy whose budget differs by layer and head."""

from __future__ import annotations

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cheap import CONFIG
from every import LENGTHS, NEW, OPTIONS, PAGES, P, decoded, plan_of, tight
from pools import in_place, poisoned
from tiny import allotment_of, calibration, prompts_of, random_params
from tiny_lemma import save_tiny

import raas_jax
from raas_jax import RaaS, identity, policies
from raas_jax.plan import Plan
from raas_jax.policies import Allotment, Budgeted
from raas_jax.session import Session
from raas_jax.suited import FILE, suited

# Each as it may evict its prompt, where it may; "fifo" is another name of "recent".
BUDGETED = {name for name in policies.available() if issubclass(policies.by_name(name), Budgeted)}
CASES = [(name, OPTIONS.get(name, [{}])[-1]) for name in sorted(BUDGETED - {"fifo"})]
CASES += [
    ("raas", {"score": "bound", "prompt": "included"}),
    ("raas", {"half_life": 8.0, "granularity": "layer"}),
]
ALONE = [("h2o", "evict"), ("rkv", "included")]
IDS = [", ".join([name, *map(str, options.values())]) for name, options in CASES]


def allotted(name, options, allotment):
    if name == "triattention":
        options = {**options, "across_layers": False}
    return dataclasses.replace(tight(name, options), allotment=allotment)


def rectangular(plan):
    """The same slots in a cache of whole buffers: those beyond a head's own are masked."""
    groups = (group._replace(ranges=None) for group in plan.groups)
    return dataclasses.replace(plan, groups=tuple(groups))


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_pool_is_a_masked_rectangle(name, options):
    """The same answers and fills, whatever lies in pages without tokens and beside whom a row is;
    and the bytes are those of the ranges, which is what the compiler allocates."""
    policy = allotted(name, options, allotment_of(CONFIG, P))
    prompts, seeds = prompts_of(LENGTHS, 1), [5, 6, 7]
    plan = plan_of(policy, prompts)
    group, flat = plan.groups[-1], rectangular(plan)
    ranges = group.ranges
    assert ranges.most > min(ranges.sizes) and flat.groups[-1].slots == ranges.most
    tokens, logprobs, state, reported, allocated = decoded(plan, prompts, seeds)
    assert reported == allocated
    bad = decoded(plan, prompts, seeds, before=lambda state: poisoned(state, plan))
    np.testing.assert_array_equal(bad[0], tokens)
    np.testing.assert_array_equal(bad[1], logprobs)
    masked = decoded(flat, prompts, seeds)
    np.testing.assert_array_equal(masked[0], tokens)
    np.testing.assert_allclose(masked[1], logprobs, rtol=1e-4, atol=1e-5)
    same(masked[2].rows.evicted, state.rows.evicted)
    for one, other in zip(state.cache.kept, masked[2].cache.kept, strict=True):
        same(one.fill, other.fill)
    assert np.all(np.asarray(state.rows.evicted) > 0)
    within_ranges(state, group)
    assert_evicted(state, policy)
    # A pool has the pages of its ranges, and nothing else is smaller than in the rectangle.
    per_page = 4 * CONFIG.head_dim * (2 * P + 2 * policy.needs_bounds)
    spare = ranges.layers * ranges.heads * ranges.most - ranges.total
    assert size_of(state.cache.kept[-1]) == len(prompts) * ranges.total * per_page
    assert masked[3] - reported == len(prompts) * spare * per_page

    turned = decoded(plan, prompts[::-1], seeds[::-1])
    same(turned[0][::-1], tokens)
    np.testing.assert_allclose(turned[1][::-1], logprobs, rtol=1e-3, atol=1e-4)
    if (name, policy.prompt) in ALONE:
        alone = decoded(plan_of(policy, prompts[1:2]), prompts[1:2], seeds[1:2])
        same(alone[0][0], tokens[1])
        np.testing.assert_allclose(alone[1][0], logprobs[1], rtol=1e-3, atol=1e-4)
        same(alone[2].rows.evicted[0], state.rows.evicted[1])


def same(one, other):
    np.testing.assert_array_equal(one, other)


def size_of(kept):
    return sum(leaf.nbytes for leaf in jax.tree.leaves((kept.k, kept.v, kept.bounds)))


def within_ranges(state, group):
    """No slot beyond a head's own is filled, and what is filled was written."""
    fill, ranges = np.asarray(state.cache.kept[-1].fill), group.ranges
    beyond = np.arange(group.slots) >= np.asarray(ranges.counts)[:, None, :, None]
    assert not np.any(fill[np.broadcast_to(beyond, fill.shape)])
    written = np.any(np.asarray(state.cache.kept[-1].k) != 0, axis=(-1, -2))
    assert np.all(written[in_place(fill, ranges) > 0])
    # Heads of large budgets hold more than those of small ones.
    held = np.sum(fill > 0, axis=-1)
    assert held.max() > held.min() and np.all(held <= np.asarray(ranges.counts)[:, None])


def assert_evicted(state, policy):
    """As many as the head that lost most has no more of all that there were."""
    there = np.asarray(state.rows.committed)
    if policy.evicts_prompt:
        there = there + -(-np.asarray(LENGTHS) // P)
    held = np.sum(np.asarray(state.cache.kept[-1].fill) > 0, axis=-1)
    same(state.rows.evicted, there - held.min(axis=(0, 2)))


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_heads_that_lose_alike_have_the_ordinary_cache(name, options):
    curves = np.broadcast_to([3.0, 1.0, 0.0], (CONFIG.num_hidden_layers, 2, 3))
    alike = Allotment([2 * P, 8 * P, 16 * P], curves)
    plan, ordinary = (
        Plan.create(CONFIG, allotted(name, options, each), LENGTHS, NEW) for each in (alike, None)
    )
    for one, other in zip(plan.groups, ordinary.groups, strict=True):
        assert one.ranges is None and one.slots == other.slots
        lengths, counts = np.asarray(LENGTHS, np.int32), other.counts(2)
        one, other = (each.policy.capacity(lengths, counts) for each in (one, other))
        same(*np.broadcast_arrays(one, other))


def test_the_mean_is_the_budget():
    """Of a long answer, whatever is dense or decided together; a short one needs less."""
    allotment = allotment_of(CONFIG, P)
    for options in ({}, {"granularity": "layer"}, {"score": "bound"}):
        policy = RaaS(6 * P, page_size=P, allotment=allotment, **options)
        counts = Plan.create(CONFIG, policy, LENGTHS, 10_000).groups[0].counts(2)
        assert counts.mean() == 6 and counts.min() == 1
        assert np.all(counts == counts[:, :1]) == ("granularity" in options)
        assert Plan.create(CONFIG, policy, LENGTHS, 5).slots == (3,)
    policy = RaaS(6 * P, page_size=P, allotment=allotment, dense_layers=1)
    dense, rest = Plan.create(CONFIG, policy, LENGTHS, 10_000).groups
    assert rest.counts(2).mean() == 6 and dense.ranges is None
    same(rest.counts(2), allotment.last(CONFIG.num_hidden_layers - 1).pages(6, P))
    # Two pages that pile up come on top, for each head alike.
    batched = policies.create(
        "random", budget=6 * P, every=4, recent=4, page_size=P, allotment=allotment
    )
    assert Plan.create(CONFIG, batched, LENGTHS, 10_000).groups[0].counts(2).mean() == 8


def test_a_short_answer_on_a_mesh():
    """Parts of a pool hold equally many pages, also where the answer needs fewer than were given;
    what fills a part up is never used."""
    steep = np.ones((2, 2, 2))
    steep[:, 0, 1] = 0, 1
    allotment = Allotment([2 * P, 10 * P], steep)
    policy = RaaS(6 * P, page_size=P, allotment=allotment).split(2)
    counts = policy.slots_by_head(2, 2, LENGTHS, 8 * P)
    assert counts.tolist() == [[8, 6], [4, 6]]
    capacity = policy.capacity(np.asarray(LENGTHS, np.int32), counts)
    assert np.asarray(capacity)[:, 0].tolist() == [[8, 6], [2, 6]]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG, 0, 3.0)


def test_inside_one_jit(params):
    """The loop in one program draws what `generate` draws."""
    policy = RaaS(4 * P, page_size=P, alpha=0.12, allotment=allotment_of(CONFIG, P))
    tokens = jnp.asarray(prompts_of([5, 5], 1), jnp.int32)
    ask = {"policy": policy, "max_new_tokens": NEW}
    found = jax.jit(functools.partial(raas_jax.generate_ids, **ask))(params, tokens)
    outs = raas_jax.generate(params, tokens.tolist(), stop_token_ids=[], **ask)
    for row, out in enumerate(outs):
        same(found.tokens[row], out.tokens)
        # As of the head that keeps least; the last page is still being written.
        assert (out.stats.kept_pages, out.stats.evicted_pages) == (1, PAGES - 1 - 1)


def test_what_cannot_be_combined_is_refused(params):
    allotment = allotment_of(CONFIG, P)
    with pytest.raises(ValueError, match="across_layers is True.*Use across_layers=False"):
        tight("triattention", {"calibration": calibration(CONFIG), "allotment": allotment})
    with pytest.raises(TypeError, match="allotment is 3; give an Allotment, a file, 'auto'"):
        RaaS(allotment=3)
    other = dataclasses.replace(CONFIG, num_hidden_layers=3)
    with pytest.raises(ValueError, match="model with 3 layers and 2 key.*this one has 2 layers"):
        ask(params, RaaS(8, page_size=P, allotment=allotment_of(other, P)))
    with pytest.raises(ValueError, match="'auto', which stands for a file in the model's folder"):
        Plan.create(CONFIG, RaaS(8, page_size=P, allotment="auto"), LENGTHS, NEW)
    with pytest.raises(FileNotFoundError, match="no allotment.json .weights without a folder"):
        ask(params, RaaS(8, page_size=P, allotment="auto"))
    with pytest.raises(FileNotFoundError, match="allotment is 'nowhere.json'; there is no such"):
        RaaS(allotment="nowhere.json")


def test_another_models_is_refused(params):
    """Known again by the likeness, in any dtype; without one, any model of the shape is taken."""
    mine = identity.likeness(params)
    policy = RaaS(4 * P, page_size=P, allotment=allotment_of(CONFIG, P, model=mine))
    half = jax.tree.map(lambda x: x.astype("bfloat16"), params.weights)
    for each in (params, params.separate(), dataclasses.replace(params, weights=half)):
        assert suited(policy, each) == policy
    with pytest.raises(ValueError, match=f"with the likeness {mine}; this one's is .*-jax allot"):
        ask(random_params(CONFIG, 1, 3.0), policy)


def ask(params, policy):
    return raas_jax.generate(params, [1, 2, 3], policy=policy, max_new_tokens=3)


def test_the_models_own(tmp_path):
    """ "auto" is the file in the folder, "FILE" any; a model without one says what to do."""
    params = raas_jax.load(save_tiny(tmp_path / "model"))
    auto = RaaS(24, page_size=4, allotment="auto")
    with pytest.raises(FileNotFoundError, match="no allotment.json .*model.*raas-jax allot MODEL"):
        ask(params, auto)
    mine = allotment_of(params.config, 4, model=identity.likeness(params))
    mine.write(tmp_path / "model" / FILE)
    wanted = dataclasses.replace(auto, allotment=mine)
    assert dataclasses.replace(auto, allotment=tmp_path / "model" / FILE) == wanted
    one, other = (
        raas_jax.generate(params, [5] * 9, policy=policy, max_new_tokens=60, stop_token_ids=[])
        for policy in (auto, wanted)
    )
    assert one.tokens == other.tokens and one.logprobs == other.logprobs
    # Six pages on average take what six pages take, and marks besides.
    assert one.stats.kv_bytes == Session.create(params, auto, [9], 60).row_bytes
    plain = Session.create(params, RaaS(24, page_size=4), [9], 60).row_bytes
    assert 0 < one.stats.kv_bytes - plain < 0.1 * plain
    (tmp_path / "model" / FILE).write_text(json.dumps({"version": 1}))
    with pytest.raises(raas_jax.files.FileError, match="allotment.json is no allotment"):
        ask(params, auto)
