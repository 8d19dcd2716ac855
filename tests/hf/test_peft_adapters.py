"""PEFT adapters: every field of LoraConfig is read rightly or refused by name, and what is written loads in PEFT."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import peft
import pytest
import torch
from dual_models import TARGETS, gpt2, llama, logits, scatter
from safetensors.torch import load_file, save_file
from torch import nn

from calm_fast import add_dual_lora, save_lora_adapter
from calm_fast.hf import peft_config
from calm_fast.hf.dual_lora import dual_lora_layers


def adapter(folder: Path, make=llama, **config) -> torch.Tensor:
    """Write a random PEFT adapter, and return the logits of PEFT when it has loaded it onto the base."""
    options = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS), "task_type": "CAUSAL_LM"} | config
    model = peft.get_peft_model(make(), peft.LoraConfig(**options))
    torch.manual_seed(2)
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    return logits(peft.PeftModel.from_pretrained(make(), str(folder)).eval())


def rewrite(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_every_field_of_lora_config_has_a_row() -> None:
    """A new PEFT may add fields: each needs a decision."""
    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= set(peft_config.FIELDS)


def test_the_defaults_of_lora_config_are_plain() -> None:
    for name, value in peft.LoraConfig().to_dict().items():
        field = peft_config.FIELDS[name]
        assert field.use in ("read", "no effect") or any(
            type(value) is type(plain) and value == plain for plain in field.plain
        ), name


READABLE = [
    {},
    {"use_rslora": True},
    {"init_lora_weights": False},
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "orthogonal"},
    {"lora_dropout": 0.5},
    {"rank_pattern": {"layers.1.self_attn.q_proj": 2, "v_proj": 3}, "alpha_pattern": {r"layers\.\d+\..*v_proj": 5}},
    {"rank_pattern": {"^q_proj": 2, "proj": 3, r".*\.0\..*": 1}, "use_rslora": True},
    {"layers_to_transform": [1]},
    {"layers_to_transform": 0, "layers_pattern": "layers"},
    {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    {"target_modules": r".*\.1\.self_attn\.(q|v)_proj", "exclude_modules": r".*v_proj"},
]  # fmt: skip


@pytest.mark.seam(
    attach="a plain PEFT LoRA adapter (rslora, patterns, chosen layers)", to="dual LoRA model", result="works",
    why="its logits are PEFT's",
)  # fmt: skip
@pytest.mark.parametrize("config", READABLE, ids=lambda c: "-".join(c) or "plain")
def test_adapters_that_are_read_compute_what_peft_computes(tmp_path: Path, config: dict) -> None:
    want = adapter(tmp_path, **config)
    paths = {key.split(".lora_")[0].removeprefix("base_model.model.") for key in load_file(
        tmp_path / "adapter_model.safetensors")}  # fmt: skip
    got = logits(add_dual_lora(llama(), sorted(paths), tmp_path, mode="neg"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(want, logits(llama()), atol=1e-3)


@pytest.mark.seam(
    attach="a PEFT adapter with more than two factors and a scaling", to="dual LoRA model", result="refused",
    why="the error names the field; merge it into the base, or convert it to a plain LoRA",
)  # fmt: skip
@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_2"},
        {"init_lora_weights": "olora"},
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "lora_only"},
        {"modules_to_save": ["lm_head"]},
        {"alora_invocation_tokens": [5, 6]},
        {"trainable_token_indices": [1, 2]},
        {"layer_replication": [(0, 2), (0, 2)]},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:40],
)
def test_adapters_that_say_more_are_refused_by_the_field(tmp_path: Path, config: dict) -> None:
    make = (lambda: llama(attention_bias=True)) if "bias" in next(iter(config)) else llama
    adapter(tmp_path, make, **config)
    (name,) = config
    with pytest.raises(ValueError, match=f"^add_dual_lora: `negative` must be .* with {name}=.*, not supported: "):
        add_dual_lora(make(), TARGETS, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {name: {"some": 1}}
        for name, field in peft_config.FIELDS.items()
        if field.use == "refused" and name not in ("bias", "init_lora_weights")
    ]
    + [{"init_lora_weights": kind} for kind in ("corda", "loftq", "lora_ga", "mica", "what comes next")]
    + [{"bias": "all"}],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items()),
)
def test_every_refused_field_is_named(tmp_path: Path, changes: dict) -> None:
    adapter(tmp_path)
    rewrite(tmp_path, **changes)
    (name,) = changes
    with pytest.raises(ValueError, match=f"^add_dual_lora: `positive` must be .* with {name}=.*not supported: "):
        add_dual_lora(llama(), TARGETS, positive=tmp_path)


def test_fields_of_a_newer_peft_are_read_only_where_they_are_empty(tmp_path: Path) -> None:
    want = adapter(tmp_path)
    rewrite(tmp_path, use_next_lora=False, next_config=None, next_pattern={})
    torch.testing.assert_close(
        logits(add_dual_lora(llama(), TARGETS, tmp_path, mode="neg")), want, rtol=1e-5, atol=1e-5
    )
    rewrite(tmp_path, use_next_lora=True)
    with pytest.raises(ValueError, match="^add_dual_lora: `negative` must be an adapter without use_next_lora, got"):
        add_dual_lora(llama(), TARGETS, tmp_path)


def test_a_configuration_of_another_adapter_is_noticed(tmp_path: Path) -> None:
    adapter(tmp_path)
    for changes, message in (
        ({"r": 2}, "got rank 2 for .* in the first and 4 in the second"),
        ({"r": 4, "target_modules": ["q_proj"]}, "got factors for .*v_proj, which the first does not target"),
        ({"target_modules": list(TARGETS), "layers_to_transform": [0]}, r"got factors for .*layers\.1\."),
    ):
        rewrite(tmp_path, **changes)
        with pytest.raises(ValueError, match=f"^add_dual_lora: `negative` must be a folder whose .* {message}"):
            add_dual_lora(llama(), TARGETS, tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="^add_dual_lora: `negative` must be .*, which is not JSON"):
        add_dual_lora(llama(), TARGETS, tmp_path)


def test_other_kinds_of_adapter_are_named(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), peft.LoHaConfig(target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "loha")
    with pytest.raises(ValueError, match="^add_dual_lora: `negative` must be a LoRA adapter, got peft_type 'LOHA'"):
        add_dual_lora(llama(), TARGETS, tmp_path / "loha")
    adapter(tmp_path / "embedding", target_modules=["embed_tokens"])
    with pytest.raises(ValueError, match="^add_dual_lora: `negative` must be tensors .* only, got .*embed_tokens"):
        add_dual_lora(llama(), TARGETS, tmp_path / "embedding")


def test_a_state_dict_holds_one_adapter_of_scaling_one(tmp_path: Path) -> None:
    want = adapter(tmp_path, r=4, lora_alpha=4)
    state = load_file(tmp_path / "adapter_model.safetensors")
    for name in ("", ".default"):  # as in a file, and as in a PeftModel
        renamed = {key.replace(".weight", f"{name}.weight"): t for key, t in state.items()}
        got = logits(add_dual_lora(llama(), TARGETS, renamed, mode="neg"))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    two = {key.replace(".weight", f".{name}.weight"): t.clone() for key, t in state.items() for name in ("one", "two")}
    with pytest.raises(ValueError, match="`negative` must be the tensors of one adapter, got those of 2: 'one', 'two'"):
        add_dual_lora(llama(), TARGETS, two)
    save_file(two, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="`negative` must be the tensors of one adapter"):
        add_dual_lora(llama(), TARGETS, tmp_path)


class Nested(nn.Module):
    """A model in which one path ends another one, with names that mean something in a regular expression."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj, self.inner = nn.Linear(6, 6), nn.ModuleDict({"proj": nn.Linear(6, 6), "p+roj": nn.Linear(6, 6)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x) + self.inner["proj"](x) + self.inner["p+roj"](x)


