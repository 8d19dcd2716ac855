"""core/files.py: whole files or none, beside links, modes, pipes and other writers."""

from __future__ import annotations

import os
import re
import stat
import threading
from pathlib import Path

import pytest

import calm_fast
from calm_fast.core.files import atomic_path, check_folder, write_json, write_text


def test_a_block_that_raises_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    write_text(file, "old")
    with pytest.raises(KeyError), atomic_path(file) as partial:
        partial.write_text("half")
        raise KeyError
    assert file.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_two_writers_do_not_touch_each_other(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    with atomic_path(file) as first, atomic_path(file) as second:
        assert first != second and first.parent == second.parent == tmp_path
        first.write_text("first")
        second.write_text("second")
    assert file.read_text() == "first"  # the outer block ends last
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_link_stays_a_link_and_a_mode_stays_a_mode(tmp_path: Path) -> None:
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("old")
    real.chmod(0o600)
    link.symlink_to(real)
    write_json(link, {"a": 1})
    assert link.is_symlink() and real.read_text() == '{\n "a": 1\n}\n'
    assert stat.S_IMODE(real.stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_written_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "through")
    reader.join(timeout=20)
    assert read == ["through"] and stat.S_ISFIFO(pipe.stat().st_mode)


def test_nothing_in_the_package_writes_a_file_in_place() -> None:
    """A module that writes a file by itself writes it into what `atomic_path` gave."""
    package = Path(calm_fast.__file__).parent
    writes = re.compile(r"\.write_(?:text|bytes)\(|\btorch\.save\(|\bsave_file\(|\.savefig\(file")
    texts = {path: path.read_text(encoding="utf-8") for path in sorted(package.rglob("*.py"))}
    atomic = {path for path, text in texts.items() if "atomic_path(" in text}
    atomic.add(package / "hf" / "own_tensors.py")  # saving.py gives it the partial file
    atomic.add(package / "consistency" / "voting" / "printing.py")  # report.py gives it the partial file
    in_place = [str(path.relative_to(package)) for path, text in texts.items() if writes.search(text)]
    assert in_place, "the pattern finds the writers"
    assert not [name for name in in_place if package / name not in atomic]


def test_a_folder_is_checked_before_anything_is_written(tmp_path):
    (tmp_path / "file").write_text("x")
    for good in (tmp_path, tmp_path / "new" / "deeper", str(tmp_path / "new")):
        assert check_folder("f", "folder", good) == Path(good)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
    for bad in (tmp_path / "file", tmp_path / "file" / "under"):
        with pytest.raises(ValueError, match=r"f: `folder` must be a folder, got .* where .*file is a file"):
            check_folder("f", "folder", bad)
    for bad in (None, 3, b"x"):
        with pytest.raises(TypeError, match="f: `folder` must be the path of a folder"):
            check_folder("f", "folder", bad)
