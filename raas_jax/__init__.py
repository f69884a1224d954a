"""Think in constant memory: RaaS decoding (arXiv 2502.11147) in JAX.

>>> import raas_jax
>>> params = raas_jax.load("demo")
>>> out = raas_jax.generate(params, "a = 4 ; b = 9 ; c = a + b ; ? c :")
>>> print(out.text, out.stats)
"""

from raas_jax import policies
from raas_jax.config import ModelConfig
from raas_jax.engine import Engine, Request, Result
from raas_jax.generate import Piece, generate, generate_ids, stream
from raas_jax.outputs import Output, Stats
from raas_jax.params import Params
from raas_jax.policies import Dense, Policy, RaaS
from raas_jax.sampling import Sampling
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
    "Sampling",
    "Stats",
    "convert",
    "generate",
    "generate_ids",
    "load",
    "make_mesh",
    "policies",
    "stream",
]
