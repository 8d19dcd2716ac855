"""Run one small call of every kernel under compute-sanitizer: each op forward and backward, in every form.

Shapes are deliberately odd: partial tiles on every axis, a head dim that is not a power of two, empty intervals,
ignored tokens, vocabularies and keys split over programs. Each result is also compared with float64, so that a silently
wrong result does not pass for a clean run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from calm_fast import ops
from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast._ops.linear_logprob.reference import linear_logprob_reference
from calm_fast._ops.linear_nce.reference import linear_nce_reference
from calm_fast.core import native_library

LIMIT = 1e-2  # largest relative error of a correct float16 result
Results = list[torch.Tensor]
Call = Callable[[torch.device, torch.dtype], tuple[Results, Results]]  # found, expected
_IGNORED = -100


def _draw(device: torch.device, dtype: torch.dtype, seed: int = 0) -> Callable[..., torch.Tensor]:
    """Return draw(*shape, size=1.0), which draws normal numbers, the same on every device."""
    g = torch.Generator().manual_seed(seed)
    return lambda *shape, size=1.0: (torch.randn(shape, generator=g) * size).to(device, dtype)


def _both(
    found: Callable[..., Sequence[torch.Tensor]],
    truth: Callable[..., Sequence[torch.Tensor]],
    leaves: Sequence[torch.Tensor],
    backward: bool,
) -> tuple[Results, Results]:
    """Return results and gradients of both functions on `leaves`, of `truth` in float64, with one upstream gradient."""
    everything = []
    upstream: Results = []
    for function, given in ((found, leaves), (truth, [t.double() for t in leaves])):
        inputs = [t.detach().requires_grad_(backward) for t in given]
        results = list(function(*inputs))
        if backward:
            smooth = [t for t in results if t.is_floating_point()]
            if not upstream:
                draw = _draw(results[0].device, torch.float32, seed=1)
                upstream = [draw(*t.shape) for t in smooth]
            results += torch.autograd.grad(
                smooth, inputs, [g.to(t.dtype) for g, t in zip(upstream, smooth, strict=True)]
            )
        everything.append([t.detach() for t in results])
    return everything[0], everything[1]


def _cross_attention(
    b: int, m: int, n: int, h: int, kv: int, d: int, causal: bool, backward: bool, device: torch.device,
    dtype: torch.dtype, compiled: bool = False,
) -> tuple[Results, Results]:  # fmt: skip
    draw = _draw(device, dtype)
    leaves = draw(b, m, h, d), draw(b, n, kv, d), draw(b, n, kv, d)
    lo = hi = None
    if not causal and m > 1:
        g = torch.Generator().manual_seed(2)
        lo, hi = (t.int().to(device) for t in torch.randint(0, n + 1, (2, b, m), generator=g).sort(0).values)
        hi = torch.where(torch.arange(m, device=device) % 5 == 0, lo, hi)  # some rows see no key
    impl = _compiled("cross_attention", device) if compiled else "triton"
    return _both(
        lambda q, k, v: [ops.cross_attention(q, k, v, lo=lo, hi=hi, causal=causal, impl=impl)],
        lambda q, k, v: cross_attention_reference(q, k, v, lo, hi, causal)[:1],
        leaves,
        backward,
    )


def _dual_lora(
    t: int, r_pos: int, r_neg: int, activation: str, backward: bool, device: torch.device, dtype: torch.dtype,
    m: int = 35, compiled: bool = False,
) -> tuple[Results, Results]:  # fmt: skip
    d_in, d_out, g, draw = 40, 83, 16, _draw(device, dtype)
    impl = _compiled("dual_lora", device) if compiled else "triton"

    def weight(rows: int, columns: int) -> torch.Tensor:
        return draw(rows, columns, size=columns**-0.5)

    leaves = [draw(t, d_in), draw(t, d_out), weight(r_pos, d_in), weight(d_out, r_pos), weight(r_neg, d_in)]
    leaves += [weight(d_out, r_neg), draw(g, d_in, size=(d_in * g) ** -0.5), weight(g, d_out)]
    leaves += [weight(m, d_out), weight(d_out, m)]
    return _both(
        lambda x, y, ap, bp, an, bn, wq, wk, *value: [
            ops.dual_lora(x, y, ap, bp, an, bn, wq, wk, value, scaling=1.5, activation=activation, impl=impl)
        ],
        lambda x, y, ap, bp, an, bn, wq, wk, *value: [
            dual_lora_reference(x, y, ap, bp, an, bn, wq, wk, value, (1.5, 1.5), activation)
        ],
        leaves,
        backward,
    )


def _vocabulary(device: torch.device) -> int:
    """Return a vocabulary larger than one program sweeps; the interpreter's programs sweep few columns."""
    return 2500 if device.type == "cuda" else 150


