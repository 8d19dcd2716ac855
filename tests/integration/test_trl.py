"""TRL's trainers on compositions and dual LoRA: equal to the plain computation, text by text."""

from __future__ import annotations

import copy
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

pytest.importorskip("trl")
sys.path.insert(0, str(Path(__file__).parent))

import trl_setup as setup  # noqa: E402
from peft import LoraConfig  # noqa: E402
from texts import model_of  # noqa: E402
from trl import (  # noqa: E402
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

from calm_fast import add_dual_lora, score_sequences  # noqa: E402
from calm_fast.hf import ComposedForCausalLM, compose, frozen_copy  # noqa: E402
from calm_fast.hf.dual_lora import dual_lora_layers  # noqa: E402

# TRL itself uses names that transformers has deprecated
pytestmark = [pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.old_names]
PAGE = Path(__file__).parents[2] / "docs" / "training_libraries.md"


def dual_lora() -> Any:
    model = add_dual_lora(model_of("llama", "bytes", 0, depth=2), rank=4)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in dual_lora_layers(model).values():
            for p in layer.parameters(recurse=False):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def sft(model: Any, folder: Path, **options: Any) -> Any:
    config = setup.settings(SFTConfig, folder, **options)
    return SFTTrainer(model, config, train_dataset=setup.data(setup.COMPLETIONS), processing_class=setup.tokens())


def plain_loss(model: Any) -> torch.Tensor:
    """Return the loss of the completions, each text alone in its row."""
    pairs = [(setup.ids_of(row["prompt"], end=False), setup.ids_of(row["completion"])) for row in setup.COMPLETIONS]
    total = sum(setup.log_probability(model, *pair) for pair in pairs)
    return -total / sum(len(completion) for _, completion in pairs)


@pytest.mark.integration(
    tool="TRL", what="SFTTrainer, plain, packing and padding-free, composition and dual LoRA", verdict="works"
)
@pytest.mark.parametrize("build", [setup.composition, dual_lora])
@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 64}, {"padding_free": True, "max_length": None}], ids=str
)
def test_an_sft_step_is_a_hand_written_one(build: Any, options: dict[str, Any], tmp_path: Path) -> None:
    model = build()
    loss = plain_loss(model.train())
    expected = setup.gradient_of(model, loss)
    gradient, logged = setup.step_of(sft(model, tmp_path, **options))
    assert logged["loss"] == pytest.approx(float(loss), rel=1e-5)
    setup.close(gradient, expected)


@pytest.mark.integration(tool="TRL", what="SFTTrainer, packing, a part that mixes documents", verdict="refused")
def test_packing_over_a_part_that_mixes_texts_is_refused(tmp_path: Path) -> None:
    model = compose(model_of("llama", "bytes", 0, depth=2), model_of("bloom", "bytes", 1, depth=2), [(0, 1)])
    with pytest.raises(ValueError, match="position_ids.*does not separate documents"):
        sft(model, tmp_path, packing=True, max_length=64, gradient_checkpointing=False).train()


REFERENCES = {
    "frozen_copy": (frozen_copy, {}),
    "deep copy": (copy.deepcopy, {}),
    "precomputed": (lambda model: None, {"precompute_ref_log_probs": True}),
}


def dpo(model: Any, folder: Path, reference: Any = None, rows: Any = setup.PAIRS, **options: Any) -> Any:
    config = setup.settings(DPOConfig, folder, **options)
    return DPOTrainer(model, reference, config, train_dataset=setup.data(rows), processing_class=setup.tokens())


