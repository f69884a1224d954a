"""Rows that come and go: thousands of requests through a batch of fixed shape."""

from raas_jax.engine.engine import Engine, Usage
from raas_jax.engine.requests import Request, Result

__all__ = ["Engine", "Request", "Result", "Usage"]
