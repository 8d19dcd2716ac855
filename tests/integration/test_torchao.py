"""torchao: weights of int8 and int4 in parts, in the base of dual LoRA, and in a whole composition."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchao")

from quantised import (  # noqa: E402
    IDS,
    check_files,
    check_in_role,
    check_quantised_files,
    check_under_dual_lora,
    composed,
    in_place,
    logits,
    saved,
    tiny,
)

from calm_fast.hf import ComposedForCausalLM  # noqa: E402


@pytest.mark.parametrize("role", ["anchor", "augmenter"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "torchao int8",
            marks=pytest.mark.integration(
                tool="torchao", what="int8 weight-only: anchor, augmenter, `TorchAoConfig`", verdict="works"
            ),
        ),
        pytest.param(
            "torchao int4",
            marks=pytest.mark.integration(
                tool="torchao", what="int4 weight-only: anchor, augmenter, `quantize_`", verdict="works"
            ),
        ),
    ],
)
def test_a_part_is_quantised(kind: str, role: str, tmp_path: Path) -> None:
    check_in_role(kind, role, tmp_path)


@pytest.mark.integration(tool="torchao", what="int8 and int4 weight-only: base of dual LoRA", verdict="works")
@pytest.mark.parametrize("kind", ["torchao int8 in place", "torchao int4"])
def test_dual_lora_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    check_under_dual_lora(kind, tmp_path)


@pytest.mark.integration(
    tool="torchao", what="files of a composition whose parts are quantised while loading", verdict="works"
)
def test_files(tmp_path: Path) -> None:
    check_files("torchao int8", tmp_path)


@pytest.mark.integration(tool="torchao", what="a composition of parts that were saved quantised", verdict="works")
def test_quantised_files(tmp_path: Path) -> None:
    check_quantised_files("torchao int8", tmp_path)


@pytest.mark.integration(
    tool="torchao", what="saving a composition whose part was quantised after it was loaded", verdict="refused"
)
@pytest.mark.parametrize("when", ["before compose", "after compose"])
def test_a_reference_to_other_weights_is_refused(when: str, tmp_path: Path) -> None:
    if when == "before compose":
        read = type(tiny(0)).from_pretrained
        model = composed(in_place(read(saved(0, tmp_path)), 8), saved(1, tmp_path))
    else:
        model = composed(saved(0, tmp_path), saved(1, tmp_path))
        in_place(model.anchor, 8)
    with pytest.raises(ValueError, match=r"^save_pretrained: `anchor` must be .* quantised after .*Int8Tensor"):
        model.save_pretrained(tmp_path / "composed")
    model.save_pretrained(tmp_path / "composed", check_parts=False)
    again = ComposedForCausalLM.from_pretrained(tmp_path / "composed", anchor=model.anchor, augmenters=tiny(1))
    assert torch.equal(logits(again), logits(model))


@pytest.mark.integration(tool="torchao", what="parts quantised inside a composition, which trains on", verdict="works")
def test_the_parts_of_a_composition_are_quantised() -> None:
    model, other = composed(tiny(0), tiny(1)), composed(in_place(tiny(0), 8), in_place(tiny(1), 8))
    for part in (model.anchor, *model.augmenters):
        in_place(part, 8)
    assert torch.equal(logits(model), logits(other))
    model.train()(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in model.connections.parameters())


@pytest.mark.integration(tool="torchao", what="a whole composition quantised: forward, `generate`", verdict="works")
def test_a_whole_composition_is_quantised() -> None:
    model = in_place(composed(tiny(0), tiny(1)), 8)
    want = composed(*(dequantised(in_place(tiny(seed), 8)) for seed in (0, 1)))
    for connection in want.connections:
        dequantised(in_place(connection, 8))
    # Both multiply the same weights; int8 weights are scaled after the sum, so the roundings differ. 2 layers and 2
    # connections have less than 30 products in a row, each of a sum of at most 128 terms.
    bound = 30 * 128 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(logits(model), logits(want), rtol=bound, atol=bound)
    written = model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
    assert torch.equal(written, want.generate(IDS[:1], max_new_tokens=3, do_sample=False))


def dequantised(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear) and hasattr(module.weight, "dequantize"):
            module.weight = nn.Parameter(module.weight.dequantize(), requires_grad=False)
    return model


@pytest.mark.integration(
    tool="torchao", what="a whole composition quantised: training and saving it", verdict="refused"
)
def test_quantised_connections_neither_train_nor_are_saved(tmp_path: Path) -> None:
    model = in_place(composed(tiny(0), tiny(1)), 8)
    message = (
        r"^ComposedForCausalLM.train: `connections` must be weights that can train, got 0\.\w+\.weight, a Int8Tensor"
    )
    with pytest.raises(ValueError, match=message):
        model.train()
    with pytest.raises(
        ValueError, match="^save_pretrained: `connections` must be .*Quantised connections are not saved"
    ):
        model.save_pretrained(tmp_path)


def test_the_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "quantised.md"
    blocks = re.findall(r"^```py\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    monkeypatch.chdir(tmp_path)
    exec(compile("\n".join(blocks), str(page), "exec"), {})  # noqa: S102  the page's own code
