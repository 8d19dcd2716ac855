"""transformers' Trainer for dual LoRA layers, whose checkpoints hold them alone, and with NCE as its loss."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel, Trainer

from calm_fast.consistency.sampling.head import LinearHead, find_linear_head, head_input, probe_token
from calm_fast.core.eval_mode import eval_mode
from calm_fast.hf.dual_lora import dual_lora_layers
from calm_fast.hf.dual_lora_files import WEIGHTS, save_dual_lora
from calm_fast.nat.data import IGNORE


class DualLoRATrainer(Trainer):
    """A Trainer whose checkpoints hold the dual LoRA layers and not the frozen model; resuming reads them back."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(cast(str, output_dir or self.args.output_dir))  # Trainer's arguments always name one
        save_dual_lora(self.accelerator.unwrap_model(self.model), folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_checkpoint(resume_from_checkpoint, model)

    def load_checkpoint(self, folder: str | os.PathLike[str], model: nn.Module | None = None) -> None:
        """Copy the weights of a checkpoint into the dual LoRA layers of the model, without training.

        Raises:
            ValueError: the folder holds no such weights, or those of other layers.
        """
        file, where = Path(folder) / WEIGHTS, type(self).__name__
        if not file.is_file():
            raise ValueError(
                f"{where}: `resume_from_checkpoint` must be a folder with {file.name}, got {folder}, which has none. "
                "Remove that folder to train the stage from its beginning."
            )
        tensors = load_file(file)
        layers = dual_lora_layers(cast(nn.Module, self.model if model is None else model))
        own = {
            f"{path}.{name}": p for path, layer in layers.items() for name, p in layer.named_parameters(recurse=False)
        }
        shapes = [{name: tuple(t.shape) for name, t in side.items()} for side in (own, tensors)]
        if shapes[0] != shapes[1]:
            other = sorted(name for name in {*own, *tensors} if shapes[0].get(name) != shapes[1].get(name))
            raise ValueError(
                f"{where}: `resume_from_checkpoint` must be a checkpoint of the same layers, got {folder}, which "
                f"differs in {', '.join(other[:3])} ({len(other)} in all). Choose another folder for other layers."
            )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return (B, M, d), the states that the LM head reads, without running the head."""
    return cast(torch.Tensor, model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0])


def find_nce_head(model: PreTrainedModel) -> LinearHead:
    """Return the LM head of `model`, measured on the model's own logits.

    Raises:
        ValueError: the head is not one linear layer with an optional factor and soft cap, or it reads other states than
            `hidden_states` returns.
    """
    kind, token = type(model).__name__, probe_token(model)
    mask = torch.ones_like(token)

    def run() -> Any:
        return model(input_ids=token, attention_mask=mask, use_cache=False)

    with eval_mode(model):
        head = find_linear_head(model, run)
        if head is None:
            raise ValueError(
                f"NCETrainer: `model` must have an LM head that is one linear layer, then perhaps a factor and a soft "
                f"cap that its config names, got {kind}, whose logits are not those of its get_output_embeddings(). "
                "Use nat.plain_lora for it."
            )
        read, own = head_input(head, run), hidden_states(model, token, mask)
    # the same computation twice: equal up to the order of a sum
    if read.shape != own.shape or (own - read).abs().max() > 8 * torch.finfo(read.dtype).eps * read.abs().max():
        raise ValueError(
            f"NCETrainer: `model` must give its base_model's output to its LM head as it is, got {kind}, which changes "
            "it in between. Use nat.plain_lora for it."
        )
    return head


class NCETrainer(DualLoRATrainer):
    """A Trainer that distils a NAT teacher into its model with the NCE loss (arXiv 2312.12832, section 3.3).

    Args:
        teachers: (input_ids, attention_mask) -> (nat, neg) hidden states (B, M, d) under the same frozen LM head.
        alpha, temperature, offset: constants of `ops.linear_nce`. The other arguments are Trainer's.
    Raises:
        ValueError: the loss cannot be computed for this family's LM head; the message says why.
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
        self.head = find_nce_head(cast(PreTrainedModel, self.model))
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
        keep = targets != IGNORE  # questions and padding cost nothing in the vocabulary sweep
        student, nat, neg = (states[:, :-1].flatten(0, 1)[keep] for states in (student, nat, neg))
        _, seq_ids = torch.unique(rows[keep], return_inverse=True)
        loss = self.head.nce(student, nat, neg, targets[keep], seq_ids, **self.options)
        return (loss, {"loss": loss}) if return_outputs else loss


class DualTeacher:
    """One dual LoRA model as both teachers: in mode "mix" the NAT teacher, in mode "neg" the negative one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        states = {}
        with eval_mode(self.model):
            for mode in ("neg", "mix"):
                for layer in dual_lora_layers(self.model).values():
                    layer.set_mode(mode)
                    layer.requires_grad_(False)
                states[mode] = hidden_states(self.model, input_ids, attention_mask)
        return states["mix"], states["neg"]
