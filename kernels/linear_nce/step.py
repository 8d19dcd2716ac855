"""Loss and student gradient of linear_nce in one pass over chunks of tokens: torch's products, row kernels between.

For a frozen head on a GPU, where torch's products are faster than those inside our kernels. Two forms, see
docs/ops/linear_nce.md, "On a GPU": whole sequences in a chunk, or any tokens and one product more.
"""

from __future__ import annotations

from typing import Any

import torch
import triton

from calm_fast.kernels.linear_nce.fwd import _linear_nce_calibrate_kernel
from calm_fast.kernels.linear_nce.rows import STATS, _linear_nce_dz_kernel, _linear_nce_stats_kernel
from calm_fast.kernels.vocabulary.launch import CodegenSpec, LaunchConfig, launch, make_spec

__all__ = ["launch_linear_nce_step", "step_specs"]

_INTERPRETED = not isinstance(_linear_nce_stats_kernel, triton.runtime.JITFunction)

# dz lies within +-1, times this well within float16's range: probabilities below 2^-24 would vanish in it
_SCALE = 2.0**14
_ALIGN = 16  # logits a row is padded to, so that every row begins at a whole vector

# (LANES, WIDTH): a lane for each thread, a vector of 16 bytes for each lane (with Triton 3.6 two lanes spilled)
_STATS_16BIT, _STATS_FLOAT = LaunchConfig(256, 8, 8, 1), LaunchConfig(256, 4, 8, 1)
_DZ = LaunchConfig(1024, 4096, 8, 1)  # BLOCK_J, BLOCK
_CALIBRATE = LaunchConfig(64, 64, 4, 1)
_PARTS = {
    "stats": (_linear_nce_stats_kernel, "LANES", "WIDTH"),
    "dz": (_linear_nce_dz_kernel, "BLOCK_J", "BLOCK"),
}
_INTERPRETER = {"stats": LaunchConfig(8, 8, 4, 1), "dz": LaunchConfig(8, 64, 4, 1)}


def row_config(part: str, dtype: torch.dtype) -> LaunchConfig:
    """Launch numbers of a row kernel. part: "stats" or "dz". dtype: of the logits."""
    if part == "dz":
        return _DZ
    return _STATS_FLOAT if dtype == torch.float32 else _STATS_16BIT


