"""All that is fixed before a decode is compiled: shapes, and which policy serves which layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pallas_kernels import Ranges, Target
from raas_jax.config import ModelConfig
from raas_jax.policies import Policy, bucket, pages_for


class Group(NamedTuple):
    """Consecutive layers that share a policy.

    Attributes:
      first: number of its first layer.
      layers: how many it has, `L` of its arrays.
      policy: which pages to keep.
      slots: `S`, slots of kept pages, the most that a head has.
      ranges: slots of each head, where they differ, in a pool of all; None where all have `slots`.
    """

    first: int
    layers: int
    policy: Policy
    slots: int
    ranges: Ranges | None = None

    @classmethod
    def create(cls, first: int, policy: Policy, counts: np.ndarray, parts: int) -> Group:
        """A group by the slots of each layer and head, `[L, K]`; see `Ranges` for `parts`."""
        ranges = None
        if counts.min() < counts.max():
            ranges = Ranges(tuple(tuple(layer) for layer in counts.tolist()), parts)
        return cls(first, len(counts), policy, int(counts.max()), ranges)

    @property
    def part(self) -> slice:
        """Its layers among all of the model."""
        return slice(self.first, self.first + self.layers)

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
      groups: the layers, first ones first, each group with its own part of the policy.
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
        groups: list[Group] = []
        for layers, part in policy.groups(config.num_hidden_layers):
            if part.evicts_prompt != policy.evicts_prompt:
                raise ValueError(
                    f"policy is {policy!r}; either all of its layers evict the prompt, or none may."
                )
            part.check_model(config)
            part = part.split(parts)
            sizes = layers, config.num_key_value_heads, lengths, max_new_tokens
            first = groups[-1].part.stop if groups else 0
            groups.append(Group.create(first, part, part.slots_by_head(*sizes), parts))
        slots = pages_for(longest, P) if longest else bucket(pages_for(max(lengths), P))
        return cls(policy, slots, tuple(groups), samples, target)

    @property
    def page_size(self) -> int:
        """`P`."""
        return self.policy.page_size

    @property
    def slots(self) -> tuple[int, ...]:
        """`S` of every group."""
        return tuple(group.slots for group in self.groups)


def _parts(config: ModelConfig, target: Target | None) -> int:
    """Into how many parts a mesh splits the heads of the cache."""
    ways = 1 if target is None else target.head_ways
    return ways if config.num_key_value_heads % ways == 0 else 1
