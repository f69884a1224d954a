"""Milestones of a derivation as it was written, and whether the cache still had them.

A milestone is a stated value (`c 3`) that is looked up later (see `raas_jax.lemma.liveness`). At
the step that draws the value of a look-up, the look-up is *served* in a layer and key/value head
if one of the name's earlier values can be read there. `recall` is the share of (look-up, layer,
head) that are served: 1 when nothing is evicted. What stands in the prompt does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from raas_jax.evaluate.recording import Recording
from raas_jax.lemma.language import DIGITS, NAMES
from raas_jax.lemma.liveness import Liveness, Lookup, liveness
from raas_jax.lemma.problems import Problem


class Recall(NamedTuple):
    """Look-ups of one derivation, up to and with the first token that is not the right one.

    Attributes:
      lookups: how many there were.
      served: their shares of layers and heads that had a source, summed.
      served_anywhere: how many had one in at least one layer and head.
    """

    lookups: int
    served: float
    served_anywhere: int


def recall(problem: Problem, recording: Recording, words: Sequence[str]) -> Recall:
    """Counts the look-ups of a derivation that were served.

    What a model writes after its first slip is no longer the derivation whose needs are known, so
    counting ends there; a look-up that goes wrong is itself counted.

    Args:
      problem: what was asked.
      recording: of the answer.
      words: of the answer, one for each token.
    """
    marks, right = liveness(problem), problem.derivation_words
    together = min(len(words), len(right))
    slip = next((i for i in range(together) if words[i] != right[i]), together)
    lookups = [each for each in marks.lookups if each.position - marks.prompt_tokens <= slip]
    served, anywhere, count = 0.0, 0, 0
    for lookup in lookups:
        token = lookup.position - marks.prompt_tokens
        if token >= len(recording.tokens):
            break
        count += 1
        sources = (source - marks.prompt_tokens for source in lookup.sources)
        held = np.any([recording.held(token, source) for source in sources], axis=0)
        served += float(held.mean())
        anywhere += bool(held.any())
    return Recall(count, served, anywhere)


def written(prompt_tokens: int, words: Sequence[str]) -> Liveness:
    """Marks of a derivation as a model wrote it, right or wrong.

    For the right derivation they are those of `liveness`. A name with a digit right after it is a
    statement; it looks up the statements of that name before it, if there are any.

    Args:
      prompt_tokens: tokens before the derivation.
      words: of the derivation, one for each token.
    """
    needed_until = [-1] * (prompt_tokens + len(words))
    starts: list[int] = []
    lookups: list[Lookup] = []
    stated: dict[str, list[int]] = {}
    for index, word in enumerate(words):
        position = prompt_tokens + index
        if index == 0 or words[index - 1] == ";":
            starts.append(position)
        if index == 0 or word not in DIGITS or words[index - 1] not in NAMES:
            continue
        name = words[index - 1]
        if name in stated:
            lookups.append(Lookup(position, name, tuple(stated[name])))
            for served in (stated[name][-1] - 1, stated[name][-1]):
                needed_until[served] = position
        stated.setdefault(name, []).append(position)
    return Liveness(prompt_tokens, tuple(starts), tuple(needed_until), tuple(lookups))
