"""linear_logprob and linear_nce in C++: every lane, threads, block edges, strides, non-finite logits, bad calls."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_logprob.cases import CASES as LOGPROB
from calm_fast._ops.linear_nce.cases import CASES as NCE
from calm_fast.core import native_library
from calm_fast.core.numerics import check, unit_roundoff
from calm_fast.ops import linear_logprob, linear_nce

if why := native_library.obstacle("linear_logprob"):
    pytest.skip(why, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("only_sweeps")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [(cases, case) for cases in (LOGPROB, NCE) for case in cases.cases()]


def draw(t, d, v, dtype=torch.float32, seed=0):
    """Return hidden, weight and targets whose logits have standard deviation 1."""
    gen = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(t, d, generator=gen), torch.randn(v, d, generator=gen) * d**-0.5
    return hidden.to(dtype), weight.to(dtype), torch.randint(0, v, (t,), generator=gen)


def norms_of(z):
    """Return the largest logit of each row of z and the sum of exp(z - top), (2, T)."""
    top = z.amax(1)
    return torch.stack((top, (z - top.unsqueeze(1)).exp().sum(1)))


def score(hidden, weight, targets, **options):
    """Return logprob, entropy and rank of the compiled library."""
    options = {"return_entropy": True, "return_rank": True, "impl": "native", **options}
    return linear_logprob(hidden, weight, targets, **options)


@pytest.mark.parametrize(("cases", "case"), CASES, ids=lambda x: str(getattr(x, "op", x)) + "-" + str(x)[:40])
def test_every_lane_within_the_error_rule(cases, case, lane):
    wrong = [row for row in check(cases, case, "native", torch.device("cpu")) if not row.ok]
    assert not wrong


# token counts around whole vectors and groups, columns around whole tiles and splits of 2048, odd widths
SHAPES = [(1, 3, 2047), (16, 8, 2048), (47, 7, 2049), (48, 16, 4096), (49, 17, 4099), (97, 33, 6151), (130, 2, 9)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("t", "d", "v"), SHAPES)
def test_edges_of_groups_and_splits(t, d, v, dtype, lane):
    hidden, weight, targets = draw(t, d, v, dtype)
    targets[-1], targets[0] = v - 1, 0
    bias = torch.linspace(-1, 1, v).to(dtype)
    logprob, entropy, rank = score(hidden, weight, targets, bias=bias, temperature=0.7, softcap=5.0)
    z = 5 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 5)
    log_p = (z / 0.7).log_softmax(1)
    at = targets.unsqueeze(1)
    # every operand is exact here: float32 sums of at most 6151 terms
    step = 2.0**-20
    torch.testing.assert_close(logprob.double(), log_p.gather(1, at).squeeze(1), rtol=step, atol=8 * step)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=step, atol=8 * step)
    gap = z - z.gather(1, at)
    least, most = (1 + (gap > slack).sum(1) for slack in (1e-5, -1e-5))
    assert ((least <= rank) & (rank <= most)).all()


def test_many_blocks_of_wide_tokens(lane):
    """The hidden states of 400 tokens of width 5000 are packed in several blocks."""
    hidden, weight, targets = draw(400, 5000, 19)
    logprob, _, _ = score(hidden, weight, targets)
    expected = (hidden.double() @ weight.double().T).log_softmax(1).gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)


def test_lanes_are_different_code(force_lane):
    """Lanes differ in the bits of their sums, which proves that forcing a lane changes the code that runs."""
    found = {}
    hidden, weight, targets = draw(40, 64, 3000, torch.bfloat16)
    for name in force_lane.available:
        force_lane(name)
        found[name] = score(hidden, weight, targets)[1]
    # AVX2 and AVX-512 do the same operations in vectors of another length
    pairs = [("scalar", "avx2"), ("avx512", "avx512_bf16")]
    assert all(not torch.equal(found[a], found[b]) for a, b in pairs if b in found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_and_two_threads_give_the_same_bits(dtype):
    hidden, weight, targets = draw(150, 24, 9000, dtype)
    nat, neg = hidden.flip(0).contiguous(), hidden.flip(1).contiguous()
    sequences = torch.arange(150) // 30

    def everything():
        """Return everything the library computes; the products that consume logit gradients are torch's."""
        loss = linear_nce(hidden, nat, neg, weight, targets, sequences, temperature=2.0, impl="native")
        out = torch.zeros(9000, 150, dtype=dtype), torch.zeros(9000, 150, dtype=dtype)
        dlogprob, dnce = (
            getattr(torch.ops.calm_fast, f"_{op}_native_dlogits") for op in ("linear_logprob", "linear_nce")
        )
        ups, norms = torch.linspace(-1, 1, 300).view(2, 150), torch.linspace(0.5, 1.5, 750).view(5, 150)
        dlogprob(ups[0], ups[1], hidden, weight, None, targets, norms[:2], ups[0], 2.0, 3.0, 0, out[0])
        dnce(ups, hidden, nat, weight, None, targets, norms, 2.0, 3.0, 0, out[1])
        return [loss, *score(hidden, weight, targets), *out]

    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(everything())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_give_the_same_bits(dtype, lane):
    hidden, weight, targets = draw(50, 23, 301, dtype)
    expected = score(hidden, weight, targets)
    wide = torch.zeros(301, 47, dtype=dtype)
    wide[:, 1:24] = weight
    spread = torch.zeros(301, 46, dtype=dtype)
    spread[:, ::2] = weight
    rows = torch.zeros(50, 46, dtype=dtype)
    rows[:, 1::2] = hidden
    for h, w in ((hidden, wide[:, 1:24]), (hidden, weight.T.contiguous().T), (rows[:, 1::2], spread[:, ::2])):
        assert all(torch.equal(a, b) for a, b in zip(score(h, w, targets), expected, strict=True))


