"""docs/seams.md is what the tests' marks say, and a malformed mark is refused by its place."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from tools import seams  # noqa: E402

GOOD = 'attach="a | b", to="composition", result="works", why="it does"'


def read(tmp_path: Path, source: str) -> list[seams.Row]:
    (tmp_path / "tests").mkdir(exist_ok=True)
    (tmp_path / "tests" / "test_some.py").write_text(source)
    return seams.rows(tmp_path)


def test_the_page_is_current() -> None:
    assert (ROOT / seams.PAGE).read_text(encoding="utf-8") == seams.page(seams.rows()), "run `make seams`"


def test_marks_of_functions_of_cases_and_of_lists_are_read(tmp_path: Path) -> None:
    mark = "pytest.mark" + ".seam"
    case = f'pytest.param(1, marks={mark}(attach="{{}}", to="ops", result="refused", why="call it first"))'
    source = f"CASES = [{case.format('x')}]\n\n\n@{mark}({GOOD})\n"
    source += f'@pytest.mark.parametrize("n", [2, {case.format("y")}])\ndef test_one(n): ...\n'
    found = read(tmp_path, source)
    assert {(row.attach, row.to, row.result, row.test) for row in found} == {
        ("a | b", "composition", "works", "test_one"),
        ("x", "ops", "refused", ""),
        ("y", "ops", "refused", "test_one"),
    }
    text = seams.page(found)
    assert "| a \\| b | works | it does | [test_one](../tests/test_some.py) |" in text
    assert text.index("## A composition") < text.index("## The ops")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (GOOD.replace('result="works"', 'result="fine"'), "`result` must be one of works, refused, got 'fine'"),
        (GOOD.replace('to="composition"', 'to="model"'), "`to` must be one of .* got 'model'"),
        (GOOD.replace(', why="it does"', ""), "must be called with the keywords attach, to, result, why"),
        (GOOD.replace('"it does"', "REASON"), "`why` must be a plain string on one line, got REASON"),
        (GOOD.replace('"it does"', '" "'), "`why` must be a plain string on one line"),
        ('"a", ' + GOOD, "must be called with the keywords"),
    ],
)
def test_a_malformed_mark_is_refused_by_its_place(tmp_path: Path, arguments: str, problem: str) -> None:
    source = "@pytest.mark" + f".seam({arguments})\ndef test_one(): ...\n"
    with pytest.raises(seams.BadMark, match=rf"tests/test_some\.py:1: test_one: .*{problem}"):
        read(tmp_path, source)


def test_one_combination_has_one_row(tmp_path: Path) -> None:
    mark = "@pytest.mark" + f".seam({GOOD})\n"
    with pytest.raises(seams.BadMark, match=r"test_one.*test_two.*`attach` must differ .* got 'a \| b' in both"):
        read(tmp_path, f"{mark}def test_one(): ...\n{mark}def test_two(): ...\n")
