"""Time per token of a decode, beside what the machine's memory bandwidth allows.

Decoding one token reads every weight and the whole cache once, so it cannot be faster than those
bytes over the bandwidth: the floor. Both are measured in the same run, since machines differ and
are busy. Nothing is extrapolated: the state at a generated length is reached by generating.
"""

from __future__ import annotations

import dataclasses
import os
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from raas_jax import checks, experts
from raas_jax.decode import DecodeState, cache_bytes
from raas_jax.engine import autosize
from raas_jax.lab.bench import baselines
from raas_jax.lab.bench.bandwidth import reader
from raas_jax.lab.bench.turns import (
    Contender,
    TimedDecode,
    check_positive,
    copied,
    endless,
    ran_out,
    random_prompts,
    take_turns,
    timed,
)
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Dense, Policy, pages_for
from raas_jax.session import Session

CHUNK = 64
"""Tokens that are timed together, in whole pages."""


@dataclasses.dataclass
class Other:
    """A baseline at one length.

    Attributes:
      ms_per_token: median milliseconds of the same steps.
      ratio: its time over ours.
      whole_run_ratio: the same of whole runs, prompt included; None where none was timed.
      kv_bytes: memory of its cache; None where it is not known.
    """

    ms_per_token: float
    ratio: float
    whole_run_ratio: float | None
    kv_bytes: int | None


@dataclasses.dataclass
class Timing:
    """One generated length.

    Attributes:
      generated: tokens generated when the timed steps end.
      ms_per_token: median milliseconds per step; a step gives one token to every row.
      floor_ms, over_floor: bytes that a step must read over the measured bandwidth, and the ratio.
      compile_seconds: of prefill and decode together; lengths of one shape share it.
      kv_bytes: memory of the cache: all segments, metadata and padding.
      others: the baselines that were asked for, by name.
      largest_batch, dense_largest_batch: rows that fit up to this length, by the compiler.
    """

    generated: int
    ms_per_token: float
    floor_ms: float
    over_floor: float
    compile_seconds: float
    kv_bytes: int
    others: dict[str, Other]
    largest_batch: int | None = None
    dense_largest_batch: int | None = None


@dataclasses.dataclass
class StepReport:
    """All lengths of one run, and what they were measured on; bandwidth in bytes per second.

    `left_out` says why a baseline that was asked for is missing.
    """

    device: str
    jax: str
    policy: str
    parameters: int
    weight_bytes: int
    dtype: str
    batch: int
    prompt_tokens: int
    read_bandwidth: float
    timings: list[Timing]
    left_out: list[str]


