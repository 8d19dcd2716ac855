"""Write the skeleton of a new op, green at once: `python -m tools.new_op NAME`, or `make new-op NAME=...`.

The skeleton is tools/skeleton/, a whole op that multiplies by a number: definition, public function, torch and Triton
implementations, cases for verify, tests, a benchmark case, a page. Every file is copied with `op_name` replaced by
NAME, and NAME is entered in the files of `LISTS`. Replace the mathematics afterwards, the reference first.
CONTRIBUTING.md has the same list of files; a test compares.
"""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKELETON = Path(__file__).resolve().parent / "skeleton"
STEM = "op_name"
READ_FIRST = ("calm_fast", "kernels", "tests", "benchmarks", "docs")
# files that gain a line or an entry: path -> what
LISTS = {
    "calm_fast/ops.py": "the public function, and its stem in OPS",
    "calm_fast/reference.py": "the definition",
    "benchmarks/registry.py": "the benchmark case",
    "README.md": "a row of the table of ops",
    "docs/README.md": "a link to the page",
}


class CannotWriteError(ValueError):
    """A name that cannot be used, or a file that is there already."""


def skeleton_files(name: str = "<op>") -> list[str]:
    """Return the paths that a new op called `name` consists of, relative to the repository."""
    found = [path.relative_to(SKELETON) for path in SKELETON.rglob("*") if path.suffix in (".py", ".md")]
    found.sort(key=lambda path: (READ_FIRST.index(path.parts[0]), path))
    return [path.as_posix().replace(STEM, name) for path in found]


def check_name(root: Path, name: str) -> None:
    """Raise CannotWriteError unless `name` is a free stem in snake_case."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise CannotWriteError(f"new_op: `NAME` must be a snake_case word such as top_k_mask, got {name!r}")
    taken = [path for path in skeleton_files(name) if (root / path).exists()]
    if taken:
        raise CannotWriteError(f"new_op: `NAME` must be new, but {taken[0]} exists")
    if any(name == op or name.startswith(f"{op}_") or op.startswith(f"{name}_") for op in registered(root)):
        raise CannotWriteError(
            f"new_op: `NAME` must not begin with another op's name or the other way round, got {name!r}"
        )


def registered(root: Path) -> list[str]:
    """Return the stems in OPS and INTERNAL_OPS of calm_fast/ops.py."""
    source = (root / "calm_fast" / "ops.py").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:INTERNAL_)?OPS = \((.*?)\)$", source, re.MULTILINE | re.DOTALL)
    return re.findall(r'"(\w+)"', " ".join(lists))


def write(root: Path, name: str) -> list[str]:
    """Write every file of the new op under `root` and enter it in the lists; return the paths written."""
    check_name(root, name)
    camel = "".join(word.capitalize() for word in name.split("_"))
    for path in skeleton_files(STEM):
        text = (SKELETON / path).read_text(encoding="utf-8").replace(STEM, name).replace("OpName", camel)
        target = root / path.replace(STEM, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    enter(root, name)
    return [*skeleton_files(name), *LISTS]


def enter(root: Path, name: str) -> None:
    """Enter the op in every file of LISTS, each list in its own order."""
    ops = root / "calm_fast" / "ops.py"
    text = ops.read_text(encoding="utf-8")
    text = add_line(text, f"from calm_fast._ops.{name}.api import {name}", r"from calm_fast\._ops\.\w+\.api import .*")
    text = add_line(text, f'    "{name}",', r'    "[a-z]\w*",')
    stems = sorted([*re.findall(r'"(\w+)"', text[text.index("OPS = (") :].split(")")[0]), name])
    text = re.sub(r"^OPS = \(.*?\)$", f"OPS = ({', '.join(map(quoted, stems))})", text, flags=re.MULTILINE | re.DOTALL)
    ops.write_text(text, encoding="utf-8")

    reference = root / "calm_fast" / "reference.py"
    text = reference.read_text(encoding="utf-8")
    text = add_line(
        text,
        f"from calm_fast._ops.{name}.reference import {name}_reference",
        r"from calm_fast\._ops\.\w+\.reference import .*",
    )
    reference.write_text(add_line(text, f'    "{name}_reference",', r'    "[a-z]\w*",'), encoding="utf-8")

    registry = root / "benchmarks" / "registry.py"
    text = registry.read_text(encoding="utf-8")
    entry = f'    "{name}": "calm_fast.benchmarks.cases.{name}",'
    registry.write_text(text.replace('    "model": ', f'{entry}\n    "model": ', 1), encoding="utf-8")

    readme = root / "README.md"
    row = f"| `{name}` | multiplies by a number (the skeleton: say what it computes) | forward, backward | | |"
    readme.write_text(
        add_line(readme.read_text(encoding="utf-8"), row, r"\| `[a-z_]+` \|.*\|.*\|.*\|.*\|"), encoding="utf-8"
    )

    index = root / "docs" / "README.md"
    text = index.read_text(encoding="utf-8")
    first = re.search(r"\[\w+\]\(ops/\w+\.md\)", text)
    assert first, "docs/README.md links no page of an op"
    index.write_text(text.replace(first[0], f"{first[0]}, [{name}](ops/{name}.md)", 1), encoding="utf-8")


def quoted(word: str) -> str:
    return f'"{word}"'


def add_line(text: str, line: str, pattern: str) -> str:
    """Return `text` with `line` inserted among the first run of lines that match `pattern`, in alphabetical order."""
    lines = text.splitlines()
    first = next(i for i, there in enumerate(lines) if re.fullmatch(pattern, there))
    at = first
    while at < len(lines) and re.fullmatch(pattern, lines[at]) and lines[at] < line:
        at += 1
    return "\n".join([*lines[:at], line, *lines[at:]]) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME", help="stem of the op, the same word in every place")
    name = parser.parse_args(argv).name
    try:
        written = write(ROOT, name)
    except CannotWriteError as problem:
        print(problem, file=sys.stderr)
        return 2
    print("\n".join(written))
    print(
        "\nAn editable install maps each folder of kernels/ by name: install it again (make new-op does)."
        f"\nNext: make test ARGS='tests/ops/{name} tests/test_layout.py'; make codegen ARGS='--only {name} --update'."
        f"\nThen calm_fast/_ops/{name}/reference.py, and everything after it."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
