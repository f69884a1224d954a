"""Pictures of one derivation: attention over time, the pages that were kept, and what was lost."""

from raas_jax.lab.trace.draw import draw_milestones, draw_pages, draw_waterfall
from raas_jax.lab.trace.page import write_page
from raas_jax.lab.trace.record import Head, Trace, choose_heads, trace

__all__ = [
    "Head",
    "Trace",
    "choose_heads",
    "draw_milestones",
    "draw_pages",
    "draw_waterfall",
    "trace",
    "write_page",
]
