"""`fixed_weights`: a block in which no parameter changes, so that products of parameters are computed once.

No flag of a tensor shows every change of its values: fused optimizers, `torch._foreach_*`, writes through `.data` and
collectives move no version counter. So a layer keeps folded and packed weights only inside such a block. A value kept
in an earlier block serves again if a checksum says that the parameters hold the same bits.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from calm_fast.core.checks import bad_type
from calm_fast.core.dispatch import active_transform

Parameters = tuple[torch.Tensor | None, ...]
PLAIN = frozenset((torch.Tensor, nn.Parameter))  # a subclass may hold its values elsewhere: sharded, quantized
_Folded = TypeVar("_Folded", bound=tuple[Any, ...])

_COLUMNS = 4096
# elements hashed at once: their int64 copies stay in a CPU's cache; on a GPU every call is a launch
_AT_ONCE = {"cpu": 1 << 16}
_AT_ONCE_ELSEWHERE = 1 << 24
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}


class _Kept(NamedTuple):
    """A value computed from parameters. seen: how each of them looked; content: their checksum, None if unknown."""

    value: Any
    extra: tuple[Any, ...]
    seen: tuple[Any, ...]
    content: torch.Tensor | None


class _Scope:
    """What one layer keeps in an open scope of this thread.

    valid: the value found valid since the scope opened. traced: (`extra`, value) that a compiled call has folded.
    """

    def __init__(self) -> None:
        self.valid: _Kept | None = None
        self.traced: tuple[Any, tuple[Any, ...]] | None = None


class _Thread(threading.local):
    """The open scope of one layer in this thread, or None.

    Each layer has its own: torch.compile uses one graph for all layers of a class, and would look up the first layer's
    key for every one of them in a table of scopes.
    """

    def __init__(self) -> None:
        self.scope: _Scope | None = None


@contextmanager
def fixed_weights(model: nn.Module) -> Iterator[None]:
    """Promise that no parameter of `model` changes within this block, in this thread.

        with calm_fast.fixed_weights(model):
            model.generate(...)

    CrossAttention and DualLoRALinear layers of `model` then fold and pack their weights once and keep them for calls
    without gradients. Outside of such a block they fold in every call, or not at all, whichever costs less. The block
    may be nested, and other threads do not see it. `generate` of a composed model, `score_sequences` and
    `SelfConsistency` open it themselves.

    Args:
        model: any module that contains such layers, wrapped or not. Layers added inside the block keep nothing.
    Raises:
        TypeError: `model` is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise bad_type("fixed_weights", "model", "an nn.Module", model)
    owners = (module.__dict__.get("_folded") for module in model.modules())
    added = [own for own in owners if isinstance(own, FoldedWeights) and own.thread.scope is None]
    for own in added:
        own.thread.scope = _Scope()
    try:
        yield
    finally:
        for own in added:
            own.thread.scope = None


class FoldedWeights:
    """A tuple of tensors computed from a layer's parameters, kept inside `fixed_weights`. The layer's ``_folded``.

    In a scope, the first call compares the parameters with those of the kept value: identity, shape, storage and a
    checksum of their bits, which synchronises a GPU once. Later calls compare identity, storage and version counter:
    cheap, and enough to notice most broken promises.
    """

    def __init__(self) -> None:
        self.thread = _Thread()
        self.clear()

    def clear(self) -> None:
        """Drop the kept value."""
        self._kept: _Kept | None = None  # one reference, because another thread may read it

    @property
    def value(self) -> tuple[Any, ...] | None:
        """The kept value, or None."""
        return self._kept and self._kept.value

    def keeps(self, params: Parameters) -> bool:
        """Return True if this call may use a kept value: inside a scope, and no gradient can flow to `params`.

        A kept value is dropped where a gradient can flow: the parameters are about to change.
        """
        if torch.compiler.is_compiling():
            return False
        if torch.is_grad_enabled():
            for p in params:
                if p is not None and p.requires_grad:
                    self.clear()
                    return False
        return self.thread.scope is not None

    def get(self, params: Parameters, extra: tuple[Any, ...], compute: Callable[[], _Folded]) -> _Folded | None:
        """Return `compute()`, or its earlier result if the values of `params` and the key `extra` are the same.

        Call it where `keeps(params)`. Returns None where nothing can be kept: tensors other than plain ones on one
        device, a torch.func transform, fake tensors, a CUDA graph's capture.
        """
        scope, kept = self.thread.scope, self._kept
        assert scope is not None  # the caller has asked `keeps`
        valid = scope.valid
        if kept is not None and kept is valid and extra == kept.extra and _unchanged(params, kept.seen):
            return kept.value  # one owner, one `compute`: it is what that returned
        if not _can_keep(params):
            return None
        content = None
        if valid is None:  # the first use in this scope
            content = _checksum(params)
            if type(content) is not torch.Tensor:  # a dispatch mode makes tensors of its own: fake, functional
                return None
            if kept is not None and extra == kept.extra and _same(params, content, kept):
                scope.valid = kept
                return kept.value
        elif kept is valid and _unchanged(params, kept.seen):
            content = kept.content  # only `extra` differs
        with torch.inference_mode(False), torch.no_grad():  # usable outside of inference mode later
            value = compute()
        if any(isinstance(t, torch.Tensor) and type(t) not in PLAIN for t in value):
            return value
        scope.valid = self._kept = _Kept(value, extra, tuple(map(_look, params)), content)
        return value

    def get_traced(self, params: Parameters, extra: tuple[Any, ...], compute: Callable[[], _Folded]) -> _Folded | None:
        """Return what `get` would, for a call that torch.compile traces; None where nothing can be kept.

        A value that a call without torch.compile has kept in this scope enters the graph as tensors. Without one, the
        first compiled call in the scope folds in its graph and keeps the result, on a CPU only: a CUDA graph would
        write the next call's result over it. Nothing is compared with the parameters: a graph cannot.
        """
        scope = self.thread.scope
        if scope is None:
            return None
        if torch.is_grad_enabled():  # parameters may be about to change, and autograd may save what the graph reads
            scope.traced = None
            return None
        valid = scope.valid
        if valid is not None and valid.extra == extra:
            kept: _Folded = valid.value
            return kept
        if not all(p is None or p.is_cpu for p in params):
            return None
        if scope.traced is None or scope.traced[0] != extra:
            scope.traced = (extra, compute())
        traced: _Folded = scope.traced[1]  # type: ignore[assignment]  # one owner, one `compute`
        return traced

    def __deepcopy__(self, memo: dict[int, Any]) -> FoldedWeights:
        return FoldedWeights()

    def __reduce__(self) -> tuple[type[FoldedWeights], tuple[()]]:
        return (FoldedWeights, ())


