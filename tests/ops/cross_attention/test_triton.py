"""cross_attention's Triton kernels against the float64 definition, in the interpreter or on a GPU."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import pytest
import torch

from calm_fast._ops.cross_attention.cases import Spec, causal, full, scattered, window
from calm_fast._ops.cross_attention.reference import cross_attention_reference
from calm_fast.core.launch_config import measured_configs, nearest
from calm_fast.core.numerics import Case, check
from calm_fast.verify.cases import op_cases

pytest.importorskip("triton", reason="the kernels need Triton; it has wheels for Linux only")
from calm_fast.kernels.common import hardware
from calm_fast.kernels.common.config_table import padded
from calm_fast.kernels.cross_attention import launch as kernels
from calm_fast.kernels.cross_attention import launch_bwd, problem
from calm_fast.kernels.cross_attention.configs import (
    TABLES,
    AttentionConfig,
    BackwardConfig,
    DecodeConfig,
    attention_tile,
    column_parts,
    table_size,
)

OPS = op_cases("cross_attention")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, kernel_device):
    """The CPU through the interpreter, or the GPU: one session compiles kernels or interprets them, never both."""
    if request.param == "interpreter" and kernel_device.type != "cpu":
        pytest.skip("this session has a GPU: its kernels are compiled")
    return kernel_device


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill fresh memory with NaN (or an absurd integer), so that elements a kernel leaves unwritten show."""
    empty = torch.empty

    def filled(*args, **kwargs):
        t = empty(*args, **kwargs)
        return t.fill_(math.nan if t.is_floating_point() else -(2**30))

    monkeypatch.setattr(torch, "empty", filled)


def judged(case, device):
    rows = check(OPS, case, "triton", device)
    assert len(rows) >= 4
    wrong = [f"{r.quantity}: error {r.error:.3g} > bound {r.bound:.3g} {r.note}" for r in rows if not r.ok]
    assert not wrong, f"{case}: {wrong}"


def case(name, dtype=torch.float32, **spec):
    return Case("cross_attention", name, dtype, Spec(**spec))


def inputs(device, m=20, n=45, b=2, h=2, hkv=1, d=16, mask=scattered, dtype=torch.float32):
    return OPS.build(case("", dtype, b=b, m=m, n=n, h=h, hkv=hkv, d=d, mask=mask), device)


def forward(i, config=None, **changes):
    i = {**i, **changes}
    scale = i["q"].shape[-1] ** -0.5
    return kernels.launch_cross_attention_fwd(i["q"], i["k"], i["v"], i["lo"], i["hi"], i["causal"], scale, config)


def backward(i, out, lse, config=None, **changes):
    i = {**i, **changes}
    return launch_bwd.launch_cross_attention_bwd(
        i["dout"], i["dlse"], i["q"], i["k"], i["v"], out, lse, i["lo"], i["hi"], i["causal"],
        i["q"].shape[-1] ** -0.5, config,
    )  # fmt: skip


# a case without lse differs in one branch of one kernel: a few prove it
SHARED = [c for c in OPS.cases() if c.spec.lse or c.dtype != torch.float32 or c.name in ("full, no lse", "gqa, no lse")]


@pytest.mark.parametrize("shared", SHARED, ids=str)
def test_triton_meets_the_error_rule_on_the_shared_cases(shared, device):
    judged(shared, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [16, 24, 64, 80, 96, 128, 192])
def test_every_head_dim_and_dtype(d, dtype, device):
    judged(case(f"d{d}", dtype, b=1, m=17, n=33, h=1, d=d, mask=scattered), device)


def test_a_head_dim_has_two_column_parts_where_that_saves_products():
    """Both are powers of two from 16 on, as tiles must be, and together fewer columns than one part."""
    found = {d: column_parts(d, "fwd", "sm_90") for d in range(1, 257)}
    two = {d for d in found if found[d][1]}
    assert two == {*range(65, 97), *range(129, 193)}
    assert all(found[d] == (padded(d), 0) for d in found.keys() - two)
    for first, rest in ((64, 16), (64, 32), (128, 16), (128, 32), (128, 64)):
        assert found[first + rest] == found[first + rest - 7] == (first, rest)
    assert column_parts(192, "dkdv", "sm_80") == (128, 64)
    assert column_parts(96, "dkdv", "sm_80") == (128, 0)  # there two parts spill


