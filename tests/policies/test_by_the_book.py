"""Every policy keeps and reads what the published method does, page by page, token by token."""

from __future__ import annotations

from functools import partial

import by_the_book as book
import jax
import numpy as np
import oracle
import pytest
from cheap import CONFIG, start
from tiny import calibration, prompts_of, random_params

from raas_jax import policies
from raas_jax.decode import EVICTION_STREAM, decode_page
from raas_jax.plan import Plan
from raas_jax.policies.triattention import Centres
from raas_jax.sampling import row_keys

# Policy, its options, and the method by the book. Budgets are in pages.
CASES = {
    "recent": ("recent", {}, book.Recent),
    "sink": ("sink", {}, book.Sink),
    "sink, prompt evicted": ("sink", {"prompt": "evict"}, book.SinkEvict),
    "h2o": ("h2o", {}, book.H2O),
    "h2o, prompt evicted": ("h2o", {"prompt": "evict"}, book.H2OEvict),
    "tova": ("tova", {}, book.TOVA),
    "tova, prompt evicted": ("tova", {"prompt": "evict"}, book.TOVAEvict),
    "snapkv": ("snapkv", {"window": 2}, book.SnapKV),
    "snapkv, long window": ("snapkv", {"window": 6}, book.SnapKVLong),
    "random": ("random", {"recent": 2}, book.Random),
    "rkv": ("rkv", {"recent": 2, "window": 2}, book.RKV),
    "lazy_eviction": ("lazy_eviction", {"recent": 2, "alpha": 0.12}, book.LazyEviction),
    "vase": ("vase", {"recent": 2, "window": 2}, book.VaSE),
    "triattention": ("triattention", {"horizon": 8}, book.TriAttention),
    "triattention, by layer": (
        "triattention",
        {"horizon": 8, "across_layers": False},
        book.TriAttentionByLayer,
    ),
    "quest": ("quest", {}, book.Quest),
    "raas_quest": ("raas_quest", {"alpha": 0.12}, book.RaaSQuest),
}
PAGES = {1: 7, 3: 5}  # Tokens per page → pages of the budget.
BUFFER = 3


def test_no_policy_is_left_out():
    elsewhere = {"dense", "raas", "fifo"}  # tests/test_oracle.py; the same class as recent.
    assert {name for name, _, _ in CASES.values()} | elsewhere == set(policies.available())
    assert policies.by_name("fifo") is policies.by_name("recent")


@pytest.mark.parametrize("page_size", PAGES)
@pytest.mark.parametrize("case", CASES)
def test_the_method_by_the_book(case, page_size):
    name, options, kind = CASES[case]
    pages, P = PAGES[page_size], page_size
    options = {**options, "budget": pages * P, "page_size": P}
    batched = issubclass(policies.by_name(name), policies.Batched)
    if batched:
        options["every"] = BUFFER * P
    if name == "raas_quest":
        options["prompt_budget"] = 2 * P
    if name == "triattention":
        options["calibration"] = calibration(CONFIG)
    policy = policies.create(name, **options)
    # The first prompt is longer than the budget, the second shorter than the sinks.
    lengths = [pages * P + 2, 2, 2 * P + 1]
    prompts, params = prompts_of(lengths, 1), random_params(CONFIG, 3, 3.0)
    plan = Plan.create(CONFIG, policy, lengths, 20 * P)
    state, first = start(params, plan, prompts, seed=2)
    network = oracle.Network(
        jax.tree.map(np.asarray, params.weights), theta=CONFIG.rope.theta, eps=CONFIG.rms_norm_eps
    )
    method = kind(P, pages, BUFFER if batched else 0)
    if name == "triattention":
        centres = Centres.read(calibration(CONFIG))
        method.centre = centres.centre[..., :4] + 1j * centres.centre[..., 4:]
        method.length = centres.length
    rows = [book.Sequence(network, method, prompt) for prompt in prompts]
    check_logprobs(first.tokens[0], first.logprobs[0], [row.logits for row in rows])
    both = Library(state, rows, plan, row_keys(2, 3))
    one_page = jax.jit(partial(decode_page, plan=plan))
    dropped = 0
    for _ in range(2 * pages + 2):
        dropped += both.page(*one_page(params, state=both.state))
    assert (dropped > 0) == (name != "quest")