def _look(p: torch.Tensor | None) -> tuple[Any, ...] | None:
    # the detached alias keeps the storage alive: its address cannot be reused for other values
    return None if p is None else (p, p._version, p.data_ptr(), p.dtype, p.device, p.detach(), p.shape, p.stride())


def _unchanged(params: Parameters, before: tuple[Any, ...]) -> bool:
    if len(params) != len(before):
        return False
    for p, seen in zip(params, before, strict=True):
        if p is None or seen is None:
            if p is not seen:
                return False
        elif (
            p is not seen[0]
            or p._version != seen[1]
            or p.data_ptr() != seen[2]
            or p.dtype != seen[3]
            or p.device != seen[4]
        ):
            return False
    return True


def _same(params: Parameters, content: torch.Tensor, kept: _Kept) -> bool:
    """Return True if `params`, of checksum `content`, are the parameters of `kept` and hold the same bits."""
    if kept.content is None or not _unchanged(params, kept.seen):
        return False
    if not all(p is None or (p.shape, p.stride()) == seen[6:] for p, seen in zip(params, kept.seen, strict=True)):
        return False
    return torch.equal(content, kept.content)


def _can_keep(params: Parameters) -> bool:
    """Return True if values computed from `params` now are plain values that serve other calls."""
    given = [p for p in params if p is not None]
    device = given[0].device
    for p in given:  # an inference tensor has no version counter
        if type(p) not in PLAIN or p.is_meta or p.is_inference() or p.device != device or p.layout != torch.strided:
            return False
    if active_transform():
        return False
    return device.type != "cuda" or not torch.cuda.is_current_stream_capturing()


@functools.lru_cache(maxsize=16)
def _odd(count: int, device: torch.device) -> torch.Tensor:
    """Return `count` fixed random odd numbers (count,) int64."""
    numbers = torch.randint(
        -(2**62), 2**62, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int64
    )
    return (2 * numbers + 1).to(device)


def _checksum(params: Parameters) -> torch.Tensor:
    """Return a checksum of the parameters' bits, int64. It does not synchronise.

        sum_ij bits[i, j] row[i] column[j]   mod 2^64, with random odd row and column

    over rows of 4096 numbers. Every change of one number changes it, because an odd factor is invertible. Other changes
    go unnoticed with a probability of about 2^-33.
    """
    with torch.inference_mode(False), torch.no_grad():
        flat = [p.detach().contiguous().view(-1).view(_INTEGERS[p.element_size()]) for p in params if p is not None]
        small = [bits for bits in flat if bits.numel() < _AT_ONCE["cpu"]]  # one product for all of them
        large = [bits for bits in flat if bits.numel() >= _AT_ONCE["cpu"]]
        return torch.stack([_hash(bits) for bits in (*large, *([torch.cat(small)] if small else []))])


def _hash(bits: torch.Tensor) -> torch.Tensor:
    column = _odd(_COLUMNS, bits.device)
    whole = bits.numel() // _COLUMNS
    rows = bits[: whole * _COLUMNS].view(whole, _COLUMNS)
    rest = bits[whole * _COLUMNS :]
    at_once = _AT_ONCE.get(bits.device.type, _AT_ONCE_ELSEWHERE) // _COLUMNS
    # torch multiplies int64 matrices on a CPU only; there it is a third faster
    times = torch.mv if bits.is_cpu else lambda part, column: (part * column).sum(1)
    sums = [times(part.long(), column) for part in rows.split(at_once)]
    sums.append((rest.long() * column[: rest.numel()]).sum(0, keepdim=True))
    total = torch.cat(sums)
    return (total * _odd(total.numel(), bits.device)).sum()
