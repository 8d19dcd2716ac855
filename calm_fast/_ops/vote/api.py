"""Majority, weighted and adaptive votes over the sampled answers of many questions."""

from __future__ import annotations

from typing import NamedTuple

import torch

from calm_fast._ops.vote.native import vote_native
from calm_fast._ops.vote.reference import VoteTensors, vote_reference
from calm_fast._ops.vote.torch_impl import vote_torch
from calm_fast._ops.voting.decide import check_votes, choose
from calm_fast.core.checks import readable
from calm_fast.core.dispatch import Decision, check_impl

_OP = "vote"


class Vote(NamedTuple):
    """The votes of Q questions; every field is (Q,).

    winner int64: class id, -1 without a valid sample. weight float64: of the winner. total float64: of all valid
    samples. margin float64: lead of the winner, see `vote`. ties int64: number of classes tied at the top, 0 without a
    valid sample.
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
    """Return the answer that the samples of each question choose.

        W_c = sum of w_i over the valid samples i of class c;   w_i = 1 ("count"), s_i ("weighted"), 1 + lam s_i
        ("adaptive");   top = max_c W_c;   tied: W_c >= (1 - 1e-9) top;   winner = the tied class that is first

    The margin is the winner's lead: top minus the next class's weight, the top weight if there is no other class, and 0
    if the vote is tied. An accuracy gives a tied vote 1 / ties credit if the gold answer's class is among the tied.

    Args:
        answers: (Q, K) int64 >= 0, class ids within a question: equal ids are equal answers.
        scores: (Q, K) float32, float64, bfloat16 or float16, finite, and no weight w_i below 0. A log-probability is no
            weight: give (scores - scores.amax(1, keepdim=True)).exp(). A sample with NaN has no score and takes the
            mean of the question's other valid scores, 1 if there are none. Required unless rule is "count", which
            ignores them.
        valid: (Q, K) bool; a sample with False does not vote, and its answer and score may be anything. None = all
            vote.
        rule: "count", "weighted" or "adaptive". lam: finite, the weight of a score in "adaptive".
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        Vote(winner, weight, total, margin, ties). Nothing is differentiable.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came. Negative
            answers, infinite scores, negative weights and weights whose sum overflows float64, of valid samples, are
            found on a CPU, on a GPU within `validate_values()`.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic: weights are summed in float64 in sample order, so every implementation returns the same bits on every
    device. Source: NAT (arXiv 2312.12832) section 3.4.
    """
    decision = decide(answers, scores, valid=valid, rule=rule, lam=lam, impl=impl)
    scores = None if scores is None or rule == "count" else scores.detach()
    if decision.impl == "native" and readable(answers):  # the registered op costs as much as a small vote
        return Vote(*vote_native(answers, scores, valid, rule, float(lam)))
    if decision.impl == "native":
        return Vote(*torch.ops.calm_fast.vote_native_fwd(answers, scores, valid, rule, float(lam)))
    if decision.impl == "torch":
        return Vote(*torch.ops.calm_fast.vote_torch_fwd(answers, scores, valid, rule, float(lam)))
    return Vote(*torch.ops.calm_fast.vote_reference_fwd(answers, scores, valid, rule, float(lam)))


def decide(
    answers: torch.Tensor,
    scores: torch.Tensor | None = None,
    *,
    valid: torch.Tensor | None = None,
    rule: str = "count",
    lam: float = 1.0,
    impl: str = "auto",
) -> Decision:
    """Return the implementation that the same call of `vote` runs, and why; raise what that call would raise.

    auto: the compiled library where it runs, torch elsewhere.
    """
    check_impl(_OP, impl)
    check_votes(_OP, answers, scores, valid, rule, lam)
    return choose(
        _OP, impl, answers.device, function=_OP,
        no_triton="a vote is a few integers a question, no tile of a matrix",
        cpu="every question is read once, by one thread", gpu="one launch, a warp or a block a question",
    )  # fmt: skip


# ---- the registered ops: what torch.compile, export and opcheck see --------------------------------------------------

# all three are registered: the torch engine reads the largest class id and the reference reads every value, and neither
# can be traced
_ARGUMENTS = (
    "(Tensor answers, Tensor? scores, Tensor? valid, str rule, float lam)"
    " -> (Tensor winner, Tensor weight, Tensor total, Tensor margin, Tensor ties)"
)
_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define(f"vote_native_fwd{_ARGUMENTS}")
_lib.define(f"vote_torch_fwd{_ARGUMENTS}")
_lib.define(f"vote_reference_fwd{_ARGUMENTS}")


def _fake(
    answers: torch.Tensor, scores: torch.Tensor | None, valid: torch.Tensor | None, rule: str, lam: float
) -> VoteTensors:
    questions = answers.shape[0]
    weight, total, margin = (answers.new_empty(questions, dtype=torch.float64) for _ in range(3))
    return answers.new_empty(questions), weight, total, margin, answers.new_empty(questions)


_lib.impl("vote_native_fwd", vote_native, "CompositeExplicitAutograd")
_lib.impl("vote_torch_fwd", vote_torch, "CompositeExplicitAutograd")
_lib.impl("vote_reference_fwd", vote_reference, "CompositeExplicitAutograd")
torch.library.register_fake("calm_fast::vote_native_fwd", _fake, lib=_lib)
torch.library.register_fake("calm_fast::vote_torch_fwd", _fake, lib=_lib)
torch.library.register_fake("calm_fast::vote_reference_fwd", _fake, lib=_lib)
