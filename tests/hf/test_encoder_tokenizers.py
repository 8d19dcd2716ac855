"""Bidirectional augmenters with a tokenizer of their own: they read what it makes of the prompt's text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from encoders import encoder
from families import randomize
from texts import model_of, rows, tokenizer
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from calm_fast.hf import AlignedCollator, ComposedForCausalLM, StreamAligner, compose

TEXTS = ("the cat sat on the mat", "der Hund läuft über die Straße", "a  small model </s> reads ", "x", "")
ANSWER = " and the dog ran"


def wordpiece() -> Any:
    """Return a tokenizer of BERT's kind, which puts a token before and one behind every text."""
    inner = Tokenizer.from_str(tokenizer("wordpiece").backend_tokenizer.to_str())
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", cls_token="<s>", sep_token="</s>", unk_token="[UNK]"
    )


def composed(mode: str = "prompt", **kwargs: Any) -> ComposedForCausalLM:
    own, theirs = tokenizer("bytes"), wordpiece()
    model = compose(
        model_of("llama", "bytes", 0),
        encoder("bert", vocab=len(theirs)),
        [(-1, -1), (0, 1), (2, 2)],
        bidirectional=mode,
        tokenizers=[own, theirs],
        **kwargs,
    )
    return randomize(model)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_whole_text_has_the_ids_of_the_encoders_own_tokenizer(kind: str, text: str) -> None:
    own, theirs = tokenizer(kind), wordpiece()
    ids = own(text)["input_ids"]
    shown = own.decode(ids, skip_special_tokens=True)
    found = StreamAligner(own, theirs).whole(ids)
    if "</s>" not in text:
        assert found == theirs(shown)["input_ids"]
    assert found[0] == 1 and found[-1] == 2 and 2 not in found[1:-1]


def test_special_tokens_of_the_anchor_may_stand_for_a_text() -> None:
    own, theirs = tokenizer("bytes"), wordpiece()
    words = [own(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "the dog")]
    ids = [1, *words[0], 2, *words[1]]
    aligner = StreamAligner(own, theirs, special={"</s>": "</s>", "<s>": "<s>"})
    one, two = (theirs(text, add_special_tokens=False)["input_ids"] for text in ("the cat", "the dog"))
    assert aligner.whole(ids) == [1, *one, 2, *two, 2]
    assert StreamAligner(own, theirs).whole(ids) == theirs("the catthe dog")["input_ids"]


def test_half_a_character_at_the_end_is_not_shown() -> None:
    own, theirs = tokenizer("bytes"), wordpiece()
    ids = own("cat 漢", add_special_tokens=False)["input_ids"]
    assert StreamAligner(own, theirs).whole(ids[:-1]) == theirs("cat ")["input_ids"]


def test_the_encoder_reads_the_prompt_in_its_own_tokens() -> None:
    model, (ids, mask) = composed(), rows("the cat sat on", "der Hund")
    seen: list[torch.Tensor] = []
    hook = model.augmenters[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        model(ids, attention_mask=mask)
    hook.remove()
    pad = model.augmenters[0].config.pad_token_id
    expected = [wordpiece()(text)["input_ids"] for text in ("the cat sat on", "der Hund")]
    assert len(seen) == 3  # the trial with padding, and without
    assert [[i for i in row if i != pad] for row in seen[-1].tolist()] == expected


@pytest.mark.parametrize("mode", ["prompt", "reencode"])
@pytest.mark.parametrize("beams", [1, 3])
def test_a_cache_changes_no_token_and_rows_are_those_alone(mode: str, beams: int) -> None:
    model, (ids, mask) = composed(mode), rows("the cat sat on", "der Hund")
    how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "num_beams": beams}
    together = model.generate(ids, attention_mask=mask, **how)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, use_cache=False, **how))
    first = int(mask[1].argmax())
    assert torch.equal(together[1:, first:], model.generate(ids[1:, first:], **how))


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_says_where_prompts_end(side: str) -> None:
    model, own = composed(), tokenizer("bytes")
    pairs = [("the cat", ANSWER), ("der Hund läuft", " und die Katze"), ("one", " two")]
    collate = AlignedCollator(model, own, padding_side=side)
    batch = collate([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    lengths = [len(own(prompt)["input_ids"]) for prompt, _ in pairs]
    pads = (1 - batch["attention_mask"]).sum(1).tolist()
    expected = [n + pad if side == "left" else n for n, pad in zip(lengths, pads, strict=True)]
    assert batch["prompt_length"].tolist() == expected and "augmenter_input_ids" not in batch
    loss = model(**batch).loss
    alone = [collate([{"prompt": prompt, "completion": answer}]) for prompt, answer in pairs]
    weights = torch.tensor([(one["labels"] != -100).sum() for one in alone]).float()
    losses = torch.stack([model(**one).loss for one in alone])
    torch.testing.assert_close(loss, (losses * weights).sum() / weights.sum())
    model.train()
    model(**batch).loss.backward()
    assert all(p.grad is not None for p in model.connections.parameters())


def test_the_collator_refuses_rows_without_a_prompt_and_packed_rows() -> None:
    model, own = composed(), tokenizer("bytes")
    with pytest.raises(ValueError, match="`rows` must be rows with a prompt, because an augmenter is bidirectional"):
        AlignedCollator(model, own)([{"text": "the cat"}])
    with pytest.raises(ValueError, match="`packed` must be False for a bidirectional augmenter"):
        AlignedCollator(model, own, packed=True)


def test_a_saved_composition_carries_the_encoders_tokenizer(tmp_path: Path) -> None:
    model = composed("reencode", alignment={"special": {"</s>": "."}})
    model.save_pretrained(tmp_path)
    loaded = ComposedForCausalLM.from_pretrained(tmp_path, anchor=model.anchor, augmenters=model.augmenters[0])
    ids, mask = rows("the cat sat on", "der Hund")
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": mask}
    assert torch.equal(model.generate(ids, **how), loaded.generate(ids, **how))
    assert loaded.aligners[0].settings() == model.aligners[0].settings()
