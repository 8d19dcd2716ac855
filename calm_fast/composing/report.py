"""The report of a composition's training as one HTML page."""

from __future__ import annotations

from html import escape
from typing import Any

from calm_fast.composing.evaluate import same_tokens
from calm_fast.composing.memory import gib, names_of
from calm_fast.composing.settings import Settings
from calm_fast.core.html_page import html_table, page, svg


def html(results: dict[str, Any], settings: Settings, shown: list[dict[str, str]]) -> str:
    """Return the report. results: the content of results.json. shown: prompts and what the models write after them."""
    models = [[escape(m["name"]), f"<code>{escape(m['path'])}</code>", escape(m["family"]), f"{m['parameters']:,}"]
              for m in results["models"]]  # fmt: skip
    pairs = ", ".join(f"{a} &rarr; {b}" for _, a, b in results["connections"])
    notes = "".join(f"<p><b>Warning:</b> {escape(text)}.</p>" for text in results["warnings"])
    peak = results["memory"]["peak"]
    facts = {
        "connections (augmenter's layer, anchor's layer; -1 = embedding output)": pairs,
        "parameters that train": f"{results['parameters']['trained']:,}",
        "rows": f"{results['rows']['train']:,} train, {results['rows']['held_out']:,} held out",
        "steps": f"{settings.steps:,} of {settings.batch_size} x {settings.accumulate} examples",
        "learning rate": f"{settings.learning_rate:g}, {settings.warmup_steps} steps of warm-up, cosine to zero",
        "memory expected, at most": gib(results["memory"]["expected"]),
        "peak memory of the process": "not known" if peak is None else gib(peak),
        "seconds of this call": f"{results['seconds']:.1f}",
        "went on from step": str(results["resumed_from"]),
        "seed": str(results["seed"]),
        **{name: escape(str(version)) for name, version in results["versions"].items()},
    }
    samples = ""
    if shown:
        rows = [[escape(row[name]) for name in ("prompt", "expected", "B", "A+B")] for row in shown]
        samples = (
            f"<h2>What is written after held-out prompts</h2>{html_table(['prompt', 'expected', 'B', 'A+B'], rows)}"
        )
    body = f"""<h1>A composition and its training</h1>
<p>The anchor B and every augmenter A are frozen. The connections between them were trained on the training rows; the
losses below are of rows that they have not seen.</p>
{notes}
{_held_out(results["held_out"])}
<h2>Loss</h2>
{loss_plot(results)}
{_residuals(results)}
{samples}
<h2>Models</h2>
{html_table(["", "path", "family", "parameters"], models)}
<h2>Setup</h2>
{html_table(["", ""], [[name, text] for name, text in facts.items()])}"""
    return page("A composition and its training", body)


def _held_out(held: dict[str, Any]) -> str:
    if not held:
        return "<p>No rows were held out, so nothing here says how well the composition generalises.</p>"
    rows = [
        [f"<b>{escape(name)}</b> (an encoder, which has no loss of its own)", "-", "-", "-", "-"] if row is None else
        [f"<b>{escape(name)}</b>", *(_with_interval(row, key) for key in ("loss_per_token", "bits_per_byte")),
         _number(row["perplexity"]), f"{row['tokens']:,}"]
        for name, row in held["models"].items()
    ]  # fmt: skip
    differences = [[escape(name), _with_interval(row, "difference", "interval"), row["unit"]]
                   for name, row in held["differences"].items()]  # fmt: skip
    note = ""
    if not same_tokens(held):
        note = "<p>The tokenizers differ, so losses per token of A and B cannot be compared: compare bits per byte.</p>"
    head = ["", "nats per token", "bits per byte", "perplexity", "tokens"]
    return f"""<h2>Held-out loss</h2>
{html_table(head, rows)}
{html_table(["difference", "", "unit"], differences)}
<p>In brackets: 95 % bootstrap intervals over the {held["models"]["B"]["rows"]:,} held-out rows.</p>
{note}"""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3g}"


def _with_interval(row: dict[str, Any], name: str, interval: str = "") -> str:
    between = row[interval or f"{name}_interval"]
    return _number(row[name]) + ("" if between is None else f" [{between[0]:.4f}, {between[1]:.4f}]")


def _residuals(results: dict[str, Any]) -> str:
    """Return the section about the size of each connection's residual; nothing for a run that did not record it."""
    points = results.get("residuals", [])
    if not points:
        return ""
    ends = (points[0], points[-1])
    labels = _connection_labels(results["connections"])
    rows = [[escape(label), *(f"{p['ratios'][c]:.4f}" for p in ends)] for c, label in enumerate(labels)]
    head = ["connection", *(f"step {p['step']:,}" for p in ends)]
    return f"""<h2>What the connections add</h2>
<p>The norm of each connection's residual, relative to the norm of the anchor's state that it is added to: the root of
the ratio of their summed squares, over the training tokens since the point before. A connection that stays near zero is
not used.</p>
{residual_plot(results)}
{html_table(head, rows)}"""


def _connection_labels(connections: list[list[int]]) -> list[str]:
    names = names_of(1 + max(augmenter for augmenter, _, _ in connections))
    return [f"{names[augmenter]}: {a} \u2192 {b}" for augmenter, a, b in connections]


def residual_plot(results: dict[str, Any]) -> str:
    """Return an <svg> element with the relative norm of every connection's residual by step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panel = figure.subplots()
    steps = [point["step"] for point in results["residuals"]]
    for c, label in enumerate(_connection_labels(results["connections"])):
        panel.plot(steps, [point["ratios"][c] for point in results["residuals"]], label=label, linewidth=1.3)
    panel.set_xlabel("step")
    panel.set_ylabel("norm of residual / norm of state")
    panel.grid(alpha=0.25)
    panel.legend()
    return svg(figure)


def loss_plot(results: dict[str, Any]) -> str:
    """Return an <svg> element with the training loss, the held-out loss of the composition and that of the anchor."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    panel = figure.subplots()
    for key, label, style in (("loss", "training, A+B", "-"), ("held_out_loss", "held out, A+B", "o-")):
        points = [(point["step"], point["loss"]) for point in results[key]]
        if points:
            panel.plot(*zip(*points, strict=True), style, label=label, linewidth=1.3, markersize=4)
    anchor = results["held_out"].get("models", {}).get("B", {}).get("loss_per_token")
    if anchor is not None:
        panel.axhline(anchor, color="#6e7781", linestyle="--", linewidth=1, label="held out, B alone, all rows")
    panel.set_xlabel("step")
    panel.set_ylabel("nats per token")
    panel.grid(alpha=0.25)
    panel.legend()
    return svg(figure)
