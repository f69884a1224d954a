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
    from raas_jax import policies as policies
    from raas_jax.allotting import allot as allot
    from raas_jax.config import ModelConfig as ModelConfig
    from raas_jax.decode import RowRequest as RowRequest
    from raas_jax.engine import Engine as Engine
    from raas_jax.engine import Request as Request
    from raas_jax.engine import Result as Result
    from raas_jax.generation import Piece as Piece
    from raas_jax.generation import generate as generate
    from raas_jax.generation import generate_ids as generate_ids
    from raas_jax.generation import stream as stream
    from raas_jax.outputs import Output as Output
    from raas_jax.outputs import Stats as Stats
    from raas_jax.params import Params as Params
    from raas_jax.policies import Allotment as Allotment
    from raas_jax.policies import Dense as Dense
    from raas_jax.policies import Policy as Policy
    from raas_jax.policies import RaaS as RaaS
    from raas_jax.sampling import Sampling as Sampling
    from raas_jax.scoring import Score as Score
    from raas_jax.scoring import score as score
    from raas_jax.session import Session as Session
    from raas_jax.sharding import make_mesh as make_mesh
    from raas_jax.weights import convert as convert
    from raas_jax.weights import load as load

__version__ = "0.1.0"

# Public names by the module that has them, which is imported when one is first asked for.
_NAMES = {
    "allotting": "allot",
    "config": "ModelConfig",
    "decode": "RowRequest",
    "engine": "Engine Request Result",
    "generation": "Piece generate generate_ids stream",
    "outputs": "Output Stats",
    "params": "Params",
    "policies": "Allotment Dense Policy RaaS",
    "sampling": "Sampling",
    "scoring": "Score score",
    "session": "Session",
    "sharding": "make_mesh",
    "weights": "convert load",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted([*_HOME, "policies"])


def __getattr__(name: str) -> Any:
    if name == "policies":
        return importlib.import_module("raas_jax.policies")
    if name not in _HOME:
        raise AttributeError(f"module 'raas_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"raas_jax.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
