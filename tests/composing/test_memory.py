"""The memory that is announced: counts without loading, and a bound on what autograd really keeps."""

from __future__ import annotations

import pytest
import torch
from tiny import byte_level, save_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from calm_fast.composing.memory import activation_bytes, gib, names_of, weigh, weigh_composition
from calm_fast.hf import compose


def kept_bytes(model, rows: int, tokens: int) -> int:
    """Bytes of all storages that autograd saves in one forward with a loss, the parameters' left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # or the next tensor may get its address
        return tensor

    ids = torch.randint(5, 200, (rows, tokens))
    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))
    model.eval()
    return sum(seen.values())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_bound_holds_and_is_not_far_off(family, attention, tmp_path) -> None:
    tokenizer = byte_level()
    for seed, name in enumerate(("B", "A")):
        if family == "llama":
            save_model(tmp_path / name, tokenizer, seed, width=64, layers=4)
        else:
            config = GPT2Config(vocab_size=len(tokenizer), n_embd=64, n_layer=4, n_head=4, n_positions=128)
            GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
    options = {"attn_implementation": attention}
    parts = [AutoModelForCausalLM.from_pretrained(tmp_path / name, **options) for name in ("B", "A")]
    model = compose(*parts, connections="uniform:2", same_ids=True)
    for rows, tokens in ((2, 24), (1, 96)):
        kept, bound = kept_bytes(model, rows, tokens), activation_bytes(model, rows, tokens)
        assert kept <= bound <= 4 * kept, (kept, bound)
    if family == "llama":
        plain = activation_bytes(model, 1, 96)
        assert activation_bytes(model, 1, 96, checkpointing=True) < plain


def test_a_composition_is_counted_without_its_weights(anchor, sibling) -> None:
    counted = weigh(str(anchor), [str(sibling)], "bfloat16", connections="uniform:2")
    assert all(p.is_meta for p in counted.model.parameters())
    real = weigh_composition(compose(anchor, sibling, connections="uniform:2"), [str(anchor), str(sibling)])
    assert counted.trained == real.trained and counted.trained_bytes == real.trained_bytes == 4 * real.trained
    assert counted.parts[0].parameters == real.parts[0].parameters
    assert counted.parts[0].bytes * 2 == real.parts[0].bytes, "bfloat16 instead of float32"
    assert counted.training(2, 8, False) > counted.weights + 12 * counted.trained
    assert [line.split()[0] for line in counted.lines()] == ["B", "A", "A+B"]


def test_sizes_and_names_are_readable() -> None:
    assert gib(3 << 30) == "3.00 GiB" and gib(5 << 20) == "5.0 MiB"
    assert names_of(1) == ["A"] and names_of(2) == ["A1", "A2"]
