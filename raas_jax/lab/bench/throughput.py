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
from raas_jax import tokenizer
from raas_jax.admission import empty_admissions
from raas_jax.engine import Engine, Request
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.lab.bench.turns import Contender, TimedDecode, median_ratio, take_turns, timed
from raas_jax.lab.tasks.lemma import Knobs, Problem, draw, grade
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Policy, bucket, pages_for
from raas_jax.sampling import Sampler, Sampling
from raas_jax.session import Session

SLACK = 32  # Tokens that an answer may have beyond twice the longest right one's.


@dataclasses.dataclass
class Throughput:
    """One way to answer all problems.

    Attributes:
      how: its name.
      problems, right, tokens: problems, those answered rightly, and tokens generated.
      seconds: from the first problem to the last answer; the median over the turns.
      row_steps: token steps times rows; None where they were not counted.
      useful: share of the row-steps that gave a token of an answer.
    """

    how: str
    problems: int
    right: int
    tokens: int
    seconds: float
    row_steps: int | None
    useful: float | None

    @property
    def per_minute(self) -> float:
        """Problems answered in a minute."""
        return 60 * self.problems / self.seconds


@dataclasses.dataclass
class Age:
    """Time per step of rows that have run for long, beside rows that have just filled the budget.

    Attributes:
      rows: in each of the two batches.
      young, old: tokens that their rows had generated.
      young_ms, old_ms: median milliseconds per step.
      ratio: median of old over young, turn by turn.
    """

    rows: int
    young: int
    old: int
    young_ms: float
    old_ms: float
    ratio: float


@dataclasses.dataclass
class Sharing:
    """`samples` answers to each prompt, with one copy of the prompt and with one for each row.

    Attributes:
      rows, samples, prompt_tokens: of the batch.
      shared_bytes, unshared_bytes: of the prompts' keys and values.
      shared_ms, unshared_ms: median milliseconds per step.
      ratio: median of shared over unshared, turn by turn.
    """

    rows: int
    samples: int
    prompt_tokens: int
    shared_bytes: int
    unshared_bytes: int
    shared_ms: float
    unshared_ms: float
    ratio: float


def mixed_problems(count: int, smallest: int, largest: int, seed: int = 0) -> list[Problem]:
    """Test problems of mixed sizes, in the order in which they are drawn."""
    return [draw("test", seed, index, Knobs(smallest, largest)) for index in range(count)]


def throughput(
    params: Params,
    problems: Sequence[Problem],
    policy: Policy,
    *,
    rows: int,
    turns: int = 1,
    transformers: bool = False,
    progress: bool = False,
) -> list[Throughput]:
    """Answers the problems greedily, by the engine and by plain padded batches of as many rows.

    The plain batches are `raas_jax.generate` over the problems in the order in which they come: a
    batch ends when its longest answer does. With `transformers`, also the batched generate of
    Hugging Face on the same weights, dense, in the same batches, padded at the left.
    """
    prompts = [problem.prompt for problem in problems]
    limit = max(2 * len(problem.derivation_words) for problem in problems) + SLACK
    ids = [tokenizer.encode(params, prompt)[0][0] for prompt in prompts]
    engine = Engine(
        params,
        policy=policy,
        rows=rows,
        max_new_tokens=limit,
        max_prompt_tokens=max(map(len, ids)),
    )
    engine.warm_up()
    # Batches whose longest prompts share a bucket share a program; one of each compiles it.
    batches = [slice(first, first + rows) for first in range(0, len(prompts), rows)]
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
    counted: dict[str, int] = {
        "engine": engine.usage.row_steps // turns,
        "plain batches": steps * rows,
    }
    found = []
    for how, of_turns in zip(ways, times, strict=True):
        tokens = answers[how]
        drawn = sum(map(len, tokens))
        row_steps = counted.get(how)
        found.append(
            Throughput(
                how=how,
                problems=len(prompts),
                right=sum(
                    grade(problem, tokenizer.decode(params, answer)).answer
                    for problem, answer in zip(problems, tokens, strict=True)
                ),
                tokens=drawn,
                seconds=statistics.median(of_turns),
                row_steps=row_steps,
                # The first token of each answer comes from the prompt.
                useful=None if row_steps is None else (drawn - len(prompts)) / row_steps,
            )
        )
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
    """Hugging Face's generate on the same weights, in float32 on the CPU."""

    def __init__(self, params: Params):
        import torch
        from transformers import AutoModelForCausalLM

        assert params.source is not None
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(params.source, dtype=torch.float32)
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
            found += [_to_stop(row, self._stops) for row in out[:, longest:].tolist()]
        return found


def _to_stop(tokens: list[int], stops: list[int]) -> list[int]:
    """Up to and with the first stop token."""
    end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


def age(params: Params, policy: Policy, *, rows: int = 64, old: int = 4096, turns: int = 15) -> Age:
    """Time per step of a batch that has filled its budget, and of one at `old` tokens."""
    young = getattr(policy, "budget", 0) + 2 * policy.page_size
    contenders = [
        Contender(name, tokens, _begun(params, policy, rows, 1, 64).after(tokens).time_chunk)
        for name, tokens in {"young": young, "old": old}.items()
    ]
    times = take_turns(contenders, turns)
    young_ms, old_ms = (1e3 * statistics.median(of_batch) for of_batch in times)
    return Age(rows, young, old, young_ms, old_ms, median_ratio(*reversed(times)))


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

    Raises:
      ValueError: the rows are not a multiple of `samples`.
    """
    if rows % samples:
        raise ValueError(f"rows is {rows}; it must be a multiple of samples, {samples}.")
    batches = [_begun(params, policy, rows, each, prompt_tokens).after(1) for each in (samples, 1)]
    names = "shared", "unshared"
    times = take_turns(
        [Contender(name, 1, batch.time_chunk) for name, batch in zip(names, batches, strict=True)],
        turns,
    )
    shared_bytes, unshared_bytes = (
        batch.state.cache.prompt.k.nbytes + batch.state.cache.prompt.v.nbytes for batch in batches
    )
    shared_ms, unshared_ms = (1e3 * statistics.median(of_batch) for of_batch in times)
    return Sharing(
        rows=rows,
        samples=samples,
        prompt_tokens=prompt_tokens,
        shared_bytes=shared_bytes,
        unshared_bytes=unshared_bytes,
        shared_ms=shared_ms,
        unshared_ms=unshared_ms,
        ratio=median_ratio(*times),
    )


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
