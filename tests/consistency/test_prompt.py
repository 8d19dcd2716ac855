"""One form of prompts: training, sampling and scoring build the same ids, and an adapter remembers its form."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
from tiny_models import FAMILIES, character_tokenizer
from tokenizers.processors import TemplateProcessing

from calm_fast import SelfConsistency, load_dual_lora, nat, remove_dual_lora, save_dual_lora, save_lora_adapter
from calm_fast.consistency import score_sequences
from calm_fast.consistency.sampling.prompt import PLAIN, prompt_form
from calm_fast.nat.data import IGNORE

CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)
SETTINGS = nat.Settings(steps=1, batch_size=1, rank=1, gate_dim=1, value_dim=1, save_every=0, progress=False)


def tokenizer(template: str | None = CHAT) -> Any:
    """One token per character; `^` begins every text, and the template writes it too."""
    tok = character_tokenizer()
    tok.add_special_tokens({"bos_token": "^"})
    post = TemplateProcessing(single="^ $A", special_tokens=[("^", tok.bos_token_id)])
    tok.backend_tokenizer.post_processor = post
    tok.chat_template = template
    return tok


def asked(prompt: Any, tok: Any, model: Any = None) -> str:
    """The prompt that SelfConsistency feeds for "1+1?", as text."""
    run = SelfConsistency(model or FAMILIES["llama"].model(0), tok, rule="count", prompt=prompt, progress=False)
    return tok.decode(run._prompt_ids("1+1?"))


def taught(prompt: Any, tok: Any, question: str = "1+1?", max_length: int = 512) -> str:
    """The part of a training example that is no label, as text."""
    item = nat.RationaleDataset([nat.Example(question, "2")], tok, max_length, prompt=prompt)[0]
    return tok.decode([i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label == IGNORE])


@pytest.mark.parametrize(
    ("prompt", "template", "want"),
    [
        (None, CHAT, "^[1+1?]A:"),
        (None, None, "^1+1?\n"),
        ("chat", CHAT, "^[1+1?]A:"),
        ("plain", CHAT, "^1+1?\n"),
        ("Q {question} A", CHAT, "^Q 1+1? A"),
        (lambda q: f"Q {q}", CHAT, "^Q 1+1?"),
        (lambda q: f"^[{q}]A:", CHAT, "^[1+1?]A:"),  # fills the template itself: no second beginning
        (lambda q: tokenizer()(q)["input_ids"][1:], CHAT, "1+1?"),  # ids are taken as they are
        (lambda q: tokenizer()([q], return_tensors="pt")["input_ids"][0], CHAT, "^1+1?"),
    ],
)
def test_training_and_asking_build_the_same_prompt(prompt, template, want) -> None:
    tok = tokenizer(template)
    assert asked(prompt, tok) == taught(prompt, tok) == want


def test_a_tokenizer_that_ends_every_text_ends_no_prompt() -> None:
    tok = tokenizer(None)
    end = [("^", tok.bos_token_id), (tok.eos_token, tok.eos_token_id)]
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=f"^ $A {tok.eos_token}", special_tokens=end)
    assert asked(None, tok) == taught(None, tok) == "^1+1?\n"


@pytest.mark.parametrize("ends", [False, True])
def test_a_scored_prompt_begins_once_and_is_not_ended(ends) -> None:
    """A text that a chat template made, and a tokenizer that ends every text."""
    tok, model = tokenizer(), FAMILIES["llama"].model(0)
    want = score_sequences(model, [tok("[1+1?]A:")["input_ids"]], [[tok("2")["input_ids"][1:]]])[0].sum
    if ends:
        end = [("^", tok.bos_token_id), (tok.eos_token, tok.eos_token_id)]
        tok.backend_tokenizer.post_processor = TemplateProcessing(single=f"^ $A {tok.eos_token}", special_tokens=end)
    for prompt in ("^[1+1?]A:", "[1+1?]A:"):
        assert score_sequences(model, [prompt], [["2"]], tokenizer=tok)[0].sum.tolist() == want.tolist()


def test_a_long_question_loses_its_beginning_and_the_template_nothing() -> None:
    tok = tokenizer()
    assert taught(None, tok, "0123456789" * 5, max_length=24) == f"^[{('0123456789' * 5)[-17:]}]A:"
    assert taught("plain", tok, "0123456789" * 5, max_length=24) == f"^{('0123456789' * 5)[-20:]}\n"
    with pytest.raises(ValueError, match="RationaleDataset: `max_length` must leave room for the chat template, 5 tok"):
        taught(None, tok, "1+1?", max_length=6)


@pytest.mark.parametrize(
    ("prompt", "template", "kind", "message"),
    [
        (
            "chat",
            None,
            ValueError,
            "`prompt` must be 'plain' or .*, got 'chat', and the tokenizer has no",
        ),
        ("Q:", CHAT, ValueError, r"`prompt` must have \{question\} in it, or be 'chat' or 'plain', got 'Q:'"),
        (3, CHAT, TypeError, "`prompt` must be a string, a callable, the path of an adapter or None, got int 3"),
        (
            Path("nowhere"),
            CHAT,
            ValueError,
            "`prompt` must be the folder of an adapter .*, got nowhere",
        ),
    ],
)
def test_bad_prompts_are_named(prompt, template, kind, message) -> None:
    for where, call in (("SelfConsistency", asked), ("RationaleDataset", taught)):
        with pytest.raises(kind, match=f"{where}: {message}"):
            call(prompt, tokenizer(template))


def trained(tok: Any, out: Path, prompt: Any = None) -> Any:
    model = FAMILIES["llama"].model(0)
    data = nat.RationaleDataset([nat.Example("1+1?", "2")], tok, prompt=prompt)
    nat.train_negative(model, data, tok.pad_token_id, out / "checkpoints", SETTINGS)
    save_dual_lora(model, out / "nat")
    save_lora_adapter(model, out / "negative", "neg")
    return model


@pytest.mark.seam(
    attach="`SelfConsistency` on adapters that `nat` trained",
    to="NAT",
    result="works",
    why="the adapter's prompt.json keeps the form of its prompts; load_dual_lora and prompt=Path(adapter) read it",
)
def test_a_trained_model_is_asked_as_it_was_taught(tmp_path) -> None:
    tok = tokenizer()
    model = trained(tok, tmp_path, "plain")  # not what the template would give
    want = {"format_version": 1, "chat_template": None, "text": PLAIN, "function": None}
    for folder in ("nat", "negative"):
        assert json.loads((tmp_path / folder / "prompt.json").read_text()) == want
    loaded = load_dual_lora(FAMILIES["llama"].model(0), tmp_path / "nat")
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert asked(None, tok, one) == "^1+1?\n"
    assert asked(tmp_path / "negative", tok) == "^1+1?\n"  # an adapter that PEFT loaded
    with pytest.warns(UserWarning, match="`prompt` differs from the form that `model` was trained with"):
        assert asked("chat", tok, loaded) == "^[1+1?]A:"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked("plain", tok, loaded)
    assert asked(None, tok, remove_dual_lora(loaded)) == "^[1+1?]A:"


@pytest.mark.seam(
    attach="`SelfConsistency` with another chat template than in training",
    to="NAT",
    result="refused",
    why="load the tokenizer of the training, or name `prompt`",
)
def test_another_chat_template_is_refused(tmp_path) -> None:
    trained(tokenizer(), tmp_path)
    loaded = load_dual_lora(FAMILIES["llama"].model(0), tmp_path / "nat")
    assert asked(None, tokenizer(), loaded) == asked(tmp_path / "nat", tokenizer()) == "^[1+1?]A:"
    for other in (CHAT + " ", None):
        for prompt, model in ((None, loaded), (tmp_path / "nat", None)):
            with pytest.raises(ValueError, match="`tokenizer` must be one with the chat template that the"):
                asked(prompt, tokenizer(other), model)


def test_a_function_is_known_by_its_name_alone(tmp_path) -> None:
    tok = tokenizer()
    model = trained(tok, tmp_path, shout)
    with pytest.raises(ValueError, match="`prompt` must be the function that made the prompts .*test_prompt.shout"):
        asked(None, tok, model)
    assert asked(shout, tok, model) == "^1+1?!"
    assert prompt_form(shout, tok, "x").record()["function"].endswith("test_prompt.shout")


def shout(question: str) -> str:
    return f"{question}!"


def test_damaged_records_are_named(tmp_path) -> None:
    trained(tokenizer(), tmp_path)
    for content, message in (
        ("{", "can be read"),
        ("[]", "can be read"),
        ('{"format_version": 3}', "format version 1 or 2"),
    ):
        (tmp_path / "nat" / "prompt.json").write_text(content)
        with pytest.raises(ValueError, match=f"load_dual_lora: `folder` must be .* prompt.json .*{message}"):
            load_dual_lora(FAMILIES["llama"].model(0), tmp_path / "nat")
