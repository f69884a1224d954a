"""Time per token of several policies side by side, and of the attention alone that each implies.

A policy costs what it reads and what it computes. The first is seen in a window: the last tokens in
the same number of slots, with no marks and no scores, written over in turn. All take turns in one
process, so that a busy moment hits all of them alike, and medians of paired ratios are reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from raas_jax import policies
from raas_jax.calibrate import calibrate
from raas_jax.decode import (
    DecodeState,
    Plan,
    cache_bytes,
    decode_pages,
    empty_cache,
    init_metadata,
    prefill,
    request,
)
from raas_jax.lab.bench.run import seconds_per_step
from raas_jax.params import Params
from raas_jax.policies import Boundary, Dense, Policy, RaaS, TriAttention, pages_for
from raas_jax.sampling import Sampler, Sampling, row_keys

EVERY = (
    "raas",
    "raas:alpha=1e-4",
    "raas:alpha=1e-4:score=bound",
    *(name for name in policies.available() if name not in ("dense", "fifo", "quest", "raas")),
    "quest",
    "dense",
)
"""What `all` stands for: those of constant memory first. "fifo" is "recent"."""
CHUNK = 128
"""Tokens that are timed together: whole rounds of the policies that evict every 64 or 128."""


@dataclasses.dataclass(frozen=True)
class SlidingWindow(Policy):
    """The last `size` tokens, nothing else: the attention of a policy without the policy."""

    size: int = 1024

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return self.size // self.page_size

    def victim(self, meta: Any, boundary: Boundary) -> jax.Array:
        number = (boundary.now - 1) // self.page_size - 1
        turn = jnp.maximum(number, 0) % boundary.fill.shape[-1]
        return jnp.broadcast_to(turn[:, None], boundary.fill.shape[:3]).astype(jnp.int32)


@dataclasses.dataclass
class Line:
    """One policy.

    Attributes:
      policy: its name.
      slots: tokens that the slots of its last group of layers hold, `S * P`: what a step reads,
        besides the prompt and the current page.
      ms_per_token: median milliseconds per step; a step gives one token to every row.
      over_attention: median ratio to a `SlidingWindow` of as many tokens; None for policies that
        read only a part of their slots, keep some layers whole, or keep the prompt among its slots.
      over_raas: median ratio to the first `RaaS` of the comparison; None if there is none.
      kv_bytes: memory of the cache: all segments, metadata and padding.
    """

    policy: str
    slots: int
    ms_per_token: float
    over_attention: float | None
    over_raas: float | None
    kv_bytes: int


@dataclasses.dataclass
class Comparison:
    """All policies of one run, and what they were measured on."""

    device: str
    jax: str
    parameters: int
    dtype: str
    batch: int
    prompt_tokens: int
    generated: int
    lines: list[Line]


def compare(
    params: Params,
    tried: Mapping[str, Policy],
    *,
    prompt_tokens: int = 128,
    batch: int = 1,
    repetitions: int = 15,
    progress: bool = False,
) -> Comparison:
    """Measures a step of every policy once all of its slots are filled.

    Args:
      params: the model, usually `Params.random`.
      tried: what to compare, by name; policies that keep everything are measured at the length at
        which the last of the others is full.
      prompt_tokens: length of the random prompt of every row.
      batch: rows.
      repetitions: timed turns of `CHUNK` tokens.
      progress: a bar on stderr.

    Raises:
      ValueError: no policies, a number below 1, or more tokens than the model's context.
    """
    named = {"prompt_tokens": prompt_tokens, "batch": batch, "repetitions": repetitions}
    for name, value in named.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
    if not tried:
        raise ValueError("tried is empty; name at least one policy.")
    warm = _tokens_to_fill(params, list(tried.values()), prompt_tokens)
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, params.config.vocab_size, (batch, prompt_tokens), dtype=np.int32)
    windows = {
        name: window
        for name, policy in tried.items()
        if (window := _window(params, policy, prompt_tokens, warm))
    }
    # Next to its window, so that a busy moment hits both.
    order = [*dict.fromkeys(windows.values()), None]
    entries: list[str | SlidingWindow] = []
    for window in order:
        entries += ([window] if window else []) + [
            name for name in tried if windows.get(name) == window
        ]
    steps = len(entries) * (warm + repetitions * CHUNK)
    runs: dict[str | SlidingWindow, _Run] = {}
    times: dict[str | SlidingWindow, list[float]] = {entry: [] for entry in entries}
    with tqdm(total=steps, disable=not progress, unit="token") as bar:
        for entry in entries:
            bar.set_description(str(entry))
            policy = tried[entry] if isinstance(entry, str) else entry
            runs[entry] = _Run.create(params, policy, prompt, warm)
            bar.update(warm)
        bar.set_description("timing")
        for _ in range(repetitions):
            for entry in entries:
                times[entry].append(runs[entry].time(params))
                bar.update(CHUNK)
    raas = next((name for name, policy in tried.items() if isinstance(policy, RaaS)), None)
    lines = [
        Line(
            name,
            runs[name].plan.slots[-1] * runs[name].plan.page_size,
            1e3 * statistics.median(times[name]),
            _ratio(times, name, windows.get(name)),
            _ratio(times, name, raas),
            runs[name].kv_bytes,
        )
        for name in tried
    ]
    device = jax.devices()[0]
    return Comparison(
        f"{device.platform} ({device.device_kind})",
        jax.__version__,
        params.size,
        params.weights["embedding"].dtype.name,
        batch,
        prompt_tokens,
        warm,
        lines,
    )


@contextlib.contextmanager
def every_policy(
    params: Params, budget: int, page_size: int
) -> Iterator[tuple[dict[str, Policy], list[str]]]:
    """All of `EVERY` with this budget, and why any is left out; triattention is calibrated here."""
    rng = np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "centres.safetensors"
        ids = rng.integers(0, params.config.vocab_size, 256).tolist()
        calibrate(params, [ids], progress=False).write(file)
        made: dict[str, Policy] = {}
        left_out: list[str] = []
        for text in EVERY:
            options: dict[str, Any] = {"page_size": page_size}
            if text != "dense":
                options["budget"] = budget
            if policies.by_name(text.partition(":")[0]) is TriAttention:
                options["calibration"] = str(file)
            try:
                made[text] = policies.parse(text, **options)
            except ValueError as error:
                left_out.append(f"{text} is left out: {error}")
        yield made, left_out


def _tokens_to_fill(params: Params, tried: Sequence[Policy], prompt_tokens: int) -> int:
    """Tokens until all slots are full and more, so that every timed step may evict."""
    far = params.config.max_position_embeddings - prompt_tokens
    held = [_slots(params, policy, prompt_tokens, far) * policy.page_size for policy in tried]
    full = max((tokens for tokens in held if tokens < far), default=CHUNK)
    warm = -(-(full + 2 * max(policy.page_size for policy in tried)) // CHUNK) * CHUNK
    if warm + CHUNK > far:
        raise ValueError(
            f"the policies hold {full} tokens, more than the model's max_position_embeddings = "
            f"{params.config.max_position_embeddings} leaves. Use smaller budgets."
        )
    return warm


def _slots(params: Params, policy: Policy, prompt_tokens: int, new: int) -> int:
    return Plan.create(params.config, policy, [prompt_tokens], new).slots[-1]


def _window(params: Params, policy: Policy, prompt_tokens: int, warm: int) -> SlidingWindow | None:
    grouped = len(policy.groups(params.config.num_hidden_layers)) > 1
    if grouped or policy.selects or policy.evicts_prompt or isinstance(policy, Dense):
        return None
    slots = _slots(params, policy, prompt_tokens, warm + 2 * CHUNK)
    return SlidingWindow(slots * policy.page_size, page_size=policy.page_size)


def _ratio(
    times: dict[str | SlidingWindow, list[float]],
    mine: str | SlidingWindow,
    other: str | SlidingWindow | None,
) -> float | None:
    if other is None:
        return None
    pairs = zip(times[mine], times[other], strict=True)
    return statistics.median(one / two for one, two in pairs)


def _start(params: Params, plan: Plan, prompt: np.ndarray, limit: int) -> DecodeState:
    """After the prompt; the same compiled prefill for all that keep the prompt as it is."""
    batch, prompt_tokens = prompt.shape
    sampler = Sampler.create([Sampling()] * batch, row_keys(0, batch))
    # No row may finish, since a finished row keeps nothing.
    asked = request(jnp.full(batch, limit), (), sampler)
    shared = plan
    if not (plan.policy.evicts_prompt or plan.policy.needs_prompt_bounds):
        shared = Plan(Dense(page_size=plan.page_size), plan.prompt_slots, (1,))
    lengths = jnp.full(batch, prompt_tokens, jnp.int32)
    state, _ = prefill(params, jnp.asarray(prompt), lengths, asked, plan=shared)
    if shared is plan:
        return state
    empty = empty_cache(params.config, plan, batch, state.cache.prompt.k.dtype)
    cache = dataclasses.replace(empty, prompt=state.cache.prompt)
    return dataclasses.replace(state, cache=cache, meta=init_metadata(params.config, plan, batch))


@dataclasses.dataclass
class _Run:
    """A decode that was generated until its slots were filled."""

    plan: Plan
    step: Callable[..., Any]
    state: DecodeState
    chunk: int
    kv_bytes: int

    @classmethod
    def create(cls, params: Params, policy: Policy, prompt: np.ndarray, warm: int) -> _Run:
        batch, prompt_tokens = prompt.shape
        pages = pages_for(CHUNK, policy.page_size)
        chunk = pages * policy.page_size
        plan = Plan.create(params.config, policy, [prompt_tokens] * batch, warm + 2 * chunk)
        state = _start(params, plan, prompt, 2 * (warm + chunk))
        step = decode_pages.lower(params, state, plan=plan, pages=pages).compile()
        for _ in range(0, warm, chunk):
            state, _ = step(params, state)
        return cls(plan, step, jax.block_until_ready(state), chunk, cache_bytes(state))

    def time(self, params: Params) -> float:
        """Seconds per step over a chunk."""
        return seconds_per_step(self.step, params, self.state, self.chunk)
