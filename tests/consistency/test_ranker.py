"""The ranking model: input, scores, saving, errors for bad input."""

from __future__ import annotations

import pytest
import torch
from ranker_models import FAMILIES, backbone, rows, saved, tokenizer

from calm_fast.consistency import Ranker
from calm_fast.consistency.ranking.inputs import Encoded, PairEncoder, batches_by_length, mean_states
from calm_fast.core.fingerprint import model_fingerprint

QUESTIONS = ["what is 3 + 4 ?", "what is the sum ?", "what ?"]
RATIONALES = [["so surely the sum is 7", "maybe 8"], [], ["because the sum is the sum so it is 12", "", "7"]]


def ranker(family: str, **options) -> Ranker:
    tok = tokenizer(family)
    return Ranker.from_backbone(backbone(family, len(tok)), tok, max_length=48, **options).eval()


def words(family: str, encoded: Encoded) -> tuple[list[str], list[str]]:
    tok = tokenizer(family)
    return (
        tok.convert_ids_to_tokens(encoded.ids),
        tok.convert_ids_to_tokens(encoded.ids[encoded.start : encoded.stop]),
    )


@pytest.mark.parametrize(
    ("family", "first", "between", "last"),
    [("bert", "[CLS]", "[SEP]", "[SEP]"), ("t5", None, "</s>", "</s>"), ("llama", "<s>", "</s>", "</s>")],
)
def test_pair_is_question_then_rationale_with_the_tokens_of_the_family(family, first, between, last):
    [[pair]] = PairEncoder(tokenizer(family), 48)(["what is 3 ?"], [["so 3"]])
    expected = ["what", "is", "3", "?", between, "so", "3", last]
    assert words(family, pair) == (([first] if first else []) + expected, ["so", "3"])


def test_long_pairs_keep_the_ends_of_question_and_rationale():
    encode = PairEncoder(tokenizer("bert"), 19)  # a window of 16
    question, rationale = " ".join(map(str, range(20))), " ".join(map(str, reversed(range(20))))
    [[both, short]] = encode([question], [[rationale, "so 7"]])
    text, kept = words("bert", both)
    assert len(text) == 19 and kept == [str(i) for i in reversed(range(12))]
    assert text[1:5] == ["16", "17", "18", "19"]  # a quarter of the window stays the question's
    text, kept = words("bert", short)
    assert len(text) == 19 and kept == ["so", "7"] and text[1:15] == [str(i) for i in range(6, 20)]


def test_empty_rationale_reads_the_separator():
    [[empty]] = PairEncoder(tokenizer("bert"), 48)(["what ?"], [[""]])
    assert words("bert", empty)[1] == ["[SEP]"] and empty.stop - empty.start == 1


def test_batches_hold_every_sequence_once_within_the_token_budget():
    items = [Encoded(list(range(n)), 0, 1) for n in (3, 9, 1, 4, 4, 30, 2)]
    batches = list(batches_by_length(items, 12))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(len(items[i].ids) for i in batch) <= 12
    assert batches[0] == [5]  # too long for the budget, alone


