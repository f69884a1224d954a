"""The jitted decode agrees with the NumPy oracle on every stamp, victim and kept page."""

from __future__ import annotations

import fractions
import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from pools import by_heads
from tiny import QWEN3, VOCAB, allotment_of, prompts_of, random_params, shares_of

from raas_jax.config import ModelConfig
from raas_jax.decode import RowRequest, commit_page, decode_pages, token_step
from raas_jax.plan import Plan
from raas_jax.policies import Allotment, Dense, Evidence, RaaS
from raas_jax.policies.raas import PAIRWISE
from raas_jax.rope import Rope
from raas_jax.sampling import Sampling
from raas_jax.session import Session

ROWS = 3
LONG = 10_000  # A limit that no test reaches.

SHAPES = {
    # Qwen3: q and k are normed, N * H differs from D, two query heads per key/value head.
    "qwen3": QWEN3,
    # Qwen2: biases, all three query heads share one key/value head.
    "qwen2": ModelConfig(
        VOCAB, 12, 8, 3, 3, 1, 4, qkv_bias=True, tie_word_embeddings=True, model_type="qwen2"
    ),
    # Llama: as many key/value heads as query heads.
    "llama": ModelConfig(
        VOCAB, 8, 6, 2, 2, 2, 6, output_bias=True, mlp_bias=True, rope=Rope(theta=100.0)
    ),
}

# Tokens per page → pages of the longest prompt, slots of the policy. With the prompt within the
# budget, the longest prompt leaves two pages and the shortest as many as there are slots.
GEOMETRY = {1: (5, 6), 2: (3, 4), 5: (2, 3), 16: (2, 3)}

COMBINATIONS = [
    {"score": score, "granularity": granularity, "prompt": prompt, **rule}
    for score, granularity, prompt, rule in itertools.product(
        ("mass", "bound"),
        ("kv_head", "layer"),
        ("excluded", "included"),
        ({"alpha": 0.12}, {"top_fraction": 0.5}),
    )
]


def case(page_size, allotment=None, **options):
    """The policy, and the oracle's rules for it."""
    pages, slots = GEOMETRY[page_size]
    within = options.get("prompt") == "included"
    budget = (pages + 2 if within else slots) * page_size
    shares = None if allotment is None else shares_of(allotment, budget, page_size, **options)
    return (
        RaaS(budget, page_size=page_size, allotment=allotment, **options),
        oracle.Rules(page_size=page_size, budget=budget, shares=shares, **options),
    )


def start(params, plan, prompts, seed):
    """The library's state after prefill, and the log-probability of the first tokens."""
    rows = len(prompts) * plan.samples
    request = RowRequest.create([LONG] * rows, (), Sampling(temperature=1.5), seed)
    return Session(params, plan, rows).start(prompts, request)


step_jit = jax.jit(token_step, static_argnames="plan")
commit_jit = jax.jit(commit_page, static_argnames="plan")


