"""What a comparison found: figures with intervals, for all text, by kind and along the text.

The loss at a token is like that of its neighbours, and texts differ from each other. So intervals
come from a bootstrap in two stages: texts are drawn within their kind, and blocks of positions
within each text. All policies are looked at under the same draws, so that differences are paired.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from raas_jax.lab.fidelity.run import BLOCK, block_starts
from raas_jax.lab.runs.layout import DENSE
from raas_jax.lab.runs.results import Results
from raas_jax.lab.runs.statistics import Estimate

DRAWS, SEED = 2000, 0
MEASURES = ("kl", "excess", "agree")
"""KL from dense; negative log-likelihood over that of dense; share of equal likeliest tokens."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """A policy at a budget: sums over blocks, on the texts that are finished.

    Attributes:
      label: what tables call it, with its nominal budget.
      policy: without the budget.
      budget: nominal; None for a policy without one.
      own_budget: the policy's own, at equal bytes.
      bytes: of a row's keys, values and metadata.
      texts: places of the finished texts in `Findings.texts`.
      sums: by measure, float64 `[texts, blocks]`.
      seconds: a text, in its batch.
    """

    label: str
    policy: str
    budget: int | None
    own_budget: int
    bytes: int
    texts: list[int]
    sums: dict[str, np.ndarray]
    seconds: float


class Findings:
    """All that a folder has, finished or not.

    Attributes:
      model, dtype, reference: of the run; the policy that gave the bytes.
      prompt_tokens, length: of each text.
      texts: kind and name of each.
      kinds: in their order.
      tokens: how many of them each block has, `[blocks]`.
      starts: position at which each block begins, `[blocks]`.
      points: those that have samples.
      dense_nll: sums of the dense model's negative log-likelihood, `[texts, blocks]`.
    """

    def __init__(self, results: Results):
        config = results.layout.config
        self.model, self.dtype = config.text("model"), config.text("dtype")
        self.reference: str = config.text("reference")
        self.prompt_tokens: int = config.integer("prompt_tokens", 1)
        self.length: int = config.integer("length", 2)
        if config.integer("block", 1) != BLOCK:
            raise config.error(f"block is not {BLOCK}")
        self.texts = [(text.text("kind"), text.text("name")) for text in config.each("texts")]
        self.kinds = list(dict.fromkeys(kind for kind, _ in self.texts))
        first = self.prompt_tokens + 1
        self.starts = block_starts(first, self.length)
        self.tokens = np.diff([*self.starts, self.length]).astype(np.float64)
        dense = self._read(results, DENSE)
        self.dense_nll = self._rows(dense, "nll")
        self.points = []
        for point in config.each("points"):
            label = point.text("label")
            samples = self._read(results, label)
            texts = [place for place, sample in enumerate(samples) if sample and dense[place]]
            if texts:
                nll = self._rows(samples, "nll") - self.dense_nll
                sums = {
                    "kl": self._rows(samples, "kl"),
                    "excess": nll,
                    "agree": self._rows(samples, "agree"),
                }
                given = [sample for sample in samples if sample]
                self.points.append(
                    Measured(
                        label,
                        point.text("Policy"),
                        point.integer("budget", 1, default=None),
                        point.integer("own_budget", 0),
                        point.integer("bytes", 0, 2**63 - 1),
                        texts,
                        sums,
                        sum(sample["seconds"] for sample in given) / len(given),
                    )
                )
        self.policies = list(dict.fromkeys(point.policy for point in self.points))

    @property
    def half(self) -> int:
        """Where the second half of a text begins."""
        return self.length // 2

    def ordered(self) -> list[Measured]:
        """The points by budget, and then the least loss first."""

        def loss(point: Measured) -> float:
            found = self.estimate(point, "kl", since=self.half)
            return found.value if found else 0.0

        return sorted(self.points, key=lambda point: (point.budget or 0, loss(point)))

    def _read(self, results: Results, label: str) -> list[dict[str, Any] | None]:
        found: list[dict[str, Any] | None] = []
        for kind, name in self.texts:
            sample = results.samples.get((kind, label, name, "0"))
            wanted = len(self.starts)
            whole = sample and all(len(sample[each]) == wanted for each in ("nll", "kl", "agree"))
            found.append(sample if whole else None)
        return found

    def _rows(self, samples: Sequence[dict[str, Any] | None], name: str) -> np.ndarray:
        nothing = [0.0] * len(self.starts)
        return np.asarray([sample[name] if sample else nothing for sample in samples], np.float64)

    def find(self, policy: str, budget: int | None) -> Measured | None:
        """The point of a policy at a budget."""
        found = (p for p in self.points if (p.policy, p.budget) == (policy, budget))
        return next(found, None)

    def estimate(
        self,
        point: Measured,
        measure: str,
        minus: Measured | None = None,
        kind: str | None = None,
        since: int = 0,
        until: int | None = None,
    ) -> Estimate | None:
        """A mean over tokens, with its 95 % interval; None where there is nothing.

        Args:
          point: of which policy.
          measure: one of `MEASURES`.
          minus: another policy, on the texts that both have, whose mean is taken off.
          kind: of the texts; None for all.
          since, until: positions, of whole blocks.
        """
        texts = [
            place
            for place in point.texts
            if (minus is None or place in minus.texts) and kind in (None, self.texts[place][0])
        ]
        until = self.length if until is None else until
        blocks = (self.starts >= min(since, self.starts[-1])) & (self.starts < until)
        if not texts or not blocks.any():
            return None
        sums = point.sums[measure] - (0.0 if minus is None else minus.sums[measure])
        part, tokens = sums[texts][:, blocks], self.tokens[blocks]
        kinds = tuple(self.texts[place][0] for place in texts)
        draws = _draws(kinds, int(blocks.sum()))
        drawn = np.einsum("rtb,tb->r", draws, part) / np.einsum("rtb,b->r", draws, tokens)
        low, high = np.quantile(drawn, (0.025, 0.975))
        value = float(part.sum() / (len(texts) * tokens.sum()))
        return Estimate(value, float(low), float(high))


@functools.lru_cache(maxsize=32)
def _draws(kinds: tuple[str, ...], blocks: int) -> np.ndarray:
    """How often each block of each text is drawn, float32 `[DRAWS, texts, blocks]`."""
    rng, found = np.random.default_rng(SEED), np.zeros((DRAWS, len(kinds), blocks), np.float32)
    for kind in dict.fromkeys(kinds):
        places = [place for place, each in enumerate(kinds) if each == kind]
        times = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=DRAWS)
        for place, drawn in zip(places, times.T, strict=True):
            found[:, place] = rng.multinomial(drawn * blocks, np.full(blocks, 1 / blocks))
    return found
