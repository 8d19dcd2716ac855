"""torch.func, torch.export, torch.jit.trace, compiled layers, and checkpoints other than transformers' own."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from families import composed_model, prompts, switch
from torch import nn
from torch.utils.checkpoint import checkpoint

from calm_fast.hf import ComposedForCausalLM


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = composed_model("llama")

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(ids, use_cache=False).logits


@pytest.mark.seam(
    attach="`torch.vmap` over token ids",
    to="composition",
    result="works",
    why="the values of the ids are not checked inside it",
)
def test_vmap_over_rows() -> None:
    model, ids = composed_model("llama"), prompts()
    got = torch.vmap(lambda row: model(row[None], use_cache=False).logits[0])(ids)
    torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=5e-5)


@pytest.mark.seam(
    attach="`torch.func.grad`", to="composition", result="works", why="inside it every op runs in torch's own ops"
)
def test_gradients_of_a_functional_call() -> None:
    model, ids = composed_model("llama"), prompts()
    own = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.func.functional_call(model, parameters, (ids,), {"labels": ids, "use_cache": False}).loss

    got = torch.func.grad(loss)(own)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.seam(
    attach="`torch.export` with dynamic batch and length",
    to="composition",
    result="works",
    why="with `strict=False`; with `strict=True` torch raises where the batch leaves the example's range",
)
@torch.no_grad()
def test_an_exported_composition_takes_other_shapes() -> None:
    wrapper, auto = Logits().eval(), torch.export.Dim.AUTO
    program = torch.export.export(wrapper, (prompts(),), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    for ids in (prompts(), prompts(3, 12, seed=5)):
        torch.testing.assert_close(program.module()(ids), wrapper(ids), rtol=0, atol=5e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
@pytest.mark.seam(
    attach="`torch.jit.trace`", to="composition", result="refused", why="use `torch.export` or `torch.compile`"
)
def test_a_composition_cannot_be_traced() -> None:
    with pytest.raises(ValueError, match=r"torch.jit.trace: a ComposedForCausalLM cannot be traced"):
        torch.jit.trace(Logits().eval(), (prompts(),), check_trace=False)


@torch.no_grad()
@pytest.mark.seam(
    attach="anchor layers compiled one by one (layer.compile)",
    to="composition",
    result="works",
    why="for one composition; for several over one anchor compile the whole model",
)
def test_compiled_layers() -> None:
    model, ids = composed_model("llama"), prompts()
    alone, expected = model.anchor(ids).logits, model(ids).logits
    torch.compiler.reset()
    for layer in model.anchor.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, rtol=0, atol=5e-5)
        torch.testing.assert_close(model.anchor(ids, use_cache=False).logits, alone, rtol=0, atol=5e-5)


def test_gradient_checkpointing_compiles_as_one_graph() -> None:
    model, ids = composed_model("llama").train(), prompts()
    switch(model, "enable")()
    torch.compiler.reset()
    # compiled before the model ever ran: nothing of this thread's state exists yet
    got = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids).loss
    torch.testing.assert_close(got, model(ids, labels=ids).loss, rtol=0, atol=1e-5)


def gradients(model: ComposedForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(model(ids, labels=ids).loss, list(model.connections.parameters()))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_checkpointing_every_few_layers_gives_the_same_gradients(every: int) -> None:
    model, ids = composed_model("llama", [(0, 0), (2, 1)]).train(), prompts()
    expected = gradients(model, ids)
    model._set_gradient_checkpointing(True, partial(checkpoint, use_reentrant=False), every)
    assert len(model.checkpoints) == (2 if every == 1 else 1)
    for got, want in zip(gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


class Checkpointed(nn.Module):
    """A wrapper around a layer that replays its hooks too, as torch's checkpoint_wrapper does."""

    def __init__(self, layer: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.layer, self.reentrant = layer, reentrant

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(partial(self.layer, **kwargs), *args, use_reentrant=self.reentrant)


@pytest.mark.seam(
    attach="a checkpoint around a connected layer (`checkpoint_wrapper`, FSDP's `activation_checkpointing`)",
    to="composition",
    result="refused",
    why="use the composition's own `gradient_checkpointing_enable()`",
)
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_a_connected_layer_is_refused(reentrant: bool) -> None:
    model, ids = composed_model("llama", [(0, 0), (2, 1)]).train(), prompts()
    layers = model.anchor.model.layers
    layers[1] = Checkpointed(layers[1], reentrant)
    model.train()
    # torch itself finds that a replay without the residual saves other tensors
    error, message = (
        (ValueError, "under no_grad, as a reentrant checkpoint") if reentrant else (Exception, "recomputation")
    )
    with pytest.raises(error, match=message):
        model(ids, labels=ids).loss.backward()
