"""linear_logprob: a wrong argument raises, naming the argument, before anything runs."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_logprob.api import linear_logprob


def good():
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 4, generator=gen), torch.randn(9, 4, generator=gen)
    return {"hidden": hidden, "weight": weight, "targets": torch.tensor([0, 8, 3, -100, 5, 1])}


# name -> (changed arguments, error, pattern of the message)
BAD = {
    "hidden is a list": ({"hidden": [[1.0]]}, TypeError, "`hidden`.*list"),
    "hidden is None": ({"hidden": None}, TypeError, "`hidden`.*NoneType"),
    "hidden is a batch": ({"hidden": torch.zeros(1, 6, 4)}, ValueError, r"`hidden`.*2-dimensional.*\(1, 6, 4\)"),
    "hidden is integer": ({"hidden": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "`hidden`.*int64"),
    "hidden is complex": ({"hidden": torch.zeros(6, 4, dtype=torch.complex64)}, TypeError, "`hidden`.*complex64"),
    "hidden is sparse": ({"hidden": torch.zeros(6, 4).to_sparse()}, ValueError, "`hidden`.*dense"),
    "d is 0": ({"hidden": torch.zeros(6, 0), "weight": torch.zeros(9, 0)}, ValueError, "`hidden`.*d >= 1"),
    "weight has another dtype": ({"weight": torch.zeros(9, 4).bfloat16()}, TypeError, "`weight`.*float32.*bfloat16"),
    "weight is transposed": ({"weight": torch.zeros(4, 9)}, ValueError, r"`weight`.*d = 4.*\(4, 9\)"),
    "weight is empty": ({"weight": torch.zeros(0, 4)}, ValueError, "`weight`.*V >= 1"),
    "weight is flat": ({"weight": torch.zeros(9)}, ValueError, "`weight`.*2-dimensional"),
    "weight is elsewhere": ({"weight": torch.zeros(9, 4, device="meta")}, ValueError, "`weight`.*cpu.*meta"),
    "targets are int32": ({"targets": torch.zeros(6, dtype=torch.int32)}, TypeError, "`targets`.*int64.*int32"),
    "targets are too few": ({"targets": torch.zeros(5, dtype=torch.int64)}, ValueError, r"`targets`.*\(6,\).*\(5,\)"),
    "targets are 2-dimensional": ({"targets": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, "`targets`.*1-dim"),
    "targets are a list": ({"targets": [0] * 6}, TypeError, "`targets`.*list"),
    "a target is V": ({"targets": torch.tensor([0, 9, 3, -100, 5, 1])}, ValueError, "`targets`.*V = 9.*0 to 9"),
    "a target is negative": ({"targets": torch.tensor([0, -1, 3, 2, 5, 1])}, ValueError, "`targets`.*-1"),
    "-100 with another ignore_index": ({"ignore_index": 0}, ValueError, r"`targets`.*ignore_index \(0\).*-100"),
    "temperature is 0": ({"temperature": 0.0}, ValueError, "`temperature`.*positive"),
    "temperature is negative": ({"temperature": -1.0}, ValueError, "`temperature`.*positive.*-1"),
    "temperature is NaN": ({"temperature": float("nan")}, ValueError, "`temperature`.*finite"),
    "temperature is None": ({"temperature": None}, TypeError, "`temperature`.*NoneType"),
    "softcap is infinite": ({"softcap": float("inf")}, ValueError, "`softcap`.*finite"),
    "softcap is 0": ({"softcap": 0}, ValueError, "`softcap`.*positive"),
    "softcap is a string": ({"softcap": "30"}, TypeError, "`softcap`.*str"),
    "bias has another size": ({"bias": torch.zeros(4)}, ValueError, r"`bias`.*\(9,\).*\(4,\)"),
    "bias has another dtype": ({"bias": torch.zeros(9).half()}, TypeError, "`bias`.*float16"),
    "bias is 2-dimensional": ({"bias": torch.zeros(1, 9)}, ValueError, "`bias`.*1-dimensional"),
    "ignore_index is bool": ({"ignore_index": True}, TypeError, "`ignore_index`.*bool"),
    "return_entropy is 1": ({"return_entropy": 1}, TypeError, "`return_entropy`.*True or False"),
    "return_rank is a string": ({"return_rank": "yes"}, TypeError, "`return_rank`.*str"),
    "impl is unknown": ({"impl": "cuda"}, ValueError, "`impl`.*'cuda'"),
}


def test_the_good_arguments_are_good():
    assert linear_logprob(**good()).isfinite().all()


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=f"linear_logprob: .*{message}"):
        linear_logprob(**good() | changes)
