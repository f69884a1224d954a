"""What the sections of a device check measure: on a CPU, with everything tiny."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params

import pallas_kernels
from pallas_kernels import bench as timed_kernels
from raas_jax.config import ModelConfig
from raas_jax.lab.bench import arithmetic, bandwidth
from raas_jax.lab.device_check import kernels, prefilling, rivals, sampling, shapes
from raas_jax.lab.device_check.__main__ import RUN
from raas_jax.lab.device_check.check import Check
from raas_jax.lab.device_check.driver import SECTIONS
from raas_jax.lab.device_check.journal import read
from raas_jax.lab.device_check.table import table
from raas_jax.model import abstract_weights
from raas_jax.params import Params
from raas_jax.sampling import Sampling

LEAST = dataclasses.replace(shapes.SMALL, prompt=4, budget=32, far=128, turns=1, prompts=(5,))


@pytest.fixture
def section(tmp_path, monkeypatch):
    """Runs one, and gives its rows."""
    monkeypatch.setattr(timed_kernels, "COPIED_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(bandwidth, "CPU_READ_BYTES", 2**22)
    monkeypatch.setattr(arithmetic, "CPU_SIDE", 32)
    monkeypatch.setattr(shapes, "SMALL", LEAST)
    # Made in NumPy, since drawing them compiles for long.
    monkeypatch.setattr(Params, "random", lambda config, dtype: random_params(config))

    def run(name):
        RUN[name](Check.of(tmp_path, name))
        return [row for row in read(tmp_path / "results.jsonl") if row["section"] == name]

    return run


def test_every_section_can_be_run():
    assert {section.name for section in SECTIONS} == set(RUN)


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_are_read_back_as_they_are(name, tmp_path):
    shapes.write(shapes.SHAPES[name], tmp_path, "bfloat16")
    read_back = ModelConfig.from_file(tmp_path / "config.json")
    assert read_back == dataclasses.replace(shapes.SHAPES[name], dtype="bfloat16")
    assert shapes.name_of(read_back) == name
    assert (shapes.sizes_of(read_back) == shapes.SMALL) == (name == "tiny")


def test_the_shapes_are_those_of_the_models():
    sizes = {"Qwen3-8B": 8.19e9, "Qwen3-4B": 4.02e9, "Qwen3-1.7B": 1.72e9, "Qwen3-0.6B": 0.596e9}
    for name, size in sizes.items():
        weights = abstract_weights(shapes.SHAPES[name], "bfloat16")
        count = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(weights))
        assert count == pytest.approx(size, rel=5e-3)


def test_the_published_config_is_the_same_shape(shared):
    config = ModelConfig.from_file(shared / "configs" / "Qwen3-8B" / "config.json")
    assert shapes.name_of(config) == "Qwen3-8B"


@pytest.mark.parametrize(
    ("memory", "name"),
    [
        (79e9, "Qwen3-8B"),  # H100
        (33.5e9, "Qwen3-8B"),  # v6e
        (16.9e9, "Qwen3-1.7B"),  # v5e
        (8e9, "tiny"),
    ],
)
def test_the_largest_that_fits_is_decoded(memory, name):
    assert shapes.fitting(int(memory)) == name


def test_the_device_and_its_limits(section, tmp_path):
    facts = {row["what"]: row["value"] for row in section("device")}
    assert facts["platform"] == "cpu" and facts["jax"] == jax.__version__
    assert facts["model"] == "tiny" and facts["dtype"] == "float32"
    assert json.loads((tmp_path / "model" / "config.json").read_text())["hidden_size"] == 64
    units = {row["what"]: row["unit"] for row in section("limits") if row["value"] > 0}
    assert list(units.values()) == ["GB/s", "GB/s", "TFLOP/s"]


def test_steps_near_and_far(section):
    rows = {row["what"]: row for row in section("decode-8")}
    steps = [row for row in rows.values() if row["unit"] == "ms/step"]
    # 128 tokens less the room for the pages that are timed.
    assert [row["what"] for row in steps] == [
        "RaaS, 32 kept, batch 8, at 64 tokens",
        "RaaS, 32 kept, batch 8, at 128 tokens",
        "dense, batch 8, at 64 tokens",
        "dense, batch 8, at 96 tokens",
    ]
    weights = random_params(shapes.TINY).size * 4
    per_token = 2 * 2 * 2 * 16 * 4  # Keys and values, layers, heads, head dim, bytes.
    for row, pages in zip(steps, (2, 2, 3, 5), strict=True):
        # Full pages, the prompt, and half of the current page.
        assert row["step_bytes"] == weights + 8 * (16 * pages + 4 + 8) * per_token
        assert row["floor"] * row["over_floor"] == pytest.approx(row["value"])
        assert row["of_copy_bandwidth"] == pytest.approx(1 / row["over_floor"])
        assert row["tokens_per_second"] == pytest.approx(8000 / row["value"])
    ratio = rows["RaaS, 32 kept, batch 8, at 128 over at 64 tokens"]
    assert ratio["value"] == pytest.approx(steps[1]["value"] / steps[0]["value"])
    assert rows["dense, batch 8, at 96 over at 64 tokens"]["unit"] == "x"


def test_what_does_not_fit_is_a_row(section, monkeypatch):
    monkeypatch.setattr("raas_jax.lab.device_check.decoding.device_memory", lambda: 10**5)
    rows = section("decode-1")
    assert {row["kind"] for row in rows} == {"missing"} and len(rows) == 4
    assert rows[0]["why"].startswith("out of memory")


@pytest.mark.parametrize("name", ["greedy", "top-k, top-p, min-p"])
def test_each_draw_waits_for_the_one_before(name):
    """And is a draw of the sampler, over the whole vocabulary."""
    case = sampling.case(sampling.WAYS[name], 3, 50)
    sampler, logits, _ = case.arrays
    step, draw = jax.jit(case.step), jax.jit(lambda number: sampler(logits, number)[0])
    first = step(case.carry, case.arrays, jnp.int32(0))
    np.testing.assert_array_equal(first, draw(case.carry))
    assert case.bytes == 3 * 50 * 4
    if sampling.WAYS[name] == Sampling():
        np.testing.assert_array_equal(first, np.argmax(logits, -1))
    # Which number of a draw it is comes from the last one.
    second = step(first, case.arrays, jnp.int32(1))
    np.testing.assert_array_equal(second, draw(first))


def test_sampling_and_prefill_are_timed(section, monkeypatch):
    monkeypatch.setattr(sampling, "WAYS", {"greedy": Sampling()})
    monkeypatch.setattr(sampling, "BATCHES", (1, 2))
    draws, prompts = section("sampling"), section("prefill")
    assert [row["what"] for row in draws] == [
        f"greedy, batch {batch}, vocabulary 512" for batch in (1, 2)
    ]
    (prompt,) = prompts
    assert prompt["tokens_per_second"] == pytest.approx(5000 / prompt["value"])
    assert all(row["floor"] > 0 for row in [*draws, prompt])


def test_operations_of_a_prompt_by_hand():
    config = ModelConfig(7, 4, 6, 1, 2, 1, 2)  # V D F L N K H
    params = random_params(config)
    # q and o 4 x 4 each, k and v 2 x 4, gate, up and down 6 x 4.
    products = 2 * 3 * (16 + 16 + 8 + 8 + 3 * 24)
    # Six pairs of tokens, two heads of two, once for scores and once for values.
    attention = 2 * 2 * (6 * 2 * 2)
    assert prefilling.operations(config, params, 3) == products + attention + 2 * 7 * 4
    assert prefilling.operations(config, params.separate(), 3) == prefilling.operations(
        config, params, 3
    )
    near = dataclasses.replace(config, window=2, window_layers=(0,))
    # The third token does not see the first.
    found = prefilling.operations(near, params, 3)
    assert found == products + 2 * 2 * (5 * 2 * 2) + 2 * 7 * 4
    experts = dataclasses.replace(
        config,
        model_type="qwen3_moe",
        num_experts=5,
        num_experts_per_tok=2,
        moe_intermediate_size=3,
    )
    # In the place of gate, up and down: 5 x 4 that choose, and two of the five, 3 x 4 each.
    chosen = 2 * 3 * (16 + 16 + 8 + 8 + 20 + 2 * 3 * 12)
    found = prefilling.operations(experts, random_params(experts), 3)
    assert found == chosen + attention + 2 * 7 * 4


@pytest.mark.parametrize("pages", [*kernels.SERVED, *kernels.OTHERS])
def test_what_is_tried_on_a_device_is_well_formed(pages, monkeypatch):
    """Shapes alone: an operation that would refuse them says so."""
    small = pages._replace(B=min(pages.B, 2), S=8)
    whole = (small,) if pages in kernels.SERVED else ()
    names = set()
    for case in kernels.cases(whole, () if whole else (small,)):
        call = partial(case.operation, implementation="xla", **case.options)
        with jax.numpy_dtype_promotion("standard"):  # As a section has it.
            jax.eval_shape(call, *case.arrays)
        names.add(case.operation.__name__)
    every = {name for name in pallas_kernels.__all__ if name[0].islower()} - {"head_pages"}
    assert names == (every if whole else {name for name in names if name.endswith("attention")})


def test_a_kernel_that_is_right(section):
    rows = section("kernels")
    told = {(row["what"].partition(",")[0], row["right"]) for row in rows}
    assert ("decode_attention", True) in told and ("page_commit", True) in told
    assert ("page_bound", None) in told and not any(right is False for _, right in told)
    assert {row["why"] for row in rows if row["right"] is None} == {"there is none for cpu"}
    text = table(rows)
    assert "2 of 2 right" in text and "no kernel" in text


@pytest.mark.parametrize("wrong", ["scale", "nan", "page"])
def test_a_kernel_that_is_wrong_is_found(wrong):
    case = next(kernels.cases(kernels.ON_CPU[:1], ()))

    def broken(*arrays, implementation):
        if implementation == "xla":
            return case.operation(*arrays, implementation="xla")
        q, k, v, fill, layer = arrays
        if wrong == "page":
            fill = fill.at[0, 0, -1].set(0).at[0, 0, 0].set(4)
        part = case.operation(q, k, v, fill, layer, implementation="xla")
        if wrong == "scale":
            return part._replace(out=part.out * 1.01)
        return part._replace(sum=part.sum.at[0, 0].set(jnp.nan)) if wrong == "nan" else part

    right, error, why = kernels.compare(case._replace(operation=broken), "gpu")
    assert not right and error > 2e-3
    assert {"scale": "out", "nan": "sum", "page": "page_lse"}[wrong] in why


def test_an_error_that_is_no_refusal_is_not_taken_for_one():
    assert kernels.declined(ValueError("q has shape (2,)"), "gpu") is None
    text = "decode_attention: no backend serves these arguments. gpu: P is 3."
    assert kernels.declined(ValueError(text), "gpu") == "P is 3."


def test_transformers_decodes_the_shape(tmp_path):
    torch = pytest.importorskip("torch", reason="the rival is torch")
    shapes.write(shapes.TINY, tmp_path, "float32")
    model = rivals.transformers_model(tmp_path, "cpu", "float32")
    assert type(model).__name__ == "Qwen3ForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == random_params(shapes.TINY).size
    if not torch.cuda.is_available():
        check = Check.of(tmp_path, "torch-1")
        RUN["torch-1"](check)
        assert read(check.journal.file)[-1]["why"] == "torch sees no CUDA"


def test_vllm_is_timed_by_what_more_tokens_take(section, tmp_path, monkeypatch):
    """With the interface of vLLM, and a clock that knows what a step takes."""
    clock, made, step, prompt = [0.0], {}, 0.007, 0.3

    class LLM:
        def __init__(self, **options):
            made.update(options)

        def generate(self, prompts, sampling, use_tqdm):
            assert all(len(each["prompt_token_ids"]) < made["max_model_len"] for each in prompts)
            clock[0] += prompt + step * len(prompts) * (sampling["max_tokens"] - 1)

    fake = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **options: options)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    monkeypatch.setattr(rivals.time, "perf_counter", lambda: clock[0])
    shapes.write(shapes.TINY, tmp_path / "model", "bfloat16")
    rows = section("vllm")
    assert [row["value"] for row in rows] == pytest.approx([7, 56, 448, 7, 56])
    assert rows[1]["tokens_per_second"] == pytest.approx(1 / step)
    assert made["load_format"] == "dummy" and made["model"] == str(tmp_path / "model")
