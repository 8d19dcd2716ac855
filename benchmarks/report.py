"""What a run found, for people: a table in the terminal, report.md, and report.html that needs no other file."""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_fast.benchmarks.registry import Target
from calm_fast.benchmarks.timing import Ceilings

Row = Mapping[str, Any]
Targets = Mapping[str, tuple[str, Sequence[Target]]]  # case -> (headline implementation, its targets)

HEADINGS = ("case", "implementation", "ms", "p20 - p80", "peak MiB", "vs headline", "measured / floor", "error / bound")


def by_case(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows grouped by case, in order."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["case"], []).append(row)
    return groups


def ratio(rows: Sequence[Row], impl: str, baseline: str, quantity: str = "ms") -> float | None:
    """What baseline needs over what impl needs within one case: how many times better impl is; None if unknown."""
    values = {row["impl"]: row[quantity] for row in rows if row["ms"] is not None}
    if baseline == "best":
        values["best"] = min((row[quantity] for row in rows if row["ms"] is not None and not row["ours"]), default=None)
    if not values.get(impl) or not values.get(baseline):
        return None
    return values[baseline] / values[impl]


def table(rows: Sequence[Row], targets: Targets) -> list[tuple[str, ...]]:
    """One line of text cells for each row, under HEADINGS."""
    lines = []
    for name, group in by_case(rows).items():
        headline = targets.get(name, ("", ()))[0]
        for row in group:
            if row["ms"] is None:
                lines.append((name, row["impl"], "no time", row["failure"] or "", "", "", "", ""))
                continue
            against = ratio(group, headline, row["impl"])
            lines.append(
                (
                    name,
                    row["impl"],
                    f"{row['ms']:.3f}",
                    f"{row['p20']:.3f} - {row['p80']:.3f}",
                    f"{row['peak_bytes'] / 2**20:.1f}",
                    "" if against is None else f"{against:.2f}x",
                    f"{row['ms'] / row['floor_ms']:.2f}",
                    f"{row['error']:.1e} / {row['bound']:.1e}",
                )
            )
    return lines


def target_lines(rows: Sequence[Row], targets: Targets) -> list[str]:
    """One sentence for each target: what was wanted, what was measured."""
    lines = []
    for name, group in by_case(rows).items():
        for t in targets.get(name, ("", ()))[1]:
            found = ratio(group, t.impl, t.baseline, t.quantity)
            verdict = "not measured" if found is None else f"{found:.2f}x, {'met' if found >= t.least else 'MISSED'}"
            what = "" if t.quantity == "ms" else f" ({t.quantity})"
            lines.append(f"{name}: {t.impl} against {t.baseline}{what}: target >= {t.least:g}x, {verdict}")
    return lines


def setting_lines(rows: Sequence[Row], ceilings: Mapping[str, Ceilings]) -> list[str]:
    """Hardware, versions, commit, ceilings."""
    if not rows:
        return ["nothing was measured"]
    first = rows[0]
    lines = [
        f"device: {first['device']}",
        "versions: " + ", ".join(f"{name} {version}" for name, version in first["versions"].items()),
        f"commit: {first['commit'] or 'unknown (not a git checkout)'}, {first['date']}",
    ]
    for name, c in ceilings.items():
        product, copy = f"{c.flops_per_s / 1e9:.0f} GFLOP/s", f"{c.bytes_per_s / 1e9:.1f} GB/s"
        lines.append(f"ceilings beside {name}: product {product}, copy {copy}")
    return lines


def show(rows: Sequence[Row], ceilings: Mapping[str, Ceilings], targets: Targets) -> None:
    """Print the table, then the targets last."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    if not console.is_terminal:  # a log has no width of its own
        console = Console(width=150)
    drawn = Table(title="calm_fast bench: medians of interleaved calls")
    for i, heading in enumerate(HEADINGS):
        drawn.add_column(heading, justify="left" if i < 2 else "right", overflow="fold")
    last = None
    for line in table(rows, targets):
        if last is not None and line[0] != last:
            drawn.add_section()
        drawn.add_row(*(("", *line[1:]) if line[0] == last else line))
        last = line[0]
    console.print(drawn)
    for line in [*setting_lines(rows, ceilings), *target_lines(rows, targets)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown(rows: Sequence[Row], ceilings: Mapping[str, Ceilings], targets: Targets) -> str:
    """report.md."""
    out = ["# calm_fast bench", "", *(f"- {line}" for line in setting_lines(rows, ceilings)), ""]
    out += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    out += ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in table(rows, targets)]
    out += ["", *(f"- {line}" for line in target_lines(rows, targets)), "", _HOW, ""]
    return "\n".join(out)


_HOW = (
    "Times are medians of calls that took turns in one process; with one CPU thread, less the time the thread waited "
    'for a core that other programs held. "vs headline": the row\'s time over that of our headline implementation of '
    "the case, so above 1 the headline is faster. Floor: the larger of FLOPs / measured product rate and least bytes / "
    "measured copy rate, both measured in turns with the contestants. Peak: memory one call held beyond its inputs. "
    "An implementation whose values are wrong has no time."
)


def svg(group: Sequence[Row]) -> str:
    """One case as an inline SVG: a bar for each implementation, its peak memory beside it, the floor as a line."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    timed = [row for row in group if row["ms"] is not None]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.6 + 0.36 * len(timed)), sharey=True, layout="tight")
    names = [row["impl"] for row in timed]
    colors = ["#1f6f8b" if row["ours"] else "#b8b8b8" for row in timed]
    middle = [row["ms"] for row in timed]
    spread = [[row["ms"] - row["p20"] for row in timed], [row["p80"] - row["ms"] for row in timed]]
    left.barh(names, middle, xerr=spread, color=colors, error_kw={"elinewidth": 1})
    left.axvline(timed[0]["floor_ms"], color="#a33", linestyle="--", linewidth=1)
    left.set_xlabel("ms (bars: p20 - p80; dashed: floor)")
    right.barh(names, [row["peak_bytes"] / 2**20 for row in timed], color=colors)
    right.set_xlabel("peak MiB")
    left.invert_yaxis()
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = sink.getvalue()
    return text[text.index("<svg") :]


def page(rows: Sequence[Row], ceilings: Mapping[str, Ceilings], targets: Targets) -> str:
    """report.html: text, table and plots in one file, nothing loaded from elsewhere."""

    def items(lines: Iterable[str]) -> str:
        return "<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in lines) + "</ul>"

    head = "".join(f"<th>{html.escape(h)}</th>" for h in HEADINGS)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in table(rows, targets)
    )
    plots = "".join(
        f"<h2>{html.escape(name)}</h2><p>{html.escape(_shape(group[0]))}</p>{svg(group)}"
        for name, group in by_case(rows).items()
        if any(row["ms"] is not None for row in group)
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>calm_fast bench</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;font-size:13px}td,th{border-bottom:1px solid #ddd;padding:.25rem .6rem;"
        "text-align:left}svg{max-width:100%;height:auto}</style></head><body><h1>calm_fast bench</h1>"
        f"{items(setting_lines(rows, ceilings))}{items(target_lines(rows, targets))}"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(_HOW)}</p>{plots}"
        "</body></html>"
    )


def _shape(row: Row) -> str:
    return ", ".join(f"{name}={size}" for name, size in row["shape"].items()) + f", {row['dtype']}"


def write(out: Path, rows: Sequence[Row], ceilings: Mapping[str, Ceilings], targets: Targets) -> None:
    """Write report.md and report.html into `out`."""
    (out / "report.md").write_text(markdown(rows, ceilings, targets))
    (out / "report.html").write_text(page(rows, ceilings, targets))
