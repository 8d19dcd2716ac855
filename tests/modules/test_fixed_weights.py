"""fixed_weights: what is kept in a scope, and the changes of parameters that no flag of a tensor shows."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import calm_fast
from calm_fast import CrossAttention, DualLoRALinear, fixed_weights
from calm_fast.modules.fixed_weights import FoldedWeights, _checksum

OPTIMIZERS = {
    "plain": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}


def cross() -> CrossAttention:
    layer = CrossAttention(16, 24, 2, bias=True)
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


def dual() -> DualLoRALinear:
    layer = DualLoRALinear(nn.Linear(16, 16), rank=4, alpha=8, gate_dim=8, value_dim=8)
    for p in (layer.value_up, layer.lora_b_neg):
        nn.init.normal_(p)
    return layer


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    return torch.randn(2, 5, 16, generator=g), torch.randn(2, 7, 24, generator=g)


def call(layer: nn.Module) -> torch.Tensor:
    given = [t.to(next(layer.parameters()).dtype) for t in inputs()]
    return layer(*given) if isinstance(layer, CrossAttention) else layer(given[0])


def truth(layer: nn.Module) -> torch.Tensor:
    """Return the result of the layer's present parameters in a layer that has kept nothing."""
    with torch.no_grad():
        return call(copy.deepcopy(layer))


