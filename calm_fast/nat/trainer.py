"""transformers' Trainer for dual LoRA layers, whose checkpoints hold them alone, and with NCE as its loss."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

from calm_fast.consistency.sampling.head import LinearHead, find_linear_head, head_input, probe_token
from calm_fast.core.checks import bad_value
from calm_fast.core.eval_mode import eval_mode
from calm_fast.hf.causality import check_causal
from calm_fast.hf.dual_lora import dual_lora_layers
from calm_fast.hf.dual_lora_files import WEIGHTS, read_dual_lora, save_dual_lora
from calm_fast.modules.dual_lora import DualLoRALinear
from calm_fast.nat.data import IGNORE

MASKINGS = ("paper", "released")


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
            ValueError: the folder holds no such weights, damaged ones, those of another save than its configuration, or
                those of other layers.
        """
        file, where = Path(folder) / WEIGHTS, type(self).__name__
        if not file.is_file():
            raise ValueError(
                f"{where}: `resume_from_checkpoint` must be a folder with {file.name}, got {folder}, which has none. "
                "Remove that folder to train the stage from its beginning."
            )
        config, tensors = read_dual_lora(where, "resume_from_checkpoint", folder)
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
        for path, layer in layers.items():
            saved = {
                "mode": config.get("mode"),
                **config["layers"][path],
            }  # one mode for all layers in earlier versions
            for name in ("alpha", "alpha_neg", "variant", "dropout", "mode"):
                if saved[name] != getattr(layer, name):
                    raise ValueError(
                        f"{where}: `resume_from_checkpoint` must be a checkpoint of layers with the same settings, got "
                        f"{folder}, whose {path} has {name}={saved[name]!r} instead of {getattr(layer, name)!r}. "
                        "Choose another folder for other settings."
                    )
        for name, p in own.items():
            # in "mix" what does not train is the negative LoRA, which comes from an adapter
            frozen = not p.requires_grad and name.endswith("_neg") and layers[name.rpartition(".")[0]].mode == "mix"
            if frozen and not torch.equal(p.detach().cpu(), tensors[name].to(p.dtype)):
                raise ValueError(
                    f"{where}: `resume_from_checkpoint` must be a checkpoint over the same negative LoRA, got "
                    f"{folder}, which has other values in {name}. Choose another folder for another negative LoRA."
                )
        with torch.no_grad():
            for name, p in own.items():
                p.copy_(tensors[name])


