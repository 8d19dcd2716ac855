"""The CUDA decode kernels, emulated: NaN, independence of rows, strides, launch plans, limits; on a GPU: graphs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor

from calm_fast._ops.cross_attention.native import NATIVE_MAX_QUERIES, wide_loads
from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast.core import native_library
from calm_fast.core.numerics import Inputs
from calm_fast.ops import cross_attention, dual_lora
from calm_fast.verify import emulation
from calm_fast.verify.cases import op_cases
from calm_fast.verify.emulation import SCHEDULES, EmulationError, Schedule

if why := emulation.obstacle("cross_attention"):
    pytest.skip(f"CUDA kernels cannot be emulated: {why}", allow_module_level=True)

LORA = op_cases("dual_lora")
OPTIONS = {"causal": False, "lo": None, "hi": None, "scale": None, "dlse": True}


def attend(
    q: Tensor, k: Tensor, v: Tensor, schedule: Schedule = SCHEDULES[0], processors: int = 0, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return (out, lse) of the emulated kernels."""
    inputs = OPTIONS | {"q": q, "k": k, "v": v} | options
    found = emulation.adapter("cross_attention").run(inputs, schedule, most_blocks=processors)
    return found["out"], found["lse"]


def tensors(b=1, m=3, n=131, h=4, hkv=2, d=24, dtype=torch.float32, seed=0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(s, generator=g).to(dtype) for s in ((b, m, h, d), (b, n, hkv, d), (b, n, hkv, d)))


def same(one: Iterable[Tensor], two: Iterable[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


# ---- cross_attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processors", [1, 16])  # one split, and several
def test_nan_reaches_only_the_rows_that_see_it(processors):
    q, k, v = tensors(m=3, n=131, h=2, hkv=2)
    clean = attend(q, k, v, processors=processors)
    row = q.clone()
    row[0, 1, 0] = math.nan
    out, lse = attend(row, k, v, processors=processors)
    assert out[0, 1, 0].isnan().all() and lse[0, 0, 1].isnan()
    out[0, 1, 0], lse[0, 0, 1] = clean[0][0, 1, 0], clean[1][0, 0, 1]
    assert same((out, lse), clean)
    for poisoned in (k, v):  # key 90 of KV head 1 is seen by query 1 alone
        t = poisoned.clone()
        t[0, 90, 1] = math.nan
        hi = torch.tensor([[90, 91, 5]], dtype=torch.int32)
        out, lse = attend(q, t if poisoned is k else k, t if poisoned is v else v, hi=hi, processors=processors)
        assert out[0, 1, 1].isnan().all() and bool(lse[0, 1, 1].isnan()) == (poisoned is k)
        assert out[0, [0, 2]].isfinite().all() and out[:, :, 0].isfinite().all()


@pytest.mark.parametrize("processors", [1, 16])
@pytest.mark.parametrize("size", [-math.inf, 3e38])
def test_infinite_scores_give_the_results_of_the_definition(size, processors):
    q, k, v = torch.ones(1, 2, 1, 8), torch.ones(1, 150, 1, 8), torch.randn(1, 150, 1, 8)
    k[0, 1:3] = size
    seen = [{name: torch.tensor([x], dtype=torch.int32) for name, x in (("lo", [1, 1]), ("hi", [2, 5]))}, {}]
    for bounds in seen:
        out, lse = attend(q, k, v, processors=processors, **bounds)
        want, want_lse = cross_attention_reference(q, k, v, **bounds)
        torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-6, equal_nan=True)
        finite = want_lse.isfinite()
        torch.testing.assert_close(lse[finite], want_lse[finite])
        assert not lse[~finite].isfinite().any()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order}{s.seed}")
def test_empty_intervals_and_no_keys(schedule):
    q, k, v = tensors(m=2, n=131)
    bounds = {"lo": torch.tensor([[5, 3]], dtype=torch.int32), "hi": torch.tensor([[5, 2]], dtype=torch.int32)}
    for keys, options in ((131, bounds), (0, {})):
        out, lse = attend(q, k[:, :keys].clone(), v[:, :keys].clone(), schedule, **options)
        assert (out == 0).all() and (lse == -math.inf).all()


