"""Section `sampling`: what it takes to draw a token, beside reading its logits once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.bench import PROGRAM_SECONDS, Case, Program
from raas_jax.lab.bench.bandwidth import copier
from raas_jax.lab.device_check.check import Check, median
from raas_jax.lab.device_check.shapes import BATCHES
from raas_jax.sampling import Sampler, Sampling, row_keys

WAYS = {
    "greedy": Sampling(),
    "temperature": Sampling(0.6),
    "top-p": Sampling(0.6, top_p=0.95),
    "top-k, top-p, min-p": Sampling(0.6, top_k=20, top_p=0.95, min_p=0.01),
}


def run(check: Check) -> None:
    """Every way for every batch, over the model's vocabulary."""
    copy_seconds, V = median(copier()), check.config().vocab_size
    on_cpu = check.dtype == "float32"
    for batch in BATCHES:
        for name, sampling in WAYS.items():
            what = f"{name}, batch {batch}, vocabulary {V:,}"
            with check.journal.attempt(what):
                draw = Program(case(sampling, batch, V), 0.0 if on_cpu else PROGRAM_SECONDS)
                floor = 1e3 * draw.case.bytes * copy_seconds
                check.journal.figure(what, 1e3 * median(draw.seconds), "ms", floor=floor)


def case(sampling: Sampling, batch: int, vocabulary: int) -> Case:
    """A draw for each row; the bytes are those of the logits."""
    logits = jax.random.normal(jax.random.key(1), (batch, vocabulary), jnp.float32)
    sampler = Sampler.create([sampling] * batch, row_keys(0, batch))

    def step(drawn: jax.Array, arrays: Any, _: jax.Array) -> jax.Array:
        sampler, logits, nothing = arrays
        # What was drawn counts for nothing, but the compiler cannot know it: each draw waits for
        # the one before it.
        tokens, _ = sampler(logits + nothing * drawn[:, None].astype(jnp.float32), drawn)
        found: jax.Array = tokens
        return found

    start = jnp.zeros(batch, jnp.int32)
    return Case(step, start, (sampler, logits, jnp.zeros(())), 1, logits.nbytes)
