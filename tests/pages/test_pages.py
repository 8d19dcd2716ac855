"""The code blocks of every page of docs/ run, and every figure and command that a page names is there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PAGES = sorted(ROOT.glob("docs/**/*.md"))
BY_THEMSELVES = {"compose_command.md": "tests/composing/test_command.py runs its blocks and looks at what they write"}
EDITS = {"nat.md": {"steps=300": "steps=1"}}
# modules that the extra `test` does not bring; pages that import one run in `make docs`, after `make integrations`
OTHER_TOOLS = (
    "bitsandbytes",
    "deepspeed",
    "fastapi",
    "kernels",
    "liger_kernel",
    "lm_eval",
    "onnx",
    "onnxruntime",
    "openai",
)
OTHER_TOOLS += ("optimum", "tensorboard", "torchao", "trl", "uvicorn", "vllm")
# pages whose commands follow from the blocks before; elsewhere a block in sh shows a call with files of the reader's
WITH_COMMANDS = ("start/", "tasks/")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT / "docs").as_posix()


def has_code(page: Path) -> bool:
    return re.search(r"^```python$", page.read_text(encoding="utf-8"), re.MULTILINE) is not None


def other_tools(page: Path) -> set[str]:
    """Return the modules of OTHER_TOOLS that the Python blocks of a page import."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return set(re.findall(r"^\s*(?:import|from) (\w+)", "\n".join(blocks), re.MULTILINE)) & set(OTHER_TOOLS)


PLAIN = [page for page in PAGES if has_code(page) and not other_tools(page)]
WITH_OTHER_TOOLS = [page for page in PAGES if other_tools(page)]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(HERE)]),
        "OMP_NUM_THREADS": "1",
        "TRITON_INTERPRET": "0",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-W", "error::UserWarning:calm_fast", str(HERE / "runner.py")]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()  # type: ignore[union-attr]  # a pipe, asked for above


def run_page(page: Path, server: subprocess.Popen[str], tmp_path: Path, record_property) -> None:
    name = name_of(page)
    if name in BY_THEMSELVES:
        assert (ROOT / BY_THEMSELVES[name].split()[0]).is_file()
        pytest.skip(BY_THEMSELVES[name])
    setup = HERE / "preambles" / name.replace("/", "_").replace(".md", ".py")
    request = {"page": str(page), "folder": str(tmp_path), "setup": str(setup) if setup.is_file() else None}
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write(
        json.dumps(request | {"edits": EDITS.get(name, {}), "shell": name.startswith(WITH_COMMANDS)}) + "\n"
    )
    server.stdin.flush()
    done = json.loads(server.stdout.readline())
    record_property("cpu_seconds", done["seconds"])
    assert done["code"] == 0, done["output"]


@pytest.mark.parametrize("page", PLAIN, ids=name_of)
def test_blocks_run(page: Path, server: subprocess.Popen[str], tmp_path: Path, record_property) -> None:
    run_page(page, server, tmp_path, record_property)


@pytest.mark.parametrize("page", WITH_OTHER_TOOLS, ids=name_of)
def test_blocks_with_other_tools_run(page: Path, server, tmp_path: Path, record_property) -> None:
    for module in sorted(other_tools(page)):
        pytest.importorskip(module)
    run_page(page, server, tmp_path, record_property)


def test_every_preamble_belongs_to_a_page() -> None:
    wanted = {name_of(page).replace("/", "_").replace(".md", ".py") for page in PAGES if has_code(page)}
    there = {path.name for path in (HERE / "preambles").glob("*.py")}
    assert there <= wanted
