"""Cases of cross_attention and the rounding analysis of its forward and backward."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from calm_fast._ops.cross_attention.native import NATIVE_MAX_QUERIES
from calm_fast._ops.cross_attention.reference import interval_mask
from calm_fast.core.numerics import Case, Inputs, Rounding, Values, sum_variance

Bounds = dict[str, Any]  # causal, lo, hi


@dataclass(frozen=True)
class Spec:
    """Sizes and features of one case; `mask` returns causal, lo and hi for (B, M, N, generator)."""

    b: int
    m: int
    n: int
    h: int
    d: int
    mask: Callable[[int, int, int, torch.Generator], Bounds]
    hkv: int | None = None
    scale: float | None = None
    strided: bool = False
    lse: bool = True
    magnitude: float = 1.0
    hidden: float | None = None  # value of the keys that nobody sees and of the rows that see nothing


def full(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """Every query sees every key."""
    return {}


def causal(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """The last query sees every key, each earlier one a key less."""
    return {"causal": True}


def scattered(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """Random intervals, not monotone; about a fifth of the rows is empty, some with lo > hi."""
    a, c = (torch.randint(0, n + 1, (b, m), generator=g) for _ in range(2))
    lo, hi = torch.minimum(a, c), torch.maximum(a, c)
    swap = torch.rand(b, m, generator=g) < 0.2
    return {"lo": torch.where(swap, hi, lo).int(), "hi": torch.where(swap, lo, hi).int()}


def monotone(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """Two tokenizers: hi grows by uneven steps, and the first two rows see no key."""
    hi = torch.randint(0, 2 * n // m + 2, (b, m), generator=g).cumsum(1).clamp(max=n)
    hi[:, :2] = 0
    return {"hi": hi.int()}


def left_padding(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """Causal sequences behind padding of different lengths."""
    pad = torch.arange(b) * 3 % n
    position = torch.arange(m) + 1 + n - m
    hi = position.clamp(0, n).expand(b, m)
    return {"lo": torch.minimum(pad[:, None], hi).int(), "hi": hi.int()}


def right_padding(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """Full attention over sequences of different lengths."""
    return {"hi": (n - torch.arange(b) * 4 % n)[:, None].expand(b, m).int()}


def packed(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """Three documents one after the other, causal within each, the same for the whole batch: bounds are (M,)."""
    position = torch.arange(m)
    start = (position >= m // 4) * (m // 4) + (position >= 2 * m // 3) * (2 * m // 3 - m // 4)
    return {"lo": (start * n // m).int(), "hi": ((position + 1) * n // m).int()}


def window(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """A causal sliding window of six keys."""
    hi = (torch.arange(m) + 1 + n - m).clamp(0, n)
    return {"lo": (hi - 6).clamp(min=0).int(), "hi": hi.int()}


def unwritten_end(b: int, m: int, n: int, g: torch.Generator) -> Bounds:
    """A buffer of which the first part is written, ever more of it seen; every fourth row is padding."""
    hi = 1 + torch.arange(m) * (2 * n // 3) // m
    return {"hi": torch.where(torch.arange(m) % 4 == 3, 0, hi).int()}


_SPECS: dict[str, Spec] = {
    "full": Spec(2, 5, 7, 2, 16, full),
    "single": Spec(1, 1, 1, 1, 16, full),
    "causal": Spec(1, 37, 37, 2, 24, causal),
    "causal-more-keys": Spec(1, 5, 19, 2, 16, causal),
    "causal-more-queries": Spec(1, 19, 5, 2, 16, causal),
    "scattered": Spec(2, 33, 41, 2, 16, scattered),
    "monotone-blocks": Spec(1, 70, 150, 1, 16, monotone),
    "left-padding": Spec(3, 13, 13, 1, 16, left_padding),
    "right-padding": Spec(3, 11, 17, 1, 16, right_padding),
    "packed": Spec(2, 36, 36, 1, 16, packed),
    "window": Spec(1, 23, 31, 1, 16, window),
    "decode": Spec(2, 1, 131, 4, 64, full, hkv=2),
    "decode-intervals": Spec(3, 1, 131, 2, 16, scattered),
    "decode-gqa-causal": Spec(2, 5, 70, 8, 24, causal, hkv=2),
    "decode-splits": Spec(1, 2, 2100, 2, 8, scattered, hkv=1),
    "decode-dim256": Spec(1, 3, 45, 2, 256, scattered),
    "gqa": Spec(1, 17, 29, 6, 16, scattered, hkv=2),
    "mqa-causal": Spec(1, 19, 19, 4, 16, causal, hkv=1),
    "no-keys": Spec(2, 3, 0, 2, 16, full),
    "strided": Spec(2, 13, 17, 4, 16, scattered, hkv=2, strided=True),
    "strided-causal": Spec(2, 13, 13, 2, 16, causal, strided=True),
    "sharp": Spec(1, 9, 21, 1, 16, scattered, magnitude=12.0),
    "negative-scale": Spec(1, 9, 21, 1, 16, scattered, scale=-0.3),
    "dim64": Spec(1, 17, 23, 1, 64, scattered),
    "dim80": Spec(1, 17, 23, 1, 80, scattered),
    "dim128": Spec(1, 17, 23, 1, 128, scattered),
    "hidden-nan": Spec(1, 41, 83, 2, 16, unwritten_end, hkv=1, hidden=float("nan")),
    "hidden-inf": Spec(1, 41, 83, 1, 16, unwritten_end, hidden=float("inf")),
    "decode-hidden-nan": Spec(2, 6, 83, 2, 16, unwritten_end, hkv=1, hidden=float("nan")),
}
# half precision proves the casts; float32, where bounds are tightest, proves the logic
_HALF = ("full", "causal", "scattered", "monotone-blocks", "decode", "gqa", "negative-scale", "dim64", "dim80")


class CrossAttentionCases:
    """See `calm_fast.core.numerics.OpCases`."""

    op = "cross_attention"
    impls = ("torch", "triton", "native")
    cuda_kernels = True

    def cases(self) -> list[Case]:
        """Return every spec in float32, with and without lse, and some in half precision."""
        found = [self.case(name, torch.float32) for name in _SPECS]
        # without lse the torch implementation takes another path, and the kernels skip a gradient
        found += [self.case(name, torch.float32, lse=False) for name in _SPECS]
        for dtype in (torch.bfloat16, torch.float16):
            found += [self.case(name, dtype, lse=i % 2 == 0) for i, name in enumerate(_HALF)]
        return found

    def fits(self, case: Case, impl: str, device: str) -> bool:
        """Return False for native on a GPU with more queries than its decode kernel takes."""
        few: bool = case.spec.m <= NATIVE_MAX_QUERIES
        return impl != "native" or device == "cpu" or few

    def case(self, name: str, dtype: torch.dtype, **changes: Any) -> Case:
        """Return the case `name` with fields of its Spec changed."""
        spec = replace(_SPECS[name], **changes)
        return Case(self.op, name if spec.lse else f"{name}, no lse", dtype, spec)

    def build(self, case: Case, device: torch.device) -> dict[str, Any]:
        """Return q, k, v, bounds and the upstream gradients dout and dlse (None without lse), from a fixed seed."""
        s: Spec = case.spec
        g = torch.Generator().manual_seed(zlib.crc32(repr((s.b, s.m, s.n, s.h, s.d, s.mask.__name__)).encode()))
        hkv = s.hkv or s.h

        def normal(*shape: int, size: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=g) * size).to(device, case.dtype)

        if s.strided:  # heads first, and k and v as halves of one tensor
            q = normal(s.b, s.h, s.m, s.d, size=s.magnitude).transpose(1, 2)
            k, v = normal(s.b, s.n, hkv, 2 * s.d).chunk(2, dim=-1)
        else:
            q = normal(s.b, s.m, s.h, s.d, size=s.magnitude)
            k, v = normal(s.b, s.n, hkv, s.d), normal(s.b, s.n, hkv, s.d)
        # upstream gradients differ in size from row to row, so that mixed-up rows show
        dout = normal(s.b, s.m, s.h, s.d) * (0.5 + torch.arange(s.m, device=device) % 3)[:, None, None].to(case.dtype)
        dlse = normal(s.b, s.h, s.m).float() if s.lse else None
        bounds = {"causal": False, "lo": None, "hi": None, **s.mask(s.b, s.m, s.n, g)}
        bounds = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in bounds.items()}
        inputs = {"q": q, "k": k, "v": v, **bounds, "scale": s.scale, "dout": dout, "dlse": dlse}
        return inputs if s.hidden is None else _with_hidden(inputs, s.hidden)

    def run(self, inputs: Inputs, impl: str) -> Values:
        """Return out, lse (if wanted) and the gradients of the public op."""
        from calm_fast.ops import cross_attention

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            options = {name: inputs[name] for name in ("causal", "lo", "hi", "scale")}
            result = cross_attention(q, k, v, **options, return_lse=inputs["dlse"] is not None, impl=impl)
            return result if isinstance(result, tuple) else (result,)

        return _with_gradients(call, inputs)

    def eager(self, inputs: Inputs) -> Values:
        """Return softmax attention as a user writes it: every product and the softmax in q's dtype."""

        inputs = _with_hidden(inputs, 0.0)  # it is no judge of hidden numbers

        def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
            group = q.shape[2] // k.shape[2]
            k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
            scale = q.shape[-1] ** -0.5 if inputs["scale"] is None else inputs["scale"]
            visible, empty = _visible(inputs)
            scores = torch.einsum("bmhd,bnhd->bhmn", q, k) * scale
            scores = scores.masked_fill(~visible & ~empty, float("-inf"))
            probs = scores.softmax(dim=-1).masked_fill(empty, 0.0)
            out = torch.einsum("bhmn,bnhd->bmhd", probs, v)
            if inputs["dlse"] is None:
                return (out,)
            lse = scores.to(inputs["dlse"].dtype).logsumexp(-1).masked_fill(empty.squeeze(-1), float("-inf"))
            return out, lse

        return _with_gradients(call, inputs)

    def exact(self, inputs: Inputs) -> Values:
        """Return the exact elements: of queries without keys (out, dq 0; lse -inf) and keys without queries."""
        q, k = inputs["q"], inputs["k"]
        visible, empty = (t.expand(q.shape[0], -1, -1, -1).squeeze(1) for t in _visible(inputs))  # (B, M, N or 1)
        rows = empty[..., None].expand(q.shape)
        keys = ~visible.any(dim=1)[..., None, None].expand(k.shape)
        found = {"out": rows, "dq": rows, "dk": keys, "dv": keys}
        if inputs["dlse"] is not None:
            found["lse"] = empty.transpose(1, 2).expand(q.shape[0], q.shape[2], q.shape[1])
        return found

    def rounding(self, inputs: Inputs) -> dict[str, Rounding]:
        """Return the first-order analysis; see `_rounding`."""
        return _rounding(_with_hidden(inputs, 0.0))


