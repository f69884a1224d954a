"""Sections `decode-1`, `decode-8`, `decode-64`: steps of a whole model, at 1k and at 16k tokens."""

from __future__ import annotations

import statistics

import jax

from raas_jax.decode import cache_bytes
from raas_jax.lab.bench.bandwidth import copier
from raas_jax.lab.bench.far import at_length, step_seconds
from raas_jax.lab.bench.steps import step_bytes
from raas_jax.lab.device_check.check import Check, median
from raas_jax.params import Params
from raas_jax.policies import Dense, Policy, RaaS
from raas_jax.session import Session, device_memory
from raas_jax.weights import separates


def run(check: Check, batch: int) -> None:
    """RaaS, then a cache that forgets nothing, each near and far."""
    sizes, dtype = check.sizes, check.dtype
    copy_seconds = median(copier())
    params = Params.random(check.config(), dtype=dtype)
    params = params.separate() if separates() else params
    weight_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params.weights))
    ms: dict[tuple[str, int], float] = {}
    room = (sizes.turns + 1) * sizes.pages * Dense().page_size
    raas, dense = RaaS(sizes.budget), Dense()
    tried: list[tuple[str, Policy, int, int]] = [
        (f"RaaS, {sizes.budget:,} kept", raas, sizes.near, sizes.far + room),
        (f"RaaS, {sizes.budget:,} kept", raas, sizes.far, sizes.far + room),
        ("dense", dense, sizes.near, sizes.near + room),
        # Its slots are a bucket, which the last of the steps fills.
        ("dense", dense, sizes.far - room, sizes.far),
    ]
    for name, policy, generated, new in tried:
        what = f"{name}, batch {batch}, at {generated:,} tokens"
        with check.journal.attempt(what):
            session = Session.create(params, policy, [sizes.prompt] * batch, new)
            needed, memory = weight_bytes + cache_bytes(session.shape), device_memory()
            if needed > memory:
                raise MemoryError(f"{needed / 1e9:.1f} GB do not fit into {memory / 1e9:.1f}")
            state = at_length(session, sizes.prompt, generated)
            size = step_bytes(params, state)
            times, compile_seconds = step_seconds(session, state, sizes.pages, sizes.turns)
            ms[name, generated] = 1e3 * statistics.median(times)
            check.journal.figure(
                what,
                ms[name, generated],
                "ms/step",
                floor=1e3 * size * copy_seconds,
                fastest=1e3 * min(times),
                slowest=1e3 * max(times),
                tokens_per_second=1e3 * batch / ms[name, generated],
                step_bytes=size,
                of_copy_bandwidth=size * copy_seconds / statistics.median(times),
                compile_seconds=compile_seconds,
            )
        near = ms.get((name, sizes.near))
        if near and generated > sizes.near and (name, generated) in ms:
            check.journal.figure(
                f"{name}, batch {batch}, at {generated:,} over at {sizes.near:,} tokens",
                ms[name, generated] / near,
                "x",
            )