@pytest.mark.integration(
    tool="TRL", what="DPOTrainer, references: frozen_copy, deep copy, precomputed", verdict="works"
)
@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("build", [setup.composition, dual_lora])
def test_a_dpo_step_is_a_hand_written_one(build: Any, name: str, tmp_path: Path) -> None:
    if (name, build) == ("frozen_copy", dual_lora):
        pytest.skip("for compositions")
    model = build()
    make, options = REFERENCES[name]
    margins, chosen = [], []
    model.train()
    for row in setup.PAIRS:
        prompt = setup.ids_of(row["prompt"], end=False)
        one, two = (setup.log_probability(model, prompt, setup.ids_of(row[side])) for side in ("chosen", "rejected"))
        margins.append(one - two)
        chosen.append(float(one.detach()))
    margin = torch.stack(margins)
    # the reference gives the same margins, as constants
    loss = -F.logsigmoid(0.1 * (margin - margin.detach())).mean()
    expected = setup.gradient_of(model, loss)
    gradient, logged = setup.step_of(dpo(model, tmp_path, make(model), **options))
    assert logged["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert logged["logps/chosen"] == pytest.approx(sum(chosen) / len(chosen), rel=1e-5)
    setup.close(gradient, expected)


@pytest.mark.integration(
    tool="TRL", what="DPOTrainer's log-probabilities are those of score_sequences", verdict="works"
)
def test_dpo_logs_what_score_sequences_scores(tmp_path: Path) -> None:
    model = setup.composition()
    prompts = [setup.ids_of(row["prompt"], end=False) for row in setup.PAIRS]
    for side in ("chosen", "rejected"):
        scores = score_sequences(model, prompts, [[setup.ids_of(row[side])] for row in setup.PAIRS])
        expected = sum(float(score.sum[0]) for score in scores) / len(scores)
        trainer = dpo(setup.composition(), tmp_path / side, frozen_copy(model), learning_rate=0.0)
        _, logged = setup.step_of(trainer)
        assert logged[f"logps/{side}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.integration(tool="TRL", what="sync_ref_model with a frozen_copy", verdict="refused")
def test_a_frozen_copy_is_never_synchronised_and_a_deep_copy_is(tmp_path: Path) -> None:
    options = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    model = setup.composition()
    before = [p.detach().clone() for p in model.anchor.parameters()]
    with pytest.raises((RuntimeError, ValueError)):
        dpo(model, tmp_path / "a", frozen_copy(model), **options).train()
    assert all(torch.equal(one, two) for one, two in zip(before, model.anchor.parameters(), strict=True))
    model = setup.composition()
    start = setup.weights(model)
    reference = copy.deepcopy(model)
    dpo(model, tmp_path / "b", reference, **options).train()
    moved = torch.cat([p.detach().flatten() for p in reference.connections.parameters()])
    setup.close(moved, (start + setup.weights(model)) / 2)


@pytest.mark.integration(
    tool="TRL", what="DPOTrainer takes its reference from the folder of a loaded composition", verdict="works"
)
def test_a_loaded_composition_is_its_own_reference(tmp_path: Path) -> None:
    for name, seed in (("anchor", 0), ("augmenter", 1)):
        model_of("llama", "bytes", seed, depth=2).save_pretrained(tmp_path / name)
        setup.tokens().save_pretrained(tmp_path / name)
    composed = compose(tmp_path / "anchor", tmp_path / "augmenter", [(-1, -1), (1, 1)], num_heads=4)
    setup.randomize(composed).save_pretrained(tmp_path / "composed")
    model = ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    trainer = dpo(model, tmp_path / "out")
    assert isinstance(trainer.ref_model, ComposedForCausalLM) and trainer.ref_model is not model
    _, logged = setup.step_of(trainer)
    assert logged["loss"] == pytest.approx(math.log(2), rel=1e-5)


@pytest.mark.integration(
    tool="TRL",
    what="a reference from the folder of a composition that has none: DPO, KTO, GRPO, RLOO",
    verdict="refused",
)
def test_a_composition_without_a_folder_is_no_reference(tmp_path: Path) -> None:
    told = r"Trainer: `ref_model` must be given, .* ref_model=calm_fast.hf.frozen_copy\(model\)"
    with pytest.raises(ValueError, match=f"DPO{told}"):
        dpo(setup.composition(), tmp_path)
    rows, tokens = setup.data(setup.GRADED), setup.tokens()
    with pytest.raises(ValueError, match=f"KTO{told}"):
        KTOTrainer(
            setup.composition(), None, setup.settings(KTOConfig, tmp_path), train_dataset=rows, processing_class=tokens
        )
    with pytest.raises(ValueError, match="GRPOTrainer: `model` must be loaded by from_pretrained"):
        grpo(setup.composition(), tmp_path, beta=0.1)
    with pytest.raises(ValueError, match="RLOOTrainer: `model` must be loaded by from_pretrained"):
        config = setup.settings(RLOOConfig, tmp_path, num_generations=2)
        RLOOTrainer(
            setup.composition(), reward, config, train_dataset=setup.data(setup.PROMPTS), processing_class=tokens
        )


@pytest.mark.integration(tool="TRL", what="a frozen_copy beside `peft_config`", verdict="refused")
def test_adapters_on_shared_parts_are_refused(tmp_path: Path) -> None:
    model = setup.composition()
    config = setup.settings(DPOConfig, tmp_path)
    with pytest.raises(ValueError, match="frozen_copy: `model` must be one whose parts never change"):
        DPOTrainer(
            model, frozen_copy(model), config, train_dataset=setup.data(setup.PAIRS), processing_class=setup.tokens(),
            peft_config=LoraConfig(target_modules=r"anchor\..*\.q_proj"),
        ).train()  # fmt: skip


@pytest.mark.integration(tool="TRL", what="KTOTrainer, references: frozen_copy, precomputed", verdict="works")
@pytest.mark.parametrize("name", ["frozen_copy", "precomputed"])
def test_kto_logs_the_log_probabilities_of_the_texts(name: str, tmp_path: Path) -> None:
    model = setup.composition()
    make, options = REFERENCES[name]
    with torch.no_grad():
        sums = [
            float(setup.log_probability(model, setup.ids_of(row["prompt"], end=False), setup.ids_of(row["completion"])))
            for row in setup.GRADED
            if row["label"]
        ]
    config = setup.settings(KTOConfig, tmp_path, **options)
    trainer = KTOTrainer(
        model, make(model), config, train_dataset=setup.data(setup.GRADED), processing_class=setup.tokens()
    )
    gradient, logged = setup.step_of(trainer)
    assert logged["logps/chosen"] == pytest.approx(sum(sums) / len(sums), rel=1e-5)
    assert logged["loss"] == pytest.approx(0.5, rel=1e-5) and float(gradient.abs().max()) > 0


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(text)) + text.count("e") for text in completions]


