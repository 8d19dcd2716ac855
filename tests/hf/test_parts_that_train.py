"""Adapters and trained weights on the parts of a composition: they act and get gradients, or are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, composed_model, prompts, randomize, switch

import calm_fast
from calm_fast.hf import ComposedForCausalLM, compose

peft = pytest.importorskip("peft")
USUAL = ["q_proj", "v_proj"]
READ = ((0, 1), (2, 2))


def adapted(model: ComposedForCausalLM, targets: Any = USUAL, **options: Any) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def loss(model: Any) -> torch.Tensor:
    return model(input_ids=prompts()).logits.square().mean()


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def trained(model: Any, where: str = "") -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad and where in name}


def slope(model: Any, along: dict[str, torch.nn.Parameter], directions: list[torch.Tensor], step: float) -> float:
    """Return the loss's slope along `directions` by central differences."""
    found = []
    with torch.no_grad():
        for sign in (step, -2 * step, step):
            for p, d in zip(along.values(), directions, strict=True):
                p.add_(d, alpha=sign)
            found.append(float(loss(model)))
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.seam(
    attach="PEFT LoRA with the usual `target_modules`",
    to="composition",
    result="works",
    why="adapters act on the anchor, the connections and the augmenters, and all of them get gradients",
)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_adapter_gets_its_gradient(name: str) -> None:
    targets = USUAL if name == "llama" else ["c_attn", "q_proj", "v_proj"]
    model = adapted(composed_model(name, READ).double(), targets)
    found = gradients(model)
    assert set(found) == set(trained(model))
    for part in ("anchor.", "augmenters.", "connections."):
        along = trained(model, part)
        directions = [torch.randn_like(p) for p in along.values()]
        expected = sum(float((found[n] * d).sum()) for n, d in zip(along, directions, strict=True))
        if name == "gpt2":  # Llama's norms compute in float32, whose rounding hides a slope
            # central differences in float64: the error is of the order of step^2
            assert slope(model, along, directions, 1e-5) == pytest.approx(expected, rel=1e-5, abs=1e-7), part


def test_a_frozen_augmenter_is_not_recorded() -> None:
    model = composed_model("llama", READ)
    seen: list[bool] = []
    model.augmenters[0].model.layers[2].register_forward_hook(
        lambda _, args, out: seen.append((out[0] if isinstance(out, tuple) else out).requires_grad)
    )
    loss(model).backward()
    adapted(model, "augmenters.*layers.0.*q_proj")
    with torch.no_grad():
        loss(model)
    loss(model)
    assert seen == [False, False, True]


@pytest.mark.seam(
    attach="gradient checkpointing with adapters on anchor and augmenters",
    to="composition",
    result="works",
    why="the gradients are those without checkpointing, reentrant or not",
)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(
    "targets", [USUAL, "anchor.*layers.2.*q_proj", "augmenters.*q_proj"], ids=["usual", "anchor", "augmenter"]
)
def test_gradients_with_checkpointing_are_those_without(targets: Any, reentrant: bool) -> None:
    plain, checkpointed = (adapted(composed_model("llama", READ), targets) for _ in range(2))
    base = checkpointed.get_base_model()
    base.train()
    switch(base, "enable")({"use_reentrant": reentrant})
    expected, found = gradients(plain), gradients(checkpointed)
    assert set(found) == set(expected) == set(trained(plain))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.seam(
    attach="an adapter on an augmenter's layer that no connection reads",
    to="composition",
    result="refused",
    why="it could never act; leave it out (PEFT's `exclude_modules`) or connect a later layer",
)
def test_an_adapter_that_can_never_act_is_refused() -> None:
    model = adapted(composed_model("llama", [(-1, 0), (-1, 1)]))
    with pytest.raises(ValueError, match=r"`augmenters\.0` must be trainable only where .* layer 0, .*exclude_modules"):
        loss(model)
    with torch.no_grad():
        loss(model)
    good = adapted(composed_model("llama", [(-1, 0), (-1, 1)]), exclude_modules=r"augmenters\..*")
    assert set(gradients(good)) == set(trained(good))


