"""Rows, grading and tokenised examples."""

from __future__ import annotations

import copy
import gzip
import json
import warnings

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from calm_fast.nat import Example, RationaleDataset, read_rows, split_rationales
from calm_fast.nat.data import IGNORE, RightPadding


def test_rows_are_read_plain_and_gzipped(tmp_path, rows_file) -> None:
    plain = read_rows(rows_file)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(rows_file.read_bytes()))
    assert read_rows(packed) == plain and len(plain) == 24
    assert read_rows(rows_file, limit=3) == plain[:3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: a row must be JSON"),
        ("[]", "line 2: a row must be an object"),
        (json.dumps({"question": "q", "answer": [3], "generated_answer": []}), "line 2: `answer` must be a string"),
        (json.dumps({"question": "q", "answer": "a"}), "`generated_answer` must be a list of strings"),
    ],
)
def test_bad_rows_are_named(tmp_path, line, message) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "a", "generated_answer": []}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_rows(file)


def test_samples_that_are_not_text_are_told_and_not_trained_on(tmp_path) -> None:
    file = tmp_path / "rows.jsonl"
    row = {"question": "q", "answer": "7", "generated_answer": [None, "so 7", {"a": 1}, " "]}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"generated_answer": [None]}) + "\n")
    with pytest.warns(UserWarning, match="3 samples are not text"):
        rows = read_rows(file)
    with pytest.warns(UserWarning, match="1 with an empty `generated_answer`"):
        right, wrong = split_rationales(rows, progress=False)
    assert [example.rationale for example in right + wrong] == ["so 7"]


def test_rationales_are_split_by_their_answer_once_each() -> None:
    row = {
        "question": "q",
        "answer": r"so \boxed{\frac{1}{2}}",
        "generated_answer": [r"\boxed{0.5}", r"\boxed{0.5}", r"\boxed{2}", "no answer at all"],
    }
    right, wrong = split_rationales([row], progress=False)
    assert right == [Example("q", r"\boxed{0.5}")]
    assert wrong == [Example("q", r"\boxed{2}"), Example("q", "no answer at all")]


@pytest.mark.parametrize("answer", ["72", 72, 72.0, "so 71 + 1 = \\boxed{72}", "The answer is 72."])
def test_an_answer_is_a_solution_or_the_answer_itself(answer) -> None:
    row = {"question": "q", "answer": answer, "generated_answer": [r"\boxed{72}", "The answer is 7."]}
    right, wrong = split_rationales([row], progress=False)
    assert right == [Example("q", r"\boxed{72}")] and wrong == [Example("q", "The answer is 7.")]


def test_rows_that_give_nothing_are_counted_with_the_reason() -> None:
    good = {"question": "q", "answer": "1", "generated_answer": [r"\boxed{1}"]}
    blank, empty = {**good, "answer": " "}, {**good, "generated_answer": []}
    with pytest.warns(UserWarning, match=r"left out 3 rows: 2 with a blank `answer`, 1 with an empty `generated_an"):
        right, wrong = split_rationales([blank, good, empty, blank], progress=False)
    assert right == [Example("q", r"\boxed{1}")] and wrong == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_rationales([good], progress=False)


def test_the_loss_covers_the_rationale_and_the_end(tiny) -> None:
    _, tok, rows = tiny
    example = Example(rows[5]["question"], rows[5]["generated_answer"][0])
    item = RationaleDataset([example], tok)[0]
    covered = [i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label != IGNORE]
    assert tok.decode(covered[:-1]) == example.rationale and covered[-1] == tok.eos_token_id
    assert tok.decode(item["input_ids"][: -len(covered)]) == example.question + "\n"
    assert all(label in (IGNORE, i) for i, label in zip(item["input_ids"], item["labels"], strict=True))


def test_a_tokenizer_that_ends_every_text_ends_the_question_not(tiny) -> None:
    """As T5's and BART's do: an end token behind the question would separate it from its rationale."""
    _, tok, _ = tiny
    ending = copy.deepcopy(tok)
    end = (tok.eos_token, tok.eos_token_id)
    ending.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    assert ending("What")["input_ids"][-1] == tok.eos_token_id
    example = Example("What is 1 + 1?", "We add: 2")
    assert RationaleDataset([example], ending)[0] == RationaleDataset([example], tok)[0]


def test_long_examples_keep_half_the_window_for_the_question(tiny) -> None:
    _, tok, _ = tiny
    item = RationaleDataset([Example("What is " * 50, "We add: " * 50)], tok, max_length=20)[0]
    assert len(item["input_ids"]) == len(item["labels"]) == 20
    assert item["labels"][:10] == [IGNORE] * 10 and IGNORE not in item["labels"][10:]


def test_a_long_question_keeps_the_token_that_begins_every_text(tiny) -> None:
    _, tok, _ = tiny
    begins = copy.deepcopy(tok)
    begins.bos_token = tok.eos_token
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tok.eos_token} $A", special_tokens=[(tok.eos_token, tok.eos_token_id)]
    )
    item = RationaleDataset([Example("What is " * 50, "We add: " * 50)], begins, max_length=20, prompt="plain")[0]
    ids = begins("What is " * 50 + "\n")["input_ids"]
    assert item["input_ids"][:10] == [begins.bos_token_id, *ids[-9:]] and len(item["input_ids"]) == 20


def test_batches_are_padded_on_the_right(tiny) -> None:
    _, tok, rows = tiny
    data = RationaleDataset([Example("What", "We"), Example(rows[0]["question"], "We add")], tok)
    batch = RightPadding(tok.pad_token_id)([data[0], data[1]])
    lengths = [len(data[0]["input_ids"]), len(data[1]["input_ids"])]
    assert batch["input_ids"].shape == batch["labels"].shape == (2, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    padded = ~batch["attention_mask"].bool()
    assert padded.any() and (batch["input_ids"][padded] == tok.pad_token_id).all()
    assert (batch["labels"][padded] == IGNORE).all() and batch["input_ids"].dtype == torch.int64


def test_empty_data_and_tokenizers_without_end_are_refused(tiny) -> None:
    _, tok, _ = tiny
    with pytest.raises(ValueError, match="`examples` must hold"):
        RationaleDataset([], tok)

    class NoEnd:
        eos_token_id = None

    with pytest.raises(ValueError, match="end-of-sequence"):
        RationaleDataset([Example("q", "r")], NoEnd())


@pytest.mark.parametrize("half", [Example("3 + \ud83d", "7"), Example("3 + 4", "\ud83d 7")])
def test_half_a_character_is_named(tiny, half) -> None:
    words = r"RationaleDataset: `examples\[1\]` must be text, got half a character"
    with pytest.raises(ValueError, match=words):
        RationaleDataset([Example("3 + 4", "7"), half], tiny[1])
