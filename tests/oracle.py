"""RaaS by the book: a NumPy float64 oracle, from the paper and the docstring of `RaaS`.

It imports nothing from the library. It runs one sequence at a time, with plain loops over layers,
heads and pages; a kept page is an entry in a dictionary from slot number to page. Tokens are given
to it, never chosen by it. The network is the ordinary Llama / Qwen decoder, without a cache trick.
"""

from __future__ import annotations

import dataclasses
import fractions
import functools
import math
from collections.abc import Callable

import numpy as np

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Rules:
    """The options of RaaS.

    Attributes:
      shares: `[mean, layer, head]`, the pages of each head where they differ: of a budget of which
        each has so many on average.
      keep_all: a dense cache.
    """

    page_size: int
    budget: int = 0
    alpha: float = 0.0
    top_fraction: float | None = None
    score: str = "mass"
    granularity: str = "kv_head"
    prompt: str = "excluded"
    dense_layers: int = 0
    shares: Array | None = None
    keep_all: bool = False


@dataclasses.dataclass
class Page:
    """A page of generated tokens, keys and values `[P, H]`, when it was last attended, and made."""

    keys: Array
    values: Array
    stamp: int
    written: int


@dataclasses.dataclass
class Doubt:
    """Counts comparisons too close for float32 and float64 to agree on, and all of them.

    In doubt, the oracle takes the answer of the implementation under test. Equal scores are not in
    doubt: ties are part of the rules.
    """

    margin: float
    decisions: int = 0
    doubtful: int = 0

    def near(self, score: float, threshold: float) -> bool:
        return 0 < abs(score - threshold) <= self.margin * max(abs(score), abs(threshold))


class Network:
    """Weights in float64, and the parts of a decoder layer for a single token."""

    def __init__(self, weights: dict, *, theta: float, eps: float):
        double = functools.partial(np.asarray, dtype=np.float64)
        self.embedding = double(weights["embedding"])
        self.head = double(weights.get("head", weights["embedding"]))
        self.norm = double(weights["norm"])
        stacked = {name: double(value) for name, value in weights["layers"].items()}
        self.layers = [
            {name: value[index] for name, value in stacked.items()}
            for index in range(len(stacked["q"]))
        ]
        self.query_heads, self.head_dim = stacked["q"].shape[1:3]
        self.heads = stacked["k"].shape[1]
        self.theta, self.eps = theta, eps

    def rms(self, x: Array, weight: Array) -> Array:
        return weight * x / math.sqrt(float(np.mean(x * x)) + self.eps)

    def rotated(self, x: Array, position: int) -> Array:
        half = self.head_dim // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * self.theta ** (-2 * i / self.head_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            out[i] = x[i] * cos - x[i + half] * sin
            out[i + half] = x[i + half] * cos + x[i] * sin
        return out

    def heads_of(self, layer: int, name: str, h: Array, position: int) -> list[Array]:
        """Queries, keys (rotated) or values of one token, one `[H]` per head."""
        w = self.layers[layer]
        out = []
        for head in range(len(w[name])):
            x = w[name][head] @ h
            if f"{name}_bias" in w:
                x = x + w[f"{name}_bias"][head]
            if f"{name}_norm" in w:
                x = self.rms(x, w[f"{name}_norm"])
            out.append(x if name == "v" else self.rotated(x, position))
        return out

    def rest_of_layer(self, layer: int, x: Array, attended: list[Array]) -> Array:
        w = self.layers[layer]
        for head, value in enumerate(attended):
            x = x + w["o"][:, head * self.head_dim : (head + 1) * self.head_dim] @ value
        x = x + w.get("o_bias", 0)
        h = self.rms(x, w["mlp_norm"])
        gate = w["gate"] @ h + w.get("gate_bias", 0)
        up = w["up"] @ h + w.get("up_bias", 0)
        return x + w["down"] @ (gate / (1 + np.exp(-gate)) * up) + w.get("down_bias", 0)

    def logits(self, x: Array) -> Array:
        return self.head @ self.rms(x, self.norm)


