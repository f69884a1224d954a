"""One query token per row over heads' own ranges of a pool of pages; see `api.py`."""

from pallas_kernels.ragged_decode_attention.api import ragged_decode_attention
from pallas_kernels.ragged_decode_attention.reference import head_pages

__all__ = ["head_pages", "ragged_decode_attention"]
