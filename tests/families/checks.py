"""What is checked of every family: as anchor, as augmenter, with dual LoRA, and scored.

A check takes a model and raises if it is wrong. Where it also fails for the plain model, the fault is transformers'.
"""

from __future__ import annotations

import copy
import inspect
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from shrink import LAYERS, VOCAB, WIDTH, tiny_model
from transformers import LlamaConfig, LlamaForCausalLM

from calm_fast import add_dual_lora, remove_dual_lora
from calm_fast.consistency import score_sequences
from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.dual_lora import dual_lora_layers

STEPS = 4


def prompts() -> torch.Tensor:
    """Return (2, 7) token ids without special ones."""
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(3))


def llama() -> Any:
    """Return the model that stands on the other side of every composition."""
    torch.manual_seed(1)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    ids = {"vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **ids, initializer_range=0.3)).eval()


def composed(model: Any, role: str, dtype: torch.dtype = torch.float32) -> ComposedForCausalLM:
    """Compose `model` in a role with a Llama, with random weights."""
    parts = (model, llama().to(dtype)) if role == "anchor" else (llama().to(dtype), model)
    result = compose(*parts, "uniform:2", vocab_size=VOCAB, same_ids=True)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in result.connections.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.1 * noise if p.ndim == 1 else noise / p.shape[-1] ** 0.5)
    return result


def close(one: torch.Tensor, two: torch.Tensor, steps: float = 2e-4) -> None:
    """Raise AssertionError unless two tensors are equal up to the rounding of float32 through a few layers."""
    if one.shape != two.shape or not one.isfinite().all():
        raise AssertionError(f"shapes {tuple(one.shape)} and {tuple(two.shape)}, or not finite")
    moved = (one - two).abs().max().item()
    if not moved <= steps * max(1.0, two.abs().max().item()):
        raise AssertionError(f"differs by {moved:.3g}")


@torch.no_grad()
def no_leak(model: Any) -> None:
    ids = prompts()
    other = ids.clone()
    other[:, -1] = 3 + (ids[:, -1] - 2) % (VOCAB - 3)
    close(model(ids, use_cache=False).logits[:, :-1], model(other, use_cache=False).logits[:, :-1])


@torch.no_grad()
def padding(model: Any) -> None:
    ids = prompts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    takes = "position_ids" in inspect.signature(type(model).forward).parameters
    extra = {"position_ids": positions} if takes else {}
    padded = model(ids * mask, attention_mask=mask, use_cache=False, **extra).logits[:1, 3:]
    close(padded, model(ids[:1, 3:], use_cache=False).logits)


