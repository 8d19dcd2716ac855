"""The form for CPUs with matrix units: products of torch's in tiles, their rows in the compiled library."""

from __future__ import annotations

import math

import pytest
import torch

from calm_fast._ops.linear_logprob import native, tiles
from calm_fast._ops.linear_logprob.api import decide, linear_logprob
from calm_fast._ops.linear_logprob.cases import CASES
from calm_fast._ops.vocabulary import decide as decisions
from calm_fast.benchmarks.timing import peak_bytes
from calm_fast.core import native_library
from calm_fast.core.numerics import check

HALF = (torch.bfloat16, torch.float16)
NAMES = (
    "plain", "frozen", "nothing-ignored", "all-ignored", "past-edges", "long-rows", "wide", "temperature", "softcap",
    "bias", "entropy", "everything", "sharp", "logits-1000", "strided",
)  # fmt: skip

pytestmark = pytest.mark.skipif(
    native_library.obstacle("linear_logprob_rows", "cpu") is not None, reason="no compiled library"
)


@pytest.fixture
def units(monkeypatch):
    """Let the CPU have matrix units, for few logits too. Return the shapes of the tiles."""
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None if dtype == torch.float32 else "matrix units")
    monkeypatch.setattr(decisions, "AT_ONCE", 0)
    monkeypatch.setattr(tiles, "_TILE", 96)
    monkeypatch.setattr(tiles, "_COLUMNS", 16)
    shapes, mm = [], torch.mm

    def watched(a, b, **kwargs):
        shapes.append((a.shape[0], b.shape[1]))
        return mm(a, b, **kwargs)

    monkeypatch.setattr(tiles.torch, "mm", watched)
    return shapes


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", NAMES)
def test_outputs_and_gradients_within_the_error_rule(units, name, dtype):
    case = CASES.case(name, dtype, rank=False)
    assert all(row.ok for row in check(CASES, case, "native")), check(CASES, case, "native")
    inputs = CASES.build(case, torch.device("cpu"))
    assert decide(**arguments(inputs)).impl == "native"


def arguments(inputs):
    names = ("hidden", "weight", "targets", "bias", "temperature", "softcap", "return_entropy", "return_rank")
    return {name: inputs[name] for name in names}


def build(tokens=13, d=24, v=83, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, d, generator=generator).to(dtype) for n in (tokens, v))
    return hidden, weight, torch.randint(0, v, (tokens,), generator=generator)


def test_tiles_cover_the_vocabulary(units):
    hidden, weight, targets = build()
    linear_logprob(hidden, weight, targets)
    assert units == [(6, 16)] * 5 + [(6, 3)] + [(6, 16)] * 5 + [(6, 3)] + [(1, 16)] * 5 + [(1, 3)]


def test_float32_and_ranks_are_not_tiled(units):
    hidden, weight, targets = build()
    expected = linear_logprob(hidden, weight, targets, return_rank=True, impl="reference")
    logprob, rank = linear_logprob(hidden, weight, targets, return_rank=True, impl="native")
    assert not units and rank.equal(expected[1])
    torch.testing.assert_close(logprob, expected[0], rtol=0, atol=2**-5)
    assert decide(hidden, weight, targets, return_rank=True).impl == "torch"
    linear_logprob(hidden.float(), weight.float(), targets, impl="native")
    assert not units


def test_unknown_targets_and_rows_that_are_not_finite(units):
    hidden, weight, targets = build()
    expected = linear_logprob(hidden, weight, targets, impl="reference")
    targets[2], targets[5], hidden[7], hidden[9] = 83, -1, float("nan"), float("inf")
    # the public function refuses such targets where it may read them; in a graph it may not
    logprob, entropy, *_ = native.linear_logprob_native_fwd(hidden, weight, None, targets, 1.0, None, -100, True, False)
    wrong = torch.tensor([2, 5, 7, 9])
    assert bool(logprob[wrong].isnan().all()) and bool(entropy[[7, 9]].isnan().all())
    kept = torch.ones(13, dtype=torch.bool).index_fill_(0, wrong, False)
    torch.testing.assert_close(logprob[kept], expected[kept], rtol=0, atol=2**-5)


def test_tiles_of_banned_tokens(units):
    """A bias of -inf rules out whole tiles, the first one too; what is left is as without these tokens."""
    hidden, weight, targets = build()
    banned = torch.arange(83) < 40
    bias = torch.zeros(83, dtype=torch.bfloat16).masked_fill_(banned, float("-inf"))
    targets = targets % 43 + 40
    found = linear_logprob(hidden, weight, targets, bias=bias, return_entropy=True, impl="native")
    alone = linear_logprob(hidden, weight[40:], targets - 40, return_entropy=True, impl="native")
    for got, expected in zip(found, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    targets[0] = 3
    got = linear_logprob(hidden, weight, targets, bias=bias, impl="native")
    assert got[0] == -math.inf and bool(got[1:].isfinite().all())


def test_two_threads_give_the_same_bits(units):
    hidden, weight, targets = build(tokens=40, v=300)
    one = linear_logprob(hidden, weight, targets, return_entropy=True, impl="native")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = linear_logprob(hidden, weight, targets, return_entropy=True, impl="native")
    finally:
        torch.set_num_threads(before)
    assert all(a.equal(b) for a, b in zip(one, two, strict=True))


def test_memory_is_one_tile(monkeypatch):
    monkeypatch.setattr(native_library, "slowness", lambda dtype: None if dtype == torch.float32 else "matrix units")
    hidden, weight, targets = build(tokens=512, d=16, v=32768)
    peak = peak_bytes(lambda: linear_logprob(hidden, weight, targets), torch.device("cpu"))
    product = torch.empty(512, 4096, dtype=torch.bfloat16)
    scratch = peak_bytes(lambda: torch.mm(hidden, weight[:4096].T, out=product), torch.device("cpu"))
    assert peak < product.nbytes + scratch + (1 << 18)  # the tile, what a product takes, and some vectors
