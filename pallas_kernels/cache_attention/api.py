"""`cache_attention`: one query token per row over prompt, kept pages and the current page."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.cache_attention.reference import cache_attention_reference
from pallas_kernels.cache_attention.segments import Attended, CacheAttention, Segment, join_sink
from pallas_kernels.cache_attention.tuning import prefers_separate
from pallas_kernels.checks import (
    check_axes,
    check_floats,
    check_integers,
    check_layer,
    check_pages,
    check_pool,
    check_same_dtype,
)
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.ranges import Ranges

_TPU = load("pallas_kernels.cache_attention.tpu", "cache_attention_tpu")
_RAGGED_TPU = load("pallas_kernels.cache_attention.ragged_tpu", "ragged_cache_attention_tpu")
_GPU = load("pallas_kernels.cache_attention.gpu", "cache_attention_gpu")
_RESULTS = Attended("BNH", "BN", "BNS", "BN")  # type: ignore[arg-type]


def cache_attention(
    q: jax.Array,
    prompt: Segment | None,
    kept: Segment,
    current: Segment,
    *,
    ranges: Ranges | None = None,
    sink: jax.Array | None = None,
    scale: float | None = None,
    dtype: Any = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> CacheAttention:
    """Attention of one token per row over its whole cache, with the mass of every generated page.

    The same as `decode_attention` over each segment, merged; on TPUs and Hopper GPUs one kernel.

    Args:
      q: `[B, N, H]` queries, N a multiple of K; query heads `k * G ... k * G + G - 1` share
        key/value head `k`.
      prompt: pages `[L, B', K, Sp, P, H]`, filled in their order; `tokens` int32 `[B']`. Row `b`
        has prompt `b * B' // B`, so that several samples share one. None where there is none.
      kept: pages `[Lg, B, K, S, P, H]`, or with `ranges` a pool `[B, T, P, H]`; `tokens` int32
        `[Lg, B, K, S]`, 0..P in each page, S being `ranges.most` of a pool.
      current: the page being written, `[L, B, K, P, H]`; `tokens` int32 scalar, 1..P, the same in
        all rows.
      ranges: static; which pages of a pool each layer and head has.
      sink: float `[N]`, a logit per query head that joins the softmax and has no value.
      scale: factor on the scores, `1 / sqrt(H)` by default.
      dtype: of the attended values, float32 by default; sums are float32 and rounded once.
      implementation: None picks by target and arguments, the separate operations where no kernel
        serves them; "tpu" or "gpu" forces a kernel, "xla" the reference.
      target: what is compiled for; the default backend where not given.

    Returns:
      `CacheAttention`.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    target = Target.of() if target is None else target
    kept, current = _checked(q, kept, current, ranges)
    if prompt is not None and not prompt.k.shape[3]:
        prompt = None
    if prompt is not None:
        prompt = _checked_prompt(q, prompt, kept, current)
    if sink is not None:
        check_floats("sink", sink)
        if sink.shape != q.shape[1:2]:
            raise ValueError(f"sink has shape {sink.shape}; it must be [{q.shape[1]}], one a head.")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    separate = partial(
        cache_attention_reference, ranges=ranges, implementation=implementation, target=target
    )
    places: tuple[jax.Array | None, jax.Array | None] = (None, None)
    if ranges is not None:
        target = target.in_parts(ranges.parts)
        places = jnp.asarray(ranges.starts), jnp.asarray(ranges.counts, jnp.int32)
    dtype = jnp.dtype(jnp.float32 if dtype is None else dtype)
    # Rounded by the kernel itself where nothing follows: what XLA does is another launch.
    gpu = partial(_GPU, dtype=dtype if sink is None else jnp.float32)
    pages = ("LBKSPH" if ranges is None else "BTPH",) * 2
    kernels = {
        name: partial(_with_segments, kernel, sizes=ranges and ranges.sizes)
        for name, kernel in (("tpu", _TPU if ranges is None else _RAGGED_TPU), ("gpu", gpu))
    }
    found = dispatch(
        "cache_attention",
        {"xla": partial(_with_segments, _without_places(separate)), **kernels},
        implementation,
        target,
        (q, *(prompt or (None,) * 4), *kept, *current, *places),
        (
            (
                *("BNH", "LBKSPH", "LBKSPH", "B", "", *pages, "LBKS", ""),
                *("LBKPH", "LBKPH", "", "", "LK", "LK"),
            ),
            _RESULTS,
        ),
        prefers_xla=partial(prefers_separate, q=q, prompt=prompt, kept=kept, current=current),
        scale=scale,
    )
    return finished(found, sink, dtype)


