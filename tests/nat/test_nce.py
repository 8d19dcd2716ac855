"""NCETrainer: the tokens it counts, what Trainer's arguments do to it, and what is refused before the first stage."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertLMHeadModel, LlamaForCausalLM

from calm_fast import nat
from calm_fast.hf.dual_lora import add_dual_lora, dual_lora_layers
from calm_fast.nat import stages
from calm_fast.nat.data import RationaleDataset, RightPadding, split_rationales
from calm_fast.nat.trainer import DualTeacher, NCETrainer

SETTINGS = nat.Settings(steps=2, batch_size=2, warmup=0, rank=2, gate_dim=4, value_dim=4, save_every=0, progress=False)


@pytest.fixture
def pair(tiny) -> tuple[Any, Any, RationaleDataset, RightPadding]:
    """(teacher, student, right rationales, collator); the teacher's layers are far from zero."""
    make, tok, rows = tiny
    teacher = add_dual_lora(make(), SETTINGS.target_modules, rank=2, gate_dim=4, value_dim=4)
    torch.manual_seed(4)
    for layer in dual_lora_layers(teacher).values():
        for p in layer.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.3)
    right, _ = split_rationales(rows, progress=False)
    longer = [nat.Example(e.question * (1 + i % 3), e.rationale * (1 + i % 2)) for i, e in enumerate(right)]
    return teacher, stages._student(teacher, SETTINGS), RationaleDataset(longer, tok), RightPadding(tok.pad_token_id)


def trainer(pair: Any, out: Any, arguments: dict[str, Any] | None = None, **options: Any) -> NCETrainer:
    teacher, student, data, collate = pair
    args = dataclasses.replace(SETTINGS.arguments(out), use_cpu=True, **arguments or {})
    options = {"teachers": DualTeacher(teacher), "train_dataset": data, "eval_dataset": data} | options
    return NCETrainer(model=student, args=args, data_collator=collate, **options)


def all_logits(pair: Any, batch: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Logits of student, NAT teacher and negative teacher."""
    teacher, student, _, _ = pair
    found = [student(**batch).logits]
    for mode in ("mix", "neg"):
        for layer in dual_lora_layers(teacher).values():
            layer.set_mode(mode)
        found.append(teacher(**batch).logits.detach())
    return found


def released(pair: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The released distill_NCE.py and dataset.py, line by line: every token is a label, the prompt's too.

    Left out: their rows are padded to the longest of all data, and padding is a label of the cross-entropy too; and
    they add 10 ** (-7) to every probability.
    """
    labels, attention_mask = batch["input_ids"], batch["attention_mask"]
    student, pos, neg = all_logits(pair, {"input_ids": labels, "attention_mask": attention_mask})
    shifted = labels[:, 1:].masked_fill(attention_mask[:, 1:] == 0, -100)
    loss_ce = F.cross_entropy(student[:, :-1].flatten(0, 1), shifted.flatten())
    pred = F.log_softmax(student, dim=-1)
    pos_log_outputs = F.log_softmax(pos, dim=-1)
    pos_outputs = F.softmax(pos, dim=-1)
    neg_outputs = F.softmax(neg, dim=-1)
    divergence = F.kl_div(pos_log_outputs, neg_outputs, reduction="none") * attention_mask.unsqueeze(-1)
    beta = torch.tanh(divergence.sum(-1).sum(-1) / attention_mask.sum(-1))
    loss_kd = -pred * pos_outputs * (0.5 + beta.unsqueeze(-1).unsqueeze(-1))
    loss_kd = (loss_kd * attention_mask.unsqueeze(-1)).sum() / attention_mask.sum()
    return 0.5 * loss_ce + 0.5 * loss_kd


def gradients(student: LlamaForCausalLM, loss: torch.Tensor) -> torch.Tensor:
    student.zero_grad()
    loss.backward()
    return torch.cat([layer.lora_b_pos.grad.flatten() for layer in dual_lora_layers(student).values()])


def test_released_masking_is_the_released_loss(pair, tmp_path) -> None:
    _, student, data, collate = pair
    batch = collate(data.items[:5])
    assert not batch["attention_mask"].all()
    want = released(pair, batch)
    slope = gradients(student, want)
    got = trainer(pair, tmp_path, masking="released").compute_loss(student, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients(student, got), slope, rtol=1e-3, atol=1e-5 * float(slope.abs().max()))
    paper = trainer(pair, tmp_path).compute_loss(student, batch)
    assert abs(float(paper) - float(want)) > 0.01


@pytest.mark.parametrize("masking", ["paper", "released"])
@pytest.mark.seam(
    attach="Trainer: `gradient_accumulation_steps`, with NCE",
    to="NAT",
    result="works",
    why="small batches accumulate to the step of the large batch; tokens are weighed, not batches",
)
def test_accumulated_batches_are_one_large_batch(masking, pair, tmp_path) -> None:
    _, student, data, _ = pair
    steps = {}
    for size, count in ((8, 1), (2, 4), (3, 3)):  # the last batch of three is smaller
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count, "max_steps": 1}
        subset = torch.utils.data.Subset(data, range(8))
        run = trainer(pair, tmp_path, sizes | {"max_grad_norm": 0.0}, masking=masking, train_dataset=subset)
        slopes: list[torch.Tensor] = []

        def keep(*args: Any, slopes=slopes, **kwargs: Any) -> None:
            slopes.append(torch.cat([m.lora_b_pos.grad.flatten() for m in dual_lora_layers(student).values()]))

        start = [p.detach().clone() for p in student.parameters()]
        run.create_optimizer()
        handle = run.optimizer.register_step_pre_hook(keep)
        logged = run.train().training_loss
        handle.remove()
        with torch.no_grad():
            for p, old in zip(student.parameters(), start, strict=True):
                p.copy_(old)
        steps[size] = (logged, slopes[0])
    for size in (2, 3):
        assert steps[size][0] == pytest.approx(steps[8][0], rel=1e-5)
        torch.testing.assert_close(steps[size][1], steps[8][1], rtol=1e-3, atol=1e-6)