@pytest.mark.parametrize("family", FAMILIES)
def test_features_are_the_mean_over_the_rationale_alone_whatever_the_padding(family):
    model = ranker(family)
    features = model.features(QUESTIONS, RATIONALES)
    assert [tuple(x.shape) for x in features] == [(2, 32), (0, 32), (3, 32)]
    for question, group, got in zip(QUESTIONS, RATIONALES, features, strict=True):
        for rationale, x in zip(group, got, strict=True):
            [[pair]] = model.encode([question], [[rationale]])
            extra = {"token_type_ids": torch.tensor([[0] * pair.start + [1] * (len(pair.ids) - pair.start)])}
            with torch.no_grad():  # one sequence, no padding, no mask
                alone = model.backbone(torch.tensor([pair.ids]), **(extra if family == "bert" else {}))
            expected = alone.last_hidden_state[0, pair.start : pair.stop].mean(0)
            torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_padded_positions_may_hold_anything():
    """A mean by product with the mask would let a NaN at a padded place through."""
    tok = tokenizer("bert")
    model = backbone("bert", len(tok))
    pairs = [p for group in PairEncoder(tok, 48)(QUESTIONS, RATIONALES) for p in group]
    expected = mean_states(model, pairs, tok.pad_token_id)
    lengths = torch.tensor([len(p.ids) for p in pairs])

    def poison(module, inputs, output):
        place = torch.arange(output.last_hidden_state.shape[1])
        output["last_hidden_state"] = output.last_hidden_state.masked_fill(
            (place >= lengths[:, None])[..., None], float("nan")
        )
        return output

    with torch.no_grad():
        handle = model.register_forward_hook(poison)
        assert torch.equal(mean_states(model, pairs, tok.pad_token_id), expected)
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_do_not_depend_on_order_company_or_batch_size(family):
    model = ranker(family)
    content = rows(5)
    questions, groups = [r["question"] for r in content], [r["generated_answer"] for r in content]
    scores = model.score(questions, groups)
    for i, s in enumerate(scores):
        assert s.dtype == torch.float32 and s.shape == (6,) and bool(((s > 0) & (s < 1)).all())
        [alone] = model.score([questions[i]], [groups[i][::-1]])
        torch.testing.assert_close(alone.flip(0), s, rtol=1e-5, atol=1e-6)
    model.batch_tokens = 1
    torch.testing.assert_close(model.score(questions, groups), scores, rtol=1e-5, atol=1e-6)
    assert len({round(float(x), 6) for s in scores for x in s}) > 10  # not a constant


def test_scores_of_extreme_logits_stay_inside_the_open_interval():
    model = Ranker.for_features(3)
    with torch.no_grad():
        model.head.outer.bias.fill_(1e4)
        [high] = model.score_features([torch.zeros(1, 3)])
        model.head.outer.bias.fill_(-1e4)
        [low] = model.score_features([torch.zeros(1, 3)])
    assert 0 < float(low) < float(high) < 1


def test_memory_is_bounded_by_batch_tokens():
    model, seen = ranker("bert"), []
    model.batch_tokens = 64
    model.backbone.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    content = rows(10)
    model.score([r["question"] for r in content], [r["generated_answer"] for r in content])
    assert len(seen) > 5 and max(seen) <= 64


def test_scoring_leaves_the_mode_as_it_was_and_a_frozen_backbone_never_trains():
    model = ranker("bert").train()
    assert model.head.training and not model.backbone.training
    first, second = (model.score(QUESTIONS, RATIONALES)[0] for _ in range(2))
    assert torch.equal(first, second) and model.head.training  # no dropout in scores
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_ready_features_give_the_same_scores():
    model = ranker("llama")
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            model.score(QUESTIONS, RATIONALES),
            model.score_features(model.features(QUESTIONS, RATIONALES)),
            strict=True,
        )
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("trained", [False, True])
def test_saved_and_loaded_ranker_scores_the_same(family, trained, tmp_path):
    base = saved(tmp_path / "base", family)
    model = Ranker.from_backbone(base, train_backbone=trained, max_length=48, seed=3).eval()
    if trained:  # its own weights by now
        with torch.no_grad():
            for p in model.backbone.parameters():
                p.mul_(1.5)
    expected = model.score(QUESTIONS, RATIONALES)
    model.save_pretrained(tmp_path / "ranker")
    if trained:
        base.rename(tmp_path / "gone")  # needs nothing but its own folder
    assert (tmp_path / "ranker" / "backbone").is_dir() == trained
    loaded = Ranker.from_pretrained(tmp_path / "ranker")
    assert loaded.train_backbone == trained and loaded.max_length == 48
    assert all(torch.equal(a, b) for a, b in zip(loaded.score(QUESTIONS, RATIONALES), expected, strict=True))


