"""`frozen_copy`: a composition as it is now, beside one that trains on."""

from __future__ import annotations

import gc
from typing import Any

import peft
import pytest
import torch
from families import FAMILIES, composed_model, prompts
from texts import aligned_model, rows

from calm_fast.hf import frozen_copy

IDS = prompts()


def logits(model: Any, ids: torch.Tensor = IDS, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_it_gives_what_the_model_gave(family: str) -> None:
    model = composed_model(family).train()
    before = logits(model)
    copied = frozen_copy(model)
    for parameter in model.connections.parameters():
        parameter.data.mul_(2.0)
    assert torch.equal(logits(copied), before) and not torch.equal(logits(model), before)
    assert model.training and not copied.training
    assert not any(p.requires_grad for p in copied.parameters())
    assert all(p.requires_grad for p in model.connections.parameters())
    generated = copied.generate(IDS, max_new_tokens=4, do_sample=False)
    assert generated.shape == (2, IDS.shape[1] + 4)


def test_only_the_connections_are_held_twice() -> None:
    model = composed_model("llama")
    copied = frozen_copy(model)
    assert copied.anchor is model.anchor and copied.augmenters[0] is model.augmenters[0]
    assert copied.config.anchor_config is model.anchor.config
    own = {p.data_ptr() for p in copied.connections.parameters()}
    assert not own & {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in copied.parameters()} == own


def test_either_may_go_first() -> None:
    model = composed_model("llama")
    before = logits(model)
    copied = frozen_copy(model)
    anchor = model.anchor
    del model
    gc.collect()
    assert torch.equal(logits(copied), before)
    plain = logits(FAMILIES["llama"].model(0))
    del copied
    gc.collect()
    assert torch.equal(logits(anchor), plain)


def test_aligners_come_along() -> None:
    model = aligned_model(depth=3)
    ids, mask = rows("the cat sat on the mat", "one two three")
    assert torch.equal(logits(frozen_copy(model), ids, attention_mask=mask), logits(model, ids, attention_mask=mask))


def test_what_would_change_under_it_is_refused() -> None:
    with pytest.raises(TypeError, match="`model` must be a composition"):
        frozen_copy(FAMILIES["llama"].model(0))
    model = composed_model("llama")
    model.augmenters[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"whose parts are frozen, got augmenters\.0.*Take copy.deepcopy"):
        frozen_copy(model)
    model = composed_model("llama")
    model.forward = model.forward
    with pytest.raises(ValueError, match="with the forward of its class"):
        frozen_copy(model)


def lora(model: Any) -> None:
    peft.get_peft_model(model, peft.LoraConfig(target_modules=r"anchor\..*\.q_proj"))


def frozen_lora(model: Any) -> None:
    lora(model)
    model.requires_grad_(False)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lora, "lora_A.*which trains. Take copy.deepcopy"),
        (frozen_lora, "other parameters than when it was copied"),
        (lambda model: model.augmenters.requires_grad_(True), "which trains. Take copy.deepcopy"),
    ],
)
def test_it_does_not_follow_parts_that_change(change: Any, said: str) -> None:
    model = composed_model("llama")
    copied = frozen_copy(model)
    logits(copied)
    change(model)
    for run in (copied, copied.base_model):
        with pytest.raises(ValueError, match=f"frozen_copy: `model` must be .*shared, got .*{said}"):
            run(IDS, use_cache=False)
