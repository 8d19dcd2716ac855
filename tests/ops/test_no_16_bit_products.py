"""dual_lora and cross_attention as on a CPU without 16-bit products: float32 inside, the inputs' dtype outside."""

from __future__ import annotations

import pytest
import torch

from calm_fast import DualLoRALinear, fixed_weights
from calm_fast._ops.cross_attention import torch_impl
from calm_fast._ops.cross_attention.cases import CASES as ATTENTION
from calm_fast._ops.dual_lora import api
from calm_fast._ops.dual_lora.cases import CASES as DUAL_LORA
from calm_fast.core import native_library
from calm_fast.core.numerics import check
from calm_fast.modules import dual_lora as module

HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def multiplied(monkeypatch):
    """Let the CPU have no 16-bit products. Return the dtypes of the products that `F.linear` is asked for."""

    def wide(device_type, dtype):
        return torch.float32 if dtype in HALF else dtype

    for room in (api, module, torch_impl):
        monkeypatch.setattr(room, "product_dtype", wide)
    seen, linear = set(), torch.nn.functional.linear

    def watched(x, *factors):
        seen.add(x.dtype)
        return linear(x, *factors)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    return seen


@pytest.mark.parametrize("impl", ["torch", "native"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("ops", [DUAL_LORA, ATTENTION], ids=lambda ops: ops.op)
def test_the_ops_keep_their_bounds(multiplied, ops, dtype, impl):
    if impl == "native" and (obstacle := native_library.obstacle(ops.op, "cpu")):
        pytest.skip(obstacle)
    device = torch.device("cpu")
    cases = [case for case in ops.cases() if case.dtype == dtype]
    for case in cases[:: max(1, len(cases) // 6)]:
        inputs = ops.build(case, device)
        assert all(row.ok for row in check(ops, case, impl)), case
        assert {t.dtype for name, t in ops.run(inputs, impl).items() if name != "lse"} <= {dtype}, case


@pytest.mark.parametrize("variant", ["paper", "released"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["mix", "pos", "neg"])
def test_a_layer_over_a_16_bit_base(multiplied, variant, stored, mode):
    torch.manual_seed(0)
    base = torch.nn.Linear(24, 32).bfloat16()
    layer = DualLoRALinear(base, rank=4, alpha=8.0, variant=variant, dtype=stored).set_mode(mode)
    for p in layer.parameters(recurse=False):
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 24).bfloat16().requires_grad_()
    with torch.no_grad():
        y = base(x)
    multiplied.clear()
    layer.record_gates = True
    out = layer(x)
    assert out.dtype == torch.bfloat16 and multiplied == {torch.bfloat16, torch.float32}  # the base, and all else
    out.float().square().sum().backward()
    assert x.grad.dtype == torch.bfloat16 and bool(x.grad.any())
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert trained and all(p.grad.dtype == stored and bool(p.grad.any()) for p in trained)
    # the same layer in float64 over the base's rounded output
    factors = [getattr(layer, f"lora_{side}").double() for side in ("a_pos", "b_pos", "a_neg", "b_neg")]
    wide = x.detach().double().view(10, 24)
    if mode == "mix":
        gate, value = (layer.gate_q.double(), layer.gate_k.double()), tuple(t.double() for t in layer.value)
        activation = "none" if variant == "paper" else "gelu"
        scaling = layer.scaling
        truth = api.dual_lora(
            wide, y.double().view(10, 32), *factors, *gate, value, scaling=scaling, activation=activation
        )
    else:
        a, b = factors[:2] if mode == "pos" else factors[2:]
        truth = y.double().view(10, 32) + 2.0 * wide @ a.T @ b.T
    # rounded once: half a unit of bfloat16, and what float32 sums add
    torch.testing.assert_close(out.detach().double().view(10, 32), truth, rtol=2**-8 + 1e-5, atol=1e-4)
    with torch.no_grad(), fixed_weights(layer):
        kept = layer(x), layer(x)
    torch.testing.assert_close(kept[0], out.detach(), rtol=2**-7, atol=1e-4)
    assert kept[0].equal(kept[1])