def hidden_states(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Return (B, M, d), the states that the LM head reads, without running the head."""
    return cast(torch.Tensor, model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0])


def find_nce_head(model: PreTrainedModel, where: str = "NCETrainer", name: str = "model") -> LinearHead:
    """Return the LM head of `model`, measured on the model's own logits.

    where, name: the function and its argument that errors name.

    Raises:
        ValueError: the model is not causal, its head is not one linear layer with an optional factor and soft cap, the
            head has dual LoRA, or it reads other states than `hidden_states` returns.
    """
    kind, token = type(model).__name__, probe_token(model, where, name)
    mask = torch.ones_like(token)

    def run(ids: torch.Tensor = token) -> Any:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)

    check_causal(where, name, model, run)
    if isinstance(model.get_output_embeddings(), DualLoRALinear):
        raise ValueError(
            f"{where}: `{name}` must have an LM head without dual LoRA, because student and teachers share it, got "
            f"{kind} with one; leave the head out of the target modules"
        )
    with eval_mode(model):
        head = find_linear_head(model, run)
        if head is None:
            raise ValueError(
                f"{where}: `{name}` must have an LM head that is one linear layer, then perhaps a factor and a soft "
                f"cap that its config names, got {kind}, whose logits are not those of its get_output_embeddings(). "
                "NCE cannot be computed for it; train it with nat.plain_lora."
            )
        read, own = head_input(head, run), hidden_states(model, token, mask)
    # the same computation twice: equal up to the order of a sum
    if read.shape != own.shape or (own - read).abs().max() > 8 * torch.finfo(read.dtype).eps * read.abs().max():
        raise ValueError(
            f"{where}: `{name}` must give its base_model's output to its LM head as it is, got {kind}, which changes "
            "it in between. NCE cannot be computed for it; train it with nat.plain_lora."
        )
    return head


class NCETrainer(DualLoRATrainer):
    """A Trainer that distils a NAT teacher into its model with the NCE loss (arXiv 2312.12832, section 3.3).

    The loss is a mean over all tokens of a step, gradient accumulation included. Trainer's precision flags (bf16, fp16)
    cover student and teachers.

    Args:
        teachers: (input_ids, attention_mask) -> (nat, neg) hidden states (B, M, d) under the same frozen LM head.
        alpha, temperature, offset: constants of `ops.linear_nce`. The other arguments are Trainer's.
        masking: "paper", both parts of the loss over the tokens that predict a label; or "released", as in the released
            code, cross-entropy over every token that follows another, the prompt's included, and distillation at every
            token, the last one included. Padding takes no part.
    Raises:
        ValueError: the loss cannot be computed for this family's LM head, or one of Trainer's arguments would have no
            effect on it or a wrong one; the message says why.
    """

    def __init__(
        self,
        *args: Any,
        teachers: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
        alpha: float = 0.5,
        temperature: float = 1.0,
        offset: float = 0.5,
        masking: str = "paper",
        **kwargs: Any,
    ) -> None:
        if masking not in MASKINGS:
            raise bad_value("NCETrainer", "masking", "'paper' or 'released'", repr(masking))
        super().__init__(*args, **kwargs)
        _check_arguments(self)
        self.teachers, self.masking = teachers, masking
        self.options = {"alpha": alpha, "temperature": temperature, "offset": offset}
        self.head = find_nce_head(cast(PreTrainedModel, self.model))
        if self.head.module.weight.requires_grad:
            raise ValueError(
                "NCETrainer: `model` must have a frozen LM head, because the teachers' probabilities come from it too, "
                "got one that trains; call requires_grad_(False) on it"
            )
        # Trainer divides the loss by the number of batches of a step; compute_loss weighs the batches by their tokens
        self.model_accepts_loss_kwargs = False
        self._tokens_per_batch: tuple[float, float] | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the batches of one optimizer step, as Trainer does, and count the tokens of all of them."""
        samples, items = super().get_batch_samples(*args, **kwargs)
        self._tokens_per_batch = None
        if len(samples) > 1:
            counts = [[float(part.sum()) for part in self._counted(batch)] for batch in samples]
            # at least one, for a step without any such token, whose loss is 0
            hard, soft = (max(1.0, sum(column)) / len(samples) for column in zip(*counts, strict=True))
            self._tokens_per_batch = (hard, soft)
        return samples, items

    def _counted(self, inputs: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return bool (B, M - 1) and (B, M - 1 or M): True where cross-entropy, and where distillation, is taken."""
        if self.masking == "paper":
            # the state at a token predicts the next one
            predicts = inputs["labels"][:, 1:] != IGNORE
            return predicts, predicts
        real = inputs["attention_mask"].bool()
        return real[:, 1:] & real[:, :-1], real

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        if set(inputs) != {"input_ids", "attention_mask", "labels"}:
            raise ValueError(
                "NCETrainer: `inputs` must be input_ids, attention_mask and labels, got "
                f"{', '.join(sorted(inputs))}; packed rows and other arguments of the model are not supported"
            )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        own = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            student = hidden_states(own, ids, mask)
            with torch.no_grad():
                nat, neg = self.teachers(ids, mask)
        counted, options = self._counted(inputs), self.options
        shares = self._shares(counted) if model.training else (1.0, 1.0)
        if self.masking == "paper":
            loss = shares[0] * self._nce(student, nat, neg, ids[:, 1:], counted[0], **options)
        else:
            hard = -self.head.logprobs(student[:, :-1][counted[0]], ids[:, 1:][counted[0]])
            soft = self._nce(student, nat, neg, ids, counted[1], **options | {"alpha": 1.0})
            hard_loss = hard.sum() / max(1, hard.numel())
            loss = (1 - options["alpha"]) * shares[0] * hard_loss + options["alpha"] * shares[1] * soft
        return (loss, {"loss": loss}) if return_outputs else loss

    def _nce(
        self,
        student: torch.Tensor,
        nat: torch.Tensor,
        neg: torch.Tensor,
        targets: torch.Tensor,
        counted: torch.Tensor,
        **options: float,
    ) -> torch.Tensor:
        """Return `linear_nce` of the tokens that count: states (B, at least M, d), targets and counted (B, M)."""
        width = targets.shape[1]
        # questions and padding cost nothing in the vocabulary sweep
        student, nat, neg = (states[:, :width][counted] for states in (student, nat, neg))
        rows = torch.arange(len(targets), device=targets.device)[:, None].expand_as(targets)[counted]
        _, seq_ids = torch.unique(rows, return_inverse=True)
        return self.head.nce(student, nat, neg, targets[counted], seq_ids, **options)

    def _shares(self, counted: tuple[torch.Tensor, torch.Tensor]) -> tuple[float, float]:
        """Return the tokens of this batch over those of an average batch of the step; (1, 1) if it is the only one."""
        if self._tokens_per_batch is None:
            return 1.0, 1.0
        hard, soft = (
            float(part.sum()) / max(1.0, mean) for part, mean in zip(counted, self._tokens_per_batch, strict=True)
        )
        return hard, soft


def _check_arguments(trainer: Trainer) -> None:
    """Raise ValueError for arguments of Trainer that NCETrainer's own loss would ignore or falsify."""
    args = trainer.args
    if args.label_smoothing_factor:
        raise ValueError(
            "NCETrainer: `args` must have label_smoothing_factor=0, got "
            f"{args.label_smoothing_factor}; the NCE loss has soft targets of its own"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("NCETrainer: `compute_loss_func` must be None, got a function; NCETrainer is the loss")
    if args.world_size > 1:
        raise ValueError(
            f"NCETrainer: `args` must be those of one process, got {args.world_size} processes; the loss reads states "
            "inside the model, past the wrapper that would average the gradients"
        )


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
