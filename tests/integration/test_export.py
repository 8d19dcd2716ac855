"""torch.export and ONNX: one program of a composition takes every batch and length; torch.jit is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "hf"))

from families import composed_model  # noqa: E402
from ragged import ROUNDINGS  # noqa: E402

from calm_fast import fixed_weights  # noqa: E402

BATCH, LENGTH = torch.export.Dim("batch", min=2, max=32), torch.export.Dim("length", min=2, max=64)
# both sides of 16 queries, where the native kernel for few queries ends
SHAPES = ((2, 9), (3, 16), (2, 17), (5, 40), (2, 2))


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(ids, attention_mask=mask, use_cache=False).logits


def batch(rows: int, length: int, masked: bool) -> tuple[torch.Tensor, ...]:
    """Return ids, and with `masked` a mask with padding left, right and a hole."""
    ids = torch.randint(2, 90, (rows, length), generator=torch.Generator().manual_seed(length))
    if not masked:
        return (ids,)
    mask = torch.ones_like(ids)
    mask[0, : length // 3] = 0
    mask[1, length - 1 :] = 0
    mask[-1, length // 2 : length // 2 + (rows > 2)] = 0
    return ids, mask


def dynamic(masked: bool) -> dict[str, Any]:
    sizes = {0: BATCH, 1: LENGTH}
    return {"ids": sizes, "mask": sizes} if masked else {"ids": sizes, "mask": None}


def check(wanted: torch.Tensor, got: torch.Tensor, inputs: tuple[torch.Tensor, ...]) -> None:
    """Compare the logits of real tokens; every rounding on the way is at most half an epsilon of the largest."""
    real = inputs[1].bool() if len(inputs) > 1 else torch.ones_like(inputs[0]).bool()
    bound = 2 * ROUNDINGS * 2**-24 * wanted[real].abs().max().item()
    assert (wanted - got)[real].abs().max().item() <= bound


@pytest.fixture(scope="module")
def wrapper() -> Logits:
    return Logits(composed_model("llama", connections=((-1, -1), (2, 2))).eval()).eval()


@pytest.mark.integration(tool="torch.export", what="batch and length dynamic, no mask", verdict="works")
@torch.no_grad()
def test_one_program_takes_every_length(wrapper: Logits) -> None:
    inputs = (*batch(2, 9, False), None)
    program = torch.export.export(wrapper, inputs, dynamic_shapes=dynamic(False)).module()
    for shape in SHAPES:
        (ids,) = batch(*shape, False)
        check(wrapper(ids), program(ids, None), (ids,))


@pytest.mark.integration(
    tool="torch.export", what="batch and length dynamic, with an attention mask; saved, loaded", verdict="works"
)
@torch.no_grad()
def test_one_program_takes_every_mask(wrapper: Logits, tmp_path: Path) -> None:
    with fixed_weights(wrapper):  # the folded weights become constants of the program
        exported = torch.export.export(wrapper, batch(2, 9, True), dynamic_shapes=dynamic(True))
    torch.export.save(exported, tmp_path / "composition.pt2")
    program = torch.export.load(tmp_path / "composition.pt2").module()
    for shape in SHAPES:
        inputs = batch(*shape, True)
        check(wrapper(*inputs), program(*inputs), inputs)


@pytest.mark.integration(tool="ONNX", what="`torch.onnx.export(dynamo=True)`, batch, length and mask", verdict="works")
@pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec:FutureWarning")  # torch.onnx of torch 2.13 itself
@torch.no_grad()
def test_onnx_runtime_gives_the_same_logits(wrapper: Logits, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    path = tmp_path / "composition.onnx"
    program = torch.onnx.export(wrapper, batch(2, 9, True), dynamo=True, dynamic_shapes=dynamic(True), verbose=False)
    assert program is not None
    program.save(path)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in SHAPES:
        inputs = batch(*shape, True)
        feed = {node.name: t.numpy() for node, t in zip(session.get_inputs(), inputs, strict=True)}
        check(wrapper(*inputs), torch.from_numpy(session.run(None, feed)[0]), inputs)


@pytest.mark.integration(tool="torch.jit", what="`torch.jit.trace` of a composition", verdict="refused")
@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracing_is_refused(wrapper: Logits) -> None:
    with pytest.raises(ValueError, match=r"torch.jit.trace: .* cannot be traced.*use torch.export"):
        torch.jit.trace(wrapper, batch(2, 9, False), check_trace=False)


@pytest.mark.integration(
    tool="torch.export", what="a dual-LoRA model in mode mix, batch and length dynamic", verdict="works"
)
@pytest.mark.parametrize("variant", ["paper", "released"])
@torch.no_grad()
def test_a_dual_lora_model_takes_every_length(variant: str) -> None:
    from families import FAMILIES

    from calm_fast import add_dual_lora

    torch.manual_seed(0)
    model = add_dual_lora(FAMILIES["llama"].model(0), rank=4, variant=variant, mode="mix").eval()
    for name, parameter in model.named_parameters():
        if "self_attn" in name and "base" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    dual = Logits(model).eval()
    with fixed_weights(dual):
        program = torch.export.export(dual, batch(2, 9, True), dynamic_shapes=dynamic(True)).module()
    for shape in SHAPES:
        inputs = batch(*shape, True)
        check(dual(*inputs), program(*inputs), inputs)
