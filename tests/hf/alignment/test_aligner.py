"""StreamAligner: augmenter ids as an append-only function of the anchor's ids."""

from __future__ import annotations

import functools
import json
import pickle
import random
import unicodedata

import pytest
import torch
from many_tokenizers import KINDS, LOSSLESS, TEXTS, random_ids, random_text, tokenizer
from transformers import PreTrainedTokenizerFast

from calm_fast.hf import StreamAligner

PAIRS = [*((b, a) for b, a in zip(KINDS, KINDS[1:] + KINDS[:1], strict=True)), ("gpt2", "gemma"), ("gemma", "gpt2")]
COMMITS = ("probe", "whitespace")


@functools.cache
def aligner(anchor: str, augmenter: str, commit: str) -> StreamAligner:
    return StreamAligner(tokenizer(anchor), tokenizer(augmenter), commit)


def own_ids(a: str, text: str) -> list[int]:
    """Return the ids that a tokenizer gives a text itself, in which the names of special tokens are text."""
    inner = tokenizer(a)
    inner.encode_special_tokens = True
    ids = inner.encode(text).ids
    inner.encode_special_tokens = False
    return ids[:-1] if a in ("gemma", "llama2") else ids  # without the end-of-text token


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize(("b", "a"), PAIRS)
def test_a_prefix_has_a_prefix_of_the_ids_and_every_way_gives_the_same(b: str, a: str, commit: str) -> None:
    one, source = aligner(b, a, commit), random.Random(b + a)
    rows = [random_ids(source, b) for _ in range(100)]
    prompts = [source.choice([None, source.randrange(len(row) + 1)]) for row in rows]
    batch = one.align_batch(rows, prompts)
    for row, prompt, (ids, hi) in zip(rows, prompts, batch, strict=True):
        assert one.align(row, prompt) == (ids, hi)
        assert len(hi) == len(row) and hi == sorted(hi) and (not hi or hi[-1] == len(ids))
        cut = source.randrange(len(row) + 1)
        shorter = one.align(row[:cut], prompt if prompt is not None and prompt <= cut else None)
        assert shorter == (ids[: hi[cut - 1] if cut else 0], hi[:cut])
        one.reset()
        fed: list[int] = []
        for index, token_id in enumerate(row, 1):
            fed += one.feed(token_id)
            if index == prompt:
                fed += one.flush()
        assert fed == ids


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize(("b", "a"), [pair for pair in PAIRS if pair[1] in LOSSLESS])
def test_after_a_flush_the_augmenter_has_read_the_anchors_text(b: str, a: str, commit: str) -> None:
    one, source = aligner(b, a, commit), random.Random(a + b)
    for _ in range(100):
        row = random_ids(source, b)
        state, ids = one.start(), []
        for token_id in row:
            state, new = one.step(state, token_id)
            ids += new
        state, new = one.finish(state)
        pending = one.detokenizer.rest(state.reading)  # half a character
        text = tokenizer(b).decode(row, skip_special_tokens=True)
        assert tokenizer(a).decode(ids + new, skip_special_tokens=True) + pending == text


@pytest.mark.parametrize("commit", COMMITS)
@pytest.mark.parametrize("a", KINDS[:4])
def test_a_text_without_a_pause_has_the_augmenters_own_ids(a: str, commit: str) -> None:
    b = "gpt2" if a != "gpt2" else "gemma"
    one, source = aligner(b, a, commit), random.Random(a)
    texts = TEXTS + ["".join(random_text(source) for _ in range(3)).replace("<s>", "") for _ in range(60)]
    different = []
    for text in texts:
        row = tokenizer(b).encode(text, add_special_tokens=False).ids
        text = tokenizer(b).decode(row, skip_special_tokens=True)
        if one.align(row, len(row))[0] != own_ids(a, text):
            different.append(text)
    assert not different


