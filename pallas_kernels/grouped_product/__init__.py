"""Blocks of rows times one of many weights each; see `api.py`."""

from pallas_kernels.grouped_product.api import grouped_product, reads_in_place

__all__ = ["grouped_product", "reads_in_place"]
