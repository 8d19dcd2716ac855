"""generate() with `stop_strings`, whose tokenizer transformers passes on to every step."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, VOCAB, randomize
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from calm_fast.hf import compose


def characters() -> PreTrainedTokenizerFast:
    """One token per printable ASCII character: 1 to 95; 0 and 96 are special."""
    letters = {chr(31 + i): i for i in range(1, 96)}
    words = Tokenizer(models.WordLevel({"<pad>": 0} | letters | {"<eos>": 96}, unk_token="<pad>"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Split(Regex("."), "isolated"), decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


@pytest.mark.parametrize("kind", ["causal", "encoder-decoder"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_text_ends_at_a_stop_string(kind: str, beams: int) -> None:
    torch.manual_seed(0)
    anchor = FAMILIES["llama"].model(0)
    if kind != "causal":
        t5 = T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                      decoder_start_token_id=0, initializer_factor=3.0)  # fmt: skip
        anchor = T5ForConditionalGeneration(t5).eval()
    model = randomize(compose(anchor, FAMILIES["llama"].model(1), connections=[(0, 0), (1, 1)])).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    how = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None, "pad_token_id": 0}
    free = model.generate(ids, **how)[0].tolist()
    begin = len(ids[0]) if kind == "causal" else 1
    stop = next(token for token in free[begin + 1 :] if 0 < token < 96)
    stopped = model.generate(ids, **how, stop_strings=[chr(31 + stop)], tokenizer=characters())[0].tolist()
    after = stopped[stopped.index(stop, begin) + 1 :] if stop in stopped[begin:] else []
    assert not any(after)  # padding; another beam may win, without the stop string
    if beams == 1:
        assert stopped == free[: free.index(stop, begin) + 1]
