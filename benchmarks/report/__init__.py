"""Report the measurements: a table in the terminal, report.md, and a self-contained report.html.

`facts` derives verdicts from rows, `text` and `page` write them, `figures` draws them.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from calm_fast.benchmarks.registry import Case
from calm_fast.benchmarks.report.facts import Row, verdicts
from calm_fast.benchmarks.timing import Ceilings


def write(
    out: Path, rows: Iterable[Row], ceilings: Mapping[str, Ceilings], cases: Iterable[Case], *, plots: bool = True
) -> None:
    """Write report.md and, with `plots`, report.html into `out`.

    Args:
        out: a folder that exists. rows: of one run, cases in order. ceilings: by case name. cases: those of the run;
        a case without rows is reported as not measured.
    """
    from calm_fast.benchmarks.report import text

    rows = list(rows)
    found = verdicts(rows, cases)
    (out / "report.md").write_text(text.markdown(rows, found, ceilings), encoding="utf-8")
    if plots and importlib.util.find_spec("matplotlib") is None:  # a GPU machine may lack it; the rows matter
        print("bench: no report.html: matplotlib is not installed", file=sys.stderr)
    elif plots:
        from calm_fast.benchmarks.report import page

        (out / "report.html").write_text(page.page(rows, found, ceilings), encoding="utf-8")


def show(rows: Iterable[Row], ceilings: Mapping[str, Ceilings], cases: Iterable[Case]) -> None:
    """Print the table, then the verdicts."""
    from calm_fast.benchmarks.report import text

    rows = list(rows)
    text.show(rows, verdicts(rows, cases), ceilings)
