"""Dual LoRA and what wraps models or layers: processes, torch.compile, PEFT, offloading, shared layers."""

from __future__ import annotations

from pathlib import Path

import accelerate
import peft
import pytest
import torch
from dual_models import IDS, TARGETS, llama, logits, scatter
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM

from calm_fast import (
    add_dual_lora,
    get_gates,
    load_dual_lora,
    record_gates,
    remove_dual_lora,
    save_dual_lora,
    save_lora_adapter,
    set_dual_lora_mode,
)
from calm_fast.hf.dual_lora import dual_lora_layers

PATHS = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in TARGETS]


def dual(model: nn.Module | None = None) -> nn.Module:
    return scatter(add_dual_lora(llama() if model is None else model, TARGETS, rank=3, gate_dim=4, value_dim=4))


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.seam(
    attach="`fully_shard`, DDP", to="dual LoRA model", result="works",
    why="add the layers first; under fully_shard every process calls a save, and rank 0 writes",
)  # fmt: skip
@pytest.mark.slow
def test_two_processes_save_what_one_would(tmp_path: Path, forked) -> None:
    worker = (Path(__file__).with_name("sharded_worker.py"), tmp_path)
    started = [forked.start(*worker, rank, cwd=tmp_path.parent) for rank in range(2)]
    done = [process.wait() for process in started]
    assert [one.returncode for one in done] == [0, 0], "\n".join(one.stdout + one.stderr for one in done)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend="eager")


def layer_compiled(model: nn.Module) -> nn.Module:
    model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
    return model


def target_compiled(model: nn.Module) -> nn.Module:
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.compile(attention.q_proj, backend="eager")
    return model


@pytest.mark.seam(
    attach="`torch.compile` of the model or of its parts", to="dual LoRA model", result="works",
    why="layers are added, saved and removed under the model's own names",
)  # fmt: skip
@pytest.mark.parametrize("wrap", [compiled, layer_compiled, target_compiled])
@pytest.mark.parametrize("first", [True, False], ids=["wrapped first", "added first"])
def test_compiled_models_keep_their_names(tmp_path: Path, wrap, first) -> None:
    want = logits(dual())
    model = dual(wrap(llama())) if first else wrap(dual())
    close(logits(model), want)
    assert list(dual_lora_layers(model)) == PATHS == list(get_gates(record_gates(model)))
    save_dual_lora(model, tmp_path / "dual")
    save_lora_adapter(model, tmp_path / "neg", "neg")
    close(logits(load_dual_lora(llama(), tmp_path / "dual")), want)
    close(logits(load_dual_lora(wrap(llama()), tmp_path / "dual")), want)
    neg = add_dual_lora(llama(), TARGETS, tmp_path / "neg", mode="neg")
    close(logits(set_dual_lora_mode(model, "neg")), logits(neg))
    flags = [p.requires_grad for p in model.parameters()]
    assert any(flags) and not all(flags)
    close(logits(remove_dual_lora(model)), logits(llama()))
    assert all(p.requires_grad for p in model.parameters()) and not dual_lora_layers(model)
    torch._dynamo.reset()


@pytest.mark.seam(
    attach="PEFT adapters on other layers (PeftModel)", to="dual LoRA model", result="works",
    why="each has its own way to save: `save_dual_lora`, and PEFT's `save_pretrained`",
)  # fmt: skip
def test_peft_on_other_layers_keeps_the_names(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(dual(), config).eval()
    want = logits(model)
    assert list(dual_lora_layers(model)) == PATHS
    save_dual_lora(model, tmp_path / "dual")
    model.save_pretrained(tmp_path / "peft")
    again = load_dual_lora(peft.PeftModel.from_pretrained(llama(), str(tmp_path / "peft")).eval(), tmp_path / "dual")
    close(logits(again), want)
    again = peft.PeftModel.from_pretrained(load_dual_lora(llama(), tmp_path / "dual"), str(tmp_path / "peft")).eval()
    close(logits(again), want)
    base = remove_dual_lora(again).unload()
    close(logits(base), logits(llama()))
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.seam(
    attach="a layer that PEFT adapts already", to="dual LoRA model", result="works",
    why="the adapted layer is the frozen base; merge it before `save_lora_adapter`",
)  # fmt: skip
def test_a_layer_that_peft_adapts_is_the_base(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")

    def adapted() -> nn.Module:
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), config).eval()

    model = adapted()
    before, flags = logits(model), {n: p.requires_grad for n, p in model.named_parameters()}
    dual(model)
    want = logits(model)
    assert list(dual_lora_layers(model)) == PATHS and not torch.allclose(want, before)
    save_dual_lora(model, tmp_path / "dual")
    close(logits(load_dual_lora(adapted(), tmp_path / "dual")), want)
    with pytest.raises(ValueError, match="^save_lora_adapter: `model` must be .*PEFT adapters, got .*merge_and_unload"):
        save_lora_adapter(model, tmp_path / "pos", "pos")
    close(logits(remove_dual_lora(model)), before)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == flags


