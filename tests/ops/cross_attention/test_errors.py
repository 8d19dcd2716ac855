"""Bad input to cross_attention: the error names the argument, the expectation and the value, and no kernel runs."""

from __future__ import annotations

import importlib
import math
import re

import numpy
import pytest
import torch

import calm_fast
from calm_fast.ops import cross_attention

API = importlib.import_module("calm_fast._ops.cross_attention.api")
B, M, N, H, HKV, D = 2, 5, 7, 4, 2, 8


def good():
    q = torch.randn(B, M, H, D)
    return {"q": q, "k": torch.randn(B, N, HKV, D), "v": torch.randn(B, N, HKV, D)}


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


def made(**changes):
    """Good arguments with changes; a callable gets the good value of its name."""
    args = good()
    for name, change in changes.items():
        args[name] = change(args[name]) if callable(change) else change
    return args


FLOATS = "float32, bfloat16, float16, float64"
KV_LAYOUT = "(B, N, Hkv, D) with a number of heads that divides q's 4"
PER_ROW = "of shape (B, M) = (2, 5) or (M,) = (5,)"
OK_HI = torch.full((M,), N, dtype=torch.int32)

# id: (changes, exception, message after "cross_attention: ")
BAD = {
    # not tensors
    "q none": ({"q": None}, TypeError, "`q` must be a tensor (B, M, H, D), got NoneType None"),
    "k list": ({"k": [[1.0]]}, TypeError, "`k` must be a tensor (B, N, Hkv, D), got list [[1.0]]"),
    "v number": ({"v": 3.5}, TypeError, "`v` must be a tensor (B, N, Hkv, D), got float 3.5"),
    "q numpy": ({"q": numpy.zeros(2)}, TypeError, "`q` must be a tensor (B, M, H, D), got ndarray"),
    # rank
    "q 3d": ({"q": lambda t: t[0]}, ValueError, "`q` must be 4-dimensional (B, M, H, D), got shape (5, 4, 8)"),
    "q 5d": ({"q": lambda t: t[None]}, ValueError, "`q` must be 4-dimensional (B, M, H, D), got shape (1, 2, 5"),
    "k 3d": ({"k": lambda t: t[0]}, ValueError, "`k` must be 4-dimensional (B, N, Hkv, D), got shape (7, 2, 8)"),
    "v 2d": ({"v": lambda t: t[0, 0]}, ValueError, "`v` must be 4-dimensional (B, N, Hkv, D), got shape (2, 8)"),
    "q scalar": ({"q": torch.tensor(1.0)}, ValueError, "`q` must be 4-dimensional (B, M, H, D), got shape ()"),
    # dtype
    "q int": ({"q": lambda t: t.int()}, TypeError, f"`q` must have dtype {FLOATS}, got torch.int32"),
    "q complex": ({"q": lambda t: t.to(torch.complex64)}, TypeError, f"`q` must have dtype {FLOATS}, got torch.com"),
    "k bool": ({"k": lambda t: t > 0}, TypeError, f"`k` must have dtype {FLOATS}, got torch.bool"),
    "v fp8": ({"v": lambda t: t.to(torch.float8_e4m3fn)}, TypeError, f"`v` must have dtype {FLOATS}, got torch.float8"),
    "k half": ({"k": lambda t: t.half()}, TypeError, "`k` must have q's dtype torch.float32, got torch.float16"),
    "v double": ({"v": lambda t: t.double()}, TypeError, "`v` must have q's dtype torch.float32, got torch.float64"),
    "q bf16": ({"q": lambda t: t.bfloat16()}, TypeError, "`k` must have q's dtype torch.bfloat16, got torch.float32"),
    # layout and device
    "q sparse": ({"q": lambda t: t.to_sparse()}, ValueError, "`q` must be a dense (strided) tensor, got layout"),
    "v sparse": ({"v": lambda t: t.to_sparse()}, ValueError, "`v` must be a dense (strided) tensor, got layout"),
    "k device": ({"k": lambda t: t.to("meta")}, ValueError, "`k` must be on cpu like the other tensors, got device"),
    "v device": ({"v": lambda t: t.to("meta")}, ValueError, "`v` must be on cpu like the other tensors, got device"),
    "q device": ({"q": lambda t: t.to("meta")}, ValueError, "`k` must be on meta like the other tensors, got device"),
    "lo device": ({"lo": OK_HI.to("meta")}, ValueError, "`lo` must be on cpu like q, got device"),
    "hi device": ({"hi": OK_HI.to("meta")}, ValueError, "`hi` must be on cpu like q, got device"),
    # shapes that do not fit
    "k batch": ({"k": lambda t: t[:1]}, ValueError, "`k` must be of q's batch size 2, got shape (1, 7, 2, 8)"),
    "v batch": ({"v": lambda t: t[:1]}, ValueError, "`v` must be of q's batch size 2, got shape (1, 7, 2, 8)"),
    "k dim": ({"k": lambda t: t[..., :6]}, ValueError, "`k` must be of q's head dim 8, got shape (2, 7, 2, 6)"),
    "v dim": ({"v": lambda t: t[..., :6]}, ValueError, "`v` must be of q's head dim 8, got shape (2, 7, 2, 6)"),
    "v keys": ({"v": lambda t: t[:, :6]}, ValueError, "`v` must be of k's shape (2, 7, 2, 8), got shape (2, 6, 2, 8)"),
    "v heads": ({"v": lambda t: t[:, :, :1]}, ValueError, "`v` must be of k's shape (2, 7, 2, 8), got shape"),
    "no heads": ({"q": lambda t: t[:, :, :0]}, ValueError, "`q` must be of at least one head and head dim 1, got"),
    "no dim": (
        {n: lambda t: t[..., :0] for n in "qkv"},
        ValueError,
        "`q` must be of at least one head and head dim 1, got shape (2, 5, 4, 0)",
    ),
    "no kv heads": (
        {n: lambda t: t[:, :, :0] for n in "kv"},
        ValueError,
        f"`k` must be {KV_LAYOUT}, got shape (2, 7, 0, 8), 0 heads",
    ),
    "3 kv heads": (
        {n: lambda t: t[:, :, :1].expand(-1, -1, 3, -1) for n in "kv"},
        ValueError,
        f"`k` must be {KV_LAYOUT}, got shape (2, 7, 3, 8), 3 heads",
    ),
    "8 kv heads": (
        {n: lambda t: t.repeat(1, 1, 4, 1) for n in "kv"},
        ValueError,
        f"`k` must be {KV_LAYOUT}, got shape (2, 7, 8, 8), 8 heads",
    ),
    # lo and hi
    "lo list": ({"lo": [0] * M}, TypeError, f"`lo` must be an int32 tensor {PER_ROW}, got list [0, 0, 0, 0, 0]"),
    "hi int": ({"hi": 7}, TypeError, f"`hi` must be an int32 tensor {PER_ROW}, got int 7"),
    "lo int64": ({"lo": OK_HI.long()}, TypeError, "`lo` must have dtype int32, got torch.int64"),
    "hi float": ({"hi": OK_HI.float()}, TypeError, "`hi` must have dtype int32, got torch.float32"),
    "hi bool": ({"hi": OK_HI > 0}, TypeError, "`hi` must have dtype int32, got torch.bool"),
    "lo scalar": ({"lo": bounds(0)[0]}, ValueError, f"`lo` must be {PER_ROW}, got shape ()"),
    "lo keys": ({"lo": bounds(*[0] * N)}, ValueError, f"`lo` must be {PER_ROW}, got shape (7,)"),
    "hi batch": ({"hi": OK_HI.expand(3, M)}, ValueError, f"`hi` must be {PER_ROW}, got shape (3, 5)"),
    "hi one row": ({"hi": OK_HI.expand(1, M)}, ValueError, f"`hi` must be {PER_ROW}, got shape (1, 5)"),
    "hi column": ({"hi": OK_HI[:, None]}, ValueError, f"`hi` must be {PER_ROW}, got shape (5, 1)"),
    "hi 3d": ({"hi": OK_HI.expand(2, 1, M)}, ValueError, f"`hi` must be {PER_ROW}, got shape (2, 1, 5)"),
    "lo negative": ({"lo": bounds(0, 1, -1, 2, 3)}, ValueError, "`lo` must be within 0 and N = 7, got values from -1"),
    "hi negative": ({"hi": bounds(0, 1, -9, 2, 3)}, ValueError, "`hi` must be within 0 and N = 7, got values from -9"),
    "lo large": ({"lo": bounds(0, 1, 8, 2, 3)}, ValueError, "`lo` must be within 0 and N = 7, got values from 0 to 8"),
    "hi large": ({"hi": bounds(7, 7, 8, 7, 7)}, ValueError, "`hi` must be within 0 and N = 7, got values from 7 to 8"),
    "causal lo": ({"causal": True, "lo": OK_HI}, ValueError, "`lo` must be None if causal=True"),
    "causal hi": ({"causal": True, "hi": OK_HI}, ValueError, "`hi` must be None if causal=True"),
    # plain arguments
    "causal int": ({"causal": 1}, TypeError, "`causal` must be True or False, got int 1"),
    "causal none": ({"causal": None}, TypeError, "`causal` must be True or False, got NoneType None"),
    "lse string": ({"return_lse": "yes"}, TypeError, "`return_lse` must be True or False, got str 'yes'"),
    "scale nan": ({"scale": math.nan}, ValueError, "`scale` must be finite, got nan"),
    "scale inf": ({"scale": -math.inf}, ValueError, "`scale` must be finite, got -inf"),
    "scale string": ({"scale": "0.5"}, TypeError, "`scale` must be a finite number, got str '0.5'"),
    "scale tensor": ({"scale": torch.tensor(0.5)}, TypeError, "`scale` must be a finite number, got a tensor"),
    "scale bool": ({"scale": True}, TypeError, "`scale` must be a finite number, got bool True"),
    "impl unknown": (
        {"impl": "cuda"},
        ValueError,
        "`impl` must be one of 'auto', 'reference', 'torch', 'triton', 'native', got 'cuda'",
    ),
    "impl none": ({"impl": None}, ValueError, "`impl` must be one of 'auto', 'reference', 'torch', 'triton', 'native'"),
}  # fmt: skip


