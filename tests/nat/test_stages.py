"""Each stage trains its own part of a tiny model, and resumes after an interruption."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from calm_fast import nat
from calm_fast._ops.linear_nce.reference import linear_nce_reference
from calm_fast.consistency.sampling.head import LinearHead
from calm_fast.hf.dual_lora import add_dual_lora, dual_lora_layers
from calm_fast.hf.dual_lora_files import save_lora_adapter
from calm_fast.nat import stages
from calm_fast.nat.data import IGNORE, RationaleDataset, RightPadding, split_rationales
from calm_fast.nat.trainer import DualTeacher, NCETrainer, find_nce_head, hidden_states

FAST = nat.Settings(
    steps=12, batch_size=4, learning_rate=5e-3, warmup=2, rank=2, gate_dim=4, value_dim=4, save_every=5, progress=False
)


@pytest.fixture
def datasets(tiny):
    _, tok, rows = tiny
    return [RationaleDataset(side, tok) for side in split_rationales(rows, progress=False)]


def _frozen(model) -> dict[str, torch.Tensor]:
    own = {f"{path}.{n}" for path, layer in dual_lora_layers(model).items()
           for n, _ in layer.named_parameters(recurse=False)}  # fmt: skip
    return {n.replace(".base.", "."): p.detach().clone() for n, p in model.named_parameters() if n not in own}


def _same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_each_stage_trains_its_part_and_nothing_else(tiny, datasets, tmp_path) -> None:
    make, tok, _ = tiny
    right, wrong = datasets
    base = _frozen(make())

    negative = make()
    losses = stages.train_negative(negative, wrong, tok.pad_token_id, tmp_path / "1", FAST)
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert _same(_frozen(negative), base)
    stages_adapter = tmp_path / "negative"
    save_lora_adapter(negative, stages_adapter, "neg")
    trained_neg = {p: layer.lora_b_neg.detach().clone() for p, layer in dual_lora_layers(negative).items()}
    assert all(b.abs().max() > 0 for b in trained_neg.values())

    teacher = make()
    losses = stages.train_nat(teacher, right, stages_adapter, tok.pad_token_id, tmp_path / "2", FAST)
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert _same(_frozen(teacher), base)
    for path, layer in dual_lora_layers(teacher).items():
        assert torch.equal(layer.lora_b_neg, trained_neg[path])  # the negative LoRA stays frozen
        assert layer.value_up.abs().max() > 0  # integration was trained

    before = {n: p.detach().clone() for n, p in teacher.named_parameters()}
    student, losses = stages.distil_nce(teacher, right, tok.pad_token_id, tmp_path / "3", FAST)
    assert losses[-1]["loss"] < losses[0]["loss"]
    assert _same({n: p.detach() for n, p in teacher.named_parameters()}, before)
    assert all(layer.mode == "pos" and layer.lora_b_pos.abs().max() > 0 for layer in dual_lora_layers(student).values())
    head, teachers_head = (m.get_output_embeddings().weight for m in (student, teacher))
    assert head is teachers_head  # the frozen base is shared


def test_the_teacher_goes_where_the_student_trains(tiny, datasets, tmp_path, monkeypatch) -> None:
    make, tok, _ = tiny
    teacher = add_dual_lora(make(), FAST.target_modules, rank=2, gate_dim=4, value_dim=4)
    monkeypatch.setattr(stages.TrainingArguments, "device", torch.device("meta"))  # as on a machine with a GPU
    monkeypatch.setattr(stages, "_fit", lambda *args, **kwargs: [])
    student, _ = stages.distil_nce(teacher, datasets[0], tok.pad_token_id, tmp_path, FAST)
    for model in (teacher, student):
        assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}


def test_the_nce_loss_is_the_definition_on_the_models_logits(tiny, datasets, tmp_path) -> None:
    make, tok, _ = tiny
    right, _ = datasets
    teacher = add_dual_lora(make(), FAST.target_modules, rank=2, gate_dim=4, value_dim=4)
    torch.manual_seed(4)
    for layer in dual_lora_layers(teacher).values():
        for p in layer.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.3)
    student = stages._student(teacher, FAST)
    batch = RightPadding(tok.pad_token_id)(right.items[:5])
    options = {"alpha": 0.3, "temperature": 2.0, "offset": 0.7}
    trainer = NCETrainer(
        model=student, args=FAST.arguments(tmp_path), train_dataset=right, teachers=DualTeacher(teacher), **options
    )
    got = trainer.compute_loss(student, batch)

    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        streams = {"student": hidden_states(student, ids, mask)}
        for mode in ("mix", "neg"):
            for layer in dual_lora_layers(teacher).values():
                layer.set_mode(mode)
            streams[mode] = hidden_states(teacher, ids, mask)
    flat = [streams[k][:, :-1].reshape(-1, 32).double() for k in ("student", "mix", "neg")]
    targets = batch["labels"][:, 1:].reshape(-1)
    seq_ids = torch.arange(5).repeat_interleave(ids.shape[1] - 1)
    head = student.get_output_embeddings().weight.double()
    want = linear_nce_reference(*flat, head, targets, seq_ids, *options.values(), None, None, IGNORE)
    torch.testing.assert_close(got.double(), want, rtol=2e-5, atol=2e-5)
    got.backward()
    assert all(layer.lora_a_pos.grad is not None for layer in dual_lora_layers(student).values())


def test_the_constants_of_the_loss_are_those_of_the_settings(tiny, datasets, tmp_path, monkeypatch) -> None:
    make, tok, _ = tiny
    teacher = add_dual_lora(make(), FAST.target_modules, rank=2, gate_dim=4, value_dim=4)
    seen, own = [], NCETrainer.compute_loss

    def noted(self, *args, **kwargs):
        seen.append((self.options, self.teachers.model is teacher))
        return own(self, *args, **kwargs)

    monkeypatch.setattr(NCETrainer, "compute_loss", noted)
    settings = dataclasses.replace(FAST, steps=1, warmup=0, nce_alpha=0.25, nce_temperature=3.0, nce_offset=0.75)
    stages.distil_nce(teacher, datasets[0], tok.pad_token_id, tmp_path, settings)
    assert seen == [({"alpha": 0.25, "temperature": 3.0, "offset": 0.75}, True)]


def test_teachers_are_read_without_dropout_and_keep_their_mode(tiny, datasets) -> None:
    make, tok, _ = tiny
    teacher = add_dual_lora(make(), FAST.target_modules, rank=2, gate_dim=4, value_dim=4, dropout=0.5)
    for layer in dual_lora_layers(teacher).values():
        for p in layer.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.3)
    batch = RightPadding(tok.pad_token_id)(datasets[0].items[:3])
    teacher.train()
    first, second = (DualTeacher(teacher)(batch["input_ids"], batch["attention_mask"]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and teacher.training


def test_an_interrupted_stage_resumes_to_the_same_weights(tiny, datasets, tmp_path, monkeypatch) -> None:
    make, tok, _ = tiny
    _, wrong = datasets

    def weights(model):
        return {n: p.detach().clone() for n, p in model.named_parameters() if "_neg" in n}

    whole = make()
    stages.train_negative(whole, wrong, tok.pad_token_id, tmp_path / "whole", FAST)

    original, calls = stages.DualLoRATrainer.training_step, []

    def dies(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(stages.DualLoRATrainer, "training_step", dies)
    with pytest.raises(KeyboardInterrupt):
        stages.train_negative(make(), wrong, tok.pad_token_id, tmp_path / "cut", FAST)
    monkeypatch.setattr(stages.DualLoRATrainer, "training_step", original)
    saved = load_file(tmp_path / "cut" / "checkpoint-5" / "dual_lora.safetensors")
    assert saved and all(".base." not in name and "embed" not in name for name in saved)
    resumed = make()
    stages.train_negative(resumed, wrong, tok.pad_token_id, tmp_path / "cut", FAST)
    assert _same(weights(resumed), weights(whole))


def test_run_does_all_stages_and_repeats_none(model_folder, rows_file, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr("calm_fast.nat.pipeline.train_nat", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        nat.run(rows_file, model_folder, out, FAST)
    monkeypatch.undo()
    first = (out / "negative" / "adapter_model.safetensors").stat().st_mtime_ns
    shown = dataclasses.replace(FAST, save_every=0)  # how it is saved does not make it another run
    results = nat.run(rows_file, model_folder, out, shown)
    assert (out / "negative" / "adapter_model.safetensors").stat().st_mtime_ns == first
    assert set(results["losses"]) == {"negative", "nat", "student"}
    assert results["examples"] == {"right": 24, "wrong": 24}
    assert len(results["gates"]) == 4 and all(0 < g["mean"] < 1 for g in results["gates"].values())
    assert json.loads((out / "results.json").read_text()) == results
    for file in ("negative/adapter_config.json", "nat/dual_lora.safetensors", "student/adapter_model.safetensors"):
        assert (out / file).is_file()
    again = tmp_path / "again"
    assert nat.run(rows_file, model_folder, again, FAST)["losses"] == results["losses"]
    for file in (
        "negative/adapter_model.safetensors",
        "nat/dual_lora.safetensors",
        "student/adapter_model.safetensors",
    ):
        assert _same(load_file(out / file), load_file(again / file)), file


def test_run_refuses_another_runs_folder_and_one_sided_data(model_folder, rows_file, tmp_path) -> None:
    out = tmp_path / "out"
    one_sided = tmp_path / "right.jsonl"
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    one_sided.write_text("".join(json.dumps(r | {"generated_answer": r["generated_answer"][:1]}) + "\n" for r in rows))
    with pytest.raises(ValueError, match="must hold right and wrong rationales, .* got no wrong one"):
        nat.run(one_sided, model_folder, out, FAST)
    results = json.loads((out / "results.json").read_text())
    results["losses"]["negative"] = [{"step": 1, "loss": 1.0}]  # as if a stage had been trained there
    (out / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="`out` must be .* holds a run with other settings, data"):
        nat.run(rows_file, model_folder, out, dataclasses.replace(FAST, seed=1))


def family(name, vocabulary):
    """A tiny model of a family whose logits are not the plain product of its head, and its teachers."""
    common = {
        "vocab_size": vocabulary, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 1,
    }  # fmt: skip
    kind, own = {
        "granite": ("Granite", {"logits_scaling": 0.3}),
        "cohere": ("Cohere", {"logit_scale": 0.7}),
        "gemma2": ("Gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
    }[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**common, **own)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def test_nce_takes_states_of_another_dtype_than_the_head() -> None:
    """Some families, Mamba for one, end in float32 states under a head in 16 bits, and score_sequences takes them."""
    torch.manual_seed(0)
    head = LinearHead(torch.nn.Linear(8, 12, bias=False).bfloat16(), 0.5, None)
    states, targets, seq_ids = torch.randn(3, 6, 8), torch.arange(6), torch.zeros(6, dtype=torch.int64)
    loss = head.nce(*states, targets, seq_ids)
    assert torch.equal(loss, head.nce(*states.bfloat16(), targets, seq_ids))


@pytest.mark.parametrize("name", ["granite", "cohere", "gemma2"])
def test_nce_takes_heads_with_a_factor_or_a_cap(name, tiny, datasets, tmp_path) -> None:
    """The loss, and the student's gradients, are those of the definition on the models' own logits."""
    _, tok, _ = tiny
    teacher = add_dual_lora(family(name, len(tok)), FAST.target_modules, rank=2, gate_dim=4, value_dim=4)
    torch.manual_seed(4)
    for layer in dual_lora_layers(teacher).values():
        for p in layer.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.3)
    student = stages._student(teacher, FAST)
    batch = RightPadding(tok.pad_token_id)(datasets[0].items[:3])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    options = {"alpha": 0.3, "temperature": 2.0, "offset": 0.7}
    trainer = NCETrainer(
        model=student,
        args=FAST.arguments(tmp_path),
        train_dataset=datasets[0],
        teachers=DualTeacher(teacher),
        **options,
    )
    trainer.compute_loss(student, batch).backward()
    got = [layer.lora_b_pos.grad.clone() for layer in dual_lora_layers(student).values()]
    student.zero_grad()

    def logits(model):
        return model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].flatten(0, 1).double()

    streams = {"student": logits(student)}
    for mode in ("mix", "neg"):
        for layer in dual_lora_layers(teacher).values():
            layer.set_mode(mode)
        streams[mode] = logits(teacher).detach()
    seq_ids = torch.arange(3).repeat_interleave(ids.shape[1] - 1)
    plain = torch.eye(len(tok), dtype=torch.float64)  # logits are their own hidden states under this head
    want = linear_nce_reference(
        *streams.values(), plain, batch["labels"][:, 1:].flatten(), seq_ids, *options.values(), None, None, IGNORE
    )
    torch.testing.assert_close(trainer.compute_loss(student, batch).double(), want, rtol=2e-5, atol=2e-5)
    want.backward()
    for grad, layer in zip(got, dual_lora_layers(student).values(), strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, layer.lora_b_pos.grad, rtol=1e-3, atol=1e-5 * float(grad.abs().max()))


def test_a_head_whose_factor_the_config_does_not_name_is_refused(tiny) -> None:
    make, _, _ = tiny
    model = make()
    forward = model.forward

    def scaled(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        outputs.logits = outputs.logits * 3
        return outputs

    model.forward = scaled
    with pytest.raises(ValueError, match="NCETrainer: `model` must have an LM head .* got LlamaForCausalLM"):
        find_nce_head(model)


def test_states_that_change_before_the_head_are_refused(tiny) -> None:
    make, _, _ = tiny
    model = make().train()
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: (args[0] / 2,))
    with pytest.raises(ValueError, match="`model` must give its base_model's output to its LM head as it is"):
        find_nce_head(model)
    assert model.training
