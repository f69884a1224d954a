"""The Hopper kernels, and a whole decode loop, through the compiler for compute capability 9.0.

No GPU is needed, but JAX's CUDA plugin of the same version:
`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`, and `ptxas` of CUDA 13 on PATH.
"""

from __future__ import annotations

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo import written_in_loops

from pallas_kernels import (
    Target,
    decode_attention,
    grouped_product,
    page_bound,
    page_commit,
    ragged_decode_attention,
    ragged_page_commit,
    selected_decode_attention,
    stacked_product,
)
from pallas_kernels.ranges import Ranges
from raas_jax import ModelConfig, RaaS
from raas_jax.aot.memory import abstract_session, compiled, target_mesh
from raas_jax.aot.targets import target_devices
from raas_jax.aot.traffic import ON_GPU, account, total
from raas_jax.decode import cache_bytes
from raas_jax.experts import Experts, mixture, route
from raas_jax.model import MATRICES

MEMORY = 80e9
CLEAN = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
I32, BF16, F32 = jnp.int32, jnp.bfloat16, jnp.float32


@pytest.fixture(scope="module")
def device():
    try:
        return target_devices("h100")[0]
    except ModuleNotFoundError as error:
        pytest.skip(str(error))


def at(device, tree):
    sharding = jax.sharding.SingleDeviceSharding(device)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def shape(*sizes, dtype=BF16):
    return jax.ShapeDtypeStruct(sizes, dtype)


