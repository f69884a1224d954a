"""The engine's programs as the compiler optimises them: no row joins by a copy of the cache."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hlo import written_in_loops
from tiny import random_params

from raas_jax import Engine, ModelConfig, RaaS, policies

POLICY = RaaS(16, alpha=0.12, page_size=4)
# The cache is far larger than anything else.
LARGE = ModelConfig(32, 16, 24, 4, 4, 2, 16, qk_norm=True, model_type="qwen3")


@pytest.mark.parametrize("name", ["raas", "quest", "h2o"])
def test_a_row_joins_without_a_copy_of_the_cache(name):
    """Nothing of the size of a segment of all rows is written out, but for the rows that join."""
    options = {"prompt": "evict"} if name == "h2o" else {}
    policy = policies.create(name, budget=1024, **options)
    engine = Engine(
        random_params(LARGE), policy=policy, rows=32, max_new_tokens=2048, max_prompt_tokens=256,
        prefill_rows=1,
    )  # fmt: skip
    cache = engine.session.shape.cache
    # The smaller of the segments, all rows of it.
    size = min(x.size * 4 for x in (cache.kept[0].k, cache.prompt.k) if x.size)
    admit = engine.session.lower_admit(1, 256).compile()
    advance = engine.session.lower_advance().compile()
    # To attend, a layer's pages may be copied; the cache has four layers.
    for program, large in ((admit, size), (advance, 4 * cache.kept[0].k.size // 2)):
        assert written_in_loops(program.as_text(), large) == []
        memory = program.memory_analysis()
        assert memory.temp_size_in_bytes < 4 * cache.kept[0].k.size
        state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
        assert memory.alias_size_in_bytes >= state


def test_shared_prompts_take_an_eighth_of_the_bytes():
    """Sixteen rows of one prompt, beside sixteen prompts."""
    params = random_params(LARGE)
    bytes_of = {}
    for samples in (1, 16):
        engine = Engine(
            params,
            policy=RaaS(16, alpha=0.12, page_size=4),
            rows=32,
            samples=samples,
            max_new_tokens=64,
        )
        prompt = engine.session.shape.cache.prompt
        bytes_of[samples] = 2 * prompt.k.size * prompt.k.dtype.itemsize
    assert bytes_of[16] * 8 <= bytes_of[1]
    assert np.isclose(bytes_of[16] * 16, bytes_of[1])
