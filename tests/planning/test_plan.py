"""A plan from configs against real steps on this CPU: FLOPs by torch's counter, memory by torch's allocator."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    T5Config,
    ViTConfig,
)
from typer.testing import CliRunner

from calm_fast.cli import app
from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.encoders import encoder_from_config
from calm_fast.modules import cross_attention
from calm_fast.planning import lines, plan
from calm_fast.planning.plan import meta_composition, trace_training

ROWS, LENGTH = 2, 64
_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LLAMA = LlamaConfig(**_SIZES)
GPT2 = GPT2Config(n_embd=64, n_layer=3, n_head=4, vocab_size=256, bos_token_id=1, eos_token_id=2)
BERT = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48, vocab_size=256)
T5 = T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=256)
# anchor, augmenter, how an encoder reads, gradient checkpointing
CASES: dict[str, tuple[PreTrainedConfig, PreTrainedConfig, str | None, bool]] = {
    "llama": (LLAMA, GPT2, None, False),
    "gpt2": (GPT2, LLAMA, None, False),
    "gemma3": (Gemma3TextConfig(**_SIZES, head_dim=16, sliding_window=32), GPT2, None, False),
    "qwen2_moe": (Qwen2MoeConfig(**_SIZES, **_EXPERTS, shared_expert_intermediate_size=64), GPT2, None, False),
    "t5 encoder": (LLAMA, T5, "prompt", False),
    "checkpointing": (LLAMA, GPT2, None, True),
}


def real(case: str) -> ComposedForCausalLM:
    anchor, augmenter, mode, checkpointing = copy.deepcopy(CASES[case])  # models change their config
    part = AutoModelForCausalLM.from_config(augmenter) if mode is None else encoder_from_config(augmenter)
    model = compose(
        AutoModelForCausalLM.from_config(anchor), part, "uniform:2", same_ids=True, bidirectional=mode, probe=False
    ).train()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    return model


def step(model: ComposedForCausalLM, case: str) -> torch.Tensor:
    ids = torch.randint(3, 256, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    given = {} if CASES[case][2] is None else {"prompt_length": LENGTH // 2}
    return model(input_ids=ids, labels=ids, **given).loss


def traced(case: str, cached: bool = False) -> Any:
    anchor, augmenter, mode, checkpointing = CASES[case]
    model, _ = meta_composition(anchor, [augmenter], "float32", mode, connections="uniform:2")
    return trace_training(model, ROWS, LENGTH, checkpointing, cached)


@pytest.mark.parametrize("case", CASES)
def test_flops_are_those_of_torchs_counter(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = cross_attention.ops.cross_attention  # the compiled library's products are not counted
    monkeypatch.setattr(cross_attention.ops, "cross_attention", functools.partial(plain, impl="torch"))
    model = real(case)
    if case == "qwen2_moe":
        model.anchor.set_experts_implementation("eager")  # the counter knows no grouped products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        step(model, case).backward()
    # the fused kernel computes the scores once more in the backward pass, the counted one keeps them
    assert counter.get_total_flops() <= traced(case).flops <= 1.1 * counter.get_total_flops()


@pytest.mark.parametrize("case", CASES)
def test_memory_is_that_of_torchs_allocator(case: str, tmp_path: Path) -> None:
    model = real(case)
    step(model, case).backward()
    model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(model, case).backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = [e for e in json.loads((tmp_path / "trace.json").read_text())["traceEvents"] if e["name"] == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    assert peak > 1e6
    assert abs(traced(case).peak / peak - 1) < 0.1


@pytest.mark.parametrize("case", ["llama", "gpt2"])
def test_kept_activations_are_the_tensors_that_autograd_saves(case: str) -> None:
    model, kept = real(case), {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        loss = step(model, case)
    assert loss.isfinite()
    assert abs(traced(case).marks["saved"] / sum(kept.values()) - 1) < 0.1


def test_cached_states_leave_out_the_augmenter_and_nothing_else() -> None:
    both, cached = traced("llama"), traced("llama", cached=True)
    model, _ = meta_composition(LLAMA, [GPT2], "float32", connections="uniform:2")
    layers, width, tokens = 3, 64, ROWS * LENGTH  # the last layer is connected, so all of them run
    products = 2 * tokens * layers * 12 * width**2
    scores = 4 * layers * ROWS * LENGTH**2 * width
    assert both.flops - cached.flops == products + scores
    assert len(model.augmenters[0].transformer.h) == layers


def test_a_plan_adds_up() -> None:
    found = plan(LLAMA, [GPT2, LLAMA], tokens=10**6, gpus=4, connections="uniform:2", batch_size=2, length=64,
                 dtype="bfloat16", fsdp=True)  # fmt: skip
    assert [part["name"] for part in found["parts"]] == ["B", "A1", "A2"]
    assert found["setting"]["steps"] == -(-(10**6) // (4 * 2 * 64))
    assert found["caches"]["states_bfloat16"] == 2 * (2 * 64 + 2 * 64)
    assert found["caches"]["anchor"] == 2 * 2 * 3 * 2 * 16  # keys and values, bfloat16, layers, heads, width
    for kind, own in ((kind, found["memory"][kind]) for kind in ("augmenters_run", "states_cached")):
        assert own["total"] == own["weights"] + own["optimizer"] + own["step_peak"]
        time = found["time"][kind]
        assert time["step_s"] == max(time["compute_s"], time["interconnect_s"]) > 0
    alone = plan(LLAMA, [GPT2, LLAMA], tokens=10**6, gpus=4, connections="uniform:2", batch_size=2, length=64)
    trained = found["parameters"]["trained"]
    assert alone["interconnect"]["augmenters_run"]["bytes"] == round(2 * 3 / 4 * 4 * trained)
    assert alone["memory"]["augmenters_run"]["optimizer"] == 8 * trained
    assert found["flops"]["augmenters_share"] == found["flops"]["augmenters"] / found["flops"]["step"]
    assert found["time"]["kind"].startswith("a model's")
    assert any("a model of h200" in line for line in lines(found))


def test_the_command_prints_text_and_json(tmp_path: Path) -> None:
    for name, config in (("b", LLAMA), ("a", GPT2)):
        config.save_pretrained(tmp_path / name)
    given = ["plan", "--anchor", str(tmp_path / "b"), "--augmenter", str(tmp_path / "a" / "config.json"), "--tokens",
             "100000", "--connections", "uniform:2", "--batch-size", "2", "--length", "32"]  # fmt: skip
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "memory per GPU" in result.stdout and "a model of h200" in result.stdout
    found = json.loads(CliRunner().invoke(app, [*given, "--json", "--gpu", "a100"]).stdout)
    assert found["setting"]["gpu"] == "a100" and found["memory"]["gpu"] == 80e9


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tokens": 0}, "`tokens`"), ({"gpus": 1.5}, "`gpus`"), ({"length": 1}, "`length`"),
        ({"dtype": "int8"}, "`dtype`"), ({"gpu": "tpu"}, "`gpu` must be one of h200, h100, a100"),
        ({"connections": "uniform:9"}, "`connections`"), ({"anchor": "no/such/folder"}, "`anchor`"),
        ({"anchor": T5}, "`anchor` must be a causal language model"),
        ({"length": LLAMA.max_position_embeddings + 1}, "`length` must be at most .*the positions of the part"),
        ({"anchor": BERT}, "`anchor` must be the config.*BertConfig, which reads a text in both directions"),
        ({"anchor": ViTConfig()}, "`anchor` must be the config of a causal language model.*ViTConfig: Unrecognized"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(given: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"anchor": LLAMA, "tokens": 1000, "connections": "uniform:2", "length": 8} | given
    with pytest.raises(ValueError, match=words):
        plan(settings.pop("anchor"), [GPT2], **settings)


def test_an_encoder_is_planned_only_as_one() -> None:
    settings: dict[str, Any] = {"tokens": 1000, "connections": "uniform:2", "length": 8}
    with pytest.raises(ValueError, match="`augmenters` must be .*encoder with bidirectional='prompt', got BertConfig"):
        plan(LLAMA, [BERT], **settings)
    assert plan(LLAMA, [BERT], bidirectional="prompt", **settings)["memory"]["augmenters_run"]["total"] > 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{}", "Should have a `model_type`"),
        ('{"model_type": "no such type"}', "does not recognize this architecture"),
        ('{"model_type": "llama", "num_hidden_layers": null}', "Validation error for field 'num_hidden_layers'"),
        ('{"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}', "quantised .fp8., whose products"),
    ],
)
def test_a_file_that_is_no_plain_config_is_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=f"plan: `anchor` must be a config.*{words}"):
        plan(tmp_path, [GPT2], tokens=1000, connections="uniform:2", length=8)
