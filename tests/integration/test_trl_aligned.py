"""TRL's trainers on compositions whose parts have different tokenizers: right, or refused by name."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))

import trl_setup as setup  # noqa: E402
from test_trl import dpo, grpo, recipe, reward  # noqa: E402
from texts import aligned_model, model_of, tokenizer  # noqa: E402
from trl import (  # noqa: E402
    DistillationConfig,
    DistillationTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from calm_fast.hf import AlignedCollator, frozen_copy  # noqa: E402

# TRL itself uses names that transformers has deprecated
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.old_names]
NO_PROMPT = "`prompt_length` must be given"


def aligned() -> Any:
    return aligned_model(("llama", "bytes"), ("llama", "metaspace"), connections=((-1, -1), (1, 1)), depth=2)


@pytest.mark.integration(tool="TRL", what="SFTTrainer with AlignedCollator, two tokenizers", verdict="works")
def test_sft_with_the_collator_is_the_plain_loss(tmp_path: Path) -> None:
    model = aligned()
    collate = AlignedCollator(model, setup.tokens())
    loss = model.train()(**collate(setup.COMPLETIONS), use_cache=False).loss
    expected = setup.gradient_of(model, loss)
    options = {"remove_unused_columns": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    trainer = SFTTrainer(
        model,
        setup.settings(SFTConfig, tmp_path, **options),
        data_collator=collate,
        train_dataset=setup.data(setup.COMPLETIONS),
        processing_class=setup.tokens(),
    )
    gradient, logged = setup.step_of(trainer)
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-5)
    setup.close(gradient, expected)


@pytest.mark.integration(tool="TRL", what="SFTTrainer without AlignedCollator, two tokenizers", verdict="refused")
def test_sft_without_the_collator(tmp_path: Path) -> None:
    config = setup.settings(SFTConfig, tmp_path)
    rows = setup.data(setup.COMPLETIONS)
    with pytest.raises(ValueError, match=NO_PROMPT):
        SFTTrainer(aligned(), config, train_dataset=rows, processing_class=setup.tokens()).train()


@pytest.mark.integration(tool="TRL", what="DPOTrainer, two tokenizers", verdict="refused")
@pytest.mark.parametrize("precompute", [False, True])
def test_dpo(precompute: bool, tmp_path: Path) -> None:
    model = aligned()
    reference = None if precompute else frozen_copy(model)
    with pytest.raises(ValueError, match=NO_PROMPT):
        dpo(model, tmp_path, reference, precompute_ref_log_probs=precompute).train()


@pytest.mark.integration(tool="TRL", what="KTOTrainer, two tokenizers", verdict="refused")
def test_kto(tmp_path: Path) -> None:
    model = aligned()
    config, rows = setup.settings(KTOConfig, tmp_path), setup.data(setup.GRADED)
    with pytest.raises(ValueError, match=NO_PROMPT):
        KTOTrainer(model, frozen_copy(model), config, train_dataset=rows, processing_class=setup.tokens()).train()


@pytest.mark.integration(tool="TRL", what="GRPOTrainer without the page's class, two tokenizers", verdict="refused")
def test_grpo(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=NO_PROMPT):
        grpo(aligned(), tmp_path).train()


@pytest.mark.integration(tool="TRL", what="GRPOTrainer with the page's class, two tokenizers", verdict="works")
def test_the_recipe_scores_what_was_generated(tmp_path: Path) -> None:
    """The log-probabilities of sampled tokens are those of the logits that sampled them, step by step with a cache."""
    model = aligned()
    trainer = grpo(model, tmp_path, recipe(), temperature=1.0)
    ids, mask = _prompts()
    made = model.generate(
        ids, attention_mask=mask, max_new_tokens=6, min_new_tokens=6, do_sample=False, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    new = made.sequences[:, ids.shape[1] :]
    expected = torch.stack(made.logits, 1).log_softmax(-1).gather(2, new[..., None])[..., 0]
    whole = torch.cat([mask, torch.ones_like(new)], 1)
    with torch.no_grad():
        found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, made.sequences, whole, new.shape[1])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradient, _ = setup.step_of(trainer)
    assert float(gradient.abs().max()) > 0


def _prompts() -> tuple[torch.Tensor, torch.Tensor]:
    tok = tokenizer("bytes")
    batch = tok([row["prompt"] for row in setup.PROMPTS], return_tensors="pt", padding=True, padding_side="left")
    return batch["input_ids"], batch["attention_mask"]


def gkd(student: Any, teacher: Any, folder: Path, **options: Any) -> Any:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    talk = setup.tokens()
    talk.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    chats = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c, _ in setup.PARTS
    ]
    config = setup.settings(GKDConfig, folder, max_new_tokens=3, **options)
    return GKDTrainer(student, teacher, config, train_dataset=setup.data(chats), processing_class=talk)


@pytest.mark.integration(tool="TRL", what="GKDTrainer (experimental), two tokenizers", verdict="refused")
@pytest.mark.parametrize("role", ["student", "teacher", "student on its own texts"])
def test_gkd(role: str, tmp_path: Path) -> None:
    single, several = model_of("llama", "bytes", 5, depth=2), aligned()
    pair = (single, several) if role == "teacher" else (several, single)
    with pytest.raises(ValueError, match=f"{NO_PROMPT}.* got None from trl.experimental.gkd"):
        gkd(*pair, tmp_path, lmbda=1.0 if "own" in role else 0.0).train()


@pytest.mark.integration(tool="TRL", what="ORPOTrainer, CPOTrainer (experimental), two tokenizers", verdict="refused")
@pytest.mark.parametrize("name", ["orpo", "cpo"])
def test_orpo_and_cpo(name: str, tmp_path: Path) -> None:
    module = importlib.import_module(f"trl.experimental.{name}")
    kinds = (getattr(module, f"{name.upper()}{part}") for part in ("Config", "Trainer"))
    config, trainer = next(kinds), next(kinds)
    options = setup.settings(config, tmp_path, remove_unused_columns=False)
    with pytest.raises(ValueError, match=f"{NO_PROMPT}.* got None from trl.experimental.{name}"):
        trainer(aligned(), options, train_dataset=setup.data(setup.PAIRS), processing_class=setup.tokens()).train()


@pytest.mark.integration(tool="TRL", what="RLOOTrainer, DistillationTrainer, two tokenizers", verdict="refused")
@pytest.mark.parametrize("role", ["RLOO", "student", "teacher"])
def test_rloo_and_distillation(role: str, tmp_path: Path) -> None:
    rows, tokens = setup.data(setup.PROMPTS), setup.tokens()
    single, several = model_of("llama", "bytes", 5, depth=2), aligned()
    if role == "RLOO":
        config = setup.settings(RLOOConfig, tmp_path, num_generations=2, max_completion_length=5, beta=0.0)
        trainer = RLOOTrainer(several, reward, config, train_dataset=rows, processing_class=tokens)
    else:
        pair = (several, single) if role == "student" else (single, several)
        config = setup.settings(DistillationConfig, tmp_path, max_completion_length=4)
        trainer = DistillationTrainer(*pair, config, train_dataset=rows, processing_class=tokens)
    with pytest.raises(ValueError, match=NO_PROMPT):
        trainer.train()


@pytest.mark.integration(tool="TRL", what="calls by hand and generate after a trainer, two tokenizers", verdict="works")
def test_calls_by_hand_are_not_taken_for_a_trainers(tmp_path: Path) -> None:
    model = aligned()
    ids, mask = _prompts()
    before = model(ids, attention_mask=mask).logits
    grpo(model, tmp_path, recipe())  # TRL replaces the model's forward
    assert "forward" in vars(model)
    assert torch.equal(model(ids, attention_mask=mask).logits, before)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=2).shape[1] == ids.shape[1] + 2
