"""Attention over pages of keys and values: operations that know nothing of models or policies."""

from pallas_kernels.cache_attention import CacheAttention, Segment, cache_attention
from pallas_kernels.decode_attention import DecodeAttention, decode_attention
from pallas_kernels.dispatch import Target
from pallas_kernels.grouped_product import grouped_product
from pallas_kernels.page_bound import page_bound
from pallas_kernels.page_commit import page_commit
from pallas_kernels.prefill_attention import prefill_attention
from pallas_kernels.ragged_decode_attention import head_pages, ragged_decode_attention
from pallas_kernels.ragged_page_commit import ragged_page_commit
from pallas_kernels.ranges import Ranges
from pallas_kernels.selected_decode_attention import selected_decode_attention
from pallas_kernels.stacked_product import stacked_product

__all__ = [
    "CacheAttention",
    "DecodeAttention",
    "Ranges",
    "Segment",
    "Target",
    "cache_attention",
    "decode_attention",
    "grouped_product",
    "head_pages",
    "page_bound",
    "page_commit",
    "prefill_attention",
    "ragged_decode_attention",
    "ragged_page_commit",
    "selected_decode_attention",
    "stacked_product",
]
