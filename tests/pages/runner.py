"""Run the code blocks of pages, each page in a process of its own that is forked from one with everything imported.

Reads requests from standard input, one a line: {"page", "folder", "setup", "edits", "shell"} in JSON. Answers each by
one line, {"code", "output", "seconds"}. The blocks of a page run in their order, in one namespace, in `folder`, after
the file `setup` that defines what the page takes as given. `edits` are replaced in the page's text, to make it small.

- ```python runs. If a ```text block follows that begins with the name of an exception, it must be raised with exactly
  that message; "..." in it stands for anything, and line breaks do not matter.
- ```sh runs if `shell` is true and each of its lines is a quick call of calm-fast; the command runs in this process.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

BLOCK = re.compile(
    r"^```(python|sh)\n(.*?)^```$(?:\s*^```text\n(\w+(?:Error|Warning): .*?)^```$)?", re.MULTILINE | re.DOTALL
)
SECONDS = 250  # for one page
SLOW = {"demo", "verify", "bench"}


def commands(code: str) -> list[list[str]] | None:
    """Return the arguments of each calm-fast command of a shell block, or None for a block that does something else."""
    lines = [shlex.split(line, comments=True) for line in code.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line]
    special = {"|", ">", "<", "&", "&&", ";"}
    if not lines or any(line[0] != "calm-fast" or line[1] in SLOW or special & set(line) for line in lines):
        return None
    return [line[1:] for line in lines]


def check_message(wanted: str, problem: BaseException) -> None:
    """Raise AssertionError unless `problem` is written as `wanted`, a type and its message."""
    words = " ".join(wanted.split())
    got = " ".join(f"{type(problem).__name__}: {problem}".split())
    pattern = ".*".join(re.escape(part) for part in words.split("..."))
    if not re.fullmatch(pattern, got):
        raise AssertionError(f"the page says\n  {words}\nbut it is\n  {got}") from problem


def run_python(code: str, names: dict[str, Any], wanted: str | None, page: str, line: int) -> None:
    compiled = compile("\n" * line + code, page, "exec")
    if wanted is None:
        exec(compiled, names)
        return
    try:
        exec(compiled, names)
    except Exception as problem:  # noqa: BLE001  compared with what the page says
        check_message(wanted, problem)
    else:
        raise AssertionError(f"{page}:{line}: nothing was raised; the page says {wanted}")


def run_commands(code: str) -> None:
    from typer.testing import CliRunner

    from calm_fast.cli import app

    for arguments in commands(code) or []:
        result = CliRunner().invoke(app, arguments)
        print(result.output)
        if result.exit_code != 0:
            raise AssertionError(f"calm-fast {shlex.join(arguments)}: exit {result.exit_code}") from result.exception


def run_page(page: str, setup: str | None, edits: dict[str, str], shell: bool) -> None:
    text = Path(page).read_text(encoding="utf-8")
    for old, new in edits.items():
        if old not in text:
            raise AssertionError(f"{page}: no {old!r} to replace by {new!r}")
        text = text.replace(old, new)
    names: dict[str, Any] = {"__name__": "page"}
    if setup:
        exec(compile(Path(setup).read_text(encoding="utf-8"), setup, "exec"), names)
    for found in BLOCK.finditer(text):
        if found[1] == "python":
            run_python(found[2], names, found[3], page, text.count("\n", 0, found.start(2)))
        elif shell:
            run_commands(found[2])


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Run a page in a child and return its exit code, its output and its CPU seconds."""
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            signal.alarm(SECONDS)
            code = 1
            try:
                os.chdir(request["folder"])
                run_page(request["page"], request["setup"], request["edits"], request["shell"])
                code = 0
            except BaseException:  # noqa: BLE001  the child must not go on as the parent
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status, usage = os.wait4(child, 0)
        output.seek(0)
        text = output.read().decode("utf-8", "replace")
    return {"code": status, "output": text[-8000:], "seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    import transformers

    import calm_fast

    for name in ("compose", "SelfConsistency", "add_dual_lora", "score_sequences", "nat", "consistency", "ops"):
        getattr(calm_fast, name)
    for name in ("Trainer", "LlamaForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
