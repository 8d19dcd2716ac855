"""docs/integrations.md is what the tests and the files beside them say; a malformed row is refused by its place."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from tools import integrations  # noqa: E402

GOOD = 'tool="TRL", what="SFT | packing", verdict="works"'
MARK = "@pytest.mark" + ".integration"


def tree(tmp_path: Path, source: str, untested: str = "[]") -> Path:
    folder = tmp_path / integrations.FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "test_some.py").write_text(source)
    (folder / "untested.json").write_text(untested)
    return tmp_path


def test_the_page_is_current() -> None:
    told = "run `make integrations-page`"
    assert (ROOT / integrations.PAGE).read_text(encoding="utf-8") == integrations.current(), told


def test_every_test_has_its_versions() -> None:
    recorded = integrations.versions()
    rows = integrations.tested()
    assert set(recorded) == {f"{row.file}::{row.test}" for row in rows}, (
        "run `make integration ARGS=--record-integrations`"
    )
    for row in rows:
        assert recorded[f"{row.file}::{row.test}"].keys() & set(integrations.TOOLS[row.tool]), row


def test_every_tool_has_a_row(tmp_path: Path) -> None:
    reason = json.dumps([{"tool": "vLLM", "what": "a composition", "reason": "needs a GPU"}])
    root = tree(
        tmp_path, f'{MARK}({GOOD})\n{MARK}(tool="PEFT", what="x", verdict="refused")\ndef test_one(): ...\n', reason
    )
    integrations.record(
        {f"{integrations.FOLDER}/test_some.py::test_one": ["TRL", "PEFT"]}, {"trl": "1.2", "x": "3"}, root
    )
    text = integrations.current(root)
    link = "[test_one](../tests/integration/test_some.py)"
    assert f"| TRL | SFT \\| packing | works | trl 1.2 | {link} |" in text
    assert f"| PEFT | x | refused |  | {link} |" in text
    assert "| vLLM | a composition | untested |  | needs a GPU |" in text
    assert "| DeepSpeed | anything | untested |  | no test yet |" in text
    assert all(f"| {tool} |" in text for tool in integrations.TOOLS)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (GOOD.replace('"works"', '"fine"'), "`verdict` must be one of works, refused, got 'fine'"),
        (GOOD.replace('"TRL"', '"LRT"'), "`tool` must be one of .* got 'LRT'"),
        (GOOD.replace(', verdict="works"', ""), "must be called with the keywords tool, what, verdict"),
        (GOOD.replace('"works"', "RESULT"), "`verdict` must be a plain string on one line, got RESULT"),
        ('"a", ' + GOOD, "must be called with the keywords"),
    ],
)
def test_a_malformed_mark_is_refused_by_its_place(tmp_path: Path, arguments: str, problem: str) -> None:
    root = tree(tmp_path, f"{MARK}({arguments})\ndef test_one(): ...\n")
    with pytest.raises(integrations.BadRow, match=rf"tests/integration/test_some\.py:1: test_one: .*{problem}"):
        integrations.current(root)


def test_rows_are_unique_and_no_file_is_without(tmp_path: Path) -> None:
    root = tree(tmp_path, f"{MARK}({GOOD})\ndef test_one(): ...\n\n\n{MARK}({GOOD})\ndef test_two(): ...\n")
    with pytest.raises(integrations.BadRow, match=r"test_one.*test_two.*`what` must differ"):
        integrations.tested(root)
    with pytest.raises(integrations.BadRow, match="test_some.py: no test carries the mark"):
        integrations.tested(tree(tmp_path, "def test_one(): ...\n"))
    with pytest.raises(integrations.BadRow, match="entry 1: must have the strings tool, what, reason"):
        integrations.untested(tree(tmp_path, "", '[{"tool": "TRL"}]'))


SAMPLE = """
import pytest

@pytest.mark.integration(tool="PEFT", what="here", verdict="works")
def test_here(): ...

@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.integration(tool="PEFT", what="half", verdict="works")
def test_half(n):
    assert n == 1

@pytest.mark.integration(tool="TRL", what="gone", verdict="works")
def test_gone():
    pytest.importorskip("no_such_library")
"""


@pytest.mark.parametrize("required", [False, True])
def test_a_missing_library_fails_only_where_it_is_asked_for(tmp_path: Path, required: bool) -> None:
    """Two files in a tree of their own: one misses its library at the top, the other within a test."""
    root = tree(tmp_path, SAMPLE)
    folder = root / integrations.FOLDER
    (folder / "test_top.py").write_text(
        f'import pytest\npytest.importorskip("no_such_library")\n{MARK}(tool="TRL", what="top", verdict="works")\n'
        "def test_top(): ...\n"
    )
    option = 'def pytest_addoption(parser):\n    parser.addoption("--record-integrations", action="store_true")\n'
    (root / "tests" / "conftest.py").write_text(option)
    for name in ("tests/integration/conftest.py", "tools/__init__.py", "tools/integrations.py", "pyproject.toml"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    environment = os.environ | {"CALM_FAST_INTEGRATIONS": str(int(required)), "PYTHONPATH": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--record-integrations"]
    command += ["--continue-on-collection-errors", integrations.FOLDER]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    counts = "2 failed, 2 passed, 1 error" if required else "1 failed, 2 passed, 2 skipped"
    assert counts in done.stdout, done.stdout + done.stderr
    assert ("asks for every library" in done.stdout) == required
    if not required:  # only a test all of whose cases passed is recorded
        (name,) = integrations.versions(root)
        assert name == "tests/integration/test_some.py::test_here" and "peft" in integrations.versions(root)[name]