def grpo(model: Any, folder: Path, kind: Any = GRPOTrainer, **options: Any) -> Any:
    sizes = {"num_generations": 2, "max_completion_length": 5, "temperature": 0.7}
    config = setup.settings(GRPOConfig, folder, **(sizes | options))
    return kind(model, reward, config, train_dataset=setup.data(setup.PROMPTS), processing_class=setup.tokens())


def recipe() -> Any:
    """Return the class that the page shows."""
    text = PAGE.read_text(encoding="utf-8").split("class ComposedGRPOTrainer")[1]
    source = "class ComposedGRPOTrainer" + text.split("\n\n\n")[0]
    names: dict[str, Any] = {}
    exec("import torch\nfrom trl import GRPOTrainer\nfrom calm_fast.ops import linear_logprob\n" + source, names)
    return names["ComposedGRPOTrainer"]


@pytest.mark.integration(tool="TRL", what="GRPOTrainer, and with log-probabilities of linear_logprob", verdict="works")
def test_grpo_and_its_recipe_take_the_same_step(tmp_path: Path) -> None:
    steps = {}
    for kind in (GRPOTrainer, recipe()):
        model = setup.composition()
        trainer = grpo(model, tmp_path / kind.__name__, kind)
        steps[kind], logged = setup.step_of(trainer)
        ids = torch.tensor([setup.ids_of(row["prompt"] + row["completion"]) for row in setup.COMPLETIONS[:1]])
        with torch.no_grad():
            found, entropies, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), 6, compute_entropy=True
            )
            table = (model(ids, use_cache=False).logits[:, -7:-1] / 0.7).log_softmax(-1)
        setup.close(found, table.gather(2, ids[:, -6:, None])[..., 0])
        setup.close(entropies, -(table.exp() * table).sum(-1))
    one, two = steps.values()
    assert float(one.abs().max()) > 0
    setup.close(two, one)


@pytest.mark.integration(tool="TRL", what="GRPOTrainer, dual LoRA", verdict="works")
def test_grpo_trains_dual_lora(tmp_path: Path) -> None:
    gradient, _ = setup.step_of(grpo(dual_lora(), tmp_path))
    assert float(gradient.abs().max()) > 0


@pytest.mark.integration(
    tool="TRL", what="GKDTrainer (experimental), composition as student and as teacher", verdict="works"
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_gkd_is_the_divergence_of_the_plain_logits(role: str, tmp_path: Path) -> None:
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    single = model_of("llama", "bytes", 5, depth=2)
    student, teacher = (setup.composition(), single) if role == "student" else (single, setup.composition())
    talk = copy.deepcopy(setup.tokens())
    talk.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": p}, {"role": "assistant", "content": c}]} for p, c, _ in setup.PARTS
    ]
    config = setup.settings(GKDConfig, tmp_path, max_new_tokens=3, lmbda=0.0, beta=0.5, temperature=1.0)
    trainer = GKDTrainer(student, teacher, config, train_dataset=setup.data(rows), processing_class=talk)
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(student.train(), batch)
    kept = batch["labels"][:, 1:] != -100
    p, q = (
        model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        .logits[:, :-1][kept]
        .softmax(-1)
        for model in (student, teacher)
    )
    middle = ((p + q) / 2).log()
    expected = ((p * (p.log() - middle)).sum(1) + (q * (q.log() - middle)).sum(1)).sum() / 2 / kept.sum()
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    on_policy = setup.settings(GKDConfig, tmp_path, max_new_tokens=3, lmbda=1.0)
    setup.step_of(GKDTrainer(student, teacher, on_policy, train_dataset=setup.data(rows), processing_class=talk))


@pytest.mark.integration(tool="TRL", what="DistillationTrainer, composition as student and as teacher", verdict="works")
def test_distillation_from_an_equal_teacher_has_nothing_to_teach(tmp_path: Path) -> None:
    from trl import DistillationConfig, DistillationTrainer

    losses = []
    for teacher in (setup.composition(), model_of("llama", "bytes", 5, depth=2)):
        config = setup.settings(DistillationConfig, tmp_path, max_completion_length=4)
        rows = setup.data(setup.PROMPTS)
        run = DistillationTrainer(
            setup.composition(), teacher, config, train_dataset=rows, processing_class=setup.tokens()
        )
        losses.append(setup.step_of(run)[1]["loss"])
    assert losses[0] == pytest.approx(0, abs=1e-5) and losses[1] > 0.1
