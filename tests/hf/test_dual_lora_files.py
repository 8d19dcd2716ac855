"""Saved dual LoRA: what save_pretrained does, files of one save only, and a load that restores every detail."""

from __future__ import annotations

import copy
import io
import json
import warnings
from pathlib import Path

import pytest
import torch
from dual_models import IDS, TARGETS, gpt2, llama, logits, scatter
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainingArguments

from calm_fast import (
    ComposedForCausalLM,
    add_dual_lora,
    compose,
    load_dual_lora,
    remove_dual_lora,
    save_dual_lora,
    save_lora_adapter,
)
from calm_fast.hf.dual_lora import dual_lora_layers

REFUSED = r"save_pretrained: `model` must be one without dual LoRA, .*Call save_dual_lora\(model, "


def dual(**options):
    return scatter(add_dual_lora(llama(), TARGETS, **{"rank": 3, "gate_dim": 4, "value_dim": 4} | options))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.seam(
    attach="`save_pretrained`, `push_to_hub`", to="dual LoRA model", result="refused",
    why="`from_pretrained` would load random weights; call `save_dual_lora`, and `load_dual_lora` on the base",
)  # fmt: skip
@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, pickled], ids=["itself", "a copy", "torch.save"])
def test_save_pretrained_names_save_dual_lora(tmp_path: Path, through) -> None:
    model = through(dual())
    for part in (model, model.model):
        with pytest.raises(ValueError, match=REFUSED):
            part.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    save_dual_lora(model, tmp_path)
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path)), logits(dual()))
    remove_dual_lora(model).save_pretrained(tmp_path / "base")
    again = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(logits(again), logits(llama()))


@pytest.mark.seam(
    attach="`save_pretrained` of a model around the one that `add_dual_lora` was given", to="dual LoRA model",
    result="refused", why="call `save_dual_lora` for the whole model",
)  # fmt: skip
@pytest.mark.parametrize("through", [lambda m: m, copy.deepcopy, pickled], ids=["itself", "a copy", "torch.save"])
def test_a_model_around_one_with_dual_lora_is_not_saved_either(tmp_path: Path, through) -> None:
    outer = llama()
    scatter(add_dual_lora(outer.model, TARGETS))
    outer = through(outer)
    with pytest.raises(ValueError, match=REFUSED):
        outer.save_pretrained(tmp_path / "whole")
    assert not list((tmp_path / "whole").glob("*.safetensors"))
    save_dual_lora(outer, tmp_path / "dual")
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path / "dual")), logits(outer))
    remove_dual_lora(outer.model)
    outer.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(type(outer).from_pretrained(tmp_path / "base")), logits(llama()))


@pytest.mark.seam(
    attach="the stock Trainer's checkpoints and `save_model`", to="dual LoRA model", result="refused",
    why='use save_strategy="no" and save_dual_lora, or DualLoRATrainer, whose checkpoints hold the layers',
)  # fmt: skip
def test_the_stock_trainer_does_not_write_a_folder_that_reloads_as_another_model(tmp_path: Path) -> None:
    arguments = TrainingArguments(str(tmp_path / "t"), report_to=[], use_cpu=True, max_steps=1, save_steps=1)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}] * 2
    trainer = Trainer(dual(), arguments, train_dataset=rows)
    with pytest.raises(ValueError, match=REFUSED):
        trainer.train()
    with pytest.raises(ValueError, match=REFUSED):
        trainer.save_model(str(tmp_path / "t"))
    assert not list((tmp_path / "t").rglob("*.safetensors"))


def test_a_model_without_its_layers_saves_as_before(tmp_path: Path) -> None:
    model = dual()
    for path, layer in dual_lora_layers(model).items():
        outer, _, name = path.rpartition(".")
        setattr(model.get_submodule(outer), name, layer.base)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path)), logits(llama()))


def test_a_state_dict_goes_back_into_the_same_kind_of_model() -> None:
    model, other = dual(), add_dual_lora(llama(seed=3), TARGETS, rank=3, gate_dim=4, value_dim=4)
    other.load_state_dict(model.state_dict())
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj\.weight"):
        llama().load_state_dict(model.state_dict())


