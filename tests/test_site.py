"""mkdocs.yml: every page of docs/ is in the navigation once, and links that leave docs/ have pages to go to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tools import site

ROOT = Path(__file__).resolve().parents[1]


def pages_in(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for entry in (nav.values() if isinstance(nav, dict) else nav) for page in pages_in(entry)]


def test_every_page_is_in_the_navigation_once() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    there = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
    listed = Counter(pages_in(config["nav"]))
    assert there == set(listed), "docs/ and `nav` of mkdocs.yml differ"
    assert max(listed.values()) == 1
    assert config["strict"], "a warning must stay an error"


@pytest.mark.parametrize(
    ("path", "text", "wanted"),
    [
        ("docs/ops/vote.md", "[x](../nat.md#use-it)", "[x](../nat.md#use-it)"),
        ("docs/README.md", "[x](../README.md)", "[x](project/README.md)"),
        ("docs/ops/vote.md", "[x](../../tests/test_site.py)", "[x](../project/tests/test_site.py.md)"),
        ("README.md", "[x](docs/nat.md#files)", "[x](../nat.md#files)"),
        ("csrc/README.md", "[x](../docs/native.md)", "[x](../../native.md)"),
        ("docs/nat.md", "[x](https://arxiv.org/abs/1) `[y](../z)`", "[x](https://arxiv.org/abs/1) `[y](../z)`"),
        ("docs/nat.md", "```text\n[x](../y)\n```\n[x](#here)", "```text\n[x](../y)\n```\n[x](#here)"),
    ],
)
def test_links_are_those_of_the_site(path: str, text: str, wanted: str) -> None:
    assert site.rewrite(text, path) == wanted


def test_what_pages_link_to_outside_becomes_a_page() -> None:
    pages = site.outside_pages()
    assert {"README.md", "CONTRIBUTING.md", "csrc/README.md", "examples/notebooks/voting.ipynb"} <= set(pages)
    assert pages["examples/notebooks/voting.ipynb"].startswith("# Voting\n\nA tiny model")
    assert all(site.repository_path(site.page_of(path)) == path for path in pages)
