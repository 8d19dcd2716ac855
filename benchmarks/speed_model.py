"""Predict a kernel's speed on sm_90 from its machine code alone: an upper bound that compares forms of one kernel.

A step of the main loop costs what its products take at the full tensor rate, plus what takes longest of all the rest:
to issue it, its exponentials, its reads and writes of shared memory and of spilled registers, its loads into registers.

    cycles = products + max(others / 4 per cycle, 32 * MUFU / 16 per cycle,
                            (shared + spilled bytes) / 128 per cycle, loaded bytes / 64 per cycle)

Spilled registers go through the same cache as shared memory; they cost more if they do not stay in it. A load of a tile
into registers (LDG) stands for a loop without a pipeline: no product runs while it waits. Asynchronous copies overlap
with products and cost nothing here.

A warpgroup product reads its operands from shared memory, 128 bytes per cycle, while it works: if that takes longer it
is what the product costs. It does with fewer than 64 columns and both operands in shared memory.

Softmax and products never overlap here. Left out: waiting (latency, barriers, serialised products), conflicts of
shared-memory banks, asynchronous copies, masked steps and whatever else a branch in the loop may skip, everything
before and after the loop, a clock that falls under load, grids too small for the GPU, the lower rate of HMMA on sm_90.
Nothing is calibrated: the figure is a model's, no measurement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from calm_fast.benchmarks.sass import Instruction, Loop

# of one multiprocessor of an H100 or H200, per cycle
TENSOR_FLOP = 4096  # dense products of 16-bit numbers
EXPONENTIALS = 16  # threads whose MUFU instruction is done
ISSUES = 4  # instructions of warps
SHARED_BYTES = 128  # of shared memory, or of the cache of its data path, read or written
L2_BYTES = 64  # from the L2 cache, at most
PEAK_TFLOPS = 989.4  # data sheet: 132 multiprocessors at TENSOR_FLOP a cycle

_WARPGROUP_SHAPE = re.compile(r"^HGMMA\.(\d+)x(\d+)x(\d+)$")
_WARP_SHAPE = re.compile(r"^HMMA\.(\d+?)(8)(8|16)$")  # HMMA.16816 is 16 x 8 x 16
_SHARED = re.compile(r"^(?:LDS|STS|LDSM|STSM|LDL|STL)\b")
_LOAD = re.compile(r"^LDG\b")


@dataclass(frozen=True)
class Prediction:
    """Predicted cost of one step of a loop, for one thread block that has a multiprocessor to itself."""

    flop: int  # of all products, padding and masked pairs included
    product_cycles: float
    other_cycles: float

    @property
    def cycles(self) -> float:
        """Cycles of the step."""
        return self.product_cycles + self.other_cycles

    @property
    def tensor_share(self) -> float:
        """Reached part of the tensor rate."""
        return self.flop / TENSOR_FLOP / self.cycles

    @property
    def tflops(self) -> float:
        """Predicted TFLOP/s of a whole H100 or H200."""
        return PEAK_TFLOPS * self.tensor_share


def product_cost(product: Instruction, num_warps: int) -> tuple[int, float]:
    """Return the floating-point operations and the cycles of a product that every warp of a block issues.

    Raises:
        ValueError: the instruction's shape is unknown.
    """
    warpgroup, warp = _WARPGROUP_SHAPE.match(product.shape), _WARP_SHAPE.match(product.shape)
    found = warpgroup or warp
    if not found:
        raise ValueError(f"product_cost: `product` must be HGMMA.<m>x<n>x<k> or HMMA.<mnk>, got {product.opcode!r}")
    m, n, k = (int(size) for size in found.groups())
    flop = 2 * m * n * k
    if not warpgroup:
        return flop * num_warps, flop * num_warps / TENSOR_FLOP
    # HGMMA R24, gdesc[UR8], R24 has both operands in shared memory, HGMMA R24, R88, gdesc[UR8], R24 the second
    from_shared = product.operands.split(",")[1].strip().startswith("gdesc")
    read = 2 * k * (n + m * from_shared)
    warpgroups = num_warps // 4
    return flop * warpgroups, max(flop / TENSOR_FLOP, read / SHARED_BYTES) * warpgroups


def shared_bytes(instruction: Instruction) -> int:
    """Return how many bytes of shared memory or spills a warp reads or writes with an instruction, products apart."""
    if not _SHARED.match(instruction.opcode) or instruction.operands.startswith("RZ"):  # into RZ: a fence, never done
        return 0
    return _bytes(instruction.opcode)


def loaded_bytes(instruction: Instruction) -> int:
    """Return how many bytes a warp loads from global memory into registers with an instruction."""
    return _bytes(instruction.opcode) if _LOAD.match(instruction.opcode) else 0


def _bytes(opcode: str) -> int:
    """Return the bytes of all 32 threads."""
    name, *suffixes = opcode.split(".")
    if name.endswith("M"):  # matrices of 8 x 8 16-bit numbers
        return 128 * int(suffixes[-1]) if suffixes[-1] in ("2", "4") else 128
    bits = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return 4 * next((bits[suffix] for suffix in suffixes if suffix in bits), 32)


def predict(loop: Loop, num_warps: int) -> Prediction:
    """Return the predicted cost of a step in which every warp of the block takes part.

    Raises:
        ValueError: the loop holds a product of unknown shape.
    """
    products = [product_cost(i, num_warps) for i in loop.instructions if i.is_product]
    others = [i for i in loop.instructions if not i.is_product]
    per_warp = (
        len(others) / ISSUES,
        sum(i.opcode.startswith("MUFU") for i in others) * 32 / EXPONENTIALS,
        sum(shared_bytes(i) for i in others) / SHARED_BYTES,
        sum(loaded_bytes(i) for i in others) / L2_BYTES,
    )
    flop, cycles = sum(flop for flop, _ in products), sum(cycles for _, cycles in products)
    return Prediction(flop, cycles, num_warps * max(per_warp))
