"""A row of the engine tells what `generate` tells alone, for every policy that there is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tiny import allotment_of, calibration, prompts_of, random_params

import raas_jax
from raas_jax import Engine, Request, Sampling, policies

P, NEW = 2, 45
# As tight as each policy takes it; those that it does not have are left out.
TIGHT = {"budget": 24, "every": 4, "recent": 4, "window": 4, "alpha": 0.12, "prompt_budget": 4}
# Where the prompt lies, for those that can do otherwise than beside the budget.
PROMPTS = {
    "raas": ("excluded", "included"), "random": ("included",),
    "vase": ("included",), "rkv": ("included",),
    "h2o": ("evict",), "sink": ("evict",), "tova": ("evict",),
}  # fmt: skip
EVERY = [
    *((name, prompt) for name in policies.available() for prompt in PROMPTS.get(name, ("",))),
    ("random", "included", "allotted"),
    ("h2o", "evict", "allotted"),
]
SETTINGS = [Sampling(), Sampling(temperature=1.2), Sampling(temperature=0.9, top_k=9, top_p=0.9)]


@pytest.fixture(scope="module")
def params():
    return random_params(sharpness=3.0)


def tight(name, prompt, *allotted):
    kind = policies.by_name(name)
    known = {field.name for field in dataclasses.fields(kind)}
    options = {key: value for key, value in TIGHT.items() if key in known}
    if prompt:
        options["prompt"] = prompt
    if name == "triattention":
        options["calibration"] = calibration()
    if allotted:
        options["allotment"] = allotment_of(page_size=P)
    return kind(page_size=P, **options)


def check_against(params, policy, requests, results, new=NEW):
    """Each result against `generate` of the request alone."""
    assert sorted(results) == sorted(request.id for request in requests)
    for request in requests:
        alone = raas_jax.generate(
            params,
            [request.prompt],
            policy=policy,
            sampling=request.sampling,
            seed=[request.seed],
            max_new_tokens=new,  # One number for all: it decides what is compiled.
        )[0]
        result, length = results[request.id], request.max_new_tokens
        assert result.error is None and result.finish_reason == "length"
        assert result.tokens == alone.tokens[:length]
        np.testing.assert_allclose(result.logprobs, alone.logprobs[:length], rtol=1e-3, atol=1e-4)
        assert result.stats.generated_tokens == length
        if length == new:
            assert result.stats.kept_pages == alone.stats.kept_pages
            assert result.stats.evicted_pages == alone.stats.evicted_pages
            assert result.stats.evicted_pages > 0 or policy.__class__.__name__ in KEEP_ALL


KEEP_ALL = ("Dense", "Quest")


@pytest.mark.parametrize("case", EVERY, ids=" ".join)
def test_a_row_is_what_it_is_alone(params, case):
    """Seven requests through three rows: they join at different pages, in rows used before."""
    policy = tight(*case)
    limits = [NEW, 3, 18, NEW, 1, 30, NEW]
    requests = [
        Request(f"{i}", ids, SETTINGS[i % 3], seed=i + 5, max_new_tokens=limit)
        for i, (ids, limit) in enumerate(zip(prompts_of([8, 7] * 3 + [8]), limits, strict=True))
    ]
    engine = Engine(
        params, policy=policy, rows=3, max_new_tokens=NEW, max_prompt_tokens=8, prefill_rows=1
    )
    results = {result.id: result for result in engine.run(requests)}
    check_against(params, policy, requests, results)
    assert engine.compiles <= engine.most_compiles == 3
