"""README and docs hold: code blocks run, numbers are committed rows, links and names resolve."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from calm_fast.benchmarks.report.facts import verdicts
from calm_fast.benchmarks.results_table import listed, newest, read
from calm_fast.ops import OPS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "csrc" / "README.md"])
QUANTITY = {"faster": "ms", "less memory": "peak_bytes"}
CLAIM = re.compile(
    r"^\| [^|]+ \| ([\d.]+)x (faster|less memory) \(`(\w+)`\) \| (?:([\d.]+)x faster|no faster) \| `(\w+)` \|$",
    re.MULTILINE,
)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def run(tmp_path: Path, *command: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# as for a reader, who does not interpret kernels; before anything imports calm_fast
READER = """
import os, warnings
os.environ["TRITON_INTERPRET"] = "0"
warnings.filterwarnings("error", category=UserWarning, module=r"calm_fast\Z")
"""


def test_python_blocks_run_in_their_order(tmp_path: Path, forked) -> None:
    code = blocks("python")
    assert len(code) >= 5
    done = forked.run("-c", "\n".join([READER, *code]), cwd=tmp_path, path=ROOT)
    assert done.returncode == 0, done.stderr
    assert "1/2" in done.stdout and "cross_attention: " in done.stdout
    made = {path.name for path in tmp_path.iterdir()}
    assert {"composition", "dual", "negative"} <= made


def test_vote_block_writes_the_files_it_names(tmp_path: Path) -> None:
    (block,) = [b for b in blocks("sh") if "calm-fast vote" in b]
    runnable = block.replace("calm-fast", f"{shlex.quote(sys.executable)} -m calm_fast")
    assert "single" in run(tmp_path, "sh", "-c", runnable)
    assert {path.name for path in (tmp_path / "vote_out").iterdir()} == {"results.json", "votes.jsonl", "curve.png"}


def test_every_number_of_the_first_table_is_a_committed_row() -> None:
    latest = newest(read(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))), "cpu")
    best = {v.name: v.ratio for v in verdicts([row for rows in latest.values() for row in rows], listed("cpu", latest))}
    first = README.split("## Start")[0]
    claims = CLAIM.findall(first)
    assert len(claims) == len(re.findall(r"^\|.*\dx ", first, re.MULTILINE)) >= 8
    for least, words, baseline, least_of_all, case in claims:
        rows = {row["impl"]: row for row in latest[case]}
        field = QUANTITY[words]
        ours = rows.get("calm_fast") or rows["auto"]  # cases of a single op call it by its impl
        assert rows[baseline][field] / ours[field] >= float(least), (case, baseline, words)
        assert not least_of_all or best[case] >= float(least_of_all), (case, "the best baseline")


def test_readme_says_whether_a_gpu_has_run() -> None:
    rows = newest(read(sorted((ROOT / "benchmarks" / "results").glob("*.jsonl"))), "cuda")
    assert ("No GPU has run this code yet" in README) == (not rows)


def test_commands_exist() -> None:
    from typer.main import get_command

    from calm_fast.cli import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined]
    used = set(re.findall(r"calm-fast ([a-z]+)", "\n".join([*blocks("sh"), *re.findall(r"`calm-fast [^`]+`", README)])))
    assert used and used <= known
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z-]+) ", "\n".join(blocks("sh")))) <= targets


NEED_OTHER_TOOLS = ("calm_fast.lm_eval", "calm_fast.serving")  # modules that import a package of the extras


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_public_names_in_prose_exist(page: Path) -> None:
    for name in set(re.findall(r"\bcalm_fast((?:\.[A-Za-z_]\w*)+)", page.read_text(encoding="utf-8"))):
        value: object = importlib.import_module("calm_fast")
        parts = name.split(".")[1:]
        if parts[-1] in ("py", "md", "abi3", "_native", "_cuda", "_cpu"):  # a file name
            continue
        for i, part in enumerate(parts):
            try:
                value = getattr(value, part)
            except AttributeError:
                module = ".".join(["calm_fast", *parts[: i + 1]])
                if importlib.util.find_spec(module) is not None and module in NEED_OTHER_TOOLS:
                    break  # tests/integration import it
                value = importlib.import_module(module)


def test_every_page_is_listed_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    docs = ROOT / "docs"
    pages = {page.relative_to(docs).as_posix() for page in docs.glob("**/*.md")} - {"README.md"}
    pages = {page for page in pages if not page.startswith("ops/")} | {f"ops/{op}.md" for op in OPS}
    assert pages <= set(re.findall(r"\]\(([\w/.-]+\.md)\)", index))


def test_make_targets_that_run_the_code_compile_it_first() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in ("demo", "test", "bench"):
        assert re.search(rf"^{target}:.* \$\(NATIVE\)$", makefile, re.MULTILINE), target
