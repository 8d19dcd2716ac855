"""Text that a saved composition writes after a prompt, printed while it is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import TextStreamer

from calm_fast.composing.memory import gib, weigh_composition
from calm_fast.composing.models import composition_tokenizer, untrained
from calm_fast.consistency.sampling.prompt import prompt_form
from calm_fast.core.checks import bad_value, check_finite_number, check_whole_text
from calm_fast.core.devices import usable_device
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.token_ids import padding_id
from calm_fast.hf import ComposedForCausalLM

_WHERE = "generate"
_TEXT = "{question}"


def generate_text(
    folder: str | os.PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    system: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    device: str | None = None,
    say: Callable[[str], None] = print,
) -> str:
    """Load a composition and print what it writes after `prompt`, word by word; return the text.

    Args:
        folder: of a composition. temperature: 0 = the likeliest token, else sampling with `seed`. chat: give the prompt
            as a user's turn of the tokenizer's chat template, after a `system` turn if there is one.
            chat_template_kwargs: variables for the template. say: prints what is loaded.
    Raises:
        ValueError: the folder holds no composition with its models, the prompt has no token, there is no template, or
        torch cannot use the device.
    """
    check_finite_number(_WHERE, "temperature", temperature)
    if temperature < 0:
        raise bad_value(_WHERE, "temperature", "at least 0", str(temperature))
    for name, text in (("prompt", prompt), ("system", system or "")):
        check_whole_text(_WHERE, name, text)
    target = usable_device(_WHERE, device)
    model = ComposedForCausalLM.from_pretrained(folder)
    tokenizer = composition_tokenizer(_WHERE, os.fspath(folder), model.config.anchor_path)
    form = prompt_form(
        "chat" if chat else _TEXT, tokenizer, _WHERE, system=system, chat_template_kwargs=chat_template_kwargs
    )
    ids = form.ids(tokenizer, prompt)
    if not ids:
        raise bad_value(_WHERE, "prompt", "a text of at least one token", repr(prompt))
    model.to(target)
    weight = weigh_composition(model, [model.config.anchor_path, *model.config.augmenter_paths])
    for line in weight.lines():
        say(line)
    say(f"memory expected: {gib(weight.weights)} of weights, and the cache of {len(ids)} + {max_new_tokens} tokens")
    if untrained(model):
        say("warning: W_o of every connection is zero, so the composition writes what its anchor writes")
    tensor = torch.tensor([ids], device=target)
    # the settings of the anchor's own generation_config would win over greedy decoding
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False, "num_beams": 1}
    torch.manual_seed(seed)
    with eval_mode(model):
        written = model.generate(
            input_ids=tensor,
            attention_mask=torch.ones_like(tensor),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding_id(tokenizer, model),
            streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )
    return str(tokenizer.decode(written[0, len(ids) :], skip_special_tokens=True))
