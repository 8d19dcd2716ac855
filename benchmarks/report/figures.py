"""The plots of the report. Each function returns one <svg>, or None if there is nothing to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_fast.benchmarks.report import canvas
from calm_fast.benchmarks.report.canvas import AMBER, INK, MUTED, OTHER, OURS, RED, YARDSTICK
from calm_fast.benchmarks.report.facts import Curve, Row, Verdict, ceilings_by_dtype, middle, number, times
from calm_fast.benchmarks.timing import Ceilings


def case_times(v: Verdict) -> str | None:
    """Draw one case: a bar per implementation with its p20 - p80, and the floor as a line."""
    rows = v.timed
    if not rows:
        return None
    with canvas.style():
        drawn, axes = canvas.lines(len(rows), "ms; whiskers p20 - p80; dashed: floor")
        for y, row in enumerate(rows):
            color = OURS if row["ours"] else YARDSTICK if row["impl"] in v.yardsticks else OTHER
            edge = OURS if row["ours"] else OTHER  # the edge keeps a pale bar visible on paper
            axes.barh(y + canvas.AT, row["ms"], height=0.3, color=color, edgecolor=edge, linewidth=0.6)
            axes.plot([row["p20"], row["p80"]], [y + canvas.AT] * 2, color=INK, linewidth=0.8)
            canvas.caption(axes, y, row["impl"], f"{number(row['ms'])} ms", OURS if row["ours"] else INK)
        axes.axvline(rows[0]["floor_ms"], color=INK, linestyle=(0, (3, 2)), linewidth=0.8)
        axes.set_xlim(0, 1.02 * max(row["p80"] for row in rows))
        return canvas.svg(drawn, f"case-{v.name}", f"{v.name}: milliseconds of each implementation")


def _dots(
    name: str, found: Sequence[Verdict], value: Callable[[Verdict, Row], float | None], xlabel: str, alt: str,
    show: Callable[[float], str], rivals: Callable[[Verdict], Sequence[Row]],
) -> str | None:  # fmt: skip
    """Draw for each case our headline's value as a dot and those of `rivals` as pale dots, on a log scale."""
    shown = [
        (v, mine, [other for row in rivals(v) if (other := value(v, row))])
        for v in found
        if v.ours and (mine := value(v, v.ours))
    ]
    if not shown:
        return None
    everything = [x for _, mine, others in shown for x in (mine, *others)]
    low, high = min(everything) / 1.15, max(everything) * 1.15
    with canvas.style():
        drawn, axes = canvas.lines(len(shown), xlabel)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        canvas.log_ticks(axes.xaxis, low, high)
        for y, (v, mine, others) in enumerate(shown):
            at = y + canvas.AT
            if others:
                axes.plot([min(mine, *others), max(mine, *others)], [at, at], color=OTHER, linewidth=0.8)
            axes.plot(others, [at] * len(others), "o", color=OTHER, markersize=3.6)
            axes.plot([mine], [at], "o", color=OURS, markersize=4.6)
            canvas.caption(axes, y, v.name, show(mine))
        return canvas.svg(drawn, name, alt)


def ratio_bars(found: Sequence[Verdict]) -> str | None:
    """Draw each case's speedup over the best baseline."""
    shown = [(v, v.ratio, v.rival) for v in found if v.ratio and v.rival]
    if not shown:
        return None
    values = [ratio for _, ratio, _ in shown]
    low, high = min(0.8, min(values) / 1.1), max(2.0, max(values) * 1.15)
    with canvas.style():
        drawn, axes = canvas.lines(len(shown), "times faster than the best baseline (1: as fast)")
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        canvas.log_ticks(axes.xaxis, low, high)
        for y, (v, ratio, rival) in enumerate(shown):
            axes.barh(y + canvas.AT, ratio - 1, left=1, height=0.3, color=OURS if ratio >= 1 else AMBER)
            canvas.caption(axes, y, v.name, f"{times(ratio)} {rival['impl']}")
        axes.axvline(1, color=INK, linewidth=0.8)
        return canvas.svg(drawn, "ratios", "How many times faster than the best baseline each case is")


