"""Sink: the first tokens and the last ones (StreamingLLM, arXiv 2309.17453)."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from raas_jax import checks
from raas_jax.policies.base import Boundary, PromptPages, lowest
from raas_jax.policies.recent import Recent
from raas_jax.policies.sizes import pages_for


@dataclasses.dataclass(frozen=True)
class Sink(Recent):
    """Keeps the pages with the first `sinks` tokens of the sequence, and the most recent ones.

    With `prompt="evict"` it is the published method: a prompt longer than the budget is cut to its
    first and last pages, and goes as it ages. With the prompt kept, the sinks lie in it already
    (but for the shortest prompts), so that it does what `Recent` does.

    Departs from the paper: keys keep the positions of the text, where StreamingLLM renumbers them
    by their place in the cache. Metadata is that of `Recent`.

    Attributes:
      sinks: first tokens of the sequence that stay for ever, in whole pages; the paper uses 4.
    """

    sinks: int = 4
    prompts = ("excluded", "included", "evict")

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.integer("sinks", self.sinks, 0, checks.MOST_TOKENS)

    def reserve(self) -> tuple[int, str]:
        # A short prompt may end within the sinks, so that its last page and the next are both kept.
        spare = self.sinks > 1 and self.page_size > 1
        pages = pages_for(self.sinks, self.page_size) + spare
        return pages + 1, f"with sinks={self.sinks}"

    def insert_prompt(self, meta: jax.Array, prompt: PromptPages) -> tuple[jax.Array, jax.Array]:
        index = jnp.arange(prompt.fill.shape[-1])
        score = jnp.where(index * self.page_size < self.sinks, jnp.inf, index.astype(jnp.float32))
        return self.insert_best(score, prompt, meta.shape)

    def victim(self, meta: jax.Array, boundary: Boundary) -> jax.Array:
        # A page that was full at clock t ends with the token number prompt + t - 2 of the text.
        first = boundary.prompt_lengths[:, None, None] + meta - 1 - boundary.fill
        return lowest(jnp.where(first < self.sinks, np.iinfo(np.int32).max, meta), boundary)
