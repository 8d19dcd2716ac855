"""Files of samples: reading, writing, and errors that name the bad line."""

from __future__ import annotations

import gzip
import json

import pytest

from calm_fast.consistency import read_rows, write_rows

ROW = {"question": "q", "answer": "\\boxed{1}", "generated_answer": ["a", "é \U0001f600 \ud83d"], "scores": [0.5, None]}


def line(**changes) -> str:
    return json.dumps({key: value for key, value in {**ROW, **changes}.items() if value != "absent"})


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_what_is_written_is_read(tmp_path, name) -> None:
    rows = [{**ROW, "question": str(i), "more": {"kept": i}} for i in range(5)]
    write_rows(tmp_path / name, rows)
    assert read_rows(tmp_path / name, scores="scores") == rows
    assert read_rows(tmp_path / name, 2) == rows[:2]
    first = (tmp_path / name).read_bytes()
    assert first.startswith(b"\x1f\x8b") is name.endswith(".gz")
    write_rows(tmp_path / name, rows)
    assert (tmp_path / name).read_bytes() == first


def test_gzip_is_known_by_its_content_and_a_byte_order_mark_is_skipped(tmp_path) -> None:
    (tmp_path / "packed.jsonl").write_bytes(gzip.compress(line().encode()))
    (tmp_path / "marked.jsonl").write_text(line(), encoding="utf-8-sig")
    assert read_rows(tmp_path / "packed.jsonl") == read_rows(tmp_path / "marked.jsonl") == [json.loads(line())]


def test_a_file_is_written_whole_or_not_at_all(tmp_path) -> None:
    write_rows(tmp_path / "rows.jsonl", [ROW])
    with pytest.raises(TypeError):
        write_rows(tmp_path / "rows.jsonl", [ROW, {"bad": object()}])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{", "rows.jsonl, line 3: a row must be JSON"),
        ("[" * 100_000, "line 3: a row must be JSON"),
        ("[]", "line 3: a row must be an object"),
        (line(question=None), "line 3: `question` must be a string, got NoneType"),
        (line(question="absent"), "line 3: `question` must be a string, the field is missing"),
        (line(answer=[3]), "line 3: `answer` must be a string or a finite number, got a list of int"),
        (line(answer=True), "line 3: `answer` must be a string or a finite number, got bool"),
        (line(answer=float("nan")), "line 3: `answer` must be a string or a finite number, got float"),
        (line().replace("0.5", "1" * 5000), "line 3: a row must be JSON"),
        (line(generated_answer="absent"), "line 3: `generated_answer` must be a list of strings, the field is missing"),
        (line(scores="absent"), "line 3: `scores` must be a list of 2 numbers.*the field is missing"),
        (line(scores=[1]), "line 3: `scores` must be a list of 2 numbers.*got 1 values"),
        (line(scores=[1, "2"]), r"`scores\[1\]` must be a finite number or null, got '2'"),
        (line(scores=[True, 1]), r"`scores\[0\]` must be a finite number or null, got True"),
        (line(scores=[1, float("inf")]), r"`scores\[1\]` must be a finite number or null, got inf"),
    ],
    ids=range(15),
)
def test_bad_lines_are_named(tmp_path, bad, message) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(f"{line()}\n\n{bad}\n")
    with pytest.raises(ValueError, match=message):
        read_rows(file, scores="scores")


def test_rows_without_an_answer_only_where_allowed(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(line(answer="absent") + "\n" + line(answer=None))
    assert len(read_rows(file, need_answer=False)) == 2
    with pytest.raises(ValueError, match="line 1: `answer`"):
        read_rows(file)


@pytest.mark.parametrize(
    ("answer", "text"), [(72, "72"), (-0.25, "-0.25"), (1e-7, "0.0000001"), (2e20, "200000000000000000000")]
)
def test_an_answer_may_be_a_number(tmp_path, answer, text) -> None:
    write_rows(tmp_path / "rows.jsonl", [{**ROW, "answer": answer}])
    assert read_rows(tmp_path / "rows.jsonl") == [{**ROW, "answer": text}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file must have at least one row"),
        (b"\n \n", "the file must have at least one row"),
        (b'{"question": "\xff"}', "the text must be UTF-8"),
        (gzip.compress(line().encode(), mtime=0)[:-20], "the file must be complete gzip"),
        (b"\x1f\x8bnothing", "the file must be complete gzip"),
        (gzip.compress(line().encode(), mtime=0)[:10] + b"\xff" * 40, "the file must be complete gzip"),  # zlib.error
    ],
)
def test_bad_files_are_named(tmp_path, content, message) -> None:
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=f"rows.jsonl.*{message}"):
        read_rows(tmp_path / "rows.jsonl")
