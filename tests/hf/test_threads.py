"""Threads that run compositions, or parts that compositions share, do not touch each other's results."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, composed_model, prompts, randomize, switch
from torch import nn

from calm_fast.hf import ComposedForCausalLM, compose

ALONE, SHARED = "the anchor alone", "a second composition over the anchor"
SAME, AUGMENTER = "the same composition", "a composition whose augmenter is the anchor"


def others(model: ComposedForCausalLM) -> dict[str, nn.Module]:
    narrow = FAMILIES["llama"].model(4, width=24)
    return {
        ALONE: model.anchor,
        SHARED: randomize(compose(model.anchor, narrow, [(0, 0), (1, 2)]), 1),
        SAME: model,
        AUGMENTER: randomize(compose(narrow, model.anchor, [(1, 0), (2, 1)]), 2),
    }


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def beside(layer: nn.Module, run: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any]:
    """Call `other` in this thread while another one is inside of `layer` in `run`; return both results."""
    entered, go_on, got = threading.Event(), threading.Event(), []

    def pause(*_: Any) -> None:
        if threading.current_thread() is worker and not entered.is_set():
            entered.set()
            go_on.wait(60)

    worker = threading.Thread(target=lambda: got.append(run()))
    handle = layer.register_forward_pre_hook(pause)
    worker.start()
    try:
        assert entered.wait(60)
        return other(), (go_on.set(), worker.join(), got[0])[-1]
    finally:
        go_on.set()
        worker.join()
        handle.remove()


@pytest.mark.parametrize("name", [ALONE, SHARED, SAME, AUGMENTER])
@pytest.mark.seam(
    attach="threads that run it at the same time, with shared parts",
    to="composition",
    result="works",
    why="every thread has its own state of a forward",
)
def test_two_threads_get_what_each_gets_alone(name: str) -> None:
    model, first, second = composed_model("llama"), prompts(), prompts(3, 5, seed=4)
    other = others(model)[name]
    expected = logits(model, first), logits(other, second)
    for layer in (model.anchor.model.layers[1], model.augmenters[0].model.layers[1]):
        beside_it, own = beside(layer, lambda: logits(model, first), lambda: logits(other, second))
        assert torch.equal(own, expected[0]) and torch.equal(beside_it, expected[1])
    layer = model.anchor.model.layers[1]
    own, beside_it = beside(layer, lambda: logits(other, second), lambda: logits(model, first))
    assert torch.equal(beside_it, expected[1]) and torch.equal(own, expected[0])


def gradients(model: ComposedForCausalLM, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(model(ids, labels=ids).loss, list(model.connections.parameters()))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_thread_trains_and_another_evaluates(checkpointing: bool) -> None:
    """Falcon has dropout in its layers: nobody may see them in training mode."""
    model, ids = composed_model("falcon"), prompts()
    if checkpointing:
        switch(model, "enable")()
    evaluated, expected = logits(model, ids), gradients(model.train(), ids)
    assert torch.equal(logits(model, ids), evaluated), "training mode without gradients"
    alone = logits(model.anchor, ids)
    layer = model.anchor.transformer.h[1]
    for other, want in ((model, evaluated), (model.anchor, alone)):
        got, own = beside(layer, lambda: gradients(model, ids), lambda other=other: logits(other, ids))
        assert torch.equal(got, want)
        for gradient, right in zip(own, expected, strict=True):
            torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_replayed_in_another_thread(reentrant: bool) -> None:
    model, ids = composed_model("falcon").train(), prompts()
    expected = gradients(model, ids)
    switch(model, "enable")({"use_reentrant": reentrant})
    loss = model(ids, labels=ids).loss
    thread = threading.Thread(target=loss.backward)  # on a GPU, autograd replays in a thread of its own
    thread.start()
    thread.join()
    for parameter, right in zip(model.connections.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, right, rtol=1e-4, atol=1e-6)


def test_training_mode_never_passes_through_the_parts() -> None:
    """Another thread may be inside of a part while this one calls train(), as Trainer does before every step."""
    model, seen = composed_model("falcon"), []
    dropout = next(module for module in model.anchor.modules() if isinstance(module, nn.Dropout))
    dropout.train = lambda mode=True: seen.append(mode) or dropout
    model.train()
    model.eval()
    assert True not in seen


def test_a_composed_call_inside_of_a_composed_forward() -> None:
    outer, ids = composed_model("llama"), prompts()
    inner = randomize(compose(outer.anchor, FAMILIES["llama"].model(4, width=24), [(0, 0), (1, 2)]), 1)
    expected, wanted, got = logits(outer, ids), logits(inner, ids), []

    def call(*_: Any) -> None:
        if not got:
            got.append(None)
            got[0] = logits(inner, ids)

    outer.anchor.model.layers[1].register_forward_hook(call)
    assert torch.equal(logits(outer, ids), expected) and torch.equal(got[0], wanted)


@pytest.mark.seam(
    attach="`torch.nn.DataParallel` over several GPUs",
    to="composition",
    result="refused",
    why="start one process per GPU (`torchrun`, `accelerate launch`)",
)
def test_data_parallel_is_refused() -> None:
    with pytest.raises(ValueError, match="DataParallel: .* one process per GPU"):
        composed_model("llama")._replicate_for_data_parallel()  # DataParallel calls it for every GPU