def factors(layer: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that the layer folds."""
    return [p for name, p in layer.named_parameters() if not name.startswith("base.")]


@pytest.fixture(params=[cross, dual], ids=["cross", "dual"])
def layer(request: pytest.FixtureRequest) -> nn.Module:
    return request.param()


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count the values that are computed to be kept."""
    made: list[int] = []
    plain = FoldedWeights.get

    def get(self, params, extra, compute):
        return plain(self, params, extra, lambda: (made.append(1), compute())[1])

    monkeypatch.setattr(FoldedWeights, "get", get)
    return made


def _optimizer(kind: str) -> Callable[[nn.Module], None]:
    def step(layer: nn.Module) -> None:
        for p in factors(layer):
            p.grad = torch.ones_like(p)
        torch.optim.AdamW([p for p in factors(layer) if p.requires_grad], lr=0.1, **OPTIMIZERS[kind]).step()

    return step


def _averaged(layer: nn.Module) -> None:
    """Swap in an exponential moving average, as evaluation with EMA weights does."""
    for p in factors(layer):
        p.data = p.data * 0.5


def _permuted_rows(layer: nn.Module) -> None:
    for p in factors(layer):
        p.data.copy_(p.data.flip(0))


def _flipped_bit(layer: nn.Module) -> None:
    for p in factors(layer):
        p.data.view(torch.int32).view(-1)[-1] ^= 1 << 23


CHANGES = {
    **{f"optimizer_{kind}": _optimizer(kind) for kind in OPTIMIZERS},
    "foreach_op": lambda layer: torch._foreach_mul_([p.data for p in factors(layer)], 1.5),
    "data_write": lambda layer: [p.data.add_(0.1) for p in factors(layer)],
    "data_swap": _averaged,
    "negated": lambda layer: factors(layer)[-1].data.neg_(),
    "permuted": _permuted_rows,
    "one_bit": _flipped_bit,
    "load": lambda layer: layer.load_state_dict({k: v * 0.5 for k, v in layer.state_dict().items()}),
    "load_assign": lambda layer: layer.load_state_dict(
        {k: v * 0.5 for k, v in layer.state_dict().items()}, assign=True
    ),
}


@pytest.mark.seam(
    attach="fused and foreach optimizers, writes through `.data`, EMA swaps, `load_state_dict(assign=True)`",
    to="CrossAttention",
    result="works",
    why="folded weights are kept only inside `fixed_weights`, which first checks their content",
)
@pytest.mark.parametrize("between", ["no scope", "scopes"])
@pytest.mark.parametrize("change", CHANGES)
def test_changed_parameters_give_their_own_result(layer: nn.Module, change: str, between: str) -> None:
    def seen() -> torch.Tensor:
        with torch.no_grad():
            if between == "no scope":
                return call(layer)
            with fixed_weights(layer):
                return call(layer)

    before = seen()
    CHANGES[change](layer)
    after = seen()
    torch.testing.assert_close(after, truth(layer), rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 1e-3


def test_values_are_computed_once_in_a_scope_and_serve_the_next_one(layer: nn.Module, folds: list[int]) -> None:
    with torch.no_grad():
        call(layer)
        assert not folds and layer._folded.value is None
        for _ in range(2):
            with fixed_weights(layer), fixed_weights(nn.Sequential(layer)):
                call(layer), call(layer)
        assert len(folds) == 1
        with fixed_weights(layer):
            with fixed_weights(layer):
                call(layer)
            call(layer)  # the inner block has ended, the outer one has not
        assert len(folds) == 1
        call(layer)
    with fixed_weights(layer):
        call(layer)  # gradients: neither kept nor computed to be kept
        assert len(folds) == 1 and layer._folded.value is None


def test_a_broken_promise_that_shows_is_noticed(layer: nn.Module) -> None:
    with torch.no_grad(), fixed_weights(layer):
        call(layer)
        for p in factors(layer):
            p.mul_(0.8)
        torch.testing.assert_close(call(layer), truth(layer), rtol=1e-5, atol=1e-5)
        for p in factors(layer):
            p.data.mul_(0.8)
        layer.clear_folded()
        torch.testing.assert_close(call(layer), truth(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.seam(
    attach="`torch.func.functional_call` with other weights",
    to="CrossAttention",
    result="works",
    why="kept weights belong to the parameters that they were folded from",
)
def test_functional_call_uses_the_weights_it_gets(layer: nn.Module) -> None:
    other = {name: p.detach() * 0.5 for name, p in layer.named_parameters()}
    twin = copy.deepcopy(layer)
    twin.load_state_dict(other)
    given = inputs() if isinstance(layer, CrossAttention) else inputs()[:1]
    with torch.no_grad():
        own, wanted = truth(layer), truth(twin)
        for _ in range(2):
            got = torch.func.functional_call(layer, other, given)
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        with fixed_weights(layer):
            for _ in range(2):
                torch.testing.assert_close(call(layer), own, rtol=1e-5, atol=1e-5)
                got = torch.func.functional_call(layer, other, given)
                torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
            stacked = {name: torch.stack((p, p * 0.5)) for name, p in layer.named_parameters()}
            both = torch.func.vmap(lambda w: torch.func.functional_call(layer, w, given))(stacked)
            torch.testing.assert_close(both[0], own, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(both[1], wanted, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(call(layer), own, rtol=1e-5, atol=1e-5)


def test_other_threads_and_other_models_keep_nothing(folds: list[int]) -> None:
    layer, other = cross(), cross()
    found: list[torch.Tensor] = []

    def run() -> None:
        with torch.no_grad():
            found.append(call(layer))

    with torch.no_grad(), fixed_weights(layer):
        call(other)
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not folds
        torch.testing.assert_close(found[0], call(layer))
        assert len(folds) == 1


def test_two_threads_in_scopes_of_one_layer_share_its_weights(folds: list[int]) -> None:
    layer, barrier = cross(), threading.Barrier(2)
    wanted = truth(layer)
    found: list[torch.Tensor] = []

    def run(first: bool) -> None:
        with torch.no_grad(), fixed_weights(layer):
            if first:
                found.append(call(layer))
            barrier.wait()
            found.extend(call(layer) for _ in range(20))

    threads = [threading.Thread(target=run, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 41 and len(folds) == 1
    for got in found:
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_copies_and_pickles_carry_parameters_only(layer: nn.Module) -> None:
    with torch.no_grad(), fixed_weights(layer):
        own = call(layer)
        assert layer._folded.value is not None
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin._folded.value is None
            torch.testing.assert_close(call(twin), own, rtol=1e-5, atol=1e-5)
    assert not any("folded" in key for key in layer.state_dict())


def test_parameters_of_another_dtype_are_folded_anew(layer: nn.Module) -> None:
    with torch.no_grad(), fixed_weights(layer):
        call(layer)
        layer.double()
        torch.testing.assert_close(call(layer), truth(layer), rtol=1e-5, atol=1e-5)


def test_inference_tensors_are_not_kept() -> None:
    with torch.inference_mode():
        made_here = cross()
        with fixed_weights(made_here):
            call(made_here)
            assert made_here._folded.value is None


def test_weights_kept_under_inference_mode_serve_gradients_later() -> None:
    layer = cross().requires_grad_(False)
    h, a = torch.randn(1, 3, 16), torch.randn(1, 4, 24)
    with fixed_weights(layer):
        with torch.inference_mode():
            layer(h, a)
        leaf = h.clone().requires_grad_()
        layer(leaf, a).sum().backward()
    assert leaf.grad is not None


class Products:
    """A backend of torch.compile that notes how many matrix products each run of a graph has."""

    def __init__(self) -> None:
        self.graphs, self.ran = 0, []

    def __call__(self, graph: torch.fx.GraphModule, example: list[torch.Tensor]) -> Callable[..., object]:
        names = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        count = sum(any(word in name for word in ("linear", "matmul", "addmm", "addmv")) for name in names)
        self.graphs += 1

        def run(*args: torch.Tensor) -> object:
            self.ran.append(count)
            return graph(*args)

        return run


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_compiled_calls_fold_once_in_a_block(first: str) -> None:
    torch._dynamo.reset()
    layer, given, products = CrossAttention(16, 24, 2), inputs(), Products()
    nn.init.normal_(layer.o_proj.weight)
    compiled = torch.compile(layer, fullgraph=True, backend=products)
    with torch.no_grad():
        compiled(*given)
        unfolded = products.ran.pop()
        for _ in range(2):
            with torch.no_grad(), fixed_weights(layer):
                if first == "eager":
                    layer(*(t.double() for t in given))  # in another dtype: nothing that a float32 graph could use
                for _ in range(4):
                    torch.testing.assert_close(compiled(*given), truth(layer), rtol=1e-5, atol=1e-5)
            nn.init.normal_(layer.k_proj.weight)  # the next block folds again
            torch.testing.assert_close(compiled(*given), truth(layer), rtol=1e-5, atol=1e-5)
    folding, *kept, outside = products.ran[:5]
    # q, the keys and values as one, and the output
    assert kept == [3] * 3 and folding > 3 and unfolded == outside > 3
    assert products.ran == 2 * products.ran[:5] and products.graphs == 3


def test_compiled_calls_use_what_a_call_before_them_kept() -> None:
    torch._dynamo.reset()
    layer, products = CrossAttention(16, 24, 2).bfloat16(), Products()  # float32 weights are packed for eager calls
    given = tuple(t.bfloat16() for t in inputs())
    compiled = torch.compile(layer, fullgraph=True, backend=products)
    with torch.no_grad(), fixed_weights(layer):
        want = layer(*given)
        assert torch.equal(compiled(*given), want) and products.ran == [3]
    leaf = given[0].clone().requires_grad_()
    with fixed_weights(layer):  # gradients flow to the parameters: nothing is kept
        with torch.no_grad():
            compiled(*given)
        compiled(leaf, given[1]).sum().backward()
    assert layer.k_proj.weight.grad is not None and products.ran[-1] > 3


def test_layers_that_share_a_graph_keep_their_own_weights() -> None:
    torch._dynamo.reset()
    given, products = inputs(), Products()
    layers = [cross() for _ in range(3)]
    compiled = [torch.compile(layer, fullgraph=True, backend=products) for layer in layers]
    with torch.no_grad(), fixed_weights(nn.ModuleList(layers[:2])):  # the third keeps nothing
        for _ in range(3):
            for layer, call in zip(layers, compiled, strict=True):
                torch.testing.assert_close(call(*given), plain(layer), rtol=1e-4, atol=1e-5)
    assert products.ran[-3:-1] == [3, 3] and products.ran[-1] > 3


def plain(layer: nn.Module) -> torch.Tensor:
    """Return the result of a layer without torch.compile, in a block of no one."""
    alone = CrossAttention(16, 24, 2, bias=True)
    alone.load_state_dict(layer.state_dict())
    return alone(*inputs())


@pytest.mark.parametrize("first", ["compiled", "eager"])
def test_a_compiled_dual_lora_folds_once_in_a_block(first: str) -> None:
    torch._dynamo.reset()
    layer, x, products = dual(), inputs()[0], Products()
    compiled = torch.compile(layer, fullgraph=True, backend=products)
    with torch.no_grad():
        for _ in range(2):
            with fixed_weights(layer):
                if first == "eager":
                    layer(x)  # its values enter the graph
                for _ in range(3):
                    torch.testing.assert_close(compiled(x), truth(layer), rtol=1e-5, atol=1e-5)
            nn.init.normal_(layer.gate_q)  # the next block folds again
        torch.testing.assert_close(compiled(x), truth(layer), rtol=1e-5, atol=1e-5)
    folding, *kept, again = products.ran[:4]
    assert kept == [kept[0]] * 2 and products.ran[-1] > kept[0] and again == folding
    assert folding == kept[0] if first == "eager" else folding > kept[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (5000,), (70, 1000)], ids=str)
def test_the_checksum_sees_structured_changes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    p = torch.randn(shape).to(dtype)
    before = _checksum((p, None))
    assert torch.equal(before, _checksum((p.clone(), None)))
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[p.element_size()]
    for position in (0, p.numel() // 2, p.numel() - 1):
        for bit in range(8 * p.element_size() - 1):
            changed = p.clone()
            changed.view(-1).view(integers)[position] ^= 1 << bit
            assert not torch.equal(before, _checksum((changed, None)))
    two = p.clone()
    two.view(-1)[:2].neg_()
    for changed in (-p, p.flip(0), p.flip(-1), p.roll(1, 0), two):
        assert not torch.equal(before, _checksum((changed, None)))


def test_a_scope_needs_a_module() -> None:
    with pytest.raises(TypeError, match="^fixed_weights: `model` must be an nn.Module, got str 'model'"):
        with fixed_weights("model"):
            pass


def test_public_name() -> None:
    assert calm_fast.fixed_weights is fixed_weights


def test_fake_tensors_are_not_kept(layer: nn.Module) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with torch.no_grad(), fixed_weights(layer):
        with FakeTensorMode(allow_non_fake_inputs=True):
            assert isinstance(call(layer), FakeTensor)
        assert layer._folded.value is None
        torch.testing.assert_close(call(layer), truth(layer), rtol=1e-5, atol=1e-5)


@pytest.mark.seam(
    attach="FSDP2 (`fully_shard`) on the layer or its children",
    to="CrossAttention",
    result="works",
    why="each call uses the gathered weights; sharded children are called",
)
@pytest.mark.parametrize("children", [False, True], ids=["layer", "children"])
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # a linear layer's output is a view
def test_a_sharded_layer_sees_every_step(children: bool, tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        layer, twin = cross(), cross()
        mesh = init_device_mesh("cpu", (1,))
        for child in (layer.k_proj, layer.q_proj) if children else ():
            fully_shard(child, mesh=mesh)
        fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for _ in range(2):
            twin.load_state_dict({name: t.full_tensor() for name, t in layer.state_dict().items()})
            with torch.no_grad(), fixed_weights(layer):
                for _ in range(2):
                    torch.testing.assert_close(call(layer), call(twin), rtol=1e-5, atol=1e-5)
            call(layer).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        dist.destroy_process_group()


class Doubled(nn.Module):
    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        return 2 * factor


@pytest.mark.seam(
    attach="a parametrization of a factor",
    to="DualLoRALinear",
    result="works",
    why="the computed factor is folded in every call, inside `fixed_weights` too",
)
def test_a_parametrized_factor_is_folded_as_it_is_now() -> None:
    layer = dual()
    wanted = copy.deepcopy(layer)
    wanted.lora_b_neg.data.mul_(2)
    nn.utils.parametrize.register_parametrization(layer, "lora_b_neg", Doubled())
    with torch.no_grad(), fixed_weights(layer):
        for factor in (1.0, 0.5):
            torch.testing.assert_close(call(layer), call(wanted) if factor == 1 else truth(wanted))
            layer.parametrizations.lora_b_neg.original.data.mul_(0.5)
            wanted.lora_b_neg.data.mul_(0.5)
