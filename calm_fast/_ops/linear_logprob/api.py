"""Log-probabilities of target tokens from hidden states and the LM head, without logits in memory."""

from __future__ import annotations

import torch

from calm_fast._ops.linear_logprob.reference import linear_logprob_reference
from calm_fast._ops.vocabulary import decide as vocabulary
from calm_fast._ops.vocabulary.decide import check_head, check_numbers, check_targets, choose
from calm_fast.core.checks import check_bool
from calm_fast.core.dispatch import Decision, check_impl

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
    """log softmax(hidden weight^T)[target] of each token.

        p_t = softmax(z_t / temperature),  z = softcap(hidden weight^T + bias);  logprob_t = log p_t[target_t]
        entropy_t = -sum_v p_t[v] log p_t[v];   rank_t = 1 + #{v : z_t[v] > z_t[target_t]}

    The vocabulary is swept in blocks: forward and backward keep a few numbers a token and never (T, V) logits.

    Args:
        hidden: (T, d) float32, bfloat16 or float16 (float64 with impl "reference" or "torch").
        weight: (V, d), hidden's dtype and device.
        targets: (T,) int64, 0 <= target < V or ignore_index.
        bias: (V,) in weight's dtype, or None; -inf in it rules a token out (with a softcap the cap holds, as
            for every logit): it adds 0 to the entropy and gets no gradient. temperature: > 0, divides the logits.
        softcap: logits become softcap * tanh(logits / softcap), before the temperature; None = not.
        ignore_index: the target that marks a token to ignore: its results are 0, it gets and gives no gradient.
        return_entropy: also the entropy of p, in nats.
        return_rank: also the rank of the target: 1 = no token is more likely. Logits that differ by less than their
            rounding may be counted either way; ties count for the target.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        logprob (T,) float32 (float64 for float64 input), or a tuple (logprob[, entropy (T,)][, rank (T,) int64]).
        logprob and entropy are differentiable in hidden, weight and bias.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic. Double backward works with "reference" only. Source: NAT (arXiv 2312.12832) section 3.4.
    """
    decision = decide(
        hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap, ignore_index=ignore_index,
        return_entropy=return_entropy, return_rank=return_rank, impl=impl,
    )  # fmt: skip
    temperature, softcap = float(temperature), None if softcap is None else float(softcap)
    if decision.impl == "reference":
        results = linear_logprob_reference(hidden, weight, targets, bias, temperature, softcap, ignore_index)
    else:
        results = torch.ops.calm_fast.linear_logprob_fwd(
            hidden, weight, bias, targets, temperature, softcap, ignore_index, return_entropy, return_rank,
            decision.impl,
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
    """Which implementation the same call of `linear_logprob` runs, and why; raises what that call would raise.

    auto: the compiled library on a CPU with vector instructions (torch where fewer than 16 tokens meet a large weight,
    or 16-bit ones matrix units), Triton on a GPU, where these can run; the blocked torch implementation elsewhere.
    """
    check_impl(_OP, impl)
    check_head(_OP, "hidden", hidden, weight, bias)
    check_numbers(_OP, temperature, softcap, ignore_index)
    check_bool(_OP, "return_entropy", return_entropy)
    check_bool(_OP, "return_rank", return_rank)
    check_targets(_OP, targets, hidden, weight.shape[0], ignore_index)
    return choose(_OP, impl, hidden, weight)


# ---- the registered ops: what torch.compile, export, FSDP and opcheck see -------------------------------------------

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define(
    "linear_logprob_fwd(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, float temperature,"
    " float? softcap, int ignore_index, bool want_entropy, bool want_rank, str impl)"
    " -> (Tensor logprob, Tensor entropy, Tensor rank, Tensor lse)"
)
_lib.define(
    "linear_logprob_bwd(Tensor dlogprob, Tensor? dentropy, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets,"
    " Tensor lse, Tensor entropy, float temperature, float? softcap, int ignore_index, bool[] needs, str impl)"
    " -> (Tensor dhidden, Tensor dweight, Tensor dbias)"
)


@torch.library.impl(_lib, "linear_logprob_fwd", "CompositeExplicitAutograd")
def _fwd(*args):
    *args, impl = args
    if impl == "triton":
        from calm_fast.kernels.linear_logprob.launch import (
            launch_linear_logprob_fwd,  # imports triton: only where it is used
        )

        return launch_linear_logprob_fwd(*args)
    if impl == "native":
        return _native_fwd(*args)
    from calm_fast._ops.linear_logprob.torch_impl import linear_logprob_torch_fwd

    return linear_logprob_torch_fwd(*args)


@torch.library.impl(_lib, "linear_logprob_bwd", "CompositeExplicitAutograd")
def _bwd(*args):
    *args, needs, impl = args
    if impl == "triton":
        return _triton_bwd(*args, tuple(needs))
    if impl == "native":
        return _native_bwd(*args, tuple(needs))
    from calm_fast._ops.linear_logprob.torch_impl import linear_logprob_torch_bwd

    return linear_logprob_torch_bwd(*args, tuple(needs))


def _triton_bwd(
    dlogprob, dentropy, hidden, weight, bias, targets, lse, entropy, temperature, softcap, ignore_index, needs
):
    """Logit gradients by a kernel, a chunk at a time; the products that consume them are torch's."""
    from calm_fast._ops.vocabulary.torch_impl import Gradients
    from calm_fast.kernels.linear_logprob.launch import launch_linear_logprob_dlogits

    if needs[1]:  # a product with dlogits: 0 times whatever an ignored row holds must be 0
        hidden = hidden.masked_fill((targets == ignore_index).unsqueeze(1), 0.0)
    gradients = Gradients(hidden, weight, needs)
    tensors = (dlogprob, dentropy, hidden, weight, bias, targets, lse, entropy)
    for rows, columns, chunk in gradients.chunks():
        launch_linear_logprob_dlogits(*tensors, temperature, softcap, ignore_index, rows, columns, chunk)
        gradients.add(rows, columns, chunk)
    return gradients.results()


def _native_fwd(hidden, weight, bias, targets, temperature, softcap, ignore_index, want_entropy, want_rank):
    """The tokens that count through the compiled library."""
    from calm_fast._ops.vocabulary.torch_impl import put, take, valid_rows

    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    hidden, targets = take(rows, hidden, targets.contiguous())
    bias = None if bias is None else bias.float().contiguous()
    found = torch.ops.calm_fast._linear_logprob_native_fwd(
        hidden, weight, bias, targets, temperature, softcap, want_entropy, want_rank, vocabulary.LANE
    )
    wanted = (True, want_entropy, want_rank, True)
    return tuple(put(rows, t, tokens) if want else t for t, want in zip(found, wanted, strict=True))


def _native_bwd(
    dlogprob, dentropy, hidden, weight, bias, targets, lse, entropy, temperature, softcap, ignore_index, needs
):
    """Logit gradients by the compiled library, a chunk at a time; the products that consume them are torch's."""
    from calm_fast._ops.vocabulary.torch_impl import Gradients, put, take, valid_rows

    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    up, hidden, targets, lse = take(rows, dlogprob.float().contiguous(), hidden, targets.contiguous(), lse)
    down = None
    if dentropy is not None:
        down, entropy = take(rows, dentropy.float().contiguous(), entropy)
    bias = None if bias is None else bias.float().contiguous()
    gradients = Gradients(hidden, weight, needs)
    for r, c, chunk in gradients.chunks(by_token=False):
        torch.ops.calm_fast._linear_logprob_native_dlogits(
            up[r], None if down is None else down[r], hidden[r], weight, bias, targets[r], lse[r],
            None if down is None else entropy[r], temperature, softcap, c.start, chunk.T, vocabulary.LANE,
        )  # fmt: skip
        gradients.add(r, c, chunk)
    dhidden, dweight, dbias = gradients.results()
    return put(rows, dhidden, tokens) if needs[0] else dhidden, dweight, dbias


@torch.library.register_fake("calm_fast::linear_logprob_fwd", lib=_lib)
def _fwd_fake(hidden, weight, bias, targets, temperature, softcap, ignore_index, want_entropy, want_rank, impl):
    compute, tokens = torch.promote_types(hidden.dtype, torch.float32), hidden.shape[0]
    logprob, lse = (hidden.new_empty(tokens, dtype=compute) for _ in range(2))
    entropy = hidden.new_empty(tokens if want_entropy else 0, dtype=compute)
    return logprob, entropy, targets.new_empty(tokens if want_rank else 0), lse


@torch.library.register_fake("calm_fast::linear_logprob_bwd", lib=_lib)
def _bwd_fake(dlogprob, dentropy, hidden, weight, *options):
    needs = options[-2]
    shapes = (hidden.shape, weight.shape, (weight.shape[0],))
    return tuple(hidden.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.temperature, ctx.softcap, ctx.ignore_index, want_entropy, _, ctx.impl = inputs
    logprob, entropy, rank, lse = output
    ctx.save_for_backward(hidden, weight, bias, targets, lse, entropy)
    ctx.mark_non_differentiable(rank, lse, *(() if want_entropy else (entropy,)))
    ctx.set_materialize_grads(False)


def _backward(ctx, dlogprob, dentropy, *_):
    if dlogprob is None and dentropy is None:
        return (None,) * 10
    saved = ctx.saved_tensors
    dlogprob = torch.zeros_like(saved[4]) if dlogprob is None else dlogprob
    needs = [ctx.needs_input_grad[i] for i in range(3)]
    options = (ctx.temperature, ctx.softcap, ctx.ignore_index, needs, ctx.impl)
    grads = torch.ops.calm_fast.linear_logprob_bwd(dlogprob, dentropy, *saved, *options)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), *(None,) * 7


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        f"{_OP}: no double backward through impl='torch', 'triton' or 'native'. Use impl='reference' for it."
    )


torch.library.register_autograd("calm_fast::linear_logprob_fwd", _backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd("calm_fast::linear_logprob_bwd", _no_double_backward, lib=_lib)
