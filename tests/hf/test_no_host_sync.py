"""A composition's forward never waits for a GPU: no value of a tensor is read, and refusals happen on the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import FAMILIES, composed_model, left_padded, prompts, randomize
from unread import FakeCuda, NoReading, values_unread

from calm_fast.hf import ComposedForCausalLM, compose
from calm_fast.hf.cache_names import generate_argument

LEFT, RIGHT, HOLE, FULL = (
    [0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0, 1], [1] * 9,
)  # fmt: skip
CLOSE = {"rtol": 0, "atol": 2e-5}


def of_two_augmenters(check: bool = True) -> ComposedForCausalLM:
    """Return an anchor with two augmenters, whose attention does not read masks (transformers' SDPA does)."""
    sizes = ("llama", 32), ("llama", 16), ("gpt2", 32)
    parts = [FAMILIES[name].model(seed, width, depth=2) for seed, (name, width) in enumerate(sizes)]
    for part in parts:
        part.set_attn_implementation("eager")
    return compose(parts[0], parts[1:], [(-1, -1), (1, 0)], probe=check)


def longer(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else torch.cat([mask, mask[:, -1:] * 0 + 1], dim=1)


@torch.no_grad()
def test_no_value_of_a_fake_cuda_tensor_is_read() -> None:
    with FakeCuda():
        model = of_two_augmenters(check=False)
        ids = torch.ones(2, 9, dtype=torch.int64)
        for mask in (None, torch.ones(2, 9, dtype=torch.int64)):
            outputs, seen = model(ids, attention_mask=mask), mask
            for _ in range(3):
                seen = longer(seen)
                outputs = model(ids[:, :1], attention_mask=seen, cache=outputs.cache)
            assert outputs.logits.is_cuda and outputs.cache.get_seq_length() == 12
            assert model.train()(ids, attention_mask=mask, labels=ids).loss.is_cuda
            model.eval()


@pytest.mark.gpu
@pytest.mark.parametrize("padding", ["all ones", "left"])  # without a mask, GPT-2 itself reads the ids
def test_no_forward_synchronises_a_gpu(padding: str) -> None:
    model, ids = randomize(of_two_augmenters()).cuda(), prompts().cuda()
    mask = left_padded(ids, 4 if padding == "left" else 0)[1]

    def run() -> None:
        with torch.no_grad():
            outputs, seen = model(ids, attention_mask=mask, use_cache=True), mask
            for _ in range(3):
                seen = longer(seen)
                outputs = model(ids[:, :1], attention_mask=seen, cache=outputs.cache)
        model.train()(ids, attention_mask=mask, labels=ids).loss.backward()
        model.eval()

    run()  # compiles kernels, and copies constants to the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("use_cache", [True, None])
@pytest.mark.parametrize("rows", [[FULL, FULL], [LEFT, FULL], [RIGHT, LEFT], [LEFT]])
@torch.no_grad()
def test_unread_masks_give_what_read_ones_give(rows: list[list[int]], use_cache: bool | None) -> None:
    model, mask = randomize(of_two_augmenters()), torch.tensor(rows)
    ids = prompts(len(rows))
    want = model(ids, attention_mask=mask, use_cache=use_cache)
    with values_unread(), NoReading():
        got = model(ids, attention_mask=mask, use_cache=use_cache)
    real = mask.bool()
    torch.testing.assert_close(got.logits[real], want.logits[real], **CLOSE)
    if RIGHT in rows:
        return  # such a text does not go on
    mask, step = longer(mask), ids[:, :1]
    want = model(step, attention_mask=mask, cache=want.cache)
    with values_unread(), NoReading():
        got = model(step, attention_mask=mask, cache=got.cache)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)


def test_an_unread_hole_is_skipped_in_training() -> None:
    model, mask = randomize(of_two_augmenters()).train(), torch.tensor([HOLE, LEFT, FULL])
    ids, gradients = prompts(3), []
    labels = ids.masked_fill((mask == 0) | (mask == 0).roll(1, 1), -100)
    for unread in (False, True):
        model.zero_grad()
        given = {"attention_mask": mask, "labels": labels}
        if unread:
            with values_unread(), NoReading():
                loss = model(ids, **given).loss
        else:
            loss = model(ids, **given).loss
        loss.backward()
        gradients.append([p.grad.clone() for p in model.connections.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_unread_hole_with_a_default_cache_is_skipped_and_the_cache_does_not_go_on() -> None:
    model, mask, ids = randomize(of_two_augmenters()), torch.tensor([HOLE, LEFT]), prompts()
    want, real = model(ids, attention_mask=mask), mask.bool()
    with values_unread(), NoReading():
        got = model(ids, attention_mask=mask)
    torch.testing.assert_close(got.logits[real], want.logits[real], **CLOSE)
    with values_unread(), NoReading():
        with pytest.raises(RuntimeError, match="`attention_mask` must be one block of ones per row"):
            model(ids[:, :1], attention_mask=longer(mask), cache=got.cache)


@pytest.mark.parametrize(
    ("mask", "use_cache", "message"),
    [
        ([HOLE], True, "`attention_mask` must be one block of ones per row"),
        ([[1, 1, 2, 2, 2, 1, 1, 1, 1]], True, "`attention_mask` must be 0 for padding and 1"),
        ([[1, 1, 2, 2, 2, 1, 1, 1, 1]], False, "`attention_mask` must be 0 for padding and 1"),
    ],
)
@torch.no_grad()
def test_a_bad_mask_is_refused_on_the_device(mask: list[list[int]], use_cache: bool, message: str) -> None:
    model, ids, mask = of_two_augmenters(), prompts(1), torch.tensor(mask)
    with values_unread(), NoReading(), pytest.raises(RuntimeError, match=message):
        model(ids, attention_mask=mask, use_cache=use_cache)


@torch.no_grad()
def test_unread_padding_goes_on_with_a_mask_only() -> None:
    model, ids = composed_model("llama"), prompts(1)  # GPT-2 itself reads ids that come without a mask
    with values_unread():
        full = model(ids, attention_mask=torch.tensor([FULL])).cache
        padded = model(ids, attention_mask=torch.tensor([LEFT])).cache
        with NoReading():
            model(ids[:, :1], cache=full)
            with pytest.raises(RuntimeError, match="`attention_mask` must be given in every call with this cache"):
                model(ids[:, :1], cache=padded)


@torch.no_grad()
def test_unread_positions_keep_documents_apart_or_are_refused() -> None:
    ids, packed = prompts(1), torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5]])
    model, mixing = composed_model("llama"), composed_model("opt")
    want = model(ids, position_ids=packed).logits
    plain = mixing(ids, position_ids=torch.arange(9)[None], use_cache=False).logits
    with values_unread():
        got = model(ids, position_ids=packed)
        assert got.cache is None
        torch.testing.assert_close(got.logits, want, **CLOSE)
        again = mixing(ids, position_ids=torch.arange(9)[None]).logits
        torch.testing.assert_close(again, plain, **CLOSE)
        with pytest.raises(RuntimeError, match="`position_ids` must be positions that do not restart"):
            mixing(ids, position_ids=packed)


@torch.no_grad()
def test_generate_does_not_pass_on_a_mask_without_padding() -> None:
    model, ids = composed_model("llama"), prompts()
    seen: list[Any] = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("attention_mask")), with_kwargs=True
    )
    how = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(ids)
    want = model.generate(ids, attention_mask=mask, **how, use_cache=False)
    seen.clear()
    outputs = model.generate(ids, attention_mask=mask, **how, return_dict_in_generate=True)
    assert torch.equal(outputs.sequences, want) and seen == [None] * 4
    seen.clear()
    # the same cache goes on by hand, where a mask means what it says
    mask = torch.ones(2, 13, dtype=torch.int64)
    prepared = model.prepare_inputs_for_generation(
        outputs.sequences, next_sequence_length=1, attention_mask=mask, **{generate_argument(): outputs.cache}
    )
    assert prepared["attention_mask"] is not None
    rows, mask = left_padded(ids)
    model.generate(rows, attention_mask=mask, **how)
    assert all(mask is not None for mask in seen)
    handle.remove()
