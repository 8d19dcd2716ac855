"""The parts of a self-contained HTML report: page, tables, plots."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .35rem .8rem; text-align: right }
th:first-child, td:first-child { text-align: left } thead th { border-bottom: 2px solid #1b1f24 }
tbody tr { border-bottom: 1px solid #d0d7de } td.paper { color: #6e7781 } code { font-size: 90% }
svg { max-width: 100%; height: auto }
"""


def page(title: str, body: str) -> str:
    """Return one HTML page without external references. body: HTML; title: plain text."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<style>{_STYLE}</style></head><body>
{body}
</body></html>
"""


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an HTML table; the cells are HTML already."""
    header = "".join(f"<th>{cell}</th>" for cell in head)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{header}</tr></thead><tbody>\n{lines}\n</tbody></table>"


def svg(figure: Any) -> str:
    """Return a matplotlib figure as an <svg> element; the same curves give the same text."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = "calm-fast"
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
