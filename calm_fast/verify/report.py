"""The tables of `calm-fast verify`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from calm_fast.core.numerics import Row


def console() -> Console:
    """Return a console on standard output, wide enough that no column is cut if that is not a terminal."""
    return Console(width=None if sys.stdout.isatty() else 140)


def _verdict(ok: bool) -> str:
    return "[green]ok[/green]" if ok else "[red]FAIL[/red]"


def print_rows(rows: Sequence[Row]) -> None:
    """Print every row (op, case, impl, dtype, quantity, error, bound, verdict), then the notes of failed rows."""
    if not rows:
        return
    table = Table(title="max |x - truth| against its bound", title_justify="left")
    for name in ("op", "case", "impl", "device", "dtype", "quantity"):
        table.add_column(name, no_wrap=True)
    for name in ("error", "bound", "error/bound"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict")
    before = None
    for row in rows:
        head = (row.op, row.case, row.impl, row.device, row.dtype)
        shown = head if head != before else ("",) * len(head)
        before = head
        numbers = (f"{row.error:.2e}", f"{row.bound:.2e}", f"{row.ratio:.2f}")
        table.add_row(*map(escape, shown), row.quantity, *numbers, _verdict(row.ok))
    out = console()
    out.print(table)
    for row in rows:
        if row.note:
            out.print(f"[red]{escape(f'{row.op} {row.case} {row.impl} {row.dtype} {row.quantity}: {row.note}')}[/red]")


def print_summary(records: Sequence[dict[str, Any]], seconds: float) -> None:
    """Print one line per op and implementation with the row closest to its bound, then why something did not run."""
    table = Table(title="summary", title_justify="left")
    for name in ("op", "impl", "device", "cases", "rows", "failed", "worst error/bound", "where", "verdict"):
        table.add_column(name, justify="right" if name in ("cases", "rows", "failed") else "left")
    for r in records:
        worst: Row | None = r["worst"]
        where = f"{worst.case} {worst.dtype} {worst.quantity}" if worst else ""
        closest = f"{worst.ratio:.2f} ({worst.error:.1e} / {worst.bound:.1e})" if worst else ""
        verdict = "not run" if r["verdict"] == "not run" else _verdict(r["verdict"] == "ok")
        counts = (str(r[name]) for name in ("cases", "rows", "failed"))
        table.add_row(r["op"], r["impl"], r["device"], *counts, closest, escape(where), verdict)
    out = console()
    out.print(table)
    for r in records:
        if r["why"]:
            out.print(f"not run: {r['op']} x {r['impl']}: {escape(r['why'])}")
    out.print(f"{seconds:.1f} s")
