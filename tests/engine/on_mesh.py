"""The engine on several devices, as a program of its own: the devices are chosen before jax starts.

on_mesh.py virtual FOLDER                  eight virtual devices
on_mesh.py process PORT NUMBER             one of two processes, a device each
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import warnings

import jax
import numpy as np
from tiny import MOE, WINDOWS, allotment_of, prompts_of, random_params

import raas_jax
from raas_jax import Engine, RaaS, Request, Sampling, make_mesh, policies

OPTIONS = {"rows": 8, "max_new_tokens": 40, "max_prompt_tokens": 12, "prefill_rows": 1}
POLICIES = {
    "raas": RaaS(16, alpha=0.12, page_size=4),
    "h2o": policies.create("h2o", budget=16, prompt="evict", granularity="layer", page_size=4),
}


def requests():
    return [
        Request(i, prompt, Sampling(temperature=i % 2), seed=i, max_new_tokens=4 + 11 * i % 36)
        for i, prompt in enumerate(prompts_of([3 + i % 9 for i in range(20)]))
    ]


def answers(engine, **options):
    return {result.id: result.tokens for result in engine.run(requests(), **options)}


def virtual(folder):
    jax.config.update("jax_num_cpu_devices", 8)
    params = random_params(sharpness=3.0)
    check_scores(params)
    check_allotted(params, f"{folder}-allotted")
    check_experts()
    check_windows()
    expected = {}
    for name, policy in POLICIES.items():
        expected[name] = answers(Engine(params, policy=policy, **OPTIONS))
        engine = Engine(params, policy=policy, **OPTIONS, mesh=make_mesh(data=4, model=2))
        assert answers(engine) == expected[name], name
        kept = engine._state.cache.kept[0].k
        assert kept.sharding.shard_shape(kept.shape) == (2, 2, 1, *kept.shape[3:])
    # Of the cache, no more than the page of each row that is committed travels.
    text = engine.session.lower_advance().compile().as_text()
    moved = re.findall(r"= f32\[([0-9,]+)\]\S* (?:all-gather|all-to-all|collective-perm)", text)
    assert all(eval(shape.replace(",", "*")) < kept.size // 2 for shape in moved), moved

    # Paused on eight devices, resumed on one; and where heads do not divide, which is said once.
    engine = Engine(params, policy=POLICIES["raas"], **OPTIONS, mesh=make_mesh(data=4, model=2))
    found = {}
    for result in engine.run(requests()):
        found[result.id] = result.tokens
        if len(found) == 6:
            break
    engine.save(folder)
    for mesh, warned in (None, 0), (make_mesh(data=2, model=4), 1):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            again = Engine.restore(folder, params, mesh=mesh)
        said = [str(each.message) for each in said if "key/value heads" in str(each.message)]
        assert len(said) == warned
        assert again._schedule.busy()
        assert found | answers(again) == expected["raas"]
    print("same")


def check_scores(params):
    """Log-probabilities under a policy are those of one device, in ragged batches."""
    prompts, continuations = prompts_of([5, 9, 1, 7]), prompts_of([41, 30, 44, 1], 1)
    policy, mesh = POLICIES["raas"], make_mesh(data=4, model=2)
    alone = raas_jax.score(params, prompts, continuations, policy=policy)
    found = raas_jax.score(params, prompts, continuations, policy=policy, rows=3, mesh=mesh)
    for one, other in zip(alone, found, strict=True):
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-4)


def check_experts():
    """Experts are split in their width, and rows over the other axis; each bias is added once."""
    biased = dataclasses.replace(MOE, expert_bias=True, swiglu_limit=0.5)
    params, policy = random_params(biased, sharpness=3.0), POLICIES["raas"]
    mesh = make_mesh(data=4, model=2)
    alone, split = (Engine(params, policy=policy, **OPTIONS, mesh=each) for each in (None, mesh))
    assert answers(split) == answers(alone)
    stack = split.session.params.weights["expert_down"]
    assert stack.sharding.shard_shape(stack.shape) == (*stack.shape[:-1], stack.shape[-1] // 2)


def check_windows():
    """Rings are split as all pages are, and sinks with their heads."""
    params, policy = random_params(WINDOWS, sharpness=3.0), POLICIES["raas"]
    mesh = make_mesh(data=4, model=2)
    alone, split = (Engine(params, policy=policy, **OPTIONS, mesh=each) for each in (None, mesh))
    assert answers(split) == answers(alone)
    ring = split._state.cache.kept[-1].k
    assert ring.sharding.shard_shape(ring.shape) == (2, 2, 1, *ring.shape[3:])


def check_allotted(params, folder):
    """A pool is split where the heads are, and whole where they do not divide: the same answers.

    Both heads have the same curves, in other layers, so that either way they get the same pages.
    """
    losses = allotment_of(page_size=4).losses
    losses = np.stack([losses[:, 0], losses[::-1, 0]], axis=1)
    allotment = dataclasses.replace(allotment_of(page_size=4), losses=losses)
    policy = policies.create("h2o", budget=16, prompt="evict", page_size=4, allotment=allotment)
    alone, split, whole = (
        Engine(params, policy=policy, **OPTIONS, mesh=mesh)
        for mesh in (None, make_mesh(data=4, model=2), make_mesh(data=2, model=4))
    )
    ranges = [engine.plan.groups[0].ranges for engine in (alone, split, whole)]
    assert [each.parts for each in ranges] == [1, 2, 1]
    assert ranges[0] == ranges[2] and ranges[0].counts == ranges[1].counts
    expected = answers(alone)
    for engine, of_rows, of_pages in (split, 4, 2), (whole, 2, 1):
        assert answers(engine) == expected
        pool = engine._state.cache.kept[0].k
        shape = 8 // of_rows, ranges[0].total // of_pages, *pool.shape[2:]
        assert pool.sharding.shard_shape(pool.shape) == shape
    # The pages of a part lie together, as they do nowhere else; on the same mesh they are taken.
    split.save(folder)
    for mesh in (None, make_mesh(data=2, model=4)):
        try:
            Engine.restore(folder, params, mesh=mesh)
        except ValueError as error:
            assert "restore it on one with the same model axis" in str(error)
        else:
            raise AssertionError("restored where pages lie otherwise")
    again = Engine.restore(folder, params, mesh=make_mesh(data=2, model=2))
    assert again.plan.groups == split.plan.groups


def process(port, number):
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    params = random_params(sharpness=3.0)
    for mesh in (make_mesh(data=2), make_mesh(model=2)):
        engine = Engine(params, policy=POLICIES["raas"], **OPTIONS, mesh=mesh)
        print(json.dumps(answers(engine)), flush=True)


if __name__ == "__main__":
    {"virtual": virtual, "process": process}[sys.argv[1]](*sys.argv[2:])
