"""A policy of one's own: forget the page whose keys are shortest. Works wherever built-in ones do.

python examples/own_policy.py
"""

import dataclasses

import jax
import jax.numpy as jnp

import raas_jax
from raas_jax.policies import Boundary, Budgeted, Page, lowest, set_slot


@dataclasses.dataclass(frozen=True)
class LongestKeys(Budgeted):
    """Keeps the pages with the longest keys; its metadata is their mean length."""

    def init(self, shape: tuple[int, int, int, int]) -> jax.Array:
        return jnp.zeros(shape, jnp.float32)

    def commit(self, meta: jax.Array, slot: jax.Array, page: Page, now: jax.Array) -> jax.Array:
        length = jnp.mean(jnp.linalg.norm(page.k.astype(jnp.float32), axis=-1), axis=-1)
        return set_slot(meta, slot, length)

    def victim(self, meta: jax.Array, boundary: Boundary) -> jax.Array:
        return lowest(meta, boundary)


params = raas_jax.load("demo")
prompt = "a = 4 ; b = 9 ; c = a + b ; d = c - a ; e = d * b ; ? e :"
for policy in (LongestKeys(32, page_size=4), raas_jax.RaaS(32, page_size=4)):
    out = raas_jax.generate(params, prompt, policy=policy)
    print(f"{type(policy).__name__}: {out.text}\n  {out.stats}")
