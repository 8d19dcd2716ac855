"""Hooks of mkdocs.yml: make the links of docs/ that leave the folder work on the site too.

A page links to what is beside docs/: a test, an example, CONTRIBUTING.md. On the code host these links work as they
are. For the site each target becomes a page under project/: a Markdown file as it is, a notebook by its cells, any
other file as one block of code, a folder as the list of its files. Such pages are in neither navigation nor search.
"""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "project"
LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".sh": "sh", ".json": "json"}
# code is matched first, so that a link in it stays as it is
LINK = re.compile(r"^```.*?^```|`[^`\n]*`|\]\((?!\w+:)([^)\s#]+)(#[^)\s]*)?\)", re.DOTALL | re.MULTILINE)


def page_of(path: str) -> str:
    """Return the source name on the site of `path`, a file or folder named from the top of the repository."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"{OUTSIDE}/{path}" if path.endswith(".md") else f"{OUTSIDE}/{path}.md"


def repository_path(source: str) -> str:
    """Return the path, from the top of the repository, of the page that has the name `source` on the site."""
    if not source.startswith(f"{OUTSIDE}/"):
        return f"docs/{source}"
    path = source.removeprefix(f"{OUTSIDE}/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def target(path: str, link: str) -> str:
    """Return what `link`, on the page at `path`, points to; both from the top of the repository."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def rewrite(text: str, path: str) -> str:
    """Return `text`, the Markdown of the file at `path`, with its links as the site needs them."""
    here = posixpath.dirname(page_of(path))

    def relink(found: re.Match[str]) -> str:
        if found[1] is None:
            return found[0]
        return f"]({posixpath.relpath(page_of(target(path, found[1])), here or '.')}{found[2] or ''})"

    return LINK.sub(relink, text)


def notebook_text(path: str, text: str) -> str:
    """Return the Markdown of a notebook: its cells, code in blocks."""
    cells = [(cell["cell_type"], "".join(cell["source"])) for cell in json.loads(text)["cells"]]
    shown = [f"```python\n{source}\n```" if kind == "code" else source for kind, source in cells]
    return "\n\n".join([*shown, f"This is the notebook `{path}`."]) + "\n"


def outside_text(path: str) -> str:
    """Return the Markdown that shows `path`, a file or folder outside docs/."""
    full = ROOT / path
    if full.is_dir():
        names = sorted(p.name for p in full.iterdir() if not p.name.startswith((".", "__")))
        return f"# {path}\n\n" + "".join(f"- `{name}`\n" for name in names)
    text = full.read_text(encoding="utf-8")
    if full.suffix == ".ipynb":
        return notebook_text(path, text)
    if full.suffix == ".md":
        return text.replace("<details>", '<details markdown="1">')
    return f"# {path}\n\n````{LANGUAGES.get(full.suffix, 'text')}\n{text}````\n"


def outside_pages() -> dict[str, str]:
    """Return path -> Markdown of all that docs/ links to outside itself, directly or through such a page."""
    waiting = [
        (page.relative_to(ROOT).as_posix(), page.read_text(encoding="utf-8")) for page in ROOT.glob("docs/**/*.md")
    ]
    pages: dict[str, str] = {}
    while waiting:
        path, text = waiting.pop()
        for found in LINK.finditer(text):
            linked = target(path, found[1]) if found[1] else "docs/"
            if not linked.startswith("docs/") and linked not in pages and (ROOT / linked).exists():
                pages[linked] = outside_text(linked)
                if linked.endswith(".md"):
                    waiting.append((linked, pages[linked]))
    return pages


def on_config(config: MkDocsConfig) -> None:
    """Make the anchors of headings those of the code host."""
    from pymdownx.slugs import slugify

    config.mdx_configs.setdefault("toc", {})["slugify"] = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages of what is outside docs/."""
    from mkdocs.structure.files import File, InclusionLevel

    for path, text in outside_pages().items():
        hidden = f"---\nsearch:\n  exclude: true\n---\n\n{text}"
        files.append(File.generated(config, page_of(path), content=hidden, inclusion=InclusionLevel.NOT_IN_NAV))


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links of a page."""
    return rewrite(markdown, repository_path(page.file.src_uri))


def main() -> None:
    """Print the requirements of the extra `docs`, for pip."""
    import importlib.metadata

    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("calm-fast") or []:
        one = Requirement(text)
        if one.marker is not None and one.marker.evaluate({"extra": "docs"}) and not one.marker.evaluate({"extra": ""}):
            print(f"{one.name}{'[' + ','.join(sorted(one.extras)) + ']' if one.extras else ''}{one.specifier}")


if __name__ == "__main__":
    main()
