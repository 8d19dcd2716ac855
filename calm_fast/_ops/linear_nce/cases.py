"""Cases of linear_nce and the rounding analysis of its forward and backward."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast._ops.vocabulary.rounding import ErrorBound, Logits, gradients, logits, pick
from calm_fast.core.numerics import Case, Inputs, Rounding, Values


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case."""

    t: int
    d: int
    v: int
    sequences: int = 3
    alpha: float = 0.5
    temperature: float = 1.0
    offset: float = 0.5
    softcap: float | None = None
    bias: bool = False
    ignored: float = 0.2  # share of the tokens; 1 = all
    magnitude: float = 1.0  # of the hidden states
    teacher_gap: float = 0.3  # distance of the teachers from the student
    frozen: bool = False  # no gradient for weight and bias
    strided: bool = False


_SPECS: dict[str, Spec] = {
    "plain": Spec(13, 16, 53),
    "frozen": Spec(13, 16, 53, frozen=True),
    "single": Spec(1, 1, 1, ignored=0.0, sequences=1),
    "one-column": Spec(5, 8, 1),
    "one-token": Spec(1, 24, 97, ignored=0.0, sequences=1),
    "nothing-ignored": Spec(19, 24, 71, ignored=0.0),
    "all-ignored": Spec(7, 16, 37, ignored=1.0),
    "all-ignored-frozen": Spec(7, 16, 37, ignored=1.0, frozen=True),
    "many-sequences": Spec(31, 16, 41, sequences=31),
    "one-sequence": Spec(31, 16, 41, sequences=1),
    "edges": Spec(16, 32, 64),
    "past-edges": Spec(17, 33, 65),
    "long-rows": Spec(3, 8, 1101, magnitude=2.0),
    "long-rows-frozen": Spec(3, 8, 1101, magnitude=2.0, frozen=True),
    "wide": Spec(7, 200, 45),
    "temperature": Spec(13, 16, 53, temperature=2.5),
    "temperature-low": Spec(13, 16, 53, temperature=0.4, frozen=True),
    "softcap": Spec(13, 16, 53, softcap=2.0, magnitude=3.0),
    "bias": Spec(13, 16, 53, bias=True),
    "everything": Spec(21, 24, 83, temperature=1.7, softcap=4.0, bias=True, alpha=0.8, offset=0.25, magnitude=2.0),
    "hard-only": Spec(13, 16, 53, alpha=0.0),
    "soft-only": Spec(13, 16, 53, alpha=1.0, temperature=2.0),
    "negative-offset": Spec(13, 16, 53, offset=-0.75),
    "sharp": Spec(11, 16, 67, magnitude=12.0),
    "far-teachers": Spec(11, 16, 67, teacher_gap=3.0, magnitude=2.0),
    "strided": Spec(13, 16, 53, strided=True, bias=True),
    "everything-frozen": Spec(
        21, 24, 83, temperature=1.7, softcap=4.0, bias=True, alpha=0.8, offset=0.25, magnitude=2.0, frozen=True
    ),
    "bias-frozen": Spec(19, 17, 53, bias=True, frozen=True),
    # large logits: nearly every token is certain, its gradient is nothing but the error of its probability
    "logits-100": Spec(11, 16, 67, magnitude=1e2, ignored=0.0),
    "logits-1000": Spec(11, 16, 67, magnitude=1e3, ignored=0.0),
    "logits-1000-near": Spec(11, 16, 67, magnitude=1e3, teacher_gap=0.01, temperature=1.7, ignored=0.0),
    "logits-10000": Spec(11, 16, 67, magnitude=1e4, ignored=0.0),
    "logits-100-frozen": Spec(11, 16, 67, magnitude=1e2, ignored=0.0, frozen=True),
    "logits-1000-frozen": Spec(11, 16, 67, magnitude=1e3, teacher_gap=0.01, ignored=0.0, frozen=True),
    "logits-10000-frozen": Spec(11, 16, 67, magnitude=1e4, temperature=1.7, ignored=0.0, frozen=True),
    "sharp-frozen": Spec(11, 16, 67, magnitude=12.0, frozen=True),
    "far-teachers-frozen": Spec(11, 16, 67, teacher_gap=3.0, magnitude=2.0, frozen=True),
    # a chunk of the training step holds up to 128 tokens: several chunks, and a sequence longer than a chunk
    "chunks-frozen": Spec(170, 8, 41, sequences=9, frozen=True),
    "long-sequences-frozen": Spec(170, 8, 41, sequences=1, frozen=True),
    "strided-frozen": Spec(13, 16, 53, strided=True, frozen=True, temperature=2.0),
}
# half precision proves the casts; the logic is proven in float32, where bounds are tightest
_HALF = (
    "plain", "frozen", "past-edges", "long-rows-frozen", "wide", "everything", "sharp", "all-ignored",
    "everything-frozen", "sharp-frozen", "far-teachers-frozen",
)  # fmt: skip
_OPTIONS = ("alpha", "temperature", "offset", "bias", "softcap")


