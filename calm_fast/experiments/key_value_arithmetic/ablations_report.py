"""The ablations' table on the terminal, in Markdown and in HTML."""

from __future__ import annotations

from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from calm_fast.core.html_page import html_table, page, svg

COLUMNS = {
    "kv_arithmetic": "key-value arithmetic",
    "kv_arithmetic_training_keys": "the same, training keys",
    "substitution": "substitution",
    "numeric": "numeric",
}
HEAD = ("", "parameters", *COLUMNS.values(), "minus standard")


def _cell(value: dict[str, Any] | None) -> str:
    """Return mean and interval of one cell, "-" where there is none."""
    if value is None:
        return "-"
    if value["low"] is None:
        return f"{value['mean']:.1f}"
    return f"{value['mean']:.1f} [{value['low']:.1f}, {value['high']:.1f}]"


def rows(results: dict[str, Any]) -> list[list[str]]:
    """Return the cells of the table: A and B alone, then every variant."""
    table = []
    for name, accuracy in results["alone"].items():
        table.append([f"{name} alone", "0", *(_cell(accuracy[task]) for task in COLUMNS), "-"])
    for row in results["variants"].values():
        cells = [_cell(row["accuracy"][task]) for task in COLUMNS]
        table.append([row["variant"]["title"], f"{row['parameters']:,}", *cells, _cell(row.get("difference"))])
    return table


def caption(results: dict[str, Any]) -> str:
    """Return what the numbers are, in a few sentences."""
    recipe = results["recipe"]
    steps, count = recipe["composition"]["steps"], len(results["seeds"])
    trained = round(recipe["keys"] * recipe["train_fraction"])
    seeds = ", ".join(map(str, results["seeds"]))
    sizes = {len(row["loss"]["seeds"]) for row in results["variants"].values()}
    partial = "" if sizes == {count} else " Some variants have fewer seeds so far; results.json lists them."
    return (
        f"Exact answers in percent on keys never seen in composition ({recipe['eval_rows']} rows of each task): mean "
        f"and 95 % t-interval over the seeds {seeds}. The bounds of an interval may lie outside 0 to 100. Every "
        f"variant trained for {steps} steps on {trained} of {recipe['keys']} keys; one seed shares A, B and the "
        f"batches. Parameters are those that train. Minus standard: difference in key-value arithmetic, paired by seed."
        f"{partial}"
    )


def markdown(results: dict[str, Any]) -> str:
    """Return caption and table as Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in (list(HEAD), *rows(results))]
    return "\n".join([caption(results), "", lines[0], "|---|" + "---:|" * (len(HEAD) - 1), *lines[1:], ""])


def _plot(results: dict[str, Any]) -> str:
    """Return an <svg> element: key-value arithmetic of every seed and variant, on unseen and on training keys."""
    from matplotlib.figure import Figure

    variants = list(results["variants"].values())
    figure = Figure(figsize=(9, 0.9 + 0.4 * len(variants)), layout="constrained")
    panel = figure.subplots()
    styles = (
        ("kv_arithmetic", "unseen keys", "#1f4e8c", "o"),
        ("kv_arithmetic_training_keys", "training keys", "#c2410c", "x"),
    )
    for task, label, color, marker in styles:
        points = [(v, i) for i, row in enumerate(variants) for v in row["accuracy"][task]["seeds"].values()]
        panel.scatter(*zip(*points, strict=True), color=color, marker=marker, label=label)
    panel.set_yticks(range(len(variants)), [row["variant"]["title"] for row in variants])
    panel.invert_yaxis()
    panel.set_xlim(-2, 102)
    panel.set_xlabel("exact answers in key-value arithmetic, %; one mark per seed")
    panel.grid(axis="x", alpha=0.25)
    panel.legend()
    return svg(figure)


def html(results: dict[str, Any]) -> str:
    """Return the report as one HTML page without external references."""
    cells = [[escape(cell) for cell in row] for row in rows(results)]
    connected = [
        [
            escape(row["variant"]["title"]),
            escape(", ".join(map(str, map(tuple, row["variant"]["connections"]))) or "PEFT"),
            f"{row['loss']['mean']:.4f}",
            f"{sum(row['cpu_seconds'].values()) / len(row['cpu_seconds']):.0f}",
        ]
        for row in results["variants"].values()
    ]
    body = f"""<h1>Key-value arithmetic: what the composition needs</h1>
<p>{escape(caption(results))}</p>
{html_table(HEAD, cells)}
{_plot(results)}
<h2>Training</h2>
<p>Connections are (augmenter's layer, anchor's layer); -1 is the embedding output. Loss: mean over the last 100 steps
and the seeds. CPU-seconds include the evaluation. {escape(results["machine"])}.</p>
{html_table(["", "connections", "loss", "CPU-seconds"], connected)}"""
    return page("Key-value arithmetic: ablations", body)


def print_table(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    table = Table(title="Exact answers, %: mean [95 % interval over seeds]")
    for i, head in enumerate(HEAD):
        table.add_column(head, justify="right" if i else "left")
    for row in rows(results):
        table.add_row(*(cell.replace("[", r"\[") for cell in row))
    console.print(table)
