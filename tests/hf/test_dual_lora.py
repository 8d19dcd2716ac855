"""Dual LoRA on transformers models: reversible, adapters exchanged with PEFT both ways, saved and loaded."""

from __future__ import annotations

import inspect
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaModel

from calm_fast.hf import dual_lora as dl
from calm_fast.hf import dual_lora_files as files
from calm_fast.modules.dual_lora import DualLoRALinear

TARGETS = ("q_proj", "v_proj")
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(0))


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4)).eval()


def _logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def _logits_or_states(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


def _scatter(model: torch.nn.Module) -> None:
    """Move every dual LoRA parameter away from its initial value."""
    torch.manual_seed(1)
    for layer in dl.dual_lora_layers(model).values():
        for p in layer.parameters(recurse=False):
            torch.nn.init.normal_(p, std=0.2)


def _peft_adapter(tmp_path, model, **config) -> tuple[str, torch.Tensor]:
    """A random PEFT adapter on disk, and the logits PEFT computes with it."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | config
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**options)).eval()
    torch.manual_seed(2)
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.2)
    wrapped.save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter"), _logits(wrapped)


@pytest.mark.parametrize(("make", "targets"), [(_llama, TARGETS), (_gpt2, ("c_attn", "c_fc"))])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_add_changes_nothing_and_remove_restores_everything(make, targets, variant) -> None:
    model = make()
    model.get_parameter(next(n for n, _ in model.named_parameters())).requires_grad_(False)
    before, flags = _logits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    dl.add_dual_lora(model, targets, rank=3, variant=variant)
    assert torch.equal(_logits(model), before)
    trains = {f"{path}.{n}" for path, layer in dl.dual_lora_layers(model).items()
              for n, _ in layer.named_parameters(recurse=False) if not n.endswith("_neg")}  # fmt: skip
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trains
    _scatter(model)
    assert not torch.equal(_logits(model), before)
    dl.remove_dual_lora(model)
    assert torch.equal(_logits(model), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"layers.1.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.parametrize("side", ["negative", "positive"])
def test_a_peft_adapter_computes_the_same_here(tmp_path, config, side) -> None:
    folder, want = _peft_adapter(tmp_path, _llama(), **config)
    mode = side[:3]
    model = dl.add_dual_lora(_llama(), TARGETS, rank=5, mode=mode, **{side: folder})
    # float32, other association order of the same products
    torch.testing.assert_close(_logits(model), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "targets"), [(_llama, TARGETS), (_gpt2, ("c_attn",))])
@pytest.mark.parametrize("side", ["neg", "pos"])
def test_an_adapter_written_here_computes_the_same_in_peft(tmp_path, make, targets, side) -> None:
    model = dl.add_dual_lora(make(), targets, rank=3, alpha=7.0, mode=side)
    _scatter(model)
    want = _logits(model)
    files.save_lora_adapter(model, tmp_path / "a", side, base_model="tiny")
    loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "a")).eval()
    torch.testing.assert_close(_logits(loaded), want, rtol=1e-5, atol=1e-5)
    again = dl.add_dual_lora(make(), targets, mode="neg", negative=tmp_path / "a")
    torch.testing.assert_close(_logits(again), want, rtol=1e-5, atol=1e-5)


def test_layers_of_different_rank_survive_peft(tmp_path) -> None:
    folder, want = _peft_adapter(tmp_path, _llama(), rank_pattern={"layers.1.self_attn.q_proj": 2})
    model = dl.add_dual_lora(_llama(), TARGETS, negative=folder, mode="neg")
    files.save_lora_adapter(model, tmp_path / "b", "neg")
    loaded = peft.PeftModel.from_pretrained(_llama(), str(tmp_path / "b")).eval()
    torch.testing.assert_close(_logits(loaded), want, rtol=1e-5, atol=1e-5)
    files.save_dual_lora(model, tmp_path / "c")
    torch.testing.assert_close(_logits(files.load_dual_lora(_llama(), tmp_path / "c")), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("make", "targets"), [(_llama, TARGETS), (_gpt2, ("c_attn",))])
def test_saved_layers_load_bit_equal(tmp_path, make, targets) -> None:
    model = dl.add_dual_lora(make(), targets, rank=3, rank_neg=2, variant="released", value_dim=8, gate_dim=4)
    _scatter(model)
    files.save_dual_lora(model, tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["dual_lora.safetensors", "dual_lora_config.json"]
    loaded = files.load_dual_lora(make(), tmp_path)
    assert torch.equal(_logits(loaded), _logits(model))


def test_peft_names_give_the_same_layers_as_ours() -> None:
    ours = dl.add_dual_lora(_llama(), TARGETS, rank=3, alpha=7.0, dropout=0.25)
    theirs = dl.add_dual_lora(_llama(), TARGETS, r=3, lora_alpha=7.0, lora_dropout=0.25)
    layers = dl.dual_lora_layers(theirs)
    assert repr(layers) == repr(dl.dual_lora_layers(ours))
    for layer in layers.values():
        assert (layer.rank, layer.rank_neg, layer.alpha, layer.alpha_neg, layer.dropout) == (3, 3, 7.0, 7.0, 0.25)
    defaults = next(iter(dl.dual_lora_layers(dl.add_dual_lora(_llama())).values()))
    assert (defaults.rank, defaults.alpha, defaults.dropout) == (8, 16.0, 0.0)


def test_lora_dropout_drops_what_peft_drops(tmp_path) -> None:
    """While training, both packages drop the same elements of the LoRA's input."""
    options = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.5}
    folder, _ = _peft_adapter(tmp_path, _llama(), target_modules=["q_proj"], **options)
    theirs = peft.PeftModel.from_pretrained(_llama(), folder, is_trainable=True).train()
    ours = dl.add_dual_lora(_llama(), ("q_proj",), positive=folder, mode="pos", lora_dropout=0.5).train()
    torch.manual_seed(7)
    want = theirs(IDS).logits
    torch.manual_seed(7)
    torch.testing.assert_close(ours(IDS).logits, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, _logits(theirs.eval()))


