"""Compile one Triton kernel for one GPU architecture, without a GPU, and read facts from its machine code.

    python -m calm_fast.benchmarks.machine_code --op cross_attention --only fwd_bf16_d128 --arch 90

prints for each kernel whose name holds a word of --only: registers and shared memory, the assembler's verdicts, the
instructions of a step of its main loop, and on sm_90 the speed that a model predicts
(calm_fast.benchmarks.speed_model).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from calm_fast.benchmarks.sass import TENSOR_CORE, Loop, blocks, main_loop, product_loops
from calm_fast.benchmarks.speed_model import predict

KIB = 1024
# the most dynamic shared memory a block can opt in to; the 1 KiB that the driver reserves is already subtracted
SHARED_LIMIT = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
SMALL_SHARED = (86, 89, 120)  # consumer GPUs: the configs of sm_80 with less shared memory
TENSOR_MEMORY_LIMIT = 512  # columns per multiprocessor on sm_100
REGISTERS = 65536  # of 32 bits, in a multiprocessor of any architecture here
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}  # on a multiprocessor
BLOCKS = {80: 32, 86: 16, 89: 24, 90: 32, 100: 32, 120: 24}
SHARED_PER_BLOCK = KIB  # reserved by the driver for each block
# opcode of a large matrix product: warp-level, warpgroup-level, and the tcgen05 unit
MATRIX_OPCODE = {80: "HMMA", 86: "HMMA", 89: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
FLOAT64 = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|\.F64\b|\.(RCP|RSQ)64H\b")
ASYNC_COPY = re.compile(r"^(LDGSTS|UBLKCP|UTMALDG)\b")  # global to shared memory, bypassing registers: a pipeline
LOCAL_MEMORY = re.compile(r"^(LDL|STL)\b")
WARPGROUP_WAIT = re.compile(r"^WARPGROUP\.(ARRIVE|DEPBAR)\b")
# what ptxas says of wgmma that it could not run asynchronously: codes C7510 to C7519, or the word
VERDICT = re.compile(r".*(?:\(C751\d\)|\bserializ).*")


class Compiled(NamedTuple):
    """A compiled kernel."""

    cubin: bytes
    shared: int  # bytes
    tensor_memory: int  # columns
    log: str  # what ptxas wrote about it


@dataclass(frozen=True)
class Facts:
    """Facts about the machine code of one kernel on one architecture."""

    arch: int
    registers: int
    instructions: int  # size of the SASS
    shared: int  # bytes of dynamic shared memory per block
    tensor_memory: int  # columns, 0 before sm_100
    stack: int  # bytes of local memory per thread
    local_accesses: int  # LDL and STL instructions: spills or indexed private arrays
    float64: tuple[str, ...]  # opcodes
    tensor_core: tuple[str, ...]  # opcodes
    matrix_instructions: int = 0  # number of tensor-core instructions
    async_copies: int = 0  # number of asynchronous copies from global to shared memory
    warpgroup_waits: int = 0  # WARPGROUP instructions, which order products of warpgroups
    chained: bool = False  # products follow each other on the same accumulator, without a jump between them
    verdicts: tuple[str, ...] = ()  # lines of ptxas about products that it serialised
    loops: tuple[Loop, ...] = ()  # a step of every innermost loop with products

    @property
    def loop(self) -> Loop | None:
        """A step of the main loop, None if no loop holds products."""
        return main_loop(self.loops)


def tool(name: str) -> str:
    """Return the path of an NVIDIA binary tool: the one shipped with Triton, else the one on the PATH.

    Raises:
        FileNotFoundError: neither exists.
    """
    import triton

    shipped = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = str(shipped) if shipped.is_file() else shutil.which(name)
    if not found:
        raise FileNotFoundError(f"{name} is neither shipped with triton {triton.__version__} nor on the PATH")
    return found


def compile_cubin(spec: Any, arch: int) -> Compiled:
    """Compile `spec`, an entry of codegen_specs(), for sm_<arch>, past Triton's cache.

    Raises:
        RuntimeError: Triton showed no log of ptxas.
    """
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constexprs, attrs=spec.attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    printed = io.StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        knobs.compilation.always_compile = True  # a kernel from the cache has no log
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    log = printed.getvalue()
    if "ptxas" not in log:
        raise RuntimeError(f"Triton {triton.__version__} showed no log of ptxas, whose verdicts would go unread")
    return Compiled(kernel.asm["cubin"], kernel.metadata.shared, kernel.metadata.tmem_size or 0, log)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return the SASS of a cubin, and what cuobjdump says of its use of resources."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        sass = run([tool("nvdisasm"), "-c", file.name]).stdout
        usage = run([tool("cuobjdump"), "-res-usage", file.name])
    return sass, usage.stdout + usage.stderr


def read_facts(cubin: bytes, arch: int, shared: int, tensor_memory: int, log: str = "") -> Facts:
    """Disassemble a cubin that holds one kernel. log: what ptxas wrote about it, "" if that is lost.

    Raises:
        RuntimeError: the disassembler's output has another format.
    """
    sass, usage = disassemble(cubin)
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    parts = blocks(sass)
    opcodes = Counter(i.opcode for block in parts for i in block.instructions)
    if not resources or not opcodes:
        raise RuntimeError(f"cannot read the disassembly for sm_{arch}: its format has changed")

    def matching(pattern: re.Pattern[str]) -> tuple[str, ...]:
        return tuple(sorted(op for op in opcodes if pattern.search(op)))

    def number(pattern: re.Pattern[str]) -> int:
        return sum(opcodes[op] for op in matching(pattern))

    return Facts(
        arch=arch,
        registers=int(resources[1]),
        instructions=sum(opcodes.values()),
        shared=shared,
        tensor_memory=tensor_memory,
        stack=int(resources[2]),
        local_accesses=number(LOCAL_MEMORY),
        float64=matching(FLOAT64),
        tensor_core=matching(TENSOR_CORE),
        matrix_instructions=number(TENSOR_CORE),
        async_copies=number(ASYNC_COPY),
        warpgroup_waits=number(WARPGROUP_WAIT),
        chained=any(block.has_chain for block in parts),
        verdicts=tuple(line.partition(": ")[2] or line for line in VERDICT.findall(log)),
        loops=tuple(product_loops(parts)),
    )


def blocks_per_multiprocessor(facts: Facts, num_warps: int) -> int:
    """Return how many blocks fit on a multiprocessor, by registers, shared memory, warps and tensor memory."""
    registers = -(-facts.registers // 8) * 8 * 32 * num_warps  # a warp gets registers in units of 256
    shared = SHARED_LIMIT[facts.arch] + SHARED_PER_BLOCK
    fit = [BLOCKS[facts.arch], WARPS[facts.arch] // num_warps]
    fit += [REGISTERS // registers, shared // (facts.shared + SHARED_PER_BLOCK)]
    return min(fit + ([TENSOR_MEMORY_LIMIT // facts.tensor_memory] if facts.tensor_memory else []))


def hard_problems(facts: Facts, tensor_core: bool | str | None) -> list[str]:
    """Return the facts that are wrong regardless of the Triton version, one sentence each.

    tensor_core: True requires the architecture's own large matrix instruction; "warp" accepts any tensor-core
    instruction (tiles too small for the large ones); False forbids them (IEEE float32); None accepts either.
    """
    found = []
    if facts.local_accesses or facts.stack:
        found.append(f"spills: {facts.local_accesses} LDL/STL instructions, {facts.stack} bytes of stack")
    if facts.float64:
        found.append(f"float64 instructions: {', '.join(facts.float64)}")
    if facts.shared > SHARED_LIMIT[facts.arch]:
        found.append(f"shared memory {facts.shared} bytes > {SHARED_LIMIT[facts.arch]}: could never launch")
    if facts.tensor_memory > TENSOR_MEMORY_LIMIT:
        found.append(f"tensor memory {facts.tensor_memory} columns > {TENSOR_MEMORY_LIMIT}: could never launch")
    wanted = MATRIX_OPCODE[facts.arch]
    if tensor_core is True and not any(op.split(".")[0] == wanted for op in facts.tensor_core):
        found.append(f"no {wanted} instruction (tensor-core opcodes: {', '.join(facts.tensor_core) or 'none'})")
    elif tensor_core == "warp" and not facts.tensor_core:
        found.append("no tensor-core instruction")
    elif tensor_core is False and facts.tensor_core:
        found.append(f"unexpected tensor-core instructions: {', '.join(facts.tensor_core)}")
    return found


def serialised(facts: Facts) -> list[str]:
    """Return why the products of warpgroups wait for one another instead of running on, [] if they do not.

    A serialised product stands between its own ARRIVE and DEPBAR. That is a fault only in a chain: a lone product of
    one instruction stands so too.
    """
    found = [f"serialised products: {verdict}" for verdict in facts.verdicts]
    if not found and facts.chained and facts.warpgroup_waits >= 2 * facts.matrix_instructions:
        waits = f"{facts.warpgroup_waits} WARPGROUP instructions for {facts.matrix_instructions} products"
        found.append(f"serialised products: {waits}")
    return found


def show(name: str, facts: Facts, num_warps: int) -> str:
    """Return lines about a kernel for a reader."""
    lines = [
        f"{name} sm_{facts.arch}: {facts.registers} registers, {facts.local_accesses} spills, {facts.shared} B shared, "
        f"{num_warps} warps, {blocks_per_multiprocessor(facts, num_warps)} blocks per multiprocessor, "
        f"{facts.matrix_instructions} products, {facts.warpgroup_waits} WARPGROUP"
    ]
    lines += [f"    {text}" for text in serialised(facts)]
    if facts.loop:
        lines.append("    step: " + ", ".join(f"{count} {kind}" for kind, count in facts.loop.mix.items()))
        if facts.arch == 90:
            found = predict(facts.loop, num_warps)
            lines.append(
                f"    model: {found.product_cycles:.0f} + {found.other_cycles:.0f} cycles, "
                f"{found.tensor_share:.0%} of the tensor rate, {found.tflops:.0f} TFLOP/s"
            )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile the kernels that are asked for and print what their machine code says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", required=True, help="the op whose kernels are compiled")
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="kernels whose name holds a WORD")
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(SHARED_LIMIT), default=[90])
    arguments = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are compiled, whatever the caller's settings are
    specs = importlib.import_module(f"calm_fast.kernels.{arguments.op}.codegen").codegen_specs()
    for spec in specs:
        small = SMALL_SHARED if 80 in spec.archs else ()  # they take the configs of sm_80
        for arch in sorted(set(arguments.arch) & {*spec.archs, *small}):
            if any(word in spec.name for word in arguments.only):
                compiled = compile_cubin(spec, arch)
                facts = read_facts(compiled.cubin, arch, *compiled[1:])
                print(show(spec.name, facts, spec.num_warps), flush=True)
                for problem in hard_problems(facts, spec.expectations["tensor_core"]):
                    print(f"    PROBLEM {problem}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
