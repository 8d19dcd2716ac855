"""The composition without its LM head: what TRL and other tools call as model.base_model."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from families import FAMILIES, OTHERS, composed_model, prompts, randomize
from test_training import switch
from torch import nn

from calm_fast.hf import ComposedCache, compose


@pytest.mark.seam(
    attach="`model.base_model(...).last_hidden_state` times `get_output_embeddings()` (TRL)",
    to="composition",
    result="works",
    why="every connection runs; scales and caps of the logits are the caller's task, as for the anchor",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_state_times_the_head_gives_the_logits(family: str) -> None:
    model, ids = composed_model(family), prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        outputs = model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
        got = model.get_output_embeddings()(outputs.last_hidden_state)
        assert "logits" not in outputs
        torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
        again = model.get_decoder()(ids, attention_mask=mask, use_cache=False, return_dict=False)
    assert torch.equal(again[0], outputs.last_hidden_state)


@pytest.mark.parametrize("family", ["llama", "mamba"])
def test_it_keeps_a_cache(family: str) -> None:
    kind = FAMILIES.get(family) or OTHERS[family]
    model, ids = randomize(compose(kind.model(0), kind.model(1), [(0, 1)], num_heads=4)), prompts()
    with torch.no_grad():
        first = model.base_model(ids[:, :-1], use_cache=True)
        assert isinstance(first.cache, ComposedCache)
        last = model.base_model(ids[:, -1:], cache=first.cache)
        expected = model(ids, use_cache=False).logits[:, -1:]
        torch.testing.assert_close(model.get_output_embeddings()(last.last_hidden_state), expected)


def test_gradients_reach_the_connections_also_under_checkpointing() -> None:
    model, ids = composed_model("llama").train(), prompts()

    def gradients(run: Any) -> list[torch.Tensor]:
        model.zero_grad()
        run().square().mean().backward()
        return [parameter.grad.clone() for parameter in model.connections.parameters()]

    expected = gradients(lambda: model(ids).logits)
    head = model.get_output_embeddings()
    for enable in (lambda: None, switch(model, "enable")):
        enable()
        got = gradients(lambda: head(model.base_model(ids).last_hidden_state))
        for one, two in zip(got, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


def test_a_tool_may_replace_the_instances_forward() -> None:
    """As TRL does: its forward calls the base model and the head by itself."""
    model, ids = composed_model("llama"), prompts()
    expected = model(ids, use_cache=False).logits

    def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.get_output_embeddings()(self.base_model(*args, **kwargs, use_cache=False).last_hidden_state)

    model.forward = types.MethodType(forward, model)
    torch.testing.assert_close(model(ids), expected)


def test_the_view_holds_nothing_of_its_own() -> None:
    model = composed_model("llama")
    names = list(model.state_dict())
    view = model.base_model
    assert isinstance(view, nn.Module) and view.config is model.config
    assert view.device == model.device and view.dtype == model.dtype and not view.training
    assert list(model.state_dict()) == names and model.base_model is not model
    assert model.supports_pp_plan == composed_model("llama").anchor.supports_pp_plan
    with pytest.raises(ValueError, match="`labels` must be None with headless=True"):
        view(prompts(), labels=prompts())
