"""linear_nce's training step in C++: kept logits and the gradient computed from them, in every lane."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_nce.cases import CASES
from calm_fast.core import native_library
from calm_fast.core.numerics import check

if why := native_library.obstacle("linear_nce"):
    pytest.skip(why, allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FROZEN = [case for case in CASES.cases() if case.spec.frozen]


def draw(t, d, v, dtype, seed=0):
    """Return student, nat, neg, weight and targets whose logits have standard deviation 1."""
    gen = torch.Generator().manual_seed(seed)
    streams = [torch.randn(t, d, generator=gen).to(dtype) for _ in range(3)]
    weight = (torch.randn(v, d, generator=gen) * d**-0.5).to(dtype)
    return *streams, weight, torch.randint(0, v, (t,), generator=gen)


def memory(weight, tokens):
    dtype = torch.float16 if weight.dtype == torch.bfloat16 else torch.float32
    return torch.full((2, weight.shape[0], -(-tokens // 16) * 16), float("nan"), dtype=dtype)


def gradient(student, nat, weight, targets, coefficients, bias=None, temperature=1.0, softcap=None):
    """Return the gradient (T, d) at given coefficients (2, T), from logits kept by a sweep."""
    kept, options = memory(weight, len(targets)), (temperature, softcap)
    fwd, bwd = (getattr(torch.ops.calm_fast, f"_linear_nce_native_{name}") for name in ("fwd", "gradient"))
    norms, _, references = fwd(student, nat, None, weight, bias, targets, *options, kept)
    return bwd(coefficients, kept, references, weight, targets, norms, *options)


def truth(student, nat, weight, targets, coefficients, bias=None, temperature=1.0, softcap=None):
    student, nat, weight, (hard, soft) = student.double(), nat.double(), weight.double(), coefficients.double()
    z, z_nat = (h @ weight.T + (0 if bias is None else bias.double()) for h in (student, nat))
    slope = 1.0
    if softcap is not None:
        z, z_nat = (softcap * torch.tanh(x / softcap) for x in (z, z_nat))
        slope = 1 - (z / softcap) ** 2
    one = torch.nn.functional.one_hot(targets, len(weight))
    p, q, r = z.softmax(1), (z / temperature).softmax(1), (z_nat / temperature).softmax(1)
    return ((hard[:, None] * (p - one) + soft[:, None] / temperature * (q - r)) * slope) @ weight


def weights(tokens, seed=9):
    gen = torch.Generator().manual_seed(seed)
    return torch.rand(2, tokens, generator=gen) + 0.5


@pytest.mark.parametrize("case", FROZEN, ids=str)
def test_every_lane_within_the_error_rule(case, lane):
    wrong = [row for row in check(CASES, case, "native", torch.device("cpu")) if not row.ok]
    assert not wrong


# tokens around whole vectors and groups, columns around blocks of 512 and splits of 2048, widths around 16 and 32
SHAPES = [(1, 3, 511), (16, 15, 512), (47, 16, 513), (48, 31, 2047), (49, 33, 2049), (97, 40, 4609), (145, 2, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "d", "v"), SHAPES)
def test_edges_in_every_lane(t, d, v, dtype, lane):
    student, nat, _, weight, targets = draw(t, d, v, dtype)
    targets[-1], targets[0] = v - 1, 0
    arguments = (student, nat, weight, targets, weights(t))
    bias = torch.linspace(-1, 1, v)
    for options in ({}, {"bias": bias, "temperature": 0.7, "softcap": 5.0}):
        found, expected = gradient(*arguments, **options), truth(*arguments, **options)
        # logits are at most 16 from the target's and have 11 bits; dz is rounded to 8
        step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18
        assert (found.double() - expected).norm() <= step * expected.norm()
        assert (found.double() - expected).abs().max() <= 4 * step * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_a_lane_do_not_depend_on_strides_or_other_tokens(dtype, lane):
    student, nat, _, weight, targets = draw(101, 37, 2600, dtype)
    coefficients = weights(101)
    expected = gradient(student, nat, weight, targets, coefficients)
    wide, spread = torch.zeros(2600, 40, dtype=dtype), torch.zeros(2600, 74, dtype=dtype)
    wide[:, 2:39], spread[:, ::2] = weight, weight
    for other in (wide[:, 2:39], spread[:, ::2], weight.T.contiguous().T):
        assert torch.equal(gradient(student, nat, other, targets, coefficients), expected)
    for part in (slice(0, 1), slice(7, 60), slice(60, 101)):
        some = (student[part], nat[part], weight, targets[part], coefficients[:, part].contiguous())
        assert torch.equal(gradient(*some), expected[part])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype):
    student, nat, _, weight, targets = draw(70, 140, 4500, dtype)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(gradient(student, nat, weight, targets, weights(70)))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_kept_logits_change_no_loss(lane):
    """A sweep returns the same losses with and without memory for logits, and with fewer streams."""
    for dtype in DTYPES:
        student, nat, neg, weight, targets = draw(50, 20, 2100, dtype)
        fwd = torch.ops.calm_fast._linear_nce_native_fwd
        rest = (weight, None, targets, 1.5, None)
        _, losses, _ = fwd(student, nat, neg, *rest, None)
        assert torch.equal(fwd(student, nat, neg, *rest, memory(weight, 50))[1], losses)
        without = fwd(student, nat, None, *rest, memory(weight, 50))[1]
        assert torch.equal(without[:2], losses[:2]) and not without[2].any()
        assert torch.equal(fwd(None, nat, neg, *rest, None)[1][2], losses[2])


def test_two_certain_distributions_cancel(lane):
    """Student and teacher are certain of the same other token: the small difference of two ones survives 16 bits."""
    gen = torch.Generator().manual_seed(0)
    targets = torch.arange(12)
    weight = (torch.eye(40, 48) + 0.05 * torch.randn(40, 48, generator=gen)).bfloat16()
    one = torch.nn.functional.one_hot(targets + 20, 48)
    student, nat = ((size * one + 0.01 * torch.randn(12, 48, generator=gen)).bfloat16() for size in (9.137, 12.291))
    coefficients = torch.stack((torch.zeros(12), torch.ones(12)))
    found = gradient(student, nat, weight, targets, coefficients).double()
    expected = truth(student, nat, weight, targets, coefficients)
    assert expected.abs().max() < 0.01
    assert (found - expected).abs().max() <= 2.0**-7 * expected.abs().max()


def test_non_finite_values_stay_in_their_token(lane):
    for dtype in DTYPES:
        student, nat, _, weight, targets = draw(70, 12, 2100, dtype)
        expected = gradient(student, nat, weight, targets, weights(70))
        student[3], student[20, 0], nat[69] = float("nan"), float("inf"), float("-inf")
        found = gradient(student, nat, weight, targets, weights(70))
        others = torch.ones(70, dtype=torch.bool)
        others[[3, 20, 69]] = False
        assert torch.equal(found[others], expected[others]) and found[~others].isnan().all()


def test_logits_beyond_16_bits(lane):
    """A logit 70000 below the target's counts as -infinity; one 70000 above it does not fit and gives NaN."""
    weight = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]).bfloat16()
    student = torch.tensor([[70144.0, 70144.0], [70144.0, 70144.0], [1.0, 2.0]]).bfloat16()
    targets = torch.tensor([0, 2, 1])
    found = gradient(student, student, weight, targets, weights(3))
    expected = truth(student, student, weight, targets, weights(3))
    torch.testing.assert_close(found[[0, 2]].double(), expected[[0, 2]], rtol=2.0**-7, atol=2.0**-9)
    assert found[1].isnan().all()


