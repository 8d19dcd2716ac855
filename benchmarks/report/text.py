"""Write the report as text: the table in the terminal, and report.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from calm_fast.benchmarks.report.facts import (
    MET,
    Row,
    Verdict,
    curves,
    number,
    ratio,
    setting_lines,
    single,
    summary,
    times,
)
from calm_fast.benchmarks.timing import Ceilings

HEADINGS = ("case", "implementation", "ms", "p20 - p80", "peak MiB", "vs headline", "measured / floor", "error / bound")
VERDICT_HEADINGS = ("case", "times faster than each baseline", "measured / floor", "target")

HOW = (
    "Times are medians of calls that took turns in one process. With one CPU thread, the time that the thread waited "
    "for a core held by other programs is subtracted. p20 and p80: a fifth of the calls took less, a fifth took more.",
    "A ratio is the baseline's time over that of our headline implementation: above 1 ours is faster. The best "
    "baseline is the fastest that does the same work. A baseline that does less work than the case (a bare product, "
    "one LoRA) is listed as a yardstick.",
    "Floor: the larger of FLOPs / measured product rate and least bytes / measured copy rate. The product is "
    "torch.mm, the copy Tensor.copy_; both take turns with the contestants. A case may come out below 1 if its own "
    "product is faster than torch.mm, or torch.mm had slower moments. The roofline's ceilings are medians over the "
    "cases of a dtype.",
    "Peak: the memory that one call held beyond its inputs. On a CPU the process keeps released memory for the next "
    'call, as on a GPU, unless the device says "memory from the system".',
    "Error: against the same computation in float64. Bound: twice the plain computation's error in the case's dtype, "
    "plus one rounding. An implementation with wrong values has no time and makes the run red.",
    "Growth of a scaling curve: the power of the size that time grows with over the upper half of the sizes. Up to "
    "0.15 more than expected counts as met, because few points say no more.",
)


def against(v: Verdict) -> str:
    """Return "1.34x unfolded_sdpa, 1.55x eager", the best baseline first, or the reason for having no ratio."""
    if v.ours is None:
        return "not measured"
    if v.ratio is None:
        return "no baseline ran"
    return ", ".join(f"{times(value)} {name}" for name, value in v.ratios)


def goal_texts(v: Verdict) -> list[str]:
    """Return ">= 1.5x eager: 1.52x, met" for each target."""
    return [f"{g.wanted}: {g.measured}" + (f", {g.state}" if g.found is not None else "") for g in v.goals]


def red_texts(v: Verdict) -> list[str]:
    return [f"{row['impl']}: {row['failure']}" for row in v.red]


def rows_table(found: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Return one line of text cells per row, in the order of HEADINGS."""
    lines: list[tuple[str, ...]] = []
    for v in found:
        for row in v.rows:
            name = row["impl"] + (" (yardstick)" if row["impl"] in v.yardsticks else "")
            if row["ms"] is None:
                lines.append((v.name, name, "no time", row["failure"] or "", "", "", "", ""))
                continue
            held = ratio(v.rows, v.headline, row["impl"])
            lines.append((
                v.name, name, number(row["ms"]), f"{number(row['p20'])} - {number(row['p80'])}",
                number(row["peak_bytes"] / 2**20), times(held), times(row["ms"] / row["floor_ms"]),
                f"{row['error']:.1e} / {row['bound']:.1e}",
            ))  # fmt: skip
    return lines


def growth_lines(found: Sequence[Verdict]) -> list[str]:
    """Return one sentence per scaling curve."""
    lines = []
    for curve in curves(found):
        power = curve.growth(curve.headline)
        if power is not None:
            steep = "no faster than" if curve.state == MET else "FASTER than"
            lines.append(
                f"{curve.series.title}: time grows with {curve.series.size}^{power:.2f}, {steep} the "
                f"{curve.series.size}^{curve.series.power:g} expected"
            )
    return lines


def show(rows: Sequence[Row], found: Sequence[Verdict], ceilings: Mapping[str, Ceilings]) -> None:
    """Print all rows, the setting, then the verdicts."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a log has no width
        console = Console(width=150)
    drawn = Table(title="calm_fast bench: medians of interleaved calls")
    for i, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
    last = None
    for line in rows_table(found):
        if last is not None and line[0] != last:
            drawn.add_section()
        drawn.add_row(*(("", *line[1:]) if line[0] == last else line))
        last = line[0]
    console.print(drawn)

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    for name, value in setting_lines(rows, ceilings):
        say(f"{name}: {value}")
    for v in single(found):
        if v.rows:
            say("; ".join(part for part in (f"{v.name}: {against(v)}", floor_text(v), *goal_texts(v)) if part))
    for text in growth_lines(found):
        say(text)
    say(", ".join(f"{count} {what}" for what, count in summary(found).items()))


def floor_text(v: Verdict) -> str:
    return "" if v.above_floor is None else f"{times(v.above_floor)} the floor"


def _cells(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def table(headings: Sequence[str], lines: Iterable[Iterable[str]]) -> list[str]:
    """Return a table in markdown, line by line."""
    return [_cells(headings), "|" + "---|" * len(headings), *map(_cells, lines)]


def markdown(rows: Sequence[Row], found: Sequence[Verdict], ceilings: Mapping[str, Ceilings]) -> str:
    """Return report.md."""
    counts = ", ".join(f"{count} {what}" for what, count in summary(found).items())
    lines = []
    for v in single(found):
        goals = "; ".join([f"**WRONG** {text}" for text in red_texts(v)] + goal_texts(v))
        lines.append((f"{v.name} ({v.shape})", against(v), times(v.above_floor), goals))
    out = ["# calm_fast bench", "", f"{counts}.", "", *table(VERDICT_HEADINGS, lines), ""]
    out += [f"- {line}" for line in growth_lines(found)] + [""] * bool(growth_lines(found))
    out += ["## Every row", "", *table(HEADINGS, rows_table(found)), ""]
    out += ["## Setting", "", *(f"- {name}: {value}" for name, value in setting_lines(rows, ceilings)), ""]
    return "\n".join([*out, "## How to read it", "", "\n\n".join(HOW), ""])
