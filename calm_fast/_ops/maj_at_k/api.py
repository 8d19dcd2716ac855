"""Accuracy of a majority or weighted vote as a function of the number of samples that vote."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import NamedTuple

import torch

from calm_fast._ops.maj_at_k.native import maj_at_k_native
from calm_fast._ops.maj_at_k.reference import maj_at_k_reference
from calm_fast._ops.maj_at_k.torch_impl import maj_at_k_torch
from calm_fast._ops.voting.decide import check_votes, choose
from calm_fast.core.checks import bad_type, bad_value, check_tensor
from calm_fast.core.dispatch import Decision, check_impl

_OP = "maj_at_k"
METHODS = ("exact", "resample")


class Curve(NamedTuple):
    """An accuracy at each k; both fields are (len(ks),) float64.

    accuracy: mean over questions. stderr: standard error of that mean over questions (sample standard deviation over
    the root of their number), NaN for a single question. Without questions both are 0.
    """

    accuracy: torch.Tensor
    stderr: torch.Tensor


def maj_at_k(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    ks: Sequence[int],
    valid: torch.Tensor | None = None,
    method: str = "exact",
    resamples: int = 1000,
    rule: str = "count",
    lam: float = 1.0,
    seed: int = 0,
    impl: str = "auto",
) -> Curve:
    """Return the accuracy of a vote of k samples, averaged over subsets of k of each question's valid samples.

        credit of a subset = 1 / (number of tied classes) if the gold answer's class is among the tied (see `vote`),
        else 0;   accuracy[k] = mean over questions of the mean over subsets of size k

    "exact" takes ALL subsets, in closed form (rule "count"). It has no sampling noise; at k = 1 it is the share of
    right samples. "resample" takes `resamples` random subsets without replacement, for every rule. They are a function
    of (seed, index of the question in the batch, index of the resample) alone: every implementation on every device
    draws the same ones.

    Args:
        answers: (Q, K) int64 >= 0, class ids within a question: equal ids are equal answers.
        correct: (Q,) int64, the class id of the gold answer; a question none of whose valid samples has it scores 0.
        scores: (Q, K) float32, float64, bfloat16 or float16, as in `vote`; required unless rule is "count".
        ks: sizes >= 1 in any order. A k beyond a question's valid samples uses them all; with none it scores 0.
        valid: (Q, K) bool; a sample with False does not vote. None = all vote.
        method: "exact" or "resample". resamples: subsets of each question, 1 to 2^32 - 1. seed: any 64-bit integer,
            signed or not; both only with "resample".
        rule: "count", "weighted" or "adaptive". lam: finite, the weight of a score in "adaptive". See `vote`.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        Curve(accuracy, stderr), (len(ks),) float64 each, in the order of ks. Nothing is differentiable.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic; implementations differ by float64 rounding. Source: NAT (arXiv 2312.12832) section 3.4, and for
    the subsets the pass@k estimator (arXiv 2107.03374).
    """
    return curve(
        credit_at(
            answers, correct, scores, ks=ks, valid=valid, method=method, resamples=resamples, rule=rule, lam=lam,
            seed=seed, impl=impl,
        )
    )  # fmt: skip


def vote_credit(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    rule: str = "count",
    lam: float = 1.0,
) -> torch.Tensor:
    """Return the credit (Q,) float64 of each question's vote over all its valid samples; arguments as in `maj_at_k`.

    The credit is 1 / (number of tied classes) if the gold answer's class is among the tied, else 0. Its mean is the
    accuracy that `maj_at_k` returns at any k that no question's valid samples exceed.
    """
    every = (max(1, answers.shape[1]),)  # a k that takes all samples draws nothing at random
    credit = credit_at(
        answers, correct, scores, ks=every, valid=valid, method="resample", resamples=1, rule=rule, lam=lam
    )
    return credit[:, 0]


def credit_at(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    ks: Sequence[int],
    valid: torch.Tensor | None = None,
    method: str = "exact",
    resamples: int = 1000,
    rule: str = "count",
    lam: float = 1.0,
    seed: int = 0,
    impl: str = "auto",
) -> torch.Tensor:
    """Return the credit (Q, len(ks)) float64 of each question at each k, of which `maj_at_k` is the mean."""
    decision = decide(
        answers, correct, scores, ks=ks, valid=valid, method=method, resamples=resamples, rule=rule, lam=lam,
        seed=seed, impl=impl,
    )  # fmt: skip
    scores = None if scores is None or rule == "count" else scores.detach()
    seed = (int(seed) + 2**63) % 2**64 - 2**63  # the same bits as a signed integer
    sizes = [int(k) for k in ks]
    arguments = (answers, correct, scores, valid, sizes, method, int(resamples), rule, float(lam), seed)
    if decision.impl == "native":
        return torch.ops.calm_fast.maj_at_k_native_fwd(*arguments)
    if decision.impl == "torch":
        return torch.ops.calm_fast.maj_at_k_torch_fwd(*arguments)
    return torch.ops.calm_fast.maj_at_k_reference_fwd(*arguments)


def curve(credit: torch.Tensor) -> Curve:
    """Return mean and standard error over the questions of credit (Q, len(ks)) float64."""
    questions = credit.shape[0]
    if questions == 0:
        return Curve(credit.new_zeros(credit.shape[1]), credit.new_zeros(credit.shape[1]))
    accuracy = credit.sum(0) / questions
    variance = (credit - accuracy).square().sum(0) / (questions - 1)  # 0 / 0, NaN, for one question
    return Curve(accuracy, (variance / questions).sqrt())


def decide(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    ks: Sequence[int],
    valid: torch.Tensor | None = None,
    method: str = "exact",
    resamples: int = 1000,
    rule: str = "count",
    lam: float = 1.0,
    seed: int = 0,
    impl: str = "auto",
) -> Decision:
    """Return the implementation that the same call of `maj_at_k` runs, and why; raise what that call would raise."""
    check_impl(_OP, impl)
    check_votes(_OP, answers, scores, valid, rule, lam)
    check_tensor(_OP, "correct", correct, "(Q,)", (torch.int64,), answers.device)
    if correct.shape[0] != answers.shape[0]:
        raise bad_value(_OP, "correct", f"of shape (Q,) = ({answers.shape[0]},)", f"shape {tuple(correct.shape)}")
    check_sizes(_OP, ks)
    _check_method(method, resamples, rule, seed)
    return choose(
        _OP, impl, answers.device, function=f"{_OP}_{method}",
        no_triton="a shuffle moves single samples, no tiles of a matrix",
        cpu="shuffles and sums in compiled loops", gpu="one launch, a thread a resample",
    )  # fmt: skip


def check_sizes(op: str, ks: Sequence[int]) -> None:
    """Check that `ks` holds integers >= 1, at least one."""
    if isinstance(ks, (str, bytes, torch.Tensor)) or not isinstance(ks, Sequence):
        raise bad_type(op, "ks", "a sequence of integers", ks)
    if not len(ks):
        raise bad_value(op, "ks", "at least one size", "none")
    for k in ks:
        _check_integer(op, "ks", k, "integers", 1, 2**63 - 1)


def _check_method(method: str, resamples: int, rule: str, seed: int) -> None:
    if method not in METHODS:
        raise bad_value(_OP, "method", f"one of {', '.join(map(repr, METHODS))}", repr(method))
    if method == "exact" and rule != "count":
        raise bad_value(_OP, "rule", "'count' with method='exact'; use method='resample' for the others", repr(rule))
    _check_integer(_OP, "resamples", resamples, "an integer", 1, 2**32 - 1)
    _check_integer(_OP, "seed", seed, "an integer", -(2**63), 2**64 - 1)


def _check_integer(op: str, name: str, value: int, what: str, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise bad_type(op, name, what, value)
    if not least <= value <= most:
        raise bad_value(op, name, f"{what} from {least} to {most}", str(value))


# ---- the registered ops: what torch.compile, export and opcheck see --------------------------------------------------

# all three are registered: the torch engine reads sizes out of the data and the reference reads every value, and
# neither can be traced
_ARGUMENTS = (
    "(Tensor answers, Tensor correct, Tensor? scores, Tensor? valid, int[] ks, str method, int resamples, str rule,"
    " float lam, int seed) -> Tensor credit"
)
_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define(f"maj_at_k_native_fwd{_ARGUMENTS}")
_lib.define(f"maj_at_k_torch_fwd{_ARGUMENTS}")
_lib.define(f"maj_at_k_reference_fwd{_ARGUMENTS}")


def _fake(
    answers: torch.Tensor,
    correct: torch.Tensor,
    scores: torch.Tensor | None,
    valid: torch.Tensor | None,
    ks: list[int],
    *options: object,
) -> torch.Tensor:
    return answers.new_empty((answers.shape[0], len(ks)), dtype=torch.float64)


_lib.impl("maj_at_k_native_fwd", maj_at_k_native, "CompositeExplicitAutograd")
_lib.impl("maj_at_k_torch_fwd", maj_at_k_torch, "CompositeExplicitAutograd")
_lib.impl("maj_at_k_reference_fwd", maj_at_k_reference, "CompositeExplicitAutograd")
torch.library.register_fake("calm_fast::maj_at_k_native_fwd", _fake, lib=_lib)
torch.library.register_fake("calm_fast::maj_at_k_torch_fwd", _fake, lib=_lib)
torch.library.register_fake("calm_fast::maj_at_k_reference_fwd", _fake, lib=_lib)