def generates(**how: Any) -> Callable[[Any], None]:
    """Return the check that generation with a cache gives the tokens of recomputation."""

    def check(model: Any) -> None:
        plain = {k: v for k, v in how.items() if k != "cache_implementation"}
        common = {"max_new_tokens": STEPS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = torch.ones_like(prompts())
        cached = model.generate(prompts(), attention_mask=mask, use_cache=True, **common, **how)
        if not torch.equal(cached, model.generate(prompts(), attention_mask=mask, use_cache=False, **common, **plain)):
            raise AssertionError("cached and recomputed tokens differ")

    return check


def trains(model: Any) -> None:
    ids = prompts()
    if not isinstance(model, ComposedForCausalLM):
        model(ids, labels=ids).loss.backward()
        return
    model.train()(ids, labels=ids).loss.backward()
    dead = [name for name, p in model.connections.named_parameters() if p.grad is None or not p.grad.any()]
    if dead:
        raise AssertionError(f"no gradient for {dead[:2]}")


def checkpoints(model: Any) -> None:
    ids = prompts()
    if not isinstance(model, ComposedForCausalLM):
        model.gradient_checkpointing_enable()
        return
    model.train()(ids, labels=ids).loss.backward()
    grads = [p.grad.clone() for p in model.connections.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for one, p in zip(grads, model.connections.parameters(), strict=True):
        close(p.grad, one)


@torch.no_grad()
def saves(model: Any) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder, **_parts(model))
        close(loaded.eval()(prompts(), use_cache=False).logits, model(prompts(), use_cache=False).logits, 1e-6)


def _parts(model: Any) -> dict[str, Any]:
    return model.given if isinstance(model, ComposedForCausalLM) else {}


ON_MODELS: dict[str, Callable[[Any], None]] = {
    "no leak": no_leak,
    "padding": padding,
    "greedy": generates(),
    "beams": generates(num_beams=2),
    "static cache": generates(cache_implementation="static"),
    "training": trains,
    "checkpointing": checkpoints,
    "save, load": saves,
}


def in_role(model_type: str, role: str, name: str) -> None:
    """Run check `name` on a composition with the family in `role`."""
    model = tiny_model(model_type)
    if name == "compose":
        composed(model, role)
    elif name == "identity":
        other = llama()
        parts = (model, other) if role == "anchor" else (other, model)
        made = compose(*parts, "uniform:2", vocab_size=VOCAB, same_ids=True)
        with torch.no_grad():
            expected = parts[0](prompts(), use_cache=False).logits
            if not torch.equal(made(prompts(), use_cache=False).logits, expected):
                raise AssertionError("the untrained composition is not its anchor")
    elif name == "bf16":
        with torch.no_grad():
            logits = composed(model.bfloat16(), role, torch.bfloat16)(prompts(), use_cache=False).logits
        if not logits.isfinite().all():
            raise AssertionError("not finite")
    else:
        made = composed(model, role)
        if name == "save, load":
            other = made.anchor if role == "augmenter" else llama()
            parts = (model, other) if role == "anchor" else (other, model)
            made.given = {"anchor": parts[0], "augmenters": [parts[1]]}
        ON_MODELS[name](made)


def plain(model_type: str, name: str) -> None:
    """Run check `name` on the family's plain model."""
    model = tiny_model(model_type)
    if name == "bf16":
        with torch.no_grad():
            assert model.bfloat16()(prompts(), use_cache=False).logits.isfinite().all()
    elif name in ON_MODELS:
        ON_MODELS[name](model)
    else:
        with torch.no_grad():
            model(prompts(), use_cache=False)


def dual_lora(model_type: str) -> None:
    """Add dual LoRA with the default targets, train a step, and remove it.

    Every layer that runs must get a gradient. Some families have layers that a text alone does not reach, such as the
    cross-attention of BART's decoder.
    """
    model, ids = tiny_model(model_type), prompts()
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    add_dual_lora(model, rank=2, gate_dim=4, value_dim=4)
    layers, ran = dual_lora_layers(model), set()
    for path, layer in layers.items():
        layer.register_forward_hook(lambda *_, path=path: ran.add(path))
    logits = model(ids, use_cache=False).logits
    close(logits.detach(), before)
    logits.square().mean().backward()
    dead = [path for path, layer in layers.items() if path in ran and layer.lora_a_pos.grad is None]
    if dead or not ran:
        raise AssertionError(f"no gradient for {dead[:2]}")
    remove_dual_lora(model)
    if any(not torch.equal(state[name], tensor) for name, tensor in model.state_dict().items()):
        raise AssertionError("removal does not restore the model")


@torch.no_grad()
def scores(model_type: str) -> None:
    """Compare score_sequences with the log-softmax of the plain model's logits, one row at a time."""
    model, ids = tiny_model(model_type), prompts()
    rows = ids.tolist()
    found = score_sequences(model, [rows[0][:3]], [[rows[0][3:], rows[1][3:6]]], progress=False)[0].sum
    for value, completion in zip(found.tolist(), (rows[0][3:], rows[1][3:6]), strict=True):
        text = torch.tensor([rows[0][:3] + completion])
        logprobs = model(text, use_cache=False).logits[0, 2:-1].double().log_softmax(-1)
        expected = logprobs.gather(1, text[0, 3:, None]).sum().item()
        if abs(value - expected) > 1e-3 * max(1.0, abs(expected)):
            raise AssertionError(f"{value:.5f} instead of {expected:.5f}")


ROLES = ("anchor", "augmenter")
IN_ROLES = ("compose", "identity", *ON_MODELS, "bf16")
ALONE: dict[str, Callable[[str], None]] = {"dual LoRA": dual_lora, "score_sequences": scores}
