"""X1 to X3: the attention core, with plain masks and with the intervals of two tokenizers; X5's decode core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from calm_fast import ops
from calm_fast._ops.cross_attention.native import NATIVE_MAX_QUERIES
from calm_fast.benchmarks.baselines.cross_attention import explicit_attention, visible
from calm_fast.benchmarks.cases.alignment import aligned_intervals
from calm_fast.benchmarks.graphs import graphed
from calm_fast.benchmarks.registry import CannotRunError, Case, Contestant, Inputs, Target, Thunk, Values
from calm_fast.core import native_library

OP = "cross_attention"
_BACKENDS = {
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
}
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class CoreShape:
    """(B, M, H, D) queries against (B, N, H, D) keys. documents > 0: the intervals of that many packed documents."""

    b: int
    m: int
    n: int
    h: int
    d: int
    causal: bool = False
    train: bool = False
    documents: int = 0

    def sizes(self) -> dict[str, int]:
        names = {"B": self.b, "M": self.m, "N": self.n, "H": self.h, "D": self.d}
        return names | ({"documents": self.documents} if self.documents else {"causal": int(self.causal)})

    def intervals(self, seed: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return lo, hi (B, M) int32 on the CPU, a different text per sequence, or None if the mask is plain."""
        if not self.documents:
            return None
        rows = [aligned_intervals(self.m, self.n, self.documents, seed + b) for b in range(self.b)]
        lo, hi = (torch.stack(bounds) for bounds in zip(*rows, strict=True))
        return lo, hi

    def flops(self, seed: int = 0) -> int:
        """Count two products over the visible pairs, and five more in backward (the scores are recomputed)."""
        if (bounds := self.intervals(seed)) is not None:
            pairs = int((bounds[1] - bounds[0]).sum())
        else:
            pairs = self.b * (self.m * (self.m + 1) // 2 if self.causal else self.m * self.n)
        forward = 4 * pairs * self.h * self.d
        return forward * 7 // 2 if self.train else forward

    def bytes(self, itemsize: int) -> int:
        """Count q, k, v and out once; training also reads dout and writes three gradients."""
        rows, keys = (self.b * t * self.h * self.d for t in (self.m, self.n))
        return itemsize * (2 * rows + 2 * keys) + (itemsize * (2 * rows + 2 * keys) if self.train else 0)


def _make(s: CoreShape, dtype: torch.dtype, device: torch.device) -> Callable[[int], Inputs]:
    def make(seed: int) -> Inputs:
        g = torch.Generator(device).manual_seed(seed)
        lengths = {"q": s.m, "k": s.n, "v": s.n} | ({"dout": s.m} if s.train else {})
        inputs = {
            name: torch.randn(s.b, s.h, t, s.d, generator=g, device=device).to(dtype).transpose(1, 2)
            for name, t in lengths.items()
        }
        if s.m > 1:  # as from a projection; a single query reads a cache, which transformers stores head by head
            inputs = {name: t.contiguous() for name, t in inputs.items()}
        if (bounds := s.intervals(0)) is not None:  # always the text that `flops` counted
            inputs["lo"], inputs["hi"] = (t.to(device) for t in bounds)
        return inputs

    return make


def _thunk(attention: Attention, inputs: Inputs, s: CoreShape) -> Thunk:
    """Return the thunk that runs `attention`, which maps (B, tokens, H, D) tensors to (B, M, H, D)."""
    leaves = [inputs[name].detach().requires_grad_(s.train) for name in "qkv"]

    def forward() -> Values:
        with torch.no_grad():
            return {"out": attention(*leaves)}

    def step() -> Values:
        out = attention(*leaves)
        grads = torch.autograd.grad(out, leaves, inputs["dout"])
        return {"out": out.detach(), **{f"d_{name}": g for name, g in zip("qkv", grads, strict=True)}}

    return step if s.train else forward


def _heads_first(attend: Attention) -> Attention:
    """Adapt a baseline that takes (B, H, tokens, D)."""
    return lambda q, k, v: attend(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def _ours(s: CoreShape, impl: str) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        lo, hi = inputs.get("lo"), inputs.get("hi")

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return ops.cross_attention(q, k, v, lo=lo, hi=hi, causal=s.causal, impl=impl)

        return _thunk(attention, inputs, s)

    return prepare


def _mask(s: CoreShape, inputs: Inputs) -> torch.Tensor | None:
    mask = visible(s.m, s.n, inputs["q"].device, inputs.get("lo"), inputs.get("hi"), s.causal)
    if mask is None or not s.documents:
        return mask
    return mask | ~mask.any(-1, keepdim=True)  # softmax of an empty row is NaN; `_erase` writes 0 there


def _erase(s: CoreShape, inputs: Inputs, attend: Attention) -> Attention:
    """Return `attend` with 0 in rows without a visible key, as a user of a masked baseline must write them."""
    if not s.documents:
        return attend
    empty = (inputs["lo"] >= inputs["hi"])[:, None, :, None]
    return lambda q, k, v: attend(q, k, v).masked_fill(empty, 0.0)


def _eager(s: CoreShape) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        mask = _mask(s, inputs)
        attend = _erase(s, inputs, lambda q, k, v: explicit_attention(q, k, v, mask, s.d**-0.5))
        return _thunk(_heads_first(attend), inputs, s)

    return prepare


def _sdpa(s: CoreShape, backend: SDPBackend | None = None) -> Callable[[Inputs], Thunk]:
    def prepare(inputs: Inputs) -> Thunk:
        mask = _mask(s, inputs) if s.documents else None

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=s.causal)

        thunk = _thunk(_heads_first(_erase(s, inputs, attend)), inputs, s)
        if backend is None:
            return thunk

        def pinned() -> Values:
            with sdpa_kernel(backend):
                return thunk()

        try:
            pinned()
        except RuntimeError as refusal:
            raise CannotRunError(f"SDPA's {backend.name} refuses this case: {refusal}") from refusal
        return pinned

    return prepare


def _flex(s: CoreShape) -> Callable[[Inputs], Thunk]:
    """Prepare compiled FlexAttention with its block mask built beforehand: users build one per batch, not per layer."""

    def prepare(inputs: Inputs) -> Thunk:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        device = inputs["q"].device
        if s.train and device.type == "cpu":
            raise CannotRunError("FlexAttention has no backward on a CPU")
        if s.documents:
            lo, hi = inputs["lo"], inputs["hi"]

            def keep(b: torch.Tensor, h: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
                return (lo[b, i] <= j) & (j < hi[b, i])

            block_mask = create_block_mask(keep, s.b, None, s.m, s.n, device=device)
        elif s.causal:
            block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, s.m, s.n, device=device)
        else:
            block_mask = None
        compiled = torch.compile(flex_attention, dynamic=False)
        return _thunk(_heads_first(lambda q, k, v: compiled(q, k, v, block_mask=block_mask)), inputs, s)

    return prepare


def _definition(s: CoreShape) -> Callable[[Inputs, torch.dtype], Values]:
    """Return explicit attention, one sequence at a time: float64 scores of a whole batch would not fit."""

    def values(inputs: Inputs, dtype: torch.dtype) -> Values:
        parts = []
        for b in range(s.b):
            one = {n: t[b : b + 1].to(dtype) if t.is_floating_point() else t[b : b + 1] for n, t in inputs.items()}
            parts.append(_eager(replace(s, b=1))(one)())
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    return values


def core_case(
    name: str,
    s: CoreShape,
    dtype: torch.dtype,
    device: torch.device,
    targets: Sequence[Target] = (),
    *,
    flex: bool = False,
) -> Case:
    """Return a case of the attention core, on a GPU against every SDPA backend and compiled FlexAttention.

    flex: also compiled FlexAttention on a CPU, where torch supports only inference.
    """
    impls = ["auto", "torch"]
    few = s.m <= NATIVE_MAX_QUERIES or device.type == "cpu"
    if few and native_library.obstacle(OP, device.type) is None:
        impls.append("native")
    contestants = [Contestant(impl, _ours(s, impl), ours=True) for impl in impls]
    if device.type == "cuda":
        contestants.append(Contestant("triton", _ours(s, "triton"), ours=True))
        contestants.append(Contestant("flex_attention", _flex(s)))
    if s.documents:  # flash attention takes no mask: SDPA chooses among the others
        contestants.append(Contestant("sdpa_dense_mask", _sdpa(s)))
    elif device.type == "cuda":
        contestants += [Contestant(label, _sdpa(s, backend)) for label, backend in _BACKENDS.items()]
    else:
        contestants.append(Contestant("sdpa", _sdpa(s)))
    contestants.append(Contestant("eager", _eager(s)))
    if flex:
        contestants.append(Contestant("flex_attention", _flex(s)))
    headline = "triton" if device.type == "cuda" else "auto"
    small = _make(replace(s, b=1), dtype, device) if s.b > 1 else None
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), _make(s, dtype, device), tuple(contestants),
        _definition(s), headline, small, targets,
    )  # fmt: skip


def decode_case(name: str, s: CoreShape, dtype: torch.dtype, device: torch.device) -> Case:
    """Return the attention core of a decode step on a GPU, all as CUDA graphs: launches cost as much as bytes."""

    def captured(prepare: Callable[[Inputs], Thunk]) -> Callable[[Inputs], Thunk]:
        return lambda inputs: graphed(prepare(inputs))

    impls = ["torch", "triton"] + ["native"] * (native_library.obstacle(OP, device.type) is None)
    contestants = [Contestant(f"{impl}_graph", captured(_ours(s, impl)), ours=True) for impl in impls]
    contestants += [Contestant(f"{label}_graph", captured(_sdpa(s, backend))) for label, backend in _BACKENDS.items()]
    contestants.append(Contestant("eager_graph", captured(_eager(s))))
    small = _make(replace(s, b=1), dtype, device) if s.b > 1 else None
    return Case(
        OP, name, s.sizes(), dtype, s.flops(), s.bytes(dtype.itemsize), _make(s, dtype, device), tuple(contestants),
        _definition(s), "triton_graph", small, (),
    )  # fmt: skip
