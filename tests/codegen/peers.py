"""Compile FlexAttention of the installed torch for sm_90 beside our kernels, without a GPU, and compare by the model.

Nothing of torch is copied: its templates are rendered at run time, with the launch configs that inductor tries on an
H100 or H200 under max-autotune. The best of them by the model stands in docs/ops/peers.md, and the best of those that
neither spill nor are serialised.
"""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
from collections.abc import Container, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import golden

from calm_fast.benchmarks import machine_code, sass
from calm_fast.benchmarks.machine_code import Facts, compile_cubin, hard_problems, read_facts, serialised
from calm_fast.benchmarks.sass import Loop
from calm_fast.benchmarks.speed_model import PEAK_TFLOPS, TENSOR_FLOP, predict

PAGE = golden.PAGE.with_name("peers.md")
COMPILED = golden.FOLDER.parents[2] / "build" / "peers"  # facts of compiled kernels, so that a run can continue
ARCH = 90
HEAD_DIMS = (64, 128, 256)
BATCH, HEADS, LENGTH, SPARSE_BLOCK = 4, 32, 8192, 128  # static shapes, which inductor writes into the kernel
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5  # products per pair of a query and a key that the algorithm needs


@dataclass(frozen=True)
class Part:
    """A compiled kernel's loop over tiles of scores. products: of a tile, forward 2, dq 3, dk with dv 4."""

    rows: int
    columns: int
    products: int


@dataclass(frozen=True)
class Row:
    """One line of the page."""

    direction: str
    head_dim: int
    who: str
    config: str
    facts: tuple[Facts, ...]
    loops: tuple[Loop, ...]
    tflops: float


# --- compiled kernels, kept


def facts_key(spec: Any) -> str:
    """Return a name for the facts of a kernel, which depend on the code that reads them too."""
    import triton

    source = spec.source if isinstance(spec, SimpleNamespace) else (spec.fn.cache_key, spec.signature, spec.attrs)
    readers = [Path(module.__file__ or "").read_text() for module in (machine_code, sass)]
    constants = sorted(spec.constexprs.items())
    parts = (triton.__version__, ARCH, source, constants, spec.num_warps, spec.num_stages, readers)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def kept_facts(spec: Any) -> Facts | str:
    """Compile a kernel, or read what an earlier run found. Returns its facts, or why it cannot run."""
    path = COMPILED / f"{facts_key(spec)}.pickle"
    if path.is_file():
        return pickle.loads(path.read_bytes())
    found: Facts | str
    try:
        compiled = compile_cubin(spec, ARCH)
    except Exception as error:  # a candidate that does not compile is an answer
        found = f"does not compile: {type(error).__name__}"
    else:
        found = read_facts(compiled.cubin, ARCH, *compiled[1:])
        if any("could never launch" in problem for problem in hard_problems(found, None)):
            found = f"{found.shared} bytes of shared memory"
    COMPILED.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_bytes(pickle.dumps(found))
    unfinished.replace(path)
    return found


# --- the model's figure of an attention pass


def loops_of(facts: Facts, parts: Sequence[Part], head_dim: int, num_warps: int) -> list[Loop] | None:
    """Return the main loop of each part: among the loops with its number of operations, the fastest by the model.

    None if the machine code has no such loop.
    """
    found = []
    for part in parts:
        flop = 2 * part.products * part.rows * part.columns * head_dim
        fitting = [loop for loop in facts.loops if predict(loop, num_warps).flop == flop]
        if not fitting:
            return None
        found.append(min(fitting, key=lambda loop: predict(loop, num_warps).cycles))
    return found


def attention_tflops(
    loops: Iterable[Loop], parts: Iterable[Part], warps: Iterable[int], head_dim: int, products: int
) -> float:
    """Return TFLOP/s of the products that the algorithm needs, over the cycles of all parts."""
    cycles = sum(predict(loop, w).cycles / (p.rows * p.columns) for loop, p, w in zip(loops, parts, warps, strict=True))
    return PEAK_TFLOPS * 2 * products * head_dim / TENSOR_FLOP / cycles


# --- torch's templates


def flex_configs(direction: str, head_dim: int) -> list[Any]:
    """Return the launch configs that inductor tries for bfloat16 on sm_90 under max-autotune."""
    import torch
    from torch._inductor import config
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    with mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)), config.patch(max_autotune=True):
        heuristic = CUDAConfigHeuristic()
        choose = heuristic.get_flex_attn_fwd_configs if direction == "forward" else heuristic.get_flex_attn_bwd_configs
        return choose(head_dim, torch.bfloat16)


