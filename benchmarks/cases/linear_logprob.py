"""L1: log-probabilities of given tokens, with and without gradients, and their memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F

from calm_fast.benchmarks.baselines.vocabulary import chunked_logprob, imported, log_softmax_logprob, mean_cross_entropy
from calm_fast.benchmarks.registry import Case, Contestant, Definition, Inputs, Series, Target, Thunk, Values
from calm_fast.core import native_library

OP = "linear_logprob"
VOCABULARY = Series("log-probabilities, size of the vocabulary", "V")
POINT = 0.1  # one point's share of the timing budget
CHUNK = {"cpu": 128, "cuda": 1024}  # tokens per chunk of the chunked baselines
Compute = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]  # of hidden, weight, targets


@dataclass(frozen=True)
class Shape:
    """T tokens of width d, a vocabulary of V. train: also the gradient of the hidden states (the LM head is frozen)."""

    t: int
    d: int
    v: int
    train: bool = False

    def sizes(self) -> dict[str, int]:
        return {"T": self.t, "d": self.d, "V": self.v}

    def flops(self) -> int:
        """Count one product; gradients add the logits again and their product with the weight."""
        return 2 * self.t * self.d * self.v * (3 if self.train else 1)

    def bytes(self, itemsize: int) -> int:
        once = itemsize * (self.t + self.v) * self.d + 12 * self.t
        return once + (itemsize * (2 * self.t + self.v) * self.d if self.train else 0)


def make_tokens(
    s: Shape, dtype: torch.dtype, device: torch.device, streams: Sequence[str]
) -> Callable[[int], dict[str, torch.Tensor]]:
    """Return make(seed), which draws hidden states per stream, weight and targets; logits have deviation 1."""

    def make(seed: int) -> dict[str, torch.Tensor]:
        g = torch.Generator(device).manual_seed(seed)

        def draw(rows: int, size: float) -> torch.Tensor:
            return (torch.randn(rows, s.d, generator=g, device=device) * size).to(dtype)

        inputs = {name: draw(s.t, 1.0) for name in streams} | {"weight": draw(s.v, s.d**-0.5)}
        return inputs | {"targets": torch.randint(0, s.v, (s.t,), generator=g, device=device)}

    return make


def _make(s: Shape, dtype: torch.dtype, device: torch.device) -> Callable[[int], Inputs]:
    tokens = make_tokens(s, dtype, device, ("hidden",))

    def make(seed: int) -> Inputs:
        inputs = tokens(seed)
        if s.train:
            g = torch.Generator(device).manual_seed(seed + 1)
            inputs["dlogprob"] = torch.randn(s.t, generator=g, device=device)
        return inputs

    return make


def _run(compute: Compute, name: str = "logprob") -> Callable[[Inputs], Thunk]:
    """Return prepare for `compute`: its result is called `name`; training adds the gradient of hidden."""

    def prepare(inputs: Inputs) -> Thunk:
        hidden, weight, targets = (inputs[n] for n in ("hidden", "weight", "targets"))
        if "dlogprob" not in inputs:

            def score() -> Values:
                with torch.no_grad():
                    return {name: compute(hidden, weight, targets)}

            return score

        def step() -> Values:
            leaf = hidden.detach().requires_grad_()
            out = compute(leaf, weight, targets)
            upstream = inputs["dlogprob"].to(out.dtype) if out.dim() else torch.ones_like(out)
            (grad,) = torch.autograd.grad(out, leaf, upstream)
            return {name: out.detach(), "d_hidden": grad}

        return step

    return prepare


def _definition(compute: Compute, name: str = "logprob") -> Definition:
    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}
        return _run(compute, name)(cast)()

    return values


def _ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, impl: str = "auto") -> torch.Tensor:
    from calm_fast.ops import linear_logprob

    return cast(torch.Tensor, linear_logprob(hidden, weight, targets, impl=impl))  # a tuple only with extras


def explicit(op: str, device: torch.device) -> list[str]:
    """Return the implementations that "auto" chooses from on a CPU, so that each has its own row; none on a GPU."""
    if device.type != "cpu":
        return []
    return ["torch"] + ["native"] * (native_library.obstacle(op, "cpu") is None)


def _product(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.linear(hidden, weight)


def _liger(inputs: Inputs) -> Thunk:
    loss = imported("liger-kernel", "liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
    return _run(lambda hidden, weight, targets: loss(weight, hidden, targets), "mean")(inputs)


def _cut_cross_entropy(inputs: Inputs) -> Thunk:
    loss = imported("cut-cross-entropy", "cut_cross_entropy", "linear_cross_entropy")

    def compute(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # its filter drops small probabilities from the gradient: with random weights, all of them
        return -loss(hidden, weight, targets, reduction="none", filter_eps=None)

    return _run(compute)(inputs)


def logprob_case(
    name: str,
    s: Shape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    packages: bool = False,
    series: Series | None = None,
    share: float = 1.0,
) -> Case:
    """Return a case. Without gradients it also has the bare GEMM, `product`. packages: also other packages' losses.

    A point of a series has only "auto" and the baselines in plain torch.
    """
    chunk = CHUNK[device.type]
    contestants = [
        Contestant("calm_fast", _run(_ours), ours=True),
        Contestant("log_softmax", _run(log_softmax_logprob)),
        Contestant("chunked_log_softmax", _run(partial(chunked_logprob, chunk=chunk))),
    ]
    ours = [(impl, _run(partial(_ours, impl=impl))) for impl in explicit(OP, device)]
    contestants += [Contestant(f"calm_fast_{impl}", prepare, ours=True) for impl, prepare in ours]
    if not s.train:
        bare = Contestant(
            "product", _run(_product, "logits"), definition=_definition(_product, "logits"), yardstick=True
        )
        contestants.append(bare)
    if packages:
        mean = _definition(mean_cross_entropy, "mean")
        contestants.append(Contestant("compiled_log_softmax", lambda i: _run(torch.compile(log_softmax_logprob))(i)))
        contestants.append(Contestant("liger_fused_linear_cross_entropy", _liger, definition=mean))
        contestants.append(Contestant("cut_cross_entropy", _cut_cross_entropy))
    kept = contestants[:3] if series else contestants
    small = replace(s, t=min(s.t, 2 * chunk), v=min(s.v, 5000))
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), _make(s, dtype, device), tuple(kept),
        _definition(log_softmax_logprob), "calm_fast", _make(small, dtype, device), targets, series, share,
    )  # fmt: skip


def cases(device: torch.device, suite: str) -> list[Case]:
    """Return the cases for `device` in `suite`; "full" adds many tokens (memory) and gradients."""
    bf16 = torch.bfloat16
    limits: tuple[Target, ...]
    if device.type == "cuda":
        shape = Shape(8192, 4096, 128256)
        memory = Target("calm_fast", "product", shape.t * shape.v * 2 / (64 << 20), "peak_bytes")
        limits = (Target("calm_fast", "product", 1 / 1.15), Target("calm_fast", "best", 1.0), memory)
        found = [logprob_case("l1_score", shape, bf16, device, limits, packages=True)]
        if suite == "full":
            train, faster = replace(shape, train=True), (Target("calm_fast", "best", 1.0),)
            found.append(logprob_case("l1_training", train, bf16, device, faster, packages=True))
            found.append(logprob_case("l1_few_tokens", replace(shape, t=16), bf16, device))
        return found
    shape = Shape(512, 576, 49152)
    limits = (Target("calm_fast", "log_softmax", 1.7), Target("calm_fast", "product", 1 / 1.2))
    found = [logprob_case("l1_score", shape, bf16, device, limits)]
    for v in (8192, 16384, 32768, 65536):  # memory against baselines that store the logits
        point = Shape(512, 128, v)
        found.append(logprob_case(f"l1_vocabulary_{v}", point, bf16, device, series=VOCABULARY, share=POINT))
    if suite == "full":
        many = replace(shape, t=4096)
        memory = Target("calm_fast", "product", many.t * many.v * 2 / (64 << 20), "peak_bytes")
        found.append(logprob_case("l1_many_tokens", many, bf16, device, (memory,)))
        found.append(logprob_case("l1_training", replace(shape, train=True), bf16, device))
    return found