@pytest.fixture
def no_kernel(monkeypatch):
    """Fail the test if any implementation of the op is entered."""

    def forbidden(*args, **kwargs):
        pytest.fail("a kernel ran on bad input")

    for name in ("cross_attention_reference", "cross_attention_torch"):
        monkeypatch.setattr(API, name, forbidden)
    monkeypatch.setattr(API.native, "run_plain", forbidden)
    for name in ("cross_attention_triton_fwd", "cross_attention_native_decode"):
        monkeypatch.setattr(torch.ops.calm_fast, name, forbidden)


def test_there_are_many_cases():
    assert len(BAD) >= 45


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_names_argument_expectation_and_value(name, impl, no_kernel):
    changes, exception, message = BAD[name]
    args = {"impl": impl, **made(**changes)}
    for call in (cross_attention, lambda **kw: calm_fast.explain("cross_attention", **kw)):
        with pytest.raises(exception, match="^" + re.escape(f"cross_attention: {message}")) as caught:
            call(**args)
        assert type(caught.value) is exception


@pytest.mark.parametrize("impl", ["auto", "reference", "torch", "triton"])
def test_the_unchanged_arguments_reach_a_kernel(impl, no_kernel):
    """The guard of these tests works: good input does enter an implementation."""
    with pytest.raises(pytest.fail.Exception, match="a kernel ran on bad input"):
        cross_attention(**good(), impl=impl)


def test_numbers_and_subclasses_that_are_fine():
    args = good()
    plain = cross_attention(**args, scale=0.5, impl="torch")  # with gradients auto takes another implementation
    assert torch.equal(plain, cross_attention(**args, scale=numpy.float64(0.5), impl="torch"))
    leaf = torch.nn.Parameter(args["q"])
    assert torch.equal(plain, cross_attention(leaf, args["k"], args["v"], scale=0.5, impl="torch"))
    assert cross_attention(**args, scale=1).shape == plain.shape  # an int is a finite number


@pytest.mark.parametrize("name", ["lo", "hi"])
def test_bounds_at_their_limits_are_fine(name):
    edge = bounds(0, N, 0, N, N)
    assert cross_attention(**good(), **{name: edge}).shape == (B, M, H, D)
