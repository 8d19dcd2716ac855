"""E1: one training step of a composed model, without the optimizer, which is the same for every contestant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from calm_fast.benchmarks.baselines.composition import (
    TRANSFORMERS,
    Engine,
    adding,
    augmenter_states,
    next_token_loss,
    plain_engine,
)
from calm_fast.benchmarks.baselines.cross_attention import PlainHook, ReleasedHook, unfolded_layer, visible
from calm_fast.benchmarks.cases.cross_attention_layer import WEIGHTS
from calm_fast.benchmarks.cases.model_shape import OP, ModelShape
from calm_fast.benchmarks.registry import Case, Contestant, Inputs, Series, Target, Thunk, Values

Weights = Mapping[str, torch.Tensor]


def composed(inputs: Inputs) -> Any:
    """Return calm_fast's composition of the inputs' models, with their connection weights."""
    from calm_fast import compose

    anchor = inputs["anchor"]
    config = anchor.config
    model = compose(
        anchor, inputs["augmenters"], inputs["pairs"], config.num_attention_heads, config.head_dim, dtype=anchor.dtype
    )
    with torch.no_grad():
        for layer, weights in zip(model.connections, inputs["weights"], strict=True):
            for parameter, name in zip(parameters_of(layer), WEIGHTS, strict=True):
                parameter.copy_(weights[name])
    return model


def parameters_of(layer: Any) -> list[torch.nn.Parameter]:
    """Return the parameters of a CrossAttention in the order of WEIGHTS."""
    return [m.weight for m in (layer.norm, layer.proj, layer.q_proj, layer.k_proj, layer.v_proj, layer.o_proj)]


def _gradients(loss: torch.Tensor, leaves: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}


def _ours(inputs: Inputs) -> Thunk:
    model, ids = composed(inputs), inputs["ids"]
    leaves = {
        f"{i}.{name}": p
        for i, layer in enumerate(model.connections)
        for name, p in zip(WEIGHTS, parameters_of(layer), strict=True)
    }
    return lambda: _gradients(model(input_ids=ids, labels=ids).loss, leaves)


def _leaves(weights: Sequence[Weights], dtype: torch.dtype | None = None) -> list[dict[str, torch.Tensor]]:
    return [{name: t.detach().to(dtype, copy=True).requires_grad_() for name, t in w.items()} for w in weights]


def _eager(
    inputs: Inputs, engine: Engine = TRANSFORMERS, dtype: Any = None, sdpa: bool = False, compiled: bool = False
) -> Thunk:
    """Prepare the same composition from the layer's equations: augmenters without LM head, a causal mask."""
    ids, heads, anchor = inputs["ids"], inputs["anchor"].config.num_attention_heads, inputs["anchor"]
    weights = _leaves(inputs["weights"], dtype)
    mask = None if sdpa else visible(ids.shape[1], ids.shape[1], ids.device, None, None, True)

    def layer(number: int, hb: torch.Tensor, ha: torch.Tensor) -> torch.Tensor:
        return unfolded_layer(weights[number], hb, ha, heads, sdpa=sdpa, causal=True, mask=mask)

    def loss() -> torch.Tensor:
        states = augmenter_states(engine, inputs, ids)
        hidden = engine.layers(anchor, ids, adding(inputs, states, layer))
        return next_token_loss(engine.head(anchor, hidden), ids)

    run = torch.compile(loss) if compiled else loss
    leaves = {f"{i}.{name}": w[name] for i, w in enumerate(weights) for name in WEIGHTS}
    return lambda: _gradients(run(), leaves)


def _released(inputs: Inputs, engine: Engine = TRANSFORMERS, dtype: Any = None, plain: bool = False) -> Thunk:
    """Prepare the released code's computation: the whole augmenter with LM head and loss, caches kept, no mask."""
    ids, anchor = inputs["ids"], inputs["anchor"]
    heads = anchor.config.num_attention_heads
    hooks = [ReleasedHook({n: t.to(dtype) for n, t in w.items()}, heads) for w in inputs["weights"]]
    run = [PlainHook(hook, heads) for hook in hooks] if plain else hooks

    def step() -> Values:
        kept = {} if plain else {"cache": _cache(anchor)}
        caches = None if plain else [_cache(model) for model in inputs["augmenters"]]
        states = augmenter_states(engine, inputs, ids, lambda logits: next_token_loss(logits, ids), caches)
        after = adding(inputs, states, lambda number, hb, ha: run[number](hb, ha))
        loss = next_token_loss(engine.head(anchor, engine.layers(anchor, ids, after, **kept)), ids)
        return _gradients(loss, {f"{i}.{n}": p for i, hook in enumerate(hooks) for n, p in hook.named_parameters()})

    return step


def _cache(model: Any) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _parts(inputs: Inputs, engine: Engine = TRANSFORMERS) -> Thunk:
    """Prepare the unavoidable part: augmenters up to their last connected layer, anchor forward and backward.

    Backward ends at the first connection. No connection is computed, so this is less than a composition.
    """
    ids, anchor = inputs["ids"], inputs["anchor"]
    first = min(b for pairs in inputs["pairs"] for _, b in pairs)

    def step() -> Values:
        states = augmenter_states(engine, inputs, ids)
        entered: dict[str, torch.Tensor] = {}

        def begin(index: int, hidden: torch.Tensor) -> torch.Tensor:
            if index == first:
                entered["hb"] = hidden.detach().requires_grad_()
            return entered["hb"] if index == first else hidden

        loss = next_token_loss(engine.head(anchor, engine.layers(anchor, ids, begin)), ids)
        tops = {f"ha_{i}": found[max(found)] for i, found in enumerate(states)}
        return _gradients(loss, entered) | tops

    return step


def _eager_definition(inputs: Inputs, dtype: torch.dtype) -> Values:
    return _eager(inputs, plain_engine(dtype), dtype)()


def _released_definition(inputs: Inputs, dtype: torch.dtype) -> Values:
    return _released(inputs, plain_engine(dtype), dtype, plain=True)()


def _parts_definition(inputs: Inputs, dtype: torch.dtype) -> Values:
    return _parts(inputs, plain_engine(dtype))()


def training_case(
    name: str,
    s: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    *,
    compiled: bool = False,
    only: Sequence[str] = (),
    series: Series | None = None,
    share: float = 1.0,
) -> Case:
    """Return a case of one training step.

    compiled: also torch.compile of the baseline with SDPA. only: the baselines to keep; empty keeps all.
    """
    prepare: dict[str, Callable[[Inputs], Thunk]] = {"eager": _eager, "unfolded_sdpa": partial(_eager, sdpa=True)}
    if compiled:
        prepare["compiled_unfolded_sdpa"] = partial(_eager, sdpa=True, compiled=True)
    contestants = [Contestant("calm_fast", _ours, ours=True)]
    contestants += [Contestant(which, run) for which, run in prepare.items()]
    if s.augmenters == 1:  # the released code supports one
        contestants.append(Contestant("released", _released, definition=_released_definition))
    contestants.append(Contestant("parts", _parts, definition=_parts_definition, yardstick=True))
    kept = [c for c in contestants if not only or c.ours or c.name in only]
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), s.make(dtype, device), tuple(kept),
        _eager_definition, "calm_fast", s.reduced().make(dtype, device), targets, series, share,
    )  # fmt: skip