def test_a_row_depends_only_on_its_own_interval():
    """A row's bits do not depend on the other rows' intervals, nor on the keys that the row does not see."""
    q, k, v = tensors(m=3, n=200, h=1, hkv=1, d=40)
    own = torch.tensor([70, 130], dtype=torch.int32)
    bounds = [
        {name: torch.tensor([[a, own[i], b]], dtype=torch.int32) for i, (name, a, b) in enumerate(pairs)}
        for pairs in (
            (("lo", 0, 0), ("hi", 200, 200)),
            (("lo", 69, 150), ("hi", 131, 190)),
            (("lo", 9, 9), ("hi", 9, 9)),
        )
    ]
    first = attend(q, k, v, **bounds[0])
    for options in bounds[1:]:
        out, lse = attend(q, k, v, **options)
        assert same((out[:, 1], lse[..., 1]), (first[0][:, 1], first[1][..., 1]))
    other_k, other_v = k.clone(), v.clone()
    for t in (other_k, other_v):
        t[:, :70], t[:, 130:] = 7.0, -7.0
    out, lse = attend(q, other_k, other_v, **bounds[0])
    assert same((out[:, 1], lse[..., 1]), (first[0][:, 1], first[1][..., 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_views_and_copies_give_the_same_bits(dtype):
    q, k, v = tensors(b=2, n=77, dtype=dtype)
    want = attend(q, k, v)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert all(wide_loads(t) is t for t in heads_first) and same(attend(*heads_first), want)
    both = torch.cat((k, v), dim=-1).chunk(2, dim=-1)
    assert all(wide_loads(t) is t for t in both) and same(attend(q, *both), want)
    odd = [torch.nn.functional.pad(t, (1, 2))[..., 1:-2] for t in (q, k, v)]
    assert not any(wide_loads(t) is t for t in odd) and same(attend(*odd), want)


def test_a_misaligned_row_is_found():
    q, k, v = tensors(d=16)
    shifted = torch.nn.functional.pad(k, (1, 3))[..., 1:-3]  # rows of 20 elements that begin at element 1
    integers = [0, 1, 3, 4, 131, 2, 16, 0, 16]
    for t in (q, shifted, v):
        integers += [t.storage_offset(), *t.stride()[:3]]
    whole = torch.nn.functional.pad(k, (1, 3))
    out, lse = torch.empty_like(q), torch.empty(1, 4, 3)
    with pytest.raises(EmulationError, match="not a multiple of 16: `k`"):
        emulation.call("cross_attention", [q, whole, v, None, None, out, lse], integers, [0.25])


def test_the_number_of_splits_changes_only_rounding():
    q, k, v = tensors(n=1100, d=64)
    truth = cross_attention_reference(*(t.double() for t in (q, k, v)))[0]
    outs = [attend(q, k, v, processors=p)[0] for p in (1, 4, 132)]
    assert not torch.equal(outs[0], outs[2])  # the splits do differ
    for out in outs:
        assert float((out - truth).abs().max()) < 2e-6


# ---- dual_lora ------------------------------------------------------------------------------------------------------


def lora_inputs(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Inputs:
    return LORA.build(LORA.case(name, dtype, **changes), torch.device("cpu"))


def update(inputs: Inputs, processors: int = 0, schedule: Schedule = SCHEDULES[0]) -> Tensor:
    return emulation.adapter("dual_lora").run(inputs, schedule, most_blocks=processors)["out"]


@pytest.mark.parametrize("name", ["plain", "plain gelu", "square gelu"])
def test_dual_lora_tokens_are_independent(name):
    """A token's bits do not depend on the columns per block, and a NaN stays in its row."""
    inputs = lora_inputs(name, lead=(11,), d_out=70)
    want = update(inputs)
    assert torch.equal(update(inputs, processors=1), want)
    poisoned = dict(inputs, x=inputs["x"].clone())
    poisoned["x"][3] = math.nan
    out = update(poisoned)
    assert out[3].isnan().all()
    out[3] = want[3]
    assert torch.equal(out, want)


def test_dual_lora_with_a_saturated_gate_is_finite():
    for name in ("saturated", "saturated gelu"):
        out = update(lora_inputs(name, spread=1e4))
        assert out.isfinite().all()


def test_dual_lora_kernels_do_not_take_more_than_64_tokens():
    assert emulation.adapter("dual_lora").run(lora_inputs("plain", lead=(65,))) is None


def source_limits(path: str) -> dict[str, int]:
    """Return the constants kMax... of a file of csrc/."""
    text = (emulation.CSRC / path).read_text()
    return {name: int(value) for name, value in re.findall(r"(kMax\w+) = (\d+)", text)}


def test_cross_attention_limits_in_python_are_those_of_the_source():
    assert source_limits("cross_attention/limits.h")["kMaxQueries"] == NATIVE_MAX_QUERIES
    folder = emulation.CSRC / "cross_attention"
    elsewhere = [p.name for p in folder.iterdir() if p.name != "limits.h" and "kMaxQueries =" in p.read_text()]
    assert not elsewhere, f"kMaxQueries must be defined in limits.h alone, also in {elsewhere}"


def test_the_emulated_kernels_refuse_more_queries_than_the_limit():
    over = NATIVE_MAX_QUERIES + 1
    q, k, v = tensors(m=over, d=16)
    integers = [0, 1, over, 4, 131, 2, 16, 0, 16]
    for t in (q, k, v):
        integers += [t.storage_offset(), *t.stride()[:3]]
    out, lse = torch.empty_like(q), torch.empty(1, 4, over)
    with pytest.raises(EmulationError, match=f"`q` must have at most {NATIVE_MAX_QUERIES} queries, got M = {over}"):
        emulation.call("cross_attention", [q, k, v, None, None, out, lse], integers, [0.25])


def test_dual_lora_limits_in_python_are_those_of_the_source():
    from calm_fast._ops.dual_lora.native import CUDA_MAX_FUSED, CUDA_MAX_RANK, CUDA_MAX_TOKENS

    assert source_limits("dual_lora/dual_lora.cuh") == {
        "kMaxTokens": CUDA_MAX_TOKENS,
        "kMaxFused": CUDA_MAX_FUSED,
        "kMaxRank": CUDA_MAX_RANK,
    }


# ---- on a GPU -------------------------------------------------------------------------------------------------------


def on_gpu(op: str) -> torch.device:
    """Return the GPU; skip the test if the library cannot run `op` there."""
    if why := native_library.obstacle(op, "cuda"):
        pytest.skip(why)
    return torch.device("cuda")


def replay(call: Callable[..., Any], *inputs: Tensor) -> tuple[Any, Any]:
    """Overwrite the inputs of a captured call. Return the results of the replayed CUDA graph and of a plain call."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    for t in inputs:
        t.copy_(torch.randn_like(t))
    graph.replay()
    return captured, call(*inputs)


@pytest.mark.gpu
def test_decode_in_a_cuda_graph():
    device = on_gpu("cross_attention")
    q, k, v = (t.to(device) for t in tensors(b=2, m=1, n=1500, d=128, dtype=torch.bfloat16))
    captured, plain = replay(lambda *x: cross_attention(*x, return_lse=True, impl="native"), q, k, v)
    assert same(captured, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["square", "square gelu"])
def test_dual_lora_in_a_cuda_graph(name):
    device = on_gpu("dual_lora")
    inputs = lora_inputs(name, torch.bfloat16, lead=(5,))
    names = ("a_pos", "b_pos", "a_neg", "b_neg", "w_q", "w_k")
    factors = [inputs[n].to(device) for n in names]
    value = tuple(inputs[n].to(device) for n in ("value0", "value1"))
    options = {"scaling": inputs["scaling"], "activation": inputs["activation"], "impl": "native"}
    x, y = inputs["x"].to(device), inputs["y"].to(device)
    captured, plain = replay(lambda x, y: dual_lora(x, y, *factors, value, **options), x, y)
    assert torch.equal(captured, plain)


@pytest.mark.gpu
def test_shapes_beyond_the_kernels_limits_are_refused():
    device = on_gpu("cross_attention")
    q, k, v = (t.to(device) for t in tensors(d=20))
    with pytest.raises(RuntimeError, match="multiple of 8, not 20"):
        cross_attention(q, k, v, impl="native")
    q, k, v = (t.to(device) for t in tensors(m=NATIVE_MAX_QUERIES + 1))
    with pytest.raises(RuntimeError, match=f"at most {NATIVE_MAX_QUERIES} queries"):
        cross_attention(q, k, v, impl="native")