def _sizes(head_dim: int) -> dict[str, tuple[int, ...]]:
    blocks = LENGTH // SPARSE_BLOCK
    tensors = dict.fromkeys(("Q", "K", "V", "DO", "DQ", "DV"), (BATCH, HEADS, LENGTH, head_dim))
    counts = dict.fromkeys(("KV_NUM_BLKS", "FULL_KV_NUM_BLKS", "Q_NUM_BLKS", "FULL_Q_NUM_BLKS"), (1, 1, blocks))
    indices = dict.fromkeys(("KV_IDX", "FULL_KV_IDX", "Q_IDX", "FULL_Q_IDX"), (1, 1, blocks, blocks))
    return tensors | counts | indices


def render(direction: str, head_dim: int, options: dict[str, Any]) -> tuple[str, list[str]]:
    """Return the source of torch's kernel for causal attention, as inductor would write it, and its arguments."""
    from torch._inductor.kernel.flex import flex_attention

    forward = direction == "forward"
    template = flex_attention.flex_attention_template if forward else flex_attention.flex_attention_backward_template
    sizes = _sizes(head_dim)
    arguments: list[str] = []
    defines = "\n".join(f"{name} : tl.constexpr = {value}" for name, value in options.items())

    def def_kernel(*names: str) -> str:
        arguments[:] = [*(f"arg_{name}" for name in names), "out_ptr0"]
        lines = [*defines.splitlines(), *(f"{name} = arg_{name}" for name in names)]
        head = "import triton\nimport triton.language as tl\n\n@triton.jit\n"
        return head + f"def peer_kernel({', '.join(arguments)}):\n" + "".join(f"    {line}\n" for line in lines)

    def strides(name: str) -> list[int]:
        found = [1]
        for size in sizes[name][:0:-1]:
            found.insert(0, found[0] * size)
        return found

    def stride(name: str, index: int | None = None) -> str:
        return ", ".join(map(str, strides(name))) if index is None else str(strides(name)[index])

    # causal attention without a change of scores: subgraphs of the forward are (scores, mask), of the backward
    # (scores, their gradient, mask, gradients of captured tensors)
    def modification(subgraph_number: int, output_name: str | None, **given: Any) -> str:
        if output_name == "mask_mod_output":
            return f"mask_mod_output = ({given['m']}) >= ({given['n']})"
        if output_name == "grad_scores":
            return f"grad_scores = ({given['grad_score_mod']})"
        return f"{output_name} = ({given['score']})" if output_name else ""

    def store_output(indices: Sequence[str], value: str, mask: str, **_: Any) -> str:
        offset = " + ".join(f"{step} * {index}" for step, index in zip(strides("Q"), indices, strict=True))
        return f"tl.store(out_ptr0 + ({offset}), {value}, {mask})"

    source = template.template.render(
        def_kernel=def_kernel,
        size=lambda name, index: str(sizes[name][index]),
        stride=stride,
        gen_argdefs=lambda: ", ".join(arguments),
        gen_defines=lambda: defines,
        modification=modification,
        store_output=store_output,
        **options,
    )
    return source, arguments


def flex_options(direction: str, head_dim: int, config: Any) -> tuple[dict[str, Any], tuple[Part, ...]]:
    """Return the options of torch's template with one launch config, and the loops of the kernel."""
    options: dict[str, Any] = {
        "PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True,
        "OUTPUT_LOGSUMEXP": True, "OUTPUT_MAX": False, "FLOAT32_PRECISION": "'ieee'", "IS_DIVISIBLE": True,
        "SM_SCALE": head_dim**-0.5, "GQA_SHARED_HEADS": 1, "HAS_FULL_BLOCKS": True, "SAFE_HEAD_DIM": True,
        "QK_HEAD_DIM": head_dim, "QK_HEAD_DIM_ROUNDED": head_dim, "V_HEAD_DIM": head_dim,
        "V_HEAD_DIM_ROUNDED": head_dim, "SPARSE_Q_BLOCK_SIZE": SPARSE_BLOCK, "SPARSE_KV_BLOCK_SIZE": SPARSE_BLOCK,
        "INDEX_DTYPE": "tl.int32", "USE_TMA": False,
    }  # fmt: skip
    parts: tuple[Part, ...]
    if direction == "forward":
        options |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n}
        parts = (Part(config.block_m, config.block_n, 2),)
    else:
        options |= {f"BLOCK_{side.upper()}": getattr(config, f"block_{side}") for side in ("m1", "n1", "m2", "n2")}
        parts = (Part(config.block_m1, config.block_n1, 4), Part(config.block_m2, config.block_n2, 3))
    return options, parts


