"""DualLoRALinear: equation of every mode, initial state, what trains, folding, dropout, gate statistics, bad input."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import calm_fast
from calm_fast._ops.dual_lora.reference import dual_lora_reference
from calm_fast.modules.dual_lora import GATE_BINS, DualLoRALinear

D_IN, D_OUT = 24, 40
FORMS = {
    "paper": {"variant": "paper", "value_dim": 11},
    "paper-full": {"variant": "paper", "value_dim": None},
    "released": {"variant": "released", "value_dim": 11},
}


class Quantised(nn.Module):
    """A quantised linear layer: int8 weight and scales as buffers, no parameter, no .weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (linear.weight.detach() / scale).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.codes.to(x.dtype) * self.scale.to(x.dtype))


def layer(form="paper", base=None, trained=True, **options):
    """Return a layer of odd sizes; `trained` fills every factor with random numbers."""
    options = {"rank_neg": 3, "alpha_neg": 4.5, "gate_dim": 7} | FORMS[form] | options
    made = DualLoRALinear(nn.Linear(D_IN, D_OUT) if base is None else base, 5, 10.0, **options)
    if trained:
        fill(made, made.lora_b_pos, made.lora_b_neg, *made.value)
    return made


def fill(module, *factors):
    with torch.no_grad():
        for p in factors:
            nn.init.normal_(p, std=0.3)


def expected(made, x, lora_x=None):
    """Return the reference's output in float64."""
    double = copy.deepcopy(made).double()
    factors = [getattr(double, n) for n in ("lora_a_pos", "lora_b_pos", "lora_a_neg", "lora_b_neg", "gate_q", "gate_k")]
    activation = "none" if made.variant == "paper" else "gelu"
    y = double.base(x.double())
    if lora_x is not None:  # the reference reads one x: give it both side by side, each factor with zeros for one half
        factors[0], factors[2] = (torch.cat((a, 0 * a), -1) for a in (factors[0], factors[2]))
        factors[4] = torch.cat((0 * factors[4], factors[4]), -1)
        x = torch.cat((lora_x, x), -1)
    return dual_lora_reference(x.double(), y, *factors, double.value, (2.0, 1.5), activation)


def trainable(made):
    return {name for name, p in made.named_parameters() if p.requires_grad}


@pytest.fixture(params=FORMS)
def form(request):
    return request.param


