"""bitsandbytes on a CPU: int8 and nf4 weights in parts and in the base of dual LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

from calm_fast import add_dual_lora
from calm_fast.hf import compose

pytest.importorskip("bitsandbytes")

from quantised import (  # noqa: E402
    IDS,
    check_files,
    check_in_role,
    check_quantised_files,
    check_under_dual_lora,
    logits,
    quantised,
    tiny,
)

# bitsandbytes tells each time that it multiplies in float16
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.mark.parametrize("role", ["anchor", "augmenter"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "bitsandbytes int8",
            marks=pytest.mark.integration(tool="bitsandbytes", what="int8: anchor, augmenter", verdict="works"),
        ),
        pytest.param(
            "bitsandbytes nf4",
            marks=pytest.mark.integration(tool="bitsandbytes", what="nf4: anchor, augmenter", verdict="works"),
        ),
    ],
)
def test_a_part_is_quantised(kind: str, role: str, tmp_path: Path) -> None:
    check_in_role(kind, role, tmp_path)


@pytest.mark.integration(tool="bitsandbytes", what="int8 and nf4: base of dual LoRA", verdict="works")
@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_dual_lora_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    check_under_dual_lora(kind, tmp_path)


@pytest.mark.integration(
    tool="bitsandbytes", what="files of a composition whose parts are quantised while loading", verdict="works"
)
@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_files(kind: str, tmp_path: Path) -> None:
    check_files(kind, tmp_path)


@pytest.mark.integration(tool="bitsandbytes", what="a composition of parts that were saved quantised", verdict="works")
def test_quantised_files(tmp_path: Path) -> None:
    check_quantised_files("bitsandbytes nf4", tmp_path)


@pytest.mark.integration(
    tool="bitsandbytes",
    what="nf4 on CPUs with bfloat16 instructions: evaluation leaves weights and gradients",
    verdict="works",
)
def test_a_part_stays_as_it_was_loaded(tmp_path: Path) -> None:
    """On some CPUs bitsandbytes rounds 4-bit weights when they are first evaluated, and cuts their gradient."""
    anchor, augmenter = (quantised("bitsandbytes nf4", seed, tmp_path) for seed in (0, 1))
    model = compose(anchor, augmenter, [(0, 0), (1, 1)])
    layers = {name: layer for name, layer in model.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert len(layers) == 2 * 2 * 7
    weights = {
        name: (layer.weight.data.clone(), layer.weight.quant_state.absmax.clone()) for name, layer in layers.items()
    }
    for _ in range(2):
        logits(model)
        model.train()(IDS, labels=IDS).loss.backward()
    for name, layer in layers.items():
        codes, scales = weights[name]
        assert layer.weight.data.equal(codes) and layer.weight.quant_state.absmax.equal(scales), name


@pytest.mark.integration(
    tool="bitsandbytes", what="nf4, evaluated on such a CPU before composing or adding dual LoRA", verdict="refused"
)
@pytest.mark.parametrize("role", ["anchor", "augmenters", "model"])
def test_a_part_that_was_evaluated_is_refused(role: str, tmp_path: Path) -> None:
    model = quantised("bitsandbytes nf4", 0, tmp_path)
    logits(model)
    # the mark that bitsandbytes leaves, here also on CPUs that keep the layout
    model.model.layers[1].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(
        ValueError, match=rf"`{role}` must be a 4-bit model that has not been evaluated.*Load the model"
    ):
        if role == "model":
            add_dual_lora(model, "q_proj")
        else:
            compose(*((model, tiny(1)) if role == "anchor" else (tiny(1), model)), [(0, 0), (1, 1)])
