"""Read damaged parquet and arrow files in a process of its own, which a crash of pyarrow may end; see test_fuzz_tables.

    python fuzz_tables.py FOLDER SEED COUNT

FOLDER/rows.json is the file at hand. The last line of the output counts the files that had rows and those that had an
error.
"""

from __future__ import annotations

import datetime
import decimal
import faulthandler
import io
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow
from pyarrow import ipc, parquet

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_checks import check_file  # noqa: E402

INTERESTING = [
    b"\x00" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\x01\x00\x00\x00", b"\x00\x00\x00\x80", b"\xff" * 8,
    b"\xff" * 7 + b"\x7f", b"\x00" * 8, b"\x80", b"\x15", b"PAR1", b"ARROW1", b"\xff\xfe", b"\xc3\x28",
]  # fmt: skip


def tables() -> Iterator[pyarrow.Table]:
    plain = {
        "question": [f"What is {i} + 1? \u00e9\u4e94" for i in range(40)],
        "answer": [str(i + 1) for i in range(40)],
        "generated_answer": [[f"\\boxed{{{i + 1}}}", "7"] for i in range(40)],
        "scores": [[0.5, None]] * 40,
    }
    yield pyarrow.table(plain)
    chats = {
        "prompt": [[{"role": "user", "content": f"ask {i}"}] for i in range(20)],
        "completion": [[{"role": "assistant", "content": f"#### {i}"}] for i in range(20)],
        "solution": [str(i) for i in range(20)],
        "reward": [float(i % 2) for i in range(20)],
    }
    yield pyarrow.table(chats)
    day = datetime.datetime(2024, 2, 29, 12, tzinfo=datetime.timezone.utc)
    other = {
        "question": pyarrow.array(["a", "b", "a"]).dictionary_encode(),
        "answer": pyarrow.array([decimal.Decimal("1.50"), decimal.Decimal("-2.25"), None]),
        "generated_answer": pyarrow.array([["1.5", None], [], ["x"]], pyarrow.large_list(pyarrow.large_string())),
        "when": pyarrow.array([day, None, day], pyarrow.timestamp("us", tz="UTC")),
        "day": pyarrow.array([1, 2, 3], pyarrow.date32()),
        "raw": pyarrow.array([b"\x00\xff", b"", None]),
        "pairs": pyarrow.array([[("a", 1)], [], None], pyarrow.map_(pyarrow.string(), pyarrow.int32())),
        "took": pyarrow.array([1, 2, None], pyarrow.duration("ms")),
    }
    yield pyarrow.table(other)


def files() -> Iterator[bytes]:
    for number, table in enumerate(tables()):
        # parquet has no duration
        flat = table.drop_columns(["took"]) if number == 2 else table
        for options in (
            {"compression": "snappy"},
            {"compression": "none", "use_dictionary": False},
            {"compression": "zstd", "data_page_version": "2.0", "row_group_size": 2},
            {"compression": "gzip", "write_page_index": True, "write_page_checksum": True},
        ):
            sink = io.BytesIO()
            parquet.write_table(flat, sink, **options)
            yield sink.getvalue()
        for opened in (ipc.new_stream, ipc.new_file):
            for compression in (None, "lz4", "zstd"):
                sink = io.BytesIO()
                with opened(sink, table.schema, options=ipc.IpcWriteOptions(compression=compression)) as writer:
                    writer.write_table(table, max_chunksize=16)
                yield sink.getvalue()


def damaged(draw: random.Random, whole: list[bytes]) -> bytes:
    """Return a file with one to six bytes flipped or overwritten, cut, doubled, or from another file."""
    content = bytearray(draw.choice(whole))
    for _ in range(draw.choice([1, 1, 1, 2, 6])):
        # the ends hold what describes the rest
        at = draw.choice([draw.randrange(len(content)), max(0, len(content) - draw.randrange(1, 400))])
        kind = draw.randrange(7)
        if kind <= 1:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            word = draw.choice(INTERESTING)
            content[at : at + len(word)] = word
        elif kind == 3:
            del content[at : at + draw.choice([1, 4, 8, 64])]
        elif kind == 4:
            content[at:at] = content[at : at + draw.choice([1, 4, 8, 64])]
        elif kind == 5:
            other = draw.choice(whole)
            start = draw.randrange(len(other))
            content[at : at + 32] = other[start : start + 32]
        else:
            content = content[: max(9, at)] if draw.random() < 0.5 else content
        if len(content) < 9:
            return bytes(content)
    return bytes(content)


def main() -> None:
    faulthandler.enable()
    folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    whole = list(files())
    assert all(check_file(content, folder) for content in whole)
    seen = Counter()
    for number in range(count):
        content = damaged(random.Random(f"{seed} {number}"), whole)
        seen[check_file(content, folder)] += 1
    print(f"{seen[True]} {seen[False]}")


if __name__ == "__main__":
    main()