def test_mix_is_the_reference(form):
    made, x = layer(form), torch.randn(2, 3, D_IN)
    torch.testing.assert_close(made(x).double(), expected(made, x), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(made(x).double(), expected(made, x), rtol=1e-5, atol=1e-5)


def test_pos_and_neg_are_plain_lora(form):
    made, x = layer(form), torch.randn(2, 3, D_IN)
    for mode, a, b, s in (
        ("pos", made.lora_a_pos, made.lora_b_pos, 10.0 / 5),
        ("neg", made.lora_a_neg, made.lora_b_neg, 4.5 / 3),
    ):
        assert made.set_mode(mode) is made and made.mode == mode
        torch.testing.assert_close(made(x), made.base(x) + s * (x @ a.mT @ b.mT))


def test_new_layer_equals_its_base_exactly(form):
    made, x = layer(form, trained=False), torch.randn(9, D_IN)
    assert torch.equal(made(x), made.base(x))
    fill(made, made.lora_a_neg, made.lora_b_neg)
    assert torch.equal(made(x), made.base(x))
    with torch.no_grad():
        assert torch.equal(made(x), made.base(x))
    made.bfloat16()
    assert torch.equal(made(x.bfloat16()), made.base(x.bfloat16()))
    fresh = layer(form, trained=False).set_mode("neg")
    assert torch.equal(fresh(x), fresh.base(x))


@pytest.mark.parametrize("trained_negative", [False, True])
def test_every_trainable_factor_has_a_gradient_within_two_steps(form, trained_negative):
    made, x, target = layer(form, trained=False), torch.randn(64, D_IN), torch.randn(64, D_OUT)
    if trained_negative:
        fill(made, made.lora_b_neg)
    optimiser = torch.optim.AdamW([p for p in made.parameters() if p.requires_grad], lr=1e-2)
    seen = set()
    for _ in range(3):  # before the first step, after one, after two
        optimiser.zero_grad()
        F.mse_loss(made(x), target).backward()
        seen |= {name for name, p in made.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimiser.step()
    assert seen == trainable(made)


def test_modes_choose_what_trains(form):
    made = layer(form)
    value = {"value_full"} if form == "paper-full" else {"value_down", "value_up"}
    positive = {"lora_a_pos", "lora_b_pos"}
    assert made.mode == "mix" and trainable(made) == positive | value | {"gate_q", "gate_k"}
    assert trainable(made.set_mode("neg")) == {"lora_a_neg", "lora_b_neg"}
    assert trainable(made.set_mode("pos")) == positive
    assert not any(p.requires_grad for p in made.base.parameters())


def test_switching_modes_and_back_changes_nothing(form):
    made, x = layer(form), torch.randn(9, D_IN)
    state = {name: t.clone() for name, t in made.state_dict().items()}
    with torch.no_grad():
        before = made(x)
        made.set_mode("neg")(x), made.set_mode("pos")(x)
        assert torch.equal(made.set_mode("mix")(x), before)
    assert all(torch.equal(t, state[name]) for name, t in made.state_dict().items())


def test_negative_lora_is_left_alone_in_mix(form):
    made, x = layer(form), torch.randn(9, D_IN, requires_grad=True)
    made(x).square().sum().backward()
    assert made.lora_a_neg.grad is None and made.lora_b_neg.grad is None
    assert x.grad is not None and bool((x.grad != 0).any())


def test_folded_factors_are_kept_until_a_parameter_changes(form, monkeypatch):
    made, x = layer(form), torch.randn(9, D_IN)
    from calm_fast.modules import dual_lora as module

    folds, plain = [], module.fold_dual_lora
    monkeypatch.setattr(module, "fold_dual_lora", lambda *a: folds.append(1) or plain(*a))
    with torch.no_grad(), calm_fast.fixed_weights(made):
        made(x), made(x)
        assert len(folds) == 1
        for p in made.parameters():
            if p is made.base.weight or p is made.base.bias:
                continue
            before = made(x)
            p.mul_(1.5)
            after = made(x)
            assert not torch.equal(before, after)
            torch.testing.assert_close(after.double(), expected(made, x), rtol=1e-4, atol=1e-4)
    count = len(folds)
    made(x), made(x)
    assert len(folds) == count + 2  # while training, once per call
    with torch.no_grad():
        made(x), made(x)
    assert len(folds) == count + 4  # outside of a scope too


def test_folding_in_inference_mode_serves_later_gradients(form):
    made, x = layer(form), torch.randn(9, D_IN)
    made.requires_grad_(False)
    with calm_fast.fixed_weights(made):
        with torch.inference_mode():
            made(x)
        x.requires_grad_()
        made(x).sum().backward()
    assert x.grad is not None


def test_dropout_reaches_the_lora_inputs_only(form):
    made, x = layer(form, dropout=0.5), torch.randn(9, D_IN)
    torch.manual_seed(5)
    out = made(x)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.5)
    assert bool((dropped == 0).any())
    torch.testing.assert_close(out.double(), expected(made, x, dropped), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(made.eval()(x).double(), expected(made, x), rtol=1e-5, atol=1e-5)
    made.train().set_mode("pos")
    torch.manual_seed(5)
    torch.testing.assert_close(made(x), made.base(x) + 2.0 * (dropped @ made.lora_a_pos.mT @ made.lora_b_pos.mT))


def test_quantised_base(form):
    base = Quantised(nn.Linear(D_IN, D_OUT))
    made, x = layer(form, base=base, trained=False), torch.randn(2, 9, D_IN)
    assert torch.equal(made(x), base(x))
    fill(made, made.lora_b_pos, made.lora_b_neg, *made.value)
    assert made.lora_a_pos.dtype == torch.float32
    torch.testing.assert_close(made(x).double(), expected(made, x), rtol=1e-4, atol=1e-4)


def test_base_without_sizes_takes_them_as_arguments():
    base = nn.Sequential(nn.Linear(D_IN, D_OUT, bias=False))
    with pytest.raises(ValueError, match="^DualLoRALinear: `in_features` must be given"):
        DualLoRALinear(base, 4, 8)
    made, x = DualLoRALinear(base, 4, 8, in_features=D_IN, out_features=D_OUT), torch.randn(3, D_IN)
    assert torch.equal(made(x), base(x))


@pytest.mark.parametrize("mode", ["mix", "pos", "neg"])
def test_float32_parameters_over_a_bfloat16_base(form, mode):
    made = layer(form, base=nn.Linear(D_IN, D_OUT).bfloat16()).set_mode(mode)
    x = torch.randn(9, D_IN).bfloat16()
    assert made.lora_a_pos.dtype == torch.float32
    out = made(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in made.parameters() if p.requires_grad)
    if mode == "mix":
        wide = copy.deepcopy(made).float()
        torch.testing.assert_close(out.float(), wide(x.float()), rtol=0.05, atol=0.05 * float(out.detach().abs().max()))


@pytest.mark.parametrize("mode", ["mix", "pos", "neg"])
def test_autocast_computes_in_its_dtype(form, mode):
    made, x = layer(form).set_mode(mode), torch.randn(9, D_IN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = made(x)
    assert out.dtype == torch.bfloat16
    y = made.base(x)
    assert float((out - y).detach().abs().max()) > 0.1
    low = copy.deepcopy(made)
    low.base.bfloat16()
    assert torch.equal(out, low(x.bfloat16()))
    out.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in made.parameters() if p.requires_grad)


def test_empty_batch(form):
    made = layer(form)
    out = made(torch.randn(2, 0, D_IN))
    assert out.shape == (2, 0, D_OUT)
    out.sum().backward()
    assert all(not p.grad.any() for p in made.parameters() if p.requires_grad)


@pytest.mark.parametrize("mode", ["mix", "pos", "neg"])
def test_compile_without_graph_breaks(form, mode):
    torch._dynamo.reset()
    made, x = layer(form).set_mode(mode), torch.randn(9, D_IN)
    made.record_gates = True
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), made(x))
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), made(x))
    assert made.gate_statistics().tokens == (4 * 9 if mode == "mix" else 0)


