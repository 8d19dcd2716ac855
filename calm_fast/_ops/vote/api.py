"""Majority, weighted and adaptive votes over the sampled answers of many questions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast._ops.voting.decide import check_votes, choose
from calm_fast.core.dispatch import Decision, check_impl

_OP = "vote"


class Vote(NamedTuple):
    """What `vote` returns; (Q,) each.

    winner int64: class id, -1 without a valid sample. weight float64: of the winner. total float64: of all valid
    samples. margin float64: see `vote`. ties int64: how many classes are tied at the top, 0 without a valid sample.
    """

    winner: torch.Tensor
    weight: torch.Tensor
    total: torch.Tensor
    margin: torch.Tensor
    ties: torch.Tensor


def vote(
    answers: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    rule: str = "count",
    lam: float = 1.0,
    impl: str = "auto",
) -> Vote:
    """The answer that the samples of each question choose.

        W_c = sum of w_i over the valid samples i of class c;   w_i = 1 ("count"), s_i ("weighted"), 1 + lam s_i
        ("adaptive");   top = max_c W_c;   tied: top - W_c <= 1e-9;   winner = the tied class that appears first

    margin is how far the winner is ahead: top minus the next class's weight, the top weight if there is no other
    class, and 0 if the vote is tied. An accuracy gives a tied vote 1 / ties credit if the right class is tied.

    Args:
        answers: (Q, K) int64 >= 0, class ids within a question: equal id = equal answer.
        scores: (Q, K) float32, float64, bfloat16 or float16, finite; NaN = not scored: such a sample takes the mean of
            the question's other valid scores, 1 if there are none. Needed unless rule is "count", which ignores them.
        valid: (Q, K) bool; False = the sample does not vote, and its answer and score may be anything. None = all vote.
        rule: "count", "weighted" or "adaptive". lam: finite, the weight of a score in "adaptive".
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        Vote(winner, weight, total, margin, ties). Nothing is differentiable.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came. Negative
            answers and infinite scores of valid samples are found on a CPU, on a GPU within `validate_values()`.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic: weights are summed in float64 in the order of the samples, so every implementation returns the same
    bits on every device. Source: NAT (arXiv 2312.12832) section 3.4.
    """
    decision = decide(answers, scores, valid=valid, rule=rule, lam=lam, impl=impl)
    scores = None if scores is None or rule == "count" else scores.detach()
    return Vote(*torch.ops.calm_fast.vote_fwd(answers, scores, valid, rule, float(lam), decision.impl))


def decide(
    answers: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    rule: str = "count",
    lam: float = 1.0,
    impl: str = "auto",
) -> Decision:
    """Which implementation the same call of `vote` runs, and why; raises what that call would raise.

    auto: the compiled library where it runs, torch elsewhere.
    """
    check_impl(_OP, impl)
    check_votes(_OP, answers, scores, valid, rule, lam)
    return choose(
        _OP, impl, answers.device, function=_OP,
        no_triton="a vote is a few integers a question, no tile of a matrix",
        cpu="every question is read once, by one thread", gpu="one launch, a warp or a block a question",
    )  # fmt: skip


# ---- the registered op: what torch.compile, export and opcheck see ---------------------------------------------------

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define(
    "vote_fwd(Tensor answers, Tensor? scores, Tensor? valid, str rule, float lam, str impl)"
    " -> (Tensor winner, Tensor weight, Tensor total, Tensor margin, Tensor ties)"
)


@torch.library.impl(_lib, "vote_fwd", "CompositeExplicitAutograd")
def _fwd(answers, scores, valid, rule, lam, impl):
    if impl == "reference":
        from calm_fast._ops.vote.reference import vote_reference

        return vote_reference(answers, scores, valid, rule, lam)
    if impl == "native":
        return _vote_native_fwd(answers, scores, valid, rule, lam)
    from calm_fast._ops.vote.torch_impl import vote_torch

    return vote_torch(answers, scores, valid, rule, lam)


def _vote_native_fwd(answers, scores, valid, rule, lam, lane=-1):
    """`lane`: see csrc/common/lanes.h; every lane returns the same bits."""
    if scores is not None:
        scores = (scores if scores.dtype == torch.float64 else scores.float()).contiguous()  # exact
    valid = None if valid is None else valid.contiguous()
    return torch.ops.calm_fast._vote_native_fwd(answers.contiguous(), scores, valid, rule == "adaptive", lam, lane)


@torch.library.register_fake("calm_fast::vote_fwd", lib=_lib)
def _fwd_fake(answers, scores, valid, rule, lam, impl):
    questions = answers.shape[0]
    weight, total, margin = (answers.new_empty(questions, dtype=torch.float64) for _ in range(3))
    return answers.new_empty(questions), weight, total, margin, answers.new_empty(questions)