@pytest.mark.seam(
    attach="Trainer: `bf16`, with NCE", to="NAT", result="works", why="student and teachers run under autocast"
)
def test_precision_flags_reach_student_and_teachers(pair, tmp_path) -> None:
    _, student, data, collate = pair
    batch = collate(data.items[:4])
    plain = trainer(pair, tmp_path)
    exact = plain.compute_loss(student, batch).item()
    with torch.autocast("cpu", torch.bfloat16):
        want = plain.compute_loss(student, batch).item()
    got = float(trainer(pair, tmp_path, {"bf16": True}).compute_loss(student, batch))
    assert got != exact and got == pytest.approx(want, rel=2e-2) and got == pytest.approx(exact, rel=5e-2)


def test_evaluate_returns_the_loss(pair, tmp_path) -> None:
    _, student, data, collate = pair
    subset = torch.utils.data.Subset(data, range(6))
    run = trainer(pair, tmp_path, {"per_device_eval_batch_size": 6}, eval_dataset=subset)
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(float(run.compute_loss(student, collate(data.items[:6]))), rel=1e-6)


@pytest.mark.seam(
    attach="Trainer: `label_smoothing_factor`, `compute_loss_func`, with NCE",
    to="NAT",
    result="refused",
    why="the NCE loss has soft targets of its own, and is the loss; leave them out",
)
def test_arguments_that_the_loss_would_ignore_are_refused(pair, tmp_path) -> None:
    with pytest.raises(ValueError, match="NCETrainer: `args` must have label_smoothing_factor=0, got 0.1"):
        trainer(pair, tmp_path, {"label_smoothing_factor": 0.1})
    with pytest.raises(ValueError, match="NCETrainer: `compute_loss_func` must be None"):
        trainer(pair, tmp_path, compute_loss_func=lambda *args, **kwargs: 0)
    with pytest.raises(ValueError, match="NCETrainer: `masking` must be 'paper' or 'released', got 'x'"):
        trainer(pair, tmp_path, masking="x")