@pytest.fixture
def compile_kernel(device, monkeypatch, capfd):
    """Compiles one call that must be served by the kernel; returns it and ptxas's report."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")

    def compiled(operation, *arrays, **options):
        call = partial(operation, implementation="gpu", target=Target.of(device), **options)
        found = jax.jit(call).lower(*at(device, arrays)).compile()
        report = capfd.readouterr()
        return found, report.out + report.err

    return compiled


# Qwen2.5-7B with pages of several sizes, Llama-3.1-8B, other head dims, the widest groups, float32.
SIZES = [
    (BF16, 4, 7, 128, 1), (BF16, 4, 7, 128, 16), (BF16, 4, 7, 128, 128), (BF16, 8, 4, 128, 16),
    (BF16, 2, 64, 64, 16), (BF16, 1, 16, 256, 16), (BF16, 1, 16, 96, 16), (BF16, 2, 4, 80, 64),
    (F32, 4, 7, 128, 16), (F32, 2, 16, 80, 16),
]  # fmt: skip


@pytest.mark.parametrize("dtype, K, G, H, page", SIZES)
def test_decode_attention_compiles_without_spills(compile_kernel, dtype, K, G, H, page):
    S = 4096 // page
    pages = shape(28, 8, K, S, page, H, dtype=dtype)
    arrays = (shape(8, K * G, H, dtype=dtype), pages, pages, shape(8, K, S, dtype=I32))
    found, report = compile_kernel(decode_attention, *arrays)
    assert "sm_90a" in report and CLEAN in report
    # Nothing as large as one layer of keys: no layer is sliced out, nothing is transposed.
    assert found.memory_analysis().temp_size_in_bytes < size(pages) / 28


@pytest.mark.parametrize("page", [16, 128])
def test_selected_decode_attention_compiles_without_spills(compile_kernel, page):
    S = 4096 // page
    arrays = (
        shape(8, 28, 128),
        *[shape(28, 4, 4, S, page, 128)] * 2,
        shape(4, 4, S, dtype=I32),
        shape(8, 4, S // 4, dtype=I32),
    )
    found, report = compile_kernel(selected_decode_attention, *arrays)
    assert "sm_90a" in report and CLEAN in report
    assert found.memory_analysis().temp_size_in_bytes < 4 * 4 * S * page * 128 * 2


def test_page_bound_compiles_without_spills(compile_kernel):
    _, report = compile_kernel(page_bound, shape(8, 28, 128), *[shape(28, 8, 4, 264, 128)] * 2)
    assert "sm_90a" in report and CLEAN in report


def test_page_commit_is_one_scatter_in_place(device):
    """Why XLA serves it on GPUs: it allocates nothing, and all of the buffer is aliased."""
    pages = shape(28, 8, 4, 64, 16, 128)
    arrays = at(device, (pages, shape(28, 8, 4, 16, 128), shape(28, 8, 4, dtype=I32)))
    call = partial(page_commit, target=Target.of(device))
    found = jax.jit(call, donate_argnums=0).lower(*arrays).compile()
    analysis = found.memory_analysis()
    assert analysis.temp_size_in_bytes == 0
    assert analysis.alias_size_in_bytes == pages.size * 2
    assert len(re.findall(r"= \S+ scatter\(", found.as_text())) == 1
    assert " copy(" not in found.as_text()


# Products of Qwen3-8B: queries, keys and values; gate and up; down, whose sum is split.
@pytest.mark.parametrize(
    ("rows", "width", "outs"),
    [
        (1, 4096, (4096, 1024, 1024)),
        (64, 4096, (12288, 12288)),
        (64, 12288, (4096,)),
        (256, 4096, (12288, 12288)),
    ],
)
def test_stacked_product_compiles_without_spills(compile_kernel, rows, width, outs):
    stacks = [shape(36, out, width) for out in outs]
    found, report = compile_kernel(stacked_product, shape(rows, width), stacks)
    assert "sm_90a" in report and CLEAN in report
    # Products that wait for each other, which the assembler makes of what it does not understand.
    assert "serializ" not in report
    # Of the weights nothing is copied: what there is besides is the parts of sums.
    assert found.memory_analysis().temp_size_in_bytes < 9 * 4 * rows * sum(outs) + 2**20
    assert " dynamic-slice(" not in found.as_text() and " copy(" not in found.as_text()


# Qwen3-30B-A3B for one row, for many, and for a prompt; gpt-oss.
@pytest.mark.parametrize(
    ("blocks", "rows", "width", "outs", "experts"),
    [
        (8, 8, 2048, (768, 768), 128),
        (152, 16, 768, (2048,), 128),
        (150, 128, 2048, (768, 768), 128),
        (40, 24, 2880, (2880, 2880), 32),
    ],
)
def test_grouped_product_compiles_without_spills(
    compile_kernel, blocks, rows, width, outs, experts
):
    stacks = [shape(24, experts, out, width) for out in outs]
    arrays = shape(blocks, rows, width), stacks, shape(blocks, dtype=I32)
    found, report = compile_kernel(grouped_product, *arrays)
    assert "sm_90a" in report and CLEAN in report and "serializ" not in report
    # What comes out, of several stacks at once; and of the weights nothing.
    assert found.memory_analysis().temp_size_in_bytes <= 2 * blocks * rows * sum(outs)
    assert " dynamic-slice(" not in found.as_text() and " copy(" not in found.as_text()


@pytest.mark.parametrize(("rows", "read"), [(1, 8), (64, 128)])
def test_a_mixture_reads_the_experts_that_are_chosen_once(device, rows, read):
    """Of Qwen3-30B-A3B: its 128 experts of a layer are 1.2 GB."""
    (L, E, F, D), k = (48, 128, 768, 2048), 8
    stacks = shape(L, E, F, D), shape(L, E, F, D), shape(L, E, D, F)
    number = shape(dtype=I32)

    def layer(x, logits, stacks, number):
        own = Experts(*stacks, number, target=Target.of(device))
        return mixture(x, *route(logits, k, True), own)

    arrays = at(device, (shape(rows, D), shape(rows, E, dtype=F32), stacks, number))
    found = jax.jit(layer).lower(*arrays).compile()
    moved = account(found.as_text(), ON_GPU).moved
    weights = read * size(stacks) / (L * E)
    assert weights < total(moved) < 1.08 * weights
    kernels = [each for each in moved if "grouped_product" in each.what]
    assert len(kernels) == 2 and sum(each.reads for each in kernels) < 1.03 * weights
    # The router's choice, their order, what is between the products, and the sum.
    assert len(moved) <= 20


# Ranges of a pool


def some_ranges(page, tokens=1024, layers=28, heads=4):
    """Of so many tokens on an average, from one page to twice as many."""
    counts = np.random.default_rng(0).integers(1, 2 * tokens // page, (layers, heads))
    # Copies begin on a multiple of eight tokens.
    counts[-1, -1] += -np.sum(counts) % 8
    return Ranges(tuple(map(tuple, counts.tolist())))


@pytest.mark.parametrize(
    "dtype, G, H, page, rows",
    [
        (BF16, 7, 128, 16, 8), (BF16, 7, 128, 16, 1), (BF16, 7, 128, 1, 8),
        (BF16, 16, 96, 128, 8), (F32, 7, 128, 16, 8),
    ],
)  # fmt: skip
def test_ragged_decode_attention_compiles_without_spills(compile_kernel, dtype, G, H, page, rows):
    ranges = some_ranges(page)
    pool = shape(rows, ranges.total, page, H, dtype=dtype)
    fill = shape(rows, 4, ranges.most, dtype=I32)
    arrays = shape(rows, 4 * G, H, dtype=dtype), pool, pool, fill, shape(dtype=I32)
    found, report = compile_kernel(ragged_decode_attention, *arrays, ranges=ranges)
    assert "sm_90a" in report and CLEAN in report
    # Nothing as large as what a layer has of the pool.
    assert found.memory_analysis().temp_size_in_bytes < size(pool) / 28


def test_ragged_page_commit_is_one_scatter_in_place(device):
    """As `page_commit` is."""
    ranges = some_ranges(16)
    pool = shape(8, ranges.total, 16, 128)
    arrays = at(device, (pool, shape(28, 8, 4, 16, 128), shape(28, 8, 4, dtype=I32)))
    call = partial(ragged_page_commit, ranges=ranges, target=Target.of(device))
    found = jax.jit(call, donate_argnums=0).lower(*arrays).compile()
    analysis = found.memory_analysis()
    assert analysis.temp_size_in_bytes == 0
    assert analysis.alias_size_in_bytes == pool.size * 2
    assert len(re.findall(r"= \S+ scatter\(", found.as_text())) == 1
    assert " copy(" not in found.as_text()


# The whole decode of a real model.


def compiled_loop(config: ModelConfig, rows, pages, budget=1024, new=32_768):
    policy, dtype = RaaS(budget, prompt="excluded"), jnp.dtype("bfloat16")
    # The tests' strict promotion is for float32; `jax.nn` mixes dtypes where weights are bfloat16.
    with jax.numpy_dtype_promotion("standard"):
        mesh = target_mesh(config, "h100")
        session = abstract_session(config, policy, [512] * rows, new, dtype, mesh)
        return session, session.lower_advance(pages).compile()


MODELS = ["Qwen2.5-7B-Instruct", "Llama-3.1-8B-Instruct"]


@pytest.fixture(scope="module", params=MODELS)
def loop(device, shared, request):
    config = ModelConfig.from_file(shared / f"configs/{request.param}/config.json")
    return compiled_loop(config, rows=32, pages=4)


def test_real_models_decode_through_the_kernel_and_fit(loop):
    session, program = loop
    account = compiled(program.memory_analysis())
    assert "mosaic_gpu" in program.as_text()
    assert account.peak < MEMORY
    said = cache_bytes(session.shape)
    weights = size(session.params.weights)
    assert abs(account.arguments - weights - said) <= 0.03 * said
    assert account.aliases >= said
    # Besides, a step takes less than a fiftieth of the cache and one layer of weights.
    layer = weights / session.params.config.num_hidden_layers
    assert account.temporaries < said / 50 + layer


def copies_of_weights(session, program):
    """Instructions in loops that write as much as a layer's smallest matrix, in its form.

    Where rows are many, logits and the like are as large, but not as wide as what is summed over.
    """
    config, layers = session.params.config, session.params.weights["layers"]
    matrices = [layers[name] for name in MATRICES if name in layers]
    written = written_in_loops(
        program.as_text(), min(map(size, matrices)) // config.num_hidden_layers
    )
    widths = "|".join({str(matrix.shape[-1]) for matrix in matrices})
    return [line for line in written if re.search(rf"bf16\[([0-9]+,)*({widths})\]\S* \S+\(", line)]


def test_real_models_copy_no_weights_in_their_loop(loop):
    assert copies_of_weights(*loop) == []


def test_real_models_copy_no_cache_in_their_loop(loop):
    session, program = loop
    cache = session.shape.cache
    assert (
        written_in_loops(program.as_text(), min(size(cache.prompt.k), size(cache.kept[0].k))) == []
    )


@pytest.mark.parametrize(
    ("model", "rows"), [("Qwen3-8B", 1), ("Qwen3-8B", 8), ("Qwen3-8B", 64), ("Qwen3-8B", 256)]
)
def test_no_weights_are_copied(device, shared, model, rows):
    """A step is bound by reading the weights: once, into no copy."""
    config = ModelConfig.from_file(shared / f"configs/{model}/config.json")
    session, program = compiled_loop(config, rows, pages=4, budget=1024 if rows < 256 else 256)
    assert copies_of_weights(session, program) == []
    text = program.as_text()
    # One kernel each: for queries, keys and values; the output; gate and up; down. And the head.
    assert len(re.findall(r'custom_call_target="mosaic_gpu', text)) >= 5
    assert len(re.findall(r" custom-call\(.*bf16\[36,", text)) >= 4
    if rows <= 8:
        layers, count = session.params.weights["layers"], config.num_hidden_layers
        assert compiled(program.memory_analysis()).temporaries < size(layers) // count / 10
        assert written_in_loops(text, size(layers["o"]) // count) == []


def test_the_allocation_does_not_grow_with_the_length(device):
    """A small model, since it is compiled twice: 64 and 2,048 tokens in one program."""
    config = ModelConfig(512, 256, 512, 2, 4, 2, 64, dtype="bfloat16")
    programs = [compiled_loop(config, 4, pages)[1] for pages in (4, 128)]
    short, long = (compiled(program.memory_analysis()) for program in programs)
    assert long.temporaries == short.temporaries
    assert long.arguments == short.arguments