def _with_gradients(call: Callable[..., tuple[torch.Tensor, ...]], inputs: Inputs) -> Values:
    leaves = [inputs[name].detach().requires_grad_() for name in ("q", "k", "v")]
    results = call(*leaves)
    upstream = [inputs["dout"], inputs["dlse"]][: len(results)]
    grads = torch.autograd.grad(results, leaves, [u.to(r.dtype) for u, r in zip(upstream, results, strict=True)])
    names = ["out", "lse"][: len(results)] + ["dq", "dk", "dv"]
    return dict(zip(names, (*(r.detach() for r in results), *grads), strict=True))


def _with_hidden(inputs: Inputs, value: float) -> dict[str, Any]:
    """Return the inputs with `value` in the keys that no query sees and in the rows that see none."""
    visible, empty = (t.squeeze(1) for t in _visible(inputs))  # (1 or B, M, N or 1)
    rows = empty.unsqueeze(-1)
    keys = ~visible.any(dim=1)[..., None, None]
    found = dict(inputs)
    for name, mask in (("q", rows), ("dout", rows), ("k", keys), ("v", keys)):
        found[name] = inputs[name].masked_fill(mask, value)
    if inputs["dlse"] is not None:
        found["dlse"] = inputs["dlse"].masked_fill(empty.mT, value)
    return found