@pytest.mark.seam(
    attach="packed rows (`position_ids`), with NCE",
    to="NAT",
    result="refused",
    why="the KL divergence is averaged over each row, which must be one sequence; do not pack",
)
def test_other_inputs_of_the_model_are_refused(pair, tmp_path) -> None:
    _, student, data, collate = pair
    batch = collate(data.items[:2])
    batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    with pytest.raises(ValueError, match="NCETrainer: `inputs` must be .*, got .*position_ids; packed rows"):
        trainer(pair, tmp_path).compute_loss(student, batch)


@pytest.mark.seam(
    attach="several processes (DDP, FSDP, DeepSpeed), with NCE",
    to="NAT",
    result="refused",
    why="the gradients would not be averaged; use one process",
)
def test_several_processes_are_refused(pair, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(stages.TrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="NCETrainer: `args` must be those of one process, got 2 processes"):
        trainer(pair, tmp_path)


def test_a_head_that_trains_is_refused(pair, tmp_path) -> None:
    _, student, _, _ = pair
    student.get_output_embeddings().weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"NCETrainer: `model` must have a frozen LM head.*requires_grad_\(False\)"):
        trainer(pair, tmp_path)


# ---- before the first stage -----------------------------------------------------------------------------------------


@pytest.fixture
def untrained(monkeypatch) -> None:
    """A stage that begins is a failure."""
    for stage in ("train_negative", "train_nat", "distil_nce"):
        monkeypatch.setattr(f"calm_fast.nat.pipeline.{stage}", lambda *args, **kwargs: pytest.fail("a stage was begun"))


def bert(tokens: int, folder: Any, **flags: Any) -> Any:
    """A decoder whose head transforms the states before its linear layer."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    model = BertLMHeadModel(BertConfig(vocab_size=tokens, **sizes, initializer_range=0.2, **flags))
    model.save_pretrained(folder)
    return model


@pytest.mark.seam(
    attach="a model whose LM head is more than a linear layer, a factor and a cap",
    to="NAT",
    result="refused",
    why="before the first stage; `nat.plain_lora` can train it",
)
def test_heads_that_nce_cannot_use_are_refused_before_the_first_stage(tiny, rows_file, tmp_path, untrained) -> None:
    _, tok, _ = tiny
    model = bert(len(tok), tmp_path / "model", is_decoder=True)
    tok.save_pretrained(tmp_path / "model")
    settings = dataclasses.replace(SETTINGS, target_modules=("query", "value"))
    with pytest.raises(ValueError, match="^nat: `model` must give its base_model's output .* got BertLMHeadModel"):
        nat.run(rows_file, tmp_path / "model", tmp_path / "out", settings)
    with pytest.raises(ValueError, match="^distil_nce: `teacher` must give its base_model's output"):
        data = RationaleDataset([nat.Example("1+1?", "2")], tok)
        stages.distil_nce(add_dual_lora(model, ("query",), rank=1, gate_dim=1), data, 0, tmp_path / "nce", settings)
    bert(len(tok), tmp_path / "model")
    with pytest.raises(ValueError, match="^nat: `model` must be a causal language model, got BertLMHeadModel"):
        nat.run(rows_file, tmp_path / "model", tmp_path / "out2", settings)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (("q_proj", "lm_head"), "layers below the LM head, .*lm_head.*leave it out"),
        (("query",), "names of linear layers, got .*match no module"),
        (("self_attn",), "names of linear layers, got model.layers.0.self_attn"),
    ],
)
def test_targets_are_checked_before_the_first_stage(
    targets, message, model_folder, rows_file, tmp_path, untrained
) -> None:
    settings = dataclasses.replace(SETTINGS, target_modules=targets)
    with pytest.raises(ValueError, match=f"^nat: `target_modules` must be {message}"):
        nat.run(rows_file, model_folder, tmp_path / "out", settings)


def test_the_head_of_a_teacher_may_not_be_a_target(tiny, tmp_path) -> None:
    make, tok, _ = tiny
    teacher = add_dual_lora(make(), ("lm_head", "q_proj"), rank=1, gate_dim=1)
    data = RationaleDataset([nat.Example("1+1?", "2")], tok)
    with pytest.raises(ValueError, match="^distil_nce: `teacher` must have an LM head without dual LoRA"):
        stages.distil_nce(teacher, data, 0, tmp_path, SETTINGS)
