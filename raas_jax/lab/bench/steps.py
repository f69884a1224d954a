"""Time per token of a decode, beside what the machine's memory bandwidth allows.

Decoding one token reads every weight and the whole cache once, so it cannot be faster than those
bytes over the bandwidth: the floor. Both are measured in the same run, since machines differ and
are busy. Nothing is extrapolated: the state at a generated length is reached by generating.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from raas_jax.decode import DecodeState, Plan, cache_bytes, decode_pages, prefill, request
from raas_jax.lab.bench import baselines
from raas_jax.lab.bench.run import CHUNK, Run, copied
from raas_jax.params import Params
from raas_jax.policies import Dense, Policy
from raas_jax.policies.base import pages_for
from raas_jax.sampling import Sampler, Sampling, row_keys


@dataclasses.dataclass
class Timing:
    """One generated length.

    Attributes:
      generated: tokens generated when the timed steps end.
      ms_per_token: median milliseconds per step; a step gives one token to every row.
      floor_ms: bytes that a step must read, over the measured bandwidth, in milliseconds.
      over_floor: their ratio.
      compile_seconds: of prefill and decode together; lengths of one shape share it.
      kv_bytes: memory of the cache: all segments, metadata and padding.
      transformers_ms_per_token: the same steps in Hugging Face's generate, where asked for.
      speedup: transformers' time over ours.
      whole_run_speedup: the same of whole runs, prompt included, up to
        `baselines.WHOLE_RUNS` tokens.
      dense_ms_per_token: the same steps of this library with a dense cache, where asked for.
      over_dense: the dense cache's time over ours.
      dense_kv_bytes: memory of the dense cache at this length.
      largest_batch: rows that fit on this device up to this length, by the compiler's account.
      dense_largest_batch: the same with a dense cache.
    """

    generated: int
    ms_per_token: float
    floor_ms: float
    over_floor: float
    compile_seconds: float
    kv_bytes: int
    transformers_ms_per_token: float | None = None
    speedup: float | None = None
    whole_run_speedup: float | None = None
    dense_ms_per_token: float | None = None
    over_dense: float | None = None
    dense_kv_bytes: int | None = None
    largest_batch: int | None = None
    dense_largest_batch: int | None = None


@dataclasses.dataclass
class Report:
    """All lengths of one run, and what they were measured on; bandwidth in bytes per second."""

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


def bench(
    params: Params,
    policy: Policy,
    *,
    prompt_tokens: int,
    lengths: Sequence[int],
    batch: int = 1,
    repetitions: int = 15,
    transformers: bool = False,
    dense: bool = False,
    largest_batch: bool = False,
    progress: bool = False,
) -> Report:
    """Measures the time per token at each generated length.

    A run generates up to each length and keeps a copy of the state there. Then lengths (and
    transformers, and the bandwidth) take turns, so that a busy moment hits all of them alike, and
    the medians over `repetitions` turns are reported.

    Args:
      params: the model, usually `Params.random`.
      policy: which pages to keep.
      prompt_tokens: length of the random prompt of every row.
      lengths: generated tokens at which to measure.
      batch: rows.
      repetitions: timed turns.
      transformers: also run the same weights in Hugging Face transformers (needs torch): its dense
        generate, and on a GPU a static cache and torch.compile.
      dense: also run this library with a dense cache.
      largest_batch: also say how many rows fit, for which programs are compiled but not run.
      progress: a bar on stderr.

    Raises:
      ValueError: a number below 1, or lengths beyond the model's context.
    """
    _check(params, prompt_tokens, lengths, batch, repetitions)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, params.config.vocab_size, (batch, prompt_tokens), dtype=np.int32)
    with tqdm(total=_steps(lengths, repetitions), unit="token", disable=not progress) as bar:
        bar.set_description("generating")
        runs = _generate(params, policy, prompt, sorted(set(lengths)), bar)
        rivals = baselines.transformers(params, prompt, runs) if transformers else {}
        beside = baselines.dense(params, prompt, runs) if dense else {}
        bar.set_description("timing")
        times: dict[int, list[float]] = {length: [] for length in runs}
        theirs: dict[int, list[float]] = {length: [] for length in rivals}
        of_dense: dict[int, list[float]] = {length: [] for length in beside}
        reader = _reader()
        speeds = []
        for _ in range(repetitions):
            speeds.append(reader())
            for length, run in runs.items():
                times[length].append(run.time_chunk(params))
                if length in rivals:
                    theirs[length].append(rivals[length].time_chunk())
                if length in beside:
                    of_dense[length].append(beside[length].time_chunk(params))
                bar.update(run.chunk)
    bandwidth = statistics.median(speeds)
    report = Report(
        device=_device(),
        jax=jax.__version__,
        policy=repr(policy),
        parameters=params.size,
        weight_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights)),
        dtype=params.weights["embedding"].dtype.name,
        batch=batch,
        prompt_tokens=prompt_tokens,
        read_bandwidth=bandwidth,
        timings=[],
    )
    for length in lengths:
        run = runs[length]
        seconds = statistics.median(times[length])
        floor = step_bytes(params, run.state) / bandwidth
        timing = Timing(
            generated=length,
            ms_per_token=1e3 * seconds,
            floor_ms=1e3 * floor,
            over_floor=seconds / floor,
            compile_seconds=run.compile_seconds,
            kv_bytes=cache_bytes(run.state),
        )
        if length in rivals:
            baseline = statistics.median(theirs[length])
            timing.transformers_ms_per_token = 1e3 * baseline
            timing.speedup = baseline / seconds
            whole = rivals[length].whole_seconds
            timing.whole_run_speedup = whole / run.whole_seconds if whole else None
        if length in beside:
            slower = statistics.median(of_dense[length])
            timing.dense_ms_per_token = 1e3 * slower
            timing.over_dense = slower / seconds
            timing.dense_kv_bytes = cache_bytes(beside[length].state)
        if largest_batch:
            most = partial(baselines.largest_batch, params, prompt_tokens, length)
            timing.largest_batch = most(policy)
            timing.dense_largest_batch = most(Dense(page_size=policy.page_size)) if dense else None
        report.timings.append(timing)
    return report


def step_bytes(params: Params, state: DecodeState) -> int:
    """Bytes that a step of this state has to read: the weights that it uses and the filled cache.

    An embedding table that is not also the output head does not count: a step reads one row of it.
    """
    config = params.config
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights))
    if not config.tie_word_embeddings:
        weights -= params.weights["embedding"].nbytes
    per_token = 2 * config.head_dim * state.cache.current.k.dtype.itemsize
    per_layer = config.num_key_value_heads * config.num_hidden_layers
    prompt = int(jnp.sum(state.cache.prompt.lengths)) * per_layer
    kept = sum(int(jnp.sum(group.fill)) for group in state.cache.kept)
    # The current page is half full on average.
    current = state.cache.current.k.size // config.head_dim // 2
    return weights + (prompt + kept + current) * per_token


def read_bandwidth(repetitions: int = 5) -> float:
    """Bytes per second that the default device reads from its memory; a median."""
    reader = _reader()
    return statistics.median(reader() for _ in range(repetitions))


def _reader(size: int = 2**28) -> Callable[[], float]:
    """A function that reads `size` bytes once, on all cores, and returns bytes per second."""
    if jax.default_backend() != "cpu":
        array = jnp.ones((size // 2**12, 2**10), jnp.float32)
        reduce = jax.jit(lambda x: jnp.max(x, axis=-1))
        reduce(array).block_until_ready()

        def read() -> float:
            start = time.perf_counter()
            # Several at once, so that launching them does not count.
            jax.block_until_ready([reduce(array) for _ in range(16)])
            return 16 * array.nbytes / (time.perf_counter() - start)

        return read

    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    blocks = np.ones((size // 2**20, 2**18), np.float32)
    # A dot product of a vector with itself does the least work per byte that NumPy vectorises.
    own = [part for part in np.array_split(blocks, cores) if len(part)]

    def read_part(part: np.ndarray) -> None:
        for block in part:
            np.dot(block, block)

    def read_cpu() -> float:
        with concurrent.futures.ThreadPoolExecutor(cores) as pool:
            list(pool.map(read_part, own))
            start = time.perf_counter()
            list(pool.map(read_part, own))
            return blocks.nbytes / (time.perf_counter() - start)

    return read_cpu


def _generate(
    params: Params, policy: Policy, prompt: np.ndarray, lengths: list[int], bar: tqdm
) -> dict[int, Run]:
    """One generation per distinct shape of the cache, with the state kept at every length."""
    batch, prompt_tokens = prompt.shape
    pages = pages_for(CHUNK, policy.page_size)
    chunk = pages * policy.page_size
    plans: dict[Plan, list[int]] = {}
    for length in lengths:
        plan = Plan.create(params.config, policy, [prompt_tokens] * batch, length)
        plans.setdefault(plan, []).append(length)
    runs = {}
    for plan, of_plan in plans.items():
        sampler = Sampler.create([Sampling()] * batch, row_keys(0, batch))
        # No row may finish, since a finished row keeps nothing.
        asked = request(jnp.full(batch, max(of_plan) + 2 * chunk), (), sampler)
        args = (params, jnp.asarray(prompt), jnp.full(batch, prompt_tokens, jnp.int32), asked)
        start = time.perf_counter()
        read_prompt = prefill.lower(*args, plan=plan).compile()
        compiled = time.perf_counter() - start
        start = time.perf_counter()
        state, drawn = jax.block_until_ready(read_prompt(*args))
        spent = time.perf_counter() - start
        start = time.perf_counter()
        step = decode_pages.lower(params, state, plan=plan, pages=pages).compile()
        compiled += time.perf_counter() - start
        tokens = [np.asarray(drawn.tokens)[None]]
        for length in of_plan:
            while chunk * (len(tokens) - 1) + 1 < length:
                kept = copied(state)
                start = time.perf_counter()
                state, drawn = jax.block_until_ready(step(params, state))
                spent += time.perf_counter() - start
                tokens.append(np.asarray(drawn.tokens))
                bar.update(chunk)
            before = np.concatenate(tokens[:-1]).T
            runs[length] = Run(step, kept, chunk, before, compiled, spent)
    return runs


def _steps(lengths: Sequence[int], repetitions: int) -> int:
    return max(lengths) + len(set(lengths)) * repetitions * CHUNK


def _device() -> str:
    device = jax.devices()[0]
    return f"cpu, {os.cpu_count()} cores" if device.platform == "cpu" else device.device_kind


def _check(
    params: Params, prompt_tokens: int, lengths: Sequence[int], batch: int, repetitions: int
) -> None:
    named = {"prompt_tokens": prompt_tokens, "batch": batch, "repetitions": repetitions}
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not lengths or min(lengths) < CHUNK:
        raise ValueError(f"lengths are {list(lengths)}; each must be at least {CHUNK} tokens.")
    longest = prompt_tokens + max(lengths) + 2 * CHUNK
    if longest > params.config.max_position_embeddings:
        raise ValueError(
            f"prompt_tokens + the longest of lengths (+ {2 * CHUNK}) is {longest}, beyond the "
            f"model's max_position_embeddings = {params.config.max_position_embeddings}."
        )