def test_masked_columns(lane):
    """A bias of -inf rules a column out for both streams."""
    for dtype in DTYPES:
        student, nat, neg, weight, targets = draw(20, 12, 2100, dtype)
        targets, coefficients = targets.remainder(1000), weights(20)
        bias = torch.zeros(2100)
        bias[1000:] = float("-inf")
        found = gradient(student, nat, weight, targets, coefficients, bias=bias)
        expected = truth(student, nat, weight[:1000], targets, coefficients)
        step = 2.0**-7 if dtype == torch.bfloat16 else 2.0**-18
        assert (found.double() - expected).norm() <= step * expected.norm()
        fwd = torch.ops.calm_fast._linear_nce_native_fwd
        losses = fwd(student, nat, neg, weight, bias, targets, 1.0, None, None)[1]
        short = fwd(student, nat, neg, weight[:1000], None, targets, 1.0, None, None)[1]
        torch.testing.assert_close(losses, short, rtol=1e-5, atol=1e-6)


def test_wrong_direct_calls_are_refused():
    student, nat, neg, weight, targets = draw(5, 8, 30, torch.float32)
    ops = torch.ops.calm_fast
    with pytest.raises(
        RuntimeError, match="linear_nce: `student` must be given where logits are kept, got `kept` without it"
    ):
        ops._linear_nce_native_fwd(None, nat, neg, weight, None, targets, 1.0, None, memory(weight, 5))
    for kept in (memory(weight, 17), memory(weight[:29], 5), memory(weight, 5).half(), memory(weight, 5)[:1]):
        with pytest.raises(RuntimeError, match="linear_nce: `kept`"):
            ops._linear_nce_native_fwd(student, nat, neg, weight, None, targets, 1.0, None, kept)
    kept = memory(weight, 5)
    norms, _, references = ops._linear_nce_native_fwd(student, nat, neg, weight, None, targets, 1.0, None, kept)
    good = [weights(5), kept, references, weight, targets, norms, 1.0, None]
    bad = {
        0: (weights(4), weights(5).double()),
        1: (memory(weight, 17), kept.half()),
        2: (references[:, :5].contiguous(),),
        3: (weight[:29], weight.bfloat16()),
        4: (targets + 30, targets[:4], targets.int()),
        5: (norms[:2],),
        6: (0.0,),
        7: (-1.0,),
    }
    for position, values in bad.items():
        for value in values:
            with pytest.raises(RuntimeError, match="linear_nce"):
                ops._linear_nce_native_gradient(*[value if i == position else x for i, x in enumerate(good)])
