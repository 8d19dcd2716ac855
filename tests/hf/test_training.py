"""Training: transformers' Trainer, resuming, gradient checkpointing."""

from __future__ import annotations

from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, composed_model, prompts, randomize, switch
from transformers import Trainer, TrainerCallback, TrainingArguments

from calm_fast.hf import ComposedForCausalLM, compose, find_layers

ROWS = 16
# Trainer's name for gradient checkpointing in this transformers version
CHECKPOINTING = next(
    f"{word}_checkpointing"
    for word in ("activation", "gradient")
    if f"{word}_checkpointing" in signature(TrainingArguments).parameters
)


def dataset() -> list[dict[str, list[int]]]:
    """Return rows of one length, each with another number of labelled tokens."""
    rows = prompts(ROWS, 10, seed=11).tolist()
    return [{"input_ids": row, "labels": [-100] * (n % 7) + row[n % 7 :]} for n, row in enumerate(rows)]


def fresh(seed: int = 5) -> ComposedForCausalLM:
    composed = compose(FAMILIES["llama"].model(0), FAMILIES["llama"].model(1, width=24), [(-1, -1), (2, 1)])
    torch.manual_seed(seed)
    for connection in composed.connections:
        connection.reset_parameters()
    return composed


def trainer(model: ComposedForCausalLM, out: Path, steps: int, **kwargs: Any) -> Trainer:
    settings = {"per_device_train_batch_size": 4, "learning_rate": 5e-3, "lr_scheduler_type": "constant"}
    settings |= {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "seed": 1}
    arguments = TrainingArguments(output_dir=str(out), max_steps=steps, **(settings | kwargs))
    return Trainer(model=model, args=arguments, train_dataset=dataset())


def weights(model: ComposedForCausalLM) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.connections.state_dict().items()}


def mean_loss(model: ComposedForCausalLM) -> float:
    rows = dataset()
    ids, labels = (torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        return float(model(ids, labels=labels).loss)


def test_trainer_reduces_the_loss_and_changes_only_the_composition(tmp_path: Path) -> None:
    model = fresh()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not name.startswith("connections.")}
    before = mean_loss(model)
    trainer(model, tmp_path, 25).train()
    assert mean_loss(model) < before - 0.3
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) and parameters[name].grad is None for name, value in frozen.items())


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    straight = fresh()
    trainer(straight, tmp_path / "a", 8, save_strategy="steps", save_steps=4).train()
    saved = tmp_path / "a" / "checkpoint-4"
    assert {f.name for f in saved.glob("*.safetensors")} == {"model.safetensors"}
    assert (saved / "model.safetensors").stat().st_size < 60_000  # the composition only
    resumed = fresh(seed=99)
    trainer(resumed, tmp_path / "b", 8).train(resume_from_checkpoint=str(saved))
    expected = weights(straight)
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
    loaded = ComposedForCausalLM.from_pretrained(saved, anchor=straight.anchor, augmenters=straight.augmenters[0])
    assert not torch.equal(next(iter(weights(loaded).values())), next(iter(expected.values())))


