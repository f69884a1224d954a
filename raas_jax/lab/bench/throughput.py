"""What the engine gains: against plain batches, against transformers, over time, by sharing.

Everything is compiled before it is timed.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

import raas_jax
from raas_jax import checks, tokenizer
from raas_jax.admission import empty_admissions
from raas_jax.engine import Engine, Request
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.lab.bench.turns import (
    Contender,
    TimedDecode,
    check_positive,
    median_ratio,
    take_turns,
    timed,
)
from raas_jax.lab.limits import MOST_PROBLEMS
from raas_jax.lab.tasks.lemma import Knobs, Problem, draw, grade
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Policy, bucket, pages_for
from raas_jax.sampling import Sampler, Sampling
from raas_jax.session import Session

SLACK = 32  # Tokens that an answer may have beyond twice the longest right one's.


@dataclasses.dataclass
class Throughput:
    """One way to answer all problems."""

    how: str
    prompts: int
    right: int | None  # answers that are right; None where nobody knows
    tokens: int  # generated in all
    seconds: float  # from the first prompt to the last answer; the median over the turns
    row_steps: int | None  # token steps times rows; None where they were not counted
    useful: float | None  # share of the row-steps that gave a token of an answer

    @property
    def per_minute(self) -> float:
        """Prompts answered in a minute."""
        return 60 * self.prompts / self.seconds


@dataclasses.dataclass
class Age:
    """Time per step of rows that have run for long, beside rows that just filled the budget."""

    rows: int  # in each of the two batches
    young: int  # tokens that the rows of one have generated
    old: int
    young_ms: float  # median milliseconds per step
    old_ms: float
    ratio: float  # median of old over young, turn by turn


@dataclasses.dataclass
class Sharing:
    """`samples` answers to each prompt, with one copy of the prompt and with one for each row."""

    rows: int
    samples: int
    prompt_tokens: int
    shared_bytes: int  # of the prompts' keys and values, in layers that see everything
    unshared_bytes: int
    shared_ms: float  # median milliseconds per step
    unshared_ms: float
    ratio: float  # median of shared over unshared, turn by turn


def mixed_problems(count: int, smallest: int, largest: int, seed: int = 0) -> list[Problem]:
    """Test problems of mixed sizes, in the order in which they are drawn."""
    checks.integer("problems", count, 1, MOST_PROBLEMS)
    return [draw("test", seed, index, Knobs(smallest, largest)) for index in range(count)]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is answered.

    Attributes:
      ids: token ids of every prompt.
      limit: tokens of an answer at most.
      right: how many of the answers, token ids in the order of the prompts, are right.
    """

    ids: list[list[int]]
    limit: int
    right: Callable[[list[list[int]]], int] | None = None

    @classmethod
    def lemma(cls, params: Params, problems: Sequence[Problem]) -> Work:
        """Problems of which the model knows how to write the derivation."""
        ids = tokenizer.encode(params, [problem.prompt for problem in problems])[0]

        def right(answers: list[list[int]]) -> int:
            texts = (tokenizer.decode(params, answer) for answer in answers)
            return sum(
                grade(problem, text).answer for problem, text in zip(problems, texts, strict=True)
            )

        longest = max(len(problem.derivation_words) for problem in problems)
        return cls(ids, 2 * longest + SLACK, right)


