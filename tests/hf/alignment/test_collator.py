"""AlignedCollator: a batch gives what its rows give one by one."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from families import FAMILIES, randomize
from many_tokenizers import TEXTS, tokenizer
from transformers import PreTrainedTokenizerFast

from calm_fast.hf import AlignedCollator, ComposedForCausalLM, StreamAligner, compose


def fast(kind: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer(kind), pad_token="<pad>", eos_token="</s>")


ROWS: list[dict[str, Any]] = [
    {"prompt": "The cat sat", "completion": " on the mat, and"},
    {"text": TEXTS[4][:12]},
    {"input_ids": tokenizer("gpt2").encode("for i in range").ids, "prompt_length": 2},
]


def collator(**how: Any) -> AlignedCollator:
    aligners = [StreamAligner(fast("gpt2"), fast("gemma")), None]
    return AlignedCollator(aligners, fast("gpt2"), **how)


def composed() -> ComposedForCausalLM:
    anchor = FAMILIES["llama"].model(0, vocab=700)
    parts = [FAMILIES["llama"].model(seed, vocab=1200) for seed in (1, 2)]
    model = compose(anchor, parts, connections=[(0, 0), (1, 1)], same_ids=True)
    randomize(model)
    return model.eval()


@pytest.mark.parametrize("how", [{"padding_side": "right"}, {"padding_side": "left", "pad_to_multiple_of": 8}])
def test_a_padded_batch_gives_what_its_rows_give(how: dict[str, Any]) -> None:
    model, collate = composed(), collator(**how)
    batch = collate(ROWS)
    with torch.no_grad():
        together = model(**batch).logits
        for index, row in enumerate(ROWS):
            alone = model(**collator()([row])).logits[0]
            real = batch["attention_mask"][index].bool()
            torch.testing.assert_close(together[index][real], alone, atol=1e-4, rtol=1e-4)


def test_padding_is_a_token_that_the_model_embeds() -> None:
    """A padding token that was added to the tokenizer alone is masked, and would still be looked up."""
    tokenizers = fast("gpt2"), fast("gemma")
    for one in tokenizers:
        one.add_special_tokens({"pad_token": f"<new {len(one)}>"})
    anchor, augmenter = (FAMILIES["llama"].model(i, vocab=len(one) - 1) for i, one in enumerate(tokenizers))
    model = randomize(compose(anchor, augmenter, connections=[(0, 0)], tokenizers=tokenizers))
    batch = AlignedCollator(model, tokenizers[0])(ROWS)
    with torch.no_grad():
        got = model(**batch).logits
        for index, row in enumerate(ROWS):
            alone = model(**AlignedCollator(model, tokenizers[0])([row])).logits[0]
            torch.testing.assert_close(got[index][batch["attention_mask"][index].bool()], alone, atol=1e-4, rtol=1e-4)


def test_packed_rows_give_what_they_give_alone() -> None:
    model = composed()
    batch = collator(packed=True)(ROWS)
    with torch.no_grad():
        together = model(**batch, use_cache=False).logits[0]
        alone = torch.cat([model(**collator()([row])).logits[0] for row in ROWS])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    starts = batch["position_ids"][0] == 0
    assert int(starts.sum()) == 3 and bool((batch["labels"][0][starts] == -100).all())


def test_a_batch_of_which_the_augmenter_has_no_token_trains() -> None:
    """The text is held back, because it may go on, and this augmenter's texts have no beginning of their own."""
    row = {"input_ids": tokenizer("gpt2").encode("c").ids}
    aligner = StreamAligner(fast("gpt2"), fast("words"))
    assert aligner.align(row["input_ids"]) == ([], [0] * len(row["input_ids"]))
    collate = AlignedCollator([aligner, None], fast("gpt2"))
    batch = collate([row, row])
    assert batch["augmenter_input_ids"][0].shape == (2, 0)
    model = composed()
    model.train()
    loss = model(**batch, use_cache=False).logits.square().sum()
    loss.backward()
    with torch.no_grad():
        alone = model.eval()(**batch).logits
    assert bool(loss.isfinite()) and torch.equal(alone[0], alone[1])
    packed = AlignedCollator([aligner, None], fast("gpt2"), packed=True)([row, row])
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits[0]
    torch.testing.assert_close(together, alone.flatten(0, 1), atol=1e-4, rtol=1e-4)


