"""Write one full page into a chosen slot of every head's range of a pool; see `api.py`."""

from pallas_kernels.ragged_page_commit.api import ragged_page_commit

__all__ = ["ragged_page_commit"]
