"""accelerate, torch.compile and DDP around a composition and a model with dual LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from families import FAMILIES, composed_model, prompts, randomize
from torch import nn
from transformers import DynamicCache

from calm_fast import add_dual_lora
from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.cache_names import generate_argument

accelerate = pytest.importorskip("accelerate")
GREEDY = {"max_new_tokens": 4, "do_sample": False}
PAIRS = [(-1, -1), (0, 1), (2, 2)]


def with_dual_lora() -> nn.Module:
    model = FAMILIES["llama"].model(0)
    add_dual_lora(model, rank=2, alpha=4)
    return model


@pytest.mark.parametrize(
    "build",
    [
        pytest.param(
            lambda: composed_model("llama"),
            id="composition",
            marks=pytest.mark.seam(
                attach="accelerate: `prepare`, `save_state`, `load_state`",
                to="composition",
                result="works",
                why="the state holds the parts too",
            ),
        ),
        pytest.param(
            with_dual_lora,
            id="dual LoRA",
            marks=pytest.mark.seam(
                attach="accelerate: `prepare`, `save_state`, `load_state`",
                to="dual LoRA model",
                result="works",
                why="the state holds the base too; add the dual LoRA before it is loaded",
            ),
        ),
    ],
)
def test_a_saved_state_is_loaded(build: Callable[[], Any], tmp_path: Path) -> None:
    ids, losses = prompts(4), []
    for load in (False, True):
        accelerator = accelerate.Accelerator(cpu=True)
        model = build().train()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(trained, 1e-2))
        if load:
            accelerator.load_state(str(tmp_path))
        for _ in range(1 if load else 2):
            losses.append(model(ids, labels=ids).loss)
            accelerator.backward(losses[-1])
            optimizer.step()
            optimizer.zero_grad()
            if not load and len(losses) == 1:
                accelerator.save_state(str(tmp_path))
        losses.append(model(ids, labels=ids).loss)
    assert torch.equal(losses[1], losses[3]) and torch.equal(losses[2], losses[4])
    assert not torch.equal(losses[0], losses[1])


@pytest.mark.seam(
    attach="accelerate: `init_empty_weights`, then `load_checkpoint_and_dispatch` of what `save_model` wrote",
    to="composition",
    result="works",
    why="the file holds the parts too",
)
def test_an_empty_composition_is_filled(tmp_path: Path) -> None:
    model, ids = composed_model("llama"), prompts()
    accelerate.Accelerator(cpu=True).save_model(model, str(tmp_path))
    with accelerate.init_empty_weights():
        empty = compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1), PAIRS)
    filled = accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    with torch.no_grad():
        assert torch.equal(filled(ids).logits, model(ids).logits)


def wrapped(model: ComposedForCausalLM) -> Any:
    return torch.compile(model, backend="eager")


def in_place(model: ComposedForCausalLM) -> Any:
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    "compiled",
    [
        pytest.param(
            wrapped,
            marks=pytest.mark.seam(
                attach="`torch.compile(model)`", to="composition", result="works", why="forward, with a cache too"
            ),
        ),
        pytest.param(
            in_place,
            marks=pytest.mark.seam(
                attach="`model.compile()`", to="composition", result="works", why="forward, with a cache too"
            ),
        ),
    ],
)
def test_compiled_calls_equal_eager_ones(compiled: Callable[[Any], Any]) -> None:
    torch.compiler.reset()
    model, ids = compose(FAMILIES["llama"].model(0, depth=1), FAMILIES["llama"].model(1, depth=1), [(0, 0)]), prompts()
    randomize(model)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        fast = compiled(model)
        torch.testing.assert_close(fast(ids, use_cache=False).logits, expected)
        own = DynamicCache(config=model.config)
        fast(ids[:, :-1], **{generate_argument(): own})
        assert own.get_seq_length() == ids.shape[1] - 1
    assert type(accelerate.Accelerator(cpu=True).unwrap_model(fast, keep_torch_compile=False)) is ComposedForCausalLM


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="this torch has no gloo")
@pytest.mark.seam(
    attach="DistributedDataParallel, with and without `find_unused_parameters`",
    to="composition",
    result="works",
    why="every parameter that trains gets its gradient in every step",
)
@pytest.mark.parametrize("find", [False, True])
def test_ddp_has_no_unused_parameters(find: bool, one_process: None) -> None:
    model, ids = composed_model("llama").train(), prompts()
    model(ids, labels=ids).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.connections.parameters()]
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find)
    for _ in range(2):  # a second step fails if one parameter got no gradient
        model.zero_grad()
        parallel(ids, labels=ids).loss.backward()
    for parameter, want in zip(model.connections.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, want)
