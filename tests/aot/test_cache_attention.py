"""`cache_attention` through the compilers for TPUs and Hopper, alone and in whole decodes."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from aot.conftest import TPUS
from hlo import computations, written_in_loops

from pallas_kernels import Segment, Target, cache_attention
from pallas_kernels.arrays import result
from raas_jax import ModelConfig, RaaS
from raas_jax.aot.memory import abstract_session, target_mesh
from raas_jax.aot.targets import target_devices

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
L, PROMPT = 8, 512
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
SHARED_MEMORY = 227 * 1024


def operands(dtype, B, K, G, H, P, S=1024, samples=1):
    """q and the segments, of so many kept tokens per row."""
    pages = result(L, B, K, S // P, P, H, dtype=dtype)
    paged = result(L, B // samples, K, PROMPT // P, P, H, dtype=dtype)
    page = result(L, B, K, P, H, dtype=dtype)
    number = result(dtype=I32)
    return (
        result(B, K * G, H, dtype=dtype),
        Segment(paged, paged, result(B // samples, dtype=I32), number),
        Segment(pages, pages, result(*pages.shape[:4], dtype=I32), number),
        Segment(page, page, number, number),
    )


def compile_for(device, implementation, arrays):
    """The compiled operation, forced onto the kernel."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    call = partial(cache_attention, implementation=implementation, target=Target.of(device))
    here = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arrays)
    return jax.jit(call).lower(*here).compile()


def layer_bytes(arrays):
    """Of the keys of a layer of kept pages."""
    pages = arrays[2].k
    return pages.size // L * pages.dtype.itemsize


@pytest.mark.parametrize("name", TPUS)
def test_for_every_tpu(tpu, name):
    """The shapes of Llama-3.1-8B: within its memories, and nothing is copied."""
    arrays = operands(BF16, 8, 8, 4, 128, 16)
    program = compile_for(tpu(name)[0], "tpu", arrays)
    assert program.memory_analysis().temp_size_in_bytes < layer_bytes(arrays) / 2


@pytest.mark.parametrize(
    ("dtype", "B", "K", "G", "H", "P", "samples"),
    [
        (BF16, 8, 4, 7, 128, 16, 8),
        (F32, 4, 2, 8, 128, 8, 1),
        (BF16, 4, 4, 1, 256, 32, 2),
        (BF16, 2, 1, 16, 128, 128, 1),
    ],
)
def test_for_a_tpu_of_many_shapes(tpu, dtype, B, K, G, H, P, samples):
    arrays = operands(dtype, B, K, G, H, P, samples=samples)
    program = compile_for(tpu("v5e:2x2")[0], "tpu", arrays)
    assert program.memory_analysis().temp_size_in_bytes < layer_bytes(arrays)


@pytest.fixture(scope="module")
def hopper():
    try:
        return target_devices("h100")[0]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("dtype", "B", "K", "G", "H", "P", "samples"),
    [
        (BF16, 1, 8, 4, 128, 16, 1), (BF16, 8, 4, 7, 128, 8, 8), (BF16, 2, 2, 64, 64, 32, 1),
        (BF16, 2, 1, 16, 256, 128, 1), (BF16, 2, 1, 8, 96, 16, 1), (F32, 2, 4, 7, 128, 16, 1),
    ],
)  # fmt: skip
def test_on_hopper_without_spills(hopper, monkeypatch, capfd, dtype, B, K, G, H, P, samples):
    """Neither of the two launches; and within the shared memory of a multiprocessor."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    program = compile_for(hopper, "gpu", operands(dtype, B, K, G, H, P, samples=samples))
    report = "".join(capfd.readouterr())
    launches = 1 if H % 64 else 2
    assert report.count(CLEAN) == report.count("bytes stack frame") == launches
    calls = [
        each
        for part in computations(program.as_text()).values()
        for each in part
        if "mosaic_gpu" in each.line
    ]
    assert len(calls) == launches
    assert program.memory_analysis().temp_size_in_bytes < 8 << 20


# Whole decodes


def decode(shared, target, model, rows):
    config = ModelConfig.from_file(shared / f"configs/{model}/config.json")
    mesh = target_mesh(config, target, 1, 1)
    session = abstract_session(
        config, RaaS(1024), [PROMPT] * rows, 32_768, jnp.dtype("bfloat16"), mesh
    )
    with jax.numpy_dtype_promotion("standard"):
        return session, session.lower_advance(2).compile().as_text()


def bytes_of(x):
    return x.size * x.dtype.itemsize


def test_one_row_leaves_its_prompt_in_the_memory_of_a_v6e(tpu, shared):
    """Left to itself, the compiler moved the whole prompt cache into VMEM in every layer."""
    session, text = decode(shared, "v6e:2x2", "Qwen2.5-7B-Instruct", 1)
    cache = session.shape.cache
    size = min(bytes_of(cache.prompt.k), bytes_of(cache.kept[0].k)) // 8
    assert written_in_loops(text, size) == []


# Instructions that name what exists, or wait.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}


def test_one_row_on_hopper_launches_two_kernels_a_layer(hopper, shared):
    _, text = decode(shared, "h100", "Llama-3.1-8B-Instruct", 1)
    [layer] = [
        part
        for part in computations(text).values()
        if any("mosaic_gpu" in each.line for each in part)
    ]
    launched = [each for each in layer if each.op not in FREE]
    kernels = [each for each in launched if "mosaic_gpu" in each.line]
    assert len(kernels) == 2
    # And what lies between them and the product that follows is nothing.
    names = {each.name for each in launched}
    users = [each for each in launched if re.search(r"mosaic_gpu", each.line) is None]
    assert len(names) == len(kernels) + len(users) <= 23