@pytest.mark.parametrize("make", [_llama, _gpt2, lambda: LlamaModel(_llama().config)], ids=["llama", "gpt2", "no head"])
def test_all_linear_is_what_peft_means_by_it(make) -> None:
    config = peft.LoraConfig(target_modules="all-linear", task_type="FEATURE_EXTRACTION")
    wanted = peft.get_peft_model(make(), config).targeted_module_names
    model = make()
    before = _logits_or_states(model)
    dl.add_dual_lora(model, "All-Linear", r=2)
    assert sorted(dl.dual_lora_layers(model)) == sorted(wanted)
    assert not any("lm_head" in path for path in wanted) and len(wanted) >= 8
    assert torch.equal(_logits_or_states(model), before)


def test_an_all_linear_adapter_goes_from_peft_to_here_and_back(tmp_path) -> None:
    folder, want = _peft_adapter(tmp_path, _llama(), target_modules="all-linear")
    model = dl.add_dual_lora(_llama(), "all-linear", negative=folder, mode="neg")
    torch.testing.assert_close(_logits(model), want, rtol=1e-5, atol=1e-5)
    files.save_lora_adapter(model, tmp_path / "back", "neg")
    loaded = peft.PeftModel.from_pretrained(_llama(), str(tmp_path / "back")).eval()
    torch.testing.assert_close(_logits(loaded), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (TypeError, {"rank": 4, "r": 4}, "`rank` and `r` must not both be given, got 4 and 4"),
        (
            TypeError,
            {"alpha": 8.0, "lora_alpha": 16},
            "`alpha` and `lora_alpha` must not both be given",
        ),
        (TypeError, {"dropout": 0.0, "lora_dropout": 0.1}, "`dropout` and `lora_dropout` must not both be given"),
        (ValueError, {"r": 0}, "`r` must be a positive int, got 0"),
        (TypeError, {"r": 4.0}, "`r` must be a positive int, got float 4.0"),
        (ValueError, {"lora_alpha": float("nan")}, "`lora_alpha` must be finite, got nan"),
        (TypeError, {"lora_alpha": "16"}, "`lora_alpha` must be a finite number, got str '16'"),
        (ValueError, {"lora_dropout": 1.0}, r"`lora_dropout` must be in \[0, 1\), got 1.0"),
        (TypeError, {"use_dora": True}, "`use_dora` must be left out, got bool True: dual LoRA does not support"),
        (TypeError, {"bias": "none"}, "`bias` must be left out, got str 'none'"),
        (TypeError, {"layers_to_transform": [1]}, "`layers_to_transform` must be left out"),
    ],
)
def test_peft_arguments_that_conflict_or_are_not_supported_are_named(kind, arguments, message) -> None:
    model = _llama()
    with pytest.raises(kind, match=f"^add_dual_lora: {message}"):
        dl.add_dual_lora(model, TARGETS, **arguments)
    assert not dl.dual_lora_layers(model)