@pytest.mark.seam(
    attach="weights offloaded by accelerate", to="dual LoRA model", result="works",
    why="the layers live on the device that the hooks load the weights to",
)  # fmt: skip
def test_layers_over_offloaded_weights_live_where_they_run(tmp_path: Path) -> None:
    want = logits(dual())
    model = accelerate.cpu_offload(llama(), execution_device=torch.device("cpu"))
    dual(model)
    assert all(layer.base.weight.is_meta for layer in dual_lora_layers(model).values())
    close(logits(model), want)
    save_dual_lora(model, tmp_path)
    close(logits(load_dual_lora(llama(), tmp_path)), want)
    close(logits(remove_dual_lora(model)), logits(llama()))


def test_a_model_on_meta_stays_there() -> None:
    with torch.device("meta"):
        model = llama()
    add_dual_lora(model, TARGETS)
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="^save_dual_lora: `model` must be one whose parameters are whole, .*Gather"):
        save_dual_lora(model, "nowhere")


@pytest.mark.seam(
    attach="one layer used at two places", to="dual LoRA model", result="refused",
    why="the other place would keep the plain layer; copy the layer for each place first",
)  # fmt: skip
def test_a_shared_layer_is_refused() -> None:
    model = llama()
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    message = r"`target_modules` must be names of layers that the model uses at one place, got .*layers\.0.*layers\.1"
    for targets in (("q_proj",), "all-linear", r".*layers\.0.*q_proj"):
        with pytest.raises(ValueError, match=f"^add_dual_lora: {message}"):
            add_dual_lora(model, targets)
    assert not dual_lora_layers(model)


def test_a_head_that_is_tied_to_the_embeddings_can_be_adapted(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        return llama(tie_word_embeddings=True)

    model = scatter(add_dual_lora(tied(), ("lm_head",), rank=3, gate_dim=4, value_dim=4))
    assert model.lm_head.base.weight is model.model.embed_tokens.weight
    save_dual_lora(model, tmp_path)
    close(logits(load_dual_lora(tied(), tmp_path)), logits(model))
    model.tie_weights()
    assert model.lm_head.base.weight is model.model.embed_tokens.weight and "lm_head.weight" not in model.state_dict()
    set_dual_lora_mode(model, "mix")
    assert not model.model.embed_tokens.weight.requires_grad and model.lm_head.gate_q.requires_grad
    assert remove_dual_lora(model).lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.seam(
    attach="expert parameters of a mixture of experts", to="dual LoRA model", result="refused",
    why="they are no linear layers; name attention layers",
)  # fmt: skip
def test_experts_are_refused_by_name() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    experts = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **experts))
    with pytest.raises(ValueError, match="^add_dual_lora: `target_modules` must be names of linear .*, got .*expert"):
        add_dual_lora(model, ("experts",))
    message = "gate_up_proj, a parameter of shape .* cannot carry dual LoRA. Its linear layers are q_proj, k_"
    with pytest.raises(ValueError, match=f"^add_dual_lora: `target_modules` must be .*{message}"):
        add_dual_lora(model, ("gate_up_proj",))


def test_removal_restores_the_model_after_it_was_moved() -> None:
    model = llama()
    frozen = [n for n, _ in model.named_parameters() if "mlp" in n]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    modules = {path: m for path, m in model.named_modules()}
    dual(model).to(torch.bfloat16).train()
    remove_dual_lora(model)
    assert {path: m for path, m in model.named_modules()} == modules
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)
    assert torch.equal(logits(model.eval()), logits(llama().to(torch.bfloat16)))
    assert "save_pretrained" not in vars(model) and "save_pretrained" not in vars(model.model)
    part = add_dual_lora(model.model, TARGETS, rank=3)  # a part of the model, and then the whole
    assert not any(p.requires_grad for n, p in part.named_parameters() if "norm" in n)
    remove_dual_lora(model)
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == set(frozen)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (ValueError, {"rank": 0}, "`rank` must be a positive int, got 0"),
        (TypeError, {"rank": 2.5}, "`rank` must be a positive int, got float 2.5"),
        (ValueError, {"rank_neg": -1}, "`rank_neg` must be a positive int, got -1"),
        (TypeError, {"alpha": "x"}, "`alpha` must be a finite number, got str 'x'"),
        (ValueError, {"gate_dim": 0}, "`gate_dim` must be a positive int, got 0"),
        (ValueError, {"variant": "new"}, "`variant` must be 'paper' or 'released', got 'new'"),
        (ValueError, {"variant": "released", "value_dim": None}, "`value_dim` must be a positive int where variant"),
        (ValueError, {"dropout": 1.5}, r"`dropout` must be in \[0, 1\), got 1.5"),
        (ValueError, {"mode": "both"}, "`mode` must be one of 'neg', 'pos', 'mix', got 'both'"),
        (ValueError, {"target_modules": "(q_proj"}, "`target_modules` must be module names, or one regular expression"),
    ],
)
def test_errors_name_the_argument_of_add_dual_lora(kind, arguments, message) -> None:
    model = llama()
    with pytest.raises(kind, match=f"^add_dual_lora: {message}"):
        add_dual_lora(model, **arguments)
    assert not dual_lora_layers(model)


def test_errors_of_the_other_functions_name_them() -> None:
    with pytest.raises(ValueError, match="^set_dual_lora_mode: `mode` must be one of 'neg', 'pos', 'mix', got 'x'"):
        set_dual_lora_mode(dual(), "x")
    for call in (get_gates, record_gates, remove_dual_lora):
        with pytest.raises(TypeError, match=f"^{call.__name__}: `model` must be a model with dual LoRA layers"):
            call("gpt2")
    assert IDS.shape == (2, 9)
