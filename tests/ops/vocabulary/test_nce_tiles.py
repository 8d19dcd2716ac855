"""The form for CPUs with matrix units: torch's products of whole chunks, their rows in the compiled library."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_nce import schedule, tiles
from calm_fast._ops.linear_nce.api import decide, linear_nce
from calm_fast._ops.linear_nce.cases import CASES
from calm_fast._ops.linear_nce.native import linear_nce_native_step
from calm_fast._ops.vocabulary import decide as decisions
from calm_fast.core import native_library
from calm_fast.core.numerics import check

if why := native_library.obstacle("linear_nce_rows"):
    pytest.skip(why, allow_module_level=True)

HALF = (torch.bfloat16, torch.float16)
NAMES = (
    "plain", "frozen", "single", "one-column", "all-ignored-frozen", "one-sequence", "past-edges", "long-rows-frozen",
    "temperature-low", "softcap", "everything", "everything-frozen", "bias-frozen", "logits-100-frozen",
    "sharp-frozen", "far-teachers-frozen", "chunks-frozen", "long-sequences-frozen", "strided-frozen",
)  # fmt: skip
ARGUMENTS = ("student", "nat", "neg", "weight", "targets", "seq_ids")


@pytest.fixture
def units(monkeypatch):
    """Let the CPU have matrix units, for few logits too, and cut neg's logits into tiles."""
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None if dtype == torch.float32 else "matrix units")
    monkeypatch.setattr(decisions, "AT_ONCE", 0)
    monkeypatch.setattr(tiles, "_TILE", 96)