def test_probe_reads_languages_without_spaces_soon_and_whitespace_does_not() -> None:
    for text in TEXTS[4:7]:
        row = tokenizer("gpt2").encode(text).ids
        late = {commit: aligner("gpt2", "gemma", commit).align(row)[1] for commit in COMMITS}
        assert late["probe"][len(row) // 2] > late["whitespace"][len(row) // 2] + 3


def test_the_augmenters_own_beginning_comes_once_before_all_text() -> None:
    one = aligner("gpt2", "gemma", "probe")
    assert one.beginning == [1]
    row = tokenizer("gpt2").encode("a cat").ids
    ids, hi = one.align(row, len(row))
    assert ids.count(1) == 1 and ids[0] == 1 and hi[0] >= 1
    mapped = StreamAligner(tokenizer("gpt2"), tokenizer("gemma"), special={"<s>": "<s>"})
    assert mapped.align([1, *row])[0].count(1) == 1
    assert mapped.align([*row, 1, *row])[0].count(1) == 2


def test_special_tokens_are_what_the_table_says_and_flush() -> None:
    b, a = tokenizer("gpt2"), tokenizer("gemma")
    cat, user = b.encode("a cat").ids, b.token_to_id("<|user|>")
    silent = aligner("gpt2", "gemma", "probe")
    ids, hi = silent.align([*cat, user, *cat])
    assert a.decode(ids[: hi[len(cat)]]) == "a cat"
    assert user not in ids
    named = StreamAligner(b, a, special={user: "<|user|> says:"})
    ids, _ = named.align([*cat, user, *cat], 2 * len(cat) + 1)
    assert ids.count(a.token_to_id("<|user|>")) == 1
    assert a.decode(ids, skip_special_tokens=False) == "<s>a cat<|user|> says:a cat"


def test_text_that_looks_like_a_special_token_stays_text() -> None:
    b, a = tokenizer("gpt2"), tokenizer("gemma")
    b.encode_special_tokens = True
    row = b.encode("x </s> y").ids
    b.encode_special_tokens = False
    ids, _ = aligner("gpt2", "gemma", "probe").align(row, len(row))
    assert 2 not in ids and a.decode(ids) == "x </s> y"


def test_a_word_of_wordpiece_goes_on_after_a_pause() -> None:
    b, a = tokenizer("gpt2"), tokenizer("wordpiece")
    prompt, rest = b.encode("the str").ids, b.encode("aße").ids
    one = aligner("gpt2", "wordpiece", "probe")
    state, ids = one.start(), []
    for row in (prompt, rest):
        for token_id in row:
            state, new = one.step(state, token_id)
            ids += new
        state, new = one.finish(state)
        ids += new
    assert a.decode(ids) == "the straße"


def test_max_lag_bounds_how_long_text_is_held() -> None:
    b = tokenizer("gpt2")
    row = b.encode(TEXTS[4]).ids
    free, bound = aligner("gpt2", "gemma", "whitespace"), StreamAligner(b, tokenizer("gemma"), "whitespace", max_lag=4)
    assert free.align(row)[1][-1] == 1
    state, waits = bound.start(), []
    for token_id in row:
        state, _ = bound.step(state, token_id)
        waits.append(state.waiting)
    assert max(waits) == 4


def test_settings_are_json_and_come_back_through_them_and_pickle() -> None:
    fast = [PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind)) for kind in ("gpt2", "gemma")]
    one = StreamAligner(*fast, "whitespace", special={"<s>": "start"}, max_lag=9)
    settings = json.loads(json.dumps(one.settings()))
    assert settings == {"commit": "whitespace", "special": {"<s>": "start"}, "max_lag": 9}
    row = tokenizer("gpt2").encode("<s>" + TEXTS[0]).ids
    for again in (StreamAligner.from_settings(*fast, settings), pickle.loads(pickle.dumps(one))):
        assert again.settings() == settings and again.align(row, 5) == one.align(row, 5)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"commit": "words"}, "`commit` must be 'whitespace' or 'probe', got"),
        ({"max_lag": 0}, "`max_lag` must be a positive integer or None, got int 0"),
        ({"special": {"<x>": "a"}}, "`special` must be .*'<x>', which is no special token of the anchor"),
        ({"special": {"<s>": 3}}, r"`special\['<s>'\]` must be a string"),
    ],
)
def test_errors_name_the_argument(how: dict[str, object], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        StreamAligner(tokenizer("gpt2"), tokenizer("gemma"), **how)  # type: ignore[arg-type]  # what is wrong


def test_a_prompt_longer_than_the_row_is_refused() -> None:
    with pytest.raises(ValueError, match="`prompt_length` must be from 0 to 2 or None, got 3"):
        aligner("gpt2", "gemma", "probe").align([5, 6], 3)


def test_unicode_normal_forms_wait_for_marks() -> None:
    one = aligner("gpt2", "llama3", "probe")
    row = tokenizer("gpt2").encode("cafe\u0301 e\u0301").ids
    ids, _ = one.align(row, len(row))
    assert tokenizer("llama3").decode(ids) == unicodedata.normalize("NFC", "cafe\u0301 e\u0301")


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda one: one.feed(-1), ValueError, "`b_id` must be a token id of the anchor, from 0 on, got -1"),
        (lambda one: one.feed("a"), TypeError, "`b_id` must be a token id of the anchor, an integer, got str 'a'"),
        (lambda one: one.align("text"), TypeError, "`b_ids` must be token ids of the anchor, got str 'text'"),
        (lambda one: one.align(None), TypeError, "`b_ids` must be token ids of the anchor, got NoneType None"),
        (lambda one: one.align([3, 1.0]), TypeError, "`b_ids` must be a token id of the anchor, an integer, got float"),
        (lambda one: one.align([3, -7]), ValueError, "`b_ids` must be a token id of the anchor, from 0 on, got -7"),
    ],
)
def test_what_is_no_token_id_is_named(call, kind: type[Exception], words: str) -> None:
    one = StreamAligner(tokenizer("gpt2"), tokenizer("gemma"))
    with pytest.raises(kind, match=f"^StreamAligner: {words}"):
        call(one)
    assert one.feed(torch.tensor(5)) == StreamAligner(tokenizer("gpt2"), tokenizer("gemma")).feed(5)
