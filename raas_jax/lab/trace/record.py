"""One derivation in full: tokens, attention of chosen heads, pages, stamps and milestones."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from raas_jax import checks, tokenizer
from raas_jax.decode import dense_bytes
from raas_jax.lab.inspect.recording import Recording, record, row_bytes
from raas_jax.lab.inspect.replay import replay
from raas_jax.lab.tasks.lemma import Liveness, Problem, parse_problem
from raas_jax.lab.tasks.lemma.milestones import written
from raas_jax.lab.tasks.lemma.task import answer_limit, reads_lemma
from raas_jax.params import Params
from raas_jax.policies import Policy
from raas_jax.windows import check_some_see_all

Head = tuple[int, int]
"""A layer, counted among those that see everything, and one of its key/value heads, from 0."""
FAR = 8  # Tokens; attention that reaches further back than this is not about the wording.


@dataclasses.dataclass(frozen=True)
class Trace:
    """What one answer did with its cache.

    Attributes:
      words: text of every token, prompt and answer.
      prompt_tokens: number of them that are the prompt.
      attention: for each chosen head float32 `[G, T]`: as token `g` of the answer was drawn, the
        share that position `t` received.
      milestones: what the answer looks up and when; None for a text that is no lemma derivation.
      problem: what was asked, if it is a problem of `raas_jax.lab.tasks.lemma`.
      kv_bytes, dense_kv_bytes: what the cache takes, and what the tokens would take undropped.
      layer: what a layer is called: a full one, where others see a window and are not counted.
    """

    policy: Policy
    words: tuple[str, ...]
    prompt_tokens: int
    recording: Recording
    attention: dict[Head, np.ndarray]
    milestones: Liveness | None
    problem: Problem | None
    kv_bytes: int
    dense_kv_bytes: int
    layer: str

    @property
    def generated(self) -> tuple[str, ...]:
        """The words of the answer."""
        return self.words[self.prompt_tokens :]

    @property
    def pages(self) -> int:
        """Pages of the answer."""
        return int(self.recording.present.shape[0])

    @property
    def first_error(self) -> int | None:
        """Index in the answer of the first token that is not the right one; None if all are."""
        if self.problem is None:
            return None
        right = self.problem.derivation_words
        for index, (word, wanted) in enumerate(zip(self.generated, right, strict=False)):
            if word != wanted:
                return index
        if len(self.generated) > len(right):
            return None if self.recording.finish_reason == "stop" else len(right)
        return len(self.generated)

    def evicted(self, head: Head | None = None) -> int:
        """Pages that were forgotten in one head, or in the one that forgot most."""
        if not self.pages:
            return 0
        gone = self.pages - self.recording.present[-1].sum(-1)
        return int(gone.max() if head is None else gone[head])

    def share_held(self, token: int, sources: Sequence[int]) -> float:
        """Share of layers and heads that can read one of the positions as `token` is drawn."""
        first = self.prompt_tokens
        held = [self.recording.held(token, source - first) for source in sources]
        return float(np.any(held, axis=0).mean())


def trace(
    params: Params,
    prompt: str,
    policy: Policy,
    *,
    heads: Sequence[Head] | None = None,
    max_new_tokens: int | None = None,
) -> Trace:
    """Answers a prompt greedily under a policy and records what happened.

    Args:
      params: the model, with its tokenizer.
      prompt: text.
      policy: which pages to keep.
      heads: those whose attention to keep; by default those of `choose_heads`.
      max_new_tokens: most tokens of the answer; by default, for a lemma problem half as much again
        as the right derivation takes, else what the context leaves, at most 4096.

    Raises:
      ValueError: a head that the model does not have, a number out of range, an empty prompt, a
        policy that cannot take it, or a model all of whose layers see a window.
    """
    config = params.config
    check_some_see_all(config)
    if max_new_tokens is not None:
        max_new_tokens = checks.integer("max_new_tokens", max_new_tokens, 1, checks.MOST_TOKENS)
    for layer, head in heads or ():
        if not (0 <= layer < config.full_layers and 0 <= head < config.num_key_value_heads):
            kind = " that see everything" if config.window_layers else ""
            raise ValueError(
                f"heads has {layer}.{head}, which does not exist; layers{kind} are 0 to "
                f"{config.full_layers - 1}, key/value heads 0 to "
                f"{config.num_key_value_heads - 1}."
            )
    problem = problem_of(params, prompt)
    ids = tokenizer.encode(params, prompt)[0][0]
    room = min(4096, max(1, config.context - len(ids)))
    limit = max_new_tokens or (room if problem is None else answer_limit(problem))
    stops = tokenizer.stop_token_ids(params)
    found = record(params, [ids], [limit], policy, stop_tokens=stops, every_step=True)
    _, recording = next(iter(found))
    vocabulary = tokenizer.load(params)
    words = tuple(vocabulary.decode([token]) for token in [*ids, *recording.tokens])
    milestones = None if problem is None else written(len(ids), words[len(ids) :])
    attention = {
        (layer, head): of_layer[head]
        for layer, of_layer in replay(params, ids, recording)
        for head in range(config.num_key_value_heads)
        if heads is None or (layer, head) in heads
    }
    if heads is None:
        heads = choose_heads(attention, len(ids), milestones)
    dtype = params.dtype
    return Trace(
        policy=policy,
        words=words,
        prompt_tokens=len(ids),
        recording=recording,
        attention={head: attention[head] for head in heads},
        milestones=milestones,
        problem=problem,
        kv_bytes=row_bytes(config, policy, len(ids), limit, dtype.name),
        dense_kv_bytes=dense_bytes(config, len(ids) + len(recording.tokens), dtype),
        layer="full layer" if config.window_layers else "layer",
    )


def problem_of(params: Params, prompt: str) -> Problem | None:
    """The lemma problem that a prompt states, if it does and the model reads such problems."""
    try:
        problem = parse_problem(prompt)
    except ValueError:
        return None
    return problem if reads_lemma(params, problem) else None


def choose_heads(
    attention: dict[Head, np.ndarray], prompt_tokens: int, milestones: Liveness | None
) -> tuple[Head, ...]:
    """The head that looks up milestones most, and of the others the one that reads the prompt most.

    Where no milestones are known, the first is the head that looks furthest back into the answer.
    """

    def looks_up(head: Head) -> float:
        rows = attention[head]
        if milestones is None or not milestones.lookups:
            G, T = rows.shape
            distance = prompt_tokens + np.arange(G)[:, None] - np.arange(T)
            far = (distance > FAR) & (np.arange(T) >= prompt_tokens)
            return float(rows[far].sum())
        return sum(
            float(rows[each.position - prompt_tokens, list(each.sources)].sum())
            for each in milestones.lookups
        )

    def reads_prompt(head: Head) -> float:
        # Without the first token, on which idle heads rest.
        return float(attention[head][:, 1:prompt_tokens].sum())

    first = max(attention, key=looks_up)
    others = [head for head in attention if head != first]
    return (first, max(others, key=reads_prompt)) if others else (first,)
