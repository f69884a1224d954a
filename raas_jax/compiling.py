"""What the compiler of a device is told, beside the program."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import jax

# The compiler for TPU v7x multiplies 16-bit numbers out of tiles of 16 rows, but is given arrays in
# tiles of 8, as on all TPUs: each call of a program would begin with a copy of all weights. Nor can
# they be stored in the larger tiles, which XLA takes away from what is cut over devices.
_OPTIONS = {"TPU7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": "false"}}


def compiler_options(device_kind: str) -> dict[str, str]:
    """Options of the compiler and their values, for `jax.Device.device_kind`; mostly none."""
    return dict(_OPTIONS.get(device_kind, {}))


def jit_for(function: Any, device_kind: str, **options: Any) -> Any:
    """A jitted function, jitted for a device of that kind.

    Its `plan`, `pages`, `probe` and `mesh` are static and its `state` is donated, where it has
    them; `options` are others of `jax.jit`.
    """
    arguments = set(inspect.signature(function).parameters)
    return jax.jit(
        function.__wrapped__,
        static_argnames=sorted(arguments & {"plan", "pages", "probe", "mesh"}),
        donate_argnames=sorted(arguments & {"state"}),
        compiler_options=compiler_options(device_kind) or None,
        **options,
    )


@functools.lru_cache(maxsize=64)
def on_one_device(function: Any, device_kind: str) -> Any:
    """The same without a mesh: the function itself, where its compiler is told nothing."""
    return jit_for(function, device_kind) if compiler_options(device_kind) else function
