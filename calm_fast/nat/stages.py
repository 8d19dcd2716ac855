"""The three stages, one function each, which trains in place and returns the losses that its Trainer logged."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from calm_fast.core.checks import bad_type, bad_value, check_finite_number
from calm_fast.core.prompt_record import set_prompt_record
from calm_fast.core.token_ids import check_token_ids
from calm_fast.hf.dual_lora import RESTORE, add_dual_lora, dual_lora_layers
from calm_fast.hf.dual_lora_files import WEIGHTS
from calm_fast.hf.resuming import quiet_arguments, train_or_resume
from calm_fast.modules.dual_lora import VARIANTS
from calm_fast.nat.data import RationaleDataset, RightPadding
from calm_fast.nat.trainer import MASKINGS, DualLoRATrainer, DualTeacher, NCETrainer, find_nce_head

History = list[dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """Settings of all stages.

    steps, batch_size, learning_rate, warmup: of each stage. The rate rises to `learning_rate` over `warmup` steps, by
    default a tenth of the steps, at most 20, and falls to zero by a cosine. target_modules: the layers, see
    `add_dual_lora`; None = its default for the family. rank, alpha, variant, gate_dim, value_dim, dropout: see
    `DualLoRALinear`. nce_alpha, nce_temperature, nce_offset: constants of `ops.linear_nce`. nce_masking: "paper" or
    "released", the tokens that NCE counts, see `NCETrainer`. save_every: steps between checkpoints, 0 = none. progress:
    show a bar.

    Raises:
        TypeError, ValueError: a value is wrong; the message names it, what was expected and what came.
    """

    steps: int = 300
    batch_size: int = 8
    learning_rate: float = 1e-3
    warmup: int | None = None
    rank: int = 8
    alpha: float = 16.0
    target_modules: tuple[str, ...] | None = None
    variant: str = "paper"
    gate_dim: int = 128
    value_dim: int | None = 128
    dropout: float = 0.0
    nce_alpha: float = 0.5
    nce_temperature: float = 1.0
    nce_offset: float = 0.5
    nce_masking: str = "paper"
    save_every: int = 100
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "rank": 1, "gate_dim": 1, "warmup": 0, "save_every": 0, "seed": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if name == "warmup" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise bad_type("nat.Settings", name, "an integer", value)
            if value < lowest:
                raise bad_value("nat.Settings", name, f"at least {lowest}", str(value))
        if self.warmup_steps >= self.steps:
            expected = f"below `steps` ({self.steps}), or the learning rate is never reached"
            raise bad_value("nat.Settings", "warmup", expected, str(self.warmup))
        if self.variant not in VARIANTS:
            raise bad_value("nat.Settings", "variant", "'paper' or 'released'", repr(self.variant))
        if self.nce_masking not in MASKINGS:
            raise bad_value("nat.Settings", "nce_masking", "'paper' or 'released'", repr(self.nce_masking))
        for name in ("learning_rate", "nce_temperature"):
            check_finite_number("nat.Settings", name, getattr(self, name))
            if getattr(self, name) <= 0:
                raise bad_value("nat.Settings", name, "positive", str(getattr(self, name)))
        for name in ("alpha", "dropout", "nce_alpha", "nce_offset"):
            check_finite_number("nat.Settings", name, getattr(self, name))
        if not 0 <= self.dropout < 1:
            raise bad_value("nat.Settings", "dropout", "at least 0 and below 1", str(self.dropout))

    @property
    def warmup_steps(self) -> int:
        """Steps over which the learning rate rises."""
        return min(20, self.steps // 10) if self.warmup is None else self.warmup

    def arguments(self, out: str | os.PathLike[str]) -> TrainingArguments:
        """Return these settings as transformers' TrainingArguments with the output folder `out`."""
        return quiet_arguments(
            out,
            self.seed,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            warmup_steps=self.warmup_steps,
            weight_decay=0.0,
            logging_steps=max(1, self.steps // 20),
            save_strategy="steps" if self.save_every else "no",
            save_steps=self.save_every or 500,
        )

    def layer_options(self) -> dict[str, Any]:
        """Return the options of DualLoRALinear."""
        names = ("rank", "alpha", "variant", "gate_dim", "value_dim", "dropout")
        return {name: getattr(self, name) for name in names}


def train_negative(
    model: PreTrainedModel, wrong: RationaleDataset, pad_id: int, out: str | os.PathLike[str], settings: Settings
) -> History:
    """Stage 1: add dual LoRA layers to `model` and train their negative LoRA on wrong rationales.

    Args:
        model: a causal language model without dual LoRA; changed in place. wrong: tokenised wrong rationales.
        pad_id: token id for padding. out: folder of checkpoints; an interrupted stage resumes from the last one there.
        settings: see `Settings`.
    Returns:
        the logged losses.
    Source: arXiv 2312.12832, section 3.2.
    """
    _seed(settings)
    add_dual_lora(model, settings.target_modules, mode="neg", **settings.layer_options())
    return _fit("train_negative", "wrong", DualLoRATrainer, model, wrong, pad_id, out, settings)


def train_nat(
    model: PreTrainedModel,
    right: RationaleDataset,
    negative: str | os.PathLike[str] | Mapping[str, torch.Tensor],
    pad_id: int,
    out: str | os.PathLike[str],
    settings: Settings,
) -> History:
    """Stage 2 (NAT): train positive LoRA, gate and value on right rationales over a frozen negative LoRA.

    Args:
        model: a causal language model without dual LoRA; changed in place. right: tokenised right rationales.
        negative: folder or tensors of the negative LoRA, a PEFT adapter such as that of stage 1.
        pad_id, out, settings: as in `train_negative`.
    Returns:
        the logged losses.
    Source: arXiv 2312.12832, section 3.2.
    """
    _seed(settings)
    add_dual_lora(model, settings.target_modules, negative, mode="mix", **settings.layer_options())
    return _fit("train_nat", "right", DualLoRATrainer, model, right, pad_id, out, settings)


def distil_nce(
    teacher: PreTrainedModel, right: RationaleDataset, pad_id: int, out: str | os.PathLike[str], settings: Settings
) -> tuple[PreTrainedModel, History]:
    """Stage 3 (NCE): distil the NAT model into one LoRA with the negative calibrated enhancement loss.

    Args:
        teacher: the NAT model of stage 2, which is moved to the Trainer's device. The student shares its frozen base.
        right: tokenised right rationales. pad_id, out, settings: as in `train_negative`.
    Returns:
        (student, losses): the student is the base model with dual LoRA layers in mode "pos".
    Raises:
        ValueError: the LM head is not one linear layer with an optional factor and soft cap.
    Source: arXiv 2312.12832, section 3.3.
    """
    find_nce_head(teacher, "distil_nce", "teacher")
    _seed(settings)
    # Trainer moves the student to this device, and with it the shared base
    cast(nn.Module, teacher).to(settings.arguments(out).device)
    student = _student(teacher, settings)
    options = {
        "alpha": settings.nce_alpha,
        "temperature": settings.nce_temperature,
        "offset": settings.nce_offset,
        "masking": settings.nce_masking,
        "teachers": DualTeacher(teacher),
    }
    return student, _fit("distil_nce", "right", NCETrainer, student, right, pad_id, out, settings, **options)


def plain_lora(
    model: PreTrainedModel, right: RationaleDataset, pad_id: int, out: str | os.PathLike[str], settings: Settings
) -> History:
    """Train the baseline: one LoRA on right rationales with cross-entropy alone, as dual LoRA layers in mode "pos".

    Args:
        model: a causal language model without dual LoRA; changed in place. right: tokenised right rationales.
        pad_id, out, settings: as in `train_negative`.
    Returns:
        the logged losses.
    """
    _seed(settings)
    add_dual_lora(model, settings.target_modules, mode="pos", **_single_lora(settings))
    return _fit("plain_lora", "right", DualLoRATrainer, model, right, pad_id, out, settings)


def _single_lora(settings: Settings) -> dict[str, Any]:
    # "released" starts B_pos at zero, as a plain LoRA does; mode "pos" uses neither gate nor value
    options = settings.layer_options() | {"variant": "released", "gate_dim": 1, "value_dim": 1}
    return options | {"rank_neg": 1}


def _student(teacher: PreTrainedModel, settings: Settings) -> PreTrainedModel:
    """Return a copy of the teacher's base model that shares every frozen tensor, with new layers in mode "pos"."""
    layers = dual_lora_layers(teacher)
    own = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False)}
    shared = {id(t): t for t in (*teacher.parameters(), *teacher.buffers()) if id(t) not in own}
    student = copy.deepcopy(teacher, memo=shared)
    for path, layer in dual_lora_layers(student).items():
        parent, _, name = path.rpartition(".")
        setattr(student.get_submodule(parent), name, layer.base)
    student.__dict__.pop(RESTORE, None)
    add_dual_lora(student, settings.target_modules, mode="pos", **_single_lora(settings))
    return student


def _seed(settings: Settings) -> None:
    torch.manual_seed(settings.seed)


def _fit(
    where: str,
    argument: str,
    trainer_class: type[DualLoRATrainer],
    model: nn.Module,
    dataset: RationaleDataset,
    pad_id: int,
    out: str | os.PathLike[str],
    settings: Settings,
    **options: Any,
) -> History:
    check_token_ids(where, "pad_id", [pad_id], model)
    # other datasets are not read in advance
    for i, item in enumerate(dataset.items if isinstance(dataset, RationaleDataset) else ()):
        check_token_ids(where, f"{argument}[{i}]", item["input_ids"], model)
    set_prompt_record(model, dataset.form.record() if isinstance(dataset, RationaleDataset) else None)
    trainer = trainer_class(
        model=model,
        args=settings.arguments(out),
        train_dataset=dataset,
        data_collator=RightPadding(pad_id),
        **options,
    )
    title = Path(out).name if settings.progress else None
    log, _ = train_or_resume(trainer, where, WEIGHTS, trainer.load_checkpoint, title=title)
    return [entry for entry in log if "loss" in entry]