def _visible(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which keys each query sees (1 or B, 1, M, N), and which queries see none (1 or B, 1, M, 1)."""
    q, k = inputs["q"], inputs["k"]
    mask = interval_mask(inputs["lo"], inputs["hi"], inputs["causal"], q.shape[1], k.shape[1], q.device).unsqueeze(1)
    return mask, ~mask.any(dim=-1, keepdim=True)


def _rounding(inputs: Inputs) -> dict[str, Rounding]:
    """Return first-order variances of: scores in float32 -> P -> O = P V; delta = dO.O, dS = P (dP - delta + dlse).

    P and dS are rounded to the inputs' dtype as operands of a product, and O before delta reads it. Tensors are
    (B, H, M or N, ...). `var_x` is x's share of A (squares per float32 roundoff), `in_x` its share of R.
    """
    q, k, v, dout = (inputs[name].transpose(1, 2) for name in ("q", "k", "v", "dout"))
    (_, _, m, d), n = q.shape, k.shape[2]
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, dim=1) for t in (k, v))
    scale = d**-0.5 if inputs["scale"] is None else inputs["scale"]
    visible, empty = _visible(inputs)
    scores = q @ k.mT * scale
    hidden = scores.masked_fill(~visible & ~empty, float("-inf"))
    p = hidden.softmax(-1).masked_fill(empty, 0.0)
    lse = hidden.logsumexp(-1, keepdim=True).masked_fill(empty, 0.0)
    out = p @ v

    # a score: its product over D, then scale, base change and (up to twice as large) the distance to the maximum
    top = scores.masked_fill(~visible, 0.0).square()
    top = top.amax(-1, keepdim=True) if n else top.sum(-1, keepdim=True)
    var_s = sum_variance(d, q.abs() @ k.abs().mT * scale) + 6 * top
    # the normaliser sums N exponentials (2 roundoffs each) and is rescaled on the way; then the log, then lse itself
    var_lse = (p.square() * (var_s + 4)).sum(-1, keepdim=True) + 2 * (n + 2) / 3 + 4 + lse.square()
    var_p = 2 * p.square() * (var_s + var_lse + 4)  # 2: a score's error is also part of its row's lse
    var_out = 2 * (p.square() * (var_s + 4)) @ v.square() + 2 * out.square() * var_lse
    var_out = var_out + 2 * sum_variance(n, p @ v.abs())
    in_out = p.square() @ v.square()

    dp, delta = dout @ v.mT, (dout * out).sum(-1, keepdim=True)
    dlse = torch.zeros_like(delta) if inputs["dlse"] is None else inputs["dlse"].unsqueeze(-1)
    t = dp - delta + dlse
    ds = (p * t).abs()
    # independent from key to key; common to a row are delta, which reads the rounded O, and lse (relative)
    var_ds = p.square() * (sum_variance(d, dout.abs() @ v.abs().mT) + 2 * dp.square() + t.square())
    var_ds = var_ds + var_p * t.square()
    var_delta = sum_variance(d, (dout * out).abs().sum(-1, keepdim=True)) + 2 * delta.square() + dlse.square()
    var_delta = var_delta + (dout.square() * var_out).sum(-1, keepdim=True)
    in_delta = (dout.square() * (out.square() + in_out)).sum(-1, keepdim=True)
    s2, shared = scale**2, (p @ k).square()

    var_dq = var_ds @ k.square() + var_delta * shared + sum_variance(n, ds @ k.abs())
    var_dq = var_dq + 2 * ((p * t) @ k).square() * var_lse
    in_dq = ds.square() @ k.square() + in_delta * shared
    var_dk = (var_ds + p.square() * var_delta).mT @ q.square()
    in_dk = (ds.square() + p.square() * in_delta).mT @ q.square()

    def rows(x: torch.Tensor) -> torch.Tensor:  # (B, H, M, D) -> (B, M, H, D)
        return x.transpose(1, 2)

    def keys(x: torch.Tensor) -> torch.Tensor:  # (B, H, N, D) -> (B, N, Hkv, D): the sum over the heads of a group
        return x.unflatten(1, (-1, group)).sum(2).transpose(1, 2)

    def sums(x: torch.Tensor) -> torch.Tensor:
        return sum_variance(m * group, keys(x))

    return {
        "out": Rounding(rows(in_out), rows(var_out)),
        "lse": Rounding(0.0, var_lse.squeeze(-1)),
        "dq": Rounding(s2 * rows(in_dq), s2 * rows(var_dq)),
        "dk": Rounding(s2 * keys(in_dk), s2 * (keys(var_dk) + sums(ds.mT @ q.abs()))),
        "dv": Rounding(keys(p.square().mT @ dout.square()), keys(var_p.mT @ dout.square()) + sums(p.mT @ dout.abs())),
    }


CASES = CrossAttentionCases()