def finished(found: Attended, sink: jax.Array | None, dtype: Any = jnp.float32) -> CacheAttention:
    """Joins the sink, and forms the masses: XLA makes this a part of what asks for them."""
    out, lse = join_sink(found.out, found.lse, sink)
    return CacheAttention(
        out.astype(dtype),
        jnp.exp(found.kept_lse - lse[..., None]),
        jnp.exp(found.current_lse - lse),
    )


def _with_segments(backend: Any, q: jax.Array, *arrays: Any, **options: Any) -> Attended:
    """Calls a backend with its segments, which dispatch knows as single arrays."""
    prompt, kept, current = (Segment(*arrays[at : at + 4]) for at in (0, 4, 8))
    found: Attended = backend(
        q, None if prompt.k is None else prompt, kept, current, *arrays[12:], **options
    )
    return found


def _without_places(backend: Any) -> Any:
    """The reference has the ranges themselves."""
    return lambda q, prompt, kept, current, starts, counts, **options: backend(
        q, prompt, kept, current, **options
    )


def _checked(
    q: jax.Array, kept: Segment, current: Segment, ranges: Ranges | None
) -> tuple[Segment, Segment]:
    """The kept pages and the current one, their numbers int32; raises ValueError."""
    if kept.tokens.ndim != 4:
        raise ValueError(f"kept.tokens has shape {kept.tokens.shape}; it must be [L, B, K, S].")
    if ranges is None:
        _, layer = check_pages(q, kept.k, kept.v, kept.tokens[0], kept.layer, shared=False)
        layers, P = kept.k.shape[0], kept.k.shape[4]
        if kept.tokens.shape != kept.k.shape[:4]:
            raise ValueError(
                f"kept.tokens has shape {kept.tokens.shape}; it must be {list(kept.k.shape[:4])}."
            )
    else:
        _, layer = check_pool(q, kept.k, kept.v, kept.tokens[0], kept.layer, ranges)
        layers, P = ranges.layers, kept.k.shape[2]
    if len(kept.tokens) != layers:
        raise ValueError(f"kept.tokens is of {len(kept.tokens)} layers, and there are {layers}.")
    B, _, H = q.shape
    wanted = (*current.k.shape[:1], B, kept.tokens.shape[2], P, H)
    if current.k.shape != wanted or current.v.shape != wanted:
        raise ValueError(
            f"current.k has shape {current.k.shape} and current.v {current.v.shape}; both must be "
            f"{list(wanted)}."
        )
    for name in ("k", "v"):
        check_same_dtype(f"current.{name}", getattr(current, name), "kept.k", kept.k)
    written = jnp.asarray(current.tokens)
    if written.ndim:
        raise ValueError(f"current.tokens has shape {written.shape}; it must be a scalar.")
    check_integers("current.tokens", written, "tokens of the current page")
    return (
        kept._replace(tokens=kept.tokens.astype(jnp.int32), layer=layer),
        current._replace(
            tokens=written.astype(jnp.int32), layer=check_layer(current.layer, len(current.k))
        ),
    )


def _checked_prompt(q: jax.Array, prompt: Segment, kept: Segment, current: Segment) -> Segment:
    """The same of the prompt."""
    no_fill = jnp.zeros((1, 1, prompt.k.shape[3]), jnp.int32)
    _, layer = check_pages(q, prompt.k, prompt.v, no_fill, prompt.layer, shared=True)
    K, P = current.k.shape[2:4]
    check_axes("prompt.k", prompt.k, K=K, P=P)
    if (prompt.k.shape[2], prompt.k.shape[4]) != (K, P):
        raise ValueError(
            f"prompt.k has shape {prompt.k.shape}; it must have {K} heads and pages of {P} tokens, "
            "as the other segments have."
        )
    check_same_dtype("prompt.k", prompt.k, "kept.k", kept.k)
    if prompt.tokens.shape != prompt.k.shape[1:2]:
        raise ValueError(
            f"prompt.tokens has shape {prompt.tokens.shape}; it must be [{prompt.k.shape[1]}]."
        )
    check_integers("prompt.tokens", prompt.tokens, "the length of each prompt")
    return prompt._replace(tokens=prompt.tokens.astype(jnp.int32), layer=layer)
