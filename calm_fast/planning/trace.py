"""One training step on the meta device: its FLOPs, the bytes that its ops touch, and the memory that it holds.

Tensors on the meta device have shapes and no values, so a step of any size takes milliseconds per layer and no memory.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry

_SDPA = torch.nn.functional.scaled_dot_product_attention
_GROUPED = ("grouped_mm", "_grouped_mm")  # as releases of torch name it


@dataclass
class Trace:
    """What a piece of work costs.

    calls: (FLOPs, bytes read and written, dtype of the product) of every op that computes. live, peak: bytes of the
    tensors that it made: now, and at most. marks: live bytes at named moments.
    """

    calls: list[tuple[int, int, torch.dtype]] = field(default_factory=list)
    live: int = 0
    peak: int = 0
    marks: dict[str, int] = field(default_factory=dict)
    fused: Any = None

    @property
    def flops(self) -> int:
        """Return the FLOPs of all products; a multiplication and an addition are two."""
        return sum(flops for flops, _, _ in self.calls)

    @property
    def bytes(self) -> int:
        """Return the bytes that all ops read and write."""
        return sum(moved for _, moved, _ in self.calls)

    def mark(self, name: str) -> None:
        """Keep the live bytes of this moment."""
        self.marks[name] = self.live

    def checkpoint(self, run: Callable[..., Any], *args: Any) -> Any:
        """Run a layer as ``torch.utils.checkpoint`` does, traced when it is recomputed too."""

        def traced(*inputs: Any) -> Any:
            with self.fused:  # autograd recomputes without it
                return run(*inputs)

        # a meta device has no random state to keep
        return checkpoint(traced, *args, use_reentrant=False, preserve_rng_state=False)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Attention(torch.autograd.Function):
    """softmax(q k^T) v as a fused kernel runs it: no scores are kept, backward computes them once more."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recorder: _Recorder) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.recorder = recorder
        scores = q.shape[:-1].numel() * k.shape[-2]
        recorder.add(2 * scores * (q.shape[-1] + v.shape[-1]), (q, k, v, out, lse))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        found = (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
        scores = q.shape[:-1].numel() * k.shape[-2]
        # scores again, dv and dp of width v; dq and dk of width q
        flops = 2 * scores * (3 * q.shape[-1] + 2 * v.shape[-1])
        ctx.recorder.add(flops, (q, k, v, out, lse, *grads, *found))
        return *found, None


class _Grouped(torch.autograd.Function):
    """Products of groups of rows (T, K) with a matrix for each group (E, K, N), as experts run them; any dtype."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weights: torch.Tensor, recorder: _Recorder) -> torch.Tensor:
        out = rows.new_empty(rows.shape[0], weights.shape[-1])
        # as torch does: rows are kept only for the gradient of the weights
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights)
        ctx.recorder, ctx.shape = recorder, rows.shape
        recorder.add(2 * rows.numel() * weights.shape[-1], (rows, weights, out))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        _, weights = ctx.saved_tensors
        found: list[torch.Tensor | None] = [None, None]
        for place, shape in enumerate((ctx.shape, weights.shape)):
            if ctx.needs_input_grad[place]:
                found[place] = made = weights.new_empty(shape)
                ctx.recorder.add(2 * ctx.shape.numel() * weights.shape[-1], (weights, *grads, made))
        return *found, None


class _Fused(TorchFunctionMode):
    """Puts `_Attention` and `_Grouped` in the place of torch's, whose kernels are chosen by the device.

    A truth value that a model asks for is True: of rows without padding every token is real, and no row is packed.
    """

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__bool__ and args[0].is_meta:
            return True
        if getattr(func, "__name__", "") in _GROUPED and args[0].is_meta:
            return _Grouped.apply(args[0], args[1], self.recorder)
        if func is not _SDPA:
            return func(*args, **kwargs)
        q, k, v = (args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("query", "key", "value")))
        return _Attention.apply(q, k, v, self.recorder)


class _Recorder(TorchDispatchMode):
    """Adds every op to a Trace, and counts the storages that live."""

    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.known: set[int] = set()
        self.foreign: dict[int, torch.UntypedStorage] = {}  # weights and inputs, made before

    def add(self, flops: int, tensors: tuple[torch.Tensor, ...]) -> None:
        self.trace.calls.append((flops, sum(t.numel() * t.element_size() for t in tensors), tensors[0].dtype))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        read = list(_tensors((args, kwargs)))
        for tensor in read:
            storage = tensor.untyped_storage()
            if id(storage) not in self.known:
                self.foreign[id(storage)] = storage
        out = func(*args, **kwargs)
        made = list(_tensors(out))
        for tensor in made:
            self._hold(tensor)
        if func.is_view or not made:
            return out
        formula = flop_registry.get(func.overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=out)) if formula is not None else 0
        if flops or not all(any(t is other for other in read) for t in made):
            self.add(flops, (*read, *made) if read else tuple(made))
        return out

    def _hold(self, tensor: torch.Tensor) -> None:
        if tensor.device.type != "meta":
            return
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()  # torch keeps one Python object per storage
        if key in self.known or key in self.foreign:
            return
        self.known.add(key)
        self.trace.live += size
        self.trace.peak = max(self.trace.peak, self.trace.live)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.trace.live -= size


def trace_step(run: Callable[[Trace], Any]) -> Trace:
    """Return the Trace of ``run(trace)``, which works with tensors on the meta device made before."""
    trace = Trace()
    recorder = _Recorder(trace)
    trace.fused = _Fused(recorder)
    with warnings.catch_warnings(), trace.fused, recorder:
        warnings.simplefilter("ignore")  # an implementation that another device would choose
        run(trace)
    return trace
