"""`grouped_product`: blocks of rows, each times the weights of its owner, read where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.checks import check_floats, check_integers, check_layer, check_same_dtype
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.grouped_product.reference import grouped_product_reference

_BACKENDS = {
    "xla": grouped_product_reference,
    "gpu": load("pallas_kernels.grouped_product.gpu", "grouped_product_gpu"),
}
_require = load("pallas_kernels.grouped_product.gpu", "require")


def grouped_product(
    x: jax.Array,
    stacks: Sequence[jax.Array],
    owner: jax.Array,
    layer: jax.Array | int = 0,
    *,
    dtype: Any = None,
    implementation: Implementation = None,
    target: Target | None = None,
) -> list[jax.Array]:
    """Each block of rows times the weights of its owner, an expert of one layer.

    Only weights that own a block are read. The owner of several reads them for each, one after the
    other, so that they are still in the cache: let blocks of one owner follow each other.

    Args:
      x: `[T, R, in]`, T blocks of R rows.
      stacks: `[L, E, out, in]` each, as many layers, experts and numbers per row in all; the whole
        stacks, so that nothing is sliced out.
      owner: int32 `[T]`, the expert of each block; E says that it has none. What comes out of such
        a block is not defined.
      layer: int32 scalar, which layer of the stacks to read.
      dtype: of the results, that of x by default; sums are float32 and rounded once.
      implementation: None picks by target and arguments; "xla" or "gpu" forces one.
      target: what is compiled for; the default backend where not given. On a mesh every device
        computes all of it.

    Returns:
      `[T, R, out]` for each stack.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    if x.ndim != 3 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be [T, R, in], none of them 0.")
    check_floats("x", x)
    if not stacks:
        raise ValueError("stacks is empty; give at least one stack [L, E, out, in].")
    for place, stack in enumerate(stacks):
        name, wanted = f"stacks[{place}]", [*stacks[0].shape[:2], "out", x.shape[2]]
        if stack.ndim != 4 or [*stack.shape[:2], "out", stack.shape[3]] != wanted:
            raise ValueError(
                f"{name} has shape {stack.shape}; with x {x.shape} and stacks[0] "
                f"{stacks[0].shape} it must be [L, E, out, {x.shape[2]}], L and E those of the "
                "first."
            )
        check_same_dtype(name, stack, "x", x)
    if owner.shape != x.shape[:1]:
        raise ValueError(f"owner has shape {owner.shape}; with x {x.shape} it must be [T].")
    check_integers("owner", owner, "the expert of each block")
    # No letter that a mesh splits.
    axes = ("", "", "", *[""] * len(stacks)), [""] * len(stacks)
    return dispatch(
        "grouped_product",
        _BACKENDS,
        implementation,
        target,
        (x, owner.astype("int32"), check_layer(layer, stacks[0].shape[0]), *stacks),
        axes,
        dtype=x.dtype if dtype is None else jax.numpy.dtype(dtype),
    )


def reads_in_place(target: Target, rows: int, dtype: Any, widths: Sequence[int]) -> bool:
    """Whether a target has a kernel that reads only the experts that own a block.

    Of blocks of so many rows, and weights whose `in` and `out` are `widths`; XLA's path computes
    one block after the other.
    """
    if target.platform != "gpu":
        return False
    try:
        _require(target.device_kind, rows, dtype, widths)
    except NotImplementedError:
        return False
    return True
