"""Datasheet numbers of GPUs, and the roofline that turns a Trace into a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from calm_fast.planning.trace import Trace

PER_NODE = 8
NETWORK = 50e9  # bytes per second of a GPU between nodes: one 400 Gbit/s link
EFFICIENCY = 0.6  # share of the peak that a large product reaches
MEMORY_EFFICIENCY = 0.8  # share of the bandwidth that an elementwise op reaches
LAUNCH = 5e-6  # seconds of an op, at least


@dataclass(frozen=True)
class Gpu:
    """A GPU by its datasheet: dense FLOP/s by dtype, bytes/s of its memory and of its links, bytes of memory.

    float32 is without TF32, as torch computes by default. link: NVLink, one direction.
    """

    name: str
    half: float
    single: float
    bandwidth: float
    link: float
    memory: float

    def seconds(self, trace: Trace) -> float:
        """Return a model of the time of a Trace: op by op, the longer of its arithmetic and its memory traffic."""
        total = 0.0
        for flops, moved, dtype in trace.calls:
            peak = self.half if dtype in (torch.bfloat16, torch.float16) else self.single
            total += max(flops / (EFFICIENCY * peak), moved / (MEMORY_EFFICIENCY * self.bandwidth), LAUNCH)
        return total

    def transfer_seconds(self, moved: float, gpus: int) -> float:
        """Return the time to move bytes between GPUs, over the slowest link on the way."""
        return moved / (self.link if gpus <= PER_NODE else NETWORK)


# NVIDIA's datasheets of the SXM boards
GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("h200", 989e12, 67e12, 4.8e12, 450e9, 141e9),
        Gpu("h100", 989e12, 67e12, 3.35e12, 450e9, 80e9),
        Gpu("a100", 312e12, 19.5e12, 2.039e12, 300e9, 80e9),
    )
}
