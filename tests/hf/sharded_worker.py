"""One of two processes that save models with dual LoRA under fully_shard and DDP: `sharded_worker.py FOLDER RANK`.

The process fails where a check does. Each rank gives its own folder, so that the files tell who wrote.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parent))
from dual_models import IDS, TARGETS, llama, logits, scatter  # noqa: E402

from calm_fast import (  # noqa: E402
    add_dual_lora,
    get_gates,
    load_dual_lora,
    record_gates,
    remove_dual_lora,
    save_dual_lora,
    save_lora_adapter,
    set_dual_lora_mode,
)
from calm_fast.hf.dual_lora import dual_lora_layers  # noqa: E402


def dual() -> torch.nn.Module:
    return scatter(add_dual_lora(llama(), TARGETS, rank=3, gate_dim=4, value_dim=4))


def refused(call: Callable[[], object], message: str) -> None:
    try:
        call()
    except ValueError as problem:
        assert message in str(problem), problem
    else:
        raise AssertionError(f"not refused: {message}")


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def sharded(folder: Path, rank: int) -> None:
    model, mesh = dual(), init_device_mesh("cpu", (2,))
    mix, paths = logits(model), list(dual_lora_layers(model))
    neg = logits(set_dual_lora_mode(dual(), "neg"))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert list(dual_lora_layers(model)) == paths
    close(logits(model), mix)
    save_dual_lora(model, folder / f"dual{rank}")
    save_lora_adapter(model, folder / f"neg{rank}", "neg")
    dist.barrier()
    assert not (folder / "dual1").exists() and not (folder / "neg1").exists()
    close(logits(load_dual_lora(llama(), folder / "dual0")), mix)
    close(logits(add_dual_lora(llama(), TARGETS, folder / "neg0", mode="neg")), neg)
    # after a training step the parameters are shards again
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=0.1)
    trained = logits(model)
    save_dual_lora(model, folder / f"trained{rank}")
    dist.barrier()
    close(logits(load_dual_lora(llama(), folder / "trained0")), trained)
    record_gates(model)
    close(logits(set_dual_lora_mode(model, "neg")), neg)
    assert list(get_gates(model)) == paths
    plain = llama()
    fully_shard(plain, mesh=mesh)
    message = "`model` must be one that is not distributed yet, got one under fully_shard"
    refused(lambda: add_dual_lora(plain, TARGETS), f"add_dual_lora: {message}")
    refused(lambda: load_dual_lora(plain, folder / "dual0"), f"load_dual_lora: {message}")
    close(logits(remove_dual_lora(model)), logits(llama()))


def replicated(folder: Path, rank: int) -> None:
    inner = dual()
    model = DistributedDataParallel(inner)
    assert list(dual_lora_layers(model)) == list(dual_lora_layers(inner))
    save_dual_lora(model, folder / f"ddp{rank}")
    close(logits(load_dual_lora(llama(), folder / f"ddp{rank}")), logits(inner))
    assert list(get_gates(record_gates(model))) == list(dual_lora_layers(inner))
    ddp = "`model` must be the model before it is wrapped, got a DistributedDataParallel"
    refused(lambda: set_dual_lora_mode(model, "neg"), f"set_dual_lora_mode: {ddp}")
    refused(lambda: remove_dual_lora(model), f"remove_dual_lora: {ddp}")
    plain = DistributedDataParallel(llama())
    refused(lambda: add_dual_lora(plain, TARGETS), "add_dual_lora: `model` must be one that is not distributed yet")
    close(logits(remove_dual_lora(model.module)), logits(llama()))


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        sharded(folder, rank)
        replicated(folder, rank)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
