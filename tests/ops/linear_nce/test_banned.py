"""linear_nce with -inf in the bias, which rules a token out for student and teachers alike."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_nce.api import linear_nce


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("impl_name", ["reference", "torch"])
def test_a_banned_token_is_equivalent_to_an_absent_one(impl_name, temperature):
    """p_neg log(p_neg / p_nat) and p_nat log p_student are 0 where all three probabilities are 0."""
    gen = torch.Generator().manual_seed(3)
    tokens, d, v = 9, 12, 41
    student, nat, neg = (torch.randn(tokens, d, generator=gen, dtype=torch.float64) for _ in range(3))
    weight, bias = torch.randn(v, d, generator=gen).double(), torch.randn(v, generator=gen).double()
    kept = (torch.arange(v) % 4 != 1).nonzero().squeeze(1)
    targets, seq_ids = torch.randint(0, len(kept), (tokens,), generator=gen), torch.arange(tokens) // 3
    targets[4] = -100
    banned = torch.full_like(bias, float("-inf")).index_copy(0, kept, bias[kept])

    def loss(weight, bias, targets, impl):
        leaves = [t.detach().requires_grad_() for t in (student, weight, bias)]
        inputs = (leaves[0], nat, neg, leaves[1], targets, seq_ids)
        value = linear_nce(*inputs, bias=leaves[2], temperature=temperature, impl=impl)
        return value, *torch.autograd.grad(value, leaves)

    expected = loss(weight[kept], bias[kept], targets, "reference")
    all_targets = torch.where(targets == -100, targets, kept[targets.clamp(min=0)])
    value, dstudent, dweight, dbias = loss(weight, banned, all_targets, impl_name)
    for found, right in zip((value, dstudent, dweight[kept], dbias[kept]), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-14)
    others = torch.isinf(banned)
    assert not dweight[others].any() and not dbias[others].any()
