"""The largest batch that fits, by the compiler's own account."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax

from raas_jax.checks import MOST_ROWS
from raas_jax.session import device_memory

HEADROOM = 0.95  # Of the memory: what the host sends, fragments, and the runtime's own.


def largest_batch(
    account: Callable[[int], Sequence[Any]], together: int, memory_limit: int | None
) -> int:
    """The most rows, a multiple of `together`, whose programs all fit into memory.

    Memory grows with the rows by nearly equal steps, so that a guess from two sizes is close; it is
    then bisected. Nothing is allocated.

    `account` gives the lowered programs for a number of rows, and `memory_limit` is in bytes per
    device; None is what there is. Raises ValueError where not even the smallest batch fits.
    """
    limit = available_memory() if memory_limit is None else memory_limit
    found: dict[int, int] = {}

    def peak(count: int) -> int:
        if count not in found:
            found[count] = max(map(_peak, account(count * together)))
        return found[count]

    if peak(1) > limit:
        raise ValueError(
            f"rows is 'auto', but already {together} rows take {peak(1)} bytes of {limit}. Use a "
            "smaller budget, max_new_tokens or max_prompt_tokens, or a larger mesh."
        )
    most = MOST_ROWS // together
    per_step = max(1, (peak(min(9, most)) - peak(1)) // max(1, min(9, most) - 1))
    guess = max(1, min(most, 1 + (limit - peak(1)) // per_step))
    low, high = 1, most + 1  # The first fits, the second does not or is out of range.
    step = max(1, guess // 32)
    while high - low > max(1, low // 64):
        low, high = (guess, high) if peak(guess) <= limit else (low, guess)
        near = guess + step if guess == low else guess - step
        guess = near if low < near < high else (low + high) // 2
        step *= 2
    return low * together


def available_memory() -> int:
    """Bytes that the first device has for us; on a CPU, what the machine has free."""
    # Where free pages are not told apart (not Linux), all of the machine's.
    if jax.default_backend() != "cpu" or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return int(HEADROOM * device_memory())
    return int(HEADROOM * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def _peak(lowered: Any) -> int:
    found = lowered.compile().memory_analysis()
    arguments, outputs = found.argument_size_in_bytes, found.output_size_in_bytes
    return int(arguments + outputs + found.temp_size_in_bytes - found.alias_size_in_bytes)
