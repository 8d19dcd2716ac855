"""One of two processes that shard a composition and save it in the ways that users do.

Run by test_saving_training.py; argv: the folder of a saved composition, an empty folder, the rank.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from calm_fast.hf import ComposedForCausalLM


def sharded(folder: Path, connections_only: bool = False) -> Any:
    model = ComposedForCausalLM.from_pretrained(folder)
    mesh = init_device_mesh("cpu", (2,))
    for connection in model.connections:
        fully_shard(connection, mesh=mesh)
    return model if connections_only else fully_shard(model, mesh=mesh)


def save_all(folder: Path, out: Path, first: bool) -> None:
    model = sharded(folder)
    model.save_pretrained(out / "plain")
    model.save_pretrained(out / "main_process", is_main_process=first)
    sharded(folder, connections_only=True).save_pretrained(out / "connections")
    model.save_pretrained(out / "nobody", is_main_process=False)
    full = {name: tensor.full_tensor() for name, tensor in model.state_dict().items()}
    model.save_pretrained(out / "gathered", state_dict=full if first else {}, is_main_process=first)
    for parameter in model.connections.parameters():
        parameter.data.zero_()
    model.load_composition(str(folder / "model.safetensors"))
    model.save_pretrained(out / "loaded_while_sharded")
    copies = DistributedDataParallel(ComposedForCausalLM.from_pretrained(folder))
    copies.module.save_pretrained(out / "ddp", state_dict=copies.state_dict(), is_main_process=first)


def main(folder: Path, out: Path, rank: int) -> None:
    torch.set_num_threads(1)
    out.mkdir(exist_ok=True)
    dist.init_process_group("gloo", init_method=f"file://{out}.rendezvous", rank=rank, world_size=2)
    try:
        save_all(folder, out, rank == 0)
        dist.barrier()
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
