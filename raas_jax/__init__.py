"""Think in constant memory: RaaS decoding (arXiv 2502.11147) in JAX.

>>> import raas_jax
>>> params = raas_jax.load("demo")
>>> out = raas_jax.generate(params, "a = 4 ; b = 9 ; c = a + b ; ? c :")
>>> print(out.text, out.stats)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raas_jax import policies
    from raas_jax.config import ModelConfig
    from raas_jax.decode import RowRequest
    from raas_jax.engine import Engine, Request, Result
    from raas_jax.generation import Piece, generate, generate_ids, stream
    from raas_jax.outputs import Output, Stats
    from raas_jax.params import Params
    from raas_jax.policies import Dense, Policy, RaaS
    from raas_jax.sampling import Sampling
    from raas_jax.scoring import Score, score
    from raas_jax.session import Session
    from raas_jax.sharding import make_mesh
    from raas_jax.weights import convert, load

__version__ = "0.1.0"

__all__ = [
    "Dense",
    "Engine",
    "ModelConfig",
    "Output",
    "Params",
    "Piece",
    "Policy",
    "RaaS",
    "Request",
    "Result",
    "RowRequest",
    "Sampling",
    "Score",
    "Session",
    "Stats",
    "convert",
    "generate",
    "generate_ids",
    "load",
    "make_mesh",
    "policies",
    "score",
    "stream",
]

_MODULES = {
    "config": ["ModelConfig"],
    "decode": ["RowRequest"],
    "engine": ["Engine", "Request", "Result"],
    "generation": ["Piece", "generate", "generate_ids", "stream"],
    "outputs": ["Output", "Stats"],
    "params": ["Params"],
    "policies": ["Dense", "Policy", "RaaS"],
    "sampling": ["Sampling"],
    "scoring": ["Score", "score"],
    "session": ["Session"],
    "sharding": ["make_mesh"],
    "weights": ["convert", "load"],
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first asked for, so that importing the package is quick."""
    if name not in _HOME:
        raise AttributeError(f"module 'raas_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"raas_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
