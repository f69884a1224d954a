"""The budget of a policy's own at which it takes as many bytes as another one."""

from __future__ import annotations

from collections.abc import Callable

from raas_jax.policies import Policy

TOLERANCE = 0.02
"""How far, as a share, a policy's bytes may exceed the reference's at the same budget: pages are
whole, and metadata differs by a few bytes."""
MOST_PAGES = 64
"""How many pages more than the reference's budget are tried for a policy."""


def fitted(
    create: Callable[[int], Policy],
    bytes_under: Callable[[Policy], int],
    nominal: int,
    step: int,
    target: int,
    reference: str,
) -> Policy:
    """The policy at the largest budget that takes no more bytes than the reference.

    Args:
      create: makes it, of a budget in tokens.
      bytes_under: what a row takes under a policy; raises ValueError where it cannot be.
      nominal: the reference's budget, in whole steps.
      step: tokens between the budgets that are tried.
      target: bytes of a row under the reference.
      reference: its name, for the error.

    Raises:
      ValueError: with the reason, where there is no such budget.
    """
    reason = ""
    # What keeps the prompt among its pages needs more tokens for the same bytes.
    for own in range(nominal + MOST_PAGES * step, 0, -step):
        try:
            policy = create(own)
            size = bytes_under(policy)
        except ValueError as error:
            # The first refusal says what it needs; smaller budgets only repeat it.
            raise ValueError(reason or str(error)) from None
        if size <= target or (own <= nominal and size <= target * (1 + TOLERANCE)):
            return policy
        reason = (
            f"the least budget that it can work with, {own}, takes {size} bytes, where "
            f"{reference} takes {target}"
        )
    raise ValueError(reason)