def test_training_resumes_where_the_parts_tie_their_lm_head(tmp_path: Path) -> None:
    """Most small models tie it. Trainer ties again on resuming. An augmenter's view has no LM head."""
    model = composed_model("gemma3_text")
    assert model.anchor.lm_head.weight is model.anchor.get_input_embeddings().weight
    trainer(model, tmp_path, 2, save_strategy="steps", save_steps=1).train()
    resumed = composed_model("gemma3_text")
    trainer(resumed, tmp_path, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    expected = weights(model)
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
    assert resumed.anchor.lm_head.weight is resumed.anchor.get_input_embeddings().weight
    assert all(name in resumed.state_dict() for name in resumed.all_tied_weights_keys)


def test_gradient_accumulation_weighs_tokens_not_batches(tmp_path: Path) -> None:
    """num_items_in_batch reaches the anchor's loss: 2 x 4 rows accumulate to the step of 8 rows."""
    got = []
    for size, accumulate in ((8, 1), (4, 2)):
        model = fresh()
        kwargs = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
        trainer(model, tmp_path, 1, optim="sgd", learning_rate=1.0, max_grad_norm=0.0, **kwargs).train()
        got.append(weights(model))
    moved = 0.0
    initial = weights(fresh())
    for name, value in got[0].items():
        torch.testing.assert_close(value, got[1][name], rtol=1e-4, atol=1e-6, msg=name)
        moved = max(moved, float((value - initial[name]).abs().max()))
    assert moved > 1e-3


def gradients(model: ComposedForCausalLM, ids: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return [parameter.grad.clone() for parameter in model.connections.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    model, ids = composed_model(name, [(0, 0), (2, 1)]).train(), prompts()
    expected = gradients(model, ids)
    runs, needs = [0] * 3, []

    def count(index: int, *_: Any) -> None:
        runs[index] += 1

    layers = find_layers(model.anchor)[1]
    for index, layer in enumerate(layers):  # a module inside the layer: a replay runs it again
        next(iter(layer.children())).register_forward_hook(partial(count, index))
    layers[0].register_forward_hook(lambda _, args, output: needs.append(args[0].requires_grad))
    switch(model, "enable")({"use_reentrant": reentrant})
    assert all(p.requires_grad == n.startswith("connections.") for n, p in model.named_parameters())
    for got, want in zip(gradients(model, ids), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    assert [layer.gradient_checkpointing for layer in layers] == [False, True, True]
    assert runs == [1, 2, 2] and needs == [False], "the layer below the first residual has no gradient to replay for"
    model.eval()
    with torch.no_grad():
        model(ids)
    assert not any(module.training for module in model.anchor.modules())
    model.train()
    switch(model, "disable")()
    assert not any(module.training for module in model.anchor.modules())


def test_trainer_with_gradient_checkpointing_equals_without(tmp_path: Path) -> None:
    got = []
    for enabled in (False, True):
        model = fresh()
        trainer(model, tmp_path, 3, **{CHECKPOINTING: enabled}).train()
        got.append(weights(model))
    for name, value in got[0].items():
        torch.testing.assert_close(value, got[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_no_gradient_below_the_first_connection() -> None:
    model, ids = randomize(fresh()), prompts()
    model = randomize(compose(model.anchor, FAMILIES["llama"].model(1), [(1, 1)]))
    needs = []
    for layer in find_layers(model.anchor)[1]:
        layer.register_forward_hook(lambda _, args, output: needs.append((args[0].requires_grad, output.requires_grad)))
    model(ids, labels=ids).loss.backward()
    assert needs == [(False, False), (False, True), (True, True)]


class Evaluate(TrainerCallback):
    """Records the modes in which Trainer leaves the parts."""

    def __init__(self) -> None:
        self.modes: list[tuple[bool, bool]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.modes.append((model.training, any(m.training for m in model.anchor.modules())))


def test_trainer_never_trains_the_frozen_parts(tmp_path: Path) -> None:
    seen = Evaluate()
    run = trainer(fresh(), tmp_path, 2)
    run.add_callback(seen)
    run.train()
    assert seen.modes == [(True, False)] * 2


def test_trainer_evaluates_and_predicts(tmp_path: Path) -> None:
    model = fresh()
    run = trainer(model, tmp_path, 1, per_device_eval_batch_size=ROWS)
    assert abs(run.evaluate(dataset())["eval_loss"] - mean_loss(model)) < 1e-5
    unlabelled = [{"input_ids": row["input_ids"]} for row in dataset()]
    assert run.predict(unlabelled).predictions.shape == (ROWS, 10, 97)


def test_a_cache_is_refused_with_gradient_checkpointing() -> None:
    """A replay would append the layer's keys a second time."""
    model, ids = fresh().train(), prompts()
    switch(model, "enable")()
    with pytest.raises(ValueError, match="`use_cache` must be False while training with gradient checkpointing"):
        model(ids, labels=ids, use_cache=True)
    with torch.no_grad():
        assert model(ids, use_cache=True).cache.get_seq_length() == ids.shape[1]
