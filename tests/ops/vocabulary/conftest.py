"""Fixtures that choose the code of one CPU feature level (a lane, csrc/common/lanes.h) in the compiled library."""

from __future__ import annotations

import functools

import pytest
import torch

from calm_fast.core import native_library

LANES = ("scalar", "avx2", "avx512", "avx512_bf16")
KERNELS = (
    "_linear_logprob_native_fwd",
    "_linear_logprob_native_dlogits",
    "_linear_logprob_native_rows",
    "_linear_logprob_native_row_gradients",
    "_linear_nce_native_fwd",
    "_linear_nce_native_dlogits",
    "_linear_nce_native_gradient",
    "_linear_nce_native_rows",
    "_linear_nce_native_row_gradients",
)


class ForceLane:
    """Call it with a lane's name: from then on every kernel of the vocabulary ops runs that lane in this test."""

    def __init__(self, monkeypatch) -> None:
        self.monkeypatch = monkeypatch
        self.kernels = {name: getattr(torch.ops.calm_fast, name) for name in KERNELS}
        self.available = LANES[: LANES.index(native_library.build_info()["_cpu"]["best lane here"]) + 1]

    def __call__(self, name: str) -> None:
        for kernel, function in self.kernels.items():
            forced = functools.partial(function, lane=LANES.index(name))
            self.monkeypatch.setattr(torch.ops.calm_fast, kernel, forced)


@pytest.fixture
def force_lane(monkeypatch):
    return ForceLane(monkeypatch)


@pytest.fixture(params=LANES)
def lane(request, force_lane):
    """Force the lane for this test."""
    if request.param not in force_lane.available:
        pytest.skip(f"this CPU ends at {force_lane.available[-1]}")
    force_lane(request.param)
    return request.param


@pytest.fixture
def only_sweeps(monkeypatch):
    """Let no logits be few enough for torch's product, nor in tiles: the library's own sweep computes them."""
    monkeypatch.setattr("calm_fast._ops.vocabulary.decide.AT_ONCE", 0)
    for op in ("linear_logprob", "linear_nce"):
        monkeypatch.setattr(f"calm_fast._ops.{op}.native.in_tiles", lambda *_: False)
