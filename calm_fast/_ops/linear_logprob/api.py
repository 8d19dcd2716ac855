"""Log-probabilities of target tokens from hidden states and the LM head, without logits in memory."""

from __future__ import annotations

import torch

from calm_fast._ops.linear_logprob import native
from calm_fast._ops.linear_logprob.reference import linear_logprob_reference
from calm_fast._ops.linear_logprob.registered import forward_op
from calm_fast._ops.vocabulary.decide import check_head, check_numbers, check_targets, choose
from calm_fast.core.checks import check_bool
from calm_fast.core.dispatch import Decision, autograd_records, check_impl

_OP = "linear_logprob"


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_rank: bool = False,
    impl: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    """Return log softmax(hidden weight^T)[target] of each token.

        p_t = softmax(z_t / temperature),  z = softcap(hidden weight^T + bias);  logprob_t = log p_t[target_t]
        entropy_t = -sum_v p_t[v] log p_t[v];   rank_t = 1 + #{v : z_t[v] > z_t[target_t]}

    The vocabulary is swept in blocks: forward and backward keep a few numbers per token and never (T, V) logits. (On a
    CPU up to 2^21 logits may be one block: the forward pass of few tokens then holds all of them, 8 MiB in float32, and
    with impl="native" keeps them for a backward pass.)

    Args:
        hidden: (T, d) float32, bfloat16 or float16 (float64 with impl "reference" or "torch").
        weight: (V, d), hidden's dtype and device.
        targets: (T,) int64, 0 <= target < V or ignore_index.
        bias: (V,) in weight's dtype, or None. -inf rules a token out: it adds 0 to the entropy and gets no gradient.
            (With a softcap its logit is -softcap instead.)
        temperature: > 0; divides the logits.
        softcap: > 0; logits become softcap * tanh(logits / softcap) before the temperature applies. None = no cap.
        ignore_index: the target that marks an ignored token: its results are 0, it gets and gives no gradient.
        return_entropy: return the entropy of p too, in nats.
        return_rank: return the rank of the target too; 1 = no token is more likely. Ties count in favour of the
            target. Logits that differ by less than their rounding may be counted either way.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        logprob (T,) float32 (float64 for float64 input), or a tuple (logprob[, entropy (T,)][, rank (T,) int64]).
        logprob and entropy are differentiable in hidden, weight and bias.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Hardware: "native" runs on a CPU, "triton" on a GPU (compute capability 8.0 or newer), the others anywhere.
    Deterministic. Only "reference" has a double backward. Source: NAT (arXiv 2312.12832) section 3.4.
    """
    if impl == "auto" and bias is None and softcap is None and not (return_entropy or return_rank):
        few = native.score_few(hidden, weight, targets, temperature, ignore_index)
        if few is not None:
            return few
    decision = decide(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        return_entropy=return_entropy, return_rank=return_rank, impl=impl,
    )  # fmt: skip
    temperature, softcap = float(temperature), None if softcap is None else float(softcap)
    results: tuple[torch.Tensor, ...]
    if decision.impl == "reference":
        results = linear_logprob_reference(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    else:
        results = forward_op(decision.impl)(
            hidden, weight, bias, targets, temperature, softcap, ignore_index, return_entropy, return_rank,
            autograd_records(hidden, weight, bias),
        )  # fmt: skip
    logprob, entropy, rank = results[:3]
    extras = (entropy,) * return_entropy + (rank,) * return_rank
    return (logprob, *extras) if extras else logprob


def decide(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    return_entropy: bool = False,
    return_rank: bool = False,
    impl: str = "auto",
) -> Decision:
    """Return the implementation that the same call of `linear_logprob` would run, and why. Raise the same errors.

    "auto" picks native on a CPU and Triton on a GPU where they can run, else torch. Native has three forms: few logits
    are one product of torch's (`vocabulary.decide.at_once`), more 16-bit ones on a CPU with matrix units are products
    in tiles (`in_tiles`), others are swept. Beyond those few, "auto" on a CPU picks torch without vector instructions,
    for ranks of 16-bit inputs where the CPU has matrix units, and for few tokens with a large weight (float32: under 4;
    16 bits: under 16, or 32 from width 2048; never where a CPU lacks their products).
    """
    check_impl(_OP, impl)
    check_head(_OP, "hidden", hidden, weight, bias)
    check_numbers(_OP, temperature, softcap, ignore_index)
    check_bool(_OP, "return_entropy", return_entropy)
    check_bool(_OP, "return_rank", return_rank)
    check_targets(_OP, targets, hidden, weight.shape[0], ignore_index)
    return choose(_OP, impl, hidden, weight, few=True, tiles=not return_rank)