def bench(
    params: Params,
    policy: Policy,
    *,
    prompt_tokens: int,
    lengths: Sequence[int],
    batch: int = 1,
    repetitions: int = 15,
    against: Collection[str] = (),
    largest_batch: bool = False,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> StepReport:
    """Measures the time per token at each generated length.

    A run generates up to each length and keeps a copy of the state there. Then lengths (and
    baselines, and the bandwidth) take turns, and the medians over `repetitions` turns are reported.

    Args:
      params: the model, usually `Params.random`.
      policy: which pages to keep.
      prompt_tokens: length of the random prompt of every row.
      lengths: generated tokens at which to measure.
      batch: rows.
      repetitions: timed turns.
      against: `baselines.NAMES` that run the same weights too: "transformers", "llama.cpp", or this
        library with a "dense" cache. One that is not installed is left out.
      largest_batch: also say how many rows fit, for which programs are compiled but not run.
      progress: a bar on stderr.
      say: is told what is known so far, a line at a time.

    Raises:
      ValueError: a number below 1, lengths beyond the model's context, or an unknown baseline.
    """
    check_positive(prompt_tokens=prompt_tokens, batch=batch, repetitions=repetitions)
    for length in lengths:
        checks.integer("lengths", length, 1, checks.MOST_TOKENS)
    if not lengths or min(lengths) < CHUNK:
        raise ValueError(f"lengths are {list(lengths)}; each must be at least {CHUNK} tokens.")
    longest, context = max(lengths) + 2 * CHUNK, params.config.max_position_embeddings
    if prompt_tokens + longest > context:
        raise ValueError(
            f"prompt_tokens + the longest of lengths (+ {2 * CHUNK}) is {prompt_tokens + longest}, "
            f"beyond the model's max_position_embeddings = {context}."
        )
    if set(against) - set(baselines.NAMES):
        named = ", ".join(map(repr, baselines.NAMES))
        raise ValueError(f"against is {','.join(against)!r}; there are {named}.")
    prompts = random_prompts(params, batch, prompt_tokens)

    def first(name: str, length: int, decode: TimedDecode | baselines.Baseline) -> None:
        say(f"{name}, {length:,} generated: {1e3 * decode.time_chunk():.2f} ms/token at first")

    reached = []
    for each in _reach(params, policy, prompts, sorted(set(lengths)), progress):
        first("raas-jax", each.length, each.own)
        reached.append(each)
    left_out = []
    for name in dict.fromkeys(against):
        try:
            begin = baselines.of_name(name, params, prompt_tokens)
            for each in reached:
                each.others[name] = begin(each.tokens, each.own.chunk)
                first(name, each.length, each.others[name])
        except (ValueError, RuntimeError, MemoryError) as error:
            if not (isinstance(error, ValueError) or ran_out(error)):
                raise
            reason = error if isinstance(error, ValueError) else "there is no memory left for it."
            left_out.append(f"{name} is left out: {reason}")
            for each in reached:
                each.others.pop(name, None)
    contenders = [Contender("bandwidth", 0, reader())]
    for each in reached:
        contenders += each.contenders()
    times = zip(contenders, take_turns(contenders, repetitions, progress), strict=True)
    seconds = {(name, length): statistics.median(own) for (name, length, _), own in times}
    bandwidth = 1 / seconds["bandwidth", 0]
    timings = {each.length: each.timing(seconds, bandwidth) for each in reached}
    if largest_batch:
        for length, timing in timings.items():
            most = partial(_largest_batch, params, prompt_tokens, length)
            timing.largest_batch = most(policy)
            if "dense" in against:
                timing.dense_largest_batch = most(Dense(page_size=policy.page_size))
    return StepReport(
        device=_device(),
        jax=jax.__version__,
        policy=repr(policy),
        parameters=params.size,
        weight_bytes=_bytes(params),
        dtype=params.dtype.name,
        batch=batch,
        prompt_tokens=prompt_tokens,
        read_bandwidth=bandwidth,
        timings=[timings[length] for length in lengths],
        left_out=left_out,
    )


class _AtLength(NamedTuple):
    """All that is timed at one length, the baselines among it that are wanted."""

    length: int
    own: TimedDecode  # before the chunk in which the length is reached
    tokens: np.ndarray  # int32 [B, T], prompts and what was generated before that chunk
    compile_seconds: float
    whole_seconds: float  # from the prompts to the end of the chunk, nothing compiled
    others: dict[str, baselines.Baseline]

    def contenders(self) -> list[Contender]:
        """Ours, named "own", and the others."""
        decodes: dict[str, TimedDecode | baselines.Baseline] = {"own": self.own, **self.others}
        return [Contender(name, self.length, decode.time_chunk) for name, decode in decodes.items()]

    def timing(self, seconds: Mapping[tuple[str, int], float], bandwidth: float) -> Timing:
        """From the median seconds per step of every contender and length."""
        own = seconds["own", self.length]
        floor = step_bytes(self.own.session.params, self.own.state) / bandwidth
        return Timing(
            generated=self.length,
            ms_per_token=1e3 * own,
            floor_ms=1e3 * floor,
            over_floor=own / floor,
            compile_seconds=self.compile_seconds,
            kv_bytes=cache_bytes(self.own.state),
            others={
                name: Other(
                    1e3 * seconds[name, self.length],
                    seconds[name, self.length] / own,
                    whole / self.whole_seconds if (whole := other.whole_seconds) else None,
                    other.kv_bytes,
                )
                for name, other in self.others.items()
            },
        )


def step_bytes(params: Params, state: DecodeState) -> int:
    """Bytes that a step of this state has to read: the weights that it uses and the filled cache.

    Of a layer that sees a window as many tokens count as are in it, the current page's among them.
    An embedding table that is not also the output head does not count: a step reads one row of it.
    Of experts as many count as the rows can choose.
    """
    config, current = params.config, state.cache.current.k
    weights = _bytes(params)
    share = experts.share_read(config.num_experts, config.num_experts_per_tok, current.shape[1])
    stacks = [params.weights[name] for name in experts.STACKS if name in params.weights]
    weights -= round((1 - share) * sum(int(stack.nbytes) for stack in stacks))
    if not config.tie_word_embeddings:
        weights -= params.weights["embedding"].nbytes
    per_token = 2 * config.head_dim * current.dtype.itemsize
    K, prompts = config.num_key_value_heads, state.cache.prompt.lengths
    # The current page is half full on average.
    L, rows, P = config.full_layers, current.shape[1], current.shape[3]
    prompt = int(jnp.sum(prompts)) * K * L
    groups = state.cache.kept[:-1] if config.window_layers else state.cache.kept
    kept = sum(int(jnp.sum(group.fill)) for group in groups)
    fed = jnp.repeat(prompts, rows // len(prompts)) + state.rows.generated - 1
    seen = int(jnp.sum(jnp.minimum(fed + P // 2, config.window))) * K * len(config.window_layers)
    return weights + (prompt + kept + K * L * rows * P // 2 + seen) * per_token


def _bytes(params: Params) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights))


def _reach(
    params: Params, policy: Policy, prompts: np.ndarray, lengths: Sequence[int], progress: bool
) -> Iterator[_AtLength]:
    """One generation per distinct shape of the cache, with the state kept at every length."""
    batch, prompt_tokens = prompts.shape
    sessions: dict[Plan, tuple[Session, list[int]]] = {}
    for length in lengths:
        session = Session.create(params, policy, [prompt_tokens] * batch, length)
        sessions.setdefault(session.plan, (session, []))[1].append(length)
    with tqdm(total=max(lengths), desc="generating", unit="token", disable=not progress) as bar:
        for session, of_session in sessions.values():
            yield from _generate(session, prompts, of_session, bar)


def _generate(
    session: Session, prompts: np.ndarray, lengths: Sequence[int], bar: tqdm
) -> Iterator[_AtLength]:
    """At each of the lengths, which grow."""
    pages = pages_for(CHUNK, session.plan.page_size)
    _, compile_seconds = timed(partial(session.compile, pages))
    (state, progress), spent = timed(
        partial(session.start, prompts.tolist(), endless(len(prompts)))
    )
    tokens, generated = [prompts, session.read(progress.tokens).T], 1
    for length in lengths:
        while generated < length:
            before = TimedDecode(session, copied(state), pages)
            (state, progress), seconds = timed(partial(session.advance, state, pages))
            spent += seconds
            tokens.append(session.read(progress.tokens).T)
            generated += before.chunk
            bar.update(before.chunk)
        so_far = np.concatenate(tokens[:-1], axis=1)
        yield _AtLength(length, before, so_far, compile_seconds, spent, {})


def _largest_batch(params: Params, prompt_tokens: int, generated: int, policy: Policy) -> int:
    """Rows that fit on this device when each generates so many tokens; nothing is run."""

    def account(rows: int) -> list[Any]:
        session = Session.create(params, policy, [prompt_tokens] * rows, generated)
        return [session.lower_advance(pages_for(CHUNK, policy.page_size))]

    return autosize.largest_batch(account, 1, None)


def _device() -> str:
    device = jax.devices()[0]
    return f"cpu, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind
