"""Numbers of a training that only the model's inside knows, logged by Trainer beside the loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DefaultFlowCallback, Trainer, TrainerCallback

from calm_fast.core.checks import bad_type, bad_value
from calm_fast.hf.composition import Composition
from calm_fast.hf.dual_lora import dual_lora_layers
from calm_fast.hf.wrappers import inner_model
from calm_fast.modules.dual_lora import DualLoRALinear, GateStatistics

RESIDUAL, GATE, CACHE = "residual/", "gate/", "augmenter_states/from_cache"
_GIVEN = "augmenter_hidden_states"  # the argument of forward by which a batch brings states


def watch(trainer: Trainer) -> Watch:
    """Add to every training loss that `trainer` logs what happens inside its model. Return the callback that does it.

    The numbers are those since the last logged loss. They reach everything that `report_to` names, and
    ``trainer.state.log_history``. Of several processes each counts its own batches, and the first one reports.

    Of a composition, for connection c (``model.pairs[c]``), with r_t the residual that it adds to the anchor's state
    h_t of token t, padding included, in the anchor's dtype:

        residual/<c> = sqrt(sum_t ||r_t||^2 / sum_t ||h_t||^2)

    Of a composition that got states of augmenters with a batch (`cache_augmenter_states`): augmenter_states/from_cache,
    the share of (batch, augmenter) pairs whose augmenter did not run.

    Of dual LoRA in mode "mix", for every layer: gate/<path>/mean and gate/<path>/std of p_neg over the tokens that it
    saw (generated ones included), and gate/mean, the mean over the layers. Batches of an evaluation do not count. The
    callback switches `record_gates` on.

    Each connection costs two sums of squares over its states per batch. Logging reads the numbers, which synchronises.

    Raises:
        TypeError: `trainer` is no Trainer of transformers.
        ValueError: its model is neither a composition nor has dual LoRA, or is to be compiled.
    """
    if not isinstance(trainer, Trainer):
        raise bad_type("watch", "trainer", "a Trainer of transformers, or of a subclass such as TRL's", trainer)
    if trainer.args.torch_compile:
        got = "one with torch_compile=True. Watch a training without it"
        raise bad_value("watch", "trainer", "one that does not compile the model", got)
    assert trainer.model is not None  # Trainer demands a model
    callback = Watch(trainer.model)
    trainer.add_callback(callback)
    # before those that report, because they read the logs in turn; after the one that decides when to log and evaluate
    callbacks = trainer.callback_handler.callbacks
    callbacks.remove(callback)
    deciding = (i for i, one in enumerate(callbacks) if isinstance(one, DefaultFlowCallback))
    callbacks.insert(1 + max(deciding, default=-1), callback)
    return callback


class Watch(TrainerCallback):
    """Counts what `watch` says. Only `watch` puts it where the logs can still be added to."""

    def __init__(self, model: nn.Module) -> None:
        inner = inner_model(model)
        self.composition = inner if isinstance(inner, Composition) else None
        self.layers = dual_lora_layers(model)
        if self.composition is None and not self.layers:
            got = f"a {type(inner).__name__} without either"
            raise bad_value("watch", "trainer", "one of a composition or of a model with dual LoRA layers", got)
        self.handles: list[RemovableHandle] = []
        self.sums: dict[int, torch.Tensor] = {}
        self.given, self.augmenters = 0, 0
        self.before: dict[str, GateStatistics] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
        if self.composition is not None:
            connections = enumerate(self.composition.connections)
            self.handles = [one.register_forward_hook(partial(self._measure, c)) for c, one in connections]
            self.handles.append(self.composition.register_forward_pre_hook(self._count, with_kwargs=True))
        for layer in self.layers.values():
            layer.record_gates = True
        self._clear_gates()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()
        for layer in self.layers.values():
            layer.record_gates = False

    def _stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.sums, self.before = [], {}, {}
        self.given = self.augmenters = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if control.should_evaluate:
            self.before = self._gates()
            self._clear_gates()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clear_gates()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs is None or "loss" not in logs:  # of an evaluation, or the summary of a training
            return
        found = dict(self._numbers())
        logs.update(found)
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(found)
        self.sums, self.before = {}, {}
        self.given = self.augmenters = 0
        self._clear_gates()

    def _numbers(self) -> Iterator[tuple[str, float]]:
        """Yield (name, number) of everything counted since the last log."""
        for c, sums in sorted(self.sums.items()):
            residual, state = sums.tolist()
            yield f"{RESIDUAL}{c}", math.sqrt(residual / state) if state else math.nan
        if self.given:
            yield CACHE, self.given / self.augmenters
        means = []
        for path, gate in self._gates().items():
            if gate.tokens:
                yield f"{GATE}{path}/mean", gate.mean
                yield f"{GATE}{path}/std", gate.std
                means.append(gate.mean)
        if means:
            yield f"{GATE}mean", sum(means) / len(means)

    @torch.no_grad()
    def _measure(self, c: int, connection: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
        """Forward hook of connection `c`: count squares of its residual and of the state (B, M, DB) before."""
        if connection.training:
            hidden = args[0]
            sums = torch.stack([(output - hidden).float().square().sum(), hidden.float().square().sum()])
            self.sums[c] = self.sums[c] + sums if c in self.sums else sums

    def _count(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the composition: count whose states came with the batch."""
        if model.training:
            given = kwargs.get(_GIVEN)
            states = given if isinstance(given, (list, tuple)) else [given]  # one augmenter's may come without a list
            self.given += sum(one is not None for one in states)
            self.augmenters += len(model.augmenters)  # type: ignore[arg-type]  # a ModuleList

    def _gates(self) -> dict[str, GateStatistics]:
        return {path: _joined(self.before.get(path), layer) for path, layer in self.layers.items()}

    def _clear_gates(self) -> None:
        for layer in self.layers.values():
            layer.clear_gates()


def _joined(before: GateStatistics | None, layer: DualLoRALinear) -> GateStatistics:
    """Return the gate statistics of the tokens of `before` and of those that `layer` has counted."""
    now = layer.gate_statistics()
    if before is None or not before.tokens or not now.tokens:
        return now if before is None or not before.tokens else before
    tokens = before.tokens + now.tokens
    mean = (before.tokens * before.mean + now.tokens * now.mean) / tokens
    parts = ((g.tokens, g.std**2 + (g.mean - mean) ** 2) for g in (before, now))
    histogram = tuple(a + b for a, b in zip(before.histogram, now.histogram, strict=True))
    return GateStatistics(tokens, mean, math.sqrt(sum(n * square for n, square in parts) / tokens), histogram)
