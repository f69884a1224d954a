"""Heads' own ranges of a pool: which pages are whose, attention over them, and the write of a page.

By plain NumPy in float64, page by page. What is dead, or of another layer or head, is NaN.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import Target, ragged_decode_attention, ragged_page_commit
from pallas_kernels.arrays import result
from pallas_kernels.ragged_decode_attention import api as attention_api
from pallas_kernels.ragged_decode_attention.cpu import ragged_decode_attention_cpu
from pallas_kernels.ragged_page_commit import api as commit_api
from pallas_kernels.ragged_page_commit.cpu import ragged_page_commit_cpu
from pallas_kernels.ranges import Ranges

SCALE = 0.3


@st.composite
def some_ranges(draw, most=5):
    """Of one part, or of two that hold the same number of pages in another order."""
    layers, heads, parts = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    sizes = st.lists(st.integers(1, most), min_size=layers * heads, max_size=layers * heads)
    first = draw(sizes)
    by_part = [first, draw(st.permutations(first))][:parts]
    counts = np.concatenate([np.reshape(part, (layers, heads)) for part in by_part], axis=1)
    return Ranges(tuple(map(tuple, counts.tolist())), parts)


def own_pages(ranges):
    """Pages of the pool that each layer and head has, in their order, by walking over the pool."""
    share = ranges.heads // ranges.parts
    page, own = itertools.count(), {}
    for part in range(ranges.parts):
        for layer, counts in enumerate(ranges.counts):
            for head in range(part * share, (part + 1) * share):
                own[layer, head] = [next(page) for _ in range(counts[head])]
    return own


@given(some_ranges())
def test_ranges(ranges):
    own = own_pages(ranges)
    assert ranges.total == sum(map(len, own.values())) and ranges.most == max(
        map(len, own.values())
    )
    assert ranges.sizes == tuple(sorted({len(pages) for pages in own.values()}))
    layer, head, slot = ranges.places
    for (of_layer, of_head), pages in own.items():
        assert ranges.starts[of_layer, of_head] == pages[0]
        assert set(layer[pages]) == {of_layer} and set(head[pages]) == {of_head}
        assert list(slot[pages]) == list(range(len(pages)))
        # A part of the pool has the ranges of its heads, and of no others.
        size = ranges.total // ranges.parts
        parts = {page // size for page in pages}
        assert parts == {of_head // (ranges.heads // ranges.parts)}


@pytest.mark.parametrize(
    ("counts", "parts", "reason"),
    [
        (((1, 2), (3,)), 1, "same heads"),
        (((), ()), 1, "same heads"),
        ((), 1, "same heads"),
        (((1, 0),), 1, "each head a page"),
        (((1, 1, 1),), 2, "divide the 3 heads"),
        (((1, 1),), 0, "divide the 2 heads"),
        (((1, 2),), 2, "hold \\[1, 2\\] pages"),
    ],
)
def test_ranges_that_are_none(counts, parts, reason):
    with pytest.raises(ValueError, match=reason):
        Ranges(counts, parts)


def poisoned(ranges, layer, rng, *, B=2, G=2, P=2, H=4):
    """q, k, v and fill in NumPy; only the living tokens of one layer are not NaN."""
    fill = rng.integers(0, P + 1, (B, ranges.heads, ranges.most))
    k, v = (np.full((B, ranges.total, P, H), np.nan, np.float32) for _ in range(2))
    own = own_pages(ranges)
    for row, head in np.ndindex(B, ranges.heads):
        fill[row, head, len(own[layer, head]) :] = 0
        for page, count in zip(own[layer, head], fill[row, head], strict=False):
            for x in (k, v):
                x[row, page, :count] = rng.normal(size=(count, H))
    q = rng.normal(size=(B, ranges.heads * G, H)).astype(np.float32)
    return q, k, v, fill.astype(np.int32)


def by_the_book(q, k, v, fill, ranges, layer):
    """Output, largest score, sum and the log of each page's part of it, row by row."""
    (B, N, H), S = q.shape, fill.shape[2]
    out, peak = np.zeros((B, N, H)), np.full((B, N), -np.inf)
    total, lse = np.zeros((B, N)), np.full((B, N, S), -np.inf)
    for row, n in np.ndindex(B, N):
        head = n // (N // ranges.heads)
        pages = own_pages(ranges)[layer, head]
        live = [(slot, t) for slot in range(len(pages)) for t in range(fill[row, head, slot])]
        if not live:
            continue
        keys, values = (
            np.array([x[row, pages[slot], t] for slot, t in live], np.float64) for x in (k, v)
        )
        scores = keys @ q[row, n].astype(np.float64) * SCALE
        peak[row, n] = scores.max()
        weights = np.exp(scores - peak[row, n])
        out[row, n], total[row, n] = weights @ values, weights.sum()
        for slot in {slot for slot, _ in live}:
            mine = [score for score, (of, _) in zip(scores, live, strict=True) if of == slot]
            lse[row, n, slot] = np.log(np.sum(np.exp(mine)))
    return out, peak, total, lse


