"""The whole RaaS decode of real models, compiled for TPUs, by the compiler's own account."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import pytest
from aot.conftest import TPUS
from hlo import collectives, computations, written_in_loops

from raas_jax import ModelConfig, RaaS
from raas_jax.aot.memory import abstract_session, compiled, target_mesh
from raas_jax.aot.targets import DEVICE_MEMORY, target_devices

MODELS = "Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"
PROMPT, BUDGET, NEW, P = 512, 1024, 65_536, 16


@pytest.fixture
def config(shared, tpu):
    """A published configuration by its name; skips where they or the compiler are not here."""

    def read(name):
        if name != "70B":
            return ModelConfig.from_file(shared / "configs" / name / "config.json")
        # Llama-3.1-70B by the published sizes that differ from its smaller sibling's.
        return dataclasses.replace(
            ModelConfig.from_file(shared / "configs" / MODELS[1] / "config.json"),
            num_hidden_layers=80,
            hidden_size=8192,
            intermediate_size=28_672,
            num_attention_heads=64,
        )

    return read


@functools.cache
def session(config, target, data, model, rows, new=NEW):
    mesh = target_mesh(config, target, data, model)
    return abstract_session(config, RaaS(BUDGET), [PROMPT] * rows, new, "bfloat16", mesh)


@functools.cache
def decode(config, target, data, model, rows, pages=2):
    """The account and the text of the compiled loop."""
    program = session(config, target, data, model, rows).lower_advance(pages).compile()
    return compiled(program.memory_analysis()), program.as_text()


def on_a_device(tree):
    """Bytes of each array as it lies on one device."""
    return [
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    ]


def kv_by_formula(config, rows, data, model):
    """Prompt, kept and current pages, in bytes on one device: two vectors of H per token."""
    tokens = PROMPT + BUDGET + P
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 2
    return rows * tokens * per_token // data // model


def check(config, target, data, model, rows):
    """What must hold of any decode."""
    ahead = session(config, target, data, model, rows)
    account, text = decode(config, target, data, model, rows)
    kind = ahead.mesh.devices.flat[0].device_kind
    assert account.peak < DEVICE_MEMORY[kind]
    weights, state = sum(on_a_device(ahead.params)), sum(on_a_device(ahead.shape.cache))
    by_formula = kv_by_formula(config, rows, data, model)
    assert abs(state - by_formula) <= 0.03 * by_formula
    # And that is what the compiler allocates: nothing is padded.
    assert abs(account.arguments - weights - by_formula) <= 0.03 * by_formula
    # The cache is updated in place, and a step takes little besides it.
    assert account.aliases >= state
    assert account.temporaries < 0.05 * (weights + state)
    cache = ahead.shape.cache
    smallest = min(on_a_device((cache.prompt.k, cache.kept[0].k)))
    assert written_in_loops(text, smallest) == []
    assert kernels(text) == {"cache_attention", "page_commit"}


def kernels(text):
    """Names of the kernels that a program calls."""
    return {
        each.name.split(".")[0]
        for part in computations(text).values()
        for each in part
        if 'custom_call_target="tpu_custom_call"' in each.line
    }


# Each kind with one of them, in turn; one kind with both.
ALONE = [*zip(TPUS, MODELS * len(TPUS), strict=False), ("v5e:2x2", MODELS[0])]


@pytest.mark.parametrize(("target", "model"), ALONE)
def test_on_one_device(config, target, model):
    """One row where the weights fill the memory, eight elsewhere."""
    roomy = DEVICE_MEMORY[target_devices(target)[0].device_kind] > 20 << 30
    check(config(model), target, 1, 1, 8 if roomy else 1)


def test_no_weight_is_copied_before_it_is_read(config):
    """Nor a layer's slice of one: each is read where it lies."""
    shape = config(MODELS[0])
    layers = session(shape, "v5e:2x2", 1, 1, 1).params.weights["layers"]
    one_layer = [
        sum(on_a_device(layers[name])) // shape.num_hidden_layers
        for name in ("q", "o", "gate", "up", "down")
    ]
    _, text = decode(shape, "v5e:2x2", 1, 1, 1)
    assert written_in_loops(text, min(one_layer)) == []


def test_the_allocation_does_not_depend_on_the_length(config):
    shape = config(MODELS[0])
    short, long = (session(shape, "v5e:2x2", 1, 1, 1, new) for new in (2048, NEW))
    # The limit is data: one program serves both.
    assert short.plan == long.plan
    few, many = (decode(shape, "v5e:2x2", 1, 1, 1, pages)[0] for pages in (2, 64))
    assert few.arguments == many.arguments
    # The compiler arranges two programs a little differently; a row of one page takes 0.9 MiB.
    assert abs(many.temporaries - few.temporaries) < 1 << 19
    # What grows is what is given out: a token and its log-probability, padded to whole tiles.
    assert 0 < many.outputs - few.outputs <= 62 * P * 8 * 128


MESHES = [
    (MODELS[0], "v5e:2x4", 2, 4, 32),
    (MODELS[1], "v5e:2x4", 1, 8, 32),
    ("70B", "v5p:4x4x4", 8, 8, 64),
]


@pytest.mark.parametrize(("model", "target", "data", "ways", "rows"), MESHES)
def test_tensor_parallel(config, model, target, data, ways, rows):
    shape = config(model)
    check(shape, target, data, ways, rows)
    _, text = decode(shape, target, data, ways, rows)
    # Each layer sums the output of the attention and of the mlp over the devices, and that is all.
    assert in_layer_loop(text) == {"all-reduce": 2}


def in_layer_loop(text):
    """Collectives of the computation that attends, which is the body of the loop over layers."""
    [body] = [
        part
        for part in computations(text).values()
        # Of its arguments, some that loops hand on have its name, too.
        if any(i.op == "custom-call" and i.name.startswith("cache_attention") for i in part)
    ]
    lines = "\n".join("  " + each.line for each in body)
    return collectives(f"%body () -> () {{\n{lines}\n}}")


def test_prefill_holds_no_square(config):
    """Splash attention, and temporaries that do not grow with the square of the prompt."""
    shape = dataclasses.replace(config(MODELS[0]), num_hidden_layers=2)
    mesh = target_mesh(shape, "v5e:2x2", 1, 1)
    ahead = abstract_session(shape, RaaS(BUDGET), [8192], NEW, "bfloat16", mesh)
    program = ahead.lower_start().compile()
    square = shape.num_attention_heads * 8192 * 8192 * 2
    assert program.memory_analysis().temp_size_in_bytes < square / 4
    assert any("splash" in name for name in kernels(program.as_text()))
