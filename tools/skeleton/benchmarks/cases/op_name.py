"""op_name: one elementwise product against torch."""

from __future__ import annotations

import torch

from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant, Inputs, Thunk, Values

OP = "op_name"
_T, _D = 4096, 1024


def _make(device: torch.device, tokens: int) -> Inputs:
    g = torch.Generator().manual_seed(0)
    return {"x": torch.randn(tokens, _D, generator=g).to(device)}


def _ours(impl: str, inputs: Inputs) -> Thunk:
    from calm_fast._ops.op_name.api import decide, op_name

    try:
        decide(inputs["x"], scale=0.5, impl=impl)
    except RuntimeError as reason:
        raise CannotRunError(str(reason)) from reason
    return lambda: {"out": op_name(inputs["x"], scale=0.5, impl=impl)}


def _eager(inputs: Inputs) -> Thunk:
    return lambda: {"out": 0.5 * inputs["x"]}


def _definition(inputs: Inputs, dtype: torch.dtype) -> Values:
    return {"out": 0.5 * inputs["x"].to(dtype)}


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device`; both suites have the same one."""
    contestants = (
        Contestant("calm_fast", lambda inputs: _ours("auto", inputs), ours=True),
        Contestant("eager", _eager),
    )
    elements = _T * _D
    return [
        Case(
            OP, "op_name_scale", {"T": _T, "D": _D}, torch.float32, elements, 8 * elements,
            lambda seed: _make(device, _T), contestants, _definition, "calm_fast", lambda seed: _make(device, 64),
        )
    ]  # fmt: skip
