"""Attention of one token per row over a whole cache, with the share of every generated page."""

from pallas_kernels.cache_attention.api import cache_attention
from pallas_kernels.cache_attention.segments import CacheAttention, Segment

__all__ = ["CacheAttention", "Segment", "cache_attention"]
