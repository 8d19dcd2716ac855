"""A cache of a fixed size: every decoding step has the same shapes, and torch.compile traces it once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, composed_model, left_padded, prompts, randomize
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.cross_cache import FixedCrossLayer

CLOSE = {"rtol": 0, "atol": 2e-5}


def small() -> ComposedForCausalLM:
    """Return a composition that is quick to trace."""
    parts = [FAMILIES["llama"].model(seed, width, depth=1) for seed, width in enumerate((32, 16))]
    return randomize(compose(*parts, [(-1, -1), (0, 0)]))


class Trace(TorchDispatchMode):
    """Notes every op with the shapes of its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        shapes = [tuple(t.shape) for t in (*args, out) if isinstance(t, torch.Tensor)]
        self.ops.append((str(function), shapes))
        return out


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@torch.no_grad()
def test_every_step_runs_the_same_ops_on_the_same_shapes(family: str) -> None:
    model, ids = composed_model(family), prompts(2, 16)
    want = model(ids, use_cache=False).logits
    cache = model.new_cache(max_length=20)
    got = [model(ids[:, :8], cache=cache).logits, model(ids[:, 8:11], cache=cache).logits]  # in two chunks
    addresses = [layer.keys.data_ptr() for layer in cache.cross]
    traces = []
    for step in range(11, 16):
        with Trace() as trace:
            got.append(model(ids[:, step : step + 1], cache=cache).logits)
        traces.append(trace.ops)
    torch.testing.assert_close(torch.cat(got, 1), want, **CLOSE)
    assert all(trace == traces[0] for trace in traces) and len(traces[0]) > 100
    assert [layer.keys.data_ptr() for layer in cache.cross] == addresses
    assert cache.get_seq_length() == 16 and cache.in_step()


@pytest.mark.seam(
    attach="`torch.compile(model, fullgraph=True)` of decoding steps with `new_cache(max_length=...)`",
    to="composition",
    result="works",
    why="traced once; the prompt is read without torch.compile",
)
@torch.no_grad()
def test_steps_compile_once() -> None:
    torch.compiler.reset()
    model, ids = small(), prompts(2, 26)
    want = model(ids, use_cache=False).logits
    cache = model.new_cache(max_length=32)
    model(ids[:, :6], cache=cache)
    counter = CompileCounterWithBackend("eager")
    step = torch.compile(model, fullgraph=True, backend=counter)
    got = torch.cat([step(ids[:, i : i + 1], cache=cache).logits for i in range(6, 26)], 1)
    torch.testing.assert_close(got, want[:, 6:], **CLOSE)
    assert counter.frame_count == 1
    assert cache.get_seq_length() == 26 and cache.in_step()


@pytest.mark.gpu
@torch.no_grad()
def test_a_cuda_graph_of_a_step_gives_the_tokens_of_an_eager_loop() -> None:
    torch.compiler.reset()
    model, ids = small().cuda(), prompts(2, 6).cuda()
    want = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    cache = model.new_cache(max_length=24)
    token = model(ids, cache=cache).logits[:, -1:].argmax(-1)
    step, found = torch.compile(model, fullgraph=True, mode="reduce-overhead"), [ids, token]
    for _ in range(11):
        token = step(token, cache=cache).logits[:, -1:].argmax(-1).clone()
        found.append(token)
    assert torch.equal(torch.cat(found, 1), want)


@pytest.mark.parametrize("padding", [0, 4])
def test_generate_takes_a_cache_of_a_fixed_size(padding: int) -> None:
    model = composed_model("llama")
    ids, mask = left_padded(prompts(), padding)
    how = {"attention_mask": mask, "max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    want = model.generate(ids, **how)
    cache = model.new_cache(max_length=16)
    assert torch.equal(model.generate(ids, **how, cache=cache), want)
    assert all(isinstance(layer, FixedCrossLayer) for layer in cache.cross) and cache.get_seq_length() == 13


@torch.no_grad()
def test_a_cache_of_a_fixed_size_is_cropped_reset_and_reordered() -> None:
    model, ids = composed_model("llama"), prompts(2, 8)
    want = model(ids, use_cache=False).logits
    cache = model.new_cache(max_length=10)
    model(ids, cache=cache)
    cache.crop(-3)
    torch.testing.assert_close(model(ids[:, 5:], cache=cache).logits, want[:, 5:], **CLOSE)
    cache.crop(-2)
    cache.reorder_cache(torch.tensor([1, 0]))
    torch.testing.assert_close(model(ids.flip(0)[:, 6:], cache=cache).logits, want.flip(0)[:, 6:], **CLOSE)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_length": -1}, "`max_length` must be a number of tokens, or 0 for a growing cache, got -1"),
        ({"max_length": True}, "`max_length` must be a number of tokens, or 0 for a growing cache, got True"),
    ],
)
def test_a_size_that_is_none_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"new_cache: {message}"):
        small().new_cache(**given)


@torch.no_grad()
def test_own_tokens_need_a_cache_that_grows() -> None:
    model, ids = small(), prompts(1, 3)
    with pytest.raises(ValueError, match="`augmenter_input_ids` must be None with a cache of a fixed size"):
        own = {"augmenter_input_ids": ids, "hi": torch.ones(1, 3).int()}
        model(ids, cache=model.new_cache(max_length=8), **own)
