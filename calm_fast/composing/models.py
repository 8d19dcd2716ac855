"""The models and tokenizers that the commands load, by path or hub name, and how a composition collates its rows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from calm_fast.composing.data import Example, Row, encode
from calm_fast.core.checks import bad_value
from calm_fast.core.eval_mode import eval_mode
from calm_fast.core.token_ids import padding_id
from calm_fast.hf import ComposedForCausalLM
from calm_fast.hf.encoders import load_encoder
from calm_fast.hf.references import load_errors_named

_EXPECTED = "the folder or hub name of a causal language model with its tokenizer"


def load_tokenizer(where: str, name: str, path: str) -> Any:
    """Return the tokenizer of a model. where, name: the function and its argument that errors name."""
    with load_errors_named(where, name, path, _EXPECTED):
        try:
            return AutoTokenizer.from_pretrained(path)
        except (ValueError, KeyError) as problem:
            why = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
            raise bad_value(where, name, _EXPECTED, f"{path!r}: {why}") from problem


def composition_tokenizer(where: str, folder: str, anchor_path: str) -> Any:
    """Return the tokenizer in the folder of a composition, or without one the anchor's."""
    own = not os.path.isdir(folder) or os.path.isfile(os.path.join(folder, "tokenizer_config.json"))
    return load_tokenizer(where, "folder", folder if own else anchor_path)


def load_model(
    where: str, name: str, path: str, dtype: str, device: torch.device, mode: str | None = None
) -> PreTrainedModel:
    """Return a whole causal language model in eval mode, or with a mode of a bidirectional augmenter an encoder.

    dtype: "auto" or the name of one.
    """
    expected = _EXPECTED if mode is None else "the folder or hub name of an encoder with its tokenizer"
    with load_errors_named(where, name, path, expected):
        model: PreTrainedModel = (
            AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            if mode is None
            else load_encoder(path, where, dtype=dtype)
        )
    model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    return model.eval()


def positions(model: PreTrainedModel) -> int | None:
    """Return the most tokens that the config of a model promises, or None if it names no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def examples_for(
    rows: list[Row], tokenizer: Any, model: PreTrainedModel, where: str, name: str,
    template: Mapping[str, Any] | None = None,
) -> list[Example]:  # fmt: skip
    """Return each row as one example of an augmenter's own tokenizer, to score the augmenter alone.

    template: variables for its chat template.

    Raises ValueError for a row with more tokens than the augmenter has positions.
    """
    found = []
    for row in rows:
        for example in encode(row, tokenizer, template=template, flat_chats=True) or [Example([], 0, None, row, 0)]:
            limit, length = positions(model), len(example.input_ids)
            if limit is not None and length > limit:
                got = f"one of {limit} positions; {row.where} has {length} tokens for it. Lower `max_length`"
                raise bad_value(where, name, "an augmenter that can read the held-out rows alone", got)
            found.append(example)
    return found


def untrained(model: ComposedForCausalLM) -> bool:
    """Return True if W_o of every connection is zero, so that the composition still is its anchor."""
    with torch.no_grad():
        return not any(bool(connection.o_proj.weight.any()) for connection in model.connections)  # type: ignore[union-attr, operator]


def continue_text(model: PreTrainedModel, tokenizer: Any, prompt: list[int], tokens: int) -> str:
    """Return the text that greedy decoding writes after a prompt."""
    ids = torch.tensor([prompt], device=model.device)
    with eval_mode(model):
        written = model.generate(  # type: ignore[operator]  # of GenerationMixin
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=padding_id(tokenizer, model),
        )
    return str(tokenizer.decode(written[0, len(prompt) :], skip_special_tokens=True))
