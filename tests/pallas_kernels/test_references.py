"""The operations of `pallas_kernels`: numbers worked by hand, and plain NumPy in float64."""

from __future__ import annotations

import importlib
import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, page_bound, page_commit, prefill_attention
from raas_jax.attention import merge_segments


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def softmax(x):
    weights = np.exp(x - np.max(x))
    return weights / np.sum(weights)


# decode_attention

cpu = importlib.import_module("pallas_kernels.decode_attention.cpu")


@pytest.fixture(params=["xla", "cpu", "cpu in blocks"])
def attend(request, monkeypatch):
    """The reference, and the form for CPUs: all (row, head) pairs at once, and one by one."""
    if request.param == "cpu in blocks":
        monkeypatch.setattr(cpu, "BLOCK_BYTES", 1)
    return partial(decode_attention, implementation=request.param[:3])


def test_decode_attention_by_hand(attend):
    """One head of size one, two pages of two, scores log 1, log 2, log 3 and a dead one."""
    k = jnp.log(jnp.asarray([[1.0, 2.0], [3.0, 99.0]])).reshape(1, 1, 1, 2, 2, 1)
    v = jnp.asarray([[10.0, 20.0], [30.0, 1e9]]).reshape(1, 1, 1, 2, 2, 1)
    part = attend(jnp.ones((1, 1, 1)), k, v, jnp.asarray([[[2, 1]]]), scale=1.0)
    # Weights 1/6, 2/6, 3/6: (10 + 40 + 90) / 6; the pages have 3/6 each.
    assert float(part.max[0, 0]) == pytest.approx(math.log(3))
    assert float(part.sum[0, 0]) == pytest.approx(6 / 3)
    assert float((part.out / part.sum[..., None])[0, 0, 0]) == pytest.approx(140 / 6)
    np.testing.assert_allclose(part.page_lse[0, 0], [math.log(3), math.log(3)], rtol=1e-6)


def pages(seed, L=2, B=3, K=2, S=4, P=3, H=4):
    return normal(seed, L, B, K, S, P, H), normal(seed + 1, L, B, K, S, P, H)


FILL = jnp.asarray(
    [[[3, 0, 1, 2], [3, 3, 3, 3]], [[0, 0, 0, 1], [2, 2, 0, 0]], [[1, 1, 1, 1], [0, 3, 0, 0]]]
)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("group", [1, 3, 6])
def test_decode_attention_ragged_fill(attend, layer, group):
    """Pages of any fill, in any slot; what is dead is NaN."""
    (k, v), q = pages(0), normal(9, 3, 2 * group, 4)
    dead = (jnp.arange(3) >= FILL[..., None])[None, ..., None]
    part = attend(q, jnp.where(dead, jnp.nan, k), jnp.where(dead, jnp.nan, v), FILL, layer)
    for b in range(3):
        for n in range(2 * group):
            head = n // group
            live = [(s, p) for s in range(4) for p in range(int(FILL[b, head, s]))]
            keys, values = (np.asarray(x[layer, b, head], np.float64) for x in (k, v))
            scores = np.array([keys[at] @ np.asarray(q[b, n], np.float64) for at in live]) / 2
            wanted = softmax(scores) @ np.array([values[at] for at in live])
            np.testing.assert_allclose(part.out[b, n] / part.sum[b, n], wanted, atol=2e-6)
            assert float(part.max[b, n]) == pytest.approx(scores.max(), abs=1e-6)
            for s in range(4):
                mine = [score for score, (slot, _) in zip(scores, live, strict=True) if slot == s]
                lse = np.log(np.sum(np.exp(mine))) if mine else -np.inf
                np.testing.assert_allclose(part.page_lse[b, n, s], lse, atol=2e-6)


def test_decode_attention_of_an_empty_segment(attend):
    """Nothing to attend to: no weight, no NaN, and merging it with another changes nothing."""
    (k, v), q = pages(0), normal(9, 3, 4, 4)
    empty = attend(q, k * jnp.nan, v * jnp.nan, jnp.zeros((1, 1, 4), jnp.int32))
    assert np.all(np.asarray(empty.out) == 0) and np.all(np.asarray(empty.sum) == 0)
    assert np.all(np.isneginf(empty.max)) and np.all(np.isneginf(empty.page_lse))
    full = attend(q, k, v, jnp.full((1, 1, 4), 3))
    for parts in [empty, full], [full, empty]:
        out, lse = merge_segments(parts)
        np.testing.assert_allclose(out, full.out / full.sum[..., None], rtol=1e-6)
        np.testing.assert_allclose(lse, full.max + jnp.log(full.sum), rtol=1e-6)


