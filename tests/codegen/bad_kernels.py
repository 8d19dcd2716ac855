"""Kernels that are wrong on purpose, one for each fault the codegen tool must catch, and one that is right."""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import triton
import triton.language as tl


@triton.jit
def _product_kernel(a, b, out, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr):
    i, j, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    x = tl.load(a + i[:, None] * DEPTH + k[None, :])
    y = tl.load(b + k[:, None] * COLS + j[None, :])
    tl.store(out + i[:, None] * COLS + j[None, :], tl.dot(x, y, input_precision=PRECISION))


@triton.jit
def _float64_kernel(a, out, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)
    tl.store(out + i, (tl.load(a + i).to(tl.float64) * 0.1 + 1.0).to(tl.float32))


@triton.jit
def _pipelined_kernel(a, b, out, steps, ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr):
    i, j, k = tl.arange(0, ROWS), tl.arange(0, COLS), tl.arange(0, DEPTH)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for step in range(steps):
        x = tl.load(a + step * DEPTH + i[:, None] * 4096 + k[None, :])
        y = tl.load(b + (step * DEPTH + k[:, None]) * COLS + j[None, :])
        total += tl.dot(x, y)
    tl.store(out + i[:, None] * COLS + j[None, :], total)


@triton.jit
def _broken_kernel(a, out, ROWS: tl.constexpr):
    tl.static_assert(ROWS == 0, "this kernel never compiles")


def _spec(name: str, fn: object, dtype: str, shape: dict, tensor_core: bool | str, **options: int) -> SimpleNamespace:
    pointers = [arg for arg in fn.arg_names if arg in ("a", "b", "out")]
    signature = {arg: "constexpr" if arg in shape else "i32" for arg in fn.arg_names}
    signature |= {arg: f"*{dtype}" for arg in pointers} | {"out": "*fp32"}
    return SimpleNamespace(
        name=name,
        fn=fn,
        signature=signature,
        constexprs=shape,
        attrs={(fn.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in pointers},
        num_warps=options.get("num_warps", 4),
        num_stages=options.get("num_stages", 2),
        expectations={"tensor_core": tensor_core},
    )


def _unguarded() -> object:
    """Return the spec of the forward kernel of cross_attention with key loops that may run zero times.

    On that edge moves set the accumulators while products are in flight, so ptxas serialises the products. Small
    kernels of the same form escape it: the mutant is the real kernel, without its guard.
    """
    from calm_fast.kernels.cross_attention import codegen, fwd

    source, guard = Path(fwd.__file__).read_text(), "if first < last:"
    if guard not in source:
        raise RuntimeError(f"the forward kernel has no {guard!r} left to take away: choose another mutant")
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:  # Triton reads a kernel's source from its file
        file.write(source.replace(guard, "if True:"))
        file.flush()
        module_spec = importlib.util.spec_from_file_location("unguarded_fwd", file.name)
        assert module_spec and module_spec.loader
        module = sys.modules[module_spec.name] = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
    real = next(spec for spec in codegen.codegen_specs() if spec.name == "fwd_pointers_bf16_d128_causal_sm90")
    return replace(real, name="serialised", fn=module._cross_attention_fwd_kernel)


def codegen_specs() -> list[object]:
    tile = {"ROWS": 128, "COLS": 64, "DEPTH": 64}
    ieee, tf32 = tile | {"PRECISION": "ieee"}, tile | {"PRECISION": "tf32"}
    wide = {"ROWS": 128, "COLS": 128, "DEPTH": 128}
    return [
        _spec("good", _product_kernel, "bf16", tf32, True),
        _spec("spilling", _product_kernel, "fp32", ieee, False),
        _spec("tf32_unasked", _product_kernel, "fp32", tf32, False),
        _spec("no_tensor_core", _float64_kernel, "bf16", {"ROWS": 128}, True),
        _spec("float64", _float64_kernel, "fp32", {"ROWS": 128}, False),
        _spec("too_much_shared", _pipelined_kernel, "bf16", wide, True, num_warps=8, num_stages=5),
        _unguarded(),
        _spec("uncompilable", _broken_kernel, "fp32", {"ROWS": 16}, False),
    ]
