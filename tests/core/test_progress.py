"""A progress bar on a terminal, a line every few seconds elsewhere, nothing if it is switched off."""

from __future__ import annotations

import io
import sys
import time
from typing import Any

import pytest

from calm_fast.core import progress
from calm_fast.core.progress import progress_bar


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, **options: Any) -> str:
    """Return what a loop over 400 steps of a millisecond writes to standard error."""

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    for _ in progress_bar(range(400), desc="work", unit="step", **options):
        time.sleep(0.001)
    return screen.getvalue()


def test_a_log_file_gets_a_few_whole_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.1)
    text = shown(monkeypatch, terminal=False, position=1)
    lines = text.splitlines()
    assert 3 <= len(lines) <= 9 and text.endswith("\n")
    assert "\r" not in text and "\x1b" not in text and all(line.startswith("work ") for line in lines)
    assert lines[0].startswith("work   0% 0/400") and lines[-1].startswith("work 100% 400/400")
    assert len(set(lines)) == len(lines)


def test_five_seconds_pass_between_two_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    assert progress.SECONDS == 5
    assert len(shown(monkeypatch, terminal=False).splitlines()) == 2  # the first and the last


def test_a_terminal_gets_a_bar_that_redraws_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, terminal=True)
    assert text.count("\r") >= 3 and "400/400" in text


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_where_nothing_is_asked_for(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    assert shown(monkeypatch, terminal=terminal, **{"shown": False}) == ""


def test_a_stream_that_knows_no_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class ToLogger:
        lines: list[str] = []

        def write(self, text: str) -> None:
            self.lines.append(text)

        def flush(self) -> None: ...

    monkeypatch.setattr(sys, "stderr", ToLogger())
    assert list(progress_bar(range(3), desc="work")) == [0, 1, 2]
    assert ToLogger.lines[-1].startswith("work 100% 3/3")


def test_a_bar_moved_by_hand_shows_its_postfix(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar(total=2, desc="training", unit="step") as bar:
        bar.update()
        bar.set_postfix({"loss": "0.5"}, refresh=False)
        bar.update()
    assert screen.getvalue().splitlines()[-1].startswith("training 100% 2/2") and "loss=0.5" in screen.getvalue()
