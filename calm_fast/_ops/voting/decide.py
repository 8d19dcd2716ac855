"""Argument checks and the choice of an implementation, shared by vote and maj_at_k."""

from __future__ import annotations

import math

import torch

from calm_fast.core import native_library
from calm_fast.core.checks import bad_value, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import Decision, refuse

RULES = ("count", "weighted", "adaptive")
SCORE_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_votes(
    op: str,
    answers: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    rule: str,
    lam: float,
) -> None:
    """Check answers (Q, K) int64, scores (Q, K) float or None, valid (Q, K) bool or None, rule and lam.

    A sample that is not valid may hold anything. Values are read as `calm_fast.validate_values` says.

    Raises:
        TypeError, ValueError: an argument is wrong, a voting sample's answer is negative, its score infinite or its
            weight negative, or the weights of a question overflow float64.
    """
    if rule not in RULES:
        raise bad_value(op, "rule", f"one of {', '.join(map(repr, RULES))}", repr(rule))
    check_finite_number(op, "lam", lam)
    check_tensor(op, "answers", answers, "(Q, K)", (torch.int64,))
    if scores is None:
        if rule != "count":
            raise bad_value(op, "scores", f"given with rule={rule!r}", "None")
    else:
        check_tensor(op, "scores", scores, "(Q, K)", SCORE_DTYPES, answers.device)
        check_same_shape(op, "scores", scores, answers)
    if valid is not None:
        check_tensor(op, "valid", valid, "(Q, K)", (torch.bool,), answers.device)
        check_same_shape(op, "valid", valid, answers)
    if not values_checked(answers) or not answers.numel():
        return
    lowest = int(answers.min())
    if lowest < 0 and valid is not None:  # samples that do not vote may hold anything
        lowest = int(answers.masked_fill(~valid, 0).min())
    if lowest < 0:
        raise bad_value(op, "answers", "class ids >= 0 (mark samples that do not vote in `valid`)", f"{lowest}")
    if scores is None or rule == "count" or not values_checked(scores):
        return
    _check_weights(op, scores, valid, rule, float(lam))


def _check_weights(op: str, scores: torch.Tensor, valid: torch.Tensor | None, rule: str, lam: float) -> None:
    """Raise ValueError if a voting sample's score is infinite, its weight negative, or a sum of weights too large."""
    low, high = (bound.item() for bound in scores.aminmax())
    if _fits(low, high, scores.shape[1], rule, lam):  # one pass over the scores, NaN included
        return
    silent = scores.isnan() if valid is None else scores.isnan() | ~valid
    scores = scores.masked_fill(silent, 0.0)
    infinite = scores.isinf()
    if infinite.any():
        at = tuple(infinite.nonzero()[0].tolist())
        raise bad_value(op, "scores", "finite, or NaN for a sample without a score", f"{scores[at]} at {at}")
    weights = scores.double() if rule == "weighted" else 1.0 + lam * scores.double()
    negative = weights < 0
    if negative.any():
        at = tuple(negative.nonzero()[0].tolist())
        weight = "scores >= 0" if rule == "weighted" else f"such that 1 + lam * score >= 0 with lam {lam:g}"
        what = (
            f"{weight}, because a vote adds them up (log-probabilities: (scores - scores.amax(1, keepdim=True)).exp())"
        )
        raise bad_value(op, "scores", what, f"{scores[at].item():g} at {at}")
    too_large = weights.masked_fill(silent, float(weights.max())).sum(1).isinf()
    if too_large.any():
        question = int(too_large.nonzero()[0])
        raise bad_value(op, "scores", "small enough to be summed in float64 (divide them)", f"question {question}")


def _fits(low: float, high: float, count: int, rule: str, lam: float) -> bool:
    """Return True if scores between two bounds have weights >= 0 whose sum is finite; False for NaN."""
    if rule == "adaptive":
        low, high = sorted((1.0 + lam * low, 1.0 + lam * high))
    return low >= 0 and math.isfinite(high * count)


def check_same_shape(op: str, name: str, tensor: torch.Tensor, answers: torch.Tensor) -> None:
    """Raise ValueError unless `tensor` has the (Q, K) of `answers`."""
    if tensor.shape[0] != answers.shape[0] or tensor.shape[1] != answers.shape[1]:
        expected = f"of answers' shape {tuple(answers.shape)}"
        raise bad_value(op, name, expected, f"shape {tuple(tensor.shape)}")


def choose(op: str, impl: str, device: torch.device, *, function: str, no_triton: str, cpu: str, gpu: str) -> Decision:
    """Choose the compiled library where it runs and torch elsewhere; honour or refuse an explicit `impl`.

    Args:
        op: its name. impl: one of IMPLS. device: of the answers.
        function: the kernel that the library must have. no_triton: why there is no Triton kernel.
        cpu, gpu: the reason to give where native is chosen on that device.
    Raises:
        RuntimeError: an explicit `impl` cannot run here.
    """
    if impl in ("reference", "torch"):
        return Decision(op, impl, "asked for")
    if impl == "triton":
        raise refuse(op, impl, f"there is no Triton kernel: {no_triton}")
    obstacle = native_library.obstacle(function, device.type)
    if impl == "native":
        if obstacle:
            raise refuse(op, impl, obstacle)
        return Decision(op, impl, "asked for")
    if obstacle:
        return Decision(op, "torch", obstacle)
    return Decision(op, "native", f"{gpu}; not measured on a GPU yet" if device.type == "cuda" else cpu)
