"""How far a kernel may be from its reference, by the dtype of the cache: one table for all.

Both sum in float32. With a bfloat16 cache, weights are rounded to bfloat16 before they meet the
values, and a different running maximum rounds them differently.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

# (relative, absolute) of what is compared; `page_lse`, `max` and bounds come from unrounded scores.
TOLERANCES = {
    "float32": {"out": (1e-5, 1e-5), "sum": (1e-5, 1e-6), "scores": (1e-5, 1e-5)},
    "bfloat16": {"out": (1e-2, 2e-2), "sum": (1e-5, 1e-6), "scores": (1e-5, 1e-5)},
}

# On GPUs, of the largest value: float32 is split into two bfloat16 halves, so 16 bits of it count,
# and sums are of `exp(page_lse - max)`.
HOPPER_TOLERANCES = {
    "float32": {"out": 3e-5, "max": 2e-5, "sum": 3e-5, "page_lse": 1e-5},
    "bfloat16": {"out": 4e-3, "max": 1e-6, "sum": 2e-5, "page_lse": 1e-5, "bound": 1e-6},
}


def assert_close(got, wanted, dtype, what="out"):
    """Equal infinities, no NaN, and the rest within the table."""
    relative, absolute = TOLERANCES[jnp.dtype(dtype).name][what]
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    assert not np.any(np.isnan(got))
    np.testing.assert_allclose(got, wanted, rtol=relative, atol=absolute)


def assert_same_attention(got, wanted, dtype):
    """Each part of two `DecodeAttention`s."""
    # Any maximum would do, as long as the sums are relative to it; ours is the largest score.
    assert_close(got.max, wanted.max, dtype, "scores")
    assert_close(got.sum, wanted.sum, dtype, "sum")
    assert_close(got.out, wanted.out, dtype, "out")
    assert_close(got.page_lse, wanted.page_lse, dtype, "scores")


def assert_same_on_hopper(got, wanted, dtype):
    """Each part of two `DecodeAttention`s, or the like, as close as the kernels come."""
    tolerance = HOPPER_TOLERANCES[jnp.dtype(dtype).name]
    for name, one, other in zip(wanted._fields, got, wanted, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        np.testing.assert_array_equal(np.isneginf(one), np.isneginf(other), err_msg=name)
        finite = np.isfinite(other)
        scale = np.abs(other[finite]).max(initial=1)
        np.testing.assert_allclose(
            one[finite], other[finite], rtol=0, atol=tolerance[name] * scale, err_msg=name
        )
