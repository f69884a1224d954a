"""Products with weights of one layer, read where they lie in a stack; see `api.py`."""

from pallas_kernels.stacked_product.api import stacked_product

__all__ = ["stacked_product"]