def test_every_argument_of_lora_config_is_taken_or_refused() -> None:
    """A new version of PEFT may add arguments: each must be taken, or refused as one of PEFT's."""
    model, taken = _llama(), {"r", "lora_alpha", "lora_dropout", "target_modules"}
    for name in set(inspect.signature(peft.LoraConfig).parameters) - taken:
        with pytest.raises(TypeError, match=f"`{name}` must be left out"):
            dl.add_dual_lora(model, TARGETS, **{name: None})


def test_all_linear_refuses_a_model_that_peft_has_changed() -> None:
    model = _llama()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="`target_modules` must be layer names .*, got 'all-linear'.*merge_and_unload"):
        dl.add_dual_lora(model, "all-linear")


def test_modes_switch_without_rebuilding() -> None:
    model = dl.add_dual_lora(_llama(), TARGETS, rank=3)
    _scatter(model)
    layers = dl.dual_lora_layers(model)
    seen = {mode: _logits(dl.set_dual_lora_mode(model, mode)) for mode in ("neg", "pos", "mix")}
    assert len({t.sum().item() for t in seen.values()}) == 3
    assert all(a is b for a, b in zip(layers.values(), dl.dual_lora_layers(model).values(), strict=True))
    assert torch.equal(_logits(dl.set_dual_lora_mode(model, "neg")), seen["neg"])
    assert [n for n, p in layers["model.layers.0.self_attn.q_proj"].named_parameters() if p.requires_grad] == [
        "lora_a_neg", "lora_b_neg",
    ]  # fmt: skip


def test_gates_are_off_until_asked_for() -> None:
    model = dl.add_dual_lora(_llama(), TARGETS, rank=3)
    _scatter(model)
    _logits(model)
    assert all(g.tokens == 0 for g in dl.get_gates(model).values())
    dl.record_gates(model)
    _logits(model)
    gates = dl.get_gates(model)
    assert set(gates) == {f"model.layers.{i}.self_attn.{t}" for i in range(2) for t in TARGETS}
    assert all(g.tokens == IDS.numel() and 0 < g.mean < 1 and sum(g.histogram) == g.tokens for g in gates.values())
    dl.record_gates(model, False)
    _logits(model)
    assert dl.get_gates(model) == gates


def test_generation_uses_the_layers() -> None:
    model = dl.add_dual_lora(_llama(), TARGETS, rank=3)
    _scatter(model)
    out = model.generate(IDS[:1], max_new_tokens=6, do_sample=False)
    ids = IDS[:1]
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat((ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(out, ids)


def _rewrite(folder, **changes) -> None:
    file = f"{folder}/adapter_config.json"
    with open(file, encoding="utf-8") as f:
        config = json.load(f) | changes
    with open(file, "w", encoding="utf-8") as f:
        json.dump(config, f)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "`negative` must be an adapter with use_dora=False, got use_dora=True, not supported"),
        ({"bias": "all"}, "`negative` must be an adapter with bias='none', got bias='all', not supported"),
        ({"modules_to_save": ["lm_head"]}, "`negative` must be an adapter with modules_to_save=None, got"),
        ({"peft_type": "IA3"}, "`negative` must be a LoRA adapter, got peft_type 'IA3'"),
    ],
)
def test_adapters_that_mean_something_else_are_refused(tmp_path, changes, message) -> None:
    folder, _ = _peft_adapter(tmp_path, _llama())
    _rewrite(folder, **changes)
    with pytest.raises(ValueError, match=f"^add_dual_lora: {message}"):
        dl.add_dual_lora(_llama(), TARGETS, negative=folder)


