"""One style for all plots, and SVG output that can share a page with other plots."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OURS, OTHER, YARDSTICK = "#17627f", "#a9b1b9", "#dfe3e7"
INK, MUTED, GRID, RED, AMBER = "#1d2329", "#5d6770", "#e4e7ea", "#b3261e", "#8a5a00"
WIDTH = 3.7  # inches: one column on a wide screen, the whole width of a phone
ROW = 0.28  # inches of height for one line of a chart
AT = 0.2  # distance of a line's mark below its text

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "font.size": 8.4,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def style() -> Iterator[None]:
    """Set matplotlib up for our plots and restore its settings afterwards. No display is needed."""
    import matplotlib

    with matplotlib.rc_context(_STYLE):  # type: ignore[arg-type]  # the stub lists every key of rcParams literally
        yield


def figure(height: float, left: float = 0.5, bottom: float = 0.42, right: float = 0.06) -> tuple[Any, Any]:
    """Return a figure one column wide and its axes, margins in inches. Call within `style()`."""
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(WIDTH, height))
    top = 0.06
    box = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, 1 - (bottom + top) / height)
    return drawn, drawn.add_axes(box)


def lines(count: int, xlabel: str) -> tuple[Any, Any]:
    """Return a figure and axes for `count` lines, with text above each mark: long names need no margin."""
    drawn, axes = figure(0.48 + ROW * count, left=0.14, right=0.12)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_ylim(count - 0.5, -0.5)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(xlabel)
    return drawn, axes


def caption(axes: Any, y: int, left: str, right: str, color: str = INK) -> None:
    """Write the two texts above the mark of line y."""
    for x, text, side in ((0.0, left, "left"), (1.0, right, "right")):
        axes.text(
            x, y - 0.02, text, transform=axes.get_yaxis_transform(), va="bottom", ha=side, color=color, clip_on=False,
            bbox={"pad": 0.4, "facecolor": "white", "edgecolor": "none", "alpha": 0.85},
        )  # fmt: skip


def log_ticks(axis: Any, low: float, high: float, most: int = 5) -> None:
    """Label a logarithmic axis from low to high with plain numbers (0.5, 1, 2, 5, 10 ...), not powers of ten."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    inside = [m * 10.0**e for e in range(-6, 16) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    if len(inside) > 2 * most:
        inside = [m for m in inside if f"{m:e}"[0] == "1"]
    while len(inside) > most:
        inside = inside[::2]
    if high < 3 * low:  # a narrow range: evenly spaced marks are round too
        inside = [m for m in MaxNLocator(most - 1).tick_values(low, high) if low <= m <= high]
    axis.set_major_locator(FixedLocator(inside))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))


def plain(value: float) -> str:
    """Format a number as 0.02, 5, 200, 2k, 50M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def svg(drawn: Any, name: str, alt: str) -> str:
    """Return the figure as <svg> for a page: sized by its container, described for screen readers, with its own ids.

    Args:
        name: unique in the page; ids begin with it. alt: one sentence that describes the plot.
    """
    sink = io.StringIO()
    drawn.savefig(sink, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)  # use the page's
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\1{name}-", text)
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', text)
    assert box is not None  # savefig always writes one
    width, height = box.groups()
    head = f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" viewBox="0 0 {width} {height}" '
    text = re.sub(r"<svg [^>]*>", head + 'xmlns="http://www.w3.org/2000/svg" '
                  'xmlns:xlink="http://www.w3.org/1999/xlink">', text, count=1)  # fmt: skip
    return re.sub(r"\n\s*", "\n", text)
