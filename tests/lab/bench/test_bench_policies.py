"""`raas-jax bench --policies`: what is compared with what; the times are the machine's."""

from __future__ import annotations

import json

import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params
from tiny_lemma import save_tiny

from raas_jax import Dense, RaaS, policies
from raas_jax.cli.main import main
from raas_jax.lab.bench import policies as bench_policies
from raas_jax.lab.bench.policies import EVERY, SlidingWindow, compare, every_policy
from raas_jax.policies import Boundary


def test_a_ring_writes_over_its_slots_in_turn():
    slots = 3
    fill = jnp.zeros((2, 2, 1, slots), jnp.int32)
    seen = []
    for page in range(1, 6):
        now = jnp.asarray([1 + 4 * page, 1 + 4 * (page + 1)])
        boundary = Boundary(now, fill, None, None, None, None, None)
        slot = SlidingWindow(slots * 4, page_size=4).victim((), boundary)
        assert slot.shape == (2, 2, 1) and slot.dtype == jnp.int32
        seen.append(np.asarray(slot)[0, :, 0].tolist())
    assert seen == [[0, 1], [1, 2], [2, 0], [0, 1], [1, 2]]


def test_all_is_every_policy_once():
    names = {text.partition(":")[0] for text in EVERY}
    assert names == set(policies.available()) - {"fifo"}
    with every_policy(random_params(), 96, 16) as (tried, left_out):
        assert list(tried.values())[:2] == [RaaS(96), RaaS(96, 1e-4)]
        assert tried["dense"] == Dense()
        assert len(tried) + len(left_out) == len(EVERY)
        assert left_out == []
    with every_policy(random_params(), 64, 16) as (_, left_out):
        assert [line.partition(" ")[0] for line in left_out] == ["lazy_eviction", "random", "vase"]


@pytest.mark.once
def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_policies, "ROUND", 32)
    model = save_tiny(tmp_path / "model")
    args = ["bench", "--config", f"{model}/config.json", "--budget", "32", "--page-size", "8"]
    args += ["--prompt-tokens", "9", "--repetitions", "2", "--json"]
    assert main([*args, "--policies", "raas,rkv:every=8:recent=8:budget=24"]) == 0
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert "raas-jax: raas, 64 generated: " in err
    raas, rkv = said["lines"]
    assert (raas["policy"], rkv["policy"]) == ("raas", "rkv:every=8:recent=8:budget=24")
    assert (raas["slots"], rkv["slots"], said["generated"]) == (32, 32, 64)
    assert raas["over_raas"] == 1.0 and raas["over_attention"] > 0 and rkv["over_attention"] > 0
    assert all(line["ms_per_token"] > 0 and line["kv_bytes"] > 0 for line in said["lines"])


def test_what_cannot_be_compared_is_refused():
    params = random_params()
    with pytest.raises(ValueError, match="tried is empty"):
        compare(params, {})
    with pytest.raises(ValueError, match="batch is 0"):
        compare(params, {"raas": RaaS(64)}, batch=0)
    longer = params.config.max_position_embeddings
    with pytest.raises(ValueError, match="more than the model's max_position_embeddings"):
        compare(params, {"raas": RaaS(longer - 16 - longer % 16)}, prompt_tokens=8)