def floor_dots(found: Sequence[Verdict]) -> str | None:
    """Draw measured / floor of ours and of the best baseline, for each case."""
    return _dots(
        "floors", found, lambda v, row: row["ms"] / row["floor_ms"] if row["floor_ms"] else None,
        "measured / floor; pale: best baseline", "Distance to the floor of each case",
        times, lambda v: [v.rival] if v.rival else [],
    )  # fmt: skip


def memory_dots(found: Sequence[Verdict]) -> str | None:
    """Draw the peak memory of one call of ours and of every baseline, for each case."""
    return _dots(
        "memory", found, lambda v, row: row["peak_bytes"] / 2**20 if row["peak_bytes"] else None,
        "peak MiB held by one call; pale: baselines", "Peak memory of each case",
        lambda mib: f"{number(mib)} MiB",
        lambda v: [row for row in v.timed if not row["ours"] and row["impl"] not in v.yardsticks],
    )  # fmt: skip


def rooflines(
    rows: Sequence[Row], found: Sequence[Verdict], ceilings: Mapping[str, Ceilings]
) -> list[tuple[str, str, list[str]]]:
    """Draw achieved FLOP/s over FLOP/byte under the measured ceilings, one plot per dtype.

    Returns:
        (dtype, plot, names of the numbered cases) of each plot.
    """
    plots = []
    for dtype, group in ceilings_by_dtype(rows, ceilings).items():
        members = [
            (v, v.ours) for v in found if v.ours and v.ours["dtype"] == dtype and v.ours["flops"] and v.ours["bytes"]
        ]
        if members:
            plots.append((dtype, _roofline(dtype, members, middle(group)), [v.name for v, _ in members]))
    return plots


def _roofline(dtype: str, members: Sequence[tuple[Verdict, Row]], c: Ceilings) -> str:
    def rate(row: Row) -> float:
        return float(row["flops"] / row["ms"] * 1e3)

    points = [(ours["flops"] / ours["bytes"], ours, v.rival) for v, ours in members]
    ridge = c.flops_per_s / c.bytes_per_s
    left = min(ridge / 4, *(x / 2 for x, _, _ in points))
    right = max(ridge * 4, *(x * 2 for x, _, _ in points))
    rates = [rate(row) for _, *both in points for row in both if row]
    low, high = min(*rates, left * c.bytes_per_s) / 2, max(c.flops_per_s * 4, 2 * max(rates))
    with canvas.style():
        drawn, axes = canvas.figure(3.4, left=0.56)
        axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(low, high))
        axes.plot([left, ridge, right], [left * c.bytes_per_s, c.flops_per_s, c.flops_per_s], color=INK, linewidth=1)
        said = f"level: product {c.flops_per_s / 1e9:.3g} GFLOP/s\nslope: copy {c.bytes_per_s / 1e9:.3g} GB/s"
        axes.text(0.015, 0.985, said, transform=axes.transAxes, va="top", linespacing=1.4)
        for x, ours, rival in points:
            if rival:
                axes.plot([x, x], [rate(rival), rate(ours)], color=OTHER, linewidth=0.8)
                axes.plot([x], [rate(rival)], "o", color=OTHER, markersize=3.6)
            axes.plot([x], [rate(ours)], "o", color=OURS, markersize=4.6)
        pale = [(x, rate(rival)) for x, _, rival in points if rival]
        _number(axes, [(x, rate(ours)) for x, ours, _ in points], pale)
        canvas.log_ticks(axes.xaxis, left, right, 6)
        canvas.log_ticks(axes.yaxis, low, high, 6)
        axes.set_xlabel("FLOP / byte; pale: best baseline")
        axes.set_ylabel("FLOP/s")
        return canvas.svg(drawn, f"roofline-{dtype}", f"Roofline of the {dtype} cases")


