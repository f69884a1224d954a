"""Time per token of several policies side by side, and of the attention alone that each implies.

A policy costs what it reads and what it computes. The first is seen in a ring: the last tokens in
the same number of slots, with no marks and no scores, written over in turn. All take turns in one
process, so that a busy moment hits all of them alike, and medians of paired ratios are reported.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from raas_jax.decode import DecodeState, Plan, cache_bytes, decode_pages, prefill, request
from raas_jax.params import Params
from raas_jax.policies import Boundary, Dense, Policy, RaaS, pages_for
from raas_jax.sampling import Sampler, Sampling, row_keys

CHUNK = 128
"""Tokens that are timed together: whole rounds of the policies that evict every 64 or 128."""


@dataclasses.dataclass(frozen=True)
class Ring(Policy):
    """The last `size` tokens, nothing else: the attention of a policy without the policy."""

    size: int = 1024

    def slots(self, prompt_tokens: Sequence[int], max_new_tokens: int) -> int:
        return self.size // self.page_size

    def victim(self, marks: Any, boundary: Boundary) -> jax.Array:
        number = (boundary.now - 1) // self.page_size - 1
        turn = jnp.maximum(number, 0) % boundary.fill.shape[-1]
        return jnp.broadcast_to(turn[:, None], boundary.fill.shape[:3]).astype(jnp.int32)


@dataclasses.dataclass
class Line:
    """One policy.

    Attributes:
      policy: its repr.
      slots: tokens that its slots hold in the last group of layers, `S * P`: what a step reads,
        besides the prompt and the open page.
      ms_per_token: median milliseconds per step; a step gives one token to every row.
      over_attention: median ratio to a `Ring` of as many tokens; None for policies that read only a
        part of their slots, or keep some layers whole.
      over_raas: median ratio to the first `RaaS` among the policies; None if there is none.
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
    policies: Sequence[Policy],
    *,
    prompt_tokens: int = 128,
    batch: int = 1,
    repetitions: int = 15,
    progress: bool = False,
) -> Comparison:
    """Measures a step of every policy once all of its slots are filled.

    Args:
      params: the model, usually `Params.random`.
      policies: what to compare; those that keep everything are measured at the length at which the
        last of the others is full.
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
    if not policies:
        raise ValueError("policies are none; name at least one.")
    lengths = [prompt_tokens] * batch
    far = params.config.max_position_embeddings - prompt_tokens
    bounded = [_tokens(params, policy, lengths, far) for policy in policies]
    full = max((held for held in bounded if held < far), default=CHUNK)
    # Two more pages than fill the slots, so that the timed steps evict.
    warm = -(-(full + 2 * max(policy.page_size for policy in policies)) // CHUNK) * CHUNK
    if warm + CHUNK > far:
        raise ValueError(
            f"the policies hold {full} tokens, more than the model's max_position_embeddings = "
            f"{params.config.max_position_embeddings} leaves. Use smaller budgets."
        )
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, params.config.vocab_size, (batch, prompt_tokens), dtype=np.int32)
    runs: dict[Policy, _Run] = {}
    rings: dict[Policy, Ring] = {}
    with tqdm(disable=not progress, unit="policy") as bar:
        for policy in policies:
            bar.set_description(type(policy).__name__)
            runs[policy] = _Run.create(params, policy, prompt, warm)
            plain = len(set(runs[policy].plan.slots)) == 1 and not policy.selects
            if plain and policy.page_size == runs[policy].plan.page_size:
                ring = Ring(runs[policy].tokens, page_size=policy.page_size)
                rings[policy] = ring
                if ring not in runs and not isinstance(policy, Dense):
                    runs[ring] = _Run.create(params, ring, prompt, warm)
            bar.update()
        times: dict[Policy, list[float]] = {policy: [] for policy in runs}
        bar.set_description("timing")
        for _ in range(repetitions):
            for policy, run in runs.items():
                times[policy].append(run.time(params))
    raas = next((policy for policy in policies if isinstance(policy, RaaS)), None)
    lines = [
        Line(
            repr(policy),
            runs[policy].tokens,
            1e3 * statistics.median(times[policy]),
            _ratio(times, policy, rings.get(policy)),
            _ratio(times, policy, raas),
            runs[policy].kv_bytes,
        )
        for policy in policies
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


def _tokens(params: Params, policy: Policy, lengths: list[int], new: int) -> int:
    plan = Plan.create(params.config, policy, lengths, new)
    return plan.slots[-1] * plan.page_size


def _ratio(times: dict[Policy, list[float]], policy: Policy, other: Policy | None) -> float | None:
    if other not in times or other is None:
        return None
    pairs = zip(times[policy], times[other], strict=True)
    return statistics.median(mine / theirs for mine, theirs in pairs)


@jax.jit
def _copy(state: DecodeState) -> DecodeState:
    return jax.tree.map(jnp.copy, state)


@dataclasses.dataclass
class _Run:
    """A decode that was generated until its slots were filled."""

    plan: Plan
    step: Callable[..., Any]
    state: DecodeState
    chunk: int
    kv_bytes: int

    @property
    def tokens(self) -> int:
        return self.plan.slots[-1] * self.plan.page_size

    @classmethod
    def create(cls, params: Params, policy: Policy, prompt: np.ndarray, warm: int) -> _Run:
        batch, prompt_tokens = prompt.shape
        pages = pages_for(CHUNK, policy.page_size)
        chunk = pages * policy.page_size
        plan = Plan.create(params.config, policy, [prompt_tokens] * batch, warm + 2 * chunk)
        sampler = Sampler.create([Sampling()] * batch, row_keys(0, batch))
        # No row may finish, since a finished row keeps nothing.
        asked = request(jnp.full(batch, 2 * (warm + chunk)), (), sampler)
        lengths = jnp.full(batch, prompt_tokens, jnp.int32)
        state, _ = prefill(params, jnp.asarray(prompt), lengths, asked, plan=plan)
        step = decode_pages.lower(params, state, plan=plan, pages=pages).compile()
        for _ in range(0, warm, chunk):
            state, _ = step(params, state)
        return cls(plan, step, jax.block_until_ready(state), chunk, cache_bytes(state))

    def time(self, params: Params) -> float:
        """Seconds per step over a chunk."""
        state = jax.block_until_ready(_copy(self.state))
        start = time.perf_counter()
        jax.block_until_ready(self.step(params, state))
        return (time.perf_counter() - start) / self.chunk
