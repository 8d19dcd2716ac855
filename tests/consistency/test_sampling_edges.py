"""Where samples end, when sampling stops exactly, and ties of a vote with samples that say nothing."""

from __future__ import annotations

import pytest
import torch
from self_consistency_setup import QUESTIONS, consistency
from tiny_models import EOS, FAMILIES, VOCAB, character_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from calm_fast import SelfConsistency, score_sequences
from calm_fast.consistency.sampling.padding import leaves_padding_out
from calm_fast.consistency.sampling.prefix import PrefixReader
from calm_fast.consistency.sampling.sampler import PromptBatch, Sample, Sampling
from calm_fast.core.eval_mode import eval_mode

LAYERS = {"encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}


def model_that_ends(*tokens: int):
    """A model that often says one of `tokens`."""
    model = FAMILIES["llama"].model(0)
    with torch.no_grad():
        model.lm_head.weight[list(tokens)] = 0.0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
        model.lm_head.bias[list(tokens)] = 4.0
    return model


def drawn(model, tokenizer, prompt, count, settings):
    with eval_mode(model):
        source = PromptBatch(PrefixReader(model), tokenizer, [prompt], settings)
        return source.sample([0] * count, range(count), 3)


def test_padding_with_the_end_token_is_not_part_of_a_sample() -> None:
    """Without a padding token, rows that have ended are filled with end tokens while others go on."""
    model, tokenizer = model_that_ends(EOS), character_tokenizer()
    prompt = tokenizer("1+2?")["input_ids"]
    usual = drawn(model, tokenizer, prompt, 8, Sampling(40))
    tokenizer.pad_token = None
    samples = drawn(model, tokenizer, prompt, 8, Sampling(40))
    assert samples == usual and len({len(s.tokens) for s in samples if s.finished}) > 2
    assert all(s.tokens.count(EOS) == 1 and s.tokens[-1] == EOS for s in samples if s.finished)


def test_the_models_own_end_tokens_end_a_sample_and_are_not_in_its_text() -> None:
    """Chat models end with tokens that their tokenizer does not count as special, or not as its end token."""
    tokenizer = character_tokenizer()
    (end,) = tokenizer("#")["input_ids"]
    model = model_that_ends(end)
    model.generation_config.eos_token_id = [EOS, end]
    samples = drawn(model, tokenizer, tokenizer("1+2?")["input_ids"], 8, Sampling(40))
    assert all(s.tokens.count(end) == 1 and s.tokens[-1] == end for s in samples if s.finished and EOS not in s.tokens)
    results = SelfConsistency(model, tokenizer, n=8, max_new_tokens=40, progress=False)(QUESTIONS[:2])
    texts = [text for r in results for text in r.rationales]
    assert min(map(len, texts)) < 10 and not any("#" in text for text in texts)


def test_a_text_ends_at_its_first_stop_string() -> None:
    """A token may hold more than the stop string that it completes."""
    run = consistency(stop=("##", "!"))
    sample = Sample(run.tokenizer("7##8!9##")["input_ids"], 0.0, True)
    assert run._text(sample, [EOS]) == "7"
    assert run._text(Sample([*run.tokenizer("7!")["input_ids"], EOS], 0.0, True), [EOS]) == "7"


def test_temperature_zero_ignores_the_cuts_and_its_scores_are_the_models() -> None:
    model, tokenizer = FAMILIES["llama"].model(0), character_tokenizer()
    prompt = tokenizer("1+2?")["input_ids"]
    plain, cut = (drawn(model, tokenizer, prompt, 2, Sampling(9, temperature=0, **o)) for o in ({}, {"top_k": 1}))
    assert len({tuple(sample.tokens) for sample in (*plain, *cut)}) == 1
    # rows of a batch may round differently
    assert [sample.logprob for sample in (*plain, *cut)] == pytest.approx([plain[0].logprob] * 4, abs=1e-4)
    scores = score_sequences(model, [prompt], [[plain[0].tokens]])[0]
    assert plain[0].logprob == pytest.approx(float(scores.sum[0]), abs=1e-4) and plain[0].logprob < -1


def test_sampling_stops_where_the_confidence_is_reached_exactly() -> None:
    """One vote against none is 3/4 sure, two are 7/8: both are exact in binary."""
    full = consistency(n=12)(QUESTIONS)
    for confidence, votes in ((0.75, 1), (0.875, 2)):
        early = consistency(n=12, confidence=confidence, round_size=1)(QUESTIONS)
        for whole, part in zip(full, early, strict=True):
            said = [a for a in whole.answers if a is not None]
            if len(said) < votes or len(set(said[:votes])) > 1:
                continue
            assert [a for a in part.answers if a is not None] == said[:votes]
            assert part.answers[-1] is not None  # it stopped there and not later


def test_a_winner_is_named_by_a_sample_that_says_it() -> None:
    """A sample without an answer has the class number of the right one, and no voice."""
    row = {"question": "1+1?", "answer": "2", "generated_answer": ["nothing", "\\boxed{2.0}", "nothing"]}
    (result,) = SelfConsistency(rule="count", progress=False).from_samples([row])
    assert (result.answer, result.total, result.ties, result.credit) == ("2.0", 1.0, 1, 1.0)


@pytest.mark.parametrize("right", ["5", "7", "9"])
def test_a_tie_of_three_gives_each_a_third(right: str) -> None:
    samples = [f"\\boxed{{{n}}}" for n in (5, 7, 9, 7, 9, 5, 3)]
    row = {"question": "?", "answer": right, "generated_answer": ["?", *samples]}
    (result,) = SelfConsistency(rule="count", progress=False).from_samples([row])
    assert (result.answer, result.weight, result.margin, result.ties) == ("5", 2.0, 0.0, 3)
    assert result.credit == pytest.approx(1 / 3)


def test_credit_of_a_tie_by_scores_goes_with_the_samples_own_scores() -> None:
    """Right answer last, tied with another, behind a third that has little weight."""
    samples = ["\\boxed{3}", "\\boxed{5}", "\\boxed{7}"]
    row = {"question": "?", "answer": "7", "generated_answer": samples, "scores": [0.1, 0.5, 0.5]}
    for rule in ("weighted", "adaptive"):
        (result,) = SelfConsistency(rule=rule, progress=False).from_samples([row])
        assert (result.answer, result.ties, result.credit) == ("5", 2, 0.5)


@pytest.mark.parametrize("family", ["bart", "mbart"])
def test_models_that_would_count_padding_get_prompts_of_one_length(family: str, monkeypatch) -> None:
    """Their forward takes no positions, so left padding would move those of a prompt beside a longer one."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](
        vocab_size=VOCAB, d_model=16, max_position_embeddings=64, init_std=0.5, **LAYERS, **HEADS
    )
    config.is_decoder, config.is_encoder_decoder = True, False
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not leaves_padding_out(PrefixReader(model), character_tokenizer())
    batches, plain = [], PromptBatch.__init__

    def spy(self, reader, tokenizer, prompts, settings):
        batches.append([len(prompt) for prompt in prompts])
        plain(self, reader, tokenizer, prompts, settings)

    monkeypatch.setattr(PromptBatch, "__init__", spy)
    together = consistency(model, n=3, round_size=3, max_new_tokens=8)(QUESTIONS)
    assert all(len(set(batch)) == 1 for batch in batches) and len(batches) < len(QUESTIONS)
    assert [result.index for result in together] == list(range(len(QUESTIONS)))
    for question, result in zip(QUESTIONS, together, strict=True):
        (alone,) = consistency(model, n=3, round_size=3, max_new_tokens=8)([question])
        assert alone.rationales == result.rationales
    assert len({tuple(result.rationales) for result in together}) == len(QUESTIONS)  # samples that depend on the prompt


def test_a_stop_string_across_the_end_of_the_prompt_ends_nothing() -> None:
    tokenizer = character_tokenizer()
    (end,) = tokenizer("#")["input_ids"]
    model, prompt = model_that_ends(end), tokenizer("1+2?")["input_ids"]
    free = drawn(model, tokenizer, prompt, 8, Sampling(12))
    assert any(sample.tokens[0] == end for sample in free)  # "?#" would end them at their first token
    stopped = drawn(model, tokenizer, prompt, 8, Sampling(12, stop=("?#",)))
    for one, other in zip(free, stopped, strict=True):
        inside = tokenizer.decode(one.tokens).partition("?#")
        assert other.tokens == one.tokens[: len(other.tokens)]
        assert inside[1] or other == one
