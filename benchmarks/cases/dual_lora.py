"""D1 and D2: a layer with dual LoRA, its cost on top of the base layer, and one decode step of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from calm_fast.benchmarks.baselines.dual_lora import concatenated, formula, peft_layer, single_lora
from calm_fast.benchmarks.graphs import graphed
from calm_fast.benchmarks.kept_weights import as_steps
from calm_fast.benchmarks.registry import Case, Contestant, Definition, Inputs, Target, Thunk, Values
from calm_fast.core import native_library

OP = "dual_lora"
SCALE = 2.0
FROZEN = ("a_neg", "b_neg")
WHOLE = {"formula": formula, "concatenated": concatenated}  # baselines that do the same work


@dataclass(frozen=True)
class Shape:
    """T tokens of width d, two LoRAs of rank R, gate G, value bottleneck m (0: a full W_v).

    added: the base output is an input, so only the LoRAs' cost is measured. train: forward and backward.
    """

    t: int
    d: int
    r: int
    variant: str
    m: int = 128
    g: int = 128
    added: bool = False
    train: bool = False

    def sizes(self) -> dict[str, int]:
        return {"T": self.t, "d": self.d, "R": self.r, "G": self.g, "m": self.m}

    def _products(self) -> tuple[int, int]:
        """Return the FLOPs of the base layer and of the folded rest."""
        skinny, tail = 8 * self.t * self.d * self.r, 4 * self.t * self.d * self.r
        if self.variant == "released":
            tail = 4 * self.t * self.d * self.m + 4 * self.t * self.m * self.r
        return 0 if self.added else 2 * self.t * self.d**2, skinny + tail

    def flops(self) -> int:
        base, rest = self._products()
        return 2 * base + 3 * rest if self.train else base + rest

    def bytes(self, itemsize: int) -> int:
        """Count tokens in and out, the folded factors, the base weight unless `added`; training moves all twice."""
        tokens = self.t * self.d * (3 if self.added else 2)
        factors = 6 * self.r * self.d + (2 * self.m * self.d if self.variant == "released" else 0)
        once = tokens + factors + (0 if self.added else self.d**2)
        return itemsize * once * (2 if self.train else 1)


def _make(s: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int, size: float = 1.0) -> torch.Tensor:
            return (torch.randn(*shape, generator=g, device=device) * size).to(dtype)

        def weight(rows: int, columns: int) -> torch.Tensor:
            return draw(rows, columns, size=columns**-0.5)

        d, r = s.d, s.r
        inputs = {"x": draw(s.t, d), "a_pos": weight(r, d), "b_pos": weight(d, r)}
        inputs |= {"a_neg": weight(r, d), "b_neg": weight(d, r), "w_k": weight(s.g, d)}
        inputs["w_q"] = draw(s.g, d, size=(d * s.g) ** -0.5)  # keeps the gates away from 0 and 1
        inputs |= {"c1": weight(s.m, d), "c2": weight(d, s.m)} if s.m else {"w_v": weight(d, d)}
        inputs["y" if s.added else "base"] = draw(s.t, d) if s.added else weight(d, d)
        if s.train:
            inputs["dout"] = draw(s.t, d)
        return inputs

    return make


def _thunk(
    forward: Callable[[torch.Tensor], torch.Tensor], factors: Mapping[str, torch.Tensor], inputs: Inputs
) -> Thunk:
    """Return the thunk of inference, or of a training step with the gradients of x and of the trained factors."""
    x = inputs["x"]
    if "dout" not in inputs:

        def infer() -> Values:
            with torch.no_grad():
                return {"out": forward(x)}

        return infer
    x = x.detach().requires_grad_()
    leaves = {"x": x, **factors}

    def step() -> Values:
        out = forward(x)
        grads = torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
        return {"out": out.detach(), **{f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    return step


def _trained(inputs: Inputs, names: Sequence[str]) -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(inputs[name].detach().clone()) for name in names}


def _plain(s: Shape, which: str, compiled: bool = False, graph: bool = False) -> Callable[[Inputs], Thunk]:
    """Prepare the variant's formula (one of WHOLE), one LoRA, or the bare base layer, in torch's own ops."""

    def prepare(inputs: Inputs) -> Thunk:
        everything = [n for n in ("a_pos", "b_pos", "w_q", "w_k", "c1", "c2", "w_v") if n in inputs]
        names: dict[str, list[str]] = {"single_lora": ["a_pos", "b_pos"], "base_linear": []}
        factors = _trained(inputs, names.get(which, everything))
        w = dict(inputs) | factors

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = inputs["y"] if s.added else F.linear(x, inputs["base"])
            if which == "base_linear":
                return y
            return single_lora(w, x, y, SCALE) if which == "single_lora" else WHOLE[which](w, x, y, SCALE, s.variant)

        thunk = _thunk(torch.compile(forward) if compiled else forward, factors, inputs)
        return graphed(thunk) if graph else thunk

    return prepare


class _Given(nn.Module):
    """A base layer with a given output."""

    y: torch.Tensor

    def __init__(self, y: torch.Tensor, d_in: int) -> None:
        super().__init__()
        self.in_features, self.out_features = d_in, y.shape[-1]
        self.register_buffer("y", y)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.y


def _ours(s: Shape, graph: bool = False) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        from calm_fast import DualLoRALinear

        x = inputs["x"]
        if s.added:
            base: nn.Module = _Given(inputs["y"], s.d)
        else:
            base = _base_layer(inputs)
        layer = DualLoRALinear(
            base, s.r, SCALE * s.r, gate_dim=s.g, value_dim=s.m or None, variant=s.variant,
            dtype=x.dtype, device=x.device,
        )  # fmt: skip
        parts: dict[str, torch.Tensor] = {
            "a_pos": layer.lora_a_pos,
            "b_pos": layer.lora_b_pos,
            "a_neg": layer.lora_a_neg,
        }
        parts |= {"b_neg": layer.lora_b_neg, "w_q": layer.gate_q, "w_k": layer.gate_k}
        parts |= dict(zip(("c1", "c2") if s.m else ("w_v",), layer.value, strict=True))
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(inputs[name])
        forward = layer if "dout" in inputs else as_steps(layer, layer)
        thunk = _thunk(forward, {name: part for name, part in parts.items() if name not in FROZEN}, inputs)
        return graphed(thunk) if graph else thunk

    return prepare


def _kept(s: Shape, impl: str, graph: bool = False) -> Callable[[Inputs], Thunk]:
    """Prepare the op with factors folded once, as DualLoRALinear keeps them in inference, in one implementation."""

    def prepare(inputs: Inputs) -> Thunk:
        from calm_fast._ops.dual_lora.api import dual_lora_folded
        from calm_fast._ops.dual_lora.native import pack_folded, project_folded
        from calm_fast._ops.dual_lora.torch_impl import fold_dual_lora

        factors = {name: inputs[name] for name in ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k")}
        value = [inputs[name] for name in ("c1", "c2", "w_v") if name in inputs]
        activation = "gelu" if s.variant == "released" else "none"
        folded = fold_dual_lora(**factors, value=value, scaling=(SCALE, SCALE), activation=activation)
        folded = pack_folded(folded) if impl == "native" else folded

        def forward(x: torch.Tensor) -> torch.Tensor:
            y = inputs["y"] if s.added else F.linear(x, inputs["base"])
            return dual_lora_folded(project_folded(x, folded), y, folded, s.r, impl=impl)

        thunk = _thunk(forward, {}, inputs)
        return graphed(thunk) if graph else thunk

    return prepare


def _base_layer(inputs: Inputs) -> nn.Linear:
    weight = inputs["base"]
    base = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta", dtype=weight.dtype)
    base.weight = nn.Parameter(weight, requires_grad=False)
    return base


def _peft(graph: bool = False) -> Callable[[Inputs], Thunk]:
    """Prepare PEFT's layer with one LoRA, on the same base layer."""

    def prepare(inputs: Inputs) -> Thunk:
        layer = peft_layer(_base_layer(inputs), inputs["a_pos"], inputs["b_pos"], SCALE)
        factors = {"a_pos": layer.lora_A["default"].weight, "b_pos": layer.lora_B["default"].weight}
        thunk = _thunk(layer, factors, inputs)
        return graphed(thunk) if graph else thunk

    return prepare