def throughput(
    params: Params,
    work: Work,
    policy: Policy,
    *,
    rows: int,
    turns: int = 1,
    transformers: bool = False,
    progress: bool = False,
) -> list[Throughput]:
    """Answers the prompts greedily, by the engine and by plain padded batches of as many rows.

    The plain batches are `raas_jax.generate` over the prompts in the order in which they come: a
    batch ends when its longest answer does. With `transformers`, also the batched generate of
    Hugging Face on the same weights, dense, in the same batches, padded at the left.
    """
    check_positive(rows=rows, turns=turns)
    ids, limit = work.ids, work.limit
    longest = max(map(len, ids))
    engine = Engine(
        params, policy=policy, rows=rows, max_new_tokens=limit, max_prompt_tokens=longest
    )
    engine.warm_up()
    # Batches whose longest prompts share a bucket share a program; one of each compiles it.
    batches = [slice(first, first + rows) for first in range(0, len(ids), rows)]
    ways: dict[str, Callable[[], list[list[int]]]] = {
        "engine": partial(_by_engine, engine, ids, limit),
        "plain batches": partial(_by_batches, params, policy, ids, limit, batches),
    }
    shapes = {
        (len(ids[batch]), bucket(pages_for(max(map(len, ids[batch])), policy.page_size))): batch
        for batch in batches
    }
    _by_batches(params, policy, ids, limit, list(shapes.values()))
    if transformers:
        baseline = _Transformers(params)
        baseline.answer(ids, 16, batches[:1])
        ways["transformers"] = partial(baseline.answer, ids, limit, batches)
    answers: dict[str, list[list[int]]] = {}

    def seconds(how: str) -> float:
        return timed(lambda: answers.update({how: ways[how]()}))[1]

    contenders = [Contender(how, limit, partial(seconds, how)) for how in ways]
    times = take_turns(contenders, turns, progress)
    steps = _batch_steps(answers["plain batches"], batches, policy.page_size)
    counted = {"engine": engine.usage.row_steps // turns, "plain batches": steps * rows}
    found = []
    for how, of_turns in zip(ways, times, strict=True):
        drawn, row_steps = sum(map(len, answers[how])), counted.get(how)
        right = work.right(answers[how]) if work.right else None
        # The first token of each answer comes from the prompt.
        useful = None if row_steps is None else (drawn - len(ids)) / row_steps
        seconds_taken = statistics.median(of_turns)
        found.append(Throughput(how, len(ids), right, drawn, seconds_taken, row_steps, useful))
    return found


def _by_engine(engine: Engine, ids: list[list[int]], limit: int) -> list[list[int]]:
    offset = engine.usage.prompts  # Every run of this engine needs names of its own.
    requests = (
        Request(offset + index, prompt, max_new_tokens=limit) for index, prompt in enumerate(ids)
    )
    found = {int(result.id) - offset: result.tokens for result in engine.run(requests)}
    return [found[index] for index in range(len(ids))]


def _by_batches(
    params: Params, policy: Policy, ids: list[list[int]], limit: int, batches: list[slice]
) -> list[list[int]]:
    return [
        list(output.tokens)
        for batch in batches
        for output in raas_jax.generate(
            params, ids[batch], policy=policy, max_new_tokens=limit, progress=False
        )
    ]


def _batch_steps(answers: list[list[int]], batches: list[slice], page_size: int) -> int:
    """Token steps of the plain batches: whole syncs of `generate` to each longest answer."""
    sync = max(1, TOKENS_PER_SYNC // page_size) * page_size
    return sum(pages_for(max(map(len, answers[batch])) - 1, sync) * sync for batch in batches)


class _Transformers:
    """Hugging Face's generate on the same weights, on the CPU."""

    def __init__(self, params: Params):
        import torch
        from transformers import AutoModelForCausalLM

        assert params.source is not None
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(
            params.source, dtype=getattr(torch, params.dtype.name)
        )
        self._model.eval()
        self._stops = list(tokenizer.stop_token_ids(params))

    def answer(self, ids: list[list[int]], limit: int, batches: list[slice]) -> list[list[int]]:
        found = []
        for batch in batches:
            prompts = ids[batch]
            longest = max(map(len, prompts))
            tokens = self._torch.zeros((len(prompts), longest), dtype=self._torch.long)
            mask = self._torch.zeros_like(tokens)
            for row, prompt in enumerate(prompts):
                tokens[row, longest - len(prompt) :] = self._torch.tensor(prompt)
                mask[row, longest - len(prompt) :] = 1
            with self._torch.inference_mode():
                out = self._model.generate(
                    input_ids=tokens,
                    attention_mask=mask,
                    max_new_tokens=limit,
                    do_sample=False,
                    eos_token_id=self._stops,
                    pad_token_id=0,
                )
            for row in out[:, longest:].tolist():
                stops = (place for place, token in enumerate(row) if token in self._stops)
                found.append(row[: next(stops, len(row)) + 1])
        return found


def age(params: Params, policy: Policy, *, rows: int = 64, old: int = 4096, turns: int = 15) -> Age:
    """Time per step of a batch that has filled its budget, and of one at `old` tokens."""
    check_positive(rows=rows, old=old, turns=turns)
    young = getattr(policy, "budget", 0) + 2 * policy.page_size
    begin = partial(_begun, params, policy, rows, 1, 64)
    old_ms, young_ms, ratio = _in_turn(turns, old=begin().after(old), young=begin().after(young))
    return Age(rows, young, old, young_ms, old_ms, ratio)


def sharing(
    params: Params,
    policy: Policy,
    *,
    rows: int = 64,
    samples: int = 16,
    prompt_tokens: int = 1024,
    turns: int = 15,
) -> Sharing:
    """Bytes and time per step of a batch whose rows share prompts, and of one whose do not.

    Raises ValueError unless the rows are a multiple of `samples`.
    """
    check_positive(rows=rows, samples=samples, prompt_tokens=prompt_tokens, turns=turns)
    if rows % samples:
        raise ValueError(f"rows is {rows}; it must be a multiple of samples, {samples}.")
    shared, unshared = (
        _begun(params, policy, rows, each, prompt_tokens).after(1) for each in (samples, 1)
    )
    prompts = shared.state.cache.prompt, unshared.state.cache.prompt
    shared_bytes, unshared_bytes = (prompt.k.nbytes + prompt.v.nbytes for prompt in prompts)
    timing = _in_turn(turns, shared=shared, unshared=unshared)
    return Sharing(rows, samples, prompt_tokens, shared_bytes, unshared_bytes, *timing)


def _in_turn(turns: int, **batches: TimedDecode) -> tuple[float, float, float]:
    """Median milliseconds per step of two batches, and the median ratio of first to second."""
    contenders = [Contender(name, 1, batch.time_chunk) for name, batch in batches.items()]
    times = take_turns(contenders, turns)
    one, other = (1e3 * statistics.median(of_batch) for of_batch in times)
    return one, other, median_ratio(*times)


def _begun(params: Params, policy: Policy, rows: int, samples: int, length: int) -> TimedDecode:
    """Rows as an engine has them, which never end, with random prompts of one length."""
    bucket = pages_for(length, policy.page_size) * policy.page_size
    plan = Plan.create(params.config, policy, [1], 2**20, samples, longest=bucket)
    session = Session(params, plan, rows)
    state, rng = session.empty(), np.random.default_rng(0)
    for group in range(rows // samples):
        # One by one, as the engine reads them: all at once would take more memory than they leave.
        admissions = empty_admissions(1, bucket, samples)
        admissions.tokens[:, :length] = rng.integers(3, params.config.vocab_size, (1, length))
        admissions.lengths[:] = length
        admissions.groups[:] = admissions.seed[:] = group
        admissions.new_prompt[:] = admissions.fresh[:] = True
        admissions.sample[:] = np.arange(samples)
        admissions.limit[:] = 2**30
        sampler = Sampler.create([Sampling(1.0)], None)
        state, _ = session.admit(state, admissions._replace(sampler=sampler))
    return TimedDecode(session, state, pages=2)