def test_merged_segments_are_one_softmax(attend):
    """Three segments of 1, 4 and 2 pages, with scores hundreds apart, against one of 7."""
    k, v = pages(3, S=7)
    q = normal(9, 3, 4, 4) * jnp.asarray([1.0, 30.0, 300.0])[:, None, None]
    fill = jnp.asarray(np.random.default_rng(1).integers(0, 4, (3, 2, 7)).clip(min=[1] + [0] * 6))
    whole = attend(q, k, v, fill, 1)
    cuts = [slice(0, 1), slice(1, 5), slice(5, 7)]
    parts = [attend(q, k[:, :, :, cut], v[:, :, :, cut], fill[..., cut], 1) for cut in cuts]
    out, lse = merge_segments(parts)
    np.testing.assert_allclose(out, whole.out / whole.sum[..., None], atol=1e-5)
    np.testing.assert_allclose(lse, whole.max + jnp.log(whole.sum), rtol=1e-5)
    mass = jnp.concatenate([jnp.exp(part.page_lse - lse[..., None]) for part in parts], -1)
    np.testing.assert_allclose(jnp.sum(mass, -1), 1, rtol=1e-4)
    # In float32 a sum of a thousand has steps of 6e-5.
    np.testing.assert_allclose(mass, jnp.exp(whole.page_lse - lse[..., None]), atol=1e-4)


def test_decode_attention_in_bfloat16(attend):
    """Keys and values in bfloat16, everything summed in float32."""
    (k, v), q = (x.astype(jnp.bfloat16) for x in pages(0)), normal(9, 3, 4, 4).astype(jnp.bfloat16)
    k, v = k, v
    part = attend(q, k, v, FILL)
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), FILL)
    assert {x.dtype for x in part} == {jnp.dtype("float32")}
    np.testing.assert_allclose(part.page_lse, exact.page_lse, atol=1e-5)
    np.testing.assert_allclose(part.out, exact.out, atol=0.03)