def test_targets_agree_with_their_column(lane):
    """Equal weight rows have bit-equal logits in any column: none outranks the other."""
    for dtype in DTYPES:
        hidden, weight, targets = draw(60, 31, 11, dtype)
        again = weight.repeat(500, 1)
        rank = score(hidden, again, targets + 11 * 250)[2]
        assert torch.equal(rank - 1, (score(hidden, weight, targets)[2] - 1) * 500)


def test_non_finite_logits_stay_in_their_token(lane):
    hidden, weight, targets = draw(70, 12, 2100)
    expected = score(hidden, weight, targets)
    changed = hidden.clone()
    changed[3], changed[20, 0], changed[69] = float("nan"), float("inf"), float("-inf")
    found = score(changed, weight, targets)
    others = torch.ones(70, dtype=torch.bool)
    others[[3, 20, 69]] = False
    for new, old in zip(found, expected, strict=True):
        assert torch.equal(new[others], old[others])
    assert found[0][~others].isnan().all() and found[1][~others].isnan().all()


def test_masked_columns(lane):
    """A bias of -inf rules a column out; 0 log 0 = 0 in the entropy; with every column ruled out all is NaN."""
    hidden, weight, targets = draw(20, 12, 2100)
    bias = torch.zeros(2100)
    bias[1000:] = float("-inf")
    logprob, entropy, rank = score(hidden, weight, targets.remainder(1000), bias=bias)
    log_p = (hidden.double() @ weight[:1000].double().T).log_softmax(1)
    expected = log_p.gather(1, targets.remainder(1000).unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprob.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=1e-5, atol=1e-5)
    assert (rank <= 1000).all()
    assert (score(hidden, weight, torch.full_like(targets, 1500), bias=bias)[0] == float("-inf")).all()
    assert score(hidden, weight, targets, bias=torch.full_like(bias, float("-inf")))[0].isnan().all()


def test_gradients_of_16_bit_overflow_and_nan(lane):
    """Logit gradients beyond float16 become infinite and NaN stays NaN: nothing wraps around."""
    hidden, weight, targets = draw(17, 8, 40, torch.float16)
    for scale, expected in ((1e9, torch.isinf), (float("nan"), torch.isnan)):
        out = torch.zeros(40, 17, dtype=torch.float16)
        up = torch.full((17,), scale)
        norms = norms_of(hidden.float() @ weight.float().T)
        torch.ops.calm_fast._linear_logprob_native_dlogits(
            up, None, hidden, weight, None, targets, norms, None, 1.0, None, 0, out
        )
        assert expected(out).all()


def test_a_chunk_is_part_of_the_whole(lane):
    """Logit gradients of some columns equal those columns of all gradients, rounded to the inputs' dtype."""
    for dtype in DTYPES:
        hidden, weight, targets = draw(33, 20, 2600, dtype)
        z = hidden.double() @ weight.double().T
        norms = norms_of(z).float()
        up = torch.randn(33, generator=torch.Generator().manual_seed(3))

        def fill(first, last, dtype=dtype, hidden=hidden, weight=weight, targets=targets, norms=norms, up=up):
            out = torch.full((last - first, 33), float("nan"), dtype=dtype)
            torch.ops.calm_fast._linear_logprob_native_dlogits(
                up, None, hidden, weight, None, targets, norms, None, 1.0, None, first, out
            )
            return out

        whole = fill(0, 2600)
        p = z.softmax(1)
        truth = up.double().unsqueeze(1) * (torch.nn.functional.one_hot(targets, 2600) - p)
        allowed = (unit_roundoff(dtype) + 2**-18) * truth.abs().T + unit_roundoff(dtype) * 2**-14
        assert ((whole.double() - truth.T).abs() <= allowed).all()
        assert torch.equal(fill(1, 2050), whole[1:2050]) and torch.equal(fill(2599, 2600), whole[2599:])


def test_wrong_direct_calls_are_refused():
    hidden, weight, targets = draw(5, 8, 30)
    forward = torch.ops.calm_fast._linear_logprob_native_fwd
    good = [hidden, weight, None, targets, 1.0, None, False, False, -1]
    bad = {
        0: (hidden[:, :7], hidden.double(), hidden.bfloat16(), hidden[0]),
        1: (weight[0], weight[:0]),
        2: (torch.zeros(29), torch.zeros(30).double()),
        3: (targets + 30, targets - 31, targets[:4], targets.int()),
        4: (0.0,),
        5: (-1.0,),
        8: (99,),
    }
    for position, values in bad.items():
        for value in values:
            with pytest.raises(RuntimeError, match="linear_logprob"):
                forward(*[value if i == position else x for i, x in enumerate(good)])
    for out in (torch.zeros(30, 4), torch.zeros(31, 5), torch.zeros(30, 5).bfloat16(), torch.zeros(5, 30).T):
        with pytest.raises(RuntimeError, match="linear_logprob"):
            torch.ops.calm_fast._linear_logprob_native_dlogits(
                targets.float(), None, hidden, weight, None, targets, torch.ones(2, 5), None, 1.0, None, 0, out
            )
