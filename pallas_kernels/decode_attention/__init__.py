"""One query token per row over pages; see `api.py`."""

from pallas_kernels.decode_attention.api import decode_attention
from pallas_kernels.decode_attention.reference import DecodeAttention

__all__ = ["DecodeAttention", "decode_attention"]
