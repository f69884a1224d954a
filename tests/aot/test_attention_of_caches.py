"""`cache_attention` through the compilers for TPUs and Hopper, alone and in whole decodes."""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from aot.conftest import TPUS
from hlo import computations, written_in_loops

from pallas_kernels import Segment, Target, cache_attention
from pallas_kernels.arrays import result
from pallas_kernels.ranges import Ranges
from raas_jax import ModelConfig, RaaS
from raas_jax.aot.memory import abstract_session, target_mesh
from raas_jax.aot.targets import target_devices

BF16, F32, I32 = jnp.bfloat16, jnp.float32, jnp.int32
L, PROMPT = 8, 512
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"


def some_ranges(P, K, tokens=1024):
    """Of so many tokens per layer and head on an average, from one page to twice as many."""
    counts = np.random.default_rng(0).integers(1, 2 * tokens // P, (L, K))
    return Ranges(tuple(map(tuple, counts.tolist())))


def operands(dtype, B, K, G, H, P, S=1024, samples=1, ranges=None):
    """q and the segments, of so many kept tokens per row."""
    slots = S // P if ranges is None else ranges.most
    pages = result(L, B, K, slots, P, H, dtype=dtype)
    if ranges is not None:
        pages = result(B, ranges.total, P, H, dtype=dtype)
    paged = result(L, B // samples, K, PROMPT // P, P, H, dtype=dtype)
    page = result(L, B, K, P, H, dtype=dtype)
    number = result(dtype=I32)
    return (
        result(B, K * G, H, dtype=dtype),
        Segment(paged, paged, result(B // samples, dtype=I32), number),
        Segment(pages, pages, result(L, B, K, slots, dtype=I32), number),
        Segment(page, page, number, number),
    )


def compile_for(device, implementation, arrays, ranges=None):
    """The compiled operation, forced onto the kernel; it gives what decoding asks for."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    options = {"implementation": implementation, "target": Target.of(device), "ranges": ranges}
    call = partial(cache_attention, dtype=arrays[0].dtype, **options)
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


@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "tpu7x:2x2x1"])
def test_over_ranges_for_tpus(tpu, name):
    ranges = some_ranges(16, 8)
    arrays = operands(BF16, 8, 8, 4, 128, 16, ranges=ranges)
    program = compile_for(tpu(name)[0], "tpu", arrays, ranges)
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
        (BF16, 1, 8, 4, 128, 16, 1), (BF16, 8, 4, 7, 128, 8, 8), (BF16, 2, 1, 16, 256, 128, 1),
        (BF16, 2, 1, 8, 96, 16, 1), (F32, 2, 4, 7, 128, 16, 1),
    ],
)  # fmt: skip
def test_on_hopper_without_spills(hopper, monkeypatch, capfd, dtype, B, K, G, H, P, samples):
    """Neither of the two launches."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    program = compile_for(hopper, "gpu", operands(dtype, B, K, G, H, P, samples=samples))
    assert_two_clean_launches(program, "".join(capfd.readouterr()), H)


@pytest.mark.parametrize(("B", "P"), [(1, 16), (8, 8)])
def test_over_ranges_on_hopper_without_spills(hopper, monkeypatch, capfd, B, P):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    ranges = some_ranges(P, 4)
    arrays = operands(BF16, B, 4, 7, 128, P, ranges=ranges)
    program = compile_for(hopper, "gpu", arrays, ranges)
    assert_two_clean_launches(program, "".join(capfd.readouterr()), 128)


def assert_two_clean_launches(program, report, H):
    """One where XLA joins the shares."""
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


def attends(instruction):
    """Whether it is the kernel, and no loop round it."""
    return instruction.op == "custom-call" and "cache_attention" in instruction.name


def test_one_row_leaves_its_prompt_in_the_memory_of_a_v6e(tpu, shared):
    """Left to itself, the compiler moved the whole prompt cache into VMEM in every layer.

    Once per page it may move the kept pages there, which is little and may help.
    """
    session, text = decode(shared, "v6e:2x2", "Qwen2.5-7B-Instruct", 1)
    cache = session.shape.cache
    size = min(bytes_of(cache.prompt.k), bytes_of(cache.kept[0].k)) // 8
    parts = computations(text).values()
    layers = [part for part in parts if any(map(attends, part))]
    assert layers
    copies = {"copy", "copy-start", "slice-start"}
    moved = [each for part in layers for each in part if each.op in copies and each.bytes >= size]
    assert moved == []


# Instructions that name what exists.
FREE = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant"}
LAUNCHES = 18
"""In a layer of Llama-3.1-8B at one row, the products among them."""


def test_one_row_on_hopper_attends_in_two_launches(hopper, shared):
    """Three operations and a merge made it about twenty of a layer's forty."""
    session, text = decode(shared, "h100", "Llama-3.1-8B-Instruct", 1)
    [layer] = [
        part
        for part in computations(text).values()
        if any(named("cache_attention", each) for each in part)
    ]
    ours = [
        each for each in layer for name in ("cache_attention", "merge_parts") if named(name, each)
    ]
    assert [each.op for each in ours] == ["custom-call"] * 2
    assert sum(each.op not in FREE for each in layer) <= LAUNCHES
    assert written_in_loops(text, bytes_of(session.shape.cache.prompt.k)) == []


def named(name, instruction):
    """Whether it calls the kernel of this name."""
    return re.search(rf'mosaic_gpu.*op_name="[^"]*/{name}/', instruction.line) is not None