def build(v=83, tokens=24, d=16, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    student, nat, neg = (torch.randn(tokens, d, generator=g).to(dtype) for _ in range(3))
    weight = (torch.randn(v, d, generator=g) * d**-0.5).to(dtype)
    targets = torch.randint(0, v, (tokens,), generator=g)
    return {"student": student, "nat": nat, "neg": neg, "weight": weight, "targets": targets,
            "seq_ids": torch.arange(tokens) // 5}  # fmt: skip


def step(inputs, impl="native", **options):
    student = inputs["student"].detach().requires_grad_()
    loss = linear_nce(**{**inputs, "student": student}, impl=impl, **options)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_loss_and_gradients_within_the_error_rule(units, name, dtype, lane):
    case = CASES.case(name, dtype)
    wrong = [row for row in check(CASES, case, "native") if not row.ok]
    assert not wrong
    inputs = CASES.build(case, torch.device("cpu"))
    assert decide(*(inputs[name] for name in ARGUMENTS)).impl == "native"


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunks_and_tiles_do_not_matter(units, monkeypatch, temperature):
    """Sequences that fit into a chunk, and such that are calibrated first; tiles of one column and of all."""
    inputs = build(tokens=60)
    expected = step(inputs, "reference", temperature=temperature)
    for kept, tile in ((24 << 20, 96), (24 << 20, 1 << 20), (2 * 83 * 2 * 3, 96), (2 * 83 * 2 * 3, 1)):
        monkeypatch.setattr(schedule, "_KEPT", kept)
        monkeypatch.setattr(tiles, "_TILE", tile)
        loss, gradient = step(inputs, temperature=temperature)
        torch.testing.assert_close(loss, expected[0], rtol=1e-3, atol=0)
        torch.testing.assert_close(gradient, expected[1], rtol=2**-6, atol=2e-4)
        without = linear_nce(**inputs, temperature=temperature, impl="native")
        torch.testing.assert_close(without, loss, rtol=1e-6, atol=0)


def test_banned_tokens_are_as_absent_ones(units):
    """A bias of -inf rules out more than a piece of 2048 columns, the first and the last one too."""
    inputs = build(v=6200)
    kept = slice(2100, 4000)
    banned = torch.ones(6200, dtype=torch.bool)
    banned[kept] = False
    bias = torch.zeros(6200, dtype=torch.bfloat16).masked_fill_(banned, float("-inf"))
    inputs["targets"] = inputs["targets"] % 1900 + 2100
    alone = {**inputs, "weight": inputs["weight"][kept], "targets": inputs["targets"] - 2100}
    for temperature in (1.0, 1.7):
        found = step(inputs, bias=bias, temperature=temperature)
        for got, expected in zip(found, step(alone, temperature=temperature), strict=True):
            torch.testing.assert_close(got, expected, rtol=2**-7, atol=1e-5)


def test_unknown_targets_and_rows_that_are_not_finite(units):
    inputs = build()
    clean = step(inputs)[1]
    inputs["targets"] = inputs["targets"].clone()
    inputs["targets"][3], inputs["targets"][17] = 83, -1
    gradient = linear_nce_native_step(
        *(inputs[n] for n in ("student", "nat", "neg", "weight")), None, inputs["targets"], inputs["seq_ids"],
        0.5, 1.0, 0.5, None, -100,
    )[1]  # fmt: skip
    wrong = torch.zeros(24, dtype=torch.bool).index_fill_(0, torch.tensor([3, 17]), True)
    assert bool(gradient[wrong].isnan().all())
    torch.testing.assert_close(gradient[~wrong].bfloat16(), clean[~wrong], rtol=2**-7, atol=1e-6)
    broken = build()
    broken["student"][12] = float("nan")
    loss, gradient = step(broken)
    assert bool(loss.isnan()) and bool(gradient[12].isnan().all())
    others = torch.arange(24) != 12
    torch.testing.assert_close(gradient[others], clean[others], rtol=2**-7, atol=1e-6)


def test_rows_of_sums_against_float64(lane):
    """Column counts around whole vectors and pieces of 2048, every stream that may be missing, bias and softcap."""
    g = torch.Generator().manual_seed(1)
    for v in (1, 15, 33, 2047, 2049, 6151):
        z, nat, neg = ((3 * torch.randn(5, v, generator=g)).bfloat16() for _ in range(3))
        bias = torch.linspace(-1, 1, v)
        wide = [5.0 * torch.tanh((t.double() + bias) / 5.0) for t in (z, nat, neg)]
        for tau in (1.0, 0.6):
            tops = [t.amax(1) for t in wide]
            d, e, f = (t - top[:, None] for t, top in zip(wide, tops, strict=True))
            soft, hard = (e / tau).exp(), f.exp()
            student = [tops[0], d.exp().sum(1), (d / tau).exp().sum(1)]
            expected = [*student, tops[1], e.exp().sum(1), soft.sum(1), (soft * d).sum(1)]
            expected += [tops[2], hard.sum(1), (hard * (f - e)).sum(1)]
            sums = torch.ops.calm_fast._linear_nce_native_rows(z, nat, neg, bias, tau, 5.0)
            for got, want in zip(sums, expected, strict=True):
                # sums of v terms whose sizes are those of the powers' sum times at most 11
                torch.testing.assert_close(got, want, rtol=4e-6, atol=4e-6 * float(sums[8].max()))
            alone = torch.ops.calm_fast._linear_nce_native_rows(None, nat, None, bias, tau, 5.0)
            torch.testing.assert_close(alone[3:6], sums[3:6], rtol=1e-6, atol=0)
            assert not alone[[1, 2, 6, 8, 9]].any()


def test_bad_calls():
    op = torch.ops.calm_fast._linear_nce_native_rows
    z = torch.randn(4, 9).bfloat16()
    with pytest.raises(RuntimeError, match="`nat` must have columns that are neighbours"):
        op(None, z.T, None, None, 1.0, None)
    for other in (z[:3], z[:, :8], z.half()):
        with pytest.raises(RuntimeError, match="`neg` must have"):
            op(None, z, other, None, 1.0, None)
    with pytest.raises(RuntimeError, match="bias"):
        op(None, z, None, torch.zeros(8), 1.0, None)