class Comparison:
    """Runs the library's decode and the oracle side by side, and compares after every step."""

    def __init__(self, params, policy, rules, prompts, longest, pages, seed, samples=1):
        config = params.config
        self.params, self.rules = params, rules
        self.plan = Plan.create(config, policy, [1, longest], pages * policy.page_size, samples)
        self.groups = [group.layers for group in self.plan.groups]
        self.stamped = [isinstance(group.policy, RaaS) for group in self.plan.groups]
        self.doubt = oracle.Doubt(margin=1e-4)
        self.state, first = start(params, self.plan, prompts, seed)
        network = oracle.Network(
            jax.tree.map(np.asarray, params.weights),
            theta=config.rope.theta,
            eps=config.rms_norm_eps,
        )
        self.rows = [
            oracle.Sequence(network, rules, list(prompts[row // samples]), self.doubt)
            for row in range(len(prompts) * samples)
        ]
        self.evicted = np.zeros(len(self.rows), int)
        logits = [row.first_logits for row in self.rows]
        self.check_logprobs(
            np.asarray(self.state.rows.token), np.asarray(first.logprobs[0]), logits
        )
        self.prompt = jax.tree.map(np.asarray, self.state.cache.prompt)
        self.check_prompt()

    def run(self, pages):
        for _ in range(pages):
            for offset in range(self.plan.page_size):
                self.step(offset)
            self.boundary()
        after = jax.tree.map(np.asarray, self.state.cache.prompt)
        jax.tree.map(np.testing.assert_array_equal, after, self.prompt)

    def step(self, offset):
        fed = np.asarray(self.state.rows.token)
        self.state, (tokens, logprobs, _), _ = step_jit(
            self.params, self.state, jnp.int32(offset), plan=self.plan
        )
        meta = self.meta()
        logits = []
        for index, row in enumerate(self.rows):
            now = row.drawn

            def in_doubt(layer, head, slot, index=index, now=now):
                return self.of_layer(meta, layer)[index, head, slot] == now

            logits.append(row.step(int(fed[index]), in_doubt))
        self.check_logprobs(np.asarray(tokens), np.asarray(logprobs), logits)
        self.check_stamps(meta)
        self.check_open(offset)

    def boundary(self):
        before = self.kept()
        self.state = commit_jit(self.state, plan=self.plan)
        after = self.kept()
        fill = [np.asarray(g.fill) for g in self.state.cache.kept]
        for index, row in enumerate(self.rows):
            for (layer, head), (slot, _) in (chosen := row.boundary()).items():
                was, now = self.of_layer(before, layer), self.of_layer(after, layer)
                changed = np.any(was[0][index, head] != now[0][index, head], axis=(1, 2))
                changed |= np.any(was[1][index, head] != now[1][index, head], axis=(1, 2))
                assert np.flatnonzero(changed).tolist() == [slot], "victim"
                pages = row.kept[layer][head]
                filled = self.of_layer(fill, layer)[index, head]
                assert dict.fromkeys(pages, self.plan.page_size) == {
                    int(s): filled[s] for s in np.flatnonzero(filled)
                }
                for s, page in pages.items():
                    close(now[0][index, head, s], page.keys)
                    close(now[1][index, head, s], page.values)
            self.evicted[index] += any(evicted for _, evicted in chosen.values())
        self.check_stamps(self.meta())
        np.testing.assert_array_equal(self.state.rows.evicted, self.evicted)
        np.testing.assert_array_equal(self.state.rows.generated, [row.drawn for row in self.rows])

    def kept(self):
        """Keys and values `[L, B, K, S, P, H]` of each group of layers."""
        both = zip(self.state.cache.kept, self.plan.groups, strict=True)
        return [tuple(by_heads(x, group.ranges) for x in (g.k, g.v)) for g, group in both]

    def meta(self):
        """Stamps `[L, B, K, S]` of each group of layers; None for a dense one."""
        both = zip(self.state.meta, self.stamped, strict=True)
        return [np.asarray(meta.stamp) if on else None for meta, on in both]

    def of_layer(self, groups, layer):
        """The entry of one layer, from one array (or pair of arrays) per group of layers."""
        for group, layers in zip(groups, self.groups, strict=True):
            if layer < layers:
                return tuple(x[layer] for x in group) if isinstance(group, tuple) else group[layer]
            layer -= layers
        raise AssertionError(layer)

    def check_logprobs(self, tokens, logprobs, logits):
        for token, logprob, row in zip(tokens, logprobs, logits, strict=True):
            peak = row.max()
            close(logprob, row[token] - peak - np.log(np.sum(np.exp(row - peak))))

    def check_stamps(self, meta):
        for index, row in enumerate(self.rows):
            for layer, heads in enumerate(row.kept):
                if row._dense(layer):
                    continue
                for head, pages in enumerate(heads):
                    of_head = self.of_layer(meta, layer)[index, head]
                    wanted = np.full(of_head.shape, -1)
                    for slot, page in pages.items():
                        wanted[slot] = page.stamp
                    np.testing.assert_array_equal(of_head, wanted)

    def check_open(self, offset):
        k, v = np.asarray(self.state.cache.current.k), np.asarray(self.state.cache.current.v)
        for index, row in enumerate(self.rows):
            for layer, heads in enumerate(row.open):
                for head, (keys, values) in enumerate(heads):
                    assert len(keys) == offset + 1
                    close(k[layer, index, head, : offset + 1], np.array(keys))
                    close(v[layer, index, head, : offset + 1], np.array(values))

    def check_prompt(self):
        for index, row in enumerate(self.rows):
            for layer, heads in enumerate(row.prompt):
                for head, (keys, values) in enumerate(heads):
                    for stored, wanted in (self.prompt.k, keys), (self.prompt.v, values):
                        flat = stored[layer, index // self.plan.samples, head]
                        close(flat.reshape(-1, flat.shape[-1])[: row.length], wanted)


def close(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=2e-4, atol=2e-4)


def compare(policy, rules, shape, lengths, seed, sharpness, pages, *, flat=False, samples=1):
    """Runs both over this many pages; returns the count of decisions in doubt."""
    params = random_params(SHAPES[shape], seed, sharpness, flat)
    prompts = prompts_of(lengths, seed)
    longest = GEOMETRY[rules.page_size][0] * rules.page_size
    both = Comparison(params, policy, rules, prompts, longest, pages, seed, samples)
    both.run(pages)
    return both.doubt


def pages_to_run(page_size):
    """Enough to overwrite pages, and at short pages to overwrite all of them twice."""
    return 5 if page_size == 16 else 2 * GEOMETRY[page_size][1] + 2


# No shrinking: every new shape costs a compilation.
few = partial(settings, phases=[Phase.explicit, Phase.reuse, Phase.generate])
seeds = st.integers(0, 2**16)
sharpnesses = st.floats(0.5, 5.0)


def ragged(page_size, rows=ROWS):
    return st.lists(
        st.integers(1, GEOMETRY[page_size][0] * page_size), min_size=rows, max_size=rows
    )


@pytest.mark.once
@pytest.mark.parametrize(
    ("number", "options"),
    list(enumerate(COMBINATIONS)),
    ids=["-".join(map(str, options.values())) for options in COMBINATIONS],
)
def test_every_combination_of_options_at_every_step(number, options):
    """Both scores, shares, places of the prompt and stamp rules; each value meets P = 1 and 16."""
    page_size = 16 if number.bit_count() % 2 else 1
    shape = sorted(SHAPES)[number % 3]
    policy, rules = case(page_size, **options)
    doubts = []

    @few(max_examples=5)
    @given(lengths=ragged(page_size), seed=seeds, sharpness=sharpnesses)
    def check(lengths, seed, sharpness):
        pages = pages_to_run(page_size)
        doubts.append(compare(policy, rules, shape, lengths, seed, sharpness, pages))

    check()
    assert_few(doubts)


def test_any_shape_and_options_at_every_step():
    """Everything is drawn: network, page size, options, first layers dense, prompts shared."""
    doubts = []

    @few(max_examples=4)
    @given(
        st.sampled_from(sorted(SHAPES)),
        st.sampled_from(COMBINATIONS),
        st.sampled_from([2, 5]),
        st.integers(0, 2),
        st.sampled_from([1, 3]),
        seeds,
        sharpnesses,
        st.data(),
    )
    def check(shape, options, page_size, dense_layers, samples, seed, sharpness, data):
        policy, rules = case(page_size, dense_layers=dense_layers, **options)
        lengths = data.draw(ragged(page_size, ROWS // samples))
        pages = pages_to_run(page_size)
        doubts.append(
            compare(policy, rules, shape, lengths, seed, sharpness, pages, samples=samples)
        )

    check()
    assert sum(one.doubtful for one in doubts) <= 0.01 * sum(one.decisions for one in doubts)


GREEDY = Allotment([2, 99], np.stack([[[1.0, 0], [0, 0]], [[0, 0], [0, 0]]]))


def test_heads_with_budgets_of_their_own_at_every_step():
    """Each as if it were alone with its pages; by what each prompt leaves, where it counts."""
    doubts, sizes = [], set()

    # One head may keep all that there will be, so that all others are left with two pages.
    @few(max_examples=2)
    @example("llama", COMBINATIONS[0], 1, 0, GREEDY, 5, 2.0, [1, 5, 2])
    @example("qwen3", COMBINATIONS[7], 1, 0, 3, 6, 2.0, [5, 1, 3])
    @given(
        st.sampled_from(sorted(SHAPES)),
        st.sampled_from(COMBINATIONS),
        st.sampled_from([1, 2]),
        st.integers(0, 1),
        seeds,
        seeds,
        sharpnesses,
        st.lists(st.integers(1, 5), min_size=ROWS, max_size=ROWS),
    )
    def check(shape, options, page_size, dense_layers, allotment, seed, sharpness, lengths):
        if not isinstance(allotment, Allotment):
            allotment = allotment_of(SHAPES[shape], page_size, allotment)
        options = {**options, "dense_layers": dense_layers}
        policy, rules = case(page_size, allotment, **options)
        pages = pages_to_run(page_size)
        plan = Plan.create(SHAPES[shape], policy, [1], pages * page_size)
        sizes.update(plan.groups[-1].counts(SHAPES[shape].num_key_value_heads).flat)
        doubts.append(compare(policy, rules, shape, lengths, seed, sharpness, pages))

    check()
    assert_few(doubts)
    assert {2, 14} <= sizes


@pytest.mark.parametrize("score", ["mass", "bound"])
def test_exact_ties_are_stamped_together(score):
    """With keys of zero all full pages weigh the same: the top third of the pages is all of them,
    so the victim is the lowest slot every time."""
    policy, rules = case(2, score=score, top_fraction=1 / 3, prompt="included")
    doubt = compare(policy, rules, "llama", [1, 6, 3], 5, 1.0, 10, flat=True)
    assert doubt.decisions > 0 and doubt.doubtful == 0


def test_dense():
    rules = oracle.Rules(page_size=2, keep_all=True)
    compare(Dense(page_size=2), rules, "qwen3", [6, 1, 4], 3, 2.0, 8)


def test_the_scanned_pages_are_these_steps():
    """`decode_pages`, which generation runs, does what the compared single steps do."""
    policy, _ = case(5, alpha=0.12, dense_layers=1)
    config = SHAPES["qwen2"]
    params = random_params(config, 1, 2.0)
    plan = Plan.create(config, policy, [1, 10], 30)
    prompts = prompts_of([10, 3, 7], 1)
    state, _ = start(params, plan, prompts, 1)
    tokens, logprobs = [], []
    for _ in range(6):
        for offset in range(5):
            state, (token, logprob, _), _ = step_jit(params, state, jnp.int32(offset), plan=plan)
            tokens.append(token)
            logprobs.append(logprob)
        state = commit_jit(state, plan=plan)
    scanned, drawn = decode_pages(params, start(params, plan, prompts, 1)[0], plan=plan, pages=6)
    np.testing.assert_array_equal(drawn.tokens, np.stack(tokens))
    np.testing.assert_allclose(drawn.logprobs, np.stack(logprobs), rtol=1e-5, atol=1e-5)
    assert np.all(np.asarray(scanned.rows.evicted) > 0)
    jax.tree.map(np.testing.assert_array_equal, scanned.meta, state.meta)
    for name in ("generated", "committed", "evicted"):
        np.testing.assert_array_equal(getattr(scanned.rows, name), getattr(state.rows, name))
    near = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    jax.tree.map(near, scanned.cache, state.cache)


def assert_few(doubts):
    """The oracle made decisions, and took hardly any of them from the library."""
    decisions = sum(one.decisions for one in doubts)
    doubtful = sum(one.doubtful for one in doubts)
    assert decisions > 0 and doubtful <= 0.01 * decisions, (decisions, doubtful)


@pytest.mark.parametrize("slots", [100, PAIRWISE + 1])
def test_top_fraction_is_rounded_up_exactly(slots):
    """For every number of pages and many fractions: the share as written, rounded up. Few slots are
    compared in pairs, many are sorted."""
    counts = np.arange(1, slots + 1)
    scores = jnp.asarray(np.random.default_rng(0).permutation(slots) + 1.0, jnp.float32)
    fill = jnp.asarray(np.arange(slots) < counts[:, None], jnp.int32)[:, None]
    mass = jnp.where(fill > 0, scores, 0.0)[:, :, None]

    def stamped(policy):
        fresh = jax.tree.map(lambda mark: mark[0], policy.init((1, slots, 1, slots)))
        meta = policy.observe(fresh, Evidence(mass, None, fill), jnp.full(slots, 7))
        return np.asarray(meta.stamp) == 7

    hundredths = (*range(5, 101, 5), 1, 33, 67, 99)
    # The last ones have denominators whose products with counts are no int32.
    for fraction in (*(each / 100 for each in hundredths), 1 / 3, 2 / 3, 0.6180339887498949):
        share = fractions.Fraction(str(fraction))
        wanted = [math.ceil(int(count) * share) for count in counts]
        got = stamped(RaaS(32, top_fraction=fraction))
        assert np.sum(got, axis=(1, 2)).tolist() == wanted, f"top_fraction={fraction}"
        # And they are the best ones.
        low = np.where(got[:, 0], np.asarray(scores), np.inf).min(axis=-1)
        assert np.all(got[:, 0] | (np.asarray(scores) < low[:, None]) | (fill[:, 0] == 0))
    np.testing.assert_array_equal(stamped(RaaS(32)), stamped(RaaS(32, top_fraction=0.25)))