def test_wrong_adapters_and_models_are_named(tmp_path) -> None:
    folder, _ = _peft_adapter(tmp_path, _llama())
    with pytest.raises(ValueError, match="`negative` must be .*, got no factors for model.layers.0.mlp.up_proj"):
        dl.add_dual_lora(_llama(), (*TARGETS, "up_proj"), negative=folder)
    with pytest.raises(ValueError, match=r"`negative` must be .*, got factors for .*v_proj"):
        dl.add_dual_lora(_llama(), ("q_proj",), negative=folder)
    with pytest.raises(ValueError, match=r"`negative` must be .*nowhere, and adapter_config.json is not in it"):
        dl.add_dual_lora(_llama(), TARGETS, negative=tmp_path / "nowhere")
    with pytest.raises(TypeError, match="`negative` must be the folder of a PEFT adapter or its state dict, got int 3"):
        dl.add_dual_lora(_llama(), TARGETS, negative=3)
    with pytest.raises(TypeError, match="`model` must be a loaded model .*, got str 'gpt2'"):
        dl.add_dual_lora("gpt2")
    for targets in (3, ("q_proj", None)):
        with pytest.raises(TypeError, match="`target_modules` must be module names, or one regular expression, got"):
            dl.add_dual_lora(_llama(), targets)
    with pytest.raises(TypeError, match=r"must be options of DualLoRALinear \(alpha_neg, .*variant\), got lora_rank"):
        dl.add_dual_lora(_llama(), lora_rank=32)
    with pytest.raises(ValueError, match=r"`target_modules` must be .*match no module of LlamaForCausalLM"):
        dl.add_dual_lora(_llama(), ("c_attn",))
    with pytest.raises(ValueError, match="must be names of linear layers, got model.norm, which is a LlamaRMSNorm"):
        dl.add_dual_lora(_llama(), ("model.norm",))
    state = load_file(f"{folder}/adapter_model.safetensors")
    wide = {k: torch.zeros(t.shape[0], 33) if k.endswith("lora_A.weight") else t for k, t in state.items()}
    with pytest.raises(ValueError, match=r"`negative` must be .* fits model.layers.0.self_attn.q_proj: lora_A"):
        dl.add_dual_lora(_llama(), TARGETS, negative=wide)
    with pytest.raises(ValueError, match=r"`negative` must be lora_A \(R, d_in\) and lora_B"):
        dl.add_dual_lora(_llama(), TARGETS, negative={k: t for k, t in state.items() if "lora_A" in k})
    with pytest.raises(ValueError, match="`negative` must be tensors .*, got 'x'"):
        dl.add_dual_lora(_llama(), TARGETS, negative={"x": torch.zeros(1)})
    model = dl.add_dual_lora(_llama(), TARGETS)
    with pytest.raises(ValueError, match="`model` must be without dual LoRA, .*remove_dual_lora"):
        dl.add_dual_lora(model, TARGETS)
    with pytest.raises(ValueError, match="`which` must be 'pos' or 'neg'"):
        files.save_lora_adapter(model, tmp_path, "both")
    for call in (dl.remove_dual_lora, dl.get_gates, dl.record_gates):
        with pytest.raises(ValueError, match="`model` must be one with dual LoRA layers"):
            call(_llama())


def test_a_failed_add_leaves_the_model_as_it_was(tmp_path) -> None:
    folder, _ = _peft_adapter(tmp_path, _llama())
    state = load_file(f"{folder}/adapter_model.safetensors")
    last = [k for k in state if k.endswith("layers.1.self_attn.v_proj.lora_A.weight")][0]
    state[last] = torch.zeros(4, 33)
    model = _llama()
    before, flags = _logits(model), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="an adapter that fits"):
        dl.add_dual_lora(model, TARGETS, negative=state)
    assert not any(isinstance(m, DualLoRALinear) for m in model.modules())
    assert [p.requires_grad for p in model.parameters()] == flags
    assert torch.equal(_logits(model), before)


def test_saved_files_of_another_kind_are_named(tmp_path) -> None:
    model = dl.add_dual_lora(_llama(), TARGETS, rank=3)
    files.save_dual_lora(model, tmp_path)
    with pytest.raises(ValueError, match="`model` must be .*, got one without model.layers.0.self_attn.q_proj"):
        files.load_dual_lora(_gpt2(), tmp_path)
    config = json.loads((tmp_path / "dual_lora_config.json").read_text())
    (tmp_path / "dual_lora_config.json").write_text(json.dumps(config | {"format_version": 3}))
    with pytest.raises(ValueError, match="`folder` must be of format version 1 to 2, got 3"):
        files.load_dual_lora(_llama(), tmp_path)
    (tmp_path / "dual_lora.safetensors").unlink()
    with pytest.raises(ValueError, match=r"dual_lora\.safetensors is not in it"):
        files.load_dual_lora(_llama(), tmp_path)


def test_layers_quantised_by_torchao_can_be_the_base() -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = _llama()
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    before = _logits(model)
    assert not torch.equal(before, _logits(_llama()))  # it is quantised
    dl.add_dual_lora(model, TARGETS, rank=3)
    assert torch.equal(_logits(model), before)
    _scatter(model)
    model(IDS, labels=IDS).loss.backward()
    for layer in dl.dual_lora_layers(model).values():
        trains = {n for n, p in layer.named_parameters() if p.grad is not None}
        assert trains == {n for n, _ in layer.named_parameters(recurse=False) if not n.endswith("_neg")}
    dl.remove_dual_lora(model)
    assert torch.equal(_logits(model), before)
