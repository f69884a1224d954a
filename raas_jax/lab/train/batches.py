"""Training and validation batches: fixed shapes, and every row a function of its index alone."""

import dataclasses
import random

import numpy as np

from raas_jax import checks
from raas_jax.lab.limits import MOST_DEFINITIONS, MOST_ROWS, check_counts
from raas_jax.lab.tasks.lemma.draws import Knobs, draw
from raas_jax.lab.tasks.lemma.problems import Problem
from raas_jax.lab.tasks.lemma.tokenizer import BOS_ID, EOS_ID, PAD_ID, encode


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Problems of similar size, in rows of one length, so that each bucket compiles once."""

    smallest: int  # definitions
    largest: int
    tokens: int  # of a row, T
    rows: int  # of a batch, B
    late_share: float = 0.25  # of the problems that get late facts

    def __post_init__(self) -> None:
        check_counts(self, smallest=(1, MOST_DEFINITIONS), largest=(1, MOST_DEFINITIONS))
        check_counts(self, tokens=(1, checks.MOST_TOKENS), rows=(1, MOST_ROWS))
        checks.real("late_share", self.late_share, "a share from 0 to 1", 0, 1)
        checks.integer("smallest", self.smallest, 1, self.largest)
        # 6 words of prompt and 14 of derivation for each definition, less for literals; the few
        # problems that are longer than their row are drawn again.
        if self.tokens < 19 * self.largest + 8:
            raise ValueError(
                f"tokens={self.tokens}: a row must hold a problem of largest={self.largest} "
                f"definitions; wanted at least {19 * self.largest + 8}"
            )

    def knobs(self, source: random.Random) -> Knobs:
        most = min(4, self.smallest // 4)
        late = source.randint(1, most) if most and source.random() < self.late_share else 0
        # People ask for any name, and type more literals than long problems have.
        question = 1.0 if source.random() < 0.2 else 0.25
        literals = source.uniform(0.1, 0.5) if self.largest <= 20 else 0.15
        return Knobs(
            self.smallest,
            self.largest,
            literal_share=literals,
            late_facts=late,
            question_share=question,
        )


@dataclasses.dataclass(frozen=True)
class Batch:
    """Rows of `<bos>` prompt derivation `<eos>`, several problems to a row where they fit."""

    tokens: np.ndarray  # [B, T + 1] int32; inputs are [:, :-1], targets [:, 1:]
    positions: np.ndarray  # [B, T] int32, from 0 in each problem
    segments: np.ndarray  # [B, T] int32, 1, 2, ... by problem, 0 where nothing is
    scored: np.ndarray  # [B, T] bool, targets that belong to a derivation
    problems: int


def row_ids(problem: Problem) -> tuple[list[int], int]:
    """Token ids of a whole problem, and how many of them are `<bos>` and prompt."""
    prompt = [BOS_ID, *encode(problem.prompt_words)]
    return [*prompt, *encode(problem.derivation_words), EOS_ID], len(prompt)


def batch(bucket: Bucket, split: str, seed: int, index: int) -> Batch:
    """Batch `index` of a stream: the same whenever and wherever it is asked for."""
    rows, length = bucket.rows, bucket.tokens
    tokens = np.full((rows, length + 1), PAD_ID, np.int32)
    positions = np.zeros((rows, length), np.int32)
    segments = np.zeros((rows, length), np.int32)
    scored = np.zeros((rows, length), bool)
    source = random.Random(f"batch/{split}/{seed}/{index}/{bucket}")
    problems = 0
    for row in range(rows):
        used, segment = 0, 0
        while True:
            problem = draw(split, source.getrandbits(48), 0, bucket.knobs(source))
            ids, prompt = row_ids(problem)
            end = used + len(ids)
            if end > length + 1:
                if not used:
                    continue
                break
            segment += 1
            problems += 1
            tokens[row, used:end] = ids
            positions[row, used:end] = np.arange(len(ids))[: length - used]
            segments[row, used:end] = segment
            scored[row, used + prompt - 1 : end - 1] = True
            used = end
    return Batch(tokens, positions, segments, scored, problems)