@pytest.mark.seam(
    attach="`requires_grad_(True)` on weights of a part",
    to="composition",
    result="works",
    why="they train; save the part yourself, because `save_pretrained` writes the connections only",
)
@pytest.mark.parametrize("where", ["anchor.transformer.h.0.mlp", "augmenters.0.transformer.h.1.mlp"])
def test_weights_of_a_part_train_if_asked(where: str) -> None:
    model = composed_model("gpt2", READ).double()
    model.get_submodule(where).requires_grad_(True)
    found, along = gradients(model), trained(model, where)
    assert len(along) == 4 and set(found) == set(trained(model))
    directions = [torch.randn_like(p) for p in along.values()]
    expected = sum(float((found[n] * d).sum()) for n, d in zip(along, directions, strict=True))
    assert slope(model, along, directions, 1e-5) == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_trained_weights_outside_of_the_layers_must_be_read() -> None:
    model = composed_model("llama", [(-1, 0), (1, 1)])
    model.augmenters[0].get_input_embeddings().requires_grad_(True)
    assert set(gradients(model)) == set(trained(model))
    model.augmenters[0].model.norm.requires_grad_(True)
    with pytest.raises(
        ValueError, match=r"`augmenters\.0` must be .* model\.norm\.weight, in a part that no connected"
    ):
        loss(model)


@pytest.mark.seam(
    attach="a PEFT adapter, saved and loaded on the reloaded composition",
    to="composition",
    result="works",
    why="the composition and its adapter are saved to two folders; load the composition first",
)
def test_a_saved_adapter_gives_the_same_logits_on_the_reloaded_composition(tmp_path: Path) -> None:
    model = adapted(composed_model("llama", READ))
    for p in trained(model).values():
        torch.nn.init.normal_(p, std=0.2)
    ids = prompts()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with model.disable_adapter():
            plain = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "adapter")
    family = FAMILIES["llama"]
    fresh = compose(family.model(0), family.model(1), list(READ))
    fresh.connections.load_state_dict(
        randomize(compose(family.model(0), family.model(1), list(READ))).connections.state_dict()
    )
    fresh.save_pretrained(tmp_path / "composition")
    reloaded = ComposedForCausalLM.from_pretrained(
        tmp_path / "composition", anchor=family.model(0), augmenters=family.model(1)
    )
    again = peft.PeftModel.from_pretrained(reloaded, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-2


@pytest.mark.parametrize(
    "run",
    [
        lambda model: model,
        lambda model: model.merge_and_unload(),
    ],
    ids=["attached", "merged"],
)
def test_adapted_generation_equals_recomputation(run: Callable[[Any], Any]) -> None:
    composed = composed_model("llama", READ)
    ids = prompts()
    composed.generate(input_ids=ids, max_new_tokens=2, do_sample=False)  # keeps the weights before the adapters
    model = run(adapted(composed))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(input_ids=ids, **settings)
    text = ids
    with torch.no_grad():
        for _ in range(6):
            token = model(input_ids=text, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            text = torch.cat((text, token), 1)
    assert torch.equal(found, text)


def test_generation_keeps_folded_weights_and_training_steps_between_change_them() -> None:
    composed = composed_model("llama", READ)
    ids, settings = prompts(), {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    composed.generate(input_ids=ids, **settings)
    kept = [c._folded.value for c in composed.connections]
    assert all(value is not None for value in kept)
    composed.generate(input_ids=ids, **settings)
    assert all(c._folded.value is value for c, value in zip(composed.connections, kept, strict=True))
    for p in composed.connections.parameters():
        p.grad = torch.randn_like(p)
    torch.optim.AdamW(composed.connections.parameters(), lr=0.1, fused=True).step()
    twin = randomize(composed_model("llama", READ))
    twin.connections.load_state_dict(composed.connections.state_dict())
    assert torch.equal(composed.generate(input_ids=ids, **settings), twin.generate(input_ids=ids, **settings))
    with torch.no_grad(), calm_fast.fixed_weights(composed):
        torch.testing.assert_close(composed(ids).logits, twin(ids).logits, rtol=1e-3, atol=1e-3)
