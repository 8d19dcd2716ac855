"""One of two processes that train under FSDP2 and save: `accelerate launch --config_file FILE fsdp_worker.py FOLDER`.

Every process also trains the same models alone, by a plain loop, and fails where the results differ. The models are of
float64: in float32 the roundings of these random models grow to 1e-4 in three steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))
from dual_models import TARGETS, llama, scatter  # noqa: E402
from families import FAMILIES, composed_model  # noqa: E402

from calm_fast import (  # noqa: E402
    add_dual_lora,
    load_dual_lora,
    save_dual_lora,
    save_lora_adapter,
)
from calm_fast.hf import ComposedForCausalLM  # noqa: E402

STEPS, SGD = 3, {"lr": 0.05, "momentum": 0.9}  # torch loads no optimizer without a state under FSDP2
ROWS = torch.randint(2, 61, (4, 10), generator=torch.Generator().manual_seed(3))  # every step reads all of them


def composition() -> Any:
    return composed_model("llama").double()


def base() -> nn.Module:
    return llama().double()


def dual() -> nn.Module:
    return scatter(add_dual_lora(base(), TARGETS, rank=3, gate_dim=4, value_dim=4))


def alone(model: nn.Module) -> torch.Tensor:
    """Train `model` in this process, with Trainer's default clipping. Return its logits of ROWS."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], **SGD)
    model.train()
    for _ in range(STEPS):
        model(ROWS, labels=ROWS).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return logits(model)


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model.eval()(ROWS).logits


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def shard_on_a_cpu() -> None:
    """Let accelerate use FSDP2: it keeps processes of kind MULTI_CPU at DDP, and asks the kind only here."""
    assert PartialState._shared_state["distributed_type"] == DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def sharded(model: nn.Module, kinds: set[str]) -> None:
    found = {type(module).__name__.removeprefix("FSDP") for module in model.modules() if isinstance(module, FSDPModule)}
    assert kinds <= found, found


def by_accelerate(folder: Path) -> None:
    """Train a composition by a loop as in accelerate's examples, under the config of `accelerate launch`."""
    want = alone(composition())
    PartialState(cpu=True)
    shard_on_a_cpu()
    accelerator = Accelerator()
    assert accelerator.is_fsdp2 and accelerator.num_processes == 2
    model = composition().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    model, optimizer = accelerator.prepare(model, torch.optim.SGD(trained, **SGD))
    sharded(model, {"LlamaDecoderLayer", "CrossAttention", "ComposedForCausalLM"})
    rows = ROWS[accelerator.process_index :: 2]
    for _ in range(STEPS):
        accelerator.backward(model(rows, labels=rows).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    close(logits(model), want)
    state = accelerator.get_state_dict(model)
    accelerator.unwrap_model(model).save_pretrained(
        folder / "recipe", is_main_process=accelerator.is_main_process, state_dict=state
    )
    model.save_pretrained(folder / "plain")
    dist.barrier()
    for name in ("recipe", "plain"):
        close(logits(loaded(folder / name)), want)


def loaded(folder: Path) -> nn.Module:
    family = FAMILIES["llama"]
    return ComposedForCausalLM.from_pretrained(
        folder, anchor=family.model(0).double(), augmenters=family.model(1).double()
    )


def trainer(model: nn.Module, out: Path, wrap: list[str] | None = None, **settings: Any) -> Trainer:
    layers = {} if wrap is None else {"transformer_layer_cls_to_wrap": wrap}
    settings = {"save_strategy": "no", "max_steps": STEPS} | settings
    arguments = TrainingArguments(
        output_dir=str(out), per_device_train_batch_size=2, learning_rate=SGD["lr"],
        lr_scheduler_type="constant", fsdp=True, fsdp_config={"version": 2, **layers}, use_cpu=True,
        report_to=[], disable_tqdm=True, **settings,
    )  # fmt: skip
    shard_on_a_cpu()
    rows = [{"input_ids": row, "labels": row} for row in ROWS.tolist()]
    return Trainer(
        model=model, args=arguments, train_dataset=rows, optimizer_cls_and_kwargs=(torch.optim.SGD, dict(SGD))
    )


def by_trainer(folder: Path) -> None:
    """Train a composition by Trainer, save it, and go on from its checkpoint."""
    want = alone(composition())
    run = trainer(composition(), folder / "run", save_strategy="steps", save_steps=2)
    run.train()
    sharded(run.model, {"LlamaDecoderLayer", "ComposedForCausalLM"})
    run.save_model(str(folder / "saved"))
    dist.barrier()
    close(logits(loaded(folder / "saved")), want)
    again = trainer(composition(), folder / "again")
    again.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2"))
    again.save_model(str(folder / "resumed"))
    dist.barrier()
    close(logits(loaded(folder / "resumed")), want)


def dual_by_trainer(folder: Path) -> None:
    model = dual()
    want = alone(model)
    save_lora_adapter(model, folder / "alone", "pos")
    run = trainer(dual(), folder / "dual_run", wrap=["LlamaDecoderLayer"])
    run.train()
    sharded(run.model, {"LlamaDecoderLayer", "LlamaForCausalLM"})
    rank = dist.get_rank()
    save_dual_lora(run.model, folder / f"dual{rank}")
    save_lora_adapter(run.model, folder / f"pos{rank}", "pos")
    dist.barrier()
    assert not (folder / "dual1").exists() and not (folder / "pos1").exists(), "rank 0 alone writes"
    close(logits(load_dual_lora(base(), folder / "dual0")), want)
    adapters = [add_dual_lora(base(), TARGETS, folder / name, mode="neg") for name in ("pos0", "alone")]
    close(*map(logits, adapters))


PARTS: dict[str, Callable[[Path], None]] = {
    "accelerate": by_accelerate, "Trainer": by_trainer, "dual LoRA": dual_by_trainer,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    try:
        for name in sys.argv[2:]:
            PARTS[name](folder)
            print("passed:", name, flush=True)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
