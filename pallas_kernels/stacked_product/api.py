"""`stacked_product`: rows times one layer's weights, which are read where they lie in a stack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax

from pallas_kernels.checks import check_floats, check_layer, check_same_dtype
from pallas_kernels.dispatch import Implementation, Target, dispatch, load
from pallas_kernels.stacked_product.reference import stacked_product_reference

_BACKENDS = {
    "xla": stacked_product_reference,
    "gpu": load("pallas_kernels.stacked_product.gpu", "stacked_product_gpu"),
}


def stacked_product(
    x: jax.Array,
    stacks: Sequence[jax.Array],
    layer: jax.Array | int = 0,
    *,
    dtype: Any = None,
    inward: bool = False,
    implementation: Implementation = None,
    target: Target | None = None,
) -> list[jax.Array]:
    """Each row times the weights of one layer, of one or several stacks in a single launch.

    Args:
      x: `[B, in]`.
      stacks: `[L, out, in]` each, as many layers and numbers per row in all; the whole stacks, so
        that no layer is sliced out.
      layer: int32 scalar, which layer of the stacks to read.
      dtype: of the results, that of x by default; sums are float32 and rounded once.
      inward: whether a mesh that splits heads cuts `in`, and the devices' results are added up; it
        cuts `out` otherwise.
      implementation: None picks by target and arguments; "xla" or "gpu" forces one.
      target: what is compiled for; the default backend where not given.

    Returns:
      `[B, out]` for each stack.

    Raises:
      ValueError: the shapes or dtypes do not fit together, named; or no backend serves them.
    """
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"x has shape {x.shape}; it must be [B, in], neither of them 0.")
    check_floats("x", x)
    if not stacks:
        raise ValueError("stacks is empty; give at least one stack [L, out, in].")
    for place, stack in enumerate(stacks):
        name, layers = f"stacks[{place}]", stacks[0].shape[:1]
        if stack.ndim != 3 or stack.shape != (*layers, stack.shape[1], x.shape[1]):
            raise ValueError(
                f"{name} has shape {stack.shape}; with x {x.shape} and stacks[0] "
                f"{stacks[0].shape} it must be [{layers[0]}, out, {x.shape[1]}]."
            )
        check_same_dtype(name, stack, "x", x)
    # What a mesh splits with the heads has their letter.
    operands, out = (("BN", "", "LIN"), "BI") if inward else (("BI", "", "LNI"), "BN")
    axes = (*operands[:2], *operands[2:] * len(stacks)), [out] * len(stacks)
    return dispatch(
        "stacked_product",
        _BACKENDS,
        implementation,
        target,
        (x, check_layer(layer, stacks[0].shape[0]), *stacks),
        axes,
        summed=inward,
        dtype=x.dtype if dtype is None else jax.numpy.dtype(dtype),
    )