def test_gate_statistics(form):
    made, x = layer(form), torch.randn(50, D_IN)
    made(x)
    empty = made.gate_statistics()
    assert empty.tokens == 0 and math.isnan(empty.mean) and sum(empty.histogram) == 0  # off by default
    made.record_gates = True
    for part in x.split(20):
        made(part)
    double = copy.deepcopy(made).double()
    wide, y = x.double(), double.base(x.double())
    loras = ((double.lora_a_pos, double.lora_b_pos, 2.0), (double.lora_a_neg, double.lora_b_neg, 1.5))
    h = torch.stack([s * (wide @ a.mT @ b.mT) + (y if form == "released" else 0) for a, b, s in loras])
    share = ((wide @ double.gate_q.mT) * (h @ double.gate_k.mT)).sum(-1).softmax(0)[1].detach()
    found = made.gate_statistics()
    assert found.tokens == 50 and len(found.histogram) == GATE_BINS
    assert found.mean == pytest.approx(float(share.mean()), abs=1e-6)
    assert found.std == pytest.approx(float(share.std(correction=0)), abs=1e-6)
    assert list(found.histogram) == torch.histc(share, GATE_BINS, 0, 1).long().tolist()
    assert not any("gate_" in name and "sum" in name for name in made.state_dict())
    made.clear_gates()
    assert made.gate_statistics().tokens == 0


def test_state_dict_names_and_round_trip(form):
    made, x = layer(form), torch.randn(9, D_IN)
    own = {name for name in made.state_dict() if not name.startswith("base.")}
    value = {"value_full"} if form == "paper-full" else {"value_down", "value_up"}
    loras = {f"lora_{factor}_{sign}" for factor in "ab" for sign in ("pos", "neg")}
    assert own == loras | value | {"gate_q", "gate_k"}
    other = layer(form)
    with torch.no_grad():
        other(x)
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(x), made(x))
        assert torch.equal(copy.deepcopy(made)(x), made(x))


def test_public_name():
    assert calm_fast.DualLoRALinear is DualLoRALinear


BAD_OPTIONS = {
    "base": (TypeError, {"base": 3}),
    "rank": (ValueError, {"rank": 0}),
    "rank ": (TypeError, {"rank": 4.0}),
    "rank_neg": (ValueError, {"rank_neg": -1}),
    "alpha": (ValueError, {"alpha": float("inf")}),
    "alpha ": (TypeError, {"alpha": "8"}),
    "alpha_neg": (ValueError, {"alpha_neg": float("nan")}),
    "gate_dim": (ValueError, {"gate_dim": 0}),
    "gate_dim ": (TypeError, {"gate_dim": True}),
    "value_dim": (ValueError, {"value_dim": 0}),
    "value_dim ": (ValueError, {"value_dim": None, "variant": "released"}),
    "variant": (ValueError, {"variant": "other"}),
    "dropout": (ValueError, {"dropout": 1.0}),
    "dropout ": (TypeError, {"dropout": None}),
    "in_features": (ValueError, {"in_features": D_IN + 1}),
    "out_features": (TypeError, {"out_features": "40"}),
}


@pytest.mark.parametrize("which", BAD_OPTIONS)
def test_bad_option_is_named(which):
    kind, change = BAD_OPTIONS[which]
    options = {"base": nn.Linear(D_IN, D_OUT), "rank": 4, "alpha": 8.0} | change
    with pytest.raises(kind, match=f"^DualLoRALinear: `{which.strip()}` must be"):
        DualLoRALinear(**options)


def test_bad_input_is_named():
    made = layer()
    for kind, name, x in (
        (TypeError, "x", [1.0]),
        (TypeError, "x", torch.zeros(3, D_IN, dtype=torch.int64)),
        (ValueError, "x", torch.zeros(3, D_IN + 1)),
        (ValueError, "x", torch.tensor(1.0)),
        (ValueError, "x", torch.zeros(3, D_IN, device="meta")),
    ):
        with pytest.raises(kind, match=f"^DualLoRALinear: `{name}` must be"):
            made(x)
    with pytest.raises(ValueError, match="^DualLoRALinear: `mode` must be one of 'neg', 'pos', 'mix', got 'both'"):
        made.set_mode("both")
    lying = nn.Linear(D_IN, D_OUT)
    lying.out_features = 9
    with pytest.raises(ValueError, match="^DualLoRALinear: `base` must be a module that returns"):
        DualLoRALinear(lying, 4, 8)(torch.zeros(3, D_IN))
