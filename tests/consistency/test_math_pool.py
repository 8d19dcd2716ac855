"""Processes that compare answers: stuck ones are replaced, none is left behind; the cache of their verdicts."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest

from calm_fast import consistency
from calm_fast.consistency import group_answers
from calm_fast.consistency.answers import grouping, math_pool
from calm_fast.consistency.answers.math_pool import Comparison, compare
from calm_fast.consistency.answers.verdict_cache import VerdictCache

# a power of 370 million digits in C code, and nested braces that the parser takes minutes for
STUCK_PAIR = (r"9^{9^{9}}", r"5\%")
UNREADABLE = "{" * 60 + "x" + "}" * 60


def test_a_stuck_comparison_is_killed_and_reported() -> None:
    start = time.monotonic()
    groups = group_answers([["x+1", *STUCK_PAIR, "1+x"], ["y+1", "1+y"]], workers=1, timeout=0.5)
    assert groups.answers.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0]]
    assert groups.given_up == ((0, *STUCK_PAIR),) and groups.timeouts == 1
    assert time.monotonic() - start < 60


def test_an_answer_that_cannot_be_read_equals_only_itself() -> None:
    groups = group_answers([["x", UNREADABLE, "y", UNREADABLE, "x "]], workers=2, timeout=0.5)
    assert groups.answers.tolist() == [[0, 1, 2, 1, 0]]
    assert groups.given_up == ((0, "x", UNREADABLE), (0, UNREADABLE, "y"))


def children() -> set[int]:
    psutil = pytest.importorskip("psutil")
    return {child.pid for child in psutil.Process().children() if "math_worker" in " ".join(child.cmdline())}


@pytest.fixture
def none_kept():
    """No process is there before, and none is left."""
    consistency.end_workers()
    yield
    consistency.end_workers()
    assert not children()


def test_free_processes_are_kept_and_busy_ones_ended(none_kept) -> None:
    running = compare([Comparison([f"x+{n}", f"{n}+x"]) for n in range(6)], 2, 5.0)
    next(running)  # the process that did this one has nothing to do yet
    assert len(children()) == 2
    running.close()
    assert len(children()) <= 2
    tasks = [Comparison(["x+1", "1+x"]), Comparison(["x+1", "2+x"])]
    assert sorted(compare(tasks, 2, 5.0)) == [0, 1]
    before = children()
    assert len(before) == 2
    assert group_answers([["x+1", "1+x"]]).answers.tolist() == [[0, 0]]
    assert children() == before


def test_a_kept_process_that_died_is_replaced(none_kept) -> None:
    group_answers([["x+1", "1+x"]])
    (first,) = children()
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # dead, and not yet noticed
    assert group_answers([["x+2", "2+x", "x"]]).answers.tolist() == [[0, 0, 1]]
    assert first not in children()


def test_a_kept_process_that_hangs_is_replaced(none_kept, monkeypatch) -> None:
    group_answers([["x+1", "1+x"]])
    (first,) = children()
    os.kill(first, signal.SIGSTOP)  # looks alive, takes its task, never answers
    monkeypatch.setattr(math_pool, "_PATIENCE", 0)
    monkeypatch.setattr(math_pool, "_PATIENCE_MORE", 8)
    assert group_answers([["x+2", "2+x", "x"]]).answers.tolist() == [[0, 0, 1]]
    assert first not in children()


def test_few_are_kept_and_none_for_ever(none_kept, monkeypatch) -> None:
    monkeypatch.setattr(math_pool, "_MOST_KEPT", 1)
    monkeypatch.setattr(math_pool, "_SERVED", 5)
    tasks = [Comparison([f"x+{n}", f"{n}+x"]) for n in range(3)]
    list(compare(tasks, 3, 5.0))
    (first,) = children()
    for n in range(5):
        list(compare([Comparison([f"x+{n}", f"{n}+x"])], 1, 5.0))
    assert first not in children()


def test_the_old_way_to_end_them_still_works_and_warns(none_kept) -> None:
    list(compare([Comparison(["x+1", "1+x"])], 1, 5.0))
    assert children()
    with pytest.warns(DeprecationWarning, match=r"math_pool is deprecated; calm_fast.consistency.end_workers\(\)"):
        consistency.math_pool.kept.end_all()
    assert not children()


def test_calls_from_threads_do_not_share_a_process(none_kept) -> None:
    def grouped(n: int) -> list:
        return group_answers([[f"x+{n}", f"{n}+x", "x"]] * 3, workers=1).answers.tolist()

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(grouped, range(1, 7))) == [[[0, 0, 1]] * 3] * 6


_FAMILY = """
import json, multiprocessing, os, signal, sys
from calm_fast.consistency import group_answers
from calm_fast.consistency.answers import math_pool