def test_frozen_backbone_may_move_but_not_change(tmp_path):
    base = saved(tmp_path / "base", "bert")
    model = Ranker.from_backbone(base, max_length=48, dtype=torch.bfloat16)
    expected = model.score(QUESTIONS, RATIONALES)
    model.save_pretrained(tmp_path / "ranker")
    moved = base.rename(tmp_path / "moved")
    loaded = Ranker.from_pretrained(tmp_path / "ranker", backbone=moved)
    assert next(loaded.backbone.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(loaded.score(QUESTIONS, RATIONALES), expected, strict=True))
    other = backbone("bert", len(model.tokenizer), seed=1)
    assert model_fingerprint(other) != model_fingerprint(model.backbone)
    other.to(torch.bfloat16).save_pretrained(moved)
    with pytest.raises(ValueError, match="not the backbone"):
        Ranker.from_pretrained(tmp_path / "ranker", backbone=moved)


def test_head_alone_is_saved_and_loaded(tmp_path):
    model = Ranker.for_features(5, hidden=4, seed=1)
    x = [torch.randn(3, 5)]
    model.head.standardise(10 + torch.randn(20, 5))
    model.save_pretrained(tmp_path)
    assert torch.equal(Ranker.from_pretrained(tmp_path).score_features(x)[0], model.score_features(x)[0])


def test_files_of_two_saves_are_refused(tmp_path):
    """A process that was killed between the two files leaves such a folder."""
    for seed in (1, 2):
        Ranker.for_features(5, hidden=4, seed=seed).save_pretrained(tmp_path / str(seed))
    head = next(f.name for f in (tmp_path / "1").iterdir() if f.suffix == ".safetensors")
    (tmp_path / "1" / head).write_bytes((tmp_path / "2" / head).read_bytes())
    with pytest.raises(ValueError, match="`folder` must hold the files of one save"):
        Ranker.from_pretrained(tmp_path / "1")


def test_other_formats_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no ranker\.json"):
        Ranker.from_pretrained(tmp_path)
    Ranker.for_features(2).save_pretrained(tmp_path)
    file = tmp_path / "ranker.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 99'))
    with pytest.raises(ValueError, match="format version 99"):
        Ranker.from_pretrained(tmp_path)


def test_bad_input_is_named():
    model = ranker("bert")
    for questions, groups, error, message in (
        ("what", [["a"]], TypeError, "`questions` must be a sequence"),
        (["what"], "abc", TypeError, "`rationales` must be a sequence"),
        (["what"], [], ValueError, "one sequence for each of 1"),
        ([3], [["a"]], TypeError, r"`questions\[0\]` must be a string, got int"),
        (["a", "b"], [["a"], "b"], TypeError, r"`rationales\[1\]` must be a sequence of strings"),
        (["a"], [["a", None]], TypeError, r"rationales\[0\]"),
    ):
        with pytest.raises(error, match=message):
            model.score(questions, groups)
    assert model.score([], []) == []
    with pytest.raises(ValueError, match="`backbone` must be a model to read texts, got None; use score_features"):
        Ranker.for_features(4).score(["a"], [["b"]])
    with pytest.raises(ValueError, match=r"`features\[1\]` must be a tensor \(K, 4\), got \(2, 3\)"):
        Ranker.for_features(4).score_features([torch.zeros(2, 4), torch.zeros(2, 3)])


def test_bad_construction_is_named(tmp_path):
    tok = tokenizer("bert")
    model = backbone("bert", len(tok))
    with pytest.raises(ValueError, match="`tokenizer` must be given with a loaded `model`"):
        Ranker.from_backbone(model)
    with pytest.raises(ValueError, match="`max_length` must be at most the backbone's 64 positions, got 65"):
        Ranker.from_backbone(model, tok, max_length=65)
    with pytest.raises(ValueError, match="`max_length` must be at least 11, .* got 10"):
        Ranker.from_backbone(model, tok, max_length=10)
    with pytest.raises(ValueError, match="must have a name_or_path"):
        Ranker.from_backbone(model, tok).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_a_character_is_named():
    one = ranker("llama")
    with pytest.raises(ValueError, match=r"Ranker: `questions\[0\]` must be text, got half a character"):
        one.score(["what \ud83d ?"], [["7"]])
    with pytest.raises(ValueError, match=r"Ranker: `rationales\[0\]\[1\]` must be text, got half a character"):
        one.score(["what ?"], [["7", "\udc4d 7"]])
