"""X4 and X5: the whole composition layer, and one decode step of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast.benchmarks.baselines.cross_attention import (
    EPS,
    FixedCache,
    PlainHook,
    ReleasedHook,
    init_weights,
    unfolded_layer,
    visible,
)
from calm_fast.benchmarks.graphs import graphed
from calm_fast.benchmarks.kept_weights import as_steps
from calm_fast.benchmarks.registry import Case, Contestant, Definition, Inputs, Series, Target, Thunk, Values

OP = "cross_attention"
WEIGHTS = ("norm", "proj", "q", "k", "v", "o")


@dataclass(frozen=True)
class LayerShape:
    """B sequences of M anchor and N augmenter tokens. cached: the keys are in the cache already (a decode step)."""

    b: int
    m: int
    n: int
    da: int
    db: int
    h: int
    d: int
    causal: bool = False
    train: bool = False
    cached: bool = False

    def sizes(self) -> dict[str, int]:
        names = {"B": self.b, "M": self.m, "N": self.n, "DA": self.da, "DB": self.db, "H": self.h, "D": self.d}
        return names | {"causal": int(self.causal)}

    def flops(self) -> int:
        """Count the folded layer, the cheapest known form.

        Backward adds two of each product (H_A gets no gradient) and two and a half of attention, which recomputes the
        scores as every attention does that does not store them.
        """
        hd, rows, keys = self.h * self.d, self.b * self.m, self.b * (1 if self.cached else self.n)
        pairs = self.b * (self.m * (self.m + 1) // 2 if self.causal else self.m * self.n)
        ends, core = 4 * rows * self.db * hd, 4 * pairs * hd
        folded, once = 4 * keys * self.da * hd, 4 * hd * self.db * self.da
        project, unfolded = 2 * keys * self.da * self.db, 4 * keys * self.db * hd
        if not self.train:
            return ends + core + folded
        return 3 * ends + 7 * core // 2 + min(2 * folded + 3 * once, 2 * project + 3 * unfolded)

    def bytes(self, itemsize: int) -> int:
        """Count inputs and results once, with a cache its keys and values too.

        Inference reads the folded weight. Training reads the factors and writes their gradients.
        """
        hd, rows = self.h * self.d, self.b * self.m
        ends = 2 * hd * self.db
        if self.cached:
            return itemsize * (
                2 * rows * self.db + self.b * self.da + 2 * self.b * self.n * hd + ends + 2 * hd * self.da
            )
        states = rows * self.db + self.b * self.n * self.da
        if not self.train:
            return itemsize * (states + rows * self.db + ends + 2 * hd * self.da)
        factors = ends + self.db * self.da + 2 * hd * self.db + self.db
        return itemsize * (states + 3 * rows * self.db + 2 * factors)


def _make(s: LayerShape, dtype: torch.dtype, device: torch.device) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        inputs = {
            "hb": draw(s.b, s.m, s.db),
            "ha": draw(s.b, 1 if s.cached else s.n, s.da),
            "weights": init_weights(s.da, s.db, s.h, s.d, dtype, device, seed + 1),
        }
        if s.train:
            inputs["dout"] = draw(s.b, s.m, s.db)
        if s.cached:
            inputs["keys"], inputs["values"] = (draw(s.b, s.h, s.n, s.d) for _ in range(2))
        return inputs

    return make


def _thunk(
    forward: Callable[..., torch.Tensor], parameters: Sequence[tuple[str, torch.Tensor]], inputs: Inputs, s: LayerShape
) -> Thunk:
    """Return the thunk of inference, or of a training step with the gradients of the parameters and of H_B."""
    hb, ha = inputs["hb"], inputs["ha"]
    if not s.train:

        def infer() -> Values:
            with torch.no_grad():
                return {"out": forward(hb, ha)}

        return infer
    hb = hb.detach().requires_grad_()
    leaves = [hb, *(p for _, p in parameters)]
    names = ["hb", *(name for name, _ in parameters)]

    def step() -> Values:
        out = forward(hb, ha)
        grads = torch.autograd.grad(out, leaves, inputs["dout"])
        return {"out": out.detach(), **{f"d_{name}": g for name, g in zip(names, grads, strict=True)}}

    return step


def _leaves(inputs: Inputs, s: LayerShape) -> dict[str, torch.Tensor]:
    return {name: t.detach().clone().requires_grad_(s.train) for name, t in inputs["weights"].items()}


def _cache(inputs: Inputs, s: LayerShape) -> FixedCache | None:
    return FixedCache(inputs["keys"], inputs["values"]) if s.cached else None


def _baseline(s: LayerShape, sdpa: bool, compiled: bool = False, graph: bool = False) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        w, cache = _leaves(inputs, s), _cache(inputs, s)
        mask = None if sdpa else visible(s.m, s.n, inputs["hb"].device, None, None, s.causal)

        def forward(hb: torch.Tensor, ha: torch.Tensor) -> torch.Tensor:
            return unfolded_layer(w, hb, ha, s.h, sdpa=sdpa, causal=s.causal, mask=mask, cache=cache)

        thunk = _thunk(torch.compile(forward) if compiled else forward, [(n, w[n]) for n in WEIGHTS], inputs, s)
        return graphed(thunk) if graph else thunk

    return prepare


def _ours(s: LayerShape, graph: bool = False) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        from calm_fast import CrossAttention

        layer = CrossAttention(s.db, s.da, s.h, head_dim=s.d, eps=EPS).to(inputs["hb"])
        assert layer.norm is not None and layer.proj is not None  # both are on by default
        parts: dict[str, Any] = {
            "norm": layer.norm, "proj": layer.proj, "q": layer.q_proj,
            "k": layer.k_proj, "v": layer.v_proj, "o": layer.o_proj,
        }  # fmt: skip
        with torch.no_grad():
            for name, part in parts.items():
                part.weight.copy_(inputs["weights"][name])
        cache = _cache(inputs, s)

        def forward(hb: torch.Tensor, ha: torch.Tensor) -> torch.Tensor:
            return layer(hb, ha, cache=cache, causal=s.causal)

        if not s.train:
            forward = as_steps(layer, forward)
        thunk = _thunk(forward, [(name, parts[name].weight) for name in WEIGHTS], inputs, s)
        return graphed(thunk) if graph else thunk

    return prepare


def _hook(s: LayerShape) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        hook = ReleasedHook(inputs["weights"], s.h)
        return _thunk(hook, list(hook.named_parameters()), inputs, s)

    return prepare


def _in(dtype: torch.dtype, inputs: Inputs) -> Inputs:
    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: convert(v) for name, v in value.items()}
        return value.to(dtype) if isinstance(value, torch.Tensor) else value

    return {name: convert(value) for name, value in inputs.items()}


def _hook_definition(s: LayerShape) -> Definition:
    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        converted = _in(dtype, inputs)
        hook = ReleasedHook(converted["weights"], s.h)
        return _thunk(PlainHook(hook, s.h), list(hook.named_parameters()), converted, s)()

    return values


def _definition(s: LayerShape) -> Definition:
    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        return _baseline(s, sdpa=False)(_in(dtype, inputs))()

    return values


def layer_case(
    name: str,
    s: LayerShape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    *,
    compiled: bool = False,
    check_batch: int | None = None,
    op: str = OP,
    series: Series | None = None,
    share: float = 1.0,
) -> Case:
    """Return a case of the whole layer.

    Args:
        compiled: also torch.compile of both baselines, which takes a while; as CUDA graphs in a GPU's decode step.
        check_batch: number of sequences in the correctness check, if float64 over all of them costs too much.
        op: the registry key that lists the case. series, share: as for Case.
    """
    contestants = [Contestant("calm_fast", _ours(s), ours=True)]
    graph = s.cached and device.type == "cuda"
    if graph:
        contestants.append(Contestant("calm_fast_graph", _ours(s, graph=True), ours=True))
    contestants += [Contestant("eager", _baseline(s, sdpa=False)), Contestant("unfolded_sdpa", _baseline(s, sdpa=True))]
    if not (s.causal or s.cached):  # the released layer has neither a mask nor a cache of keys
        contestants.append(Contestant("released_hook", _hook(s), definition=_hook_definition(s)))
    if compiled:
        tail = "_graph" if graph else ""
        contestants += [
            Contestant(f"compiled_{base}{tail}", _baseline(s, sdpa=base != "eager", compiled=True, graph=graph))
            for base in ("eager", "unfolded_sdpa")
        ]
    small = None
    if check_batch is not None and check_batch < s.b:
        small = _make(replace(s, b=check_batch), dtype, device)
    return Case(
        op, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), _make(s, dtype, device), tuple(contestants),
        _definition(s), "calm_fast_graph" if graph else "calm_fast", small, targets, series, share,
    )  # fmt: skip
