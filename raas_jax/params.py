"""`Params`: the weights of a model together with all that is needed to run it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.typing import DTypeLike

from raas_jax.config import ModelConfig
from raas_jax.model import Weights, init_weights, separate, stacked


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Params:
    """One pytree: arrays as leaves, the rest static, so that `jax.jit` can take it as it is.

    Attributes:
      weights: nested dictionary of arrays, as `raas_jax.model.abstract_weights` names them, with
        stacked or separate layers.
      config: shape of the model (static).
      source: folder or hub id where the tokenizer and the generation defaults are found (static);
        None for weights without one.
    """

    weights: Weights
    config: ModelConfig = dataclasses.field(metadata={"static": True})
    source: str | None = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    def random(cls, config: ModelConfig, seed: int = 0, dtype: DTypeLike | None = None) -> Params:
        """Random weights of a given shape, for benchmarks and tests.

        They are drawn in `dtype` (the config's where not given), array by array, so that they take
        no more memory than a model that was loaded.
        """
        key = jax.random.key(seed)
        return cls(init_weights(config, key, dtype or config.dtype), config)

    @property
    def dtype(self) -> Any:
        """The weights' dtype, which is also that of the cache."""
        return self.weights["embedding"].dtype

    def stacked(self) -> Params:
        """The same with the layers in stacks, `[L, ...]`."""
        return dataclasses.replace(self, weights=stacked(self.weights))

    def separate(self) -> Params:
        """The same with arrays of each layer's own, as `raas_jax.load` stores them on a CPU."""
        return dataclasses.replace(self, weights=separate(self.weights))

    @property
    def size(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.weights))
