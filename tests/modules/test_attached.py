"""Adapters, hooks and other weights on the children of CrossAttention act: the layer calls what it cannot fold."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from calm_fast import CrossAttention, fixed_weights

CHILDREN = ("norm", "proj", "q_proj", "k_proj", "v_proj", "o_proj", "post_norm")
LINEAR = tuple(name for name in CHILDREN if name.endswith("proj"))


def layer(dtype: torch.dtype = torch.float64, bias: bool = True, post_norm: bool = True) -> CrossAttention:
    made = CrossAttention(16, 12, 2, bias=bias, post_norm=post_norm).to(dtype)
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 16, generator=g).to(dtype), torch.randn(2, 7, 12, generator=g).to(dtype)


def results(made: nn.Module, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    """Return the results with gradients, without, and twice in a scope."""
    found = [made(*inputs(dtype)).detach()]
    with torch.no_grad():
        found.append(made(*inputs(dtype)))
        with fixed_weights(made):
            found += [made(*inputs(dtype)) for _ in range(2)]
    return found


def same(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    # the same products in another order, float64
    for got in found:
        torch.testing.assert_close(got, wanted[0], rtol=1e-11, atol=1e-11)


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Halved(torch.Tensor):
    """A weight that multiplies in its own way, as quantized ones do."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            return torch.nn.functional.linear(x, weight.as_subclass(torch.Tensor) * 2, *bias)
        return super().__torch_function__(function, types, args, kwargs)


def _doubled_weight(child: nn.Module) -> None:
    child.weight.data.mul_(2)


def _own_forward(child: nn.Module) -> None:
    plain = child.forward
    child.forward = lambda x: plain(x) * 2


def _of_another_class(child: nn.Module) -> None:
    child.__class__ = Twice


def _pre_hook(child: nn.Module) -> None:
    child.register_forward_pre_hook(lambda _, args: (2 * args[0],))


def _subclass_weight(child: nn.Module) -> None:
    child.weight = nn.Parameter(child.weight.detach().as_subclass(Halved), requires_grad=False)


# each multiplies the child's linear map by two
DOUBLING = {
    "parametrization": lambda child: parametrize.register_parametrization(child, "weight", Doubled()),
    "forward pre-hook": _pre_hook,
    "forward of its own": lambda child: _own_forward(child),
    "subclass of Linear": _of_another_class,
    "forward hook": lambda child: child.register_forward_hook(lambda _, args, out: 2 * out),
    "weight of another class": _subclass_weight,
}


@pytest.mark.seam(
    attach="a hook, parametrization, other class, other kind of weight or own `forward` on a child",
    to="CrossAttention",
    result="works",
    why="the layer then calls its children and folds nothing",
)
@pytest.mark.parametrize("name", LINEAR)
@pytest.mark.parametrize("kind", DOUBLING)
def test_what_doubles_a_child_doubles_it(kind: str, name: str) -> None:
    made, wanted = (layer(bias=False, post_norm=False) for _ in range(2))
    wanted.load_state_dict(made.state_dict())
    before = results(made)
    DOUBLING[kind](getattr(made, name))
    _doubled_weight(getattr(wanted, name))
    same(results(made), results(wanted))
    assert (results(made)[0] - before[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["norm", "post_norm"])
def test_what_is_attached_to_a_norm_acts(name: str) -> None:
    made, wanted = layer(), layer()
    wanted.load_state_dict(made.state_dict())
    getattr(made, name).register_forward_hook(lambda _, args, out: 2 * out)
    _doubled_weight(getattr(wanted, name))
    same(results(made), results(wanted))
    eps = copy.deepcopy(wanted)
    getattr(eps, name).eps = 0.5
    assert (results(eps)[0] - results(wanted)[0]).abs().max() > 1e-3
    setattr(eps, name, nn.LayerNorm(16).double())
    assert (results(eps)[0] - results(wanted)[0]).abs().max() > 1e-3


def test_a_norm_without_a_weight_still_normalises() -> None:
    made, wanted = layer(), layer()
    wanted.load_state_dict(made.state_dict())
    for name in ("norm", "post_norm"):
        setattr(made, name, nn.RMSNorm(16, eps=made.eps, elementwise_affine=False))
        getattr(wanted, name).weight.data.fill_(1.0)
    same(results(made), results(wanted))


@pytest.mark.parametrize("gone", ["k_proj", "v_proj", "proj", "q_proj", "o_proj"])
def test_a_child_without_its_bias_adds_none(gone: str) -> None:
    made, wanted = layer(), layer()
    wanted.load_state_dict(made.state_dict())
    getattr(made, gone).bias = None
    getattr(wanted, gone).bias.data.zero_()
    same(results(made), results(wanted))


@pytest.mark.seam(
    attach="`torch.nn.utils.prune`, `spectral_norm`, `weight_norm` on a child",
    to="CrossAttention",
    result="works",
    why="the child that computes its weight is called, and its parameters train",
)
@pytest.mark.parametrize(
    "attach",
    [
        lambda child: prune.l1_unstructured(child, "weight", 0.5),
        parametrizations.spectral_norm,
        parametrizations.weight_norm,
    ],
    ids=["prune", "spectral_norm", "weight_norm"],
)
@pytest.mark.parametrize("name", LINEAR)
def test_computed_weights_act_and_train(attach: Callable[[nn.Module], object], name: str) -> None:
    made = layer().eval()
    attach(getattr(made, name))
    wanted = layer()
    for child in CHILDREN:
        for key in ("weight", "bias"):
            if (value := getattr(getattr(made, child), key, None)) is not None:
                getattr(getattr(wanted, child), key).data.copy_(value)
    same(results(made), results(wanted))
    made(*inputs()).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters())


