"""Random splices of the labelled texts and files: no traceback, no hang, no punctuation as an answer."""

from __future__ import annotations

import json
import random
import time
import warnings
from pathlib import Path

import pytest

from calm_fast.consistency import extract_answer, read_rows
from calm_fast.consistency.answers.equality import normalise, quick_verdict

DATA = Path(__file__).parent / "data"
PIECES = [
    "\\boxed{", "}", "$", "$$", "\\[", "\\]", "\n", "####", "<answer>", "</answer>", "```", "**", "The answer is",
    "答案是", "\\frac", "{", "(", ")", ",", "...", "\x00", "\ud83d", "½", "²", "√(", "٣", "-", "%", "<think>",
    "\\begin{align}", " ",
]  # fmt: skip


def spliced(draw: random.Random, texts: list[str]) -> str:
    parts = []
    for _ in range(draw.randint(1, 4)):
        text = draw.choice(texts)
        start = draw.randrange(len(text) + 1)
        parts += [text[start : start + draw.randint(1, 40)], draw.choice(PIECES) * draw.choice([1, 1, 1, 2, 50])]
    return "".join(parts)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    lines = (DATA / "answers_in_texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def test_any_text_has_an_answer_or_none(texts) -> None:
    draw, slowest = random.Random(0), 0.0
    for _ in range(1500):
        text = spliced(draw, texts)
        start = time.process_time()
        answer = extract_answer(text)
        slowest = max(slowest, time.process_time() - start)
        assert answer is None or (answer == answer.strip() and answer.strip("\"'`*_ .,;:!?-()[]{}$\\#<>/|~")), text
    assert slowest < 2


@pytest.mark.parametrize(
    "piece",
    ["The answer is ", "**", "(", "$", "\\boxed{", "a, ", "1 ", "- 1\n", "<answer>", "#### 1\n", "\\text{", "1,", "{"],
)
def test_long_texts_take_no_more_than_their_length_asks(piece) -> None:
    start = time.process_time()
    for text in (piece * 20_000, "The answer is " + piece * 20_000, "Answer: " + piece * 20_000 + "x"):
        extract_answer(text)
    assert time.process_time() - start < 10


def test_any_two_answers_can_be_compared(texts) -> None:
    draw, start = random.Random(1), time.process_time()
    for _ in range(1000):
        left, right = (spliced(draw, texts)[: draw.randint(1, 60)] for _ in range(2))
        assert isinstance(normalise(left), str)
        assert quick_verdict(left, right) is quick_verdict(right, left), (left, right)
    assert time.process_time() - start < 20


def test_any_damage_to_a_file_is_a_value_error(tmp_path) -> None:
    draw = random.Random(2)
    files = [file.read_bytes() for file in sorted((DATA / "files").iterdir())]
    for _ in range(400):
        content = bytearray(draw.choice(files))
        for _ in range(draw.randint(1, 6)):
            place = draw.randrange(len(content))
            content[place : place + draw.randint(0, 9)] = draw.choice(
                [b"", b"null", b"[", b"{}", b"1e999", b'"', b"\xff"]
            )
        (tmp_path / "rows.json").write_bytes(bytes(content))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                read_rows(tmp_path / "rows.json", need_answer=False)
            except ValueError as problem:
                assert "\n" not in str(problem).strip()
