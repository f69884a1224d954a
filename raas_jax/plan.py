"""All that is fixed before a decode is compiled: shapes, and which policy serves which layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from pallas_kernels import Ranges, Target
from raas_jax.config import ModelConfig
from raas_jax.policies import Policy, bucket, pages_for
from raas_jax.windows import Ring

_KINDS = "full", "window"


class Group(NamedTuple):
    """Layers of one kind that share a policy.

    Attributes:
      numbers: which layers of the model, `L` of its arrays.
      first: place of its first layer among those of its kind.
      policy: which pages to keep; a `Ring` in layers that see a window.
      slots: `S`, slots of kept pages, the most that a head has.
      ranges: slots of each head, where they differ, in a pool of all; None where all have `slots`.
    """

    numbers: tuple[int, ...]
    first: int
    policy: Policy
    slots: int
    ranges: Ranges | None = None

    @classmethod
    def create(
        cls, numbers: tuple[int, ...], first: int, policy: Policy, counts: np.ndarray, parts: int
    ) -> Group:
        """A group by the slots of each layer and head, `[L, K]`; see `Ranges` for `parts`."""
        ranges = None
        if counts.min() < counts.max():
            ranges = Ranges(tuple(tuple(layer) for layer in counts.tolist()), parts)
        return cls(numbers, first, policy, int(counts.max()), ranges)

    @property
    def layers(self) -> int:
        """How many layers it has."""
        return len(self.numbers)

    @property
    def ring(self) -> Ring | None:
        """Of layers that see a window, which hold their prompt themselves."""
        return self.policy if isinstance(self.policy, Ring) else None

    @property
    def kind(self) -> str:
        """One of `ModelConfig.layer_kinds`."""
        return "window" if self.ring else "full"

    @property
    def part(self) -> slice:
        """Its layers among all of their kind."""
        return slice(self.first, self.first + self.layers)

    def among_all(self, of_model: jax.Array) -> jax.Array:
        """Its part of an array whose leading axis counts all layers of the model."""
        first, last = self.numbers[0], self.numbers[-1]
        together = last - first + 1 == self.layers
        return of_model[first : last + 1] if together else of_model[np.asarray(self.numbers)]

    def counts(self, heads: int) -> np.ndarray:
        """Slots of each layer and head: integers `[L, K]`."""
        if self.ranges is not None:
            return np.asarray(self.ranges.counts)
        return np.full((self.layers, heads), self.slots)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Shapes and policy of a decode. Hashable, so it can be a static argument of a jit.

    Attributes:
      policy: which pages to keep.
      prompt_slots: `Sp`, pages of the longest prompt's bucket.
      groups: layers that see everything, first ones first, each group with its own part of the
        policy; then those that see a window, if there are any.
      samples: rows that share one prompt, `B / B'`; rows of one prompt are neighbours.
      target: what the decode is compiled for; None is the default backend, without a mesh.
    """

    policy: Policy
    prompt_slots: int
    groups: tuple[Group, ...]
    samples: int = 1
    target: Target | None = None

    @classmethod
    def create(
        cls,
        config: ModelConfig,
        policy: Policy,
        prompt_tokens: Sequence[int],
        max_new_tokens: int,
        samples: int = 1,
        target: Target | None = None,
        *,
        longest: int | None = None,
    ) -> Plan:
        """The plan for prompts of these lengths.

        With `longest`, slots are enough for a row of any prompt up to so many tokens, in whole
        pages; which of them a row may use is the policy's word.

        Raises:
          ValueError: the policy does not suit the model or one of the prompts, or some of its
            layers evict the prompt and others do not.
        """
        policy.check_prompts(prompt_tokens)
        lengths, P = [*prompt_tokens, *([longest] if longest else [])], policy.page_size
        parts = _parts(config, target)
        kinds = np.asarray(config.layer_kinds)
        full, windows = (tuple(np.flatnonzero(kinds == kind).tolist()) for kind in _KINDS)
        heads = config.num_key_value_heads
        groups: list[Group] = []
        for layers, part in policy.groups(len(full)) if full else ():
            if part.evicts_prompt != policy.evicts_prompt:
                raise ValueError(
                    f"policy is {policy!r}; either all of its layers evict the prompt, or none may."
                )
            part.check_model(config)
            part = part.split(parts)
            first = groups[-1].part.stop if groups else 0
            counts = part.slots_by_head(layers, heads, lengths, max_new_tokens)
            numbers = full[first : first + layers]
            groups.append(Group.create(numbers, first, part, counts, parts))
        if windows:
            _check_window(config.window, policy)
            ring = Ring(window=config.window, page_size=P)
            groups.append(Group(windows, 0, ring, ring.slots(lengths, max_new_tokens)))
        slots = pages_for(longest, P) if longest else bucket(pages_for(max(lengths), P))
        return cls(policy, slots, tuple(groups), samples, target)

    @property
    def page_size(self) -> int:
        """`P`."""
        return self.policy.page_size

    @property
    def windows(self) -> Group | None:
        """The group of the layers that see a window, the last one; None without such."""
        last = self.groups[-1]
        return last if last.ring else None

    @property
    def kinds(self) -> tuple[int, ...]:
        """The number of its group for every layer of the model."""
        group_of = {n: number for number, each in enumerate(self.groups) for n in each.numbers}
        return tuple(group_of[n] for n in range(len(group_of)))

    @property
    def slots(self) -> tuple[int, ...]:
        """`S` of every group."""
        return tuple(group.slots for group in self.groups)


def _check_window(window: int, policy: Policy) -> None:
    if window < policy.page_size:
        raise ValueError(
            f"page_size is {policy.page_size}, and the model has layers that see {window} tokens. "
            f"Use pages of at most {window} tokens."
        )


def _parts(config: ModelConfig, target: Target | None) -> int:
    """Into how many parts a mesh splits the heads of the cache."""
    ways = 1 if target is None else target.head_ways
    return ways if config.num_key_value_heads % ways == 0 else 1
