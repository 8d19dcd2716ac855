"""Damaged parquet and arrow files: rows or one line of error, and the process lives.

CALM_FAST_FUZZ=20000 reads that many new ones, by the seed in CALM_FAST_FUZZ_SEED (0). What they find belongs into
data/fuzz.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pyarrow = pytest.importorskip("pyarrow")

from pyarrow import ipc, parquet  # noqa: E402

from calm_fast.consistency import read_rows  # noqa: E402

COUNT = int(os.environ.get("CALM_FAST_FUZZ", "0")) or 400
SEED = os.environ.get("CALM_FAST_FUZZ_SEED", "0")
SCRIPT = Path(__file__).parent / "fuzz_tables.py"


def test_any_damaged_table_has_rows_or_one_line_of_error(tmp_path) -> None:
    command = [sys.executable, "-X", "faulthandler", str(SCRIPT), str(tmp_path), SEED, str(COUNT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + COUNT)
    # tmp_path/rows.json is the file of a failure
    assert done.returncode == 0, done.stderr[-3000:]
    with_rows, with_error = map(int, done.stdout.split()[-2:])
    assert with_rows + with_error == COUNT and min(with_rows, with_error) > COUNT / 20


def test_offsets_behind_the_end_are_an_error(tmp_path) -> None:
    """Unchecked, pyarrow reads what lies behind the buffer, or crashes."""
    table = pyarrow.Table.from_pylist([{"question": "q", "answer": "1", "generated_answer": ["ninety"]}])
    with ipc.new_stream(str(tmp_path / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    content = bytearray((tmp_path / "rows.arrow").read_bytes())
    end = content.rindex(b"ninety") - 4
    assert content[end - 4 : end + 4] == bytes(4) + (6).to_bytes(4, "little")
    content[end : end + 4] = (1 << 30).to_bytes(4, "little")
    (tmp_path / "rows.arrow").write_bytes(bytes(content))
    with pytest.raises(ValueError, match="rows.arrow: the file must be complete arrow, got a damaged one") as caught:
        read_rows(tmp_path / "rows.arrow")
    assert "\n" not in str(caught.value)


def test_values_that_json_does_not_have(tmp_path) -> None:
    from datetime import date, datetime, timedelta
    from decimal import Decimal

    row = {
        "question": "q", "answer": Decimal("1.50"), "generated_answer": ["1.5"], "day": date(2024, 2, 29),
        "at": datetime(2024, 2, 29, 12), "took": timedelta(seconds=5), "raw": b"\x00\xff",
        "large": Decimal("1234567890123456789.125"),
    }  # fmt: skip
    table = pyarrow.Table.from_pylist([row])
    with ipc.new_file(str(tmp_path / "rows.arrow"), table.schema) as stream:
        stream.write_table(table)
    (read,) = read_rows(tmp_path / "rows.arrow")
    assert read == json.loads(json.dumps(read)) == {
        "question": "q", "answer": "1.5", "generated_answer": ["1.5"], "day": "2024-02-29", "at": "2024-02-29T12:00:00",
        "took": "0:00:05", "raw": {"base64": "AP8="}, "large": "1234567890123456789.125",
    }  # fmt: skip
    parquet.write_table(table.drop_columns(["took"]), tmp_path / "rows.parquet")
    (flat,) = read_rows(tmp_path / "rows.parquet")
    assert flat == {name: value for name, value in read.items() if name != "took"}


def test_bytes_are_samples_without_an_answer(tmp_path) -> None:
    table = pyarrow.Table.from_pylist([{"question": "q", "answer": "1", "generated_answer": [b"The answer is 1"]}])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.warns(UserWarning, match="1 samples are not text"):
        assert read_rows(tmp_path / "rows.parquet")[0]["generated_answer"] == [""]
