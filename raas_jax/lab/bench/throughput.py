"""What the engine gains: against plain batches, against transformers, over time, by sharing.

Everything is compiled before it is timed, and what is compared takes turns in one process, so that
a busy moment of the machine hits all alike.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import raas_jax
from raas_jax import tokenizer
from raas_jax.decode import Plan
from raas_jax.engine import Engine, Request
from raas_jax.engine.rows import Programs, empty_admissions
from raas_jax.generation import TOKENS_PER_SYNC
from raas_jax.lab.tasks.lemma import Knobs, Problem, draw, grade
from raas_jax.params import Params
from raas_jax.policies import Policy, pages_for
from raas_jax.policies.dense import bucket

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
        "engine": lambda: _by_engine(engine, ids, limit),
        "plain batches": lambda: _by_batches(params, policy, ids, limit, batches),
    }
    shapes = {
        (len(ids[batch]), bucket(pages_for(max(map(len, ids[batch])), policy.page_size))): batch
        for batch in batches
    }
    _by_batches(params, policy, ids, limit, list(shapes.values()))
    if transformers:
        baseline = _Transformers(params)
        baseline.answer(ids, 16, batches[:1])
        ways["transformers"] = lambda: baseline.answer(ids, limit, batches)
    answers: dict[str, list[list[int]]] = {}
    seconds: dict[str, list[float]] = {how: [] for how in ways}
    with tqdm(total=len(ways) * turns, unit="run", disable=not progress) as bar:
        for _ in range(turns):
            for how, answer in ways.items():
                bar.set_description(how)
                began = time.perf_counter()
                answers[how] = answer()
                seconds[how].append(time.perf_counter() - began)
                bar.update()
    steps = _batch_steps(answers["plain batches"], batches, policy.page_size)
    counted: dict[str, int] = {
        "engine": engine.usage.row_steps // turns,
        "plain batches": steps * rows,
    }
    found = []
    for how, tokens in answers.items():
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
                seconds=statistics.median(seconds[how]),
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
    """Token steps of the plain batches: whole looks of `generate` to each longest answer."""
    look = max(1, TOKENS_PER_SYNC // page_size) * page_size
    return sum(pages_for(max(map(len, answers[batch])) - 1, look) * look for batch in batches)


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
    batches = [_Batch(params, policy, rows, 1, 64), _Batch(params, policy, rows, 1, 64)]
    batches[0].decode(young)
    batches[1].decode(old)
    times = _take_turns([batch.step for batch in batches], turns)
    return Age(
        rows=rows,
        young=young,
        old=old,
        young_ms=statistics.median(times[0]),
        old_ms=statistics.median(times[1]),
        ratio=statistics.median(b / a for a, b in zip(*times, strict=True)),
    )


def sharing(
    params: Params,
    policy: Policy,
    *,
    rows: int = 64,
    samples: int = 16,
    prompt_tokens: int = 1024,
    turns: int = 15,
) -> Sharing:
    """Bytes and time per step of a batch whose rows share prompts, and of one whose do not."""
    shared = _Batch(params, policy, rows, samples, prompt_tokens)
    unshared = _Batch(params, policy, rows, 1, prompt_tokens)
    times = _take_turns([shared.step, unshared.step], turns)
    return Sharing(
        rows=rows,
        samples=samples,
        prompt_tokens=prompt_tokens,
        shared_bytes=shared.prompt_bytes,
        unshared_bytes=unshared.prompt_bytes,
        shared_ms=statistics.median(times[0]),
        unshared_ms=statistics.median(times[1]),
        ratio=statistics.median(a / b for a, b in zip(*times, strict=True)),
    )


class _Batch:
    """Rows of an engine that never end, with random prompts of one length."""

    def __init__(self, params: Params, policy: Policy, rows: int, samples: int, length: int):
        engine = Engine(
            params,
            policy=policy,
            rows=rows,
            samples=samples,
            max_new_tokens=2**20,
            max_prompt_tokens=length,
            prefill_rows=1,
        )
        self._params: Params = params
        self._plan: Plan = engine.plan
        self._programs: Programs = engine.programs
        self._state = self._programs.empty()
        rng = np.random.default_rng(0)
        for group in range(rows // samples):
            admissions = empty_admissions(1, length, samples)
            admissions.tokens[:] = rng.integers(3, params.config.vocab_size, (1, length))
            admissions.lengths[:] = length
            admissions.groups[:] = admissions.seed[:] = group
            admissions.new_prompt[:] = admissions.fresh[:] = True
            admissions.sample[:] = np.arange(samples)
            admissions.limit[:] = 2**30
            admissions.temperature[:] = 1.0
            self._state, _ = self._programs.admit(params, self._state, admissions)
        prompt = self._state.cache.prompt
        self.prompt_bytes = int(prompt.k.nbytes + prompt.v.nbytes)

    def decode(self, tokens: int) -> None:
        for _ in range(pages_for(tokens, self._plan.page_size)):
            self._state, _ = self._programs.advance(self._params, self._state)

    def step(self) -> float:
        """Milliseconds per step, over a few pages."""
        pages = 2
        jax.block_until_ready(self._state)
        began = time.perf_counter()
        self.decode(pages * self._plan.page_size)
        jax.block_until_ready(self._state)
        return 1e3 * (time.perf_counter() - began) / (pages * self._plan.page_size)


def _take_turns(steps: Sequence[Callable[[], float]], turns: int) -> list[list[float]]:
    times: list[list[float]] = [[] for _ in steps]
    for step in steps:
        step()  # Compiled and warm.
    for turn in range(turns):
        # Now one first, now the other.
        for index in range(len(steps))[:: 1 if turn % 2 else -1]:
            times[index].append(steps[index]())
    return times


def as_json(found: Any) -> dict[str, Any]:
    """A line of any of the tables as JSON values."""
    return dataclasses.asdict(found)