class LinearNceCases:
    """The `OpCases` (calm_fast.core.numerics) of linear_nce."""

    op = "linear_nce"
    impls = ("torch", "triton", "native")

    def cases(self) -> list[Case]:
        """Return every case in float32, and some in bfloat16 and float16."""
        found = [self.case(name, torch.float32) for name in _SPECS]
        return found + [self.case(name, dtype) for dtype in (torch.bfloat16, torch.float16) for name in _HALF]

    def case(self, name: str, dtype: torch.dtype, **changes: Any) -> Case:
        """Return the case `name` with fields of its Spec replaced by `changes`."""
        return Case(self.op, name, dtype, replace(_SPECS[name], **changes))

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Return the op's arguments and the upstream gradient dloss, from a fixed seed."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr(s).encode()))

        def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
            if s.strided and len(shape) == 2:
                # every other column of a transposed matrix
                return (torch.randn(2 * shape[1], shape[0], generator=g) * size).to(device, case.dtype).T[:, ::2]
            return (torch.randn(shape, generator=g) * size).to(device, case.dtype)

        student = normal(s.t, s.d, size=s.magnitude)
        nat, neg = (student + normal(s.t, s.d, size=s.magnitude * s.teacher_gap) for _ in range(2))
        targets = torch.randint(0, s.v, (s.t,), generator=g)
        targets[torch.rand(s.t, generator=g) < s.ignored] = -100
        seq_ids = torch.randint(0, s.sequences, (s.t,), generator=g)
        return {
            "student": student,
            "nat": nat,
            "neg": neg,
            "weight": normal(s.v, s.d, size=s.d**-0.5),
            "targets": targets.to(device),
            "seq_ids": seq_ids.to(device),
            **{name: getattr(s, name) for name in _OPTIONS},
            "bias": normal(s.v) if s.bias else None,
            "frozen": s.frozen,
            "dloss": torch.tensor(1.75, device=device),
        }

    def run(self, inputs: Inputs, impl: str) -> Values:
        """Return the op's loss and gradients."""
        from calm_fast._ops.linear_nce.api import linear_nce

        return _with_gradients(inputs, lambda tensors: linear_nce(**tensors, impl=impl))

    def eager(self, inputs: Inputs) -> Values:
        """Return the same values from log-softmax on full logits, as a user writes it, in the inputs' dtype."""
        return _with_gradients(inputs, lambda tensors: _eager_loss(**tensors))

    def exact(self, inputs: Inputs) -> Values:
        """Return masks of the exact elements: gradients of ignored tokens, and everything if no token is valid."""
        ignored = inputs["targets"] == -100
        found = {"dstudent": ignored.unsqueeze(-1).expand(inputs["student"].shape)}
        if bool(ignored.all()):
            found["loss"] = torch.ones((), dtype=torch.bool, device=ignored.device)
            if not inputs["frozen"]:
                found["dweight"] = torch.ones_like(inputs["weight"], dtype=torch.bool)
        return found

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """Return the rounding terms R and A of the loss and every gradient."""
        return _rounding(inputs)


def _with_gradients(inputs: Inputs, call: Callable[[dict[str, Any]], torch.Tensor]) -> Values:
    names = ["student"] if inputs["frozen"] else ["student", "weight"] + ["bias"] * (inputs["bias"] is not None)
    leaves = {name: inputs[name].detach().requires_grad_() for name in names}
    tensors = {name: value for name, value in inputs.items() if name not in ("frozen", "dloss")} | leaves
    loss = call(tensors)
    grads = torch.autograd.grad(loss, list(leaves.values()), inputs["dloss"].to(loss.dtype))
    return {"loss": loss.detach(), **{f"d{name}": g for name, g in zip(names, grads, strict=True)}}


def _eager_loss(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    alpha: float,
    temperature: float,
    offset: float,
    bias: torch.Tensor | None,
    softcap: float | None,
) -> torch.Tensor:
    def head(hidden: torch.Tensor) -> torch.Tensor:
        z = torch.nn.functional.linear(hidden, weight, bias)
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    z, valid = head(student), targets != -100
    count = int(valid.sum())
    if count == 0:
        return z.sum() * 0
    with torch.no_grad():
        z_nat, z_neg = head(nat), head(neg)
        log_nat, log_neg = z_nat.log_softmax(-1), z_neg.log_softmax(-1)
        kl = (log_neg.exp() * (log_neg - log_nat)).sum(-1)
        same = ((seq_ids[:, None] == seq_ids) & valid).to(kl.dtype)
        beta = torch.tanh((same * kl).sum(-1) / same.sum(-1).clamp(min=1))
        teacher = (z_nat / temperature).softmax(-1)
    soft = -(teacher * (z / temperature).log_softmax(-1)).sum(-1)
    hard = torch.nn.functional.cross_entropy(z, targets, ignore_index=-100, reduction="none")
    distillation = temperature**2 * (valid * (offset + beta) * soft).sum() / count
    return (1 - alpha) * hard.sum() / count + alpha * distillation