class Sequence:
    """One sequence: its prompt, the pages kept of what it generated, and the page being written.

    Attributes:
      prompt: `[layer][head]` → (keys `[T, H]`, values `[T, H]`).
      kept: `[layer][head]` → slot number → `Page`.
      open: `[layer][head]` → (list of keys, list of values).
      drawn: number of tokens generated so far: the clock.
    """

    def __init__(self, network: Network, rules: Rules, prompt: list[int], doubt: Doubt):
        self.net, self.rules, self.doubt = network, rules, doubt
        self.length, self.drawn = len(prompt), 1

        def every(make):
            return [[make() for _ in range(network.heads)] for _ in network.layers]

        self.kept: list[list[dict[int, Page]]] = every(dict)
        self.open: list[list[tuple[list, list]]] = every(lambda: ([], []))
        self.prompt: list[list[tuple[Array, Array]]] = []
        self.first_logits = self._read(prompt)

    def _read(self, prompt: list[int]) -> Array:
        """Reads the prompt by plain causal attention; returns the logits after its last token."""
        net, group = self.net, self.net.query_heads // self.net.heads
        x = [net.embedding[token] for token in prompt]
        for layer, w in enumerate(net.layers):
            h = [net.rms(row, w["attention_norm"]) for row in x]
            q = [net.heads_of(layer, "q", row, t) for t, row in enumerate(h)]
            k = [net.heads_of(layer, "k", row, t) for t, row in enumerate(h)]
            v = [net.heads_of(layer, "v", row, t) for t, row in enumerate(h)]
            self.prompt.append(
                [
                    (np.array([k[t][head] for t in range(len(x))]),
                     np.array([v[t][head] for t in range(len(x))]))
                    for head in range(net.heads)
                ]
            )  # fmt: skip
            for t in range(len(x)):
                attended = []
                for n in range(net.query_heads):
                    keys, values = self.prompt[layer][n // group]
                    share = _softmax(keys[: t + 1] @ q[t][n] / math.sqrt(net.head_dim))
                    attended.append(share @ values[: t + 1])
                x[t] = net.rest_of_layer(layer, x[t], attended)
        return net.logits(x[-1])

    def step(self, token: int, in_doubt: Callable[[int, int, int], bool]) -> Array:
        """Feeds one token and stamps pages.

        Args:
          token: the last one drawn.
          in_doubt: (layer, head, slot) → whether the implementation stamped it; see `Doubt`.

        Returns:
          The logits of the next token.
        """
        net, group = self.net, self.net.query_heads // self.net.heads
        position = self.length + self.drawn - 1
        x = net.embedding[token]
        for layer, w in enumerate(net.layers):
            h = net.rms(x, w["attention_norm"])
            q = net.heads_of(layer, "q", h, position)
            k = net.heads_of(layer, "k", h, position)
            v = net.heads_of(layer, "v", h, position)
            attended, scores = [], []
            for head in range(net.heads):
                self.open[layer][head][0].append(k[head])
                self.open[layer][head][1].append(v[head])
                of_group = [self._attend(layer, head, q[head * group + g]) for g in range(group)]
                attended += [out for out, _, _ in of_group]
                which = 2 if self.rules.score == "bound" else 1
                scores.append(
                    {slot: max(one[which][slot] for one in of_group)
                     for slot in self.kept[layer][head]}
                )  # fmt: skip
            if not self._dense(layer):
                self._stamp(layer, scores, in_doubt)
            x = net.rest_of_layer(layer, x, attended)
        self.drawn += 1
        return net.logits(x)

    def boundary(self) -> dict[tuple[int, int], tuple[int, bool]]:
        """The page takes a slot: (layer, head) → (slot, whether a page was evicted for it)."""
        chosen = {}
        for layer in range(len(self.net.layers)):
            for head in range(self.net.heads):
                pages, (keys, values) = self.kept[layer][head], self.open[layer][head]
                assert len(keys) == self.rules.page_size
                if self._dense(layer) or len(pages) < self.capacity(layer, head):
                    slot = next(s for s in range(len(pages) + 1) if s not in pages)
                else:
                    oldest = min(page.stamp for page in pages.values())
                    tied = [s for s, page in pages.items() if page.stamp == oldest]
                    slot = min(tied, key=lambda s: pages[s].written)
                chosen[layer, head] = slot, slot in pages
                pages[slot] = Page(np.array(keys), np.array(values), self.drawn, self.drawn)
                self.open[layer][head] = [], []
        return chosen

    def capacity(self, layer: int, head: int) -> int:
        """Pages of generated tokens that fit, in a layer under the policy."""
        pages = self.rules.budget // self.rules.page_size
        if self.rules.prompt == "included":
            pages -= math.ceil(self.length / self.rules.page_size)
        shares = self.rules.shares
        return pages if shares is None else int(shares[pages][layer][head])

    def _dense(self, layer: int) -> bool:
        return self.rules.keep_all or layer < self.rules.dense_layers

    def _attend(
        self, layer: int, head: int, q: Array
    ) -> tuple[Array, dict[int, float], dict[int, float]]:
        """One query head: what it attended to, and each kept page's mass and bound."""
        P, scale = self.rules.page_size, 1 / math.sqrt(self.net.head_dim)
        keys, values = self.prompt[layer][head]
        pages: list[tuple[int | None, Array, Array]] = [
            (None, keys[start : start + P], values[start : start + P])
            for start in range(0, len(keys), P)
        ]
        pages += [(slot, page.keys, page.values) for slot, page in self.kept[layer][head].items()]
        pages.append((None, *(np.array(part) for part in self.open[layer][head])))
        share = _softmax(np.concatenate([keys @ q for _, keys, _ in pages]) * scale)
        out = share @ np.concatenate([values for _, _, values in pages])
        mass, start = {}, 0
        for slot, keys, _ in pages:
            if slot is not None:
                mass[slot] = float(np.sum(share[start : start + len(keys)]))
            start += len(keys)
        highest = [
            sum(max(q[h] * min(keys[:, h]), q[h] * max(keys[:, h])) for h in range(len(q)))
            for _, keys, _ in pages
        ]
        bounds = _softmax(np.array(highest) * scale)
        bound = {
            slot: float(bounds[index])
            for index, (slot, _, _) in enumerate(pages)
            if slot is not None
        }
        return out, mass, bound

    def _stamp(
        self,
        layer: int,
        scores: list[dict[int, float]],
        in_doubt: Callable[[int, int, int], bool],
    ) -> None:
        if self.rules.granularity == "layer":
            assert all(one.keys() == scores[0].keys() for one in scores)
            shared = {slot: max(one[slot] for one in scores) for slot in scores[0]}
            scores = [shared] * len(scores)
        for head, score in enumerate(scores):
            last, next_best = self._cut(score)
            for slot, page in self.kept[layer][head].items():
                self.doubt.decisions += 1
                if last is None:
                    attended = score[slot] > self.rules.alpha
                    close = self.doubt.near(score[slot], self.rules.alpha)
                else:
                    attended = score[slot] >= last
                    close = next_best is not None and self.doubt.near(last, next_best)
                    close = close and abs(score[slot] - last) <= 2 * self.doubt.margin * last
                if close:
                    self.doubt.doubtful += 1
                    attended = in_doubt(layer, head, slot)
                if attended:
                    page.stamp = self.drawn

    def _cut(self, score: dict[int, float]) -> tuple[float | None, float | None]:
        """The lowest score that the top fraction still holds, and the best that it does not."""
        if self.rules.top_fraction is None or not score:
            return None, None
        ranked = sorted(score.values(), reverse=True)
        # As written: 0.55 of 100 pages is 55, which floating point alone does not give.
        share = fractions.Fraction(str(self.rules.top_fraction))
        last = ranked[math.ceil(len(score) * share) - 1]
        return last, next((s for s in ranked if s < last), None)


def _softmax(x: Array) -> Array:
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)