def _tokens(t: int, v: int, device: torch.device) -> torch.Tensor:
    targets = torch.randint(0, v, (t,), generator=torch.Generator().manual_seed(3))
    targets[::4] = _IGNORED
    return targets.to(device)


def _linear_nce(t: int, full: bool, device: torch.device, dtype: torch.dtype) -> tuple[Results, Results]:
    d, v, draw = 40, _vocabulary(device), _draw(device, dtype)
    nat, neg = draw(t, d), draw(t, d)
    leaves = [draw(t, d), draw(v, d, size=d**-0.5)] + ([draw(v)] if full else [])
    targets, seq_ids = _tokens(t, v, device), torch.arange(t, device=device) // 5
    temperature, softcap = (2.0, 5.0) if full else (1.0, None)

    def found(student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Results:
        options: dict[str, Any] = {"temperature": temperature, "bias": bias, "softcap": softcap, "impl": "triton"}
        return [ops.linear_nce(student, nat, neg, weight, targets, seq_ids, **options)]

    def truth(student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Results:
        return [
            linear_nce_reference(
                student,
                nat.double(),
                neg.double(),
                weight,
                targets,
                seq_ids,
                0.5,
                temperature,
                0.5,
                bias,
                softcap,
                _IGNORED,
            )
        ]

    return _both(found, truth, leaves, True)


def _linear_nce_step(
    t: int, full: bool, whole: bool, device: torch.device, dtype: torch.dtype
) -> tuple[Results, Results]:
    """Compute loss and gradient in one pass, in chunks of a few tokens; `whole` forces one of the two forms."""
    from calm_fast._ops.linear_nce.triton_impl import linear_nce_triton_step

    d, v, draw = 40, _vocabulary(device), _draw(device, dtype)
    student, nat, neg = draw(t, d), draw(t, d), draw(t, d)
    weight, bias = draw(v, d, size=d**-0.5), draw(v) if full else None
    targets, seq_ids = _tokens(t, v, device), torch.arange(t, device=device) // 5
    temperature, softcap = (2.0, 5.0) if full else (1.0, None)
    found = linear_nce_triton_step(
        student, nat, neg, weight, bias, targets, seq_ids, 0.5, temperature, 0.5, softcap, _IGNORED, rows=7, whole=whole
    )

    student, nat, neg, weight = (x.double() for x in (student, nat, neg, weight))
    student.requires_grad_()
    bias = None if bias is None else bias.double()
    loss = linear_nce_reference(
        student, nat, neg, weight, targets, seq_ids, 0.5, temperature, 0.5, bias, softcap, _IGNORED
    )
    return list(found), [loss.detach(), *torch.autograd.grad(loss, student)]


def _linear_logprob(t: int, full: bool, device: torch.device, dtype: torch.dtype) -> tuple[Results, Results]:
    d, v, draw = 40, _vocabulary(device), _draw(device, dtype)
    leaves = [draw(t, d), draw(v, d, size=d**-0.5)] + ([draw(v)] if full else [])
    targets = _tokens(t, v, device)
    temperature, softcap = (2.0, 5.0) if full else (1.0, None)

    def found(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        options: dict[str, Any] = {"temperature": temperature, "bias": bias, "softcap": softcap, "impl": "triton"}
        results = ops.linear_logprob(hidden, weight, targets, return_entropy=full, return_rank=full, **options)
        return [results] if isinstance(results, torch.Tensor) else results

    def truth(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> Sequence[torch.Tensor]:
        results = linear_logprob_reference(hidden, weight, targets, bias, temperature, softcap, _IGNORED)
        return results[:3] if full else results[:1]

    return _both(found, truth, leaves, True)


def _compiled(op: str, device: torch.device) -> str:
    """Return "native", or "torch" with a warning on a GPU if the library cannot run there."""
    why = native_library.obstacle(op, device.type)
    if why and device.type == "cuda":
        print(f"{op}: torch's ops run instead of the library's kernel: {why}", file=sys.stderr)
    return "torch" if why else "native"


def _votes(q: int, k: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return answers, scores with NaN and valid, of odd sizes; one question has no valid sample."""
    g = torch.Generator().manual_seed(3)
    answers, scores = torch.randint(0, 9, (q, k), generator=g), torch.rand(q, k, generator=g).to(dtype)
    scores[torch.rand(q, k, generator=g) < 0.2] = float("nan")
    valid = torch.rand(q, k, generator=g) < 0.8
    valid[1] = False
    return answers.to(device), scores.to(device), valid.to(device)


def _vote(q: int, k: int, rule: str, device: torch.device, dtype: torch.dtype) -> tuple[Results, Results]:
    answers, scores, valid = _votes(q, k, device, dtype)
    impls = (_compiled("vote", device), "reference")
    found, expected = (ops.vote(answers, scores, valid=valid, rule=rule, lam=0.5, impl=impl) for impl in impls)
    return list(found), list(expected)


def _maj_at_k(
    q: int, k: int, rule: str, resamples: int, device: torch.device, dtype: torch.dtype
) -> tuple[Results, Results]:
    answers, scores, valid = _votes(q, k, device, dtype)
    options: dict[str, Any] = {
        "ks": (1, 2, k // 2, k),
        "valid": valid,
        "method": "resample",
        "resamples": resamples,
        "rule": rule,
        "lam": 0.5,
    }
    impls = (_compiled("maj_at_k", device), "reference")
    found, expected = (ops.maj_at_k(answers, answers[:, 0], scores, impl=impl, **options) for impl in impls)
    return list(found), list(expected)


CALLS: dict[str, Call] = {
    # more queries than the packed tiles of the decode kernel take
    "cross_attention: causal, grouped heads": partial(_cross_attention, 1, 131, 131, 4, 2, 64, True, True),
    "cross_attention: intervals, head dim 40": partial(_cross_attention, 2, 35, 81, 2, 2, 40, False, True),
    "cross_attention: decode, keys split over programs": partial(_cross_attention, 2, 1, 1100, 4, 2, 64, False, False),
    "cross_attention: compiled, eight rows, splits": partial(
        _cross_attention, 2, 3, 300, 4, 2, 40, False, False, compiled=True
    ),
    "cross_attention: compiled, one row": partial(_cross_attention, 2, 1, 77, 2, 2, 128, True, False, compiled=True),
    "dual_lora: paper": partial(_dual_lora, 37, 5, 3, "none", True),
    "dual_lora: paper, large rank": partial(_dual_lora, 37, 70, 67, "none", True),
    "dual_lora: released": partial(_dual_lora, 37, 5, 3, "gelu", True),
    "dual_lora: paper, one token": partial(_dual_lora, 1, 8, 8, "none", False),
    "dual_lora: released, one token": partial(_dual_lora, 1, 8, 8, "gelu", False),
    "dual_lora: compiled, paper": partial(_dual_lora, 11, 5, 2, "none", False, compiled=True),
    "dual_lora: compiled, released": partial(_dual_lora, 9, 8, 8, "gelu", False, m=40, compiled=True),
    "dual_lora: compiled, released, wide bottleneck": partial(_dual_lora, 9, 5, 2, "gelu", False, m=530, compiled=True),
    "linear_nce: plain": partial(_linear_nce, 21, False),
    "linear_nce: temperature, bias, softcap": partial(_linear_nce, 21, True),
    "linear_nce: one pass, whole sequences": partial(_linear_nce_step, 21, False, True),
    "linear_nce: one pass, any tokens": partial(_linear_nce_step, 21, False, False),
    "linear_nce: one pass, whole sequences, temperature, bias, softcap": partial(_linear_nce_step, 21, True, True),
    "linear_nce: one pass, any tokens, temperature, bias, softcap": partial(_linear_nce_step, 21, True, False),
    "linear_logprob: plain": partial(_linear_logprob, 21, False),
    "linear_logprob: entropy, rank, temperature, bias, softcap": partial(_linear_logprob, 21, True),
    "vote: count, a warp a question": partial(_vote, 7, 37, "count"),
    "vote: weighted, a block a question": partial(_vote, 3, 301, "weighted"),
    "vote: weighted, more samples than shared memory holds": partial(_vote, 2, 4500, "weighted"),
    "maj_at_k: count": partial(_maj_at_k, 7, 13, "count", 3),
    "maj_at_k: adaptive": partial(_maj_at_k, 5, 37, "adaptive", 3),
    "maj_at_k: several blocks a question": partial(_maj_at_k, 2, 13, "weighted", 300),
    "maj_at_k: more samples than shared memory holds": partial(_maj_at_k, 2, 800, "count", 3),
}


def run_call(name: str, device: torch.device, dtype: torch.dtype = torch.float16) -> float:
    """Run one entry of CALLS and return the largest relative error over its results and gradients."""
    found, expected = CALLS[name](device, dtype)
    pairs = zip(found, expected, strict=True)
    errors = [float((a.double() - t.double()).norm() / t.double().norm()) for a, t in pairs]
    return max(errors) if all(e == e for e in errors) else float("inf")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls of `--op` (default: all) on the GPU; return 1 if a relative error reaches LIMIT."""
    summary = "Run one small call of every kernel under compute-sanitizer."
    p = argparse.ArgumentParser(prog="python -m calm_fast.benchmarks.sanitize", description=summary)
    p.add_argument("--op", action="append", choices=ops.OPS, help="an op; repeat for several (default: all)")
    args = p.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"sanitize: torch {torch.__version__} sees no GPU", file=sys.stderr)
        return 2
    worst = 0.0
    for name in CALLS:
        if args.op and name.split(":")[0] not in args.op:
            continue
        error = run_call(name, torch.device("cuda"))
        print(f"{name}: relative error {error:.1e}")
        worst = max(worst, error)
    torch.cuda.synchronize()
    return 0 if worst < LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
