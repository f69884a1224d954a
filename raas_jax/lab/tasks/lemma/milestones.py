"""Milestones of a derivation as it was written, and whether the cache still had them.

A milestone is a stated value (`c 3`) that is looked up later (see
`raas_jax.lab.tasks.lemma.liveness`). At the step that draws the value of a look-up, the look-up is
*served* in a layer and key/value head if one of the name's earlier values can be read there.
`recall` is the share of (look-up, layer, head) that are served: 1 when nothing is evicted. What
stands in the prompt does not count as a source.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raas_jax.lab.inspect.recording import Recording
from raas_jax.lab.tasks.lemma.liveness import Liveness, Lookup, liveness, written
from raas_jax.lab.tasks.lemma.problems import Problem

__all__ = ["Recall", "recall", "written"]


class Recall(NamedTuple):
    """Look-ups of one answer.

    The first three fields end with the first token that is not the right one: until then it is
    known what is needed. They flatter a policy under which answers go wrong early. The last two
    count the whole answer, taking what the model wrote for what it wanted (see `written`).

    Attributes:
      lookups: how many there were.
      served: their shares of layers and heads that had a source, summed.
      served_anywhere: how many had one in at least one layer and head.
      written_lookups, written_served: as `lookups` and `served`, of the whole answer.
    """

    lookups: int
    served: float
    served_anywhere: int
    written_lookups: int
    written_served: float


def recall(problem: Problem, recording: Recording, words: Sequence[str]) -> Recall:
    """Counts the look-ups of a derivation that were served; one that goes wrong is counted too.

    `words` are those of the answer, one for each token.
    """
    marks, right = liveness(problem), problem.derivation_words
    together = min(len(words), len(right))
    first_error = next((i for i in range(together) if words[i] != right[i]), together)
    last = marks.prompt_tokens + min(first_error, len(recording.tokens) - 1)
    shares = _shares([each for each in marks.lookups if each.position <= last], marks, recording)
    whole = written(marks.prompt_tokens, words)
    all_shares = _shares(whole.lookups, whole, recording)
    return Recall(
        lookups=len(shares),
        served=sum(shares),
        served_anywhere=sum(share > 0 for share in shares),
        written_lookups=len(all_shares),
        written_served=sum(all_shares),
    )


def _shares(lookups: Sequence[Lookup], marks: Liveness, recording: Recording) -> list[float]:
    """For each look-up, the share of layers and heads that can read one of its sources."""
    if lookups and not recording.present.shape[1]:
        raise ValueError(
            "recording has no layers that see everything, whose pages look-ups are served from; "
            "use a model that has some."
        )
    first = marks.prompt_tokens
    return [
        float(
            np.any(
                [recording.held(lookup.position - first, each - first) for each in lookup.sources],
                axis=0,
            ).mean()
        )
        for lookup in lookups
    ]
