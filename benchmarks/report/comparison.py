"""Report `bench --compare`: a table in the terminal, report.md and report.html."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from calm_fast.benchmarks.report import canvas, page
from calm_fast.benchmarks.report.canvas import INK, OTHER, OURS, RED
from calm_fast.benchmarks.report.facts import Row, number, times
from calm_fast.benchmarks.report.text import table

if TYPE_CHECKING:
    from calm_fast.benchmarks.compare import Pair

HEADINGS = ("case", "implementation", "now, ms", "other, ms", "now is faster by", "p20 - p80", "verdict")
HOW = (
    "Each revision runs in its own process, with the same cases and baselines. Short runs of both take turns. The "
    "ratio is the other revision's time over this checkout's, as a median over pairs of runs: below 1 this checkout is "
    "slower. A difference counts from 5 % on, if four of five pairs agree. The control is a baseline, the same code on "
    "both sides: its distance from 1 shows how much is chance."
)


def lines(pairs: Sequence[Pair]) -> list[tuple[str, ...]]:
    """Return one line of cells per implementation, in the order of HEADINGS."""
    made: list[tuple[str, ...]] = []
    for p in pairs:
        name = p.impl + (" (control)" if p.control else "")
        if p.ratio is None or p.now is None or p.other is None:
            made.append((p.case, name, "", "", "", "", f"no ratio: {p.failure}"))
            continue
        spread = f"{p.ratio.p20:.2f} - {p.ratio.p80:.2f}"
        verdict = p.verdict if not p.control or p.verdict == "same" else "the machine was unsteady"
        made.append((p.case, name, number(p.now.ms), number(p.other.ms), times(p.ratio.ms), spread, verdict or ""))
    return made


def setting(rows: Sequence[Row], revision: str, library: str) -> list[tuple[str, str]]:
    """Return (name, value) of the hardware, the versions, both commits and the compiled library."""
    if not rows:
        return [("revision", revision), ("compiled library", library)]
    first = rows[0]
    commits = list(dict.fromkeys(row["commit"] for row in rows))
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return [
        ("now", commits[0] or "unknown"), ("other", f"{revision}: {commits[-1]}"), ("compiled library", library),
        ("device", first["device"]), ("versions", versions), ("measured", f"{first['date']} to {rows[-1]['date']}"),
    ]  # fmt: skip


def summary(pairs: Sequence[Pair]) -> str:
    """Return the counts of the verdicts, controls excluded."""
    found = [p.verdict for p in pairs if not p.control]
    counts = [f"{found.count(v)} {v}" for v in ("SLOWER", "faster", "same")]
    return ", ".join([*counts, f"{found.count(None)} without a ratio"])


def show(pairs: Sequence[Pair]) -> None:
    """Print the table, then the counts."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    drawn = Table(title="calm_fast bench: this checkout against another revision")
    for i, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="right" if 2 <= i < 6 else "left", overflow="fold")
    for line in lines(pairs):
        drawn.add_row(*line, style="red" if line[-1] == "SLOWER" else None)
    console.print(drawn)
    console.print(summary(pairs), highlight=False, markup=False)


def ratio_plot(pairs: Sequence[Pair]) -> str | None:
    """Draw each ratio with its p20 - p80, around 1; return None without any ratio."""
    shown = [(p, p.ratio) for p in pairs if p.ratio is not None]
    if not shown:
        return None
    with canvas.style():
        drawn, axes = canvas.lines(len(shown), "other / now: above 1 this checkout is faster; whiskers p20 - p80")
        axes.set_xscale("log")
        low = min(0.8, *(ratio.p20 / 1.05 for _, ratio in shown))
        high = max(1.25, *(ratio.p80 * 1.05 for _, ratio in shown))
        axes.set_xlim(low, high)
        canvas.log_ticks(axes.xaxis, low, high)
        axes.axvline(1, color=INK, linewidth=0.8)
        for y, (p, ratio) in enumerate(shown):
            color = OTHER if p.control else RED if p.verdict == "SLOWER" else OURS
            axes.plot([ratio.p20, ratio.p80], [y + canvas.AT] * 2, color=color, linewidth=1)
            axes.plot([ratio.ms], [y + canvas.AT], "o", color=color, markersize=4.4)
            canvas.caption(axes, y, f"{p.case} {p.impl}", times(ratio.ms), color if color == RED else INK)
        return canvas.svg(drawn, "comparison", "Ratio of the other revision's time to this checkout's")


def write(out: Path, pairs: Sequence[Pair], rows: Sequence[Row], revision: str, library: str) -> None:
    """Write report.md and report.html into `out`."""
    facts = setting(rows, revision, library)
    title = f"calm_fast bench: this checkout against {revision}"
    text = [f"# {title}", "", f"{summary(pairs)}.", "", *table(HEADINGS, lines(pairs)), ""]
    text += [*(f"- {name}: {value}" for name, value in facts), "", HOW, ""]
    (out / "report.md").write_text("\n".join(text), encoding="utf-8")
    head = "".join(f"<th{' class=num' if 2 <= i < 6 else ''}>{h}</th>" for i, h in enumerate(HEADINGS))
    body = ""
    for line in lines(pairs):
        kind = {"SLOWER": "wrong", "faster": "met"}.get(line[-1], "")
        cells = (f"<td{' class=num' if 2 <= i < 6 else ''}>{html.escape(c)}</td>" for i, c in enumerate(line[:-1]))
        body += f'<tr>{"".join(cells)}<td class="why {kind}">{html.escape(line[-1])}</td></tr>'
    plot = ratio_plot(pairs)
    parts = [
        f"<h1>{html.escape(title)}</h1><p>{html.escape(summary(pairs))}</p>",
        f'<div class="box"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>',
        f'<h2>Ratios</h2><div class="grid"><figure>{plot}</figure></div>' if plot else "",
        f"<h2>Setting</h2>{page.settings(facts)}<h2>How to read it</h2><p>{html.escape(HOW)}</p>",
    ]
    (out / "report.html").write_text(page.document(title, "".join(parts)), encoding="utf-8")