def _multiply(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """out = a @ b, 16-bit operands with a float32 result included; into `out`, so that autocast leaves it alone."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.device.type == "cuda":
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:  # the interpreter's tensors: no such product on a CPU
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


class _Chunks:
    """The buffers of a chunk of at most `rows` tokens, and what is done with it: products, statistics, gradients."""

    def __init__(
        self,
        streams: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        seq_ids: torch.Tensor,
        options: dict[str, Any],
        rows: int,
        parts: int,
    ) -> None:
        """streams: (T, d) each. targets, seq_ids: contiguous, of the tokens in the order in which they are worked on.

        options: tau, softcap (0 = none) and ignore_index of the kernels. parts: gradient rows a token, 1 or 2.
        """
        self.streams, self.weight, self.targets, self.seq_ids, self.options = streams, weight, targets, seq_ids, options
        self.bias = None if bias is None else bias.contiguous()
        self.plain, self.softcap = options["tau"] == 1.0, options["softcap"] != 0.0
        self.parts = parts
        v, d = weight.shape
        self.width = triton.cdiv(v, _ALIGN) * _ALIGN
        self.hidden = weight.new_empty((3 * rows, d))
        self.logits = weight.new_empty(3 * rows * self.width)
        self.product = weight.new_empty((parts * rows, d), dtype=torch.float32)
        self.stats = self.product.new_empty(STATS * rows)
        self.terms = self.product.new_empty((3, targets.shape[0]))

    def _rows(self, count: int) -> torch.Tensor:
        """(count, V): the first logits of the buffer."""
        return self.logits[: count * self.width].view(count, self.width)[:, : self.weight.shape[0]]

    def _launch(self, part: str, first: int, rows: int, tensors: tuple, numbers: tuple, **constant: Any) -> None:
        """One program for each token. part: "stats" or "dz"."""
        config = _INTERPRETER[part] if _INTERPRETED else row_config(part, self.weight.dtype)
        kernel, *sizes = _PARTS[part]
        constant |= dict(zip(sizes, (config.block_m, config.block_n), strict=True))
        launch(
            kernel,
            rows,
            self.weight.device,
            config,
            *(self.logits, self.bias, self.targets, *tensors),
            *(first, rows, self.targets.shape[0], self.weight.shape[0], self.width, *numbers),
            PLAIN=self.plain,
            HAS_BIAS=self.bias is not None,
            HAS_SOFTCAP=self.softcap,
            **constant,
        )

    def read(self, first: int, rows: int, order: torch.Tensor | None) -> None:
        """Logits and statistics of tokens first .. first + rows; order: which rows of the streams they are."""
        for i, stream in enumerate(self.streams):
            hidden = self.hidden[i * rows : (i + 1) * rows]
            if order is None:
                hidden.copy_(stream[first : first + rows])
            else:
                torch.index_select(stream, 0, order[first : first + rows], out=hidden)
        _multiply(self.hidden[: 3 * rows], self.weight.T, self._rows(3 * rows))
        options = self.options
        numbers = (options["tau"], options["softcap"], options["ignore_index"])
        self._launch("stats", first, rows, (self.stats, self.terms), numbers)

    def gradients(
        self, first: int, rows: int, alpha: float, offset: float, scale: float, losses: torch.Tensor
    ) -> torch.Tensor:
        """(parts * rows, d) float32: scale times the gradient, or its parts, of the chunk last read."""
        options = self.options
        self._launch(
            "dz", first, rows,
            (self.seq_ids, self.stats, self.terms, losses),
            (alpha, options["tau"], offset, options["softcap"], scale, options["ignore_index"]),
            PARTS=self.parts == 2,
        )  # fmt: skip
        product = self.product[: self.parts * rows]
        _multiply(self._rows(self.parts * rows), self.weight, product)
        return product


def launch_linear_nce_step(
    student: torch.Tensor,
    nat: torch.Tensor,
    neg: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    alpha: float,
    temperature: float,
    offset: float,
    softcap: float | None,
    ignore_index: int,
    *,
    rows: int,
    plan: tuple[torch.Tensor, torch.Tensor, list[slice]] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The NCE loss and its gradient with respect to the student's hidden states, weight and bias being frozen.

    Args:
        student, nat, neg: (T, d) float32, bfloat16 or float16, any strides. weight: (V, d), bias (V,) or None.
        targets, seq_ids: (T,) int64.
        rows: tokens of a chunk of any tokens.
        plan: order, ids (T,) and chunks of whole sequences, four products; None = chunks of any tokens, five products.
    Returns:
        loss () and gradient (T, d), both float32; the gradient of an ignored token is 0.
    Deterministic.
    """
    tokens, device = student.shape[0], student.device
    gradient = torch.zeros((tokens, student.shape[1]), dtype=torch.float32, device=device)
    if tokens == 0:
        return gradient.new_zeros(()), gradient
    options = {"tau": 1.0 / temperature, "softcap": softcap or 0.0, "ignore_index": ignore_index}
    targets, seq_ids = targets.contiguous(), seq_ids.contiguous()
    head, numbers = ((student, nat, neg), weight, bias), (alpha, offset)
    if plan is not None:
        return _whole_sequences(head, targets, plan, options, numbers, gradient)
    return _any_tokens(head, targets, seq_ids, options, numbers, rows, gradient)


def _whole_sequences(
    head: tuple, targets: torch.Tensor, plan: tuple, options: dict, numbers: tuple, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """dz is final as soon as a chunk has been read: one gradient row a token."""
    order, ids, cuts = plan
    if not cuts:
        return gradient.new_zeros(()), gradient
    count, (alpha, offset) = cuts[-1].stop, numbers
    order, ids = order[:count], ids[:count]
    rows = max(cut.stop - cut.start for cut in cuts)
    chunks = _Chunks(*head, targets.index_select(0, order), ids, options, rows, 1)
    losses = gradient.new_empty(count)
    # what dz reaches before it is scaled, so that it neither vanishes nor overflows in float16
    size = abs(1.0 - alpha) + abs(alpha) / options["tau"] * (abs(offset) + 1.0)
    for cut in cuts:
        first, length = cut.start, cut.stop - cut.start
        chunks.read(first, length, order)
        product = chunks.gradients(first, length, alpha, offset, _SCALE / size, losses)
        gradient.index_copy_(0, order[cut], product.mul_(size / _SCALE / count))
    return losses.sum() / count, gradient


def _any_tokens(
    head: tuple,
    targets: torch.Tensor,
    seq_ids: torch.Tensor,
    options: dict,
    numbers: tuple,
    rows: int,
    gradient: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two gradient rows a token, weighed when the KL of all sequences is known."""
    tokens, tau, (alpha, offset) = targets.shape[0], options["tau"], numbers
    half = max(1, min(rows // 2, tokens))  # the gradient's product has `rows` rows here too
    chunks = _Chunks(*head, targets, seq_ids, options, half, 2)
    soft = torch.empty_like(gradient)
    for first in range(0, tokens, half):
        end = min(first + half, tokens)
        chunks.read(first, end - first, None)
        product = chunks.gradients(first, end - first, alpha, offset, _SCALE, chunks.stats)
        gradient[first:end] = product[: end - first]
        soft[first:end] = product[end - first :]
    coefficients = gradient.new_empty((2, tokens))
    launch(
        _linear_nce_calibrate_kernel,
        triton.cdiv(tokens, _CALIBRATE.block_m),
        targets.device,
        _CALIBRATE,
        *(chunks.terms, targets, seq_ids, coefficients, tokens, alpha, tau, offset, options["ignore_index"]),
        BLOCK_T=_CALIBRATE.block_m,
        BLOCK_J=_CALIBRATE.block_n,
    )
    loss = (coefficients * chunks.terms[:2]).sum()
    hard_weight, soft_weight = (coefficients / _SCALE).unsqueeze(2)
    gradient.mul_(hard_weight).addcmul_(soft.mul_(tau), soft_weight)
    # an ignored row is 0 times the weight so far: NaN where the weight holds an infinity
    return loss, gradient.masked_fill_((targets == options["ignore_index"]).unsqueeze(1), 0.0)


_POINTERS = {"targets_ptr": "*i64", "seq_ids_ptr": "*i64"} | {
    f"{name}_ptr": "*fp32" for name in ("stats", "terms", "losses")
}


def step_specs() -> list[CodegenSpec]:
    """The row kernels as code generation checks compile them: plain, and with temperature, bias and softcap."""
    specs = []
    for dtype in (torch.bfloat16, torch.float32):
        for plain in (True, False):
            shared = {"PLAIN": plain, "HAS_BIAS": not plain, "HAS_SOFTCAP": not plain}
            shared |= {"bias_ptr": None} if plain else {}
            suffix = "" if plain else "_full"
            config = row_config("stats", dtype)
            constant = shared | {"LANES": config.block_m, "WIDTH": config.block_n}
            arguments = (dtype, constant, config, False, (80, 90, 100), _POINTERS)
            specs.append(make_spec(f"linear_nce_stats{suffix}", _linear_nce_stats_kernel, *arguments))
            for parts in (False, True):
                config = row_config("dz", dtype)
                constant = shared | {"BLOCK_J": config.block_m, "BLOCK": config.block_n, "PARTS": parts}
                arguments = (dtype, constant, config, False, (80, 90, 100), _POINTERS)
                name = "linear_nce_dz" + ("_parts" if parts else "") + suffix
                specs.append(make_spec(name, _linear_nce_dz_kernel, *arguments))
    return specs
