"""The settings of a composition's training."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from calm_fast.core.checks import bad_type, bad_value, check_finite_number
from calm_fast.core.devices import usable_device
from calm_fast.hf.resuming import quiet_arguments

DTYPES = ("auto", "float32", "bfloat16", "float16")
_WHERE = "composing.Settings"


@dataclass(frozen=True)
class Settings:
    """Settings of `composing.run`.

    connections, num_heads, head_dim, bidirectional: see `compose`. chat_template_kwargs: variables for the chat
    template, such as {"enable_thinking": False}. steps: optimizer steps. batch_size: examples of a step and device.
    accumulate: batches whose gradients are added for a step. learning_rate: reached after `warmup` steps, by default a
    tenth of the steps, at most 50; it falls to zero by a cosine. max_length: most tokens of an example. dtype: of the
    frozen parts, "auto" = as they were saved; the connections are float32. gradient_checkpointing: recompute the
    anchor's layers in the backward pass, which takes less memory and more time. holdout: share of the rows that are
    kept out of training where no held-out file is given. save_every: steps between checkpoints, by default a tenth of
    the steps. device: None = a GPU if there is one. progress: show bars. cache_augmenter: a folder for the augmenters'
    states of the training rows (`calm_fast.hf.cache_augmenter_states`), which are then computed once and read in every
    epoch; None runs the augmenters in every step.

    Raises:
        TypeError, ValueError: a value is wrong; the message names it, what was expected and what came.
    """

    connections: Any = "uniform:4"
    num_heads: int | None = None
    head_dim: int | None = None
    bidirectional: Any = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    steps: int = 1000
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: int | None = None
    weight_decay: float = 0.1
    max_length: int = 512
    dtype: str = "auto"
    gradient_checkpointing: bool = False
    holdout: float = 0.05
    save_every: int | None = None
    seed: int = 0
    device: str | None = None
    progress: bool = True
    cache_augmenter: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulate": 1, "max_length": 2, "seed": 0, "warmup": 0, "save_every": 1}
        least |= {"num_heads": 1, "head_dim": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name in ("warmup", "save_every", "num_heads", "head_dim"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise bad_type(_WHERE, name, "an integer", value)
            if value < lowest:
                raise bad_value(_WHERE, name, f"at least {lowest}", str(value))
        if self.warmup_steps >= self.steps:
            expected = f"below `steps` ({self.steps}), or the learning rate is never reached"
            raise bad_value(_WHERE, "warmup", expected, str(self.warmup))
        for name in ("learning_rate", "weight_decay", "holdout"):
            check_finite_number(_WHERE, name, getattr(self, name))
        if self.learning_rate <= 0:
            raise bad_value(_WHERE, "learning_rate", "positive", str(self.learning_rate))
        if self.weight_decay < 0:
            raise bad_value(_WHERE, "weight_decay", "at least 0", str(self.weight_decay))
        if not 0 <= self.holdout < 1:
            raise bad_value(_WHERE, "holdout", "a share of at least 0 and below 1", str(self.holdout))
        if self.chat_template_kwargs is not None and not isinstance(self.chat_template_kwargs, Mapping):
            raise bad_type(_WHERE, "chat_template_kwargs", "a dict or None", self.chat_template_kwargs)
        if self.dtype not in DTYPES:
            raise bad_value(_WHERE, "dtype", f"one of {', '.join(DTYPES)}", repr(self.dtype))

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return min(50, self.steps // 10) if self.warmup is None else self.warmup

    @property
    def log_every(self) -> int:
        """Steps between two points of the loss curve."""
        return max(1, self.steps // 100)

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints: whole points of the loss curve, so that a resumed curve is the same."""
        wanted = max(1, self.steps // 10) if self.save_every is None else self.save_every
        return max(1, wanted // self.log_every) * self.log_every

    @property
    def target(self) -> torch.device:
        """The device of training and evaluation."""
        return usable_device(_WHERE, self.device)

    def decisive(self) -> dict[str, Any]:
        """Return what decides the weights at the end, for the comparison with an earlier run."""
        names = (
            "num_heads head_dim steps batch_size accumulate learning_rate weight_decay max_length dtype holdout seed"
        )
        found = {name: getattr(self, name) for name in names.split()}
        found |= {"connections": _plain(self.connections), "warmup": self.warmup_steps}
        # absent by default, as in runs of earlier versions, which go on; cached states may round in another way
        extras = {"bidirectional": self.bidirectional, "chat_template_kwargs": self.chat_template_kwargs}
        extras |= {"cached_states": self.cache_augmenter is not None}
        return found | {name: value for name, value in extras.items() if value}

    def arguments(self, out: str | os.PathLike[str]) -> TrainingArguments:
        """Return these settings as transformers' TrainingArguments with the output folder `out`."""
        return quiet_arguments(
            out,
            self.seed,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            gradient_accumulation_steps=self.accumulate,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            logging_steps=self.log_every,
            logging_nan_inf_filter=False,  # the run stops where the loss is not finite
            save_strategy="steps",
            save_steps=self.checkpoint_every,
            use_cpu=self.target.type == "cpu",
        )


def _plain(connections: Any) -> Any:
    """Return connections as JSON has them."""
    if isinstance(connections, Sequence) and not isinstance(connections, str):
        return [_plain(part) for part in connections]
    return connections