def test_loading_restores_dtype_mode_and_what_trains(tmp_path: Path) -> None:
    model = dual().to(torch.bfloat16)
    layers = dual_lora_layers(model)
    first, second, *_ = layers.values()
    first.set_mode("neg")
    second.gate_q.requires_grad_(False)
    second.lora_a_neg.data = second.lora_a_neg.data.double()
    save_dual_lora(model, tmp_path)
    loaded = load_dual_lora(llama().to(torch.bfloat16), tmp_path)
    for path, layer in dual_lora_layers(loaded).items():
        want = layers[path]
        assert layer.mode == want.mode and not layer.training
        for name, p in layer.named_parameters(recurse=False):
            own = want.get_parameter(name)
            assert (p.dtype, p.requires_grad) == (own.dtype, own.requires_grad) and torch.equal(p, own)
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".base." in n or "lm_head" in n)
    pos = load_dual_lora(llama().train(), tmp_path, mode="pos")
    assert all(layer.mode == "pos" and layer.training for layer in dual_lora_layers(pos).values())
    assert {n.rpartition(".")[2] for n, p in pos.named_parameters() if p.requires_grad} == {"lora_a_pos", "lora_b_pos"}


def test_layers_of_several_settings_load(tmp_path: Path) -> None:
    model = add_dual_lora(llama(), ("q_proj",), rank=3, gate_dim=4, value_dim=None)
    save_dual_lora(scatter(model), tmp_path / "q")
    config = json.loads((tmp_path / "q" / "dual_lora_config.json").read_text())
    assert {len(s["base_weight"]) for s in config["layers"].values()} == {8}
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path / "q")), logits(model))


