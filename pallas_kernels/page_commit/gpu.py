"""`page_commit` for GPUs: XLA's own scatter is already what a kernel would be.

Compiled for compute capability 9.0 with a donated buffer, the reference is one scatter, aliased to
its operand, that writes the new pages and nothing else (`tests/compiled/test_hopper.py` checks it).
"""

from __future__ import annotations

from typing import Any

import jax


def page_commit_gpu(pages: jax.Array, page: jax.Array, slot: jax.Array, **_: Any) -> jax.Array:
    """See `api.page_commit`.

    Raises:
      NotImplementedError: always; the next backend is XLA.
    """
    raise NotImplementedError("XLA's scatter already writes in place on GPUs")