class Library:
    """The library's state, with the number of the page in each slot."""

    def __init__(self, state, rows, plan, keys):
        self.state, self.rows, self.plan, self.keys = state, rows, plan, keys
        self.slots = {}  # (row, layer, head) → page number → slot.
        kept = state.cache.kept[0]
        for at in np.ndindex(len(rows), *kept.fill.shape[::2][:1], kept.fill.shape[2]):
            row, layer, head = at
            self.slots[at] = {}
            for slot in np.flatnonzero(np.asarray(kept.fill)[layer, row, head]):
                keys = np.asarray(kept.k)[layer, row, head, slot]
                pages = rows[row].kept[layer][head]
                found = [p for p in pages if near(keys[: len(p.keys)], p.keys)]
                assert len(found) == 1
                self.slots[at][found[0].number] = int(slot)
        for index, row in enumerate(rows):
            if row.method.evict_prompt:
                self.check_inserted(index, row)

    def check_inserted(self, index, row):
        """A prompt longer than the budget was cut as the method cuts, and the rest fits."""
        for layer, heads in enumerate(row.kept):
            for head, pages in enumerate(heads):
                wanted = self.slots[index, layer, head]
                assert len(wanted) == min(len(pages), row.method.pages)
                new = pages[-1]
                safe = [*row.method.protected(pages, new), new]
                goes = [p for p in pages if p.number not in wanted]
                rest = [p for p in pages if p not in safe]
                assert not [p for p in goes if p in safe]
                scores = row.method.scores(heads, head, rest, None)
                scores = dict(zip(rest, scores, strict=True))
                left = [scores[p] for p in rest if p not in goes]
                assert not (goes and left) or max(scores[p] for p in goes) <= min(left) + 1e-6
        for layer, heads in enumerate(row.kept):
            for head, pages in enumerate(heads):
                wanted = self.slots[index, layer, head]
                row.kept[layer][head] = [p for p in pages if p.number in wanted]

    def page(self, state, given):
        """Compares one page: log-probabilities of every token, then what is kept."""
        (tokens, logprobs, _), _ = given
        fed = np.concatenate([np.asarray(self.state.rows.token)[None], np.asarray(tokens)])
        for offset in range(self.plan.page_size):
            logits = [row.step(int(fed[offset, i])) for i, row in enumerate(self.rows)]
            check_logprobs(tokens[offset], logprobs[offset], logits)
        self.state = state
        kept = jax.tree.map(np.asarray, state.cache.kept[0])
        dropped = 0
        for index, row in enumerate(self.rows):
            before = {at: dict(slots) for at, slots in self.slots.items()}

            def numbers(layer, head, index=index, row=row, before=before):
                slots = self.slots[index, layer, head]
                new = row.current[layer][head]
                k, fill = (x[layer, index, head] for x in (kept.k, kept.fill))
                found = [s for s in np.flatnonzero(fill) if near(k[s], new.keys)]
                assert len(found) == 1, "the new page is there, once"
                for number in [n for n, s in slots.items() if s == found[0] or not fill[s]]:
                    del slots[number]
                slots[new.number] = before[index, layer, head][new.number] = int(found[0])
                assert sorted(slots.values()) == np.flatnonzero(fill).tolist()
                return set(slots)

            def draws(layer, head, page, index=index, row=row, before=before):
                slot = before[index, layer, head][page.number]
                return self.draw(index, row.drawn, slot)[layer, head]

            dropped += row.boundary(numbers, draws)
        return dropped

    def draw(self, index, now, slot):
        """The random numbers of one slot `[L, K]`, from the keys that `Boundary` promises."""
        key = jax.random.fold_in(self.keys[index], EVICTION_STREAM)
        key = jax.random.fold_in(jax.random.fold_in(key, now), slot)
        uniform = isinstance(self.plan.policy, policies.RandomEviction)
        kind = jax.random.uniform if uniform else jax.random.gumbel
        return np.asarray(kind(key, (2, 2)))


def check_logprobs(tokens, logprobs, logits):
    for token, logprob, row in zip(tokens, logprobs, logits, strict=True):
        peak = row.max()
        wanted = row[int(token)] - peak - np.log(np.sum(np.exp(row - peak)))
        np.testing.assert_allclose(logprob, wanted, rtol=1e-3, atol=1e-3)


def near(keys, wanted):
    return keys.shape == np.shape(wanted) and np.allclose(keys, wanted, rtol=1e-3, atol=1e-3)
