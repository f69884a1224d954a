"""Time per token of several policies side by side, and of the attention alone that each implies.

A policy costs what it reads and what it computes. The first is seen in a window: the last tokens in
the same number of slots, with no marks and no scores, written over in turn. All take turns in one
process, and medians of paired ratios are reported.
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
from tqdm import tqdm

from raas_jax import policies
from raas_jax.calibrate import calibrate
from raas_jax.decode import cache_bytes
from raas_jax.lab.bench.turns import (
    Contender,
    TimedDecode,
    check_positive,
    median_ratio,
    random_prompts,
    take_turns,
)
from raas_jax.params import Params
from raas_jax.plan import Plan
from raas_jax.policies import Boundary, Dense, Policy, RaaS, TriAttention, pages_for
from raas_jax.session import Session
from raas_jax.windows import check_some_see_all

EVERY = (
    "raas",
    "raas:alpha=1e-4",
    "raas:alpha=1e-4:score=bound",
    *(name for name in policies.available() if name not in ("dense", "fifo", "quest", "raas")),
    "quest",
    "dense",
)
"""What `all` stands for: those of constant memory first. "fifo" is "recent"."""
ROUND = 128
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
class PolicyTiming:
    """One policy, by name.

    Attributes:
      slots: tokens that the slots of its last group of layers that see everything hold, `S * P`:
        what a step reads there, besides the prompt and the current page.
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
    lines: list[PolicyTiming]


def compare(
    params: Params,
    tried: Mapping[str, Policy],
    *,
    prompt_tokens: int = 128,
    batch: int = 1,
    repetitions: int = 15,
    progress: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Comparison:
    """Measures a step of every policy once all of its slots are filled.

    Args:
      params: the model, usually `Params.random`.
      tried: by name; policies that keep everything are measured at the length at which the last of
        the others is full.
      prompt_tokens: length of the random prompt of every row.
      batch: rows.
      repetitions: timed turns of `ROUND` tokens.
      progress: a bar on stderr.
      say: is told what is known so far, a line at a time.

    Raises:
      ValueError: no policies, a number below 1, more tokens than the model's context, or a model
        all of whose layers see a window.
    """
    check_some_see_all(params.config)
    check_positive(prompt_tokens=prompt_tokens, batch=batch, repetitions=repetitions)
    if not tried:
        raise ValueError("tried is empty; name at least one policy.")
    warm = _tokens_to_fill(params, list(tried.values()), prompt_tokens)
    prompts = random_prompts(params, batch, prompt_tokens).tolist()
    windows = {name: _window(params, policy, prompt_tokens, warm) for name, policy in tried.items()}
    # Next to its window, so that a busy moment hits both.
    entries: dict[str, Policy] = {}
    for window in dict.fromkeys(windows.values()):
        if window is not None:
            entries[repr(window)] = window
        entries |= {name: tried[name] for name, own in windows.items() if own == window}
    decodes = {}
    for name, policy in tqdm(entries.items(), "filling", unit="policy", disable=not progress):
        pages = pages_for(ROUND, policy.page_size)
        new = warm + 2 * pages * policy.page_size
        session = Session.create(params, policy, [prompt_tokens] * batch, new)
        decodes[name] = TimedDecode.start(session, prompts, warm, pages)
        say(f"{name}, {warm:,} generated: {1e3 * decodes[name].time_chunk():.2f} ms/token at first")
    contenders = [Contender(name, warm, decode.time_chunk) for name, decode in decodes.items()]
    times = dict(zip(decodes, take_turns(contenders, repetitions, progress), strict=True))
    raas = next((name for name, policy in tried.items() if isinstance(policy, RaaS)), None)

    def ratio(name: str, other: object | None) -> float | None:
        return None if other is None else median_ratio(times[name], times[str(other)])

    lines = [
        PolicyTiming(
            name,
            _slots_of(decodes[name].session.plan) * policy.page_size,
            1e3 * statistics.median(times[name]),
            ratio(name, windows[name]),
            ratio(name, raas),
            cache_bytes(decodes[name].state),
        )
        for name, policy in tried.items()
    ]
    device = jax.devices()[0]
    return Comparison(
        f"{device.platform} ({device.device_kind})",
        jax.__version__,
        params.size,
        params.dtype.name,
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
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "centres.safetensors"
        calibrate(params, random_prompts(params, 1, 256, seed=1).tolist(), progress=False).write(
            file
        )
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
    full = max((tokens for tokens in held if tokens < far), default=ROUND)
    warm = pages_for(full + 2 * max(policy.page_size for policy in tried), ROUND) * ROUND
    if warm + ROUND > far:
        raise ValueError(
            f"the policies hold {full} tokens, more than the model's max_position_embeddings = "
            f"{params.config.max_position_embeddings} leaves. Use smaller budgets."
        )
    return warm


def _slots(params: Params, policy: Policy, prompt_tokens: int, new: int) -> int:
    return _slots_of(Plan.create(params.config, policy, [prompt_tokens], new))


def _slots_of(plan: Plan) -> int:
    return [group.slots for group in plan.groups if not group.ring][-1]


def _window(params: Params, policy: Policy, prompt_tokens: int, warm: int) -> SlidingWindow | None:
    grouped = len(policy.groups(params.config.full_layers)) > 1
    if grouped or policy.selects or policy.evicts_prompt or isinstance(policy, Dense):
        return None
    slots = _slots(params, policy, prompt_tokens, warm + 2 * ROUND)
    return SlidingWindow(slots * policy.page_size, page_size=policy.page_size)