def _rounding(inputs: Inputs) -> dict[str, Rounding]:
    """Propagate errors from the three logit products to the loss and gradients, to first order.

    loss = sum_t hard_t (lse - z_target) + soft_t H_t,  soft_t = alpha tau^2 / count (offset + tanh KL_s)
    dz   = dloss (hard_t (p - 1_target) + soft_t / tau (p^tau - p_nat^tau))
    """
    valid, names = inputs["targets"] != -100, ("loss", "dstudent", "dweight", "dbias")
    tokens = {name: inputs[name][valid] for name in ("student", "nat", "neg", "targets", "seq_ids")}
    count, targets = tokens["targets"].numel(), tokens["targets"]
    if count == 0:
        return {name: Rounding(0.0, 0.0) for name in names}
    head = (inputs["weight"], inputs["bias"], inputs["softcap"])
    student, nat, neg = (logits(tokens[name], *head) for name in ("student", "nat", "neg"))
    tau = 1.0 / inputs["temperature"]
    c_hard, c_soft = (1 - inputs["alpha"]) / count, inputs["alpha"] / tau**2 / count
    weights, weights_error = _calibration(nat, neg, tokens["seq_ids"], inputs["offset"])

    log_p, log_p_error = student.log_softmax()
    log_q, log_q_error = student.log_softmax(tau)
    hard, hard_error = -pick(log_p, targets), log_p_error.map(lambda t: pick(t, targets))
    soft, soft_error = nat.mean(-log_q, log_q_error, tau)
    error = hard_error * c_hard + (soft_error * weights + weights_error * soft) * c_soft
    terms = c_hard * hard.abs() + (c_soft * weights * soft).abs()
    loss_error = error.add_roundings(terms).to_column().sum(-2, terms.unsqueeze(-1)).map(lambda t: t.squeeze(-1))

    dloss = inputs["dloss"]
    (p, p_error), (q, q_error), (r, r_error) = student.softmax(), student.softmax(tau), nat.softmax(tau)
    one = torch.zeros_like(p).scatter_(1, targets.unsqueeze(-1), 1.0)
    factor = dloss * c_soft * tau
    share, share_error = factor * weights.unsqueeze(-1), weights_error.to_column() * factor
    dz = dloss * c_hard * (p - one) + share * (q - r)
    dz_error = p_error * (dloss * c_hard) + (q_error + r_error) * share + share_error * (q - r)
    dz_error = dz_error.add_roundings(dloss * abs(c_hard) * (p + one) + share.abs() * (q + r))
    raw, raw_error = student.backward(dz, dz_error)
    bounds = gradients(raw, raw_error, tokens["student"], inputs["weight"])
    found = {name: bound.to_rounding() for name, bound in bounds.items()}

    def scatter(values: torch.Tensor | float) -> torch.Tensor:
        return torch.zeros_like(inputs["student"]).masked_scatter(valid.unsqueeze(-1), torch.as_tensor(values))

    dstudent = Rounding(scatter(found["dhidden"].inputs), scatter(found["dhidden"].accumulate))
    values = (loss_error.to_rounding(), dstudent, found["dweight"], found["dbias"])
    return dict(zip(names, values, strict=True))


def _calibration(nat: Logits, neg: Logits, seq_ids: torch.Tensor, offset: float) -> tuple[torch.Tensor, ErrorBound]:
    """Return offset + tanh KL_s of each token's sequence, (T,), and its bound."""
    (log_neg, neg_error), (log_nat, nat_error) = neg.log_softmax(), nat.log_softmax()
    kl, kl_error = neg.mean(log_neg - log_nat, (neg_error + nat_error).add_roundings(log_neg - log_nat, 1))
    # the mean difference of the logits, minus the difference of their maxima
    kl_error = kl_error.add_roundings(kl.abs() + (neg.z.amax(-1) - nat.z.amax(-1)).abs(), 2)
    same = (seq_ids[:, None] == seq_ids).double()
    same = same / same.sum(-1, keepdim=True)
    beta = torch.tanh(same @ kl)
    # (2, T, T): row i holds every token of i's sequence
    error = kl_error.to_column().map(lambda t: t.mT.expand(2, kl.numel(), -1)) * same
    error = error.sum(-1, same * kl) * (1 - beta.square())
    return offset + beta, error.add_roundings(torch.ones_like(beta)).add_roundings(offset + beta, 1)


CASES = LinearNceCases()
