"""An allotment by itself: what it gives to whom, and its file."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raas_jax.files import FileError
from raas_jax.policies import Allotment

SIZES = np.arange(1, 6)


@st.composite
def allotments(draw, convex=False, most=4):
    """Curves of whole numbers over one page to five, which fall or stay; also how they are cut."""
    layers, heads = draw(st.integers(1, most)), draw(st.integers(1, most))
    shape = layers, heads, len(SIZES)
    count = layers * heads * len(SIZES)
    saved = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    saved = np.reshape(saved, shape)
    if convex:
        saved = np.sort(saved, axis=-1)[..., ::-1]
    parts = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    # What is lost at a size is what all larger ones would save.
    losses = np.cumsum(saved[..., ::-1], axis=-1)[..., ::-1]
    return Allotment(SIZES, losses, parts=parts, together=draw(st.booleans()))


def by_parts(allotment, pages):
    return np.split(pages, allotment.parts, axis=1)


@given(allotments(), st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))
def test_sums_are_exact_and_more_is_more_for_all(allotment, mean, least, page_size):
    """In every part the pages of the mean, of which each head has `least`; nobody pays for more."""
    given = [allotment.pages(each, page_size, least) for each in (mean, mean + 1)]
    for pages, wanted in zip(given, (mean, mean + 1), strict=True):
        assert pages.shape == (allotment.layers, allotment.heads) and pages.dtype == np.int64
        assert all(part.mean() == wanted for part in by_parts(allotment, pages))
        assert pages.min() >= min(least, wanted)
        assert not allotment.together or np.all(pages == pages[:, :1])
    assert np.all(given[1] >= given[0])


@pytest.mark.parametrize(("page_size", "known"), [(16, 2), (32, 1), (12, 3)])
def test_no_head_has_less_than_what_is_known(page_size, known):
    """Below the smallest size a curve says nothing, unless the mean is smaller itself."""
    losses = np.zeros((1, 2, 2))
    losses[0, 0, 0] = 1
    allotment = Allotment([32, 320], losses)
    assert allotment.pages(5, page_size).tolist() == [[10 - known, known]]
    assert allotment.pages(5, page_size, least=4).tolist() == [[6, 4]]
    assert allotment.pages(1, 4).tolist() == [[1, 1]]


@given(allotments(), st.integers(1, 9), st.integers(1, 9))
def test_short_answers_leave_parts_of_equal_size(allotment, mean, most):
    """Cut to what an answer needs, and filled up again where one part was cut more."""
    pages = allotment.pages(mean, 1)
    fitted = allotment.fitted(pages, most)
    assert np.all(fitted >= np.minimum(pages, most)) and np.all(fitted <= most)
    sums = {int(part.sum()) for part in by_parts(allotment, fitted)}
    wanted = max(int(np.minimum(part, most).sum()) for part in by_parts(allotment, pages))
    assert sums == {wanted}


def curve(losses, pages):
    """What a head loses with so many pages; beyond the last size as much as there."""
    return losses[min(pages, len(SIZES)) - 1]


def hull(losses, pages, least):
    """The largest convex function below the curve, by all chords from `least` on."""
    far = range(least, max(len(SIZES), pages) + 1)
    chords = [
        (curve(losses, a) * (b - pages) + curve(losses, b) * (pages - a)) / (b - a)
        for a, b in itertools.product(far, far)
        if a < pages < b
    ]
    return min([curve(losses, pages), *chords])


def lost(allotment, pages, by):
    heads = np.ndindex(pages.shape)
    return sum(by(allotment.losses[head], int(pages[head])) for head in heads)


def least_lost(allotment, mean, least, by):
    """The least that any way of sharing out loses, of all that there are."""
    shape = allotment.losses.shape[:2]
    count = shape[0] * shape[1]
    rest = (mean - least) * count
    return min(
        lost(allotment, least + np.reshape(extra, shape), by)
        for extra in itertools.product(range(rest + 1), repeat=count)
        if sum(extra) == rest
    )


@given(allotments(convex=True, most=2), st.integers(1, 3), st.integers(1, 2))
def test_nothing_better_exists_for_convex_curves(allotment, mean, least):
    allotment = dataclasses.replace(allotment, parts=1, together=False)
    pages, least = allotment.pages(mean, 1, least), min(mean, least)
    assert lost(allotment, pages, curve) == least_lost(allotment, mean, least, curve)


@given(allotments(most=2), st.integers(1, 3), st.integers(1, 2))
def test_other_curves_are_taken_by_their_hulls(allotment, mean, least):
    """Nothing better exists for the hulls; of steps over several pages only the last may be cut
    short, so that heads above their hulls are those that it was shared by."""
    allotment = dataclasses.replace(allotment, parts=1, together=False)
    pages, least = allotment.pages(mean, 1, least), min(mean, least)

    def by_hull(losses, pages):
        return hull(losses, pages, least)

    best = least_lost(allotment, mean, least, by_hull)
    assert lost(allotment, pages, by_hull) == pytest.approx(best)
    saved = [
        by_hull(losses, count) - by_hull(losses, count + 1)
        for losses, count in zip(allotment.losses.reshape(-1, 5), pages.flat, strict=True)
        if curve(losses, count) > by_hull(losses, count) + 1e-9
    ]
    assert not saved or max(saved) == pytest.approx(min(saved))


@given(st.lists(st.integers(0, 9), min_size=5, max_size=5), st.integers(1, 9))
def test_heads_that_lose_alike_get_the_same(losses, mean):
    alike = np.broadcast_to(sorted(losses)[::-1], (3, 2, 5))
    for parts in (1, 2):
        assert np.all(Allotment(SIZES, alike, parts=parts).pages(mean, 1) == mean)


def test_a_step_that_saves_much_behind_one_that_saves_nothing():
    """Head 0 saves 8 at three pages and nothing at two; head 1 saves 3 with every page."""
    allotment = Allotment([1, 2, 3], [[[8, 8, 0], [6, 3, 0]]])
    assert allotment.pages(2, 1).tolist() == [[3, 1]]
    assert allotment.pages(3, 1).tolist() == [[3, 3]]


def test_what_rises_was_noise():
    rising, level = ([[[9.0, 2.0, third], [1.0, 1.0, 0.0]]] for third in (4.0, 2.0))
    for mean in range(1, 5):
        given = [Allotment([1, 2, 3], losses).pages(mean, 1) for losses in (rising, level)]
        np.testing.assert_array_equal(*given)


def test_what_is_left_is_shared_evenly():
    """Curves that are level, or at their end, want no page more than others."""
    assert np.all(Allotment([1, 9], np.ones((3, 2, 2))).pages(5, 1) == 5)
    # Head 0 takes the two pages that it wants, the six that are left are for both.
    assert Allotment([1, 3], [[[9, 0], [0, 0]]]).pages(5, 1).tolist() == [[6, 4]]
    # Those that save the same take turns, up to what each can save by.
    assert Allotment([1, 3, 5], [[[8, 4, 0], [4, 0, 0], [0, 0, 0]]]).pages(2, 1).tolist() == [
        [3, 2, 1]
    ]
    # An odd one goes to the first.
    assert Allotment([1, 3], [[[9, 9], [9, 9], [9, 0]]]).pages(3, 1).tolist() == [[3, 2, 4]]


def test_heads_of_a_layer_together_and_parts_apart():
    losses = np.zeros((2, 2, 2))
    losses[0, 1, 0] = 9
    allotment = Allotment([1, 4], losses)
    assert allotment.pages(2, 1).tolist() == [[2, 4], [1, 1]]
    assert allotment.by_layer().pages(2, 1).tolist() == [[3, 3], [1, 1]]
    # Without parts, the one head may take from all; with them, only from its own.
    assert allotment.pages(3, 1).tolist() == [[3, 5], [2, 2]]
    assert allotment.split(2).pages(2, 1).tolist() == [[2, 3], [2, 1]]
    assert allotment.last(1).pages(2, 1).tolist() == [[2, 2]]


def test_pages_that_do_not_divide_the_sizes():
    """A curve counts at both pages beside a size, by straight lines between its sizes."""
    losses = [[[9.0, 4.0, 0.0], [1.0, 0.5, 0.0]]]
    # Between 0.6 and 3.2 pages of 16 tokens: head 0 saves 3 to 4 for a page, head 1 under one.
    assert Allotment([10, 30, 51], losses).pages(2, 16).tolist() == [[3, 1]]
    whole = Allotment([16, 32, 48], [[[9.0, 4.0, 0.0], [1.0, 0.5, 0.0]]])
    assert whole.pages(2, 16).tolist() == [[3, 1]]
    # Sizes within one page say nothing of others.
    assert Allotment([3, 5, 7], losses).pages(2, 16).tolist() == [[2, 2]]


def test_arrays_that_are_no_curves_are_refused():
    good = {"sizes": [16, 32], "losses": np.ones((2, 3, 2))}
    for change, said in [
        ({"sizes": [16]}, r"sizes are \[16\]"),
        ({"sizes": [32, 16]}, "they must be two or more and ascend"),
        ({"sizes": [0, 16]}, "ascend"),
        ({"sizes": [16, 2**62]}, "sizes go up to 4611686018427387904; they may to"),
        ({"sizes": [16.5, 32]}, "sizes are not whole numbers"),
        ({"losses": np.ones((2, 3, 3))}, r"shape \[2, 3, 3\]; it must be \[L, K, 2\]"),
        ({"losses": np.ones((0, 3, 2))}, r"shape \[0, 3, 2\]"),
        ({"losses": np.full((2, 3, 2), np.nan)}, "finite"),
        ({"losses": np.full((2, 3, 2), -1.0)}, "0 or more"),
        ({"parts": 2}, "parts is 2; it must divide the 3 heads"),
        ({"parts": 0}, "parts is 0"),
    ]:
        with pytest.raises(ValueError, match=said):
            Allotment(**{**good, **change})
    with pytest.raises(ValueError, match="read-only"):
        Allotment(**good).losses[0] = 0


def random_allotment(**options):
    losses = np.random.default_rng(1).random((2, 3, 4))
    return Allotment([8, 16, 24, 40], losses, **options)


def test_equal_is_what_gives_the_same():
    one = random_allotment(model="abc", made={"texts": 3})
    assert one == random_allotment(model="abc", made={}) and one != one.digest
    assert hash(one) == hash(random_allotment(model="abc"))
    others = [random_allotment(), one.split(3), one.by_layer(), one.last(1)]
    others.append(dataclasses.replace(one, sizes=one.sizes + 1))
    others.append(dataclasses.replace(one, losses=np.nextafter(one.losses, 1)))
    assert len({one.digest, *(other.digest for other in others)}) == 7
    assert repr(one) == f"Allotment({one.digest})"


def test_written_and_read(tmp_path):
    file = tmp_path / "allotment.json"
    one = random_allotment(model="abc", made={"texts": ["a", None], "of": {"x": 1.5}})
    for wanted in (one, one.by_layer()):
        wanted.write(file)
        found = Allotment.read(file)
        assert found == wanted and found.made == one.made
        np.testing.assert_array_equal(found.losses, one.losses)
    assert Allotment.of(one.described()) == one


def damaged(**change):
    return json.dumps({**random_allotment().described(), **change})


BAD = {
    "empty": ("", "not valid JSON"),
    "cut": (damaged()[:-9], "not valid JSON"),
    "no text": (b"\xff\xfe\x00", "not UTF-8"),
    "deep": ("[" * 100_000, "nested more than"),
    "a list": ("[1]", "named fields"),
    "another kind": ('{"alpha": 1}', "'version' is missing"),
    "no losses": (json.dumps({"version": 1, "model": "", "made": {}, "sizes": [1, 2]}), "losses"),
    "a newer one": (damaged(version=2), "version is 2; expected 1"),
    "model that is a number": (damaged(model=3), "model must be a text"),
    "made that is a text": (damaged(made="x"), "made an object"),
    "sizes that are a text": (damaged(sizes="x"), "is no allotment"),
    "sizes that are texts": (damaged(sizes=["8", "16", "24", "40"]), "is no allotment"),
    "sizes between": (damaged(sizes=[8.5, 16, 24, 40]), "whole numbers"),
    "sizes that fall": (damaged(sizes=[16, 8, 24, 40]), "ascend"),
    "sizes of nobody": (damaged(sizes=None), "is no allotment"),
    "huge sizes": (damaged(sizes=[8, 16, 24, 10**30]), "is no allotment"),
    "huge losses": (damaged(losses=[[[10**400, 1, 1, 1]]]), "is no allotment"),
    "ragged losses": (damaged(losses=[[[1, 1, 1, 1]], [[1]]]), "is no allotment"),
    "losses of nobody": (damaged(losses=[[[None, 1, 1, 1]]]), "is no allotment"),
    "losses that are objects": (damaged(losses=[[[{}, 1, 1, 1]]]), "is no allotment"),
    "other losses": (damaged(losses=[[[1, 1, 1]]]), "is no allotment .losses have shape"),
    "NaN": (damaged(losses=[[[float("nan"), 1, 1, 1]]]), "finite"),
    "endless": (damaged(losses=[[[float("inf"), 1, 1, 1]]]), "finite"),
    "together that is a text": (damaged(together="no"), "together must be true or false"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_none_is_named(tmp_path, name):
    data, said = BAD[name]
    file = tmp_path / "allotment.json"
    file.write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(FileError, match=said) as error:
        Allotment.read(file)
    assert str(file) in str(error.value)


def test_no_file_and_a_huge_one(tmp_path):
    file = tmp_path / "allotment.json"
    with pytest.raises(FileNotFoundError, match="raas-jax allot MODEL --out") as error:
        Allotment.read(file)
    assert str(file) in str(error.value)
    with pytest.raises(FileError, match="expected a regular file"):
        Allotment.read(tmp_path)
    with file.open("wb") as stream:
        stream.truncate(1 << 30)
    with pytest.raises(FileError, match="has 1073741824 bytes; at most"):
        Allotment.read(file)
