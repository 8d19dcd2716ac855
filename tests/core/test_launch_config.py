"""The choice of a launch config: what it costs at every launch, and the GPU that it is made for."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import pytest
import torch

from calm_fast.core import dispatch
from calm_fast.kernels.common import config_table, hardware
from calm_fast.kernels.cross_attention.configs import DECODE, FWD, attention_tile

H200 = hardware.Gpu("NVIDIA H200", 90, 132)
SHAPE = {"M": 4096, "N": 4096, "H": 32, "Hkv": 8}


def forget():
    """Drop the choices that kernels keep."""
    config_table._chosen.cache_clear()
    config_table._measured.cache_clear()


@pytest.fixture
def files(monkeypatch, tmp_path):
    """An H200 without measured configs; the folder where they would be."""
    monkeypatch.setattr(hardware, "_properties", lambda index: H200)
    monkeypatch.setattr(config_table, "KERNELS", tmp_path)
    forget()
    yield tmp_path / "cross_attention" / "tuned"
    forget()


def pick(table=FWD, **shape):
    return table.pick(torch.device("cuda", 0), torch.bfloat16, 128, 128, SHAPE | shape, interpreted=False)


def python_calls(function):
    """Return how many Python functions a call of `function` enters, itself not counted."""
    found = []

    def count(frame, event, arg):
        if event == "call":
            found.append(frame.f_code.co_qualname)

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return len(found) - 1


def measured(folder, *configs):
    folder.mkdir(parents=True)
    entries = [
        {"part": "fwd", "dtype": "bfloat16", "head_dim": 128, "shape": {"M": m, "N": m}, "config": asdict(c)}
        for m, c in configs
    ]
    (folder / "nvidia_h200.json").write_text(json.dumps({"entries": entries}))


def test_a_launch_does_not_search_its_config_again(files):
    measured(files, *((2**i, attention_tile(64, 32, 4, 2)) for i in range(4, 14)))
    pick()
    assert python_calls(pick) <= 8  # 85 when every launch rescanned the file


def test_a_new_length_of_the_keys_rescans_nothing(files):
    """A decoding step has a new length; nothing was measured for its kernel."""
    pick(DECODE)
    lengths = iter(range(5000, 5002))
    assert python_calls(lambda: pick(DECODE, N=next(lengths))) <= 20


def test_the_nearest_measured_config_is_found_for_every_shape(files):
    small, large = attention_tile(64, 32, 4, 2), attention_tile(128, 64, 8, 3)
    measured(files, (512, small), (8192, large))
    for _ in range(2):
        assert pick(M=600, N=600) == small
        assert pick(M=6000, N=9000) == large
        assert pick(DECODE) == DECODE.default(90, torch.bfloat16, 128)


def test_a_cuda_device_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    capabilities = {0: (7, 5), 1: (9, 0)}
    monkeypatch.setattr(dispatch, "_capability", capabilities.__getitem__)
    names = {0: hardware.Gpu("old", 75, 40), 1: H200}
    monkeypatch.setattr(hardware, "_properties", names.__getitem__)
    bare = torch.device("cuda")
    assert dispatch.triton_obstacle(bare) is None
    assert "this GPU has (7, 5)" in dispatch.triton_obstacle(torch.device("cuda", 0))
    assert hardware.gpu(bare) is H200
