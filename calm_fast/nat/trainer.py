"""transformers' Trainer for dual LoRA layers: checkpoints hold them alone; NCE as a loss."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from calm_fast._ops.linear_nce.api import linear_nce
from calm_fast.hf.dual_lora import dual_lora_layers, save_dual_lora
from calm_fast.nat.data import IGNORE

_WEIGHTS = "dual_lora.safetensors"


class DualLoRATrainer(Trainer):
    """A Trainer whose checkpoints hold the dual LoRA layers and not the frozen model; resuming reads them back."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        save_dual_lora(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        file = Path(resume_from_checkpoint) / _WEIGHTS
        if not file.is_file():
            raise ValueError(f"resume_from_checkpoint: {file.name} is not in {resume_from_checkpoint}")
        tensors = load_file(file)
        with torch.no_grad():
            for path, layer in dual_lora_layers(self.model if model is None else model).items():
                for name, p in layer.named_parameters(recurse=False):
                    p.copy_(tensors[f"{path}.{name}"])


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B, M, d): what the LM head reads, without running the head."""
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]


def head_of(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor | None, float | None]:
    """(weight (V, d), bias, softcap) of a model's LM head, checked against the model's own logits once.

    Raises:
        ValueError: the model's logits are not softcap(weight h + bias), for instance because it scales them.
    """
    head = model.get_output_embeddings()
    if head is None or not isinstance(getattr(head, "weight", None), torch.Tensor):
        raise ValueError(f"{type(model).__name__} has no LM head with a weight: NCE needs one")
    weight, bias = head.weight, getattr(head, "bias", None)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    ids = torch.arange(4, device=weight.device)[None] % weight.shape[0]
    training = model.training
    model.eval()
    with torch.no_grad():
        h = hidden_states(model, ids, torch.ones_like(ids))
        ours = torch.nn.functional.linear(h, weight, bias)
        ours = ours if softcap is None else softcap * torch.tanh(ours / softcap)
        theirs = model(input_ids=ids, use_cache=False).logits.to(ours.dtype)
    model.train(training)
    if not torch.allclose(ours, theirs, rtol=1e-2, atol=1e-2 * float(theirs.abs().max())):
        raise ValueError(f"{type(model).__name__}: its logits are not its LM head's product (scaled?); NCE needs that")
    return weight, bias, softcap


@contextmanager
def _eval_mode(model: nn.Module):
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class NCETrainer(DualLoRATrainer):
    """Distils a NAT teacher into the model being trained with the NCE loss (arXiv 2312.12832, section 3.3).

    teachers(input_ids, attention_mask) -> (nat, neg) hidden states (B, M, d), under the same frozen LM head.
    """

    def __init__(
        self,
        *args: Any,
        teachers: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        alpha: float = 0.5,
        temperature: float = 1.0,
        offset: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.teachers = teachers
        self.options = {"alpha": alpha, "temperature": temperature, "offset": offset}
        self.head = head_of(self.model)
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the batch, as in the paper

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"]
        own = self.accelerator.unwrap_model(model)
        student = hidden_states(own, ids, mask)
        with torch.no_grad():
            nat, neg = self.teachers(ids, mask)
        # the state at a token predicts the next one
        targets = labels[:, 1:].flatten()
        rows = torch.arange(ids.shape[0], device=ids.device).repeat_interleave(ids.shape[1] - 1)
        keep = targets != IGNORE  # ragged: prompts and padding cost nothing in the vocabulary sweep
        streams = [h[:, :-1].flatten(0, 1)[keep] for h in (student, nat, neg)]
        weight, bias, softcap = self.head
        kept_rows = rows[keep]
        _, seq_ids = torch.unique(kept_rows, return_inverse=True)
        loss = linear_nce(*streams, weight, targets[keep], seq_ids, bias=bias, softcap=softcap, **self.options)
        return (loss, {"loss": loss}) if return_outputs else loss


class DualTeacher:
    """One dual LoRA model as both teachers: mode "mix" is the NAT teacher, mode "neg" the negative one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = {}
        with _eval_mode(self.model):
            for mode in ("neg", "mix"):
                for layer in dual_lora_layers(self.model).values():
                    layer.set_mode(mode)
                    layer.requires_grad_(False)
                states[mode] = hidden_states(self.model, input_ids, attention_mask)
        return states["mix"], states["neg"]