def test_the_files_of_two_saves_never_load_together(tmp_path: Path) -> None:
    save_dual_lora(dual(), tmp_path / "a")
    save_dual_lora(dual(alpha=99.0), tmp_path / "b")
    weights = tmp_path / "b" / "dual_lora.safetensors"
    weights.write_bytes((tmp_path / "a" / "dual_lora.safetensors").read_bytes())
    load_dual_lora(llama(), tmp_path / "b")  # equal tensors, by their checksum
    tensors = {name: t + 1 for name, t in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(ValueError, match="^load_dual_lora: `folder` must be .*, got .* are of different saves"):
        load_dual_lora(llama(), tmp_path / "b")


@pytest.mark.parametrize("write", [save_dual_lora, lambda m, f: save_lora_adapter(m, f, "pos")], ids=["dual", "PEFT"])
@pytest.mark.parametrize("at", ["dual_lora_config.json", "dual_lora.safetensors"])
def test_a_save_that_dies_leaves_no_mixture(tmp_path: Path, monkeypatch, write, at) -> None:
    from calm_fast.core import files

    write(dual(), tmp_path)
    before = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    config, weights = sorted(before, key=lambda name: name.endswith("safetensors"))
    dies = weights if at.endswith("safetensors") else config
    replace = files.os.replace

    def dying(source, target) -> None:
        if Path(target).name == dies:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", dying)
    with pytest.raises(KeyboardInterrupt):
        write(dual(rank=2, alpha=99.0), tmp_path)
    after = {f.name: f.read_bytes() for f in tmp_path.iterdir()}
    assert weights not in after and set(after) <= {config}


def test_errors_name_the_file_and_the_tensor(tmp_path: Path) -> None:
    save_dual_lora(dual(), tmp_path)
    config_file, weights = tmp_path / "dual_lora_config.json", tmp_path / "dual_lora.safetensors"
    text, tensors = config_file.read_text(), load_file(weights)
    content = json.loads(text)
    del content["tensors_sha256"]
    config_file.write_text(json.dumps(content))
    key = "model.layers.0.self_attn.q_proj.gate_q"

    def load_with(message: str, **changed: torch.Tensor) -> None:
        save_file({k: t for k, t in (tensors | changed).items() if t.numel()}, weights)
        with pytest.raises(ValueError, match=f"^load_dual_lora: `folder` must be a folder .*, got .*{message}"):
            load_dual_lora(llama(), tmp_path)

    load_with(f"without {key}", **{key: torch.zeros(0)})
    load_with("with the unknown x", x=torch.zeros(1))
    load_with(rf"with {key} of shape \(4, 31\) instead of \(4, 32\)", **{key: torch.zeros(4, 31)})
    weights.write_bytes(b"\0" * 20)
    with pytest.raises(ValueError, match="^load_dual_lora: `folder` must be .*, which is damaged"):
        load_dual_lora(llama(), tmp_path)
    config_file.write_text(text[:-30])
    with pytest.raises(ValueError, match="^load_dual_lora: `folder` must be .*, which is not JSON"):
        load_dual_lora(llama(), tmp_path)


def test_another_base_is_refused_by_shape_and_noticed_by_weights(tmp_path: Path) -> None:
    save_dual_lora(dual(), tmp_path)
    with pytest.raises(ValueError, match=r"^load_dual_lora: `model` must be .*q_proj has \(d_in, d_out\) \(16, 16\)"):
        load_dual_lora(llama(hidden_size=16), tmp_path)
    with pytest.raises(ValueError, match="^load_dual_lora: `model` must be .*, got one without model.layers"):
        load_dual_lora(gpt2(), tmp_path)
    with pytest.raises(ValueError, match="^load_dual_lora: `model` must be without dual LoRA"):
        load_dual_lora(dual(), tmp_path)
    with pytest.raises(ValueError, match="^load_dual_lora: `mode` must be one of 'neg', 'pos', 'mix', got 'both'"):
        load_dual_lora(llama(), tmp_path, mode="both")
    with pytest.warns(UserWarning, match=r"`model` are not those of the base .* \(4 of 4 layers\)"):
        load_dual_lora(llama(seed=5), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in (torch.float16, torch.bfloat16, torch.float64):
            load_dual_lora(llama().to(dtype), tmp_path)


def test_files_of_the_first_format_still_load(tmp_path: Path) -> None:
    model = dual(rank_neg=2)
    save_dual_lora(model, tmp_path)
    file = tmp_path / "dual_lora_config.json"
    config = json.loads(file.read_text())
    old = ("rank", "alpha", "rank_neg", "alpha_neg", "gate_dim", "value_dim", "variant", "dropout")
    layers = {path: {name: saved[name] for name in old} for path, saved in config["layers"].items()}
    file.write_text(json.dumps({"format_version": 1, "mode": "mix", "layers": layers}))
    assert torch.equal(logits(load_dual_lora(llama(), tmp_path)), logits(model))


def test_folders_that_are_no_paths_are_named() -> None:
    for call, where in (
        (lambda: save_dual_lora(dual(), None), "save_dual_lora"),
        (lambda: save_lora_adapter(dual(), None, "pos"), "save_lora_adapter"),
        (lambda: load_dual_lora(llama(), 3), "load_dual_lora"),
    ):
        with pytest.raises(TypeError, match=f"^{where}: `folder` must be the path of a folder, got"):
            call()


@pytest.mark.seam(
    attach="dual LoRA in the anchor of a composition", to="composition", result="works",
    why="save with `save_pretrained(check_parts=False)` and `save_dual_lora`; to load, pass the anchor with its layers",
)  # fmt: skip
def test_dual_lora_in_a_composition_is_saved_beside_it(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "anchor")
    llama(seed=1).save_pretrained(tmp_path / "augmenter")
    model = compose(str(tmp_path / "anchor"), str(tmp_path / "augmenter"), "uniform:1")
    scatter(add_dual_lora(model, r"anchor\..*q_proj", rank=3))
    with pytest.raises(ValueError, match="^save_pretrained: `anchor` must be as it can be loaded"):
        model.save_pretrained(tmp_path / "composed")
    with pytest.raises(ValueError, match=REFUSED):
        model.anchor.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "composed", check_parts=False)
    save_dual_lora(model.anchor, tmp_path / "dual")
    with pytest.raises(ValueError, match="^from_pretrained: `anchor` must be"):
        ComposedForCausalLM.from_pretrained(tmp_path / "composed")
    anchor = load_dual_lora(llama(), tmp_path / "dual")
    assert torch.equal(logits(ComposedForCausalLM.from_pretrained(tmp_path / "composed", anchor=anchor)), logits(model))