def _number(axes: Any, points: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> None:
    """Number the points 1, 2, ... without covering a mark or another number; a thin line leads to a distant one."""
    marks = [tuple(axes.transData.transform(point)) for point in (*points, *others)]
    taken = [(x, y, 5.0, 5.0) for x, y in marks]  # centre, half width, half height in pixels
    for index, (x, y) in enumerate(marks[: len(points)], 1):
        wide, high = 3.4 * len(str(index)) + 1, 5.5
        spots = [
            (x + dx * (r + wide), y + dy * (r + high), wide, high)
            for r in (5, 12, 20, 28, 36, 44)
            for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (0.8, 0.8), (-0.8, 0.8), (0.8, -0.8), (-0.8, -0.8))
        ]
        inside = (s for s in spots if axes.bbox.contains(s[0], s[1]))
        spot = next((s for s in inside if not any(_cover(s, t) for t in taken)), spots[0])
        taken.append(spot)
        at = axes.transData.inverted().transform(spot[:2])
        if spots.index(spot) >= 8:
            axes.plot([points[index - 1][0], at[0]], [points[index - 1][1], at[1]], color=MUTED, linewidth=0.4)
        axes.text(
            *at, str(index), fontsize=7.5, color=INK, va="center_baseline", ha="center", clip_on=False,
            bbox={"pad": 0.2, "facecolor": "white", "edgecolor": "none"},
        )  # fmt: skip


def _cover(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Return True if two boxes (centre x, y, half width, half height) overlap."""
    return abs(a[0] - b[0]) < a[2] + b[2] and abs(a[1] - b[1]) < a[3] + b[3]


def scaling(curve: Curve, quantity: str) -> str | None:
    """Draw one series: ms or peak MiB over the size, with the expected growth."""
    unit = 1.0 if quantity == "ms" else 2.0**20
    lines = {
        impl: [(x, row[quantity] / unit) for x, row in line if row[quantity]] for impl, line in curve.lines.items()
    }
    lines = {impl: line for impl, line in lines.items() if len(line) > 1}
    if curve.headline not in lines:
        return None
    xs = sorted({x for line in lines.values() for x, _ in line})
    ys = [y for line in lines.values() for _, y in line]
    low = min(ys) / 1.5
    high = 1.6 * max(ys) * (max(ys) / low) ** (0.08 * len(lines))  # the legend stands above the lines
    with canvas.style():
        drawn, axes = canvas.figure(2.5)
        axes.set(xscale="log", yscale="log", xlim=(xs[0] / 1.15, xs[-1] * 1.15), ylim=(low, high))
        styles = iter([("-", "o"), ("--", "s"), (":", "^"), ("-.", "D")] * 4)  # distinct without colour too
        for impl, line in sorted(lines.items(), key=lambda item: item[0] != curve.headline):
            mine = impl == curve.headline
            dashes, marker = next(styles)
            axes.plot(
                *zip(*line, strict=True), dashes, marker=marker, markersize=3.8, linewidth=1.6 if mine else 1.0,
                color=OURS if mine else MUTED, markerfacecolor=OURS if mine else "white", label=impl,
            )  # fmt: skip
        if quantity == "ms":
            (x0, y0), x1 = lines[curve.headline][0], xs[-1]
            power = curve.series.power
            axes.plot([x0, x1], [y0, y0 * (x1 / x0) ** power], color=RED, linewidth=1, linestyle=(0, (1, 2)),
                      label="linear" if power == 1 else f"{curve.series.size}^{power:g}")  # fmt: skip
        from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

        axes.xaxis.set_major_locator(FixedLocator(xs))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        canvas.log_ticks(axes.yaxis, low, high)
        axes.set_xlabel(curve.series.size)
        axes.set_ylabel("ms" if quantity == "ms" else "peak MiB")
        axes.legend(frameon=False, fontsize=8, loc="upper left", handlelength=3)
        name = f"scaling-{curve.series.title}-{quantity}".replace(" ", "-").replace(",", "")
        return canvas.svg(drawn, name, f"{curve.series.title}: {quantity} by {curve.series.size}")
