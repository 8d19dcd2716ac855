"""core/fingerprint.py and core/wrapped_names.py: one model in any dtype and wrapper is itself, another one is not."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from calm_fast.core.fingerprint import SAMPLED_TENSORS, weight_fingerprint, weights_differ
from calm_fast.core.wrapped_names import bare_name

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def model(seed: int = 0, layers: int = 3, scale: float = 1.0) -> nn.Module:
    torch.manual_seed(seed)
    parts = [nn.Linear(24, 24) for _ in range(layers)]
    for part in parts:
        nn.init.normal_(part.weight, std=scale)
    return nn.Sequential(nn.Embedding(97, 24), *parts, nn.LayerNorm(24))


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-6])
@pytest.mark.parametrize("saved", DTYPES)
@pytest.mark.parametrize("loaded", DTYPES)
def test_a_model_is_itself_in_every_dtype(saved: torch.dtype, loaded: torch.dtype, scale: float) -> None:
    """Loaded from a float32 checkpoint in one dtype when it was saved, in another one now."""
    recorded = weight_fingerprint(model(scale=scale).to(saved))
    assert weights_differ(recorded, model(scale=scale).to(loaded)) == ""
    assert "other values" in weights_differ(recorded, model(seed=1, scale=1.0).to(loaded))


def flipped(m: nn.Module) -> None:
    m[1].weight.data.neg_()


def swapped(m: nn.Module) -> None:
    m[1].weight.data, m[2].weight.data = m[2].weight.data, m[1].weight.data


def nudged(m: nn.Module) -> None:
    for p in m.parameters():
        p.data.mul_(1.02)


def permuted(m: nn.Module) -> None:
    m[1].weight.data = m[1].weight.data.flip(0)


@pytest.mark.parametrize("change", [flipped, swapped, nudged, permuted])
def test_a_change_is_seen(change: Callable[[nn.Module], None]) -> None:
    recorded, other = weight_fingerprint(model()), model()
    change(other)
    assert "other values, for instance" in weights_differ(recorded, other)


def test_missing_and_resized_parameters_are_seen() -> None:
    recorded = weight_fingerprint(model())
    other = model()
    other[0] = nn.Embedding(128, 24)
    assert weights_differ(recorded, other) == "1 of 9 parameters that were looked at are missing or have another shape"
    assert weights_differ(recorded, other, partial=True) == ""
    assert weights_differ(weight_fingerprint(model(layers=2)), nn.Sequential(*model(layers=2), nn.Linear(2, 2))) == ""


def test_what_cannot_be_read_is_not_compared() -> None:
    recorded, other = weight_fingerprint(model()), model()
    other[1].to("meta")
    assert weights_differ(recorded, other) == ""
    assert weight_fingerprint(model().to("meta")) == "" == weights_differ("", model(seed=1))
    assert weight_fingerprint(nn.Identity()) == ""


def test_wrappers_do_not_matter() -> None:
    recorded = weight_fingerprint(model())
    wrapped = model()
    wrapped[1] = torch.compile(wrapped[1])
    assert weights_differ(recorded, nn.DataParallel(wrapped)) == ""
    assert weights_differ(recorded, torch.compile(wrapped)) == ""


def test_it_is_short_and_quick() -> None:
    large = nn.ModuleList([nn.Linear(64, 64) for _ in range(500)])
    begin = time.perf_counter()
    recorded = weight_fingerprint(large)
    assert time.perf_counter() - begin < 1, "milliseconds; a second on a busy machine"
    assert len(recorded) <= 8 + SAMPLED_TENSORS * 16
    assert weights_differ(recorded, large) == ""


@pytest.mark.parametrize("broken", ["full", "other:AAAA", "full:!", "full:AAAA"])
def test_a_broken_text_is_named(broken: str) -> None:
    with pytest.raises(ValueError, match="`recorded` must be a fingerprint"):
        weights_differ(broken, model())


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("a.b.weight", "a.b.weight"),
        ("module._orig_mod.a.weight", "a.weight"),
        ("a._orig_mod.b._fsdp_wrapped_module.weight", "a.b.weight"),
        ("base_model.model.a._checkpoint_wrapped_module.weight", "a.weight"),
        ("module.base_model.model.model.layers.0.weight", "model.layers.0.weight"),
        ("base_model.a.model.weight", "base_model.a.model.weight"),
    ],
)
def test_names_lose_wrappers_only(name: str, bare: str) -> None:
    assert bare_name(name) == bare
