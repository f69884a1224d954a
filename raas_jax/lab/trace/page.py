"""One self-contained HTML page of a trace: pictures, and a stepper through its tokens."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from raas_jax import files
from raas_jax.lab.trace.draw import error_text, live_pages, name, stamp_ages
from raas_jax.lab.trace.record import Head, Trace


def write_page(trace: Trace, pictures: Sequence[tuple[str, str, Path]], file: str | Path) -> None:
    """Writes the page; the pictures are title, explanation and PNG of each."""
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    figures = "".join(
        f"<section><h2>{html.escape(title)}</h2><p>{html.escape(text)}</p>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,'
        f'{base64.b64encode(png.read_bytes()).decode()}"></section>'
        for title, text, png in pictures
    )
    # `</` would end the script.
    data = json.dumps(page_data(trace), ensure_ascii=False).replace("</", "<\\/")
    parts = {"title": html.escape(name(trace)), "figures": figures, "data": data}
    for key, value in parts.items():
        template = template.replace("{{" + key + "}}", value)
    files.replace_text(file, template)


def page_data(trace: Trace) -> dict[str, Any]:
    """What the stepper needs, as JSON values; matrices are base64 of bytes, row by row."""
    lookups = () if trace.milestones is None else trace.milestones.lookups
    outcome = ""
    if trace.problem is not None:
        right = trace.first_error is None
        outcome = "every token is right" if right else error_text(trace)
    return {
        "policy": name(trace),
        "words": trace.words,
        "prompt": trace.prompt_tokens,
        "pageSize": trace.recording.page_size,
        "pages": trace.pages,
        "outcome": outcome,
        "firstError": trace.first_error,
        "kvBytes": trace.kv_bytes,
        "denseBytes": trace.dense_kv_bytes,
        "needed": None if trace.milestones is None else trace.milestones.needed_until,
        "lookups": [[each.position, each.name, each.sources] for each in lookups],
        "live": _bytes(live_pages(trace)),
        "stamped": trace.recording.stamps is not None,
        "heads": [_head(trace, head) for head in trace.attention],
    }


def _head(trace: Trace, head: Head) -> dict[str, Any]:
    # The square root keeps small shares visible in eight bits.
    attention = np.rint(np.sqrt(np.clip(trace.attention[head], 0, 1)) * 255)
    ages = np.nan_to_num(stamp_ages(trace, head), nan=-1)
    # 255: not kept; otherwise tokens since the last use, up to 254.
    ages = np.where(ages < 0, 255, np.minimum(ages, 254))
    seen = {"attention": _bytes(attention), "ages": _bytes(ages)}
    return {"layer": head[0], "head": head[1], **seen}


def _bytes(matrix: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(matrix, np.uint8).tobytes()).decode()
