"""The three pictures of a trace, with matplotlib (`pip install -e '.[plots]'`).

Colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart.
Every picture has time running down or to the right in tokens of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raas_jax.lab.trace.record import Head, Trace

BLUE, VERMILLION, ORANGE, INK = "#0072B2", "#D55E00", "#E69F00", "#1b1f24"
FORGOTTEN = "#ebe7e0"
RAMP = ("#ffffff", "#cfe6f5", "#56B4E9", BLUE, "#00263d")
IN_USE = ("#0072B2", "#5fa6d1", "#cfe3f1")  # a needed page, from fresh stamp to old
IDLE = ("#7a7a7a", "#b0b0b0", "#e2e2e2")  # a page that nothing needs any more
PIXELS = 1000  # Larger matrices are pooled by maximum, so that single bright tokens stay.
SPOTS = 180  # A spot covers at least this part of a picture's width and height.
MOST_TOKENS = 64  # Up to here the axes show every token's text.
DPI = 140


def pyplot() -> Any:
    """matplotlib's pyplot, drawing without a display. Raises ImportError that says what to do."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install matplotlib, or, in the checkout of raas_jax, "
            "pip install -e '.[plots]'."
        ) from error
    if "inline" not in matplotlib.get_backend().lower():  # A notebook draws by itself.
        matplotlib.use("Agg")
    from matplotlib import pyplot as found

    return found


