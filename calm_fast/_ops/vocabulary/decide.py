"""Checks and the choice of implementation that linear_nce and linear_logprob share."""

from __future__ import annotations

import torch

from calm_fast.core import native_library
from calm_fast.core.checks import bad_type, bad_value, check_finite_number, check_tensor, values_checked
from calm_fast.core.dispatch import VMAP, Decision, active_transform, autograd_records, refuse, triton_obstacle

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# With few tokens and a weight of at least _LARGE_WEIGHT elements, reading the weight takes most of the time. torch's
# products read it as it lies, the compiled library packs it. Times of native over torch, one thread: float32, 2 tokens
# 1.4 to 2.0, 4 tokens 0.9 to 1.05, 8 tokens 0.7 to 1.0; bfloat16 8 tokens 0.9 to 1.2, 16 tokens 0.7 to 0.9, and with d
# 4096 1.08 for 16, 1.09 for 24 and 0.93 for 32.
_LARGE_WEIGHT = 1 << 20
_WIDE = 2048  # d from which a 16-bit weight pays only with twice as many tokens


def _few_tokens(hidden: torch.Tensor) -> int:
    """Return the number of tokens from which the compiled library is faster with a large weight."""
    if hidden.dtype == torch.float32:
        return 4
    if native_library.emulated(hidden.dtype):
        return 0
    return 16 if hidden.shape[1] < _WIDE else 32


# Elements of logits that may be computed at once: 8 MiB in float32. torch multiplies, and the compiled library reads
# each row of logits, once or twice, in vector registers. Its own sweep packs the weight first, which takes longer than
# the product of few tokens; torch's sums take 10 calls and four copies of the logits.
AT_ONCE = 1 << 21
# In float32, without gradients, the sweep is ahead from here on, unless the width is large. Times of the sweep over
# those at once, one thread, AVX-512: d 576 V 32768 16 tokens 0.87, 64 tokens 0.83; d 256 V 8192 16 tokens 0.97, 64
# tokens 0.95; d 4096 V 2048 16 tokens 1.05, 128 tokens 1.43.
_AT_ONCE_FLOAT32 = 1 << 19


def at_once(op: str, hidden: torch.Tensor, weight: torch.Tensor, keep_logits: bool) -> bool:
    """Return True if the compiled library scores the logits of one product: they are few, and torch multiplies well.

    op: the op, for which the library must have the part "rows". keep_logits: a backward pass may follow, which then
    needs no product of its own.
    """
    most = AT_ONCE
    if hidden.dtype == torch.float32 and not keep_logits and hidden.shape[1] < _WIDE:
        most = min(most, _AT_ONCE_FLOAT32)
    if not 0 < hidden.shape[0] * weight.shape[0] <= most or hidden.device.type != "cpu":
        return False
    if (
        hidden.dtype == torch.float64
        or native_library.obstacle(f"{op}_rows", "cpu")
        or native_library.slowness(torch.float32)
    ):
        return False
    if hidden.dtype == torch.float32:
        return True
    # in 16 bits torch rounds the logits, and the sweep does not: only where torch's product is that much faster
    if native_library.emulated(hidden.dtype):
        return hidden.shape[0] == 1 and hidden.dtype == torch.bfloat16
    return native_library.slowness(hidden.dtype) is not None or hidden.shape[0] < _few_tokens(hidden)


def in_tiles(op: str, hidden: torch.Tensor) -> bool:
    """Return True if the compiled library reads tiles of logits that torch multiplies: 16 bits and matrix units.

    op: as in `at_once`, which comes first.
    """
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.bfloat16, torch.float16)
        and native_library.slowness(hidden.dtype) is not None
        and not native_library.slowness(torch.float32)
        and native_library.obstacle(f"{op}_rows", "cpu") is None
    )


def native_obstacle(op: str, hidden: torch.Tensor) -> str | None:
    """Return why the compiled library cannot run `op` on these hidden states, or None."""
    if hidden.dtype == torch.float64:
        return "the compiled library computes in float32, the hidden states are float64"
    return native_library.obstacle(op, hidden.device.type)