def _adapted(made: nn.Module, targets: object = LINEAR, **options: object) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, init_lora_weights=False, **options)
    return peft.get_peft_model(made, config)


@pytest.mark.seam(
    attach="PEFT LoRA and DoRA on its children: attached, merged, unmerged, disabled, unloaded",
    to="CrossAttention",
    result="works",
    why="adapted children are called; merged and unloaded ones are folded again",
)
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_act_as_their_merged_weights(dora: bool) -> None:
    made = layer()
    base = results(made)
    model = _adapted(made, use_dora=dora)
    attached = results(model)
    same(attached, attached)
    assert (attached[0] - base[0]).abs().max() > 1e-2
    with model.disable_adapter():
        same(results(model), base)
    with torch.no_grad(), fixed_weights(model):
        model.merge_adapter()
        torch.testing.assert_close(model(*inputs()), attached[0], rtol=1e-10, atol=1e-10)
        model.unmerge_adapter()
        torch.testing.assert_close(model(*inputs()), attached[0], rtol=1e-10, atol=1e-10)
    merged = model.merge_and_unload()
    assert type(merged.q_proj) is nn.Linear
    for got in results(merged):
        torch.testing.assert_close(got, attached[0], rtol=1e-10, atol=1e-10)


def test_merged_weights_are_seen_by_the_next_scope() -> None:
    made = layer()
    with torch.no_grad(), fixed_weights(made):
        made(*inputs())
    model = _adapted(made)
    attached = results(model)
    merged = model.merge_and_unload()
    with torch.no_grad(), fixed_weights(merged):
        torch.testing.assert_close(merged(*inputs()), attached[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_gradients_reach_every_adapter(dora: bool) -> None:
    model = _adapted(layer(), use_dora=dora)
    model(*inputs()).square().sum().backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == len(LINEAR) * (3 if dora else 2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())


@pytest.mark.parametrize("name", LINEAR)
def test_one_adapter_is_enough(name: str) -> None:
    made = layer()
    base = results(made)[0]
    model = _adapted(made, targets=[name])
    attached = results(model)
    same(attached, attached)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(results(merged)[0], attached[0], rtol=1e-10, atol=1e-10)
    assert (attached[0] - base).abs().max() > 1e-3


@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16 states", "autocast"])
def test_called_children_take_states_of_another_dtype(autocast: bool) -> None:
    made = layer(torch.float32)
    model = _adapted(made)
    wide = model(*inputs(torch.float32)).detach()
    if autocast:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(*inputs(torch.float32))
        assert out.dtype == torch.float32
    else:
        out = model(*inputs(torch.bfloat16))
        assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), wide, rtol=0.05, atol=0.05 * float(wide.abs().max()))
    out.float().square().sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    low = made.to(torch.bfloat16)
    assert low(*inputs(torch.float32)).dtype == torch.float32


def test_a_query_without_keys_keeps_its_state_whatever_a_child_adds() -> None:
    made = layer(bias=False)
    made.o_proj.register_forward_hook(lambda _, args, out: out + 1)
    anchor, augmenter = inputs()
    hi = torch.tensor([0, 1, 2, 3, 4], dtype=torch.int32)
    for out in (made(anchor, augmenter, hi=hi), made(anchor, augmenter[:, :3], causal=True)):
        assert torch.equal(out[:, 0], anchor[:, 0]) and not torch.equal(out[:, 4], anchor[:, 4])
    assert torch.equal(made(anchor, augmenter[:, :0]), anchor)


def test_backward_hooks_of_children_run() -> None:
    made, seen = layer(), []
    made.k_proj.register_full_backward_hook(lambda *_: seen.append("k"))
    made(*inputs()).sum().backward()
    assert seen == ["k"]


def test_compile_takes_adapted_children() -> None:
    torch._dynamo.reset()
    model = _adapted(layer(torch.float32))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    given = inputs(torch.float32)
    torch.testing.assert_close(compiled(*given), model(*given), rtol=1e-5, atol=1e-5)


def test_a_child_of_the_wrong_shape_is_named() -> None:
    made = layer()
    made.k_proj = nn.Linear(16, 8).double()
    with pytest.raises(
        ValueError, match=r"^CrossAttention: `k_proj` must be a module that returns a tensor \(2, 7, 16\)"
    ):
        made(*inputs())
    made.k_proj = nn.LSTM(16, 16).double()
    with pytest.raises(ValueError, match="^CrossAttention: `k_proj` must be .* got tuple from LSTM"):
        made(*inputs())
