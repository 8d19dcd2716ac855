"""Sampling and scoring of rationales with an augmenter that has another tokenizer."""

from __future__ import annotations

import pytest
import torch
from test_aligned_generation import how
from texts import aligned_model, rows, tokenizer

from calm_fast.consistency.sampling.prefix import PrefixReader
from calm_fast.consistency.sampling.sampler import PromptBatch, Sampling
from calm_fast.consistency.sampling.scoring import score_sequences

PROMPTS = ["the cat sat on", "der Hund und eine Katze", "a small"]


def ids_of(text: str) -> list[int]:
    return list(tokenizer("bytes")(text)["input_ids"])


@pytest.mark.seam(
    attach="`SelfConsistency` over models with different tokenizers",
    to="composition",
    result="works",
    why="a prompt is read once and forked with its aligner's state; it ends where generate's does",
)
def test_samples_of_a_shared_prompt_are_those_of_generate() -> None:
    model = aligned_model()
    model.generation_config.eos_token_id = None
    prompts = [ids_of(text) for text in PROMPTS]
    sampled = []
    for share in (True, False):
        batch = PromptBatch(PrefixReader(model, share), tokenizer("bytes"), prompts, Sampling(6, temperature=0))
        assert (batch.cache is not None) is share
        sampled.append(batch.sample([0, 1, 2, 1], [0, 0, 0, 1], seed=5))
    assert [sample.tokens for sample in sampled[0]] == [sample.tokens for sample in sampled[1]]
    for prompt, sample in zip(prompts, sampled[0], strict=False):
        alone = model.generate(
            torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None, use_cache=False
        )
        assert sample.tokens == alone[0, len(prompt) :].tolist()
        (scores,) = score_sequences(model, [prompt], [[sample.tokens]])
        assert float(scores.sum[0]) == pytest.approx(sample.logprob, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_scores_of_completions_are_those_of_one_forward(share: bool) -> None:
    model, prompt = aligned_model(), ids_of(PROMPTS[0])
    completions = [ids_of(text) for text in (" the mat and", " one", " der Hund läuft über")]
    (scores,) = score_sequences(model, [prompt], [completions], share_prompt=share)
    for completion, got in zip(completions, scores.sum.tolist(), strict=True):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logits = model(ids, prompt_length=len(prompt), use_cache=False).logits[0, len(prompt) - 1 : -1]
        want = logits.float().log_softmax(-1).gather(1, torch.tensor(completion)[:, None]).sum()
        assert got == pytest.approx(float(want), rel=1e-4, abs=1e-3)


def test_a_generation_of_words_uses_them_all() -> None:
    """The other tests' texts are no single words: `how` makes them of several."""
    text = tokenizer("bytes").decode(aligned_model().generate(rows(PROMPTS[0])[0], **how(new=24))[0])
    assert len(text.split()) > len(PROMPTS[0].split()) + 1
