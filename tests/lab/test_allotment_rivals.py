"""Where attention goes, and what a shrunken head does: against the whole of it at once."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest
import written_out
from tiny import QWEN3, VOCAB, WINDOWS, random_params

from raas_jax.allotting import dense
from raas_jax.lab.allotments import effect, ranking, rivals
from raas_jax.lab.allotments.attention import copying, most_attended
from raas_jax.lab.fidelity.measure import dense_outputs, follow
from raas_jax.policies import Allotment, RaaS

P, T = 4, 37


@pytest.fixture(scope="module")
def params():
    return random_params(QWEN3, 3, 3.0)


@pytest.fixture(scope="module")
def texts():
    return np.random.default_rng(0).integers(0, 5, (2, T)).tolist()


def sizes_of(params):
    return params.config.num_hidden_layers, params.config.num_key_value_heads


def shares_of(params, ids):
    """Of every layer that sees everything, `[L, K, G, T, T]`, by attention written out."""
    _, shares = jax.jit(partial(written_out.run, params, attended=written_out.plainly))(ids)
    K = params.config.num_key_value_heads
    return np.float64(shares).reshape(len(shares), K, -1, T, T)


@pytest.mark.parametrize(
    ("config", "queries"),
    [(QWEN3, 512), (WINDOWS, 8)],
    ids=["at once", "windows and blocks"],
)
def test_where_attention_goes(texts, monkeypatch, config, queries):
    params = random_params(config, 3, 3.0)
    monkeypatch.setattr(dense, "QUERIES", queries)
    dense.look.clear_cache()  # Of programs with other blocks.
    shares = [shares_of(params, ids) for ids in texts]
    wanted = np.zeros(shares[0].shape[:2])
    for ids, of_text in zip(texts, shares, strict=True):
        for t, s in np.ndindex(T - 1, T):
            if s <= t and ids[s] == ids[t + 1]:
                wanted += of_text[:, :, :, t, s].mean(axis=2) / (2 * T)
    np.testing.assert_allclose(copying(params, texts), wanted, rtol=1e-4)

    pages, count = 2, np.zeros(wanted.shape)
    for of_text in shares:
        for t in range((pages + 1) * P, T):
            before = t // P
            mass = of_text[:, :, :, t, : before * P].mean(axis=2)
            mass = mass.reshape(*mass.shape[:2], before, P).sum(axis=-1)
            for layer, of_layer in enumerate(mass):
                K = len(of_layer)
                for place in np.argsort(-of_layer, axis=None, kind="stable")[: K * pages]:
                    count[layer, place // before] += 1
    found = most_attended(params, texts, pages, P)
    np.testing.assert_allclose(found.mean(axis=1), pages)
    np.testing.assert_allclose(found, pages * count / count.mean(axis=1, keepdims=True), rtol=0.02)


def test_a_shrunken_place(params):
    """As under an allotment that gives just this place few pages; the rest forgets nothing."""
    texts = np.random.default_rng(1).integers(0, VOCAB, (2, 62)).tolist()
    L, K, prompt, pages = *sizes_of(params), 6, 2
    asked = {"prompt_tokens": prompt, "rows": 5}
    places = [(1, 0), (0, 1), (0, None), (1, None)]
    found = {place: {} for place in places}
    for place, number, kl in effect.effects(
        params, texts, places, RaaS(8, page_size=P), pages, **asked
    ):
        found[place][number] = kl
    outputs = [dense_outputs(params, text) for text in texts]
    for layer, head in places:
        few = np.zeros((L, K), bool)
        few[layer, slice(None) if head is None else head] = True
        # By hand: heads of few pages keep two, all others more than there are.
        counts = np.where(few, pages, 16)[..., None] * np.ones(2)
        policy = RaaS(16 * P, page_size=P, allotment=Given([1, 2], counts))
        *_, last = follow(params, policy, texts, outputs, prompt)
        for number, followed in enumerate(last):
            wanted = followed.differences.kl.mean()
            assert found[layer, head][number] == pytest.approx(wanted, rel=1e-3) and wanted > 1e-4


class Given(Allotment):
    """Whose first losses are the pages."""

    def pages(self, mean, page_size, least=1):
        return self.losses[..., 0].astype(np.int64)


def test_ranks():
    found = {(0, 0): 3.0, (0, 1): 1.0, (1, 0): 2.0, (0, None): 1.0, (1, None): 2.0}
    losses = np.asarray([[9.0, 1.0], [2.0, 0.5]])[..., None] * [2.0, 0.0]
    heads, layers = ranking.ranked(found, Allotment([16, 32], losses), 24)
    assert heads == pytest.approx(1) and np.isnan(layers)
    upside = Allotment([16, 32], losses.max() - losses[..., :1] * [1.0, 1.0])
    assert ranking.ranked(found, upside, 24)[0] == pytest.approx(-1)


def test_every_rule_is_an_allotment(params, texts, monkeypatch):
    losses = np.random.default_rng(2).random((*sizes_of(params), 1)) * [2.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="no token has more than 16 pages"):
        most_attended(params, texts, rivals.PAGES, rivals.PAGE_SIZE)
    monkeypatch.setattr(rivals, "PAGES", 2)
    monkeypatch.setattr(rivals, "PAGE_SIZE", P)
    found = Allotment([16, 32, 512], losses, "model")
    made = {each.made["rule"]: each for each in rivals.rivals(params, found, texts, 0)}
    assert len(made) == 6 and len(set(made.values())) == 6
    for each in made.values():
        assert each.model == "model" and each.pages(8, 16).mean() == 8
