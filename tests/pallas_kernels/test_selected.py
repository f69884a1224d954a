"""`selected_decode_attention` is `decode_attention` with the other pages empty, and unread."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import decode_attention, selected_decode_attention

L, PROMPTS, K, S, P, H = 2, 2, 2, 5, 3, 4


def drawn(rows):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    fill = jnp.asarray(rng.integers(1, P + 1, (PROMPTS, K, S)), jnp.int32)
    # Distinct slots in any order; the last place is not used everywhere.
    slots = np.argsort(rng.random((rows, K, S)), axis=-1)[..., :3].astype(np.int32)
    slots[0, 0, 2] = slots[1, 1, 0] = -1
    pages = (L, PROMPTS, K, S, P, H)
    return draw(rows, 2 * K, H), draw(*pages), draw(*pages), fill, slots


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("samples", [1, 2])
def test_as_if_other_pages_were_empty(samples, implementation):
    q, k, v, fill, slots = drawn(PROMPTS * samples)
    chosen = np.zeros((PROMPTS * samples, K, S), bool)
    for at in np.ndindex(*slots.shape):
        if slots[at] >= 0:
            chosen[(*at[:2], slots[at])] = True
    repeated = [jnp.repeat(x, samples, axis) for x, axis in ((k, 1), (v, 1), (fill, 0))]
    masked = jnp.where(chosen, repeated[2], 0)
    wanted = decode_attention(q, *repeated[:2], masked, 1, implementation="xla")
    if samples == 1:
        # What is not chosen is not read.
        unread = jnp.asarray(chosen)[None, ..., None, None]
        k, v = (jnp.where(unread, x, jnp.nan) for x in (k, v))
    got = selected_decode_attention(
        q, k, v, fill, jnp.asarray(slots), 1, implementation=implementation
    )
    for name in ("out", "max", "sum"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), rtol=1e-5, atol=1e-5)
    for at in np.ndindex(*slots.shape):
        row, head, place = at
        lse = np.asarray(got.page_lse)[row, 2 * head : 2 * head + 2, place]
        full = np.asarray(wanted.page_lse)[row, 2 * head : 2 * head + 2, slots[at]]
        np.testing.assert_allclose(lse, full if slots[at] >= 0 else -np.inf, rtol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    q, k, v, fill, slots = drawn(PROMPTS)
    good = [q, k, v, fill, jnp.asarray(slots)]
    for index, bad, name in (
        (0, q[:1], "q has shape"),
        (1, k[0], "k_pages has shape"),
        (3, fill[..., :2], "fill has shape"),
        (4, good[4][:1], "slots has shape"),
        (4, good[4].astype(jnp.float32), "slots has dtype"),
    ):
        with pytest.raises(ValueError, match=name):
            selected_decode_attention(*good[:index], bad, *good[index + 1 :])