def flex_spec(direction: str, head_dim: int, config: Any) -> tuple[SimpleNamespace, tuple[Part, ...]]:
    """Return the spec of torch's kernel with one launch config, as compile_cubin takes it, and its loops."""
    options, parts = flex_options(direction, head_dim, config)
    source, arguments = render(direction, head_dim, options)
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # Triton reads a kernel's source from its file
        file.write(source)
        file.flush()
        module_spec = importlib.util.spec_from_file_location("peer", file.name)
        assert module_spec and module_spec.loader
        module = sys.modules["peer"] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)

    def kind(name: str) -> str:
        if name.endswith(("_BLKS", "_IDX")):
            return "*i32"
        return "*fp32" if name.removeprefix("arg_") in ("LSE", "MAX", "DELTA") else "*bf16"

    spec = SimpleNamespace(
        source=source,
        fn=module.peer_kernel,
        signature={name: kind(name) for name in arguments},
        constexprs={},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(arguments))},
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return spec, parts


def flex_row(direction: str, head_dim: int, config: Any) -> Row | str:
    """Return the row of one launch config, or why it cannot run."""
    spec, parts = flex_spec(direction, head_dim, config)
    text = ", ".join(f"{name.removeprefix('block_').upper()} {value}" for name, value in vars(config).items())
    facts = kept_facts(spec)
    if isinstance(facts, str):
        return f"{text}: {facts}"
    loops = loops_of(facts, parts, head_dim, config.num_warps)
    if loops is None:
        return f"{text}: its loops are not those of the algorithm"
    products = FORWARD_PRODUCTS if direction == "forward" else BACKWARD_PRODUCTS
    tflops = attention_tflops(loops, parts, [config.num_warps] * len(parts), head_dim, products)
    return Row(direction, head_dim, "FlexAttention", text, (facts,), tuple(loops), tflops)


# --- our kernels


def our_kernels(direction: str, head_dim: int, specs: Container[str]) -> dict[str, int]:
    """Return the kernels of a pass and how many products each computes. specs: names of the launches that exist."""
    if direction == "forward":
        return {"fwd": 2}
    if f"dv_bf16_d{head_dim}_causal_sm{ARCH}" in specs:  # dk and dv have a launch each, and both compute the scores
        return {"dkdv": 3, "dv": 2, "dq": 3}
    return {"dkdv": 4, "dq": 3}


def our_row(direction: str, head_dim: int) -> Row:
    """Return the row of the kernels that a causal pass of cross_attention launches, with their default configs."""
    from calm_fast.kernels.cross_attention.codegen import codegen_specs

    specs = {spec.name: spec for spec in codegen_specs()}
    every_facts: list[Facts] = []
    every_loop: list[Loop] = []
    parts: list[Part] = []
    warps: list[int] = []
    texts: list[str] = []
    for name, products in our_kernels(direction, head_dim, specs).items():
        spec = specs[f"{name}_bf16_d{head_dim}_causal_sm{ARCH}"]
        part = Part(spec.constexprs["BLOCK_M"], spec.constexprs["BLOCK_N"], products)
        facts = kept_facts(spec)
        if isinstance(facts, str):
            raise RuntimeError(f"{spec.name}: {facts}")
        if facts.loop is None:
            raise RuntimeError(f"{spec.name}: no loop holds products")
        # a kernel with one purpose: its main loop is the part, even if warpgroups compute the same twice
        every_facts.append(facts)
        every_loop.append(facts.loop)
        parts.append(part)
        warps.append(spec.num_warps)
        size = f"M {part.rows}, N {part.columns}, num_stages {spec.num_stages}, num_warps {spec.num_warps}"
        texts.append(size if direction == "forward" else f"{name}: {size}")
    needed = FORWARD_PRODUCTS if direction == "forward" else BACKWARD_PRODUCTS
    tflops = attention_tflops(every_loop, parts, warps, head_dim, needed)
    return Row(direction, head_dim, "calm_fast", "; ".join(texts), tuple(every_facts), tuple(every_loop), tflops)


# --- the page


