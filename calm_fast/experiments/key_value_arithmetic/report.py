"""The experiment's table on the terminal and its self-contained HTML report."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from rich.console import Console
from rich.table import Table

from calm_fast.core.html_page import html_table, page, svg
from calm_fast.experiments.key_value_arithmetic.speed import Measurement

# CALM (arXiv 2401.02412), Table 1, shown beside the measured numbers
PAPER = {
    "substitution": {"A": 98.1, "B": 0.0, "AB": 92.9},
    "numeric": {"A": 4.2, "B": 73.7, "AB": 72.0},
    "kv_arithmetic": {"A": 0.7, "B": 0.0, "AB": 84.3},
}
TITLES = {
    "substitution": "substitution",
    "numeric": "numeric arithmetic",
    "kv_arithmetic": "key-value arithmetic",
}
MODELS = {"A": "A", "B": "B", "AB": "A+B"}


@dataclass(frozen=True)
class Story:
    """The content of the report: that of results.json, and what only the report shows."""

    results: dict[str, Any]
    losses: dict[str, list[float]]
    setup: list[tuple[str, str]]  # (item, where or how it ran)
    examples: list[dict[str, str]]
    speed: list[Measurement]
    recipe: list[tuple[str, str]]


def print_table(accuracy: dict[str, dict[str, float]], console: Console) -> None:
    """Print the 3 x 3 table with the paper's numbers beside the measured ones."""
    table = Table(title="Exact answers on unseen keys, % (paper)")
    table.add_column("task")
    for model in MODELS.values():
        table.add_column(model, justify="right")
    for task, title in TITLES.items():
        cells = [f"{accuracy[task][m]:.1f} [dim]({PAPER[task][m]:.1f})[/dim]" for m in MODELS]
        table.add_row(title, *cells)
    console.print(table)


def _accuracy_table(accuracy: dict[str, dict[str, float]]) -> str:
    head = ["task"] + [f"{name}{by}" for name in MODELS.values() for by in ("", " (paper)")]
    rows = []
    for task, title in TITLES.items():
        row = [title]
        for model in MODELS:
            row += [f"<b>{accuracy[task][model]:.1f}</b>", f"{PAPER[task][model]:.1f}"]
        rows.append(row)
    return html_table(head, rows)


def loss_plot(losses: dict[str, list[float]]) -> str:
    """Return an <svg> element with one panel per trained model: the loss of every step and its running mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, len(losses), sharey=True, squeeze=False)[0]
    for panel, (name, values) in zip(panels, losses.items(), strict=True):
        smooth, mean = [], values[0]
        for value in values:
            mean += 0.05 * (value - mean)
            smooth.append(mean)
        stride = max(1, len(values) // 500)
        steps = range(1, len(values) + 1, stride)
        panel.semilogy(steps, values[::stride], color="#b6c8e0", linewidth=0.7)
        panel.semilogy(steps, smooth[::stride], color="#1f4e8c", linewidth=1.5)
        panel.set_title(name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("loss of answer tokens")
    return svg(figure)


def _speed_table(speed: list[Measurement]) -> str:
    rows = [
        [
            escape(m.case.name),
            f"{m.case.batch} x {m.case.tokens}",
            f"{m.case.augmenter_dim} / {m.case.anchor_dim}",
            f"{m.eager_ms:.1f}",
            f"{m.ours_ms:.1f}",
            f"<b>{m.ratio:.2f}x</b>",
            f"{m.ours_error:.1e} / {m.eager_error:.1e}",
        ]
        for m in speed
    ]
    head = [
        "",
        "batch x tokens",
        "width A / B",
        "eager ms",
        "CrossAttention ms",
        "speed-up",
        "error ours / eager",
    ]
    return html_table(head, rows)


def html(story: Story) -> str:
    """Return the report as one HTML page without external references."""
    results = story.results
    examples = [[escape(e[c]) for c in ("task", "prompt", "written", "expected")] for e in story.examples]
    pairs = [[escape(what), escape(how)] for what, how in story.setup]
    seconds = [[escape(what), f"{value:.1f}"] for what, value in results["seconds"].items()]
    versions = [[escape(what), escape(str(value))] for what, value in results["versions"].items()]
    speed = ""
    if story.speed:
        choices = "; ".join(sorted({escape(m.choice) for m in story.speed}))
        speed = f"""<h2>Speed of the composition layer on this machine</h2>
<p>One <code>CrossAttention</code> layer against a plain eager transcription of its equation: float32,
{story.speed[0].threads} thread(s), both sides timed in turns in this process (medians), each checked against
float64 first. Chosen: <code>{choices}</code>.</p>
{_speed_table(story.speed)}"""
    body = f"""<h1>Key-value arithmetic by composition</h1>
<p>A knows 2-operand expressions of keys and the number behind every key. B knows arithmetic on numbers and has never
seen a key. Both are frozen. Cross-attention from A to B is trained on some of the keys only, and lets the composition
compute with keys it has never computed with (CALM, arXiv 2401.02412, section 4.1). Seed {results["seed"]}.</p>
<h2>Exact answers in percent, on keys never seen in composition</h2>
{_accuracy_table(results["accuracy"])}
<p>The paper's models and keys (strings of several tokens) are larger and harder than these; its numbers show the
pattern to expect, not a mark to beat.</p>
<h2>What the composition writes</h2>
{html_table(["task", "prompt", "written by generate()", "expected"], examples)}
<h2>Loss</h2>
{loss_plot(story.losses)}
<h2>Setup</h2>
{html_table(["", ""], pairs)}
{speed}
<h2>Recipe</h2>
{html_table(["", ""], [[escape(what), escape(how)] for what, how in story.recipe])}
<h2>Seconds</h2>
{html_table(["", "s"], seconds)}
<h2>Versions</h2>
{html_table(["", ""], versions)}"""
    return page(f"Key-value arithmetic, seed {results['seed']}", body)
