"""Grown texts and files: any text has an answer or none, any file has rows or one line of error; no hang, no crash.

The suite runs a few hundred fixed cases. CALM_FAST_FUZZ=20000 tries that many new ones of each kind, for example

    CALM_FAST_FUZZ=20000 python -m pytest tests/consistency/test_fuzz_grown.py tests/consistency/test_fuzz_tables.py

and what they find belongs into data/fuzz.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

from fuzz_checks import check_file, check_pair, check_text  # noqa: E402
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from calm_fast.consistency.voting.formats import ANSWERS, IDS, QUESTIONS, SAMPLES, SCORES, Fields  # noqa: E402

DATA = Path(__file__).parent / "data"
LONG = int(os.environ.get("CALM_FAST_FUZZ", "0"))
grown = settings(
    max_examples=LONG or 250, derandomize=not LONG, database=None, deadline=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip

MARKS = st.sampled_from(
    "\\boxed{ } { $ $$ \\[ \\] \\( \\) #### <answer> </answer> [ANSWER] ``` ** * _ - • 1. ( ) , ; : ... \\frac{ "
    "\\dfrac \\sqrt \\text{ \\mathrm{ \\begin{align} \\end{align} & \\\\ ^ _{ \\overline{ % \\% ° € $ ½ ² √ ∞ π − ٣ 五 "
    "<think> </think> <|im_end|> </s> 答案是 정답은 = + / : e E10 base_{ \\circ \\pm \\le \\infty |x| a.m.".split()
    + ["The answer is ", "Answer:", "Final answer", "the correct option is", "therefore", " and ", " or ", "\n", " "]
)
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.from_regex(r"-?[0-9]{1,40}(\.[0-9]{0,40})?([eE^][-+]?\{?[0-9]{1,12}\}?)?%?", fullmatch=True),
    st.from_regex(r"\\frac\{?[0-9]{1,3}\}?\{?[0-9]{1,3}\}?", fullmatch=True),
    st.from_regex(r"[0-9]{1,2}[:/.-][0-9]{1,2}([:/.-][0-9]{2,4})?", fullmatch=True),
)
PARTS = st.one_of(MARKS, MARKS, NUMBERS, st.text(max_size=12), st.sampled_from("0123456789abcxyzABCDJ"))
TEXTS = st.lists(st.tuples(PARTS, st.sampled_from([1, 1, 1, 1, 2, 30])), max_size=14).map(
    lambda parts: "".join(text * times for text, times in parts)
)


@grown
@given(TEXTS)
def test_any_text_has_an_answer_or_none(text) -> None:
    check_text(text)


@grown
@given(st.one_of(PARTS, TEXTS).map(lambda t: t[:80]), st.one_of(PARTS, TEXTS).map(lambda t: t[:80]))
def test_any_two_answers_are_compared_alike_in_both_orders(left, right) -> None:
    check_pair(left, right)


# ---- files ----------------------------------------------------------------------------------------------------------

LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
    st.sampled_from(["\\boxed{5}", "\ud83d", "user", "{", '{"question": 1}', 1e999]),
)  # fmt: skip
KEYS = st.sampled_from(
    [*QUESTIONS, *ANSWERS, *SAMPLES, *SCORES, *IDS, "message", "content", "role", "from", "value", "text", "logprobs",
     "token_logprobs", "logprob", "doc", "request", "response", "body", "reward_model", "extra_info", "arguments",
     "rows", "row", "row_idx", "data", "samples", "results"]
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=8,
)
ROWS = st.one_of(
    st.dictionaries(KEYS, VALUES, max_size=6),
    st.fixed_dictionaries(
        {"question": LEAVES, "generated_answer": st.lists(LEAVES, max_size=3)},
        optional={"answer": VALUES, "id": LEAVES},
    ),
    st.fixed_dictionaries({"prompt": VALUES, "completion": VALUES}, optional={"solution": VALUES, "reward": VALUES}),
    VALUES,
)
NAMES = st.one_of(st.none(), KEYS, st.just("doc.question"), st.just("."))


@st.composite
def contents(draw: Any) -> bytes:
    rows = draw(st.lists(ROWS, min_size=1, max_size=4))
    form = draw(st.sampled_from(["lines", "array", "indented", "held"]))
    if form == "lines":
        text = "\n".join(json.dumps(row) for row in rows)
    elif form == "held":
        text = json.dumps(
            {draw(st.sampled_from(["rows", "data", "results"])): rows}, indent=draw(st.sampled_from([1, None]))
        )
    else:
        text = json.dumps(rows, indent=2 if form == "indented" else None)
    content = bytearray(text.encode())
    for _ in range(draw(st.sampled_from([0, 0, 1, 4]))):
        place = draw(st.integers(0, len(content)))
        content[place : place + draw(st.integers(0, 9))] = draw(
            st.one_of(
                st.binary(max_size=4), st.sampled_from([b"null", b"[", b"{}", b"1e999", b'"', b"\n", b"[" * 3000])
            )
        )
    content = draw(st.sampled_from([bytes, bytes, gzip.compress, bz2.compress, lzma.compress]))(bytes(content))
    if draw(st.sampled_from([False, False, True])):
        content = content[: draw(st.integers(0, len(content)))]
    return bytes(content)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@grown
@given(contents(), st.builds(Fields, NAMES, NAMES, NAMES, NAMES) | st.none())
def test_any_file_has_rows_or_one_line_of_error(folder, content, fields) -> None:
    check_file(content, folder, fields)


@pytest.mark.parametrize("depth", [100, 300, 600, 900, 3000, 100_000])
@pytest.mark.parametrize("field", ["arguments", "answer", "prompt", "messages", "completions", "resps"])
@pytest.mark.parametrize("around", [("[", "]"), ('{"message":', "}"), ('[{"role":"user","content":', "}]")])
def test_deeply_nested_rows_are_read_or_named(folder, depth, field, around) -> None:
    row = f'{{"id": 1, "completion": "x", "{field}": {around[0] * depth}"5"{around[1] * depth}}}'
    check_file(row.encode(), folder)


# ---- what was found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((DATA / "fuzz").iterdir()), ids=lambda file: file.name)
def test_files_that_were_found_stay_mended(folder, file) -> None:
    if file.suffix in (".arrow", ".parquet"):
        pytest.importorskip("pyarrow")
    check_file(file.read_bytes(), folder)
