"""Quest's bound of a page's scores; see `api.py`."""

from pallas_kernels.page_bound.api import page_bound

__all__ = ["page_bound"]