def choose(op: str, impl: str, hidden: torch.Tensor, weight: torch.Tensor, *, few: bool, tiles: bool) -> Decision:
    """Return the requested implementation, or for "auto" native on a CPU, Triton on a GPU, torch where they cannot run.

    few, tiles: native has the forms of `at_once` and `in_tiles` for this call.

    Raises:
        RuntimeError: an explicit `impl` cannot run here, or an active torch.func transform needs impl="reference".
    """
    if impl != "reference" and (transform := active_transform()) not in (None, VMAP):
        raise RuntimeError(f"{op}: inside {transform} only impl='reference' has derivatives, got impl={impl!r}")
    if impl in ("reference", "torch"):
        return Decision(op, impl, "asked for")
    if impl == "native":
        if obstacle := native_obstacle(op, hidden):
            raise refuse(op, impl, obstacle)
        return Decision(op, impl, "asked for")
    obstacle = triton_obstacle(hidden.device)
    if hidden.dtype == torch.float64:
        obstacle = "the kernels compute in float32, the hidden states are float64"
    if impl == "triton":
        if obstacle:
            raise refuse(op, impl, obstacle)
        return Decision(op, impl, "asked for")
    if few and at_once(op, hidden, weight, autograd_records(hidden, weight)):
        return Decision(op, "native", "few logits on a CPU: torch's product, then each row of logits in one pass")
    if tiles and in_tiles(op, hidden):
        return Decision(op, "native", "matrix units: torch's product in tiles, then each row of logits in one pass")
    if hidden.device.type == "cpu":
        if obstacle := native_obstacle(op, hidden) or native_library.slowness(hidden.dtype):
            return Decision(op, "torch", f"CPU tensors: blocked products; {obstacle}")
        least = _few_tokens(hidden)  # more logits than are computed at once
        if hidden.shape[0] < least and weight.numel() >= _LARGE_WEIGHT:
            return Decision(op, "torch", f"CPU tensors: under {least} tokens torch reads a large weight faster")
        return Decision(op, "native", "CPU tensors: products and running sums in one pass, in vector registers")
    if obstacle:
        return Decision(op, "torch", f"Triton cannot run: {obstacle}")
    return Decision(op, "triton", "a GPU: products and running sums in one kernel")


def check_dtype(op: str, name: str, tensor: torch.Tensor, like: str, dtype: torch.dtype) -> None:
    """Check that `tensor` has the dtype of the argument called `like`."""
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: `{name}` must have {like}'s dtype {dtype}, got {tensor.dtype}")


def check_head(op: str, name: str, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check rank, dtype, device and sizes of the hidden states (T, d), weight (V, d) and bias (V,) or None.

    name: the name of the argument that holds the hidden states.
    """
    check_tensor(op, name, hidden, "(T, d)", DTYPES)
    check_tensor(op, "weight", weight, "(V, d)", DTYPES, hidden.device)
    check_dtype(op, "weight", weight, name, hidden.dtype)
    d = hidden.shape[1]
    if d < 1:
        raise bad_value(op, name, "of hidden size d >= 1", f"shape {tuple(hidden.shape)}")
    if weight.shape[0] < 1 or weight.shape[1] != d:
        raise bad_value(op, "weight", f"of shape (V, d) with V >= 1 and d = {d}", f"shape {tuple(weight.shape)}")
    if bias is not None:
        check_tensor(op, "bias", bias, "(V,)", DTYPES, hidden.device)
        check_dtype(op, "bias", bias, name, hidden.dtype)
        if bias.shape[0] != weight.shape[0]:
            raise bad_value(op, "bias", f"of shape (V,) = ({weight.shape[0]},)", f"shape {tuple(bias.shape)}")


def _check_positive(op: str, name: str, value: float) -> None:
    check_finite_number(op, name, value)
    if not value > 0:
        raise bad_value(op, name, "positive", str(value))


def check_numbers(op: str, temperature: float, softcap: float | None, ignore_index: int) -> None:
    """Check that temperature and softcap (unless None) are positive and finite, and that ignore_index is an int."""
    _check_positive(op, "temperature", temperature)
    if softcap is not None:
        _check_positive(op, "softcap", softcap)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise bad_type(op, "ignore_index", "an int", ignore_index)


def check_indices(op: str, name: str, indices: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Check that `indices` is an int64 tensor (T,) on `device`."""
    check_tensor(op, name, indices, "(T,)", (torch.int64,), device)
    if indices.shape[0] != tokens:
        raise bad_value(op, name, f"of shape (T,) = ({tokens},)", f"shape {tuple(indices.shape)}")


def check_targets(op: str, targets: torch.Tensor, hidden: torch.Tensor, vocabulary: int, ignore_index: int) -> None:
    """Check that `targets` is an int64 tensor (T,) whose values are token ids or `ignore_index`."""
    check_indices(op, "targets", targets, hidden.shape[0], hidden.device)
    if not targets.numel() or not values_checked(targets):
        return
    least, most = (int(t) for t in torch.aminmax(targets))
    if least >= 0 and most < vocabulary:  # the usual case, in one pass
        return
    used = targets[targets != ignore_index]
    if used.numel() and (int(used.min()) < 0 or int(used.max()) >= vocabulary):
        expected = f"ignore_index ({ignore_index}) or within 0 <= target < V = {vocabulary}"
        raise bad_value(op, "targets", expected, f"values from {int(used.min())} to {int(used.max())}")
