"""The cache of a connection appends in place, and otherwise does what transformers' growing layer does."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from families import composed_model, prompts
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import DynamicLayer

from calm_fast import CrossAttention
from calm_fast.hf.cross_cache import CrossLayer

HEADS, D = 2, 3


def tokens(batch: int, count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values (B, Hkv, n, D), laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    both = torch.randn(batch, count, 2, HEADS, D, generator=generator).to(dtype)
    keys, values = both.unbind(2)
    return keys.transpose(1, 2), values.transpose(1, 2)


def filled(count: int = 4, batch: int = 2, **kwargs: Any) -> CrossLayer:
    layer = CrossLayer(**kwargs)
    layer.update(*tokens(batch, count, 0))
    return layer


def same(layer: CrossLayer, other: DynamicLayer) -> bool:
    assert layer.get_seq_length() == other.get_seq_length()
    return torch.equal(layer.keys, other.keys) and torch.equal(layer.values, other.values)


class Written(TorchDispatchMode):
    """Adds up the elements that ops write."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not function.is_view and "empty" not in function.__name__:
            self.count += out.numel()
        return out


@torch.no_grad()
def test_a_step_writes_its_own_tokens_only() -> None:
    layer = filled(100)
    address, new = layer.keys.data_ptr(), tokens(2, 1, 1)
    with Written() as written:
        for _ in range(50):
            layer.update(*new)
    assert written.count == 50 * 2 * 2 * HEADS * D  # keys and values, of two rows
    assert layer.keys.data_ptr() == address and layer.get_seq_length() == 150


@torch.no_grad()
def test_a_full_buffer_grows_by_a_quarter_up_to_the_expected_length() -> None:
    layer, rooms = filled(1000), []
    for step in range(3000):
        layer.update(*tokens(2, 1, step))
        rooms.append(layer.room)
    steps = sorted(set(rooms))
    assert steps[0] == 1256 and all(b <= 1.26 * a + 1 for a, b in zip(steps, steps[1:], strict=False))
    layer = filled(1000, most=1100)
    assert layer.room == 1100
    layer.update(*tokens(2, 101, 1))  # more than expected
    assert layer.get_seq_length() == 1101 and layer.room > 1101


@pytest.mark.parametrize("seed", range(4))
@torch.no_grad()
def test_a_random_history_equals_a_growing_layer_of_transformers(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    layer, other = CrossLayer(), DynamicLayer()

    def pick(count: int) -> int:
        return int(torch.randint(count, (1,), generator=generator))

    for step in range(60):
        batch = 2 if layer.keys is None else len(layer.keys)
        action = pick(8) if layer.get_seq_length() else 0
        if action <= 2:
            new = tokens(batch, 1 + 90 * (pick(4) == 0), step)
            got, want = layer.update(*new), other.update(*new)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        elif action == 3:
            remove = -pick(layer.get_seq_length())
            layer.crop(remove), other.crop(remove)
        elif action == 4:
            rows = torch.randint(batch, (batch,), generator=generator)
            layer.reorder_cache(rows), other.reorder_cache(rows)
        elif action == 5:
            rows = torch.randint(batch, (1 + pick(3),), generator=generator)
            layer.batch_select_indices(rows), other.batch_select_indices(rows)
        elif action == 6 and batch < 5:
            layer.batch_repeat_interleave(2), other.batch_repeat_interleave(2)
        elif action == 7:
            layer = copy.copy(layer) if pick(2) else pickle.loads(pickle.dumps(layer))
        assert same(layer, other)
    layer.reset()
    new = tokens(3, 2, 99)
    assert layer.get_seq_length() == 0 and torch.equal(layer.update(*new)[0], new[0])


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
@torch.no_grad()
def test_a_copy_and_its_original_go_on_by_themselves(copied: Any) -> None:
    layer, other = filled(), DynamicLayer()
    other.update(*tokens(2, 4, 0))
    twin, other_twin = copied(layer), copy.deepcopy(other)
    for mine, theirs, seed in ((layer, other, 1), (twin, other_twin, 2), (layer, other, 3), (twin, other_twin, 4)):
        mine.crop(-1), theirs.crop(-1)
        mine.update(*tokens(2, 3, seed)), theirs.update(*tokens(2, 3, seed))
        assert same(layer, other) and same(twin, other_twin)


def test_what_autograd_saved_is_never_overwritten() -> None:
    with torch.no_grad():
        layer = filled()
    weight = torch.ones(D, requires_grad=True)
    keys, _ = layer.update(*tokens(2, 1, 1))
    saved = (keys * weight).sum()  # its backward needs the keys
    with torch.no_grad():
        layer.crop(-2)
        layer.update(*tokens(2, 2, 2))
    saved.backward()  # an in-place write would raise here
    torch.testing.assert_close(weight.grad, torch.cat([tokens(2, 4, 0)[0], tokens(2, 1, 1)[0]], 2).sum((0, 1, 2)))
    assert layer.update(*(t.requires_grad_() for t in tokens(2, 1, 3)))[0].requires_grad


def test_a_layer_filled_in_inference_mode_goes_on_outside_of_it() -> None:
    with torch.inference_mode():
        layer = filled()
        layer.reorder_cache(torch.tensor([1, 0]))
    with torch.no_grad():
        keys, _ = layer.update(*tokens(2, 1, 1))
    assert keys.shape[2] == 5 and torch.equal(keys[:, :, :4], tokens(2, 4, 0)[0].flip(0))


@torch.no_grad()
def test_other_dtypes_and_batch_sizes_are_not_cast_or_broadcast() -> None:
    layer = filled()
    keys, _ = layer.update(*tokens(2, 1, 1, torch.float64))
    assert keys.dtype == torch.float64
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        layer.update(*tokens(1, 1, 1, torch.float64))


@torch.no_grad()
def test_a_decoding_step_of_a_composition_concatenates_no_cross_keys() -> None:
    model, ids = composed_model("llama"), prompts()
    cache = model(ids, use_cache=True).cache
    addresses = [layer.keys.data_ptr() for layer in cache.cross]
    for _ in range(3):
        cache = model(ids[:, :1], cache=cache).cache
    assert [layer.keys.data_ptr() for layer in cache.cross] == addresses


def test_generate_tells_the_cache_how_long_the_text_may_become() -> None:
    model, ids = composed_model("llama"), prompts()
    outputs = model.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert {layer.room for layer in outputs.cache.cross} == {14}


@torch.no_grad()
def test_compiled_steps_append_in_place_without_compiling_again() -> None:
    torch.compiler.reset()
    layer = CrossAttention(8, 4, HEADS)
    torch.nn.init.normal_(layer.o_proj.weight)
    counter = CompileCounterWithBackend("aot_eager")  # its passes must keep the writes
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    hidden, augmenter = torch.randn(2, 1, 8), torch.randn(2, 1, 4)
    cache, other, addresses = CrossLayer(), DynamicLayer(), set()
    for _ in range(20):
        got, want = compiled(hidden, augmenter, cache=cache), layer(hidden, augmenter, cache=other)
        torch.testing.assert_close(got, want)
        addresses.add(cache.keys.data_ptr())
    assert len(addresses) == 1 and counter.frame_count <= 3  # the first step, then steps of any length
