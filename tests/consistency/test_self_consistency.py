"""SelfConsistency from question to vote: prompts read once, reproducible samples, early stopping, ready samples."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import ranker_models
import torch
from self_consistency_setup import QUESTIONS, REFERENCES, consistency
from tiny_models import EOS, FAMILIES, OTHERS, PAD, VOCAB, character_tokenizer, composed_model, dual_lora_model, rows

from calm_fast import SelfConsistency, score_sequences
from calm_fast.consistency import Ranker, extract_answer, leader_probability
from calm_fast.consistency.sampling.prefix import PrefixReader
from calm_fast.consistency.sampling.prompt import prompt_form
from calm_fast.consistency.sampling.sampler import PromptBatch, Sampling, _Draw
from calm_fast.core.eval_mode import eval_mode

PROMPTS = rows(9, 1, 13)


class Lengths:
    """A ranker by length: deterministic, in (0, 1)."""

    def score(self, questions: list[str], rationales: list[list[str]]) -> list[torch.Tensor]:
        return [torch.tensor([1 / (2 + len(text)) for text in group]) for group in rationales]


def drawn(model: Any, prompts: list[list[int]], count: int, settings: Sampling, seed: int = 5) -> list[list[Any]]:
    """`count` samples of every prompt, all at once."""
    with eval_mode(model):
        source = PromptBatch(PrefixReader(model), character_tokenizer(), prompts, settings)
        wanted = [(q, j) for q in range(len(prompts)) for j in range(count)]
        found = source.sample(*zip(*wanted, strict=True), seed)
    return [found[q * count : (q + 1) * count] for q in range(len(prompts))]


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS, "dual LoRA", "composed llama", "composed gemma3_text"])
def test_samples_do_not_depend_on_their_neighbours_and_their_scores_are_the_models(name: str) -> None:
    if name == "dual LoRA":
        model = dual_lora_model()
    else:
        composed = name.removeprefix("composed ")
        model = composed_model(composed) if composed != name else {**FAMILIES, **OTHERS}[name].model(0)
    reader = PrefixReader(model)
    prompts = PROMPTS if reader.signature is not None else PROMPTS[:1]  # no padding without a Cache
    settings = Sampling(max_new_tokens=8, temperature=2.0, top_k=40, top_p=0.95)
    seen: list[int] = []
    handle = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0].numel()))
    together = drawn(model, prompts, 3, settings)
    handle.remove()
    if reader.shares:  # every prompt once without its last token; each sample reads that, and all of its own but one
        assert seen == [3 * 12, *[9] * 8]
    assert len({tuple(sample.tokens) for group in together for sample in group}) == 3 * len(prompts)
    for prompt, group in zip(prompts, together, strict=True):
        alone = drawn(model, [prompt], 1, settings)[0]
        assert alone[0].tokens == group[0].tokens
        scores = score_sequences(model, [prompt], [[sample.tokens for sample in group]])[0]
        torch.testing.assert_close(
            torch.tensor([s.logprob for s in group], dtype=torch.float64), scores.sum, rtol=1e-5, atol=2e-4
        )


def test_samples_follow_the_models_distribution() -> None:
    model, count = FAMILIES["llama"].model(0), 3000
    with torch.no_grad():
        logits = model(torch.tensor([PROMPTS[0]])).logits[0, -1].double()
    found = Counter(s.tokens[0] for s in drawn(model, PROMPTS[:1], count, Sampling(1, temperature=0.7))[0])
    p = (logits / 0.7).softmax(-1)
    seen = torch.tensor([found[v] for v in range(VOCAB)], dtype=torch.float64)
    likely = p * count >= 5
    terms = (seen - p * count).square() / (p * count)
    rest = float((seen[~likely].sum() - count * p[~likely].sum()).square() / (count * p[~likely].sum()))
    freedom = int(likely.sum())
    assert freedom > 5 and float(terms[likely].sum()) + rest < freedom + 5 * math.sqrt(2 * freedom)  # chi-square
    cut = Counter(s.tokens[0] for s in drawn(model, PROMPTS[:1], 500, Sampling(1, temperature=0.7, top_k=4))[0])
    assert set(cut) == set(logits.topk(4).indices.tolist())
    nucleus = drawn(model, PROMPTS[:1], 500, Sampling(1, temperature=0.7, top_p=0.5))[0]
    ordered = p.sort(descending=True)
    inside = ordered.indices[: 1 + int((ordered.values.cumsum(0) < 0.5).sum())]
    assert {s.tokens[0] for s in nucleus} == set(inside.tolist())


@pytest.mark.parametrize(("number", "token"), [(0.0, 1), (0.25, 3), (0.4, 3), (1 - 2**-53, 4)])
def test_the_extreme_numbers_choose_tokens_that_have_probability(number: float, token: int) -> None:
    logits = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]]).log()
    logits[:, 0] = -50.0  # cut by top_k, as tokens 2 and 5 are
    draw = _Draw(Sampling(1, temperature=1.0, top_k=3), torch.tensor([[number]], dtype=torch.float64), 2)
    assert draw(torch.zeros(1, 2, dtype=torch.int64), logits).argmax(-1).tolist() == [token]
    assert float(draw.logprobs[0]) == pytest.approx(math.log(0.5 if token == 4 else 0.25), abs=1e-6)


def test_temperature_zero_is_greedy_and_the_models_own_sampling_settings_take_no_part() -> None:
    model = FAMILIES["qwen3"].model(0)
    greedy = model.generate(torch.tensor(PROMPTS[:1]), max_new_tokens=10, do_sample=False)[0, 9:].tolist()
    model.generation_config.update(do_sample=True, temperature=3.0, repetition_penalty=5.0, num_beams=4)
    (samples,) = drawn(model, PROMPTS[:1], 2, Sampling(10, temperature=0))
    assert [s.tokens for s in samples] == [greedy, greedy]


def test_a_sample_ends_at_its_end_token_or_stop_string() -> None:
    model, tokenizer = FAMILIES["llama"].model(0), character_tokenizer()
    with torch.no_grad():
        model.lm_head.weight[EOS] = 0.0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCAB))
        model.lm_head.bias[EOS] = 4.0
    samples = [s for group in drawn(model, PROMPTS, 8, Sampling(40)) for s in group]
    ended = [s for s in samples if s.finished]
    assert 2 < len(ended) and all(s.tokens.count(EOS) == 1 and s.tokens[-1] == EOS for s in ended)
    assert all(EOS not in s.tokens and len(s.tokens) == 40 for s in samples if not s.finished)
    stop = tokenizer.decode(next(s.tokens for s in samples if len(s.tokens) > 4)[2:4])
    stopped = [s for group in drawn(model, PROMPTS, 8, Sampling(40, stop=(stop,))) for s in group]
    texts = [tokenizer.decode(s.tokens) for s in stopped]
    assert any(text.endswith(stop) for text in texts) and all(stop not in text[:-1] for text in texts)
    for long, short in zip(samples, stopped, strict=True):
        assert long.tokens[: len(short.tokens)] == short.tokens
    result = consistency(model, stop=(stop,), n=16, temperature=0.7)(QUESTIONS[:2])
    assert not any(stop in text or "<eos>" in text for r in result for text in r.rationales)


@pytest.mark.parametrize("rule", ["count", "weighted", "adaptive"])
@pytest.mark.parametrize("ranker", [None, Lengths()], ids=["likelihood", "ranker"])
def test_the_vote_is_what_its_parts_say(rule: str, ranker: Any) -> None:
    results = consistency(rule=rule, ranker=ranker, lam=0.5)(QUESTIONS, REFERENCES)
    assert [r.question for r in results] == QUESTIONS and [r.reference for r in results] == REFERENCES
    for r in results:
        assert len(r.rationales) == len(r.answers) == len(r.scores) == 6
        assert r.answers == [extract_answer(text, r"\d") for text in r.rationales]
        if ranker is not None:
            assert r.scores == ranker.score([], [r.rationales])[0].tolist()
        weigh = {"count": lambda s: 1.0, "weighted": lambda s: s, "adaptive": lambda s: 1 + 0.5 * s}[rule]
        weights: dict[str, float] = {}
        for answer, score in zip(r.answers, r.scores, strict=True):
            if answer is not None:
                weights[answer] = weights.get(answer, 0.0) + weigh(score)
        if not weights:
            assert r.answer is None and r.ties == 0 and r.credit in (None, 0.0)
            continue
        top = [answer for answer, weight in weights.items() if max(weights.values()) - weight < 1e-9]
        assert r.answer == top[0] and r.ties == len(top) and r.weight == pytest.approx(weights[top[0]])
        assert r.total == pytest.approx(sum(weights.values()))
        gold = {None: None, "\\boxed{71}": "71"}.get(r.reference, r.reference)
        assert r.credit == (None if gold is None else float(gold in top) / len(top))
    assert len({r.answer for r in results}) > 1  # the model says something


def test_likelihood_scores_are_those_of_score_sequences() -> None:
    model, tokenizer = FAMILIES["llama"].model(0), character_tokenizer()
    run = SelfConsistency(model, tokenizer, n=4, max_new_tokens=9, progress=False)
    results = run(QUESTIONS)
    # texts that hold every token: the others lost an end token or padding
    complete = [[k for k, text in enumerate(r.rationales) if len(text) == 9] for r in results]
    assert sum(map(len, complete)) > 16
    texts = [[r.rationales[k] for k in kept] for r, kept in zip(results, complete, strict=True)]
    scored = score_sequences(model, [f"{question}\n" for question in QUESTIONS], texts, tokenizer=tokenizer)
    for r, kept, scores in zip(results, complete, scored, strict=True):
        assert [r.scores[k] for k in kept] == pytest.approx(scores.mean.exp().tolist(), rel=1e-4)


def test_neither_batches_nor_rounds_change_a_sample() -> None:
    expected = consistency()(QUESTIONS, REFERENCES)
    for changes in ({"batch_size": 1}, {"batch_size": 5, "round_size": 4}, {"round_size": 1, "batch_size": 64}):
        assert [r.rationales for r in consistency(**changes)(QUESTIONS)] == [r.rationales for r in expected]
    fewer = consistency(n=2)(QUESTIONS[::-1])[::-1]
    assert [r.rationales for r in fewer] == [r.rationales[:2] for r in expected]
    other = consistency(seed=1)(QUESTIONS[:1])
    assert not set(other[0].rationales) & set(expected[0].rationales)


def test_sampling_stops_once_the_leader_is_sure() -> None:
    full = consistency(n=12)(QUESTIONS)
    early = consistency(n=12, confidence=0.8, round_size=2)(QUESTIONS)
    lengths = [len(r.rationales) for r in early]
    assert min(lengths) < 12 and len(set(lengths)) > 1
    for whole, part, length in zip(full, early, lengths, strict=True):
        assert part.rationales == whole.rationales[:length]
        for seen in range(2, length + 1, 2):
            counts = [c for _, c in Counter(a for a in whole.answers[:seen] if a is not None).most_common()] + [0, 0]
            sure = float(leader_probability(torch.tensor(counts[0]), torch.tensor(counts[1])))
            assert (sure >= 0.8 and counts[0] > 0) == (seen == length) or seen == 12


@pytest.mark.parametrize("name", ["composed llama", "dual LoRA", "mamba", "rwkv"])
def test_every_kind_of_model_is_sampled_to_a_vote(name: str) -> None:
    made = {"composed llama": lambda: composed_model("llama"), "dual LoRA": dual_lora_model}
    model = made[name]() if name in made else OTHERS[name].model(0)
    results = consistency(model, n=3, max_new_tokens=12)(QUESTIONS[:3])
    assert all(len(r.rationales) == 3 and r.credit is None for r in results)
    assert any(r.answer is not None for r in results)


def test_prompts_come_from_a_template_a_function_or_the_chat_template() -> None:
    asked = QUESTIONS[:2]
    plain = consistency(n=2)([f"Q: {q}\nA:" for q in asked])
    for prompt in ("Q: {question}\nA:", lambda question: f"Q: {question}\nA:"):
        assert [r.rationales for r in consistency(n=2, prompt=prompt)(asked)] == [r.rationales for r in plain]
    run = consistency(n=2)
    run.tokenizer.chat_template = "{% for m in messages %}{{ 'Q: ' + m['content'] }}{% endfor %}\n{{ '\nA:' }}"
    run.form = prompt_form(None, run.tokenizer, "SelfConsistency")
    assert [r.rationales for r in run(asked)] == [r.rationales for r in plain]


ROWS = [
    {"question": "1+1?", "answer": "2", "generated_answer": ["\\boxed{2}", "\\boxed{3}", "\\boxed{2.0}", "none"]},
    {"question": "1+2?", "answer": "3", "generated_answer": ["\\boxed{2}", "\\boxed{3}"]},
    {"question": "1+3?", "generated_answer": []},
]


def test_ready_samples_from_rows_and_files(tmp_path) -> None:
    run = SelfConsistency(rule="count", progress=False)
    first, second, third = run.from_samples(ROWS)
    assert (first.answer, first.weight, first.total, first.ties, first.credit) == ("2", 2.0, 3.0, 1, 1.0)
    assert (second.answer, second.ties, second.credit) == ("2", 2, 0.5)  # a tie shares its credit
    assert (third.answer, third.ties, third.credit) == (None, 0, None)
    bare = run.from_samples([{**ROWS[0], "answer": 2}])[0]  # a number is an answer too
    assert (bare.reference, bare.credit) == ("2", 1.0)
    scored = [{**row, "scores": [0.1, 0.9, None, float("nan")][: len(row["generated_answer"])]} for row in ROWS]
    adaptive = SelfConsistency(progress=False).from_samples(scored)
    assert adaptive[0].weight == pytest.approx(1.1 + 1.5)  # a sample without score takes the mean of the others
    assert (adaptive[1].answer, adaptive[1].credit) == ("3", 1.0)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r.to_row()) + "\n" for r in adaptive))
    assert SelfConsistency(progress=False).from_samples(file) == adaptive
    ranked = SelfConsistency(ranker=Lengths(), progress=False).from_samples(scored)
    assert ranked[1].scores == pytest.approx([1 / 11, 1 / 11])


def test_ready_samples_are_scored_by_the_model_where_nothing_else_is_given() -> None:
    run = consistency()
    got = run.from_samples(ROWS)
    ids = run.tokenizer(ROWS[0]["question"])["input_ids"]
    texts = [run.tokenizer(text)["input_ids"] for text in ROWS[0]["generated_answer"]]
    assert got[0].scores == pytest.approx(score_sequences(run.model, [ids], [texts])[0].mean.exp().tolist())
    with pytest.raises(
        ValueError,
        match="`rule` must be 'count' without scores, got 'adaptive', and row 0",
    ):
        SelfConsistency(progress=False).from_samples(ROWS)


def test_a_ranker_weights_the_vote_and_belongs_to_the_settings(tmp_path) -> None:
    tokenizer = ranker_models.tokenizer("bert")
    rankers = [
        Ranker.from_backbone(ranker_models.backbone("bert", len(tokenizer), seed), tokenizer, seed=seed).eval()
        for seed in (0, 1)
    ]
    rows = [*ROWS, {"question": "", "generated_answer": ["", "\\boxed{4}"]}]  # nothing to read still gets a score
    out = tmp_path / "votes.jsonl"
    results = SelfConsistency(ranker=rankers[0], progress=False).from_samples(rows, out=out)
    for r in results:
        expected = rankers[0].score([r.question], [r.rationales])[0].tolist()
        assert r.scores == pytest.approx(expected, abs=1e-6) and all(0 < score < 1 for score in r.scores)
    assert results[0].weight == pytest.approx(2 + results[0].scores[0] + results[0].scores[2])
    assert consistency(ranker=rankers[0])(QUESTIONS[:1])[0].scores != consistency()(QUESTIONS[:1])[0].scores
    with pytest.raises(ValueError, match="other settings .*ranker: 'Ranker "):
        SelfConsistency(ranker=rankers[1], progress=False).from_samples(rows, out=out)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, TypeError, "`model` must be a transformers model, got Linear"),
        ({"tokenizer": None}, ValueError, "`model` and `tokenizer` must be given together"),
        ({"ranker": len}, TypeError, r"`ranker` must have score\(questions, rationales\)"),
        ({"rule": "best"}, ValueError, "`rule` must be 'count', 'weighted' or 'adaptive', got 'best'"),
        ({"n": 0}, ValueError, "`n` must be a positive integer, got 0"),
        ({"batch_size": 2.0}, ValueError, "`batch_size` must be a positive integer"),
        ({"confidence": 0.5}, ValueError, "`confidence` must be above 1/2"),
        ({"prompt": "Q:"}, ValueError, "`prompt` must have {question} in it"),
        ({"prompt": 3}, TypeError, "`prompt` must be a string, a callable, .*, got int 3"),
        ({"confidence": "high"}, TypeError, "`confidence` must be a finite number, got str"),
        ({"lam": float("nan")}, ValueError, "`lam` must be finite, got nan"),
        ({"seed": 1.5}, TypeError, "`seed` must be an integer, got float 1.5"),
        ({"pattern": "("}, ValueError, "`pattern` must be a regular expression"),
        ({"equality": "same"}, ValueError, "`equality` must be one of .*, got 'same'"),
        ({"grouping": {"timeout": 0}}, ValueError, "`timeout` must be a positive number of seconds, got 0"),
        ({"grouping": {"gold": ["1"]}}, TypeError, "gold"),
        ({"temperature": -1}, ValueError, "`temperature` must be at least 0, got -1"),
        ({"top_p": 0}, ValueError, "`top_p` must be above 0 and at most 1, or None, got 0"),
        ({"top_p": "0.9"}, TypeError, "`top_p` must be a finite number, got str"),
        ({"top_k": 1.5}, ValueError, "`top_k` must be a positive integer or None, got 1.5"),
        ({"max_new_tokens": 0}, ValueError, "`max_new_tokens` must be a positive integer, got 0"),
        ({"max_new_tokens": True}, TypeError, "`max_new_tokens` must be a finite number, got bool"),
        ({"stop": "###"}, TypeError, "`stop` must be a sequence of strings, none of them empty, got str '###'"),
        ({"stop": [""]}, TypeError, "`stop` must be a sequence of strings"),
        ({"max_tokens": 3}, TypeError, "^SelfConsistency: unknown option max_tokens; .*: max_new_tokens, temperature"),
    ],
)
def test_bad_settings_are_named(change: dict[str, Any], kind: type, message: str) -> None:
    arguments = {"model": FAMILIES["llama"].model(0), "tokenizer": character_tokenizer()} | change
    with pytest.raises(kind, match=message):
        SelfConsistency(**arguments)


def test_bad_questions_and_rows_are_named() -> None:
    with pytest.raises(ValueError, match=r"`references` must have one entry for each of 2 questions, got 1"):
        consistency()(QUESTIONS[:2], ["3"])
    for wrong, got in (("1+2?", r"str '1\+2\?'"), (None, "NoneType None"), ({"1+2?": "3"}, "dict .*"), (3, "int 3")):
        with pytest.raises(TypeError, match=f"`questions` must be a sequence of strings, got {got}"):
            consistency()(wrong)
    with pytest.raises(TypeError, match=r"`questions\[1\]` must be a string, got int 3"):
        consistency()(["1+2?", 3])
    with pytest.raises(ValueError, match="`prompt` must have tokens for every question, got none for ''"):
        consistency()([""])
    with pytest.raises(ValueError, match="`model` and `tokenizer` must be given to sample"):
        SelfConsistency(progress=False)(QUESTIONS)
    ready = SelfConsistency(progress=False).from_samples
    with pytest.raises(ValueError, match="row 0: `generated_answer` must be a list of strings, got str"):
        ready([{"question": "x", "generated_answer": "y"}])
    with pytest.raises(ValueError, match="row 0: `answer` must be a string or a finite number, got a list of int"):
        ready([{**ROWS[0], "answer": [2]}])
    with pytest.raises(ValueError, match="row 0: `scores` must be a list of 4 numbers, .* got 1 values"):
        ready([{**ROWS[0], "scores": [1.0]}])
    for wrong in ("a", float("inf")):
        with pytest.raises(ValueError, match=r"row 1: `scores\[1\]` must be a finite number or null, got "):
            ready([ROWS[2], {**ROWS[1], "scores": [1.0, wrong]}])


class Says:
    """A ranker that returns fixed scores."""

    def __init__(self, *scores: Any) -> None:
        self.scores = scores

    def score(self, questions: Any, rationales: Any) -> Any:
        return self.scores


def test_a_ranker_gives_every_sample_its_score_or_none(tmp_path) -> None:
    for wrong in ([0.1], [0.1, 0.2, 0.3]):
        with pytest.raises(
            ValueError, match=r"`ranker` must return from score\(\) one number for each sample, \[2\], got"
        ):
            SelfConsistency(ranker=Says(torch.tensor(wrong)), progress=False).from_samples(ROWS[1:2])
    unsure = SelfConsistency(ranker=Says(torch.tensor([float("nan"), 0.5])), progress=False)
    result = unsure.from_samples(ROWS[1:2], out=tmp_path / "votes.jsonl")[0]  # JSON knows no NaN
    assert result.scores == [None, 0.5] and result.total == 3.0


def test_modes_are_left_as_they_were_and_padding_is_no_token_of_the_prompt() -> None:
    model = FAMILIES["llama"].model(0).train()
    results = consistency(model)(["1+2?", "1+2? and more"])
    assert model.training and PAD not in character_tokenizer()("1+2?")["input_ids"]
    assert [r.rationales for r in results[:1]] == [r.rationales for r in consistency()(["1+2?"])]


def test_half_a_character_in_a_question_is_named() -> None:
    with pytest.raises(ValueError, match=r"SelfConsistency: `questions\[1\]` must be text, got half a character"):
        consistency()(["what ?", "what \ud83d ?"])
