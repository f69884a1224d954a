"""The published methods in NumPy float64, for one sequence: plain loops over whole histories.

It imports nothing from the library. Every page remembers all the attention that it ever received,
and each method looks at these histories when a page has been written; nothing else is stored.
The network is that of `oracle.py`.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from oracle import Network, _softmax


@dataclasses.dataclass(eq=False)
class Page:
    """Tokens that are kept or forgotten together.

    Attributes:
      number: pages of the text are numbered from its start; prompt and answer do not share one.
      start: position of the first token.
      keys, values: one `[H]` per token.
      seen: for every query since the page was begun, the attention of each query head, `[G]`.
      began: how many queries had looked at it when its last token was written.
    """

    number: int
    start: int
    keys: list = dataclasses.field(default_factory=list)
    values: list = dataclasses.field(default_factory=list)
    seen: list = dataclasses.field(default_factory=list)
    began: int = 0


class Method:
    """What to read and what to drop. `pages` is the budget, `buffer` what may pile up on top."""

    evict_prompt = False
    layered = False  # One decision for all heads of a layer.

    def __init__(self, page_size, pages, buffer=0):
        self.P, self.pages, self.buffer = page_size, pages, buffer

    def look(self, sequence):
        """At the whole sequence, once a page has been written and nothing has gone yet."""

    def reads(self, prompt, kept, queries):
        """The pages to read of the prompt and of the answer, for the query heads of one head."""
        return prompt, kept

    def protected(self, kept, new):
        """Pages that may not go, besides the new one."""
        return []

    def tied(self, kept, new):
        """Pages of which some are protected, and only a tie decides which: not compared."""
        return []

    def scores(self, heads, head, candidates, draws):
        """The score of each candidate: the lowest goes. `heads` has the kept pages of each head."""
        raise NotImplementedError


def newest(kept, count):
    return sorted(kept, key=lambda page: page.number)[-count:] if count else []


class Recent(Method):
    def scores(self, heads, head, candidates, draws):
        return [page.number for page in candidates]


class Sink(Recent):
    def protected(self, kept, new):
        return [page for page in kept if page.start < 4]


class SinkEvict(Sink):
    evict_prompt = True


class H2O(Method):
    def protected(self, kept, new):
        return newest(kept, max(1, self.pages // 2))

    def scores(self, heads, head, candidates, draws):
        return [float(np.sum(page.seen)) for page in candidates]


class H2OEvict(H2O):
    evict_prompt = True


class TOVA(Method):
    layered = True

    def scores(self, heads, head, candidates, draws):
        same = [{page.number: page for page in kept} for kept in heads]
        return [np.mean([of[page.number].seen[-1] for of in same]) for page in candidates]


class TOVAEvict(TOVA):
    evict_prompt = True


class SnapKV(Method):
    window = 2

    def protected(self, kept, new):
        return newest(kept, math.ceil(self.window / self.P))

    def scores(self, heads, head, candidates, draws):
        return [float(np.mean(page.seen[-self.window :])) for page in candidates]


class SnapKVLong(SnapKV):
    window = 6


class Random(Method):
    recent = 2

    def protected(self, kept, new):
        return newest(kept, math.ceil(self.recent / self.P))

    def scores(self, heads, head, candidates, draws):
        return [draws(page) for page in candidates]


class RKV(Random):
    window = 2

    def scores(self, heads, head, candidates, draws):
        mass = [np.sum(np.max(page.seen[-self.window :], axis=1)) for page in candidates]
        everything = sorted(heads[head], key=lambda page: page.number)
        unit = []
        for page in everything:
            mean = np.sum([key / np.linalg.norm(key) for key in page.keys], axis=0)
            unit.append(mean / np.linalg.norm(mean))
        count = len(unit)
        alike = np.array(
            [[unit[i] @ unit[j] * (i != j) for j in range(count)] for i in range(count)]
        )
        forgiven = []
        for i in range(count):
            close = [j for j in range(count) if alike[i, j] > 0.5]
            forgiven += [(i, close[-1])] if close else []
        for pair in forgiven:
            alike[pair] = 0
        redundancy = dict(zip(everything, _softmax(np.mean(alike, axis=0)), strict=True))
        return [
            0.1 * m / sum(mass) - 0.9 * redundancy[page]
            for m, page in zip(mass, candidates, strict=True)
        ]


class LazyEviction(Random):
    def scores(self, heads, head, candidates, draws):
        scores = []
        for page in candidates:
            last, longest = 0, 0
            later = page.seen[page.began :]
            for time, mass in enumerate(later, start=1):
                if np.max(mass) > 0.12:
                    longest, last = max(longest, time - last), time
            idle = len(later) - last
            back = 2 / (1 + math.exp(idle / longest)) if longest else -idle
            often = 2 / (1 + math.exp(longest - 1)) if longest else 0
            scores.append(back + often)
        return scores


class VaSE(Random):
    window = 2

    def large(self, kept):
        recent = Random.protected(self, kept, None)
        old = sorted((page for page in kept if page not in recent), key=self.spread)
        return old[len(old) - self.pages // 4 :]

    def protected(self, kept, new):
        return self.large(kept) + super().protected(kept, new)

    def spread(self, page):
        return max(max(v) - min(v) for v in page.values)

    def tied(self, kept, new):
        # Without rotation, a token's values in the first layer are always the same.
        least = min(self.spread(page) for page in self.large(kept))
        recent = Random.protected(self, kept, new)
        tied = [page for page in kept if abs(self.spread(page) - least) < 1e-5]
        tied = [page for page in tied if page not in recent]
        return tied if len(tied) > 1 else []

    def scores(self, heads, head, candidates, draws):
        window = [np.sum(np.mean(page.seen[-self.window :], axis=1)) for page in candidates]
        return [math.log(w) + draws(page) for w, page in zip(window, candidates, strict=True)]


class TriAttention(Method):
    """`centre` and `length` are `[layer][query head]`, pairs as complex numbers `[H / 2]`."""

    horizon = 8
    across_layers = True
    centre = length = None

    def look(self, sequence):
        net = sequence.net
        self.net, self.layers = net, [[list(kept) for kept in heads] for heads in sequence.kept]
        self.position = sequence.length + sequence.drawn - 1
        half = net.head_dim // 2
        self.turns = np.array([net.theta ** (-2 * i / net.head_dim) for i in range(half)])

    def token_scores(self, layer, head):
        """Page number → score of its best token, in one layer."""
        kept = self.layers[layer][head]
        tokens = [(page, page.start + i, k) for page in kept for i, k in enumerate(page.keys)]
        group = self.net.query_heads // self.net.heads
        by_query = []
        for query in range(head * group, head * group + group):
            centre, length = self.centre[layer][query], self.length[layer][query]
            scores = []
            for _, at, key in tokens:
                half = len(key) // 2
                plain = (key[:half] + 1j * key[half:]) * np.exp(-1j * at * self.turns)
                phase = np.angle(centre * np.conj(plain))
                ahead, total, count = 1, 0.0, 0
                while ahead <= self.horizon:
                    angle = (self.position + ahead - at) * self.turns + phase
                    total += np.sum(abs(centre) * abs(plain) * np.cos(angle))
                    ahead, count = 2 * ahead, count + 1
                scores.append(total / count + np.sum((length - abs(centre)) * abs(plain)))
            by_query.append((scores - np.mean(scores)) / np.std(scores))
        return tokens, np.max(by_query, axis=0)

    def scores(self, heads, head, candidates, draws):
        here = [layer for layer, kept in enumerate(self.layers) if kept == heads]
        total = {}
        layers = range(len(self.layers)) if self.across_layers else here[:1]
        for layer in layers:
            tokens, scores = self.token_scores(layer, head)
            for (page, at, _), score in zip(tokens, scores, strict=True):
                total[page.number, at] = total.get((page.number, at), 0.0) + score / len(layers)
        return [
            max(score for (number, _), score in total.items() if number == page.number)
            for page in candidates
        ]


class TriAttentionByLayer(TriAttention):
    across_layers = False


def top(pages, queries, count):
    """The pages of the largest bounds, the largest of the query heads."""

    def bound(page):
        low, high = np.min(page.keys, axis=0), np.max(page.keys, axis=0)
        return max(float(np.sum(np.maximum(q * low, q * high))) for q in queries)

    return sorted(pages, key=bound)[-count:]


class Quest(Method):
    def reads(self, prompt, kept, queries):
        chosen = top(prompt + kept, queries, self.pages)
        return [p for p in prompt if p in chosen], [p for p in kept if p in chosen]

    def __init__(self, page_size, pages, buffer=0):
        super().__init__(page_size, pages, buffer)
        self.buffer = 10**6  # Nothing is ever dropped.


class RaaSQuest(Method):
    def reads(self, prompt, kept, queries):
        return top(prompt, queries, 2), kept

    def scores(self, heads, head, candidates, draws):
        stamps = []
        for page in candidates:
            later = page.seen[page.began :]
            used = [time for time, mass in enumerate(later) if np.max(mass) > 0.12]
            stamps.append((used[-1] if used else 0) - len(later))
        return stamps


class Sequence:
    """One sequence under a method. Attributes `prompt` and `kept`: `[layer][head]` → pages."""

    def __init__(self, network: Network, method: Method, prompt: list[int]):
        self.net, self.method, self.length, self.drawn = network, method, len(prompt), 1
        self.prompt = [[[] for _ in range(network.heads)] for _ in network.layers]
        self.kept = [[[] for _ in range(network.heads)] for _ in network.layers]
        self.current: list[list[Page]] = []
        self.logits = self._read(prompt)
        self.next = 1000  # Numbers of the answer's pages begin here.
        self._begin()

    def _begin(self):
        start = self.length + self.drawn - 1
        self.current = [
            [Page(self.next, start) for _ in range(self.net.heads)] for _ in self.net.layers
        ]
        self.next += 1

    def _read(self, prompt):
        net, P = self.net, self.method.P
        G, scale = net.query_heads // net.heads, 1 / math.sqrt(net.head_dim)
        x = [net.embedding[token] for token in prompt]
        for layer, w in enumerate(net.layers):
            h = [net.rms(row, w["attention_norm"]) for row in x]
            q, k, v = (
                [net.heads_of(layer, name, row, t) for t, row in enumerate(h)] for name in "qkv"
            )
            attended = [[] for _ in x]
            for head in range(net.heads):
                pages = [Page(start // P, start) for start in range(0, len(x), P)]
                for t in range(len(x)):
                    pages[t // P].keys.append(k[t][head])
                    pages[t // P].values.append(v[t][head])
                keys, values = (np.array([x[head] for x in y]) for y in (k, v))
                for t in range(len(x)):
                    shares = []
                    for g in range(G):
                        share = _softmax(keys[: t + 1] @ q[t][head * G + g] * scale)
                        attended[t].append(share @ values[: t + 1])
                        shares.append(np.pad(share, (0, len(x) - t - 1)))
                    for page in pages[: t // P + 1]:
                        part = slice(page.start, page.start + P)
                        page.seen.append(np.array([np.sum(share[part]) for share in shares]))
                (self.kept if self.method.evict_prompt else self.prompt)[layer][head] = pages
            x = [net.rest_of_layer(layer, x[t], attended[t]) for t in range(len(x))]
        return net.logits(x[-1])

    def step(self, token):
        """Feeds one token; returns the logits of the next."""
        net, scale = self.net, 1 / math.sqrt(self.net.head_dim)
        G, position = net.query_heads // net.heads, self.length + self.drawn - 1
        x = net.embedding[token]
        for layer, w in enumerate(net.layers):
            h = net.rms(x, w["attention_norm"])
            q, k, v = (net.heads_of(layer, name, h, position) for name in "qkv")
            attended = []
            for head in range(net.heads):
                page = self.current[layer][head]
                page.keys.append(k[head])
                page.values.append(v[head])
                queries = q[head * G : head * G + G]
                prompt, kept = self.method.reads(
                    self.prompt[layer][head], self.kept[layer][head], queries
                )
                pages = [*prompt, *kept, page]
                keys = np.concatenate([page.keys for page in pages])
                values = np.concatenate([page.values for page in pages])
                shares = [_softmax(keys @ one * scale) for one in queries]
                attended += [share @ values for share in shares]
                start = 0
                for page in pages:
                    part = slice(start, start + len(page.keys))
                    page.seen.append(np.array([np.sum(share[part]) for share in shares]))
                    start = part.stop
            x = net.rest_of_layer(layer, x, attended)
        self.drawn += 1
        return net.logits(x)

    def boundary(self, kept_by_library, draws):
        """The current page is full: what goes must be what the library let go.

        Args:
          kept_by_library: (layer, head) → numbers of the pages that it kept.
          draws: (layer, head, page) → the random number of that page.

        Returns:
          How many pages went.
        """
        dropped = 0
        for layer, new in enumerate(self.current):
            for head, page in enumerate(new):
                page.began = len(page.seen)
                self.kept[layer][head].append(page)
        self.method.look(self)
        for layer, new in enumerate(self.current):
            heads = [list(kept) for kept in self.kept[layer]]
            for head, kept in enumerate(heads):
                wanted = kept_by_library(layer, head)
                dropped += self._compare(layer, head, heads, kept, new[head], wanted, draws)
        self._begin()
        return dropped

    def _compare(self, layer, head, heads, kept, new, wanted, draws):
        method = self.method
        size = len(kept)
        if size > method.pages and size >= method.pages + max(1, method.buffer):
            size = method.pages
        stays = [page for page in kept if page.number in wanted]
        goes = [page for page in kept if page.number not in wanted]
        assert len(wanted) == len(stays) == size
        self.kept[layer][head] = stays
        if not goes:
            return 0
        tied = method.tied(kept, new)
        safe = [page for page in [*method.protected(kept, new), new] if page not in tied]
        candidates = [page for page in kept if page not in safe and page not in tied]
        goes = [page for page in goes if page not in tied]
        if not goes:
            return 1
        assert not [page for page in goes if page in safe], "a protected page went"
        scores = method.scores(
            heads, head, candidates, lambda page: draws(layer, 0 if method.layered else head, page)
        )
        scores = dict(zip(candidates, scores, strict=True))
        left = [scores[page] for page in candidates if page in stays]
        # Float32 may swap pages whose scores are almost the same.
        margin = 1e-4 * max(map(abs, scores.values())) + 1e-12
        assert not left or max(scores[page] for page in goes) <= min(left) + margin, "not the least"
        return len(goes)