def test_labels_leave_out_prompts_and_padding() -> None:
    batch = collator()(ROWS)
    prompt = len(tokenizer("gpt2").encode("The cat sat").ids)
    assert bool((batch["labels"][0, :prompt] == -100).all()) and bool((batch["labels"][0, prompt:] != -100).any())
    assert bool((batch["labels"][batch["attention_mask"] == 0] == -100).all())
    whole = collator(completion_only=False)(ROWS)
    assert torch.equal(whole["labels"][0], whole["input_ids"][0].where(whole["attention_mask"][0] == 1, -100))


def test_ids_and_hi_are_the_aligners_and_none_stands_for_the_anchors_ids() -> None:
    collate = pickle.loads(pickle.dumps(collator()))
    batch, row = collate(ROWS[2:]), ROWS[2]
    ids, hi = collate.aligners[0].align(row["input_ids"], 2)
    assert batch["augmenter_input_ids"][0].tolist() == [ids] and batch["hi"][0].tolist() == [hi]
    assert batch["augmenter_input_ids"][1] is None and batch["hi"][1] is None
    assert "augmenter_input_ids" not in AlignedCollator([None], fast("gpt2"))(ROWS)


def test_a_chat_is_flushed_where_its_answer_begins() -> None:
    tokenizer_ = fast("gpt2")
    tokenizer_.chat_template = (
        "{% for m in messages %}<|user|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|user|>assistant: {% endif %}"
    )
    collate = AlignedCollator([StreamAligner(tokenizer_, fast("gemma"))], tokenizer_)
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "cat"}]
    row = collate.row({"messages": chat})
    assert tokenizer("gpt2").decode(row.ids[: row.prompt_length], skip_special_tokens=False).endswith("assistant: ")
    assert row.labels[: row.prompt_length] == [-100] * (row.prompt_length or 0)
    assert tokenizer("gpt2").decode(row.ids[row.prompt_length :]) == "cat\n"


@pytest.mark.parametrize("kind", ["llama2", "unigram", "gpt2"])
@pytest.mark.parametrize("gap", [" ", "\n", ""])
def test_the_answer_of_a_chat_gets_no_dummy_space(kind: str, gap: str) -> None:
    tokenizer_ = fast(kind)
    tokenizer_.chat_template = (
        "{% for m in messages %}{{ m.role }}:GAP{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}assistant:GAP{% endif %}"
    ).replace("GAP", gap)
    row = AlignedCollator([], tokenizer_).row({
        "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The cat"}]
    })  # fmt: skip
    answer = row.ids[row.prompt_length :]
    assert tokenizer_.decode(row.ids, skip_special_tokens=True).endswith(f"assistant:{gap}The cat")
    assert answer[-1] == tokenizer_.convert_tokens_to_ids("</s>")


def test_variables_of_the_template_reach_it() -> None:
    tokenizer_ = fast("gpt2")
    tokenizer_.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if thinking %}!{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a: cat"}]
    row = AlignedCollator([], tokenizer_, chat_template_kwargs={"thinking": True}).row({"messages": chat})
    assert tokenizer("gpt2").decode(row.ids).replace("\n", "") == "Hi!a: cat!"
    with pytest.raises(TypeError, match="`chat_template_kwargs` must be a dict or None, got str"):
        AlignedCollator([], tokenizer_, chat_template_kwargs="thinking")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{}], "`rows` must be dicts .* remove_unused_columns=False"),
        ([{"words": "a"}], "`rows` must be dicts with .* got a row with 'words'"),
        ([{"input_ids": [1, 2], "labels": [1]}], "`labels` must be one per token of the row .2., got 1 labels"),
        ([{"input_ids": [1, 2], "prompt_length": 3}], "`prompt_length` must be from 0 to 2"),
        ([{"input_ids": []}], "`rows` must be rows of at least one token"),
    ],
)
def test_errors_say_what_a_row_lacks(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collator()(rows)
