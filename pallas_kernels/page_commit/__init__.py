"""Write a full page into a slot, in place; see `api.py`."""

from pallas_kernels.page_commit.api import page_commit

__all__ = ["page_commit"]
