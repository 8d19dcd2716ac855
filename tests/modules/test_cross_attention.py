"""CrossAttention against its equation in float64, with folding and a cache, and against the released hook."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from calm_fast import CrossAttention, fixed_weights, ops
from calm_fast.modules import cross_attention as module_under_test
from calm_fast.modules import cross_attention_weights as weights

DB, DA, H, B, M, N = 24, 20, 4, 2, 7, 9
OPTIONS = {
    "plain": {},
    "bias": {"bias": True},
    "no_proj": {"proj": False, "bias": True},
    "no_norm": {"pre_norm": False},
    "post_norm": {"post_norm": True},
    "post_norm_bias": {"post_norm": True, "bias": True},
    "gqa": {"num_kv_heads": 2, "head_dim": 10},
}


def _layer(dtype: torch.dtype = torch.float64, **options) -> CrossAttention:
    """Return a layer with every parameter away from its initial value."""
    torch.manual_seed(0)
    layer = CrossAttention(DB, DA, H, **options).to(dtype)
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return layer


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    anchor = torch.randn(B, M, DB, generator=g, dtype=torch.float64).to(dtype)
    augmenter = torch.randn(B, N, DA, generator=g, dtype=torch.float64).to(dtype)
    lo = torch.randint(0, 4, (B, M), generator=g, dtype=torch.int32)
    hi = torch.randint(2, N + 1, (B, M), generator=g, dtype=torch.int32)
    hi[0, 0] = 0  # one query sees no key
    return anchor, augmenter, lo, hi


def _equation(layer: CrossAttention, anchor, augmenter, lo, hi) -> torch.Tensor:
    """Compute the layer's equation product by product: no folding, no fused residual, a loop over queries."""
    p = dict(layer.named_parameters())

    def norm(x, name):
        rms = (x * x).mean(-1, keepdim=True).add(layer.eps).sqrt()
        return x / rms * p[f"{name}.weight"]

    def linear(x, name):
        y = x @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    inner = linear(augmenter, "proj") if layer.proj is not None else augmenter
    heads, d, group = layer.num_heads, layer.head_dim, layer.num_heads // layer.num_kv_heads
    q = linear(norm(anchor, "norm") if layer.norm is not None else anchor, "q_proj").view(B, M, heads, d)
    k = linear(inner, "k_proj").view(B, N, -1, d)
    v = linear(inner, "v_proj").view(B, N, -1, d)
    rows = []
    for b, i in itertools.product(range(B), range(M)):
        low, high = int(lo[b, i]), int(hi[b, i])
        if low >= high:
            rows.append(anchor[b, i])
            continue
        parts = []
        for h in range(heads):
            s = (k[b, low:high, h // group] @ q[b, i, h]) / d**0.5
            parts.append(s.softmax(0) @ v[b, low:high, h // group])
        update = linear(torch.cat(parts), "o_proj")
        rows.append(anchor[b, i] + (norm(update, "post_norm") if layer.post_norm is not None else update))
    return torch.stack(rows).view(B, M, DB)


@pytest.mark.parametrize("fold", [True, False], ids=["folded", "unfolded"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_output_and_every_gradient_match_the_equation(options: dict, fold: bool, monkeypatch) -> None:
    monkeypatch.setattr(weights, "folding_pays", lambda *_: fold)
    layer = _layer(**options)
    anchor, augmenter, lo, hi = _inputs()
    leaves = [anchor.requires_grad_(), augmenter.requires_grad_(), *layer.parameters()]
    upstream = torch.randn(B, M, DB, dtype=torch.float64)
    got, want = layer(anchor, augmenter, lo, hi), _equation(layer, anchor, augmenter, lo, hi)
    # float64: a few hundred products, each within 1e-16 of magnitudes around 10
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    names = ["anchor", "augmenter", *(n for n, _ in layer.named_parameters())]
    pairs = zip(torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True)
    for name, (g, w) in zip(names, pairs, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_kept_folded_weights_give_the_same_and_follow_changes(options: dict) -> None:
    layer = _layer(**options)
    inputs = _inputs()
    for _ in range(2):
        want = _equation(layer, *inputs)
        with torch.no_grad(), fixed_weights(layer):
            first, second = layer(*inputs), layer(*inputs)
        assert torch.equal(first, second)
        torch.testing.assert_close(first, want, rtol=1e-11, atol=1e-11)
        with torch.no_grad():
            for p in layer.parameters():
                p.mul_(1.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_a_new_layer_is_the_identity_bit_for_bit(options: dict, dtype: torch.dtype) -> None:
    layer = CrossAttention(DB, DA, H, **options).to(dtype)
    anchor, augmenter, lo, hi = _inputs(dtype)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(layer(anchor, augmenter, lo, hi), anchor)


def test_an_empty_interval_leaves_its_row_untouched() -> None:
    for options in OPTIONS.values():
        layer = _layer(torch.float32, **options)
        anchor, augmenter, lo, hi = _inputs(torch.float32)
        out = layer(anchor, augmenter, lo, hi)
        assert torch.equal(out[0, 0], anchor[0, 0])
        assert not torch.equal(out[1, 1], anchor[1, 1])
        assert torch.equal(layer(anchor, augmenter[:, :0]), anchor)
        early = layer(anchor, augmenter[:, :3], causal=True)  # N < M: the first M - N queries see no key
        assert torch.equal(early[:, : M - 3], anchor[:, : M - 3])
        assert not torch.equal(early[:, M - 3 :], anchor[:, M - 3 :])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("bounds", [None, "causal", "shared", "own"])
def test_no_tokens_give_no_tokens(options: dict, bounds: str | None) -> None:
    layer = _layer(torch.float32, **options)
    limit = torch.zeros((B, 0) if bounds == "own" else (0,), dtype=torch.int32)
    kwargs = {None: {}, "causal": {"causal": True}}.get(bounds, {"lo": limit, "hi": limit})
    assert layer(torch.randn(B, 0, DB), torch.randn(B, N, DA), **kwargs).shape == (B, 0, DB)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_token_by_token_with_a_cache_equals_all_at_once(options: dict) -> None:
    layer = _layer(torch.float32, **options)
    anchor = torch.randn(B, N, DB)
    augmenter = torch.randn(B, N, DA)
    want = layer(anchor, augmenter, causal=True)
    cache, parts = DynamicLayer(), []
    for chunk in (slice(0, 4), slice(4, 5), slice(5, 5), slice(5, 9)):
        parts.append(layer(anchor[:, chunk], augmenter[:, chunk], cache=cache, causal=True))
    # the same sums in another order: float32 rounding of values around 10
    torch.testing.assert_close(torch.cat(parts, 1), want, rtol=2e-5, atol=2e-5)


def test_autocast_and_mixed_dtypes_compute_low_and_return_the_anchors_dtype() -> None:
    layer = _layer(torch.float32)
    anchor, augmenter, lo, hi = _inputs(torch.float32)
    want = layer(anchor, augmenter, lo, hi)
    with torch.autocast("cpu", torch.bfloat16):
        under = layer(anchor, augmenter, lo, hi)
    low = layer(anchor.bfloat16(), augmenter, lo, hi)
    assert under.dtype == torch.float32 and low.dtype == torch.bfloat16
    size = (want - anchor).abs().max()
    assert 0 < (under - want).abs().max() < 0.05 * size
    assert (low.float() - want).abs().max() < 0.05 * size + 2**-8 * anchor.abs().max()
    # the residual stream itself must not be rounded to bfloat16
    assert torch.equal(under[0, 0], anchor[0, 0])


def test_gradients_reach_float32_parameters_under_a_bfloat16_model() -> None:
    layer = _layer(torch.float32)
    anchor, augmenter, lo, hi = _inputs(torch.bfloat16)
    layer(anchor, augmenter, lo, hi).float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


def test_the_cost_model_and_no_flag_chooses_the_order(monkeypatch) -> None:
    folds = []
    original = weights.stack_keys_values
    monkeypatch.setattr(weights, "stack_keys_values", lambda *args: (folds.append(args[-1]), original(*args))[1])
    layer = _layer(torch.float32)
    anchor = torch.randn(1, 2, DB)
    layer(anchor, torch.randn(1, 2, DA))
    assert not folds  # two tokens: folding costs more than it saves
    layer(anchor, torch.randn(1, 500, DA))
    assert folds == [True]
    with torch.no_grad():
        layer(anchor, torch.randn(1, 2, DA))
        assert folds == [True]  # nothing is kept, and two tokens are too few
        with fixed_weights(layer):
            layer(anchor, torch.randn(1, 2, DA))
            layer(anchor, torch.randn(1, 2, DA))
    assert folds == [True] * 2  # kept from the first call on


def test_compile_takes_the_whole_forward() -> None:
    layer = _layer(torch.float32)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (5, 9):
        anchor, augmenter = torch.randn(B, n, DB), torch.randn(B, n, DA)
        torch.testing.assert_close(compiled(anchor, augmenter, causal=True), layer(anchor, augmenter, causal=True))
        with torch.no_grad():
            torch.testing.assert_close(
                compiled(anchor, augmenter, causal=True), layer(anchor, augmenter, causal=True), rtol=1e-4, atol=1e-5
            )


class _ReleasedHook(torch.nn.Module):
    """The released hook's arithmetic in torch's own modules: projection, MultiheadAttention, 1 + w norm, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(DA, DB)
        self.cross_attention = torch.nn.MultiheadAttention(DB, H, kdim=DB, vdim=DB, batch_first=True)
        self.post_attention_layernorm = torch.nn.Module()
        self.post_attention_layernorm.weight = torch.nn.Parameter(torch.randn(DB) * 0.1)

    def forward(self, anchor: torch.Tensor, augmenter: torch.Tensor) -> torch.Tensor:
        keys = self.proj(augmenter)
        out, _ = self.cross_attention(anchor, keys, keys, need_weights=True)
        out = out * torch.rsqrt(out.pow(2).mean(-1, keepdim=True) + 1e-6)
        return anchor + out * (1 + self.post_attention_layernorm.weight)


def test_from_released_computes_what_the_released_hook_computes() -> None:
    torch.manual_seed(3)
    hook = _ReleasedHook().double()
    for p in hook.parameters():
        torch.nn.init.normal_(p, std=0.3)
    layer = CrossAttention.from_released(hook.state_dict(), H)
    anchor, augmenter, _, _ = _inputs()
    anchor.requires_grad_()
    got, want = layer(anchor, augmenter), hook(anchor, augmenter)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        *(torch.autograd.grad(y, anchor, upstream)[0] for y in (got, want)), rtol=1e-10, atol=1e-10
    )


def test_from_released_names_wrong_keys() -> None:
    state = _ReleasedHook().state_dict()
    del state["proj.bias"]
    state["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"`state_dict`.*extra, proj\.bias"):
        CrossAttention.from_released(state, H)


def test_layers_can_be_copied_and_saved() -> None:
    layer = _layer()
    inputs = _inputs()
    twin = copy.deepcopy(layer)
    other = CrossAttention(DB, DA, H).double()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(twin(*inputs), layer(*inputs)) and torch.equal(other(*inputs), layer(*inputs))


BAD_SIZES = [
    ({"anchor_dim": 0}, ValueError, "`anchor_dim` must be a positive int"),
    ({"anchor_dim": 8.0}, TypeError, "`anchor_dim` must be a positive int"),
    ({"augmenter_dim": -1}, ValueError, "`augmenter_dim`"),
    ({"num_heads": True}, TypeError, "`num_heads`"),
    ({"num_heads": 5}, ValueError, "`num_heads` must be a divisor of anchor_dim 24"),
    ({"head_dim": 0}, ValueError, "`head_dim`"),
    ({"num_kv_heads": 3}, ValueError, "`num_kv_heads` must be a divisor of num_heads 4"),
    ({"num_kv_heads": 0}, ValueError, "`num_kv_heads`"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_SIZES)
def test_bad_sizes_are_named(change: dict, error: type, message: str) -> None:
    sizes = {"anchor_dim": DB, "augmenter_dim": DA, "num_heads": H} | change
    with pytest.raises(error, match=message):
        CrossAttention(**sizes)


BAD_INPUTS = [
    ({"anchor": None}, TypeError, "`anchor_hidden`"),
    ({"anchor": torch.zeros(B, M, DB, dtype=torch.int64)}, TypeError, "`anchor_hidden` must be a floating-point"),
    ({"anchor": torch.zeros(B, M, DB + 1)}, ValueError, f"`anchor_hidden` must be .* of width {DB}"),
    ({"anchor": torch.zeros(M, DB)}, ValueError, "`anchor_hidden`"),
    ({"augmenter": torch.zeros(B, N, DB)}, ValueError, f"`augmenter_hidden` must be .* of width {DA}"),
    ({"augmenter": torch.zeros(B + 1, N, DA)}, ValueError, "`augmenter_hidden` must be of batch size 2"),
    ({"augmenter": torch.zeros(B, N, DA, device="meta")}, ValueError, "`augmenter_hidden` must be on cpu"),
    ({"hi": torch.zeros(B, M + 1, dtype=torch.int32)}, ValueError, "`hi`"),
    ({"hi": torch.full((B, M), N + 1, dtype=torch.int32)}, ValueError, "`hi` must be within 0 and N = 9"),
    ({"lo": torch.zeros(B, M)}, TypeError, "`lo` must have dtype int32"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD_INPUTS)
def test_bad_inputs_are_named(change: dict, error: type, message: str) -> None:
    given = {"anchor": torch.zeros(B, M, DB), "augmenter": torch.zeros(B, N, DA), "lo": None, "hi": None} | change
    with pytest.raises(error, match=message):
        CrossAttention(DB, DA, H)(given["anchor"], given["augmenter"], given["lo"], given["hi"])


def test_the_layer_calls_the_op_once(monkeypatch) -> None:
    calls = []
    original = ops.cross_attention
    monkeypatch.setattr(
        module_under_test.ops, "cross_attention", lambda *a, **k: (calls.append(k), original(*a, **k))[1]
    )
    layer = _layer(torch.float32)
    layer(torch.randn(B, M, DB), torch.randn(B, M, DA), causal=True)
    assert len(calls) == 1 and calls[0]["causal"] is True
