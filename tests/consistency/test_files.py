"""Files of other tools, compressed and damaged files, samples that are not text."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import random
import warnings
from pathlib import Path

import pytest

from calm_fast.consistency import extract_answer, read_rows
from calm_fast.consistency.voting.formats import Fields

FILES = Path(__file__).parent / "data" / "files"
ASKED = ["Tom has 3 pens and buys 4 more. How many pens has he?", "What is 6 times 7?"]
FOUND = [["7", "12"], ["42", "13"]]
ROW = {"question": "q", "answer": "1", "generated_answer": ["The answer is 1.", "\\boxed{2}"]}


def needs(package: str):
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


@pytest.mark.parametrize(
    ("name", "asked", "gold", "scores"),
    [
        ("lm_eval.jsonl", ASKED, ["7", "42"], None),
        ("openai_batch.jsonl", ["q-0", "q-1"], [None, None], [-0.75, -1.75]),
        ("openai_chat.json", ASKED, ["7", "42"], [-0.75, -1.75]),
        ("completions.jsonl", ASKED, ["7", "42"], [-0.75, -0.75]),
        ("vllm.jsonl", ASKED, ["7", "42"], [-0.75, -1.75]),
        ("trl.jsonl", ASKED, ["7", "42"], [1.0, 0.0]),
        ("verl.jsonl", [f"user\n{text}\nassistant\n" for text in ASKED], ["7", "42"], [1.0, 0.0]),
        ("dataset_server.json", ASKED, ["7", "42"], None),
        ("one_sample_a_row.jsonl", ASKED, ["7", "42"], [-1.0, -2.0]),
    ],
)
def test_other_tools(name, asked, gold, scores) -> None:
    rows = read_rows(FILES / name, need_answer=False)
    assert [row["question"] for row in rows] == asked
    assert [[extract_answer(text) for text in row["generated_answer"]] for row in rows] == FOUND
    assert [row["answer"] and (extract_answer(row["answer"]) or row["answer"]) for row in rows] == gold
    assert [row.get("scores") for row in rows] == [scores] * 2
    assert read_rows(FILES / name, 1, need_answer=False) == rows[:1]


def test_names_of_fields_can_be_given() -> None:
    with pytest.raises(
        ValueError, match="other_names.jsonl, line 1: `question` must be a string, the field is missing"
    ):
        read_rows(FILES / "other_names.jsonl")
    rows = read_rows(FILES / "other_names.jsonl", fields=Fields("meta.task", "truth", "tries", "confidence"))
    assert [row["question"] for row in rows] == ASKED and [row["scores"] for row in rows] == [[0.9, 0.1]] * 2
    with pytest.raises(
        ValueError, match="line 1: a row must have the fields tasks, tries and a question, got meta, tr"
    ):
        read_rows(FILES / "other_names.jsonl", fields=Fields("tasks", samples="tries"))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_compression_is_known_by_its_content(tmp_path, pack) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(pack(json.dumps(ROW).encode()))
    assert read_rows(file) == [ROW]


@needs("zstandard")
def test_zstd(tmp_path) -> None:
    import zstandard

    file = tmp_path / "rows.jsonl"
    file.write_bytes(zstandard.compress(json.dumps(ROW).encode()))
    assert read_rows(file) == [ROW]
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="rows.jsonl.*must be complete zstd"):
        read_rows(file)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_any_damage_to_a_compressed_file_is_a_value_error(tmp_path, pack) -> None:
    draw, file = random.Random(0), tmp_path / "rows.jsonl"
    lines = "".join(json.dumps({**ROW, "noise": draw.randbytes(30).hex()}) + "\n" for _ in range(60))
    packed, seen = pack(lines.encode()), set()
    for _ in range(60):
        damaged = bytearray(packed)
        damaged[draw.randrange(10, len(damaged))] ^= 1 << draw.randrange(8)
        file.write_bytes(bytes(damaged[: draw.randrange(len(damaged) // 2, len(damaged) + 1)]))
        try:
            read_rows(file)
        except ValueError as problem:
            assert str(problem).startswith("rows.jsonl")
            seen.add("error")
    assert seen == {"error"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x00\x01\x02\x03" * 99, "line 1: a row must be JSON"),
        (bytes(range(256)), "the text must be UTF-8"),
        (b"PAR1 is no parquet", "parquet"),
        (b'{\n "question": "q",\n', "line 1: a row must be JSON"),
        (b"[1, 2]", "row 1: a row must be an object"),
    ],
)
def test_other_content_is_one_line(tmp_path, content, message) -> None:
    (tmp_path / "rows.bin").write_bytes(content)
    with pytest.raises((ValueError, ImportError), match=message) as caught:
        read_rows(tmp_path / "rows.bin")
    assert "\n" not in str(caught.value)


def test_json_over_several_lines(tmp_path) -> None:
    for content in (
        json.dumps([ROW, ROW], indent=2),
        json.dumps({"data": [ROW, ROW]}, indent=2),
        json.dumps([ROW, ROW]),
    ):
        (tmp_path / "rows.json").write_text(content)
        assert read_rows(tmp_path / "rows.json") == [ROW, ROW]


def test_samples_that_are_not_text_are_counted(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({**ROW, "generated_answer": [None, 5, {"a": 1}, "The answer is 1"]})
    )
    with pytest.warns(UserWarning, match="rows.jsonl: 2 samples are not text and count as samples without an answer"):
        rows = read_rows(tmp_path / "rows.jsonl")
    assert rows[0]["generated_answer"] == ["", "5", "", "The answer is 1"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_rows(FILES / "vllm.jsonl")


@needs("pyarrow")
def test_parquet_and_the_folder_of_a_saved_dataset(tmp_path) -> None:
    import pyarrow
    from pyarrow import ipc, parquet

    table = pyarrow.Table.from_pylist([ROW, {**ROW, "question": "r"}])
    parquet.write_table(table, tmp_path / "rows.parquet")
    assert read_rows(tmp_path / "rows.parquet") == [ROW, {**ROW, "question": "r"}]
    folder = tmp_path / "saved"
    folder.mkdir()
    with ipc.new_stream(str(folder / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table)
    (folder / "state.json").write_text("{}")
    assert read_rows(folder) == [ROW, {**ROW, "question": "r"}]
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-20] + b"PAR1")
    with pytest.raises(ValueError, match="rows.parquet: the file must be complete parquet"):
        read_rows(tmp_path / "rows.parquet")


def test_an_empty_folder_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"the folder must have files \*.arrow, \*.parquet or \*.jsonl, got none"):
        read_rows(tmp_path)