@pytest.mark.parametrize("d", [80, 96, 192])
def test_the_kernels_get_no_more_columns_than_the_head_dim_has(d, device, monkeypatch):
    """In multiples of 16, which is the depth of a product; one part would be 128 or 256 columns."""
    given = []
    for launcher in (kernels, launch_bwd):
        monkeypatch.setattr(launcher, "launch", lambda *_, **named: given.append(named))
    i = inputs(device, m=200, n=8, b=1, d=d, mask=causal, dtype=torch.bfloat16)
    out, lse = forward({"lo": None, "hi": None} | i)
    backward({"lo": None, "hi": None} | i, out, lse)
    widths = [named["BLOCK_D"] + named["REST_D"] for named in given if "REST_D" in named]
    assert widths == [d] * 4  # forward, dk and dv, their repair, dq


@pytest.mark.parametrize("d", [1, 3, 256])
def test_extreme_head_dims(d, device):
    judged(case(f"d{d}", b=1, m=17, n=35, h=1, d=d, mask=causal), device)


@pytest.mark.parametrize("m, n", [(1, 1), (1, 53), (19, 1), (37, 41), (41, 37)])
@pytest.mark.parametrize("mask", [full, causal, window], ids=lambda f: f.__name__)
def test_prime_and_single_sizes(m, n, mask, device):
    judged(case(f"{m}x{n}", b=1, m=m, n=n, h=1, d=16, mask=mask), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", [full, causal, scattered], ids=lambda f: f.__name__)
def test_decode_over_several_splits(mask, dtype, device):
    judged(case("decode", dtype, b=1, m=2, n=151, h=6, hkv=2, d=24, mask=mask), device)


KERNELS = ("fwd", "packed128", "decode")


@pytest.mark.parametrize("d", [24, 80])  # one column part and two
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("mask", [causal, scattered], ids=lambda f: f.__name__)
def test_every_kernel_of_the_forward_pass_meets_the_definition(mask, kernel, d, device, monkeypatch):
    """Few queries and packed rows have kernels of their own; small tests would never reach the one for many."""
    monkeypatch.setattr(kernels, "_config", lambda p: p.config(TABLES[kernel], measured=False))
    i = inputs(device, b=1, m=21, n=101, h=2, hkv=1, d=d, mask=mask)
    i = {"lo": None, "hi": None, "causal": False} | i
    truth = cross_attention_reference(*(i[x].double() for x in "qkv"), i["lo"], i["hi"], causal=i["causal"])
    for found, expected in zip(forward(i), truth, strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("mask", [causal, scattered], ids=lambda f: f.__name__)
@pytest.mark.parametrize("m, d", [(20, 64), (20, 128), (40, 64), (40, 128), (40, 80)])
def test_packed_rows_over_several_splits(m, d, mask, dtype, kernel_device):
    """40 rows of a KV head are one tile of 64, 80 are one of 128."""
    judged(case("packed", dtype, b=1, m=m, n=2100, h=2, hkv=1, d=d, mask=mask), kernel_device)


@pytest.fixture
def h200(monkeypatch):
    """An H200 as far as the choice of a launch config can tell."""
    monkeypatch.setattr(hardware, "gpu", lambda device: hardware.Gpu("NVIDIA H200", 90, 132))
    monkeypatch.setattr(problem, "_INTERPRETED", False)


def chosen(b=1, m=64, n=4096, h=32, hkv=32, d=128, dtype=torch.bfloat16):
    q, k = (torch.empty(b, rows, heads, d, dtype=dtype, device="meta") for rows, heads in ((m, h), (n, hkv)))
    return kernels._config(problem.make_problem(q, k, k, None, None, True, 1.0))


@pytest.mark.parametrize("h, hkv", [(32, 32), (32, 8), (40, 40), (16, 16), (64, 8)])
@pytest.mark.parametrize("m", [17, 32, 64, 100, 128])
def test_some_queries_against_long_keys_fill_the_gpu(m, h, hkv, h200):
    """One sequence, 4,096 keys: a program per head alone would be 12 to 48 % of the multiprocessors."""
    config = chosen(m=m, h=h, hkv=hkv)
    tiles = math.ceil(m * (h // hkv) / config.block_r) * hkv
    assert tiles * math.ceil(4096 / config.split_keys) >= 0.84 * 132
    assert config.split_keys == 256 or tiles * math.ceil(4096 / config.split_keys) <= 1.5 * 132


def test_the_kernel_of_a_row_depends_on_neither_the_batch_nor_the_number_of_keys(h200):
    for m, h, hkv in ((1, 32, 8), (16, 32, 8), (64, 32, 32), (128, 32, 8), (129, 32, 8)):
        assert len({chosen(b, m, n, h, hkv) for b in (1, 64) for n in (100, 4096, 100000)}) == 1


def only(side):
    def make(b, m, n, g):
        return {side: scattered(b, m, n, g)[side]}

    make.__name__ = f"only {side}"
    return make


@pytest.mark.parametrize("side", ["lo", "hi"])
@pytest.mark.parametrize("m", [1, 40])
def test_one_sided_intervals(side, m, device):
    judged(case(side, b=1, m=m, n=75, h=2, hkv=1, d=16, mask=only(side)), device)


def blocks_apart(b, m, n, g):
    """Tiles that see every key between tiles that see few: the unmasked run of a key block ends and resumes."""
    tile = torch.arange(m) // 16
    lo = torch.where(tile % 3 == 1, n // 2, 0).expand(b, m)
    hi = torch.where(tile % 3 == 2, n // 3, n).expand(b, m)
    return {"lo": lo.int(), "hi": hi.int()}


def test_full_query_tiles_that_do_not_adjoin(device):
    judged(case("apart", b=1, m=110, n=66, h=1, d=16, mask=blocks_apart), device)


def test_sharp_scores_do_not_overflow(device):
    spec = replace(case("", b=1, m=20, n=70, h=1, d=16, mask=full).spec, magnitude=40.0)
    judged(Case("cross_attention", "sharp", torch.float32, spec), device)


@pytest.mark.parametrize("m", [2, 20])
def test_rows_without_keys_give_exact_zeros(m, device):
    i = inputs(device, m=m)
    i["lo"], i["hi"] = torch.full_like(i["lo"], 7), torch.full_like(i["hi"], 7)
    out, lse = forward(i)
    assert torch.equal(out, torch.zeros_like(out)) and bool((lse == -math.inf).all())
    grads = backward(i, out, lse)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in grads)


def test_rows_without_keys_beside_rows_that_see_everything(device):
    """Inside an unmasked block the empty row must not count, forward or backward."""
    i = inputs(device, b=1, m=20, n=64)
    lo, hi = torch.zeros_like(i["lo"]), torch.full_like(i["hi"], 64)
    hi[0, 5] = 0
    i |= {"lo": lo, "hi": hi}
    out, lse = forward(i)
    assert bool((out[0, 5] == 0).all()) and bool((lse[0, :, 5] == -math.inf).all())
    dlse = i["dlse"].clone()
    dlse[..., 5] = math.nan  # the logarithm of an empty sum has no finite derivative
    dq, dk, dv = backward(i, out, lse, dlse=dlse)
    keep = torch.arange(20, device=device) != 5
    j = {name: i[name][:, keep] for name in ("q", "dout", "lo", "hi")} | {"dlse": i["dlse"][..., keep]}
    _, dk_without, dv_without = backward(i, out[:, keep], lse[..., keep].contiguous(), **j)
    assert bool((dq[0, 5] == 0).all())
    torch.testing.assert_close(dk, dk_without)
    torch.testing.assert_close(dv, dv_without)


@pytest.mark.parametrize("m", [3, 20])
def test_empty_tensors(m, device):
    i = inputs(device, m=m)
    none = {name: i[name][:, :0] for name in ("k", "v")} | {"lo": None, "hi": None}
    out, lse = forward(i, **none)
    assert bool((out == 0).all()) and bool((lse == -math.inf).all())
    assert bool((backward(i, out, lse, **none)[0] == 0).all())
    none = {name: i[name][:, :0] for name in ("q", "dout", "lo", "hi")} | {"dlse": i["dlse"][..., :0]}
    out, lse = forward(i, **none)
    assert out.shape[1] == 0 and lse.shape[2] == 0
    assert all(bool((g == 0).all()) for g in backward(i, out, lse, **none))


@pytest.mark.parametrize("m", [3, 20])
def test_a_nan_query_stays_in_its_row(m, device):
    i = inputs(device, m=m, mask=full)
    clean, clean_lse = forward(i)
    i["q"][1, 2, 1, 0] = math.nan
    out, lse = forward(i)
    assert bool(out[1, 2, 1].isnan().all()) and bool(lse[1, 1, 2].isnan())
    out[1, 2, 1], lse[1, 1, 2] = clean[1, 2, 1], clean_lse[1, 1, 2]
    assert torch.equal(out, clean) and torch.equal(lse, clean_lse)


@pytest.mark.parametrize("m", [3, 20])
def test_strides_do_not_change_a_bit(m, device):
    i = inputs(device, m=m)
    out, lse = forward(i)
    grads = backward(i, out, lse)
    last = {name: i[name].transpose(1, 3).contiguous().transpose(1, 3) for name in ("q", "k", "v", "dout")}
    wide = {name: torch.stack([i[name], i[name]], 3)[..., 0, :] for name in ("q", "k", "v", "dout")}
    bounds = {name: i[name].t().contiguous().t() for name in ("lo", "hi")}
    for changes in (last, wide, bounds):
        again = forward(i, **changes)
        assert torch.equal(again[0], out) and torch.equal(again[1], lse)
        assert all(torch.equal(a, b) for a, b in zip(backward(i, *again, **changes), grads, strict=True))


def test_expanded_inputs(device):
    i = inputs(device, b=1, hkv=1, n=30)
    shared = {name: i[name].expand(2, *i[name].shape[1:]) for name in ("q", "k", "v", "lo", "hi")}
    shared["dout"] = torch.ones((), device=device).expand(2, 20, 2, 16)  # the upstream gradient of out.sum()
    out, lse = forward(i, **shared)
    grads = backward(i, out, lse, **shared, dlse=torch.ones((), device=device).expand(2, 2, 20))
    assert torch.equal(out[0], out[1]) and all(torch.equal(g[0], g[1]) for g in grads)
    truth, _ = cross_attention_reference(*(i[x].double() for x in ("q", "k", "v")), i["lo"], i["hi"])
    torch.testing.assert_close(out[:1].double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m", [3, 20])
def test_the_same_bits_every_time(m, device):
    i = inputs(device, m=m, dtype=torch.bfloat16)
    repeats = 20 if device.type == "cuda" else 2
    first = forward(i)
    grads = backward(i, *first)
    for _ in range(repeats):
        again = forward(i)
        assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(backward(i, *again), grads, strict=True))


@pytest.mark.parametrize("m", [2, 20, 40])
def test_a_row_does_not_depend_on_batch_neighbours_or_unseen_keys(m, device):
    i = inputs(device, m=m)
    out, lse = forward(i)
    alone = {name: i[name][1:] for name in ("q", "k", "v", "lo", "hi")}
    assert torch.equal(forward(i, **alone)[0], out[1:])
    # keys behind every interval, and other intervals for the other rows of the tile
    longer = {name: torch.cat([i[name], torch.randn_like(i[name])], 1) for name in ("k", "v")}
    assert torch.equal(forward(i, **longer)[0], out)
    lo, hi = i["lo"].clone(), i["hi"].clone()
    lo[:, 1:], hi[:, 1:] = 0, 45
    again, again_lse = forward(i, lo=lo, hi=hi)
    assert torch.equal(again[:, 0], out[:, 0]) and torch.equal(again_lse[..., 0], lse[..., 0])


CONFIGS = [attention_tile(16, 16, 4, 1), attention_tile(64, 32, 4, 2), attention_tile(32, 64, 8, 1)]
CONFIGS += [DecodeConfig(block_r=32, block_n=16, split_keys=32, num_warps=4, num_stages=1)]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_other_tiles_give_the_same_attention(config, device):
    i = inputs(device)
    out, lse = forward(i)
    other, other_lse = forward(i, config)
    torch.testing.assert_close(other, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(other_lse, lse, rtol=1e-5, atol=1e-6)
    if isinstance(config, AttentionConfig):
        grads = backward(i, out, lse, BackwardConfig(dkdv=config, dq=config))
        for a, b in zip(grads, backward(i, out, lse), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_launchers_refuse_wrong_arguments(device):
    i = inputs(device)
    with pytest.raises(ValueError, match="`scale` must be positive"):
        kernels.launch_cross_attention_fwd(i["q"], i["k"], i["v"], None, None, False, 0.0)
    wide = torch.zeros(1, 2, 1, 257, device=device)
    with pytest.raises(ValueError, match="at most 256, got 257"):
        kernels.launch_cross_attention_fwd(wide, wide, wide, None, None, False, 1.0)


def test_every_default_config_exists_and_the_nearest_measured_one_wins(tmp_path):
    for arch in (80, 86, 89, 90, 100, 103, 120):
        for dtype in DTYPES:
            for part in ("fwd", "dkdv", "dq", "decode"):
                found = [TABLES[part].default(arch, dtype, table_size(d)) for d in (16, 32, 64, 128, 256)]
                assert {type(c) for c in found} == {TABLES[part].kind}
    small, large = attention_tile(64, 32, 4, 2), attention_tile(128, 64, 8, 3)
    entries = [
        {"part": "fwd", "dtype": "bfloat16", "head_dim": 128, "shape": {"M": m}, "config": asdict(c)}
        for m, c in ((512, small), (8192, large))
    ]
    (tmp_path / "nvidia_h200.json").write_text(json.dumps({"entries": entries}))
    found = measured_configs(AttentionConfig, tmp_path, "NVIDIA H200", "fwd", "bfloat16", 128)
    for m, expected in ((1, small), (1000, small), (5000, large), (10**6, large)):
        assert nearest(found, {"M": m, "N": 4096}) == expected
    assert nearest(measured_configs(AttentionConfig, tmp_path, "NVIDIA H200", "fwd", "float16", 128), {"M": 1}) is None
    assert not measured_configs(AttentionConfig, tmp_path, "NVIDIA H100", "fwd", "bfloat16", 128)
    with pytest.raises(ValueError, match="`config` of part fwd .* must have the fields .*'block_r'.*, got .*'block_m'"):
        measured_configs(DecodeConfig, tmp_path, "NVIDIA H200", "fwd", "bfloat16", 128)


def test_configs_that_no_kernel_can_be_launched_with_are_refused():
    with pytest.raises(ValueError, match="AttentionConfig: `block_m` must be a power of two, got 48"):
        attention_tile(48, 32, 4, 1)
    with pytest.raises(ValueError, match="AttentionConfig: `num_warps` must be a power of two, got 3"):
        attention_tile(64, 32, 3, 1)
    with pytest.raises(ValueError, match="AttentionConfig: `num_stages` must be at least 1, got 0"):
        attention_tile(64, 32, 4, 0)
    with pytest.raises(
        ValueError, match="DecodeConfig: `split_keys` must be a positive multiple of block_n 32, got 48"
    ):
        DecodeConfig(block_r=16, block_n=32, split_keys=48, num_warps=4, num_stages=1)
