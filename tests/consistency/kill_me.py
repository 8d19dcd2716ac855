"""A run of SelfConsistency that is killed in the middle of writing a row; see its test."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from self_consistency_setup import QUESTIONS, REFERENCES, consistency  # noqa: E402

from calm_fast.consistency.voting.journal import Journal  # noqa: E402


class TornStream:
    """The journal's file, which a reader finds with half of the third write in it."""

    def __init__(self, stream) -> None:
        self.stream, self.writes = stream, 0

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, data: bytes) -> None:
        self.writes += 1
        self.stream.write(data if self.writes < 3 else data[: len(data) * 2 // 3])
        if self.writes == 3:
            self.stream.flush()
            print("torn", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)


plain = Journal.__init__


def torn(self, *args) -> None:
    plain(self, *args)
    self.stream = TornStream(self.stream)


Journal.__init__ = torn
consistency()(QUESTIONS, REFERENCES, out=sys.argv[1])
