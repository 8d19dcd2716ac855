"""The skeleton of a new op is green at once, and CONTRIBUTING.md lists what it writes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "tools").is_dir():
    pytest.skip("the tools are not beside the tests", allow_module_level=True)
sys.path.insert(0, str(ROOT))

from tools import new_op  # noqa: E402
from tools.check_types import link_tree  # noqa: E402

NAME = "scaled_copy"
COPIED = ("calm_fast", "kernels", "benchmarks", "tests", "csrc", "docs", "tools", "examples")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with the op NAME in it."""
    root = tmp_path_factory.mktemp("new_op") / "checkout"
    root.mkdir()
    for folder in COPIED:
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ROOT.iterdir():
        if file.is_file():
            shutil.copy2(file, root)
    new_op.write(root, NAME)
    return root


@pytest.fixture(scope="module")
def installed(checkout: Path) -> Path:
    """The copy's calm_fast as an installed package, because beside the sources it would lack its kernels."""
    folder = checkout.parent / "installed"
    link_tree(folder, checkout)
    return folder


def test_its_own_tests_and_those_of_the_layout_pass(checkout: Path, installed: Path, forked) -> None:
    chosen = [str(checkout / "tests" / part) for part in (f"ops/{NAME}", "test_layout.py", "test_imports.py")]
    config = ("-c", str(checkout / "pyproject.toml"), "--rootdir", str(checkout), "-p", "no:cacheprovider")
    done = forked.run("-m", "pytest", "-q", *config, *chosen, cwd=installed, path=installed)
    assert done.returncode == 0, done.stdout[-3000:]
    assert not re.search(r"\d+ skipped", done.stdout), done.stdout[-300:]


def test_verify_proves_it(installed: Path, forked) -> None:
    done = forked.run("-m", "calm_fast", "verify", "--op", NAME, cwd=installed, path=installed)
    assert done.returncode == 0, done.stdout[-3000:]
    assert NAME in done.stdout and "triton" in done.stdout


def test_its_machine_code_holds_the_hard_facts(checkout: Path, installed: Path) -> None:
    """The record has no such kernel yet, so this is the run that writes it."""
    command = [sys.executable, str(checkout / "tests/codegen/check.py"), "--only", NAME, "--arch", "90", "--update"]
    env = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(command, cwd=installed, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert f"{NAME}_fwd_bf16 sm_90" in done.stdout


def test_it_is_measured(installed: Path, forked) -> None:
    lines = (
        "import torch",
        "from calm_fast.benchmarks.registry import cases",
        f"(case,) = cases({NAME!r}, torch.device('cpu'), 'quick')",
        "inputs = case.check_make(0)",
        "truth = case.definition(inputs, torch.float64)",
        "assert all(set(c.prepare(inputs)()) == set(truth) for c in case.contestants)",
    )
    done = forked.run("-c", "\n".join(lines), cwd=installed, path=installed)
    assert done.returncode == 0, done.stderr


def test_it_is_formatted_and_linted(checkout: Path) -> None:
    files = [path for path in [*new_op.skeleton_files(NAME), *new_op.LISTS] if path.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "check", *(str(checkout / path) for path in files)]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout


def test_contributing_lists_what_it_writes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Adding an op")[1].split("\n## ")[0]
    listed = re.findall(r"^    (\S+)", text, re.MULTILINE)
    assert listed == [*new_op.skeleton_files(), *new_op.LISTS]


@pytest.mark.parametrize("name", ["vote", "Vote", "2x", "class", "vote_more", "a-b", "packed", "packed_linear"])
def test_names_that_cannot_be_used_are_refused(name: str) -> None:
    with pytest.raises(new_op.CannotWriteError, match="new_op: `NAME` must"):
        new_op.check_name(ROOT, name)


def test_nothing_is_written_over(checkout: Path) -> None:
    with pytest.raises(new_op.CannotWriteError, match="must be new"):
        new_op.write(checkout, NAME)
