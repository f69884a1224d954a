"""Section `kernel-times`: what the kernels of a decode take, beside what they read and write."""

from __future__ import annotations

import jax

from pallas_kernels import bench as kernels
from raas_jax.lab.device_check.check import Check

SHAPES = ("llama-3.1-8b/b1/1024", "llama-3.1-8b/b32/1024", "qwen2.5-7b/b8/1024")
"""Qwen3-8B has the heads of the first."""
SMALL = ("qwen2.5-7b/b1/512",)


def run(check: Check) -> None:
    """All operations of all shapes, each row as it comes."""
    on_cpu = jax.default_backend() == "cpu"
    for shape in SMALL if on_cpu else SHAPES:
        operations = [name for name in kernels.OPERATIONS if name != "prefill_attention"]
        repetitions = 1 if on_cpu else 5
        for row in kernels.bench(operations, [shape], dtype=check.dtype, repetitions=repetitions):
            own = row.ms if row.ms is not None else row.xla_ms
            if own is None:
                continue
            check.journal.figure(
                f"{row.operation}{'' if row.ms is not None else ' (XLA)'}, {row.shape}",
                1e3 * own,
                "us",
                floor=1e6 * row.bytes / row.copy_bandwidth,
                xla_us=None if row.xla_ms is None else 1e3 * row.xla_ms,
                why=row.why,
            )
