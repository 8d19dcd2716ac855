"""Compile one Triton kernel for one GPU architecture, without a GPU, and read facts from its machine code."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

KIB = 1024
# the most dynamic shared memory a block can opt in to; the 1 KiB that the driver reserves is already subtracted
SHARED_LIMIT = {80: 163 * KIB, 90: 227 * KIB, 100: 227 * KIB}
TENSOR_MEMORY_LIMIT = 512  # columns per multiprocessor on sm_100
# limits of one multiprocessor, the same for every architecture here: 32-bit registers, warps, blocks
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
SHARED_PER_BLOCK = KIB  # reserved by the driver for each block
# opcode of a large matrix product: warp-level, warpgroup-level, and the tcgen05 unit
MATRIX_OPCODE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
TENSOR_CORE = re.compile(r"^(HMMA|HGMMA|UTCHMMA|IMMA|IGMMA|QMMA|QGMMA|UTC[A-Z]*MMA|OMMA|BMMA)\b")
FLOAT64 = re.compile(r"^D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|\.F64\b|\.(RCP|RSQ)64H\b")
ASYNC_COPY = re.compile(r"^(LDGSTS|UBLKCP|UTMALDG)\b")  # global to shared memory, bypassing registers: a pipeline
LOCAL_MEMORY = re.compile(r"^(LDL|STL)\b")
# one line of nvdisasm: /*0040*/  @!P0 LDL.64 R2, [R1] ;
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


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


def compile_cubin(spec: Any, arch: int) -> tuple[bytes, int, int]:
    """Compile `spec`, an entry of codegen_specs(), for sm_<arch>.

    Returns:
        the cubin, its shared memory in bytes, its tensor memory in columns.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(fn=spec.fn, signature=spec.signature, constexprs=spec.constexprs, attrs=spec.attrs)
    options = {"num_warps": spec.num_warps, "num_stages": spec.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return kernel.asm["cubin"], kernel.metadata.shared, kernel.metadata.tmem_size or 0


def read_facts(cubin: bytes, arch: int, shared: int, tensor_memory: int) -> Facts:
    """Disassemble a cubin that holds one kernel.

    Raises:
        RuntimeError: the disassembler's output has another format.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        run = partial(subprocess.run, capture_output=True, text=True, check=True)
        sass = run([tool("nvdisasm"), "-c", file.name]).stdout
        usage = run([tool("cuobjdump"), "-res-usage", file.name])
    resources = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr)
    opcodes = Counter(INSTRUCTION.findall(sass))
    if not resources or not opcodes:
        raise RuntimeError(f"cannot read the disassembly for sm_{arch}: its format has changed")

    def matching(pattern: re.Pattern[str]) -> tuple[str, ...]:
        return tuple(sorted(op for op in opcodes if pattern.search(op)))

    return Facts(
        arch=arch,
        registers=int(resources[1]),
        instructions=sum(opcodes.values()),
        shared=shared,
        tensor_memory=tensor_memory,
        stack=int(resources[2]),
        local_accesses=sum(opcodes[op] for op in matching(LOCAL_MEMORY)),
        float64=matching(FLOAT64),
        tensor_core=matching(TENSOR_CORE),
        matrix_instructions=sum(opcodes[op] for op in matching(TENSOR_CORE)),
        async_copies=sum(opcodes[op] for op in matching(ASYNC_COPY)),
    )


def blocks_per_multiprocessor(facts: Facts, num_warps: int) -> int:
    """Return how many blocks fit on a multiprocessor, by registers, shared memory, warps and tensor memory."""
    registers = -(-facts.registers // 8) * 8 * 32 * num_warps  # a warp gets registers in units of 256
    shared = SHARED_LIMIT[facts.arch] + SHARED_PER_BLOCK
    fit = [BLOCKS, WARPS // num_warps, REGISTERS // registers, shared // (facts.shared + SHARED_PER_BLOCK)]
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
