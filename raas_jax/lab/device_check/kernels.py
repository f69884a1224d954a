"""Section `kernels`: every kernel against its reference, on the device itself.

The reference computes in float32 from the same numbers, with products as exact as the device has
them. Dead slots hold NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import (
    Ranges,
    Segment,
    Target,
    cache_attention,
    decode_attention,
    grouped_product,
    page_bound,
    page_commit,
    prefill_attention,
    ragged_decode_attention,
    ragged_page_commit,
    selected_decode_attention,
    stacked_product,
)
from raas_jax.lab.device_check.check import Check

TOLERANCES = {"bfloat16": 1e-2, "float32": 2e-3}
"""Relative errors, in norm, of a right kernel; that of float32 leaves room for products in TF32."""
LAYERS, LAYER = 2, 1


class Pages(NamedTuple):
    """What a kernel is tried on; `B` rows, `K` heads with `G` queries each, `S` pages of `P`."""

    dtype: str
    B: int
    K: int
    G: int
    H: int
    P: int
    S: int

    @property
    def name(self) -> str:
        """As a table shows it."""
        axes = " ".join(f"{axis}{size}" for axis, size in zip("BKGHPS", self[1:], strict=True))
        return f"{self.dtype} {axes}"


class Case(NamedTuple):
    """A call: `operation(*arrays, **options)`."""

    name: str
    operation: Callable[..., Any]
    arrays: tuple[Any, ...]
    options: dict[str, Any]
    dtype: str


SERVED = (Pages("bfloat16", 1, 8, 4, 128, 16, 64), Pages("bfloat16", 8, 4, 7, 128, 16, 64))
"""As in Qwen3-8B and Llama-3.1-8B, and in Qwen2.5-7B; all operations are tried on these."""
OTHERS = (
    Pages("bfloat16", 16, 8, 4, 128, 16, 64),
    Pages("bfloat16", 2, 8, 8, 128, 16, 128),
    Pages("bfloat16", 2, 2, 4, 64, 16, 64),
    Pages("bfloat16", 2, 1, 8, 256, 16, 64),
    Pages("bfloat16", 2, 4, 7, 128, 64, 16),
    Pages("float32", 2, 2, 6, 128, 16, 64),
    Pages("bfloat16", 2, 2, 1, 96, 8, 64),
    Pages("bfloat16", 1, 4, 7, 128, 1, 128),
)
"""On these, the attention."""
ON_CPU = (Pages("float32", 2, 2, 3, 16, 4, 4), Pages("bfloat16", 1, 2, 4, 32, 8, 4))


def run(check: Check) -> None:
    """Each as the device has it; where it has none, that is said."""
    platform = Target.of().platform
    served, others = (ON_CPU, ()) if platform == "cpu" else (SERVED, OTHERS)
    for case in cases(served, others):
        with check.journal.attempt(case.name):
            try:
                check.journal.kernel(case.name, *compare(case, platform))
            except ValueError as error:
                if (why := declined(error, platform)) is None:
                    raise
                check.journal.kernel(case.name, None, None, why)


def declined(error: ValueError, platform: str) -> str | None:
    """Why the dispatcher has no kernel for a call; None where the error says something else."""
    text = str(error)
    if text.startswith("implementation is "):
        return f"there is none for {platform}"
    return text.rpartition(f"{platform}: ")[2] if "no backend serves" in text else None


def compare(case: Case, platform: str) -> tuple[bool, float, str]:
    """Whether the platform's kernel is right, its largest error of any result, and what is wrong.

    Raises ValueError where there is none for these arguments.
    """
    call = partial(case.operation, **case.options)
    kernel = jax.jit(partial(call, implementation=platform))
    found, again = (jax.tree.map(_exact, kernel(*case.arrays)) for _ in range(2))
    wide = jax.tree.map(_widened, case.arrays)
    with jax.default_matmul_precision("highest"):
        wanted = jax.tree.map(_exact, jax.jit(partial(call, implementation="xla"))(*wide))
    results = jax.tree_util.tree_leaves_with_path(wanted)
    names = (jax.tree_util.keystr(path).strip(".") or "result" for path, _ in results)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True)
    errors = {name: relative_error(*pair) for name, pair in zip(names, pairs, strict=True)}
    wrong = [name for name, error in errors.items() if not error <= TOLERANCES[case.dtype]]
    why = ", ".join(wrong)
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True)
    if not all(np.array_equal(*pair, equal_nan=True) for pair in pairs):
        why = "two calls differ"
    return not why, max(errors.values()), why


def relative_error(found: np.ndarray, wanted: np.ndarray) -> float:
    """In norm; infinite where NaN or infinities are not those that are wanted."""
    finite = np.isfinite(wanted)
    if found.shape != wanted.shape or not np.array_equal(found[~finite], wanted[~finite]):
        return float("inf")
    if not np.isfinite(found[finite]).all():
        return float("inf")
    size = float(np.linalg.norm(wanted[finite]))
    return float(np.linalg.norm(found[finite] - wanted[finite])) / max(size, 1e-30)


def cases(whole: tuple[Pages, ...], attention: tuple[Pages, ...]) -> Iterator[Case]:
    """All operations on `whole`, and those of a decode's attention on `attention`."""
    for seed, pages in enumerate([*whole, *attention]):
        rng = np.random.default_rng(seed)
        yield from _attention(rng, pages)
        yield from _whole_cache(rng, pages)
        if pages in whole:
            yield from _bounds_and_commits(rng, pages)
            yield _product(rng, pages)
            yield _experts(rng, pages)
    for pages in whole:
        yield from _prefill(np.random.default_rng(0), pages)


