"""The NCE loss from hidden states and the LM head they share, without logits in memory."""

from __future__ import annotations

import torch

from calm_fast._ops.linear_nce.reference import linear_nce_reference
from calm_fast._ops.vocabulary import decide as vocabulary
from calm_fast._ops.vocabulary.decide import (
    DTYPES,
    check_dtype,
    check_head,
    check_indices,
    check_numbers,
    check_targets,
    choose,
)
from calm_fast.core.checks import bad_value, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import Decision, check_impl

_OP = "linear_nce"


def linear_nce(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    offset: float = 0.5,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> torch.Tensor:
    """Negative calibrated enhancement: cross-entropy plus distillation weighted by what the negative teacher knows.

        KL_s = mean over the tokens of sequence s of KL(p_neg || p_nat);   beta_s = tanh(KL_s)
        L    = (1 - alpha) mean_t(-log p_student(target_t)) + alpha tau^2 mean_t((offset + beta_s(t)) H_t)
        H_t  = cross-entropy of p_student at temperature tau under p_nat at temperature tau

    with p = softmax(softcap(hidden weight^T + bias)). KL_s is at temperature 1. The vocabulary is swept in blocks:
    forward and backward keep a few numbers a token and never (T, V) logits. Where student is all that learns, its
    gradient is made in the forward pass, of logits kept for some whole sequences at a time: 4 products instead of 6.

    Args:
        student, nat, neg: (T, d) float32, bfloat16 or float16 (float64 with impl "reference" or "torch"); hidden
            states of the student, the NAT teacher and the negative teacher for the same tokens.
        weight: (V, d), student's dtype and device.
        targets: (T,) int64, 0 <= target < V or ignore_index: such a token takes no part at all.
        seq_ids: (T,) int64, 0 <= id < T; tokens of one sequence carry the same id, in any order.
        alpha: share of the distillation. temperature: tau > 0. offset: added to beta.
        bias: (V,) in weight's dtype, or None. softcap: logits become softcap * tanh(logits / softcap); None = not.
        ignore_index: the target that marks a token to ignore.
        impl: "auto", "reference", "torch", "triton" or "native"; an explicit choice is honoured or refused.
    Returns:
        a scalar, float32 (float64 for float64 input); 0 if no target is valid. Differentiable in student, weight and
        bias, in these two through the student's logits only: the teachers are constants.
    Raises:
        TypeError, ValueError: an argument is wrong; the message names it, what was expected and what came.
        RuntimeError: an explicit `impl` cannot run here.
    Deterministic. Double backward works with "reference" only. Source: NAT/NCE (arXiv 2312.12832) section 3.3; the
    defaults are those of its released code.
    """
    numbers = {"alpha": alpha, "temperature": temperature, "offset": offset}
    decision = decide(
        student, nat, neg, weight, targets, seq_ids,
        **numbers, bias=bias, softcap=softcap, ignore_index=ignore_index, impl=impl,
    )  # fmt: skip
    alpha, temperature, offset = (float(x) for x in (alpha, temperature, offset))
    softcap = None if softcap is None else float(softcap)
    options = (alpha, temperature, offset)
    if decision.impl == "reference":
        return linear_nce_reference(student, nat, neg, weight, targets, seq_ids, *options, bias, softcap, ignore_index)
    arguments = (student, nat, neg, weight, bias, targets, seq_ids, *options, softcap, ignore_index, decision.impl)
    if _only_the_student_learns(student, weight, bias):
        return torch.ops.calm_fast.linear_nce_step(*arguments)[0]
    return torch.ops.calm_fast.linear_nce_fwd(*arguments)[0]


def _only_the_student_learns(student: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the one gradient is the student's: the loss is a scalar, so it can be made while logits are at hand."""
    trained = weight.requires_grad or (bias is not None and bias.requires_grad)
    return torch.is_grad_enabled() and student.requires_grad and not trained


def decide(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    offset: float = 0.5,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    impl: str = "auto",
) -> Decision:
    """Which implementation the same call of `linear_nce` runs, and why; raises what that call would raise.

    auto: the compiled library on a CPU with vector instructions (torch where fewer than 16 tokens meet a large weight,
    or 16-bit ones matrix units), Triton on a GPU, where these can run; the blocked torch implementation elsewhere.
    """
    check_impl(_OP, impl)
    check_head(_OP, "student", student, weight, bias)
    _check_teachers(student, nat, neg)
    check_numbers(_OP, temperature, softcap, ignore_index)
    for name, value in (("alpha", alpha), ("offset", offset)):
        check_finite_number(_OP, name, value)
    check_targets(_OP, targets, student, weight.shape[0], ignore_index)
    _check_sequences(seq_ids, student)
    return choose(_OP, impl, student, weight)


def _check_teachers(student: torch.Tensor, nat: torch.Tensor, neg: torch.Tensor) -> None:
    for name, t in (("nat", nat), ("neg", neg)):
        check_tensor(_OP, name, t, "(T, d)", DTYPES, student.device)
        check_dtype(_OP, name, t, "student", student.dtype)
        if t.shape != student.shape:
            raise bad_value(_OP, name, f"of student's shape {tuple(student.shape)}", f"shape {tuple(t.shape)}")


def _check_sequences(seq_ids: torch.Tensor, student: torch.Tensor) -> None:
    tokens = student.shape[0]
    check_indices(_OP, "seq_ids", seq_ids, tokens, student.device)
    if tokens and values_checked(seq_ids):
        least, most = (int(x) for x in torch.aminmax(seq_ids))
        if least < 0 or most >= tokens:
            raise bad_value(_OP, "seq_ids", f"within 0 <= id < T = {tokens}", f"values from {least} to {most}")


# ---- the registered ops: what torch.compile, export, FSDP and opcheck see -------------------------------------------

_lib = torch.library.Library("calm_fast", "FRAGMENT")
_lib.define(
    "linear_nce_fwd(Tensor student, Tensor nat, Tensor neg, Tensor weight, Tensor? bias, Tensor targets,"
    " Tensor seq_ids, float alpha, float temperature, float offset, float? softcap, int ignore_index, str impl)"
    " -> (Tensor loss, Tensor lse, Tensor coefficients)"
)
_lib.define(
    "linear_nce_bwd(Tensor dloss, Tensor student, Tensor nat, Tensor weight, Tensor? bias, Tensor targets,"
    " Tensor lse, Tensor coefficients, float temperature, float? softcap, int ignore_index, bool[] needs, str impl)"
    " -> (Tensor dstudent, Tensor dweight, Tensor dbias)"
)
_lib.define(
    "linear_nce_step(Tensor student, Tensor nat, Tensor neg, Tensor weight, Tensor? bias, Tensor targets,"
    " Tensor seq_ids, float alpha, float temperature, float offset, float? softcap, int ignore_index, str impl)"
    " -> (Tensor loss, Tensor gradient)"
)
_lib.define("linear_nce_step_bwd(Tensor dloss, Tensor gradient, Tensor student) -> Tensor dstudent")


@torch.library.impl(_lib, "linear_nce_fwd", "CompositeExplicitAutograd")
def _fwd(*args):
    *args, impl = args
    if impl == "triton":
        from calm_fast.kernels.linear_nce import launch as kernels  # imports triton: only where it is used

        return kernels.launch_linear_nce_fwd(*args)
    if impl == "native":
        return _native_fwd(*args)
    from calm_fast._ops.linear_nce.torch_impl import linear_nce_torch_fwd

    return linear_nce_torch_fwd(*args)


@torch.library.impl(_lib, "linear_nce_bwd", "CompositeExplicitAutograd")
def _bwd(*args):
    *args, needs, impl = args
    if impl == "triton":
        return _triton_bwd(*args, tuple(needs))
    if impl == "native":
        return _native_bwd(*args, tuple(needs))
    from calm_fast._ops.linear_nce.torch_impl import linear_nce_torch_bwd

    return linear_nce_torch_bwd(*args, tuple(needs))


@torch.library.impl(_lib, "linear_nce_step", "CompositeExplicitAutograd")
def _step(*args):
    *args, impl = args
    if impl == "triton":
        from calm_fast.kernels.linear_nce import launch as kernels

        return kernels.launch_linear_nce_step(*args)
    if impl == "native":
        return _native_step(*args)
    from calm_fast._ops.linear_nce.torch_impl import linear_nce_torch_step

    return linear_nce_torch_step(*args)


@torch.library.impl(_lib, "linear_nce_step_bwd", "CompositeExplicitAutograd")
def _step_bwd(dloss, gradient, student):
    return (dloss * gradient).to(student.dtype)  # scaled before it is rounded: a loss scaler's factor counts


def _triton_bwd(
    dloss, student, nat, weight, bias, targets, lse, coefficients, temperature, softcap, ignore_index, needs
):
    """Logit gradients by a kernel, a chunk at a time; the products that consume them are torch's."""
    from calm_fast._ops.vocabulary.torch_impl import Gradients
    from calm_fast.kernels.linear_nce.launch import launch_linear_nce_dlogits

    hidden = student
    if needs[1]:  # a product with dlogits: 0 times whatever an ignored row holds must be 0
        hidden = student.masked_fill((targets == ignore_index).unsqueeze(1), 0.0)
    gradients = Gradients(hidden, weight, needs)
    tensors = (dloss, hidden, nat, weight, bias, targets, lse, coefficients)
    for rows, columns, chunk in gradients.chunks():
        launch_linear_nce_dlogits(*tensors, temperature, softcap, rows, columns, chunk)
        gradients.add(rows, columns, chunk)
    return gradients.results()


def _native_fwd(
    student, nat, neg, weight, bias, targets, seq_ids, alpha, temperature, offset, softcap, ignore_index
):  # fmt: skip
    """The tokens that count through the compiled library, what follows from a token's numbers in torch."""
    from calm_fast._ops.linear_nce.schedule import combine
    from calm_fast._ops.vocabulary.torch_impl import take, valid_rows

    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    streams = take(rows, student, nat, neg)
    targets, seq_ids = take(rows, targets.contiguous(), seq_ids)
    bias = None if bias is None else bias.float().contiguous()
    lse, losses, _ = torch.ops.calm_fast._linear_nce_native_fwd(
        *streams, weight, bias, targets, temperature, softcap, None, vocabulary.LANE
    )
    return combine(lse, *losses, seq_ids, rows, tokens, alpha, temperature, offset)


class _NativeEngine:
    """See `torch_impl.steps.linear_nce.Engine`. Kept logits are float32, or float16 and relative to the target's."""

    def __init__(self, streams: tuple, head: tuple, temperature: float, most: int) -> None:
        """streams: student, nat, neg, targets. head: weight, bias, softcap. most: tokens of the largest chunk."""
        *self.streams, self.targets = streams
        weight, bias, self.softcap = head
        self.weight, self.temperature = weight, temperature
        self.bias = None if bias is None else bias.float().contiguous()
        self.memory = weight.new_empty(2 * weight.shape[0] * _whole_vectors(most), dtype=_kept_dtype(weight))

    def _kept(self, rows: slice) -> torch.Tensor:
        shape = (2, self.weight.shape[0], _whole_vectors(rows.stop - rows.start))
        return self.memory[: shape[0] * shape[1] * shape[2]].view(shape)

    def _swept(self, student, nat, neg, rows: slice, kept: torch.Tensor | None) -> tuple:
        return torch.ops.calm_fast._linear_nce_native_fwd(
            student, nat[rows], neg, self.weight, self.bias, self.targets[rows], self.temperature, self.softcap, kept,
            vocabulary.LANE,
        )  # fmt: skip

    def calibrate(self, rows: slice) -> torch.Tensor:
        return self._swept(None, self.streams[1], self.streams[2][rows], rows, None)[1][2]

    def sweep(self, rows: slice, calibrated: bool = False) -> tuple[torch.Tensor, ...]:
        student, nat, neg = self.streams
        neg = None if calibrated else neg[rows]
        lse, losses, self.references = self._swept(student[rows], nat, neg, rows, self._kept(rows))
        return lse, *losses[: 2 if calibrated else 3]

    def gradient(self, rows: slice, lse: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
        return torch.ops.calm_fast._linear_nce_native_gradient(
            coefficients.contiguous(), self._kept(rows), self.references, self.weight, self.targets[rows], lse,
            self.temperature, self.softcap, vocabulary.LANE,
        )  # fmt: skip


def _kept_dtype(weight: torch.Tensor) -> torch.dtype:
    """Of a kept logit: three bits more than bfloat16 has."""
    return torch.float16 if weight.dtype == torch.bfloat16 else torch.float32


def _whole_vectors(tokens: int) -> int:
    return -(-tokens // 16) * 16


def _native_step(
    student, nat, neg, weight, bias, targets, seq_ids, alpha, temperature, offset, softcap, ignore_index
):  # fmt: skip
    """Sweeps and products by the compiled library; which tokens when is said in torch_impl.steps."""
    from calm_fast._ops.linear_nce.schedule import step

    def engine_of(*streams, most):
        return _NativeEngine(streams, (weight, bias, softcap), temperature, most)

    options = (alpha, temperature, offset, ignore_index, _kept_dtype(weight))
    return step(engine_of, student, nat, neg, weight, targets.contiguous(), seq_ids, *options)


def _native_bwd(
    dloss, student, nat, weight, bias, targets, lse, coefficients, temperature, softcap, ignore_index, needs
):
    """Logit gradients by the compiled library, a chunk at a time; the products that consume them are torch's."""
    from calm_fast._ops.vocabulary.torch_impl import Gradients, put, take, valid_rows

    tokens, rows = targets.shape[0], valid_rows(targets, ignore_index)
    student, nat, targets = take(rows, student, nat, targets.contiguous())
    lse, coefficients = (t if rows is None else t[:, rows] for t in (lse, coefficients * dloss))
    bias = None if bias is None else bias.float().contiguous()
    gradients = Gradients(student, weight, needs)
    for r, c, chunk in gradients.chunks(by_token=False):
        torch.ops.calm_fast._linear_nce_native_dlogits(
            coefficients[:, r].contiguous(), student[r], nat[r], weight, bias, targets[r], lse[:, r].contiguous(),
            temperature, softcap, c.start, chunk.T, vocabulary.LANE,
        )  # fmt: skip
        gradients.add(r, c, chunk)
    dstudent, dweight, dbias = gradients.results()
    return put(rows, dstudent, tokens) if needs[0] else dstudent, dweight, dbias


@torch.library.register_fake("calm_fast::linear_nce_fwd", lib=_lib)
def _fwd_fake(student, nat, neg, weight, bias, targets, *options):
    compute, tokens = torch.promote_types(student.dtype, torch.float32), student.shape[0]
    return tuple(student.new_empty(shape, dtype=compute) for shape in ((), (3, tokens), (2, tokens)))


@torch.library.register_fake("calm_fast::linear_nce_bwd", lib=_lib)
def _bwd_fake(dloss, student, nat, weight, bias, targets, lse, coefficients, *options):
    needs = options[-2]
    shapes = (student.shape, weight.shape, (weight.shape[0],))
    return tuple(student.new_empty(s if need else (0,)) for s, need in zip(shapes, needs, strict=True))


@torch.library.register_fake("calm_fast::linear_nce_step", lib=_lib)
def _step_fake(student, *rest):
    compute = torch.promote_types(student.dtype, torch.float32)
    return student.new_empty((), dtype=compute), student.new_empty(student.shape, dtype=compute)


@torch.library.register_fake("calm_fast::linear_nce_step_bwd", lib=_lib)
def _step_bwd_fake(dloss, gradient, student):
    return gradient.new_empty(gradient.shape, dtype=student.dtype)


def _setup_context(ctx, inputs, output):
    student, nat, _, weight, bias, targets, _, _, ctx.temperature, _, ctx.softcap, ctx.ignore_index, ctx.impl = inputs
    ctx.save_for_backward(student, nat, weight, bias, targets, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, *_):
    if dloss is None:
        return (None,) * 13
    needs = [ctx.needs_input_grad[i] for i in (0, 3, 4)]
    options = (ctx.temperature, ctx.softcap, ctx.ignore_index, needs, ctx.impl)
    grads = torch.ops.calm_fast.linear_nce_bwd(dloss, *ctx.saved_tensors, *options)
    dstudent, dweight, dbias = (g if need else None for g, need in zip(grads, needs, strict=True))
    return dstudent, None, None, dweight, dbias, *(None,) * 8


def _step_setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _step_backward(ctx, dloss, _):
    if dloss is None:
        return (None,) * 13
    return torch.ops.calm_fast.linear_nce_step_bwd(dloss, *ctx.saved_tensors), *(None,) * 12


def _no_double_backward(ctx, *grads):
    raise RuntimeError(
        f"{_OP}: no double backward through impl='torch', 'triton' or 'native'. Use impl='reference' for it."
    )


torch.library.register_autograd("calm_fast::linear_nce_fwd", _backward, setup_context=_setup_context, lib=_lib)
torch.library.register_autograd("calm_fast::linear_nce_bwd", _no_double_backward, lib=_lib)
torch.library.register_autograd(
    "calm_fast::linear_nce_step", _step_backward, setup_context=_step_setup_context, lib=_lib
)
torch.library.register_autograd("calm_fast::linear_nce_step_bwd", _no_double_backward, lib=_lib)
