"""use_liger_kernel=True on a composition: applied to its parts or refused. Liger's kernels themselves need a GPU."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("liger_kernel")
sys.path.insert(0, str(Path(__file__).parents[1] / "hf"))

from families import FAMILIES, prompts  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402
from transformers.integrations.liger import apply_liger_kernel  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402

from calm_fast.hf import compose  # noqa: E402


@pytest.fixture(autouse=True)
def _llama_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undo what Liger replaces for the whole process."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))


def trainer(augmenter: str, folder: Path, anchor: str = "llama", **config: Any) -> Trainer:
    model = compose(FAMILIES[anchor].model(0), FAMILIES[augmenter].model(1), [(0, 1)], num_heads=4)
    arguments = TrainingArguments(
        output_dir=str(folder), use_liger_kernel=True, liger_kernel_config=config or None, max_steps=1, report_to=[],
        use_cpu=True, save_strategy="no",
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for row in prompts(2, 6).tolist()]
    return Trainer(model=model, args=arguments, train_dataset=rows)


def patched(run: Trainer) -> list[str]:
    """Apply what Trainer applies when training begins; return the paths of the modules that changed."""
    assert run.model is not None
    apply_liger_kernel(run.model, run.args.liger_kernel_config)
    return [path for path, module in run.model.named_modules() if "forward" in vars(module) and path]


@pytest.mark.integration(tool="Liger", what="use_liger_kernel patches the parts (kernels not run)", verdict="works")
def test_trainer_patches_every_part(tmp_path: Path) -> None:
    found = patched(trainer("llama", tmp_path))
    parts = ("anchor.model.", "augmenters.0.model.")
    for part in parts:
        assert {f"{part}layers.0.mlp", f"{part}layers.0.input_layernorm", f"{part}norm"} <= set(found)
    assert all(path.startswith(parts) for path in found)  # no forward of a whole part is replaced
    assert "liger" in modeling_llama.apply_rotary_pos_emb.__module__


@pytest.mark.integration(tool="Liger", what="liger_kernel_config reaches the parts", verdict="works")
def test_settings_reach_the_parts(tmp_path: Path) -> None:
    found = patched(trainer("llama", tmp_path, rms_norm=False, rope=False))
    assert found and all(path.endswith("mlp") for path in found)
    assert "liger" not in modeling_llama.apply_rotary_pos_emb.__module__


@pytest.mark.integration(tool="Liger", what="a part of a family that Liger does not know", verdict="works")
def test_an_unknown_part_is_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no kernels for GPT2LMHeadModel, which stay as they are"):
        found = patched(trainer("gpt2", tmp_path))
    assert found and all(path.startswith("anchor.") for path in found)


@pytest.mark.integration(tool="Liger", what="a composition without a part that Liger knows", verdict="refused")
def test_no_known_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`use_liger_kernel` must be False .* got True, with GPT2LMHeadModel"):
        trainer("gpt2", tmp_path, "gpt2").train()


@pytest.mark.integration(tool="Liger", what="fused_linear_cross_entropy", verdict="refused")
def test_the_fused_loss_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        with pytest.raises(ValueError, match="`fused_linear_cross_entropy` must be False for a composition"):
            patched(trainer("llama", tmp_path, fused_linear_cross_entropy=True))