def draw_waterfall(
    traces: Sequence[Trace], file: str | Path | None = None, heads: Sequence[Head] | None = None
) -> Any:
    """Attention of chosen heads over time: a row per head, a column per trace.

    Columns that are bright for a while and then dark are milestones; in the prompt's part, columns
    that light up again after long are phoenix tokens.

    Args:
      traces: one prompt under different policies.
      file: PNG to write; None only returns the figure, for a notebook.
      heads: the heads to show; by default those of the first trace.
    """
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.patches import Patch

    heads = heads or list(traces[0].attention)
    colours = LinearSegmentedColormap.from_list("attention", RAMP)
    norm = PowerNorm(0.5, 0, 1)
    size = (1.6 + 7.0 * len(traces), 0.9 + 6.4 * len(heads))
    figure, axes = plt.subplots(
        len(heads), len(traces), figsize=size, squeeze=False, layout="constrained"
    )
    for row, head in enumerate(heads):
        for column, trace in enumerate(traces):
            axis = axes[row][column]
            attention, gone = trace.attention[head], forgotten(trace, head)
            G, T = attention.shape
            factor = -(-T // PIXELS)
            spots = _pooled(attention, factor)
            image = colours(norm(_enlarged(spots, round(max(spots.shape) / SPOTS))))
            blank = _pooled(gone, factor) & (spots == 0)
            image[blank] = [*_rgb(FORGOTTEN), 1]
            _show(axis, image, (-0.5, T - 0.5, G - 0.5, -0.5))
            axis.axvline(trace.prompt_tokens - 0.5, color=ORANGE, linewidth=1.2)
            _waterfall_ticks(axis, trace, with_text=column == 0)
            axis.set_title(f"{_called(trace, head)} · {name(trace)}", fontsize=11)
            axis.set_xlabel(
                f"attended token: prompt (left of the orange line, {trace.prompt_tokens}), answer"
            )
            if column == 0:
                axis.set_ylabel("token being written (time runs down)")
    bar = figure.colorbar(
        plt.cm.ScalarMappable(norm, colours), ax=axes, shrink=0.5, pad=0.01, aspect=30
    )
    bar.set_label("share of the attention")
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    if any(trace.evicted() for trace in traces):
        figure.legend(
            handles=[Patch(facecolor=FORGOTTEN, edgecolor="#b8b0a2", label="forgotten")],
            loc="outside lower right",
            frameon=False,
        )
    return _finish(figure, file)


def draw_pages(
    trace: Trace, file: str | Path | None = None, heads: Sequence[Head] | None = None
) -> Any:
    """Which pages were in the cache at each step and when they were last in use, head by head."""
    plt = pyplot()
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    heads = heads or list(trace.attention)
    size = (1.4 + 6.6 * len(heads), 7.6)
    figure, axes = plt.subplots(
        1, len(heads), figsize=size, squeeze=False, sharey=True, layout="constrained"
    )
    steps = len(trace.recording.tokens) - 1
    for axis, head in zip(axes[0], heads, strict=True):
        _show(axis, page_colours(trace, head), (-0.5, trace.pages - 0.5, steps + 0.5, 0.5))
        if trace.milestones is not None:
            _lookup_marks(axis, trace, head)
        axis.set_title(_called(trace, head), fontsize=11)
        axis.set_xlabel(f"page of {trace.recording.page_size} tokens")
        axis.set_xticks(range(0, trace.pages, max(1, -(-trace.pages // 12))))
    axes[0][0].set_ylabel("token being written (time runs down)")
    _line_ticks(axes[0][0], trace)
    stamped = trace.recording.stamps is not None
    ages = ", from just used (dark) to long ago (light)" if stamped else ""
    handles: list[Any] = [Patch(facecolor=ORANGE, label="page being written")]
    if trace.milestones is None:
        handles.append(Patch(facecolor=IN_USE[0], label=f"kept{ages}"))
    else:
        handles += [
            Patch(facecolor=IN_USE[0], label=f"kept, holds a live milestone{ages}"),
            Patch(facecolor=IDLE[0], label="kept, nothing in it is needed again"),
            Patch(facecolor=VERMILLION, label="forgotten, but needed later"),
            Line2D([], [], **_FOUND, label="look-up, served from this page"),
            Line2D([], [], **_MISSED, label="look-up, milestone gone in this head"),
        ]
    handles.append(Patch(facecolor="white", edgecolor="#999999", label="forgotten or not written"))
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"Pages in the cache · {name(trace)}", fontsize=13)
    return _finish(figure, file)


def draw_milestones(trace: Trace, file: str | Path | None = None) -> Any:
    """Where the policy lost what was needed later: every name from its first value to its last use.

    Raises:
      ValueError: the trace has no milestones, since its text is no lemma derivation.
    """
    if trace.milestones is None:
        raise ValueError("the trace has no milestones: its prompt is not a lemma problem.")
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.lines import Line2D

    colours = LinearSegmentedColormap.from_list("held", (VERMILLION, "#f1e3cf", BLUE))
    names, held = held_over_time(trace)
    steps = held.shape[1]
    size = (12.5, 2.2 + 0.2 * max(6, len(names)))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = colours(np.nan_to_num(held))
    image[np.isnan(held)] = (1, 1, 1, 1)
    _show(axis, image, (-0.5, steps - 0.5, len(names) - 0.5, -0.5))
    for index in range(len(names)):
        axis.axhline(index + 0.5, color="white", linewidth=2)
    place = {name: index for index, name in enumerate(names)}
    missed = 0
    for lookup in trace.milestones.lookups:
        token = lookup.position - trace.prompt_tokens
        share = trace.share_held(token, lookup.sources)
        missed += share < 1
        style = _FOUND if share == 1 else _PARTLY if share > 0 else _MISSED_BLACK
        axis.plot(token, place[lookup.name], **style)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(axis="y", length=0)
    axis.set_ylabel("name")
    axis.set_xlabel("token being written")
    axis.spines[["top", "right", "left"]].set_visible(False)
    handles = [
        Line2D([], [], **_FOUND, label="look-up: in the cache of every head"),
        Line2D([], [], **_PARTLY, label="look-up: gone in some heads"),
        Line2D([], [], **_MISSED_BLACK, label="look-up: gone in all heads"),
    ]
    if trace.first_error is not None:
        axis.axvline(trace.first_error, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
        axis.annotate(
            error_text(trace),
            (trace.first_error, 1),
            (3, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="left" if trace.first_error < 0.6 * steps else "right",
            fontsize=9,
            color=INK,
        )
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    bar = figure.colorbar(plt.cm.ScalarMappable(cmap=colours), ax=axis, pad=0.01, aspect=30)
    bar.set_label("share of layers and heads that still hold\na value of the name, while needed")
    figure.suptitle(
        f"Milestones from first value to last use · {name(trace)} · "
        f"{missed} of {len(trace.milestones.lookups)} look-ups had lost something",
        fontsize=12,
    )
    return _finish(figure, file)


def _spot(marker: str, color: str, edge: str, size: float) -> dict[str, Any]:
    look = {"marker": marker, "color": color, "markeredgecolor": edge, "markersize": size}
    return {**look, "linestyle": ""}


_FOUND = _spot("o", "white", INK, 4.5)
_PARTLY = _spot("D", ORANGE, INK, 4.5)
_MISSED = _spot("X", VERMILLION, INK, 6)
_MISSED_BLACK = _spot("X", INK, "white", 7)


def name(trace: Trace) -> str:
    """The policy in a few words."""
    budget, kind = getattr(trace.policy, "budget", None), type(trace.policy).__name__
    kept = f", {budget} tokens in pages of {trace.policy.page_size}"
    return kind if budget is None else kind + kept


def error_text(trace: Trace) -> str:
    """What the first wrong token is."""
    assert trace.problem is not None and trace.first_error is not None
    right = trace.problem.derivation_words
    wanted = right[trace.first_error] if trace.first_error < len(right) else "the end"
    if trace.first_error >= len(trace.generated):
        return f"stopped too early; “{wanted}” was due"
    return f"first wrong token: “{trace.generated[trace.first_error]}” instead of “{wanted}”"


def forgotten(trace: Trace, head: Head) -> np.ndarray:
    """Bool `[G, T]`: generated tokens that the head could no longer read as each was drawn."""
    G, P = len(trace.recording.tokens), trace.recording.page_size
    T = trace.prompt_tokens + G - 1
    gone = np.zeros((G, T), bool)
    if G > 1:
        page = np.arange(G - 1) // P
        held = trace.recording.present[:, head[0], head[1]][page][:, page]
        written = np.tri(G - 1, dtype=bool)
        gone[1:, trace.prompt_tokens :] = written & ~held
    return gone


def stamp_ages(trace: Trace, head: Head) -> np.ndarray:
    """Float `[steps, pages]`: tokens since a page was last in use; NaN where it is not kept."""
    recording = trace.recording
    steps = len(recording.tokens) - 1
    page = np.arange(steps) // recording.page_size
    kept = recording.present[page, head[0], head[1]]
    ages = np.where(kept, 0.0, np.nan)
    if recording.stamps is not None:
        stamps = recording.stamps[:steps, head[0], head[1]]
        # Step t is observed when t + 1 tokens are drawn; that is the policy's clock.
        now = 1.0 + np.arange(steps)[:, None]
        ages = np.where(kept & (stamps >= 0), np.maximum(now - stamps, 0), ages)
    return ages


def live_pages(trace: Trace) -> np.ndarray:
    """Bool `[steps, pages]`: pages with a milestone that is looked up at this step or later."""
    steps = len(trace.recording.tokens) - 1
    live = np.zeros((steps, trace.pages), bool)
    if trace.milestones is not None:
        first = trace.prompt_tokens
        for position, until in enumerate(trace.milestones.needed_until):
            if until >= 0:
                index = position - first
                # Row t draws token t + 1; what it needs must be readable then.
                live[index : until - first, index // trace.recording.page_size] = True
    return live


def page_colours(trace: Trace, head: Head) -> np.ndarray:
    """RGB `[steps, pages, 3]` of the page picture."""
    ages = stamp_ages(trace, head)
    kept, live = ~np.isnan(ages), live_pages(trace)
    if trace.milestones is None:
        live = kept
    oldest = max(2.0, float(np.nanmax(ages, initial=0)))
    tone = np.log1p(np.nan_to_num(ages)) / np.log1p(oldest)
    colours = np.ones((*ages.shape, 3))
    colours[kept & live] = _ramp(IN_USE, tone[kept & live])
    colours[kept & ~live] = _ramp(IDLE, tone[kept & ~live])
    colours[~kept & live] = _rgb(VERMILLION)
    steps = np.arange(len(ages))
    colours[steps, steps // trace.recording.page_size] = _rgb(ORANGE)
    return colours


def held_over_time(trace: Trace) -> tuple[list[str], np.ndarray]:
    """Names that are looked up, and float `[names, G]`: the share of layers and heads that can read
    one of the name's values, from its first value to its last look-up; NaN outside.
    """
    assert trace.milestones is not None
    last = {lookup.name: lookup for lookup in trace.milestones.lookups}
    names = sorted(last, key=lambda name: last[name].sources[0])
    held = np.full((len(names), len(trace.recording.tokens)), np.nan)
    for row, name in enumerate(names):
        for position in range(last[name].sources[0] + 1, last[name].position + 1):
            there = [source for source in last[name].sources if source < position]
            token = position - trace.prompt_tokens
            held[row, token] = trace.share_held(token, there)
    return names, held


def line_labels(trace: Trace) -> list[tuple[int, str]]:
    """(index of its first token, text up to the first comma) for every line of the answer."""
    words, found, start = trace.generated, [], 0
    for index, word in enumerate(words):
        if word == ";" or index == len(words) - 1:
            line = words[start : index + 1]
            short = line[: line.index(",")] if "," in line else line
            found.append((start, " ".join(w for w in short if w and not w.startswith("<"))))
            start = index + 1
    return found


def _lookup_marks(axis: Any, trace: Trace, head: Head) -> None:
    assert trace.milestones is not None
    first, P = trace.prompt_tokens, trace.recording.page_size
    for lookup in trace.milestones.lookups:
        token = lookup.position - first
        sources = [source - first for source in lookup.sources]
        found = [s for s in sources if trace.recording.held(token, s)[head]]
        page = (found or sources)[-1] // P
        axis.plot(page, token, **(_FOUND if found else _MISSED))


def _waterfall_ticks(axis: Any, trace: Trace, *, with_text: bool) -> None:
    T = len(trace.words) - 1
    if T <= MOST_TOKENS:
        font = {"fontsize": 6, "family": "monospace"}
        axis.set_xticks(range(T), trace.words[:T], rotation=90, **font)
        if with_text:
            axis.set_yticks(range(len(trace.generated)), trace.generated, **font)
        return
    _line_ticks(axis, trace)
    if not with_text:
        axis.set_yticklabels([])
    if trace.milestones is None:
        return
    labels = line_labels(trace)
    places = [0, *(trace.prompt_tokens + start for start, _ in labels)]
    texts = ["prompt", *(text.split(" ")[0] for _, text in labels)]
    axis.set_xticks(places, texts, rotation=90, fontsize=_fitting(len(labels), 300), ha="left")
    axis.tick_params(axis="x", length=2, pad=1)


def _line_ticks(axis: Any, trace: Trace) -> None:
    """Marks the first token of every line of a derivation with the line's text."""
    if trace.milestones is None:
        return
    labels = line_labels(trace)
    places, texts = [start for start, _ in labels], [text for _, text in labels]
    size = _fitting(len(labels), 420)
    axis.set_yticks(places, texts, fontsize=size, family="monospace", va="top")
    axis.tick_params(axis="y", length=2, pad=1)


def _fitting(count: int, points: float) -> float:
    """Font size at which `count` lines fit `points`."""
    return float(np.clip(0.85 * points / max(count, 1), 3.5, 8))


def _pooled(matrix: np.ndarray, factor: int) -> np.ndarray:
    """Maximum over blocks of `factor` by `factor`."""
    if factor == 1:
        return matrix
    padded = np.pad(matrix, [(0, -size % factor) for size in matrix.shape])
    rows, columns = (size // factor for size in padded.shape)
    return np.asarray(padded.reshape(rows, factor, columns, factor).max((1, 3)))


def _enlarged(matrix: np.ndarray, size: int) -> np.ndarray:
    """Maximum over `size` by `size` around each entry: single tokens stay visible in print."""
    if size < 2:
        return matrix
    padded = np.pad(matrix, ((size - 1) // 2, size // 2))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size))
    return np.asarray(windows.max((2, 3)))


def _rgb(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def _ramp(colours: Sequence[str], tone: np.ndarray) -> np.ndarray:
    """Between `colours`, at `tone` in [0, 1]: `[n, 3]`."""
    stops = np.asarray([_rgb(colour) for colour in colours])
    at = np.linspace(0, 1, len(stops))
    return np.stack([np.interp(tone, at, stops[:, i]) for i in range(3)], axis=-1)


def _show(axis: Any, image: np.ndarray, extent: tuple[float, float, float, float]) -> None:
    axis.imshow(image, aspect="auto", interpolation="nearest", extent=extent)


def _called(trace: Trace, head: Head) -> str:
    return f"{trace.layer} {head[0]}, key/value head {head[1]}"


def _finish(figure: Any, file: str | Path | None) -> Any:
    if file is not None:
        figure.savefig(file, dpi=DPI)
        pyplot().close(figure)
    return figure
