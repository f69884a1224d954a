"""Choice of backend, the same for every operation.

A backend that cannot serve the given arguments raises `NotImplementedError`, and the next in order
is asked. If none can, one `ValueError` lists what each of them said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax

Implementation = Literal["xla", "tpu", "gpu"] | None


def dispatch(
    operation: str,
    backends: Mapping[str, Callable[..., Any]],
    implementation: Implementation,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Calls the backend that `implementation` names, or the best one for the default platform.

    Raises:
      ValueError: the name is unknown, or every backend that was asked declined.
    """
    if implementation is None:
        order = [name for name in (jax.default_backend(), "xla") if name in backends]
    elif implementation in backends:
        order = [implementation]
    else:
        raise ValueError(
            f"implementation is {implementation!r}; {operation} has {', '.join(sorted(backends))}."
        )
    declined = []
    for name in order:
        try:
            return backends[name](*args, **kwargs)
        except NotImplementedError as reason:
            declined.append(f"{name}: {reason}")
    raise ValueError(f"{operation}: no backend serves these arguments. " + "; ".join(declined))
