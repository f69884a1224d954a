"""One query token per row over chosen pages; see `api.py`."""

from pallas_kernels.selected_decode_attention.api import selected_decode_attention

__all__ = ["selected_decode_attention"]
