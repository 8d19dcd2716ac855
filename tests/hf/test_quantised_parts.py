"""Weights that were quantised in place: references that would lose it and training without gradients are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from saved import rebuilt
from torch import nn
from transformers import AutoModelForCausalLM

from calm_fast.hf import compose


class Int8(nn.Parameter):
    """A weight of its own class, as quantising libraries put into linear layers."""


def quantise(layer: nn.Linear) -> None:
    layer.weight = Int8(layer.weight.detach().round(decimals=1), requires_grad=False)


def in_an_anchor(model: Any) -> None:
    quantise(model.anchor.model.layers[0].mlp.up_proj)


def in_an_augmenter(model: Any) -> None:
    # bitsandbytes keeps integers in the parameter
    layer = model.augmenters[0].transformer.h[0].attn.c_attn
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)


@pytest.mark.parametrize(
    ("change", "part", "weight"),
    [
        (in_an_anchor, "anchor", r"model\.layers\.0\.mlp\.up_proj\.weight, a Int8"),
        (in_an_augmenter, "augmenters", r"transformer\.h\.0\.attn\.c_attn\.weight, a Parameter"),
    ],
)
def test_a_reference_to_other_weights_is_refused(change: Any, part: str, weight: str, folder: Path) -> None:
    model = rebuilt(folder)
    change(model)
    with pytest.raises(ValueError, match=rf"^save_pretrained: `{part}` must be .* quantised after .*{weight}"):
        model.save_pretrained(folder / "again")


def test_a_part_that_was_quantised_before_it_was_composed_is_refused(folder: Path) -> None:
    anchor = AutoModelForCausalLM.from_pretrained(folder / "anchor")
    quantise(anchor.model.layers[0].mlp.up_proj)
    model = compose(anchor, folder / "augmenter", [(0, 0)])
    with pytest.raises(ValueError, match=r"^save_pretrained: `anchor` must be .* quantised after it was loaded"):
        model.save_pretrained(folder / "again")


def test_connections_that_cannot_train_are_refused(folder: Path) -> None:
    model = rebuilt(folder)
    quantise(model.connections[1].k_proj)
    with pytest.raises(
        ValueError, match=r"^ComposedForCausalLM.train: `connections` must be .*1\.k_proj\.weight, a Int8"
    ):
        model.train()
    model.eval()
    model.connections[1].k_proj.weight.requires_grad_(True)
    model.train()


def test_connections_of_integers_are_not_saved(folder: Path) -> None:
    model = rebuilt(folder)
    layer = model.connections[1].k_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(
        ValueError, match="^save_pretrained: `connections` must be .*Quantised connections are not saved"
    ):
        model.save_pretrained(folder / "again")
