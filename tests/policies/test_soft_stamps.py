"""RaaS with soft stamps and a reserve of recent pages, against plain sums of decayed scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from raas_jax.policies import Boundary, Evidence, Page, RaaS

L, B, K, G, S, P = 1, 2, 2, 3, 4, 2


class ByTheBook:
    """One head: every score that a page ever received, with its time; nothing is accumulated."""

    def __init__(self, half_life, recent):
        self.half_life, self.recent = half_life, recent
        self.pages = {}  # slot -> (time written, list of (time, score))

    def see(self, scores, now):
        for slot, (_, seen) in self.pages.items():
            seen.append((now, float(scores[slot])))

    def left(self, slot, now):
        return sum(
            score * 0.5 ** ((now - when) / self.half_life) for when, score in self.pages[slot][1]
        )

    def boundary(self, now):
        free = [slot for slot in range(S) if slot not in self.pages]
        keep = -(-self.recent // P) or 1
        # The page that is being written is one of the recent ones.
        newest = sorted(self.pages, key=lambda slot: self.pages[slot][0])[
            len(self.pages) - (keep - 1) :
        ]
        old = [slot for slot in self.pages if slot not in newest]
        slot = free[0] if free else min(old, key=lambda slot: self.left(slot, now))
        self.pages[slot] = now, [(now, 1.0)]
        return slot


def no_pages(layer):
    raise AssertionError("Stamps alone decide.")


@pytest.mark.parametrize("recent", [0, 1, 4, 5])
@pytest.mark.parametrize("half_life", [0.5, 3.0, 200.0])
def test_the_page_with_least_left_goes(half_life, recent):
    policy = RaaS(S * P, half_life=half_life, recent=recent, page_size=P)
    rng = np.random.default_rng(int(half_life * 10) + recent)
    meta = policy.init((L, B, K, S))
    fill = jnp.zeros((L, B, K, S), jnp.int32)
    books = [[ByTheBook(half_life, recent) for _ in range(K)] for _ in range(B)]
    page = Page(*(jnp.zeros((L, B, K, P, 1)),) * 2)
    for now in range(1, 41):
        mass = rng.dirichlet(np.full(S, 0.3), (B, K, G)).astype(np.float32) * 0.9
        evidence = Evidence(jnp.asarray(mass), None, fill[0])
        of_layer = policy.observe(jax.tree.map(lambda x: x[0], meta), evidence, jnp.full(B, now))
        meta = jax.tree.map(lambda x: x[None], of_layer)
        for b in range(B):
            for k in range(K):
                books[b][k].see(mass[b, k].max(axis=0), now)
                for slot in books[b][k].pages:
                    # The stamp is the time at which a score of one would have left as much.
                    wanted = now + half_life * np.log2(books[b][k].left(slot, now))
                    assert float(meta.stamp[0, b, k, slot]) == pytest.approx(wanted, abs=1e-2)
        if now % P:
            continue
        clock = jnp.full(B, now + 1)
        keys = jax.vmap(jax.random.key)(jnp.arange(B))
        allowed, lengths = jnp.ones((L, B, K, S), bool), jnp.ones(B, jnp.int32)
        boundary = Boundary(clock, fill, allowed, no_pages, no_pages, keys, lengths)
        slot = policy.victim(meta, boundary)
        wanted = [[books[b][k].boundary(now + 1) for k in range(K)] for b in range(B)]
        np.testing.assert_array_equal(slot[0], wanted)
        meta = policy.commit(meta, slot, page, clock)
        chosen = jnp.arange(S) == slot[..., None]
        fill = jnp.where(chosen, P, fill)


def test_a_short_half_life_is_the_last_use():
    """One large score long ago against a small one just now; a long half-life prefers the large."""
    fill = jnp.full((1, 1, 2), 2)
    for half_life, preferred in (0.1, 1), (1000.0, 0):
        policy = RaaS(4, half_life=half_life, page_size=2)
        meta = jax.tree.map(lambda x: x[0], policy.init((1, 1, 1, 2)))
        for now, mass in ((1, [0.9, 0.0]), (9, [0.0, 0.01])):
            mass = jnp.asarray(mass).reshape(1, 1, 1, 2)
            meta = policy.observe(meta, Evidence(mass, None, fill), jnp.asarray([now]))
        assert float(meta.stamp[0, 0, preferred]) > float(meta.stamp[0, 0, 1 - preferred])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"half_life": 0.0}, "half_life is 0.0; it must be a finite number of tokens above 0"),
        ({"half_life": float("inf")}, "half_life is inf"),
        ({"half_life": 8.0, "top_fraction": 0.5}, "top_fraction=0.5 and half_life=8.0 are given"),
        ({"recent": -1}, "recent is -1"),
        ({"budget": 64, "recent": 64}, "budget is 64, but with recent=64.*at least 80"),
    ],
    ids=str,
)
def test_what_cannot_work_is_refused(options, named):
    with pytest.raises(ValueError, match=named):
        RaaS(**options)
