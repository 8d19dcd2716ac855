"""One of two processes whose parts are tensor parallel: `torchrun --nproc_per_node 2 tensor_parallel_worker.py DIR`.

Each part, and both, are sharded by transformers' own plan. The models are of float64: what differs from one process is
the order of sums.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent))
import quantised as setup  # noqa: E402

from calm_fast import add_dual_lora  # noqa: E402
from calm_fast.hf import ComposedForCausalLM, frozen_copy  # noqa: E402

OPTIONS = {"dtype": torch.float64}
SHARDED = OPTIONS | {"tp_plan": "auto"}


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def trained(model: Any) -> Any:
    """Train one step, and return what it gives then: logits, tokens."""
    optimizer = torch.optim.SGD(model.connections.parameters(), lr=0.1)
    model.train()(setup.IDS, labels=setup.IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.connections.parameters())
    optimizer.step()
    tokens = model.eval().generate(setup.IDS, max_new_tokens=4, do_sample=False, eos_token_id=None)
    return setup.logits(model), tokens


def load(folder: Path, *sharded: int) -> Any:
    parts = [
        AutoModelForCausalLM.from_pretrained(folder / f"model{seed}", **(SHARDED if seed in sharded else OPTIONS))
        for seed in (0, 1)
    ]
    assert [_is_sharded(part) for part in parts] == [seed in sharded for seed in (0, 1)]
    return ComposedForCausalLM.from_pretrained(folder / "composed", anchor=parts[0], augmenters=parts[1])


def _is_sharded(part: nn.Module) -> bool:
    return any(hasattr(p, "full_tensor") for p in part.parameters())


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    folder, rank = Path(sys.argv[1]), dist.get_rank()
    if rank == 0:
        for seed in (0, 1):
            setup.tiny(seed).double().save_pretrained(folder / f"model{seed}")
        setup.composed(folder / "model0", folder / "model1").save_pretrained(folder / "composed")
    dist.barrier()
    logits, tokens = trained(load(folder))
    for case in ((0,), (1,), (0, 1)):
        model = load(folder, *case)
        found, written = trained(model)
        close(found, logits)
        assert torch.equal(written, tokens)
    own = torch.cat([p.detach().flatten() for p in model.connections.parameters()])
    both = [torch.empty_like(own) for _ in range(2)]
    dist.all_gather(both, own)
    assert torch.equal(*both), "the connections of both processes stay equal"
    if rank == 0:
        model.save_pretrained(folder / "trained")
    dist.barrier()
    close(setup.logits(ComposedForCausalLM.from_pretrained(folder / "trained", **OPTIONS)), logits)
    whole = ComposedForCausalLM.from_pretrained(folder / "trained", **SHARDED)
    assert _is_sharded(whole.anchor) and _is_sharded(whole.augmenters) and not _is_sharded(whole.connections)
    close(setup.logits(whole), logits)
    with pytest.raises(ValueError, match="add_dual_lora: `model` must be one that is not distributed yet"):
        add_dual_lora(whole.anchor)
    with pytest.raises(ValueError, match="frozen_copy: `model` must be one that is not distributed yet"):
        frozen_copy(whole)
    dist.barrier()
    print("passed", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
