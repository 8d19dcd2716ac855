"""The `device` argument: usable, or an error that names it."""

from __future__ import annotations

import re

import pytest
import torch

from calm_fast.core.devices import product_dtype, usable_device


def test_none_takes_a_gpu_where_there_is_one() -> None:
    assert usable_device("f", None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert usable_device("f", "cpu") == usable_device("f", torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("wrong", ["gpu", "", "cuda:99", "cpu:x"])
def test_a_device_that_torch_cannot_use_is_named(wrong: str) -> None:
    words = re.escape(f"f: `device` must be one that torch can use here, got {wrong!r}: ")
    with pytest.raises(ValueError, match=f"^{words}.+$"):
        usable_device("f", wrong)


def test_other_types_are_named() -> None:
    with pytest.raises(TypeError, match=r"f: `device` must be a name such as 'cuda:1' or 'cpu'.*got int 0"):
        usable_device("f", 0)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
def test_products_are_taken_in_a_dtype_that_this_cpu_has():
    """The two names are private: this is how a release without them shows."""
    has = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    for dtype, said in has.items():
        assert product_dtype("cpu", dtype) == (dtype if said else torch.float32)
        assert product_dtype("cuda", dtype) == dtype
    for dtype in (torch.float32, torch.float64):
        assert product_dtype("cpu", dtype) == dtype