def _definition(s: Shape, which: str) -> Definition:
    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        return _plain(s, which)({name: t.to(dtype) for name, t in inputs.items()})()

    return values


def layer_case(
    name: str,
    s: Shape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    *,
    compiled: bool = False,
    graph: bool = False,
    check_tokens: int = 64,
    packages: bool = False,
) -> Case:
    """Return a case. Unless `added`, its yardsticks are the bare base layer and one LoRA.

    Args:
        compiled: also torch.compile of the formula. graph: also every contestant as a CUDA graph (a decode step).
        check_tokens: tokens of the correctness check. packages: also another package's layer with one LoRA.
    """
    kinds = [(which, _definition(s, "formula")) for which in WHOLE]
    if not s.added:
        kinds += [(which, _definition(s, which)) for which in ("base_linear", "single_lora")]
    contestants = [Contestant("calm_fast", _ours(s), ours=True)]
    if s.added and device.type == "cpu":  # the implementations that the layer chooses from
        present = ["torch"] + ["native"] * (native_library.obstacle(OP, "cpu") is None)
        contestants += [Contestant(f"calm_fast_{impl}", _kept(s, impl), ours=True) for impl in present]
    contestants += [
        Contestant(which, _plain(s, which), definition=d, yardstick=which not in WHOLE) for which, d in kinds
    ]
    if compiled and not graph:
        contestants.append(Contestant("compiled_formula", _plain(s, "formula", compiled=True), definition=kinds[0][1]))
    if graph:
        contestants.append(Contestant("calm_fast_graph", _ours(s, graph=True), ours=True))
        if native_library.obstacle(OP, device.type) is None:  # "auto" is Triton
            contestants.append(Contestant("calm_fast_native_graph", _kept(s, "native", graph=True), ours=True))
        contestants += [
            Contestant(f"{which}_graph", _plain(s, which, graph=True), definition=d, yardstick=which not in WHOLE)
            for which, d in kinds
        ]
        if compiled:
            both = _plain(s, "formula", compiled=True, graph=True)
            contestants.append(Contestant("compiled_formula_graph", both, definition=kinds[0][1]))
    if packages:
        one = dict(kinds)["single_lora"]
        contestants.append(Contestant("peft_lora", _peft(), definition=one, yardstick=True))
        contestants += [Contestant("peft_lora_graph", _peft(graph=True), definition=one, yardstick=True)] * graph
    small = replace(s, t=min(s.t, check_tokens))
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), _make(s, dtype, device), tuple(contestants),
        kinds[0][1], "calm_fast_graph" if graph else "calm_fast", _make(small, dtype, device), targets,
    )  # fmt: skip


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device` in `suite`; "full" adds ranks, whole layers and compiled baselines."""
    return (_gpu if device.type == "cuda" else _cpu)(device, suite == "full")


def _cpu(device: torch.device, full: bool) -> list[Case]:
    fp32 = torch.float32
    d1: dict[str, Any] = {"t": 256, "d": 4096, "r": 8}
    kinds: list[tuple[str, dict[str, Any], float]] = [
        ("released", {"variant": "released"}, 4.0),
        ("paper", {"variant": "paper"}, 5.0),
        ("paper_full_value", {"variant": "paper", "m": 0}, 15.0),
    ]
    found = [
        layer_case(
            f"d1_added_{name}", Shape(**d1, **kind, added=True), fp32, device, (Target("calm_fast", "formula", least),)
        )
        for name, kind, least in kinds
    ]
    for variant in ("released", "paper"):
        s = Shape(1024, 768, 8, variant, train=True)
        found.append(layer_case(f"d1_training_{variant}", s, fp32, device, compiled=full, packages=True))
        if full:
            whole = Shape(**d1, variant=variant)
            found.append(layer_case(f"d1_layer_{variant}", whole, fp32, device, compiled=True, packages=True))
            found.append(layer_case(f"d2_decode_{variant}", Shape(**d1 | {"t": 1}, variant=variant), fp32, device))
    return found


def _gpu(device: torch.device, full: bool) -> list[Case]:
    bf16, found, both = torch.bfloat16, [], {"compiled": True, "packages": True}
    layer = (Target("calm_fast", "base_linear", 1 / 1.10), Target("calm_fast", "single_lora", 1.0))
    step = (
        Target("calm_fast_graph", "base_linear_graph", 1 / 1.15),
        Target("calm_fast_graph", "single_lora_graph", 1.0),
    )
    for variant in ("released", "paper"):
        for r in (8, 16, 64) if full else (16,):
            s = Shape(8192, 4096, r, variant)
            found.append(layer_case(f"d1_{variant}_r{r}", s, bf16, device, layer, **both))
            train = replace(s, train=True)
            faster = (Target("calm_fast", "compiled_formula", 1.0), Target("calm_fast", "single_lora", 1.0))
            found.append(layer_case(f"d1_training_{variant}_r{r}", train, bf16, device, faster, **both))
        for t in (1, 16, 64) if full else (1, 64):
            s = Shape(t, 4096, 16, variant)
            found.append(layer_case(f"d2_decode_{variant}_t{t}", s, bf16, device, step, graph=True, **both))
    return found
