"""Run Python programs in processes that are forked from one with torch and transformers imported, but not calm_fast.

Importing the two takes 5 to 13 seconds of CPU, more than most of these programs do themselves. The fixture `forked` of
tests/conftest.py is a `ForkServer`; this file, run as a program, is the other side. A program runs as after
`python -c CODE`, `python FILE` or `python -m MODULE`: it has its own arguments, sys.path, __main__, output, working
directory, exit code, and an ordinary end of the interpreter. Its environment is the server's, but for PYTHONPATH.
A test of what importing torch or transformers does, or of environment variables, needs a new interpreter instead.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

SECONDS = 300  # for one program


@dataclass
class Running:
    """A program that was started. `wait` must be called once."""

    server: ForkServer
    command: tuple[str, ...]
    pid: int
    out: IO[bytes]
    err: IO[bytes]

    def wait(self) -> subprocess.CompletedProcess[str]:
        """Return the exit code (-N after signal N) and the output, once the program has ended."""
        code = self.server.ask({"wait": self.pid})["code"]
        texts = []
        for file in (self.out, self.err):
            with file:
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))
        return subprocess.CompletedProcess(self.command, code, *texts)


class ForkServer:
    """The process that programs are forked from. It starts with the first of them."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self.process is None:
            env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
            env = {name: value for name, value in env.items() if not name.startswith("PYTEST_")}
            command = [sys.executable, str(Path(__file__).resolve())]
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(command, env=env, stdin=pipe, stdout=pipe, text=True)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"forked: the server ended with exit code {self.process.wait()}; its output is above")
        return json.loads(answer)

    def start(self, *command: str | Path, cwd: str | Path, path: str | Path = "") -> Running:
        """Start `python *command` in the folder `cwd`, with `path` as its PYTHONPATH.

        `command` is "-c" and code, "-m" and a module, or a file, and then the program's arguments. The program is
        killed after 300 seconds.
        """
        words = tuple(map(str, command))
        out, err = tempfile.NamedTemporaryFile(), tempfile.NamedTemporaryFile()  # noqa: SIM115  `wait` closes them
        request = {"command": words, "cwd": str(cwd), "path": str(path), "out": out.name, "err": err.name}
        return Running(self, words, self.ask(request)["pid"], out, err)

    def run(self, *command: str | Path, cwd: str | Path, path: str | Path = "") -> subprocess.CompletedProcess[str]:
        """`start`, then `wait`."""
        return self.start(*command, cwd=cwd, path=path).wait()

    def close(self) -> None:
        if self.process is not None:
            assert self.process.stdin is not None and self.process.stdout is not None
            self.process.stdin.close()
            self.process.wait()
            self.process.stdout.close()


# ---- the other side --------------------------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Answer requests until the end of the input. Return in each child what it is to run, and None in the server."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])}
        else:
            pid = os.fork()
            if pid == 0:
                return request
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    return None


def become(command: list[str], cwd: str, path: str, out: str, err: str) -> None:
    """Run `python *command` in this process."""
    signal.alarm(SECONDS)
    for number, name, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY), (2, err, os.O_WRONLY)):
        file = os.open(name, mode)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  the old one may hold a part of the server's input
    os.chdir(cwd)
    if path:
        os.environ["PYTHONPATH"] = path
    kind, *rest = command
    first = {"-c": "", "-m": cwd}.get(kind, str(Path(kind).resolve().parent))
    sys.path[:1] = [first, *filter(None, path.split(os.pathsep))]
    if kind == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        main = types.ModuleType("__main__")
        sys.modules["__main__"] = main
        exec(compile(code, "<string>", "exec"), vars(main))
    elif kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")


def prepare() -> None:
    """Import what takes long."""
    import accelerate  # noqa: F401
    import transformers

    for name in ("Trainer", "LlamaForCausalLM", "GPT2LMHeadModel", "AutoModelForCausalLM", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    assert "calm_fast" not in sys.modules, "programs import it themselves: from where, and how, may be what is tested"


if __name__ == "__main__":
    prepare()
    if (wanted := serve()) is not None:
        become(**wanted)