def _attention(rng: np.random.Generator, pages: Pages) -> Iterator[Case]:
    dtype, B, K, G, H, P, S = pages
    fill = _fill(rng, (LAYERS, B, K, S), P)
    k, v = _dead(fill, *_normal(rng, 2, LAYERS, B, K, S, P, H))
    q = _normal(rng, B, K * G, H)
    numbers = [jnp.asarray(x, dtype) for x in (q, k, v)]
    alive = jnp.asarray(fill[LAYER])
    slots = np.argsort(rng.random((B, K, S)))[..., : max(1, S // 4)].astype(np.int32)
    slots[0, 0, 0] = -1  # No page.
    case = partial(Case, options={}, dtype=dtype)
    yield case(f"decode_attention, {pages.name}", decode_attention, arrays=(*numbers, alive, LAYER))
    selected = (*numbers, alive, jnp.asarray(slots), LAYER)
    yield case(
        f"selected_decode_attention, {pages.name}", selected_decode_attention, arrays=selected
    )
    ranges = _ranges(K, S)
    own = np.arange(ranges.most) < np.asarray(ranges.counts)[LAYER][:, None]
    held = np.zeros((B, K, ranges.most), np.int32)
    held[:] = np.where(own, _fill(rng, held.shape, P), 0)
    layer, head, slot = ranges.places
    of_pool = np.where(layer == LAYER, held[:, head, slot], 0)
    k, v = _dead(of_pool, *_normal(rng, 2, B, ranges.total, P, H))
    numbers = [jnp.asarray(x, dtype) for x in (q, k, v)]
    yield case(
        f"ragged_decode_attention, {pages.name}",
        ragged_decode_attention,
        arrays=(*numbers, jnp.asarray(held), LAYER),
        options={"ranges": ranges},
    )


def _whole_cache(rng: np.random.Generator, pages: Pages) -> Iterator[Case]:
    """Equal numbers of pages after one prompt of all rows; different ones after each its own."""
    dtype, B, K, G, H, P, S = pages
    q = jnp.asarray(_normal(rng, B, K * G, H), dtype)
    length = S * P - P // 2 - 1
    filled = np.clip(length - P * np.arange(S), 0, P)
    shared, own_prompts = (
        _segment(rng, np.broadcast_to(filled, (LAYERS, n, K, S)), P, H, dtype)._replace(
            tokens=jnp.full(n, length, jnp.int32)
        )
        for n in (1, B)
    )
    current = _segment(rng, np.full((LAYERS, B, K), P // 2 + 1), P, H, dtype)
    fill = _fill(rng, (LAYERS, B, K, S), P)
    fill[..., 0] = P  # Something lives in every head.
    last = current._replace(tokens=jnp.int32(P // 2 + 1))
    case = partial(Case, operation=cache_attention, dtype=dtype)
    kept = _segment(rng, fill, P, H, dtype)
    arrays = (q, shared, kept, last)
    yield case(f"cache_attention, {pages.name}", arrays=arrays, options={})
    sink = {"sink": jnp.asarray(_normal(rng, K * G))}
    yield case(f"cache_attention with sinks, {pages.name}", arrays=arrays, options=sink)
    ranges = _ranges(K, S)
    own = np.arange(ranges.most) < np.asarray(ranges.counts)[:, None, :, None]
    held = np.where(own, _fill(rng, (LAYERS, B, K, ranges.most), P), 0).astype(np.int32)
    layer, head, slot = ranges.places
    pool = _segment(rng, np.moveaxis(held[layer, :, head, slot], 0, 1), P, H, dtype)
    pool = pool._replace(tokens=jnp.asarray(held))
    arrays = (q, own_prompts, pool, last)
    yield case(f"cache_attention by head, {pages.name}", arrays=arrays, options={"ranges": ranges})


def _segment(rng: np.random.Generator, fill: Any, P: int, H: int, dtype: str) -> Segment:
    k, v = (jnp.asarray(x, dtype) for x in _dead(fill, *_normal(rng, 2, *fill.shape, P, H)))
    return Segment(k, v, jnp.asarray(fill, jnp.int32), jnp.int32(LAYER))


def _product(rng: np.random.Generator, pages: Pages) -> Case:
    """The rows times the queries', keys' and values' weights of one layer, in one launch."""
    dtype, B, K, G, H, _, _ = pages
    width = K * G * H
    x = jnp.asarray(_normal(rng, B, width), dtype)
    stacks = [jnp.asarray(_normal(rng, LAYERS, n * H, width), dtype) for n in (K * G, K, K)]
    return Case(f"stacked_product, {pages.name}", stacked_product, (x, stacks, LAYER), {}, dtype)


def _experts(rng: np.random.Generator, pages: Pages) -> Case:
    """A block of rows for some experts, for one of them two, out of the weights of more."""
    dtype, _, K, G, H, _, _ = pages
    width, owner = K * G * H, jnp.asarray([0, 2, 2, 3], jnp.int32)
    x = jnp.asarray(_normal(rng, len(owner), 8, width), dtype)
    stacks = [jnp.asarray(_normal(rng, LAYERS, 5, K * H, width), dtype) for _ in range(2)]
    arrays = x, stacks, owner, LAYER
    return Case(f"grouped_product, {pages.name}", grouped_product, arrays, {}, dtype)


def _bounds_and_commits(rng: np.random.Generator, pages: Pages) -> Iterator[Case]:
    dtype, B, K, G, H, P, S = pages
    case = partial(Case, options={}, dtype=dtype)
    low, high = (jnp.asarray(x, dtype) for x in _normal(rng, 2, LAYERS, B, K, S, H))
    q = jnp.asarray(_normal(rng, B, K * G, H), dtype)
    yield case(f"page_bound, {pages.name}", page_bound, arrays=(q, low, high, LAYER))
    buffer, page = (
        jnp.asarray(_normal(rng, *shape), dtype)
        for shape in ((LAYERS, B, K, S, P, H), (LAYERS, B, K, P, H))
    )
    slot = rng.integers(0, S, (LAYERS, B, K)).astype(np.int32)
    commit = (buffer, page, jnp.asarray(slot))
    yield case(f"page_commit, {pages.name}", page_commit, arrays=commit)
    ranges = _ranges(K, S)
    pool = jnp.asarray(_normal(rng, B, ranges.total, P, H), dtype)
    own = slot % np.asarray(ranges.counts, np.int32)[:, None]
    yield case(
        f"ragged_page_commit, {pages.name}",
        ragged_page_commit,
        arrays=(pool, page, jnp.asarray(own)),
        options={"ranges": ranges},
    )


def _prefill(rng: np.random.Generator, pages: Pages) -> Iterator[Case]:
    dtype, B, K, G, H, P, S = pages
    T = P * S
    q, k, v = (jnp.asarray(_normal(rng, B, T, n, H), dtype) for n in (K * G, K, K))
    window, sink = T // 8, jnp.asarray(_normal(rng, K * G))
    options: dict[str, dict[str, Any]] = {
        "": {},
        " of a window": {"window": window},
        " with sinks": {"window": window, "sink": sink},
    }
    for name, given in options.items():
        what = f"prefill_attention{name}, {pages.name}"
        yield Case(what, prefill_attention, (q, k, v), given, dtype)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _fill(rng: np.random.Generator, shape: tuple[int, ...], P: int) -> np.ndarray:
    """Tokens in each page: a third of the pages is dead, and a third is full."""
    kind, fill = rng.integers(0, 3, shape), rng.integers(0, P + 1, shape)
    return np.select([kind == 0, kind == 1], [0, P], fill).astype(np.int32)


def _dead(fill: np.ndarray, *pages: np.ndarray) -> list[np.ndarray]:
    """The pages `[..., P, H]` with NaN where no token is."""
    alive = (np.arange(pages[0].shape[-2]) < fill[..., None])[..., None]
    return [np.where(alive, each, np.float32(np.nan)) for each in pages]


def _ranges(K: int, S: int) -> Ranges:
    """Heads of one page up to twice the mean."""
    sizes = np.linspace(1, 2 * S - 1, LAYERS * K).round().astype(int)
    return Ranges(tuple(tuple(layer) for layer in sizes.reshape(LAYERS, K).tolist()))


def _widened(x: Any) -> Any:
    floats = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)
    return x.astype(jnp.float32) if floats else x


def _exact(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)