def is_clean(row: Row) -> bool:
    """Return whether no kernel of a row spills or has serialised products, so that the model prices all of it."""
    return not any(facts.local_accesses or serialised(facts) for facts in row.facts)


def best(rows: Sequence[Row]) -> list[Row]:
    """Return the best row by the model, and the best clean one if that is another."""
    clean = [row for row in rows if is_clean(row)]
    found = [max(some, key=lambda row: row.tflops) for some in (rows, clean) if some]
    return list(dict.fromkeys(found))


def line(row: Row) -> str:
    """Return a row of the page's table."""
    steps = []
    for loop in row.loops:
        mix = loop.mix
        products = ", ".join(f"{count} {shape}" for shape, count in loop.products.items())
        steps.append(f"{products}; {mix.get('EX2', 0)} EX2, {mix.get('WARPGROUP', 0)} WARPGROUP, {mix['all']} in all")
    registers = ", ".join(str(facts.registers) for facts in row.facts)
    spills = ", ".join(str(facts.local_accesses) for facts in row.facts)
    shared = ", ".join(f"{facts.shared / 1024:.0f}" for facts in row.facts)
    waiting = "yes" if any(serialised(facts) for facts in row.facts) else ""
    cells = (row.direction, row.head_dim, row.who, row.config, registers, spills, shared, " + ".join(steps), waiting)
    return f"| {' | '.join(map(str, cells))} | {row.tflops:.0f} |"


def page(rows: Sequence[Row], torch_version: str, triton_version: str) -> str:
    """Return the text of docs/ops/peers.md."""
    lines = [
        "# Attention kernels beside FlexAttention, by a model",
        "",
        f"Written by `make codegen ARGS=--peers` with torch {torch_version} and Triton {triton_version}. No GPU ran",
        "any of this: both kernels are compiled for sm_90, and a model (`calm_fast.benchmarks.speed_model`) prices a",
        "step of the main loop. It compares forms of a loop and predicts no speed: what waits, masked blocks and",
        "everything outside the loop are left out. Spills count as traffic of the cache, the loads of a loop without a",
        "pipeline (one stage) as traffic from L2; neither is charged for the time it waits.",
        "",
        "Causal attention, bfloat16. FlexAttention is rendered from the templates of the installed torch for causal",
        "attention with a block mask and static shapes, its best case. Of the launch configs that inductor tries on an",
        "H100 under max-autotune the best by the model is shown, and the best without spills or serialised products",
        "if that is another. Its form with tensor descriptors (TMA) is off by default and not shown.",
        "",
        "- in a step: the instructions of each warp in one step of the main loop, without what a branch may skip; of",
        "  the backward, dk with dv + dq, or dk + dv + dq.",
        "- spills: in the whole kernel. Not all are in a step.",
        "- serialised: each product waits for the one before. The model does not charge for it.",
        "- TFLOP/s: of 2 products forward and 5 backward, products that are computed twice not counted.",
        "",
        "| pass | D | kernel | config | registers | spills | shared, KiB | in a step | serialised | model, TFLOP/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + [line(row) for row in rows]) + "\n"


def write_page(processes: int, directions: Sequence[str] = ("forward", "backward")) -> int:
    """Compile everything, print a line for each kernel and write the page. Returns how often ours is behind."""
    import torch
    import triton

    rows, behind = [], []
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = [
            (
                pool.submit(our_row, direction, head_dim),
                [pool.submit(flex_row, direction, head_dim, c) for c in flex_configs(direction, head_dim)],
            )
            for direction in directions
            for head_dim in HEAD_DIMS
        ]
        for ours, candidates in waiting:
            results = [future.result() for future in candidates]
            for result in results:
                print(line(result) if isinstance(result, Row) else f"    {result}", flush=True)
            flex = best([result for result in results if isinstance(result, Row)])
            rows += [ours.result(), *flex]
            print(line(ours.result()), flush=True)
            if ours.result().tflops <= flex[0].tflops:
                behind.append(f"{line(ours.result())}\n    behind {flex[0].tflops:.1f}: {flex[0].config}")
    PAGE.write_text(page(rows, torch.__version__.split("+")[0], triton.__version__))
    compared = len(directions) * len(HEAD_DIMS)
    print(f"written: {PAGE.relative_to(Path(PAGE).parents[2])}; behind in {len(behind)} of {compared} comparisons")
    print(*behind, sep="\n", end="\n" if behind else "")
    return len(behind)
