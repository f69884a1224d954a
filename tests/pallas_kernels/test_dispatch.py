"""Which backend is asked, what is said when none will, and how a call is split over a mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from pallas_kernels import Target, decode_attention, page_commit
from pallas_kernels.arrays import result
from pallas_kernels.decode_attention.tuning import prefers_xla
from pallas_kernels.dispatch import dispatch, load

TPU, GPU, CPU = Target("tpu", "TPU v5"), Target("gpu", "NVIDIA H100"), Target("cpu")


def no(*args, **kwargs):
    raise NotImplementedError("not today")


def xla(x):
    return x + 1


def other(x, *, device_kind):
    assert device_kind == "TPU v5"
    return x + 2


def ask(backends, implementation=None, target=TPU, **options):
    x = jnp.zeros(3, jnp.int32)
    return int(dispatch("add", backends, implementation, target, (x,), (("T",), "T"), **options)[0])


@pytest.mark.parametrize(
    ("backends", "implementation", "target", "wanted"),
    [
        ({"xla": xla, "tpu": other}, None, TPU, 2),
        ({"xla": xla, "tpu": other}, None, GPU, 1),
        ({"xla": xla, "tpu": other}, None, CPU, 1),
        ({"xla": xla, "tpu": other}, "xla", TPU, 1),
        ({"xla": xla, "tpu": other}, "tpu", Target("cpu", "TPU v5"), 2),
        ({"xla": xla, "tpu": no}, None, TPU, 1),
        ({"xla": xla, "tpu": load("no.such.module", "add")}, None, TPU, 1),
    ],
)
def test_the_target_chooses_and_declining_asks_the_next(backends, implementation, target, wanted):
    assert ask(backends, implementation, target) == wanted


def test_plain_xla_where_it_is_better_unless_another_is_named():
    backends = {"xla": xla, "tpu": other}
    assert ask(backends, prefers_xla=lambda target: target == TPU) == 1
    assert ask(backends, "tpu", prefers_xla=lambda target: True) == 2


def test_one_error_lists_every_reason():
    with pytest.raises(ValueError, match="add: no backend .* tpu: not today; xla: not today"):
        ask({"xla": no, "tpu": no})
    with pytest.raises(ValueError, match="tpu: no.such.module cannot be imported"):
        ask({"xla": xla, "tpu": load("no.such.module", "add")}, "tpu")


def test_a_page_that_a_tpu_cannot_write_is_said_with_the_remedy():
    pages = jax.ShapeDtypeStruct((1, 1, 1, 4, 1, 128), jnp.bfloat16)
    page = jax.ShapeDtypeStruct((1, 1, 1, 1, 128), jnp.bfloat16)
    slot = jax.ShapeDtypeStruct((1, 1, 1), jnp.int32)
    with pytest.raises(ValueError, match="1 bfloat16 token .* even page_size"):
        jax.eval_shape(lambda *x: page_commit(*x, implementation="tpu"), pages, page, slot)


@pytest.mark.parametrize(
    ("P", "H", "wanted"),
    [(16, 128, False), (1, 256, False), (2, 128, False), (3, 128, True), (16, 64, True)],
)
def test_a_tpu_pads_some_pages(P, H, wanted):
    assert prefers_xla(TPU, P, H) == wanted
    assert not prefers_xla(CPU, P, H)


def test_a_single_page_is_too_little_for_a_kernel():
    assert prefers_xla(TPU, 16, 128, pages=1) and prefers_xla(GPU, 16, 128, pages=1)
    assert not prefers_xla(GPU, 16, 128, pages=2) and not prefers_xla(CPU, 16, 128, pages=1)


@pytest.mark.parametrize(
    ("data", "model", "B", "K", "rows", "heads"),
    [
        (2, 4, 6, 4, 3, 1),
        (2, 4, 3, 4, 3, 1),
        (2, 4, 6, 2, 3, 2),
        (1, 8, 1, 8, 1, 1),
        (4, 1, 8, 2, 2, 2),
    ],
)
def test_rows_and_heads_are_split_where_they_divide(monkeypatch, data, model, B, K, rows, heads):
    """What each device is given: its rows and heads, or all where the mesh does not divide them."""
    from pallas_kernels.decode_attention import api
    from pallas_kernels.decode_attention.reference import decode_attention_reference

    given = []

    def backend(*arrays, device_kind, **options):
        given.append([x.shape for x in arrays])
        return decode_attention_reference(*arrays, **options)

    monkeypatch.setitem(api._BACKENDS, "tpu", backend)
    axes = (AxisType.Auto,) * 2
    mesh = AbstractMesh((data, model), ("data", "model"), axis_types=axes)
    target = Target("tpu", "TPU v5", mesh)
    q, pages = result(B, 2 * K, 128), result(2, B, K, 3, 8, 128)
    fill = jax.ShapeDtypeStruct((B, K, 3), jnp.int32)
    out = jax.eval_shape(lambda *x: decode_attention(*x, target=target), q, pages, pages, fill)
    local = (2, rows, heads, 3, 8, 128)
    assert given == [[(rows, 2 * heads, 128), local, local, (rows, heads, 3), ()]]
    # Put together again, they are the whole.
    assert [x.shape for x in out] == [(B, 2 * K, 128), (B, 2 * K), (B, 2 * K), (B, 2 * K, 3)]