def grouped():
    return group_answers([["x+1", "1+x", "x"]]).answers.tolist()

def child(results):
    results.put((grouped(), [w.process.pid for w in math_pool.kept.idle]))

if __name__ == "__main__":
    answers = [grouped()]
    own = [w.process.pid for w in math_pool.kept.idle]
    others = []
    for method in sys.argv[2:]:
        context = multiprocessing.get_context(method)
        results = context.Queue()
        process = context.Process(target=child, args=(results,), daemon=True)
        process.start()
        found, pids = results.get()
        process.join()
        answers.append(found)
        others += pids
    answers.append(grouped())
    assert [w.process.pid for w in math_pool.kept.idle] == own and not set(own) & set(others)
    print(json.dumps([answers, own + others]), flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize(("end", "methods"), [("exit", ["fork", "spawn"]), ("kill", ["fork"])])
def test_forks_and_daemonic_processes_have_their_own_and_all_end(tmp_path, end, methods, forked) -> None:
    psutil = pytest.importorskip("psutil")
    (tmp_path / "family.py").write_text(_FAMILY)
    run = forked.run(tmp_path / "family.py", end, *methods, cwd=tmp_path)
    assert run.returncode == (-signal.SIGKILL if end == "kill" else 0), run.stderr
    answers, pids = json.loads(run.stdout)
    assert answers == [[[0, 0, 1]]] * (2 + len(methods)) and len(pids) == 1 + len(methods)
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert not psutil.wait_procs(left, timeout=10)[1]


_BUSY = """
import os, queue, signal, sys, threading, time
from calm_fast.consistency.answers import math_pool
from calm_fast.consistency.answers.math_pool import Comparison, compare

# one process is idle, one in the middle of C code for minutes, and a fork stays that holds all that was open
list(compare([Comparison(["x+1", "1+x"])], 1, 5.0))
idle, math_pool.kept.idle = math_pool.kept.idle[0], []
working, plain = queue.Queue(), math_pool._record

def record(worker, event, comparisons):
    if event[0] in ("value", "pair"):
        working.put(worker.process.pid)
    return plain(worker, event, comparisons)

math_pool._record = record
busy = compare([Comparison(sys.argv[1:])], 1, 600.0)
threading.Thread(target=lambda: next(busy), daemon=True).start()
pid = working.get()
fork = os.fork()
if not fork:
    os.close(1)
    time.sleep(60)
    os._exit(0)
print(idle.process.pid, pid, fork, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may have no signal for the end of a pipe")
def test_a_process_ends_at_once_when_its_parent_is_killed() -> None:
    psutil = pytest.importorskip("psutil")
    run = subprocess.run([sys.executable, "-c", _BUSY, *STUCK_PAIR], stdout=subprocess.PIPE, text=True, timeout=600)
    assert run.returncode == -signal.SIGKILL
    idle, working, fork = map(int, run.stdout.split())
    left = [psutil.Process(pid) for pid in (idle, working) if psutil.pid_exists(pid)]
    try:
        # a signal of the kernel; the time is for a busy machine to run it, and the computation takes minutes
        assert not psutil.wait_procs(left, timeout=5)[1]
    finally:
        for process in (idle, working, fork):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems may have no signal for the end of a pipe")
def test_the_end_of_the_pipe_interrupts_a_computation_in_c() -> None:
    """Python's own handlers would run after it, in minutes."""
    begin = "import sys; from calm_fast.consistency.answers import lifeline; lifeline.end_with_parent(int(sys.argv[1]))"
    reader, writer = os.pipe()
    command = [sys.executable, "-c", f"{begin}; print(flush=True); 3**10**9", str(reader)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[reader]) as child:
        try:
            os.close(reader)
            assert child.stdout is not None and child.stdout.readline() == b"\n"
            time.sleep(0.2)
            os.close(writer)
            assert child.wait(timeout=20) == -signal.SIGIO
        finally:
            child.kill()


def test_every_task_is_finished_once_with_more_workers_than_tasks() -> None:
    tasks = [Comparison([f"x+{n}", f"{n}+x", "x+1"]) for n in (1, 2, 3)]
    assert sorted(compare(tasks, 8, 5.0)) == [0, 1, 2]
    assert [task.known for task in tasks] == [{(0, 1): True, (0, 2): same} for same in (True, False, False)]


@pytest.mark.parametrize(
    ("module", "why"), [("calm_fast.consistency.no_such_module", "exit code 1"), ("broken_worker", "ImportError: no")]
)
def test_a_process_that_cannot_start_is_an_error(monkeypatch, tmp_path, module, why) -> None:
    (tmp_path / "broken_worker.py").write_text(
        "import json\ndef main():\n    print(json.dumps(['failed', 'ImportError: no math_verify']), flush=True)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(math_pool, "_MODULE", module)
    with pytest.raises(RuntimeError, match=f"could not be started \\({why}"):
        group_answers([["x+1", "1+x"]])


def test_a_process_that_dies_for_no_reason_is_an_error_in_the_end(monkeypatch, tmp_path) -> None:
    (tmp_path / "dying_worker.py").write_text(
        "import json, sys, os\ndef main():\n    print(json.dumps(['ready']), flush=True)\n"
        "    sys.stdin.readline()\n    os._exit(3)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(math_pool, "_MODULE", "dying_worker")
    with pytest.raises(RuntimeError, match="died before it began to compare .exit code 3"):
        group_answers([["x+1", "1+x"]])


def test_a_process_imports_nothing_heavy() -> None:
    code = "import sys, calm_fast.consistency.answers.math_worker; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stdout.strip() == "False", run.stderr


def test_the_smallest_timeout_is_still_one() -> None:
    groups = group_answers([["x+1", "1+x"]], workers=1, timeout=1e-9)
    assert groups.answers.tolist() == [[0, 1]] and groups.timeouts == 1


# ---- the cache ------------------------------------------------------------------------------------------------------

ROWS = [["x+1", "1+x", "x"], [r"\sqrt{8}", r"2\sqrt{2}", r"\text{none}"]]


def test_a_warm_cache_gives_the_same_without_a_process(tmp_path, monkeypatch) -> None:
    plain = group_answers(ROWS)
    cold = group_answers(ROWS, cache_dir=tmp_path / "deep" / "cache")
    monkeypatch.setattr(grouping, "compare", lambda *args: pytest.fail("a process was asked"))
    warm = group_answers(ROWS, cache_dir=tmp_path / "deep" / "cache")
    swapped = group_answers([[row[1], row[0]] for row in ROWS], cache_dir=tmp_path / "deep" / "cache")
    assert plain.answers.tolist() == cold.answers.tolist() == warm.answers.tolist() == [[0, 0, 1], [0, 0, 1]]
    assert swapped.answers.tolist() == [[0, 0], [0, 0]]


def test_pairs_without_enough_time_are_kept_for_no_longer_than_that(tmp_path) -> None:
    pair = ("a", "b")
    VerdictCache(tmp_path, 1.0).put({pair: None, ("c", "d"): True})
    assert VerdictCache(tmp_path, 0.5).get([pair, ("c", "d")]) == {pair: None, ("c", "d"): True}
    assert VerdictCache(tmp_path, 1.5).get([pair, ("c", "d"), ("e", "f")]) == {("c", "d"): True}


def test_given_up_pairs_are_reported_from_the_cache_as_well(tmp_path, monkeypatch) -> None:
    VerdictCache(tmp_path, 2.0).put({STUCK_PAIR: None})
    monkeypatch.setattr(grouping, "compare", lambda *args: pytest.fail("a process was asked"))
    groups = group_answers([list(STUCK_PAIR)], cache_dir=tmp_path, timeout=1.0)
    assert groups.answers.tolist() == [[0, 1]] and groups.given_up == ((0, *STUCK_PAIR),)


def test_only_pairs_that_a_question_takes_are_reported(tmp_path) -> None:
    # the second and third are compared with the first alone: what another question found about them does not count
    VerdictCache(tmp_path, 5.0).put({("1+x", "2+x"): None})
    assert group_answers([["x+1", "1+x", "2+x"]], cache_dir=tmp_path).given_up == ()


def test_what_was_recalled_is_not_written_again(tmp_path) -> None:
    VerdictCache(tmp_path, 9.0).put({STUCK_PAIR: None})
    group_answers([[*STUCK_PAIR, "x"]], cache_dir=tmp_path, timeout=1.0)
    assert VerdictCache(tmp_path, 8.0).get([STUCK_PAIR]) == {STUCK_PAIR: None}


def test_other_versions_do_not_see_verdicts(tmp_path, monkeypatch) -> None:
    from calm_fast.consistency.answers import verdict_cache

    VerdictCache(tmp_path, 1.0).put({("a", "b"): True})
    monkeypatch.setattr(verdict_cache, "_version", lambda name: "0")
    assert VerdictCache(tmp_path, 1.0).get([("a", "b")]) == {}


def test_a_broken_cache_costs_a_warning_only(tmp_path) -> None:
    (tmp_path / "answers.sqlite3").write_bytes(b"not a database" * 100)
    with pytest.warns(UserWarning, match="compared without the cache .*answers.sqlite3"):
        groups = group_answers(ROWS, cache_dir=tmp_path)
    assert groups.answers.tolist() == [[0, 0, 1], [0, 0, 1]]
    with pytest.warns(UserWarning, match="compared without the cache"):
        VerdictCache(tmp_path / "answers.sqlite3" / "below", 1.0)


def test_strings_with_separators_do_not_collide(tmp_path) -> None:
    cache = VerdictCache(tmp_path, 1.0)
    cache.put({("a\0b", "c"): True, ("a", "\0bc"): False, ("\ud83d", "x"): True})
    assert cache.get([("a\0b", "c"), ("a", "\0bc"), ("x", "\ud83d"), ("a", "b\0c")]) == {
        ("a\0b", "c"): True,
        ("a", "\0bc"): False,
        ("x", "\ud83d"): True,
    }


def test_processes_may_write_at_the_same_time(tmp_path) -> None:
    code = (
        "import sys, warnings\nfrom calm_fast.consistency.answers.verdict_cache import VerdictCache\n"
        "warnings.simplefilter('error')\nstart = int(sys.argv[2])\n"
        "for n in range(start, start + 40):\n"
        "    VerdictCache(sys.argv[1], 1.0).put({(str(n), str(m)): m % 2 == 0 for m in range(5)})\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), str(n)]) for n in (0, 20, 1000)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0, 0]
    with closing(sqlite3.connect(tmp_path / "answers.sqlite3")) as base:
        # 0..59 and 1000..1039, five pairs each; ("1", "2") and ("2", "1") are one pair
        assert base.execute("SELECT COUNT(*) FROM verdicts").fetchone() == (100 * 5 - 10,)
