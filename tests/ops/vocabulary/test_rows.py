"""linear_logprob of few logits: torch's product, then rows of logits in C++. Every lane, edges, options, bad calls."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_logprob import native
from calm_fast._ops.linear_logprob.api import decide
from calm_fast._ops.linear_logprob.cases import CASES
from calm_fast.core import native_library
from calm_fast.core.numerics import check
from calm_fast.ops import linear_logprob

if why := native_library.obstacle("linear_logprob_rows"):
    pytest.skip(why, allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def draw(t, v, dtype, seed=0):
    """Return logits (t, v) and targets."""
    g = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(t, v, generator=g)).to(dtype), torch.randint(0, v, (t,), generator=g)


def rows(logits, targets, bias=None, temperature=1.0, softcap=None, ignore=-100, extras=True, strict=False):
    return torch.ops.calm_fast._linear_logprob_native_rows(
        logits, bias, targets, temperature, softcap, ignore, extras, extras, strict
    )


@pytest.mark.parametrize("case", CASES.cases(), ids=str)
def test_every_case_within_the_error_rule(case, lane, monkeypatch):
    """The cases of the op are small enough; 16 bits too take this form, as with matrix units."""
    monkeypatch.setattr(native_library, "slowness", lambda dtype: "matrix units" if dtype != torch.float32 else None)
    monkeypatch.setattr(native_library, "emulated", lambda dtype: False)
    wrong = [row for row in check(CASES, case, "native", torch.device("cpu")) if not row.ok]
    assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("v", [1, 2, 15, 33, 2047, 2048, 2049, 6151])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "softcap": 5.0}])
def test_rows_against_float64(v, dtype, options, lane):
    """Column counts around whole vectors and pieces of 2048. The operands are exact: float32 sums of few terms."""
    logits, targets = draw(5, v, dtype)
    targets[0], targets[-1] = v - 1, 0
    bias = torch.linspace(-1, 1, v)
    tau, cap = options.get("temperature", 1.0), options.get("softcap")
    z = logits.double() + bias.double()
    z = z if cap is None else cap * torch.tanh(z / cap)
    log_p = (z / tau).log_softmax(1)
    logprob, entropy, rank, norms = rows(logits, targets, bias, **options)
    own = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(logprob.double(), own, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(entropy.double(), -(log_p.exp() * log_p).sum(1), rtol=2e-6, atol=4e-6)
    larger = (z > z.gather(1, targets.unsqueeze(1))).sum(1)
    assert (rank - 1 - larger).abs().max() <= (0 if cap is None else 1)
    torch.testing.assert_close(norms[0].double(), z.amax(1), rtol=1e-6, atol=1e-6)
    bare, none, no_rank, same = rows(logits, targets, bias, **options, extras=False)
    assert torch.equal(same[0], norms[0]) and none.numel() == no_rank.numel() == 0
    torch.testing.assert_close(bare, logprob, rtol=1e-6, atol=1e-6)


def test_unknown_ignored_banned_and_broken_logits(lane):
    logits, targets = draw(6, 40, torch.float32)
    logits[0, 3], logits[1, 5], logits[2], logits[3, 7] = float("nan"), float("inf"), float("-inf"), float("-inf")
    targets[3], targets[4], targets[5] = 7, -100, 40
    logprob, entropy, rank, norms = rows(logits, targets)
    assert logprob[:3].isnan().all() and logprob[3] == float("-inf") and entropy[3].isfinite()
    assert logprob[4] == entropy[4] == rank[4] == norms[0, 4] == norms[1, 4] == 0
    assert logprob[5].isnan() and rank[5] == 0
    assert rows(logits, targets, strict=True)[0].numel() == 0
    assert rows(logits[:5], targets[:5], strict=True)[0].numel() == 5
    with pytest.raises(RuntimeError, match="neighbours"):
        rows(logits.T, targets)
    with pytest.raises(RuntimeError, match="targets"):
        rows(logits, targets[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_kept_logits_give_the_gradients_of_the_sweep(dtype, bias, monkeypatch):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(7, 24, generator=g).to(dtype), torch.randn(300, 24, generator=g).to(dtype)
    targets = torch.randint(0, 300, (7,), generator=g)
    targets[2] = -100
    hidden[2] = float("nan")  # an ignored row may hold anything
    upstream = [torch.randn(7, generator=g), torch.randn(7, generator=g)]
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None if dtype == torch.float32 else "matrix units")
    monkeypatch.setattr(native_library, "emulated", lambda dtype: False)

    def run():
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, weight[:, 0])]
        found = linear_logprob(
            *leaves[:2], targets, bias=leaves[2] if bias else None, softcap=6.0, temperature=1.5, return_entropy=True,
            impl="native",
        )  # fmt: skip
        return [*found, *torch.autograd.grad(found, leaves[: 3 if bias else 2], upstream)]

    together = run()
    assert not any(t.isnan().any() for t in together)
    monkeypatch.setattr("calm_fast._ops.vocabulary.decide.AT_ONCE", 0)
    near = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 4e-2, "atol": 4e-2}
    for one, two in zip(together, run(), strict=True):
        torch.testing.assert_close(one, two, **near)


def test_a_backward_pass_of_few_logits_has_no_product_but_its_own():
    from torch.utils.flop_counter import FlopCounterMode

    hidden, weight = torch.randn(8, 32), torch.randn(500, 32)
    rest = (None, torch.arange(8))
    with FlopCounterMode(display=False) as counter:
        results = native.linear_logprob_native_fwd(hidden, weight, *rest, 1.0, None, -100, False, False, True)
        _, entropy, _, norms, logits = results
        native.linear_logprob_native_bwd(
            torch.ones(8), None, hidden, weight, *rest, norms, entropy, logits, 1.0, None, -100, (True, False, False)
        )
    assert counter.get_total_flops() == 2 * (2 * 8 * 32 * 500)


def test_the_short_path_takes_plain_calls_alone(monkeypatch):
    """It returns what the registered op returns, and leaves everything else to it."""
    hidden, weight, targets = torch.randn(4, 16), torch.randn(90, 16), torch.arange(4)
    given = (hidden, weight, targets, 1.0, -100)
    assert torch.equal(native.score_few(*given), linear_logprob(hidden, weight, targets, impl="native"))
    assert native.score_few(hidden, weight.requires_grad_(), targets, 1.0, -100) is None
    weight.requires_grad_(False)
    for wrong in (
        (hidden.double(), weight, targets, 1.0, -100),
        (hidden, weight[:, :8], targets, 1.0, -100),
        (hidden, weight, targets + 90, 1.0, -100),
        (hidden, weight, targets.int(), 1.0, -100),
        (hidden, weight, targets[:3], 1.0, -100),
        (hidden, weight, targets, float("nan"), -100),
        (hidden, weight, targets, 1.0, True),
    ):
        assert native.score_few(*wrong) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert native.score_few(*given) is None
    monkeypatch.setattr("calm_fast._ops.vocabulary.decide.AT_ONCE", 0)
    assert native.score_few(*given) is None


@pytest.mark.parametrize("impl", ["auto", "torch", "native"])
def test_autocast_changes_nothing(impl):
    hidden, weight, targets = torch.randn(4, 64), torch.randn(90, 64), torch.arange(4)
    plain = linear_logprob(hidden, weight, targets, impl=impl)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_logprob(hidden, weight, targets, impl=impl), plain)


@pytest.mark.parametrize(
    ("dtype", "d", "v", "most", "most_with_gradients"),
    [(torch.float32, 256, 8192, 64, 256), (torch.float32, 4096, 2048, 1024, 1024), (torch.bfloat16, 256, 8192, 15, 15)],
)
def test_few_logits_are_scored_at_once(dtype, d, v, most, most_with_gradients, monkeypatch):
    """On both sides of each limit, without and with matrix units, and without 16-bit products."""
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None)
    monkeypatch.setattr(native_library, "emulated", lambda dtype: False)

    def at_once(t, grad=False):
        hidden, weight = torch.empty(t, d, dtype=dtype, requires_grad=grad), torch.empty(v, d, dtype=dtype)
        return "few logits" in decide(hidden, weight, torch.zeros(t, dtype=torch.int64)).reason

    assert at_once(most) and not at_once(most + 1)
    assert at_once(most_with_gradients, True) and not at_once(most_with_gradients + 1, True)
    if dtype == torch.bfloat16:
        monkeypatch.setattr(
            native_library, "slowness", lambda dtype: None if dtype == torch.float32 else "matrix units"
        )
        assert at_once(256) and not at_once(257)
        monkeypatch.setattr(native_library, "slowness", lambda dtype: None)
        monkeypatch.setattr(native_library, "emulated", lambda dtype: True)
        assert at_once(1) and not at_once(2)