def assert_same(got, wanted):
    for one, other in zip(got, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@given(ranges=some_ranges(), seed=st.integers(0, 99), data=st.data())
@settings(max_examples=5)
def test_attention(implementation, ranges, seed, data):
    layer = data.draw(st.integers(0, ranges.layers - 1))
    q, k, v, fill = poisoned(ranges, layer, np.random.default_rng(seed))
    got = ragged_decode_attention(
        *map(jnp.asarray, (q, k, v, fill)),
        layer,
        ranges=ranges,
        scale=SCALE,
        implementation=implementation,
    )
    assert_same(got, by_the_book(q, k, v, fill, ranges, layer))


TWO_PARTS = Ranges(((1, 4, 3, 2), (3, 1, 1, 3)), parts=2)


def part_of(ranges, part):
    """Where a part's pages, and its heads, begin and end."""
    cut = [slice(part * n // 2, (part + 1) * n // 2) for n in (ranges.total, ranges.heads)]
    return cut[0], cut[1]


@pytest.mark.parametrize("layer", [0, 1])
def test_attention_in_two_parts(layer):
    """As on a mesh of two: each device has its part of the pool, and of everything by head."""
    q, k, v, fill = poisoned(TWO_PARTS, layer, np.random.default_rng(0))
    found = []
    for part in range(2):
        pages, heads = part_of(TWO_PARTS, part)
        queries = np.split(q, 2, axis=1)[part]
        operands = queries, k[:, pages], v[:, pages], fill[:, heads], TWO_PARTS.starts[:, heads]
        found.append(
            ragged_decode_attention_cpu(
                *map(jnp.asarray, operands),
                jnp.asarray(TWO_PARTS.counts, jnp.int32)[:, heads],
                jnp.int32(layer),
                sizes=TWO_PARTS.sizes,
                scale=SCALE,
            )
        )
    got = [np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)]
    assert_same(got, by_the_book(q, k, v, fill, TWO_PARTS, layer))


def test_attention_in_bfloat16():
    """Keys and values in bfloat16, sums in float32."""
    q, k, v, fill = poisoned(TWO_PARTS, 1, np.random.default_rng(0))
    half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
    wanted = by_the_book(*(np.asarray(x, np.float32) for x in half), fill, TWO_PARTS, 1)
    for implementation in ("xla", "cpu"):
        got = ragged_decode_attention(
            *half,
            jnp.asarray(fill),
            1,
            ranges=TWO_PARTS,
            scale=SCALE,
            implementation=implementation,
        )
        np.testing.assert_allclose(got.page_lse, wanted[3], atol=1e-5)
        np.testing.assert_allclose(got.out, wanted[0], atol=0.03)


# The write of a page


def commit_case(ranges, rng, *, B=2, P=2, H=3):
    """A pool, a page and a slot for each, and the pool as it should be afterwards."""
    pool = rng.normal(size=(B, ranges.total, P, H)).astype(np.float32)
    leading = ranges.layers, B, ranges.heads
    page = rng.normal(size=(*leading, P, H)).astype(np.float32)
    slot = rng.integers(0, np.asarray(ranges.counts)[:, None], leading).astype(np.int32)
    wanted = pool.copy()
    for (layer, head), pages in own_pages(ranges).items():
        for row in range(B):
            wanted[row, pages[slot[layer, row, head]]] = page[layer, row, head]
    return pool, page, slot, wanted


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@given(ranges=some_ranges(), seed=st.integers(0, 99))
@settings(max_examples=6)
def test_commit(implementation, ranges, seed):
    pool, page, slot, wanted = commit_case(ranges, np.random.default_rng(seed))
    for dtype in (jnp.float32, jnp.bfloat16):
        got = ragged_page_commit(
            jnp.asarray(pool, dtype),
            jnp.asarray(page, dtype),
            jnp.asarray(slot),
            ranges=ranges,
            implementation=implementation,
        )
        np.testing.assert_array_equal(got, jnp.asarray(wanted, dtype))


def test_commit_in_two_parts():
    pool, page, slot, wanted = commit_case(TWO_PARTS, np.random.default_rng(0))
    found = []
    for part in range(2):
        pages, heads = part_of(TWO_PARTS, part)
        operands = pool[:, pages], page[:, :, heads], slot[:, :, heads], TWO_PARTS.starts[:, heads]
        found.append(ragged_page_commit_cpu(*map(jnp.asarray, operands)))
    np.testing.assert_array_equal(np.concatenate(found, axis=1), wanted)


# What does not fit together, and who is asked


def shapes(ranges=TWO_PARTS, B=2, P=16, H=128, dtype=jnp.float32):
    pool = result(B, ranges.total, P, H, dtype=dtype)
    fill = result(B, ranges.heads, ranges.most, dtype=jnp.int32)
    return [result(B, 2 * ranges.heads, H, dtype=dtype), pool, pool, fill]


@pytest.mark.parametrize(
    ("index", "bad", "reason"),
    [
        (0, result(2, 7, 128), "q has shape"),
        (0, result(3, 8, 128), "q has shape"),
        (0, result(2, 8, 128, dtype=jnp.int32), "q has dtype int32"),
        (1, result(2, 17, 16, 128), "must be \\[B, 18, P, H\\]"),
        (2, result(2, 18, 8, 128), "v_pool"),
        (2, result(2, 18, 16, 128, dtype=jnp.bfloat16), "v_pool is bfloat16"),
        (3, result(2, 4, 3, dtype=jnp.int32), "must be \\[2, 4, 4\\]"),
        (3, result(2, 4, 4), "fill has dtype float32"),
    ],
)
def test_attention_names_what_does_not_fit(index, bad, reason):
    arrays = shapes()
    arrays[index] = bad
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda *x: ragged_decode_attention(*x, 0, ranges=TWO_PARTS), *arrays)


def test_attention_names_what_is_empty_and_a_layer_that_there_is_not():
    with pytest.raises(ValueError, match="axis P must not be 0"):
        jax.eval_shape(lambda *x: ragged_decode_attention(*x, 0, ranges=TWO_PARTS), *shapes(P=0))
    with pytest.raises(ValueError, match="layer is 2; .* 0 to 1"):
        jax.eval_shape(lambda *x: ragged_decode_attention(*x, 2, ranges=TWO_PARTS), *shapes())


@pytest.mark.parametrize(
    ("index", "bad", "reason"),
    [
        (0, result(2, 17, 2, 3), "must be \\[B, 18, P, H\\]"),
        (1, result(2, 2, 4, 1, 3), "page is float32\\[2, 2, 4, 1, 3\\]"),
        (1, result(2, 2, 4, 2, 3, dtype=jnp.bfloat16), "page is bfloat16"),
        (2, result(2, 2, 3, dtype=jnp.int32), "must be int32\\[2, 2, 4\\]"),
        (2, result(2, 2, 4), "slot has dtype float32"),
    ],
)
def test_commit_names_what_does_not_fit(index, bad, reason):
    arrays = [result(2, 18, 2, 3), result(2, 2, 4, 2, 3), result(2, 2, 4, dtype=jnp.int32)]
    arrays[index] = bad
    with pytest.raises(ValueError, match=reason):
        jax.eval_shape(lambda *x: ragged_page_commit(*x, ranges=TWO_PARTS), *arrays)


def asked(monkeypatch, api, operation, platform, arrays, ranges=TWO_PARTS):
    """Whether the platform's own kernel is asked where nothing forces one."""
    calls = []

    def backend(*arrays, **options):
        calls.append(arrays)
        raise NotImplementedError("only asked")

    monkeypatch.setitem(api._BACKENDS, platform, backend)
    jax.eval_shape(lambda *x: operation(*x, ranges=ranges, target=Target(platform)), *arrays)
    return bool(calls)


@pytest.mark.parametrize(
    ("platform", "P", "H", "wanted"),
    [
        ("tpu", 16, 128, True),
        ("tpu", 1, 128, True),
        ("tpu", 3, 128, False),
        ("tpu", 16, 64, False),
        ("gpu", 16, 64, True),
        ("cpu", 3, 64, True),
    ],
)
def test_a_tpu_is_spared_what_it_would_copy(monkeypatch, platform, P, H, wanted):
    arrays = [*shapes(P=P, H=H), result(dtype=jnp.int32)]
    found = asked(monkeypatch, attention_api, ragged_decode_attention, platform, arrays)
    assert found == wanted
    if platform != "gpu":
        pool, slot = arrays[1], result(2, 2, 4, dtype=jnp.int32)
        arrays = [pool, result(2, 2, 4, P, H), slot]
        found = asked(monkeypatch, commit_api, ragged_page_commit, platform, arrays)
        assert found == wanted


@pytest.mark.parametrize(("platform", "wanted"), [("tpu", False), ("gpu", False), ("cpu", True)])
def test_a_page_each_is_too_little_for_a_kernel(monkeypatch, platform, wanted):
    ranges = Ranges(((1, 1), (1, 1)))
    arrays = [*shapes(ranges), result(dtype=jnp.int32)]
    found = asked(monkeypatch, attention_api, ragged_decode_attention, platform, arrays, ranges)
    assert found == wanted


@pytest.mark.parametrize(("ways", "parts"), [(2, 2), (4, 1)])
def test_heads_are_split_only_as_the_pool_is(monkeypatch, ways, parts):
    """Each device is given its part, or all where the mesh has other parts than the ranges."""
    given = []

    def backend(q, k, v, fill, *rest, **options):
        given.append([x.shape for x in (k, fill, *rest)])
        raise NotImplementedError("only asked")

    monkeypatch.setitem(attention_api._BACKENDS, "tpu", backend)
    mesh = AbstractMesh((1, ways), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    target = Target("tpu", "TPU v5", mesh)
    jax.eval_shape(
        lambda *x: ragged_decode_attention(*x, 0, ranges=TWO_PARTS, target=target), *shapes()
    )
    K, T = 4 // parts, 18 // parts
    assert given == [[(2, T, 16, 128), (2, K, 4), (2, K), (2, K), ()]]
