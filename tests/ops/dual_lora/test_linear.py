"""dual_lora joined with the product of its linear layer: values, gradients, and where the module takes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import calm_fast
from calm_fast._ops.dual_lora.linear import dual_lora_linear
from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast._ops.dual_lora.torch_impl import fold_dual_lora
from calm_fast.modules import dual_lora as modules_dual_lora
from calm_fast.ops import dual_lora

pytest.importorskip("triton", reason="the kernels need Triton; it has wheels for Linux only")
NAMES = ("x", "weight", "bias", "a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k", "c1", "c2")
T, D_IN, D_OUT, R_POS, R_NEG, G, MID = 19, 24, 37, 5, 3, 7, 11
SHAPES = ((T, D_IN), (D_OUT, D_IN), (D_OUT,), (R_POS, D_IN), (D_OUT, R_POS), (R_NEG, D_IN), (D_OUT, R_NEG), (G, D_IN))
SHAPES += ((G, D_OUT), (MID, D_OUT), (D_OUT, MID))


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, kernel_device):
    """The CPU through the interpreter, or the GPU."""
    if request.param == "interpreter" and kernel_device.type != "cpu":
        pytest.skip("this session has a GPU: its kernels are compiled")
    return kernel_device


def tensors(device, dtype):
    return {
        name: (torch.randn(shape) * shape[-1] ** -0.5 if len(shape) == 2 and name != "x" else torch.randn(shape))
        .to(device, dtype)
        .requires_grad_()
        for name, shape in zip(NAMES, SHAPES, strict=True)
    }


def stepwise(t):
    """The layer and then the definition."""
    y = F.linear(t["x"], t["weight"], t["bias"])
    factors = (t[name] for name in ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k"))
    return dual_lora_reference(t["x"], y, *factors, (t["c1"], t["c2"]), (2.0, 0.5), "none")


def apart(t):
    """The layer and then the op."""
    y = F.linear(t["x"], t["weight"], t["bias"])
    factors = (t[name] for name in ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k"))
    return dual_lora(t["x"], y, *factors, (t["c1"], t["c2"]), scaling=(2.0, 0.5), impl="triton")


def joined(t):
    factors = (t[name] for name in ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k"))
    folded = fold_dual_lora(*factors, (t["c1"], t["c2"]), (2.0, 0.5), "none")
    return dual_lora_linear(t["x"], t["weight"], t["bias"], folded, R_POS)[0]


def values(call, t):
    out = call(t)
    given = {name: leaf for name, leaf in t.items() if leaf is not None}
    upstream = torch.linspace(-1, 2, out.numel(), device=out.device).view_as(out).to(out.dtype)
    grads = torch.autograd.grad(out, list(given.values()), upstream)
    return {"out": out.detach()} | dict(zip(given, grads, strict=True))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_joined_layer_is_as_exact_as_the_layer_and_then_the_op(dtype, bias, device):
    t = tensors(device, dtype)
    t["bias"] = t["bias"] if bias else None
    wide = {name: None if leaf is None else leaf.detach().double().requires_grad_() for name, leaf in t.items()}
    truth, two_calls, found = values(stepwise, wide), values(apart, t), values(joined, t)
    for name, expected in truth.items():
        error, allowed = ((v[name].double() - expected).norm() for v in (found, two_calls))
        rounding = torch.finfo(dtype).eps / 2 * expected.norm()  # of the residual, which two calls do not round
        assert error <= 1.1 * allowed + rounding, f"{name}: {error:.3g} > 1.1 * {allowed:.3g} + {rounding:.3g}"


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


JOINED = "calm_fast::dual_lora_triton_linear"


@pytest.fixture(autouse=True)
def fake_values(monkeypatch):
    """Leave new parameters as they are (fake CUDA tensors have no random numbers), and take them for plain ones."""
    monkeypatch.setattr(modules_dual_lora, "PLAIN", {*modules_dual_lora.PLAIN, FakeTensor})
    monkeypatch.setattr(nn.init, "kaiming_uniform_", lambda tensor, **options: tensor)
    monkeypatch.setattr(nn.init, "uniform_", lambda tensor, *bounds: tensor)


def calls(change=lambda layer: None, dtype=torch.bfloat16, **options):
    """Names of the ops of one forward pass over a CUDA layer, as fake tensors run it without a GPU."""
    with FakeTensorMode(), torch.no_grad():
        base = nn.Linear(32, 48, device="cuda", dtype=torch.bfloat16)
        layer = calm_fast.DualLoRALinear(base, 4, 8.0, gate_dim=4, value_dim=4, **options)
        change(layer)
        with Calls() as found:
            out = layer(torch.empty(2, 8, 32, device="cuda", dtype=dtype))
        assert out.shape == (2, 8, 48)
    return found.names


def test_a_plain_linear_on_a_gpu_is_multiplied_once_onto_the_residual():
    names = calls()
    assert JOINED in names and "calm_fast::dual_lora_triton_fwd" not in names
    assert JOINED in calls(lambda layer: layer.eval(), dropout=0.1)
    assert JOINED in calls(lambda layer: setattr(layer, "record_gates", True))


class Quantised(nn.Linear):
    pass


@pytest.mark.parametrize(
    "change, options",
    [
        (lambda layer: layer.base.register_forward_hook(lambda *args: None), {}),
        (lambda layer: setattr(layer, "base", Quantised(32, 48, device="cuda", dtype=torch.bfloat16)), {}),
        (lambda layer: setattr(layer.base, "forward", layer.base.forward), {}),
        (lambda layer: layer.set_mode("pos"), {}),
        (lambda layer: None, {"variant": "released"}),
        (lambda layer: None, {"dropout": 0.1}),
    ],
    ids=["hooked", "a subclass", "wrapped", "one LoRA", "released", "dropout"],
)
def test_any_other_layer_runs_by_itself(change, options):
    names = calls(change, **options)
    assert JOINED not in names and any(name.startswith(("aten::addmm", "aten::linear", "aten::mm")) for name in names)


def test_a_hook_of_the_base_still_sees_its_output():
    seen = []
    calls(lambda layer: layer.base.register_forward_hook(lambda module, args, out: seen.append(out.shape)))
    assert seen == [(2, 8, 48)]


def test_the_registered_op_meets_its_schema_and_its_fake(device):
    t = tensors(device, torch.float32)
    folded = fold_dual_lora(
        *(t[name] for name in ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k")),
        (t["c1"], t["c2"]),
        (2.0, 0.5),
        "none",
    )
    args = (t["x"], t["weight"], t["bias"], folded.down, folded.up, R_POS)
    args = tuple(arg.detach() if isinstance(arg, torch.Tensor) else arg for arg in args)
    torch.library.opcheck(
        torch.ops.calm_fast.dual_lora_triton_linear.default, args, test_utils=("test_schema", "test_faketensor")
    )