@pytest.mark.parametrize(
    ("pairs", "fit", "wanted"),
    [(32, 40, 32), (32, 8, 8), (32, 9, 8), (32, 0, 1), (6, 4, 3), (7, 6, 7), (1, 0, 1)],
)
def test_pairs_are_cut_evenly_into_blocks_that_fit(pairs, fit, wanted):
    """As many as fit, if that divides them; all at once where only far fewer would."""
    assert cpu.block_size(pairs, cpu.BLOCK_BYTES // fit if fit else 2 * cpu.BLOCK_BYTES) == wanted


# page_commit


def test_page_commit():
    before, _ = pages(0)
    page = normal(5, 2, 3, 2, 3, 4)
    slot = np.random.default_rng(2).integers(0, 4, (2, 3, 2))
    wanted = np.array(before)
    for at in np.ndindex(slot.shape):
        wanted[at][slot[at]] = page[at]
    np.testing.assert_array_equal(page_commit(before, page, jnp.asarray(slot)), wanted)


# page_bound


def test_page_bound_by_hand():
    """q = (2, -1): the bound of a page within [-1, 3] x [-5, 4] is 2 * 3 + -1 * -5 = 11."""
    low, high = (jnp.asarray(x).reshape(1, 1, 1, 1, 2) for x in ([-1.0, -5.0], [3.0, 4.0]))
    q = jnp.asarray([[[2.0, -1.0]]])
    assert float(page_bound(q, low, high, scale=1.0)[0, 0, 0]) == 11
    assert float(page_bound(q, low, high)[0, 0, 0]) == pytest.approx(11 / math.sqrt(2))


def test_page_bound_is_quests_and_no_score_exceeds_it():
    (k, _), q = pages(0), normal(9, 3, 6, 4)
    low, high = k.min(-2), k.max(-2)
    for layer in (0, 1):
        bound = page_bound(q, low, high, layer, scale=0.7)
        for b, n, s in np.ndindex(3, 6, 4):
            query = np.asarray(q[b, n], np.float64)
            channels = np.stack([query * x[layer, b, n // 3, s] for x in (low, high)])
            wanted = 0.7 * np.sum(np.max(channels, 0))
            assert float(bound[b, n, s]) == pytest.approx(wanted, abs=1e-5)
            assert np.all(0.7 * np.asarray(k[layer, b, n // 3, s]) @ query <= wanted + 1e-5)


# prefill_attention


def naive_prefill(q, k, v, segments=None, window=None, sink=None):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    out = np.zeros_like(q)
    mask = np.tril(np.ones((T, T), bool))[None]
    if window is not None:
        mask = mask & ~np.tril(np.ones((T, T), bool), -window)
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None, :])
    for b, n in np.ndindex(B, N):
        head = n // (N // k.shape[2])
        scores = np.where(mask[b % len(mask)], q[b, :, n] @ k[b, :, head].T / np.sqrt(H), -np.inf)
        peak = scores.max(-1, keepdims=True)
        weights = np.exp(scores - peak)
        total = weights.sum(-1, keepdims=True)
        if sink is not None:
            total = total + np.exp(float(sink[n]) - peak)
        out[b, :, n] = weights @ v[b, :, head] / total
    return out


@pytest.mark.parametrize("T", [1, 7, 1024, 1025, 1536, 1700])
@pytest.mark.parametrize("segmented", [False, True])
def test_prefill_attention_is_naive_attention(T, segmented):
    """Below and above the length from which it works in blocks, multiples of a block or not."""
    q, k, v = normal(0, 1, T, 2, 4), normal(1, 1, T, 1, 4), normal(2, 1, T, 1, 4)
    segments = np.sort(np.random.default_rng(0).integers(0, 3, (1, T)))
    given = jnp.asarray(segments, jnp.int32) if segmented else None
    out = jax.jit(prefill_attention)(q, k, v, given)
    wanted = naive_prefill(q, k, v, segments if segmented else None)
    np.testing.assert_allclose(out, wanted, atol=3e-6)


@pytest.mark.parametrize(
    ("T", "window"),
    [(7, 1), (7, 3), (7, 7), (7, 100), (1100, 1), (1100, 300), (1500, 513), (1500, 1499)],
)
@pytest.mark.parametrize("more", ["window", "sink", "sink and segments"])
def test_prefill_attention_sees_a_window_and_a_sink(T, window, more):
    """Windows of one token, of less and more than a block, and of everything."""
    q, k, v = normal(0, 2, T, 4, 4), normal(1, 2, T, 2, 4), normal(2, 2, T, 2, 4)
    sink = jnp.asarray([-60.0, 0.3, 2.0, 60.0]) if "sink" in more else None
    segments = np.sort(np.random.default_rng(0).integers(0, 3, (2, T)))
    given = jnp.asarray(segments, jnp.int32) if "segments" in more else None
    out = jax.jit(prefill_attention, static_argnames="window")(
        q, k, v, given, window=window, sink=sink
    )
    wanted = naive_prefill(q, k, v, None if given is None else segments, window, sink)
    np.testing.assert_allclose(out, wanted, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_prefill_attention_of_16_bits(dtype):
    """Also where a library has no such product."""
    q, k, v = (normal(n, 1, 40, heads, 8).astype(dtype) for n, heads in ((0, 2), (1, 1), (2, 1)))
    with jax.numpy_dtype_promotion("standard"):  # JAX's own attention mixes types.
        out = jax.jit(prefill_attention)(q, k, v)
    assert out.dtype == dtype
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    np.testing.assert_allclose(out.astype(jnp.float32), naive_prefill(*wide), atol=6e-2)


def test_prefill_attention_of_a_window_reads_what_it_sees():
    """Twice the tokens are twice the work, not four times."""

    def most_keys(T):
        q, k = jnp.zeros((1, T, 2, 8)), jnp.zeros((1, T, 1, 8))
        seen = jax.jit(lambda q, k: prefill_attention(q, k, k, window=64))
        text = seen.lower(q, k).compile().as_text()
        return max(int(n) for n in re.findall(r"f32\[[\d,]*512,(\d+)\]", text))

    assert 0 < most_keys(4096) == most_keys(2048) < 1024


def test_prefill_attention_allocates_no_square():
    """At 4,096 tokens, the scores of all pairs would take 64 MiB for each head."""
    T, N = 4096, 2
    q, k = (
        jax.ShapeDtypeStruct((1, T, N, 8), jnp.float32),
        jax.ShapeDtypeStruct((1, T, 1, 8), jnp.float32),
    )
    temp = jax.jit(prefill_attention).lower(q, k, k).compile().memory_analysis().temp_size_in_bytes
    assert temp < N * T * T * 4 / 3
    half = [jax.ShapeDtypeStruct((1, T // 2, *x.shape[2:]), jnp.float32) for x in (q, k, k)]
    smaller = jax.jit(prefill_attention).lower(*half).compile().memory_analysis().temp_size_in_bytes
    assert temp < 2.2 * smaller  # Grows with T, not with its square.


# Bad arguments


K, V = (jax.ShapeDtypeStruct((2, 3, 2, 4, 3, 4), jnp.float32),) * 2
PAGE = jax.ShapeDtypeStruct((2, 3, 2, 3, 4), jnp.float32)


def array(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize(
    ("operation", "arguments", "named"),
    [
        (decode_attention, (array(3, 4, 4), array(3, 2, 4, 3, 4), V, FILL), "k_pages has shape"),
        (decode_attention, (array(3, 4, 4), K, array(2, 3, 2, 4, 3, 5), FILL), "v_pages"),
        (decode_attention, (array(3, 3, 4), K, V, FILL), "q has shape .* a multiple of 2"),
        (decode_attention, (array(2, 4, 4), K, V, FILL), "q has shape"),
        (decode_attention, (array(3, 4, 8), K, V, FILL), "q has shape"),
        (decode_attention, (array(3, 4, 4), K, V, FILL[..., :3]), "fill has shape"),
        (decode_attention, (array(3, 4, 4), K, V, FILL[:2]), "fill has shape"),
        (decode_attention, (array(3, 4, 4), K, V, array(3, 2, 4)), "fill has dtype"),
        (page_commit, (PAGE, PAGE, array(2, 3, 2, dtype=jnp.int32)), "pages has shape"),
        (page_commit, (K, array(2, 3, 2, 4, 4), array(2, 3, 2, dtype=jnp.int32)), "page is"),
        (
            page_commit,
            (K, array(2, 3, 2, 3, 4, dtype=jnp.bfloat16), array(2, 3, 2, dtype=jnp.int32)),
            "page is bfloat16",
        ),
        (page_commit, (K, PAGE, array(2, 3, dtype=jnp.int32)), "slot is"),
        (page_commit, (K, PAGE, array(2, 3, 2)), "slot has dtype float32.* cast it to int32"),
        (page_bound, (array(3, 4, 4), array(3, 2, 4, 4), array(3, 2, 4, 4)), "key_min has shape"),
        (page_bound, (array(3, 4, 4), array(2, 3, 2, 4, 4), array(2, 3, 2, 4, 5)), "key_max"),
        (page_bound, (array(3, 5, 4), *(array(2, 3, 2, 4, 4),) * 2), "q has shape"),
        (prefill_attention, (array(1, 7, 2, 4), array(1, 7, 4), array(1, 7, 4)), "k has shape"),
        (prefill_attention, (array(1, 7, 2, 4), array(1, 7, 2, 4), array(1, 6, 2, 4)), "v "),
        (prefill_attention, (array(1, 7, 3, 4), *(array(1, 7, 2, 4),) * 2), "q has shape"),
        (partial(prefill_attention, window=0), (array(1, 7, 2, 4),) * 3, "window is 0"),
        (partial(prefill_attention, sink=array(3)), (array(1, 7, 2, 4),) * 3, "sink has shape"),
        (
            prefill_attention,
            (*(array(1, 7, 2, 4),) * 3, array(1, 6, dtype=jnp.int32)),
            "segments has shape",
        ),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_name_the_argument(operation, arguments, named):
    with pytest.raises(ValueError, match=named):
        jax.eval_shape(operation, *arguments)


def test_an_unknown_backend_lists_those_there_are():
    (k, v), q = pages(0), normal(9, 3, 4, 4)
    with pytest.raises(ValueError, match="implementation is 'cuda'.*xla"):
        decode_attention(q, k, v, FILL, implementation="cuda")