def test_an_adapter_of_one_path_that_ends_another_adapts_that_one_only(tmp_path: Path) -> None:
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    for index, targets in enumerate((r"proj", r"proj|inner\.p\+roj", r"proj|inner\.proj")):
        model = scatter(add_dual_lora(Nested(), targets, rank=2, alpha=3.0, mode="pos"))
        other = list(dual_lora_layers(model).values())[-1]
        other.alpha = 5.0
        save_lora_adapter(model, tmp_path / str(index), "pos")
        with torch.no_grad():
            loaded = peft.PeftModel.from_pretrained(Nested(), str(tmp_path / str(index)))
            torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
        assert len(loaded.targeted_module_names) == len(dual_lora_layers(model))


@pytest.mark.parametrize(("make", "targets"), [(llama, TARGETS), (gpt2, ("c_attn", "c_fc"))], ids=["llama", "gpt2"])
def test_layers_of_any_rank_and_scaling_are_written(tmp_path: Path, make, targets) -> None:
    ranks = {"rank_pattern": {r".*\.1\..*": 2}, "alpha_pattern": {r".*\.0\..*(q_proj|c_fc)": 3}}
    fan = {"fan_in_fan_out": True} if make is gpt2 else {}
    want = adapter(tmp_path / "a", make, target_modules=list(targets), use_rslora=True, **ranks, **fan)
    model = add_dual_lora(make(), targets, tmp_path / "a", mode="neg")
    save_lora_adapter(model, tmp_path / "b", "neg", base_model="org/name", revision="v1")
    loaded = peft.PeftModel.from_pretrained(make(), str(tmp_path / "b")).eval()
    torch.testing.assert_close(logits(loaded), want, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/name", "v1")
