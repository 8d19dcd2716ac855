"""A forked program is like one that Python was started for."""

from __future__ import annotations

import signal
from pathlib import Path

SHOW = """
import atexit, os, sys
atexit.register(print, "at exit")
print(os.getcwd(), sys.argv, sys.path[:2], __name__, "torch" in sys.modules, "calm_fast" in sys.modules)
print("error", file=sys.stderr)
"""


def test_a_program_has_its_own_arguments_path_output_and_end(forked, tmp_path: Path) -> None:
    (tmp_path / "show.py").write_text(SHOW, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    there, home = str(tmp_path / "elsewhere"), str(tmp_path)
    for command, argv, first in (
        (("-c", SHOW, "a"), ["-c", "a"], ""),
        ((tmp_path / "show.py", "a"), [str(tmp_path / "show.py"), "a"], home),
        (("-m", "show", "a"), [str(tmp_path / "show.py"), "a"], there),
    ):
        done = forked.run(*command, cwd=there, path=home)
        assert done.stdout == f"{there} {argv} {[first, home]} __main__ True False\nat exit\n", command
        assert done.returncode == 0 and done.stderr.startswith("error\n"), done.stderr


def test_exit_codes_are_those_of_a_process(forked, tmp_path: Path) -> None:
    for code, expected in (("raise SystemExit(3)", 3), ("1 / 0", 1), ("import os; os.kill(os.getpid(), 9)", -9)):
        done = forked.run("-c", code, cwd=tmp_path)
        assert done.returncode == expected
        assert ("\nZeroDivisionError: division by zero\n" in done.stderr) == (expected == 1), done.stderr


def test_programs_run_at_the_same_time(forked, tmp_path: Path) -> None:
    wait = "import pathlib, time\nwhile not pathlib.Path('go').exists(): time.sleep(0.01)\nprint('gone')"
    first = forked.start("-c", wait, cwd=tmp_path)
    assert forked.run("-c", "import pathlib; pathlib.Path('go').touch()", cwd=tmp_path).returncode == 0
    assert first.wait().stdout == "gone\n"


def test_a_program_that_does_not_end_is_ended(forked, tmp_path: Path) -> None:
    done = forked.run("-c", "import signal, time; signal.alarm(1); time.sleep(60)", cwd=tmp_path)
    assert done.returncode == -signal.SIGALRM
