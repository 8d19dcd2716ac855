"""linear_nce: a wrong argument raises, naming the argument, before anything runs."""

from __future__ import annotations

import pytest
import torch

from calm_fast._ops.linear_nce.api import linear_nce


def good():
    gen = torch.Generator().manual_seed(0)
    return {
        **{name: torch.randn(6, 4, generator=gen) for name in ("student", "nat", "neg")},
        "weight": torch.randn(9, 4, generator=gen),
        "targets": torch.tensor([0, 8, 3, -100, 5, 1]),
        "seq_ids": torch.tensor([0, 0, 0, 1, 1, 5]),
    }


# name -> (changed arguments, error, pattern of the message)
BAD = {
    "student is a list": ({"student": [[1.0]]}, TypeError, "`student`.*list"),
    "student is 3-dimensional": (
        {"student": torch.zeros(1, 6, 4)},
        ValueError,
        r"`student`.*2-dimensional.*\(1, 6, 4\)",
    ),
    "student is integer": ({"student": torch.zeros(6, 4, dtype=torch.int64)}, TypeError, "`student`.*int64"),
    "student is sparse": ({"student": torch.zeros(6, 4).to_sparse()}, ValueError, "`student`.*dense"),
    "d is 0": (
        {n: torch.zeros(6, 0) for n in ("student", "nat", "neg")} | {"weight": torch.zeros(9, 0)},
        ValueError,
        "`student`.*d >= 1",
    ),
    "nat has other tokens": ({"nat": torch.zeros(5, 4)}, ValueError, r"`nat`.*\(6, 4\).*\(5, 4\)"),
    "nat has another dtype": ({"nat": torch.zeros(6, 4).half()}, TypeError, "`nat`.*float32.*float16"),
    "neg has another size": ({"neg": torch.zeros(6, 5)}, ValueError, r"`neg`.*\(6, 4\).*\(6, 5\)"),
    "neg is None": ({"neg": None}, TypeError, "`neg`.*NoneType"),
    "neg is elsewhere": ({"neg": torch.zeros(6, 4, device="meta")}, ValueError, "`neg`.*cpu.*meta"),
    "weight has another dtype": ({"weight": torch.zeros(9, 4).bfloat16()}, TypeError, "`weight`.*bfloat16"),
    "weight is transposed": ({"weight": torch.zeros(4, 9)}, ValueError, r"`weight`.*d = 4.*\(4, 9\)"),
    "weight is empty": ({"weight": torch.zeros(0, 4)}, ValueError, "`weight`.*V >= 1"),
    "weight is flat": ({"weight": torch.zeros(9)}, ValueError, "`weight`.*2-dimensional"),
    "targets are int32": ({"targets": torch.zeros(6, dtype=torch.int32)}, TypeError, "`targets`.*int64.*int32"),
    "targets are too many": ({"targets": torch.zeros(7, dtype=torch.int64)}, ValueError, r"`targets`.*\(6,\).*\(7,\)"),
    "targets are 2-dimensional": ({"targets": torch.zeros(6, 1, dtype=torch.int64)}, ValueError, "`targets`.*1-dim"),
    "a target is V": ({"targets": torch.tensor([0, 9, 3, -100, 5, 1])}, ValueError, "`targets`.*V = 9.*0 to 9"),
    "a target is negative": ({"targets": torch.tensor([0, -1, 3, 2, 5, 1])}, ValueError, "`targets`.*-1"),
    "-100 with another ignore_index": ({"ignore_index": 0}, ValueError, r"`targets`.*ignore_index \(0\).*-100"),
    "seq_ids are float": ({"seq_ids": torch.zeros(6)}, TypeError, "`seq_ids`.*int64.*float32"),
    "seq_ids are too few": ({"seq_ids": torch.zeros(5, dtype=torch.int64)}, ValueError, r"`seq_ids`.*\(6,\).*\(5,\)"),
    "a sequence id is T": ({"seq_ids": torch.tensor([0, 0, 0, 1, 1, 6])}, ValueError, "`seq_ids`.*T = 6.*0 to 6"),
    "a sequence id is negative": ({"seq_ids": torch.tensor([0, 0, 0, 1, 1, -1])}, ValueError, "`seq_ids`.*-1"),
    "alpha is a string": ({"alpha": "0.5"}, TypeError, "`alpha`.*str"),
    "alpha is NaN": ({"alpha": float("nan")}, ValueError, "`alpha`.*finite"),
    "temperature is 0": ({"temperature": 0.0}, ValueError, "`temperature`.*positive"),
    "temperature is infinite": ({"temperature": float("inf")}, ValueError, "`temperature`.*finite"),
    "temperature is bool": ({"temperature": True}, TypeError, "`temperature`.*bool"),
    "offset is a tensor": ({"offset": torch.zeros(2)}, TypeError, "`offset`.*tensor"),
    "offset is infinite": ({"offset": float("-inf")}, ValueError, "`offset`.*finite"),
    "softcap is negative": ({"softcap": -30.0}, ValueError, "`softcap`.*positive.*-30"),
    "softcap is 0": ({"softcap": 0}, ValueError, "`softcap`.*positive"),
    "bias has another size": ({"bias": torch.zeros(4)}, ValueError, r"`bias`.*\(9,\).*\(4,\)"),
    "bias has another dtype": ({"bias": torch.zeros(9).double()}, TypeError, "`bias`.*float64"),
    "bias is 2-dimensional": ({"bias": torch.zeros(1, 9)}, ValueError, "`bias`.*1-dimensional"),
    "ignore_index is a float": ({"ignore_index": -100.0}, TypeError, "`ignore_index`.*float"),
    "impl is unknown": ({"impl": "cuda"}, ValueError, "`impl`.*'cuda'"),
}


def test_the_good_arguments_are_good():
    assert linear_nce(**good()).isfinite()


@pytest.mark.parametrize("name", BAD)
def test_bad_argument(name):
    changes, error, message = BAD[name]
    with pytest.raises(error, match=f"linear_nce: .*{message}"):
        linear_nce(**good() | changes)
