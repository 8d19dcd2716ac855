"""Write docs/seams.md from the tests' marks: `python -m tools.seams`, or `make seams`; `--check` only compares.

A test that shows what a user may attach to what carries

    @pytest.mark.seam(attach="a forward hook", to="composition", result="works", why="it sees the composed state")

on the function, or on one case: ``pytest.param(..., marks=pytest.mark.seam(...))``. Each argument is a plain string.
The marks are read from the source, so that the page is written without importing a test.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/seams.md"
KEYS = ("attach", "to", "result", "why")
RESULTS = ("works", "refused")
# heading of each `to`, in the order of the page
HEADINGS = {
    "composition": "A composition",
    "CrossAttention": "CrossAttention, one connection",
    "DualLoRALinear": "DualLoRALinear, one layer",
    "dual LoRA model": "A model with dual LoRA",
    "NAT": "NAT training",
    "SelfConsistency": "SelfConsistency",
    "ops": "The ops",
}
INTRODUCTION = """\
# Seams

A seam is a place where something of yours meets something of ours: a Trainer setting, an adapter, a cache, a hook, a
wrapper. Each row below is one such combination, and a test proves it.

- **works**: the result is right. A row says how, where that is not obvious.
- **refused**: an error names the argument and says what to do; the row says it too.

A combination that is not listed has not been tried. `make seams` writes this page from the tests
([CONTRIBUTING.md](../CONTRIBUTING.md#seams)).
"""


class BadMark(ValueError):
    """A seam mark that the page cannot show."""


@dataclass(frozen=True)
class Row:
    """One mark, and the test that carries it."""

    attach: str
    to: str
    result: str
    why: str
    file: str
    test: str


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "seam" and getattr(node.value, "attr", "") == "mark"


def _marks(node: ast.AST, test: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield (name of the test function or "", node) of every seam mark under `node`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Call) and _is_mark(child.func):
            yield test, child
        elif _is_mark(child):
            yield test, child
        else:
            inside = isinstance(child, ast.FunctionDef) and child.name.startswith("test_")
            yield from _marks(child, child.name if inside else test)  # type: ignore[attr-defined]  # a FunctionDef


def _row(node: ast.AST, file: str, test: str) -> Row:
    place = f"{file}:{getattr(node, 'lineno', '?')}: {test or 'seam mark'}"
    if not isinstance(node, ast.Call) or node.args or {k.arg for k in node.keywords} != set(KEYS):
        raise BadMark(f"{place}: `seam` must be called with the keywords {', '.join(KEYS)}, each once")
    values = {}
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            raise BadMark(
                f"{place}: `{keyword.arg}` must be a plain string on one line, got {ast.unparse(keyword.value)}"
            )
        values[str(keyword.arg)] = value.strip()
    for name, known in (("to", tuple(HEADINGS)), ("result", RESULTS)):
        if values[name] not in known:
            raise BadMark(f"{place}: `{name}` must be one of {', '.join(known)}, got {values[name]!r}")
    return Row(**values, file=file, test=test)


def rows(root: Path = ROOT) -> list[Row]:
    """Return the row of every seam mark under root/tests. Raises BadMark, which names the place."""
    found: dict[tuple[str, str], Row] = {}
    for path in sorted((root / "tests").rglob("test_*.py")):
        source = path.read_text(encoding="utf-8")
        if "mark.seam" not in source:
            continue
        file = path.relative_to(root).as_posix()
        for test, node in _marks(ast.parse(source)):
            row = _row(node, file, test)
            other = found.setdefault((row.to, row.attach.lower()), row)
            if other is not row:
                places = f"{other.file} ({other.test}) and {file} ({test})"
                raise BadMark(f"{places}: `attach` must differ between marks of one `to`, got {row.attach!r} in both")
    return list(found.values())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _sorting(row: Row) -> str:
    return re.sub("^(a|an|the|one) ", "", row.attach.lower().replace("`", ""))


def page(found: list[Row]) -> str:
    """Return the text of docs/seams.md."""
    parts = [INTRODUCTION]
    for to, heading in HEADINGS.items():
        own = sorted((row for row in found if row.to == to), key=_sorting)
        if not own:
            continue
        lines = [f"## {heading}", "", "| attach | result | why, or what to do instead | test |", "|---|---|---|---|"]
        for row in own:
            test = f"[{row.test or Path(row.file).stem}](../{row.file})"
            lines.append(f"| {_cell(row.attach)} | {row.result} | {_cell(row.why)} | {test} |")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/seams.md from the seam marks of the tests.")
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 if the page is not current")
    check = parser.parse_args(arguments).check
    try:
        text = page(rows())
    except BadMark as problem:
        print(problem, file=sys.stderr)
        return 1
    path = ROOT / PAGE
    current = path.read_text(encoding="utf-8") if path.is_file() else ""
    if text == current:
        return 0
    if check:
        print(f"{PAGE} is not what the tests' marks say: run `make seams`", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(f"[seams] wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
