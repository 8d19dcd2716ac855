"""Chat prompts: a system turn, variables of the template, turns and ids from a function, one beginning."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import typer
from tiny_models import FAMILIES, character_tokenizer
from tokenizers.processors import TemplateProcessing

from calm_fast import SelfConsistency, load_dual_lora, nat, save_dual_lora
from calm_fast.cli.common import template_variables
from calm_fast.cli.compose import generate
from calm_fast.core.token_ids import prompt_ids
from calm_fast.nat.data import IGNORE

CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'][0] }}[{{ m['content'] }}]{% endfor %}"
    "{% if enable_thinking is defined and not enable_thinking %}!{% endif %}{% if add_generation_prompt %}A:{% endif %}"
)
QUIET = {"enable_thinking": False}


def tokenizer(template: str | None = CHAT) -> Any:
    """One token per character; `^` begins every text, and the template writes it too."""
    tok = character_tokenizer()
    tok.add_special_tokens({"bos_token": "^"})
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="^ $A", special_tokens=[("^", tok.bos_token_id)])
    tok.chat_template = template
    return tok


def asked(tok: Any, model: Any = None, **form: Any) -> str:
    run = SelfConsistency(model or FAMILIES["llama"].model(0), tok, rule="count", progress=False, **form)
    return tok.decode(run._prompt_ids("1+1?"))


def taught(tok: Any, **form: Any) -> str:
    item = nat.RationaleDataset([nat.Example("1+1?", "2")], tok, **form)[0]
    return tok.decode([i for i, label in zip(item["input_ids"], item["labels"], strict=True) if label == IGNORE])


def turns(question: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "S"}, {"role": "user", "content": question}]


@pytest.mark.parametrize(
    ("form", "want"),
    [
        ({"system": "S"}, "^s[S]u[1+1?]A:"),
        ({"chat_template_kwargs": QUIET}, "^u[1+1?]!A:"),
        ({"prompt": "chat", "system": "S", "chat_template_kwargs": QUIET}, "^s[S]u[1+1?]!A:"),
        ({"prompt": turns}, "^s[S]u[1+1?]A:"),
        ({"prompt": turns, "chat_template_kwargs": QUIET}, "^s[S]u[1+1?]!A:"),
        ({"prompt": lambda q: tokenizer().apply_chat_template(turns(q))}, "^s[S]u[1+1?]"),
        ({"prompt": lambda q: tokenizer().apply_chat_template(turns(q), return_tensors="pt")}, "^s[S]u[1+1?]"),
        ({"prompt": lambda q: tokenizer().apply_chat_template(turns(q), tokenize=False)}, "^s[S]u[1+1?]"),
    ],
)
def test_a_chat_gets_its_system_turn_and_the_templates_variables(form, want) -> None:
    assert asked(tokenizer(), **form) == taught(tokenizer(), **form) == want


@pytest.mark.parametrize(
    ("form", "kind", "message"),
    [
        ({"prompt": "plain", "system": "S"}, ValueError, "`system` must be None unless a chat template"),
        ({"prompt": "Q {question}", "chat_template_kwargs": QUIET}, ValueError, "`chat_template_kwargs` must be None"),
        ({"prompt": lambda q: q, "chat_template_kwargs": QUIET}, ValueError, ".*`prompt` returned str"),
        ({"prompt": turns, "system": "S"}, ValueError, "`system` must be None"),
        ({"system": 3}, TypeError, "`system` must be a string or None, got int 3"),
        ({"chat_template_kwargs": "x"}, TypeError, "`chat_template_kwargs` must be a dict .*, got str 'x'"),
        ({"chat_template_kwargs": {"tokenize": True}}, ValueError, ".*without tokenize, which is set here"),
        ({"chat_template_kwargs": {"enable_thinking": len}}, ValueError, ".*values that JSON can hold"),
        ({"prompt": lambda q: 3}, TypeError, "`prompt` must be a function that returns a text, .* got int 3"),
    ],
)
def test_wrong_forms_of_chats_are_named(form, kind, message) -> None:
    for where, call in (("SelfConsistency", asked), ("RationaleDataset", taught)):
        with pytest.raises(kind, match=f"{where}: {message}"):
            call(tokenizer(), **form)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['content'] }}", "one whose chat template writes the system turn, got one that leaves it out"),
        ("{{ raise_exception('no system') }}", "one whose chat template takes turns of system, user, got .*no system"),
    ],
)
def test_a_template_that_takes_no_system_turn_is_named(template, message) -> None:
    with pytest.raises(ValueError, match=f"SelfConsistency: `tokenizer` must be {message}"):
        asked(tokenizer(template), system="S")


def test_a_variable_that_the_template_does_not_read_is_told() -> None:
    with pytest.warns(UserWarning, match="`chat_template_kwargs` has thinking, which the chat template does not read"):
        asked(tokenizer(), chat_template_kwargs={"thinking": False})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asked(tokenizer(), chat_template_kwargs=QUIET)


def test_an_adapter_remembers_its_system_turn_and_variables(tmp_path: Path) -> None:
    tok, form = tokenizer(), {"system": "S", "chat_template_kwargs": QUIET}
    model = FAMILIES["llama"].model(0)
    data = nat.RationaleDataset([nat.Example("1+1?", "2")], tok, **form)
    settings = nat.Settings(steps=1, batch_size=1, rank=1, gate_dim=1, value_dim=1, save_every=0, progress=False)
    nat.train_negative(model, data, tok.pad_token_id, tmp_path / "checkpoints", settings)
    save_dual_lora(model, tmp_path / "nat")
    record = json.loads((tmp_path / "nat" / "prompt.json").read_text())
    assert record == {"format_version": 2, "chat_template": CHAT, "text": None, "function": None, **form}
    loaded = load_dual_lora(FAMILIES["llama"].model(0), tmp_path / "nat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asked(tok, loaded) == asked(tok, loaded, **form) == "^s[S]u[1+1?]!A:"
        assert asked(tok, prompt=tmp_path / "nat") == "^s[S]u[1+1?]!A:"
    with pytest.warns(UserWarning, match="differs from the form that `model` was trained with"):
        assert asked(tok, loaded, system="T") == "^s[T]u[1+1?]A:"


def test_a_run_with_another_system_turn_is_another_run(tmp_path: Path) -> None:
    def run(**form: Any) -> Any:
        model = FAMILIES["llama"].model(0)
        return SelfConsistency(model, tokenizer(), rule="count", n=1, max_new_tokens=1, progress=False, **form)

    out = tmp_path / "run.jsonl"
    run(system="S")(["1+1?"], out=out)
    with pytest.raises(ValueError, match="other settings .*system: 'S'"):
        run(system="T")(["1+1?"], out=out)


@pytest.mark.parametrize(
    ("single", "text", "want"),
    [
        ("^ @ $A", "^@ab", "^@ab"),  # two tokens begin every text, and a template wrote both
        ("^ @ $A", "ab", "^@ab"),
        ("^ $A |", "ab", "^ab"),  # BERT's end of a text
        ("^ $A |", "ab|", "^ab|"),  # one that the user wrote stays
        ("$A <eos>", "", ""),
    ],
)
def test_a_prompt_begins_once_and_is_not_ended(single, text, want) -> None:
    tok = character_tokenizer()
    tok.add_special_tokens({"bos_token": "^", "sep_token": "|"})
    names = [(name, tok.convert_tokens_to_ids(name)) for name in ("^", "@", "|", "<eos>")]
    tok.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=names)
    assert tok.decode(prompt_ids(tok, text)) == (want or "<eos>")  # nothing but the end token stays as it is


def test_the_commands_take_a_system_turn_and_variables() -> None:
    assert template_variables('{"enable_thinking": false}') == QUIET and template_variables(None) is None
    for wrong in ("{", "[1]", "3"):
        with pytest.raises(typer.BadParameter, match="must be a JSON object like"):
            template_variables(wrong)
    with pytest.raises(typer.BadParameter, match="must be given for a system turn"):
        generate(Path(), prompt="x", system="S", device="cpu")
