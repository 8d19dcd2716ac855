"""N1: the NCE loss, forward and backward, against three log-softmaxes of full logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from calm_fast.benchmarks.baselines.vocabulary import chunked_nce, imported, js_divergence, three_softmax_nce
from calm_fast.benchmarks.cases.linear_logprob import CHUNK, POINT, explicit, make_tokens
from calm_fast.benchmarks.cases.linear_logprob import Shape as TokenShape
from calm_fast.benchmarks.registry import Case, Contestant, Definition, Inputs, Series, Target, Thunk, Values

OP = "linear_nce"
TOKENS = Series("NCE loss, forward and backward, number of tokens", "T")
STREAMS = ("student", "nat", "neg")
_PER_SEQUENCE = 128
Compute = Callable[[Inputs], torch.Tensor]


@dataclass(frozen=True)
class Shape(TokenShape):
    """T tokens of three streams in sequences of 128. head: also the gradient of the weight."""

    head: bool = False

    def flops(self) -> int:
        """Count the cheapest known form: three products for logits kept on chip, one or two with their gradient."""
        return 2 * self.t * self.d * self.v * (5 if self.head else 4)

    def bytes(self, itemsize: int) -> int:
        """Count the weight and three streams read once, and the gradients written; logits on chip move nothing."""
        return itemsize * self.d * (4 * self.t + (2 if self.head else 1) * self.v)


def _make(s: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[int], Inputs]:
    tokens = make_tokens(s, dtype, device, STREAMS)

    def make(seed: int) -> Inputs:
        inputs = tokens(seed)
        for name in ("nat", "neg"):  # teachers near the student, like trained ones
            inputs[name] = (inputs["student"] + 0.5 * inputs[name]).contiguous()
        return inputs | {"seq_ids": torch.arange(s.t, device=device) // _PER_SEQUENCE}

    return make


def _run(compute: Compute, head: bool) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        names = ("student", "weight") if head else ("student",)

        def step() -> Values:
            leaves = {name: inputs[name].detach().requires_grad_() for name in names}
            loss = compute({**inputs, **leaves})
            grads = torch.autograd.grad(loss, list(leaves.values()))
            return {"loss": loss.detach(), **{f"d_{n}": g for n, g in zip(names, grads, strict=True)}}

        return step

    return prepare


def _definition(compute: Compute, head: bool) -> Definition:
    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        return _run(compute, head)({n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()})()

    return values


def _ours(inputs: Inputs, impl: str = "auto") -> torch.Tensor:
    from calm_fast.ops import linear_nce

    return linear_nce(**inputs, impl=impl)


def _eager(inputs: Inputs) -> torch.Tensor:
    return three_softmax_nce(**inputs)


def _chunked(chunk: int, head: bool) -> Callable[[Inputs], Thunk]:
    return lambda inputs: lambda: chunked_nce(**inputs, chunk=chunk, head=head)


def _js(inputs: Inputs) -> torch.Tensor:
    return js_divergence(inputs["student"], inputs["nat"], inputs["weight"])


def _liger(head: bool) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        loss = imported("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearJSD")(jsd_beta=0.5)
        return _run(lambda i: loss(i["student"], i["weight"], i["nat"], i["weight"].detach(), None), head)(inputs)

    return prepare


def nce_case(
    name: str,
    s: Shape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    packages: bool = False,
    series: Series | None = None,
    share: float = 1.0,
) -> Case:
    """Return a case. packages: also the compiled formula and another package's related loss of two streams.

    A point of a series has only "auto" and the baselines in plain torch.
    """
    chunk = CHUNK[device.type]
    assert chunk % _PER_SEQUENCE == 0
    contestants = [
        Contestant("calm_fast", _run(_ours, s.head), ours=True),
        Contestant("three_softmax", _run(_eager, s.head)),
        Contestant("chunked", _chunked(chunk, s.head)),
    ]
    ours = [(impl, _run(partial(_ours, impl=impl), s.head)) for impl in explicit(OP, device)]
    contestants += [Contestant(f"calm_fast_{impl}", prepare, ours=True) for impl, prepare in ours]
    if packages:
        contestants.append(Contestant("compiled_three_softmax", lambda i: _run(torch.compile(_eager), s.head)(i)))
        two_streams = _definition(_js, s.head)
        contestants.append(Contestant("liger_fused_linear_jsd", _liger(s.head), definition=two_streams, yardstick=True))
    kept = contestants[:3] if series else contestants
    small = replace(s, t=min(s.t, 2 * chunk), v=min(s.v, 5000))
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), _make(s, dtype, device), tuple(kept),
        _definition(_eager, s.head), "calm_fast", _make(small, dtype, device), targets, series, share,
    )  # fmt: skip


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device` in `suite`; "full" adds a trained head, and on a CPU many tokens (memory)."""
    bf16, memory = torch.bfloat16, Target("calm_fast", "three_softmax", 10.0, "peak_bytes")
    if device.type == "cuda":
        shape, limits = Shape(8192, 4096, 128256), (Target("calm_fast", "three_softmax", 1.5), memory)
        found = [nce_case("n1", shape, bf16, device, limits, packages=True)]
        if suite == "full":
            found.append(nce_case("n1_trained_head", replace(shape, head=True), bf16, device, limits))
        return found
    shape = Shape(512, 576, 49152)
    found = [nce_case("n1", shape, bf16, device, (memory,))]
    for t in (128, 256, 512, 1024):  # memory against baselines that store the logits of three streams
        found.append(nce_case(f"n1_tokens_{t}", Shape(t, 64, 32768), bf16, device, series=TOKENS, share=POINT))
    if suite == "full":
        found.append(nce_case("n1_many_tokens", replace(shape, t=4096), bf16, device, (memory,)))
        found.append(nce_case("n1_trained_head", replace(shape, head=True), bf16, device))
    return found
