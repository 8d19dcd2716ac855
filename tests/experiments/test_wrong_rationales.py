"""The wrong-rationales experiment: its rows, its statistics, and the whole of it in reduced form."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace

import pytest
import torch

from calm_fast import nat
from calm_fast.consistency.answers.extraction import extract_answer
from calm_fast.experiments import wrong_rationales as experiment

SHORT = replace(
    experiment.Recipe(),
    pretrain_steps=3,
    pretrain_rows=8,
    width=16,
    layers=1,
    questions=12,
    held_out=10,
    settings=replace(experiment.Recipe().settings, steps=3, warmup=1, batch_size=4),
)


def numbers(question: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", question)]


def without_carries(a: int, b: int, digits: int) -> int:
    """Digit-wise sum modulo ten, worked out apart from the code that writes the rationales."""
    return sum((a // 10**i + b // 10**i) % 10 * 10**i for i in range(digits))


def has_carry(question: str) -> bool:
    a, b = numbers(question)
    return without_carries(a, b, len(str(a))) != a + b


def test_rationales_are_right_or_drop_every_carry():
    assert experiment.rationale((357, 285)) == "7+5=12,5+8+1=14,3+2+1=6 \\boxed{642}"
    assert experiment.rationale((357, 285), drop_carries=True) == "7+5=12,5+8=13,3+2=5 \\boxed{532}"
    rng = random.Random(0)
    for digits in (1, 2, 3, 5):
        for _ in range(50):
            a, b = pair = experiment.draw_pair(digits, rng)
            assert len(str(a)) == len(str(b)) == digits
            assert int(extract_answer(experiment.rationale(pair))) == a + b
            wrong = int(extract_answer(experiment.rationale(pair, drop_carries=True)))
            assert wrong == without_carries(a, b, digits)


def test_grading_finds_the_wrong_rationales_where_a_carry_was_dropped():
    rows = experiment.split(experiment.Recipe(), 0).rows
    right, wrong = nat.split_rationales(rows, progress=False)
    assert len(right) == len(rows) == 200
    carried = {row["question"] for row in rows if has_carry(row["question"])}
    assert {e.question for e in wrong} == carried and 120 < len(wrong) < 200


@pytest.mark.parametrize("seed", [0, 1])
def test_no_held_out_question_is_ever_trained_on(seed):
    recipe = replace(experiment.Recipe(), digits=2, pretrain_digits=(2,))  # few pairs: leaks would show
    data = experiment.split(recipe, seed)
    held_out = {frozenset(pair) for pair in data.held_out}
    assert len(held_out) == len(data.held_out) == 300
    assert not held_out & {frozenset(numbers(row["question"])) for row in data.rows}
    documents = experiment.pretraining_examples(recipe, data.held_out, 3000, random.Random(seed))
    assert not held_out & {frozenset(numbers(e.question)) for e in documents}
    free = experiment.pretraining_examples(recipe, [], 3000, random.Random(seed))
    assert held_out & {frozenset(numbers(e.question)) for e in free}  # the filter is what keeps them out


def test_seeds_draw_other_questions():
    first, again, other = (experiment.split(SHORT, seed) for seed in (0, 0, 1))
    assert first == again and first != other


def test_the_unreliable_source_drops_carries_in_the_share_it_should():
    documents = experiment.pretraining_examples(experiment.Recipe(), [], 4000, random.Random(0))
    with_carry = [e for e in documents if has_carry(e.question)]
    right = [int(extract_answer(e.rationale)) == sum(numbers(e.question)) for e in with_carry]
    assert abs(sum(right) / len(right) - 0.5) < 0.03  # four standard errors
    without = [e for e in documents if not has_carry(e.question)]
    assert without and all(int(extract_answer(e.rationale)) == sum(numbers(e.question)) for e in without)


def test_the_tokenizer_gives_every_text_back():
    tokenizer = experiment.make_tokenizer()
    text = f"{experiment.question((357, 285))}\n{experiment.rationale((357, 285))}"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.pad_token_id not in ids and len(ids) == len(text) - len("boxed{")
    assert "".join(tokenizer.convert_ids_to_tokens(ids)) == text


def test_accuracy_counts_exact_final_answers():
    tokenizer, pairs = experiment.make_tokenizer(), [(123, 456), (357, 285), (999, 999), (100, 100)]

    class Author(torch.nn.Module):
        """Writes right rationales, but drops the carries of the second question."""

        device = torch.device("cpu")

        def eval(self):
            return self

        def generate(self, ids, **_):
            texts = [experiment.rationale(pair, i == 1) for i, pair in enumerate(pairs)]
            rows = [[*tokenizer(text)["input_ids"], 1] for text in texts]
            longest = max(map(len, rows))
            return torch.cat([ids, torch.tensor([row + [0] * (longest - len(row)) for row in rows])], dim=1)

    assert experiment.answers(Author(), pairs, tokenizer) == ["579", "532", "1998", "200"]
    assert experiment.accuracy(Author(), pairs, tokenizer) == 75.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Seeds 0 and 1, and seed 0 again: folder and returned results of both."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "again")]
    seeds = ([0, 1], [0])
    return [
        (folder, experiment.run(folder, s, SHORT, progress=False)) for folder, s in zip(folders, seeds, strict=True)
    ]


def test_results_json_has_the_documented_format(runs):
    folder, results = runs[0]
    assert json.loads((folder / "results.json").read_text()) == results
    assert list(results["accuracy"]) == list(experiment.ARMS)
    for row in results["accuracy"].values():
        assert len(row["seeds"]) == 2 and all(0 <= value <= 100 for value in row["seeds"])
    assert list(results["difference"]) == [f"{a} - {b}" for a, b in experiment.COMPARED]
    for name, row in results["difference"].items():
        a, b = (results["accuracy"][arm]["seeds"] for arm in name.split(" - "))
        assert row["seeds"] == [x - y for x, y in zip(a, b, strict=True)] and row["low"] <= row["mean"] <= row["high"]
    for gates in results["gates"]:
        assert set(gates) == {"model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"}
        assert all(0 < gate["mean"] < 1 for gate in gates.values())
    assert results["seeds"] == [0, 1] and results["recipe"]["questions"] == 12
    assert results["versions"]["torch"] == torch.__version__
    lines = experiment.table(results).splitlines()
    assert len(lines) == 2 + len(experiment.ARMS) + len(experiment.COMPARED) and lines[2].startswith("| base |")


def test_a_seed_gives_the_same_numbers_again_alone_or_with_others(runs):
    (_, both), (_, alone) = runs
    assert alone["gates"][0] == both["gates"][0] != both["gates"][1]
    assert {a: r["seeds"][0] for a, r in alone["accuracy"].items()} == {
        a: r["seeds"][0] for a, r in both["accuracy"].items()
    }
    assert alone["accuracy"]["lora"]["low"] is None


def test_run_leaves_threads_and_torchs_generator_alone(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    experiment.run(tmp_path, [5], replace(SHORT, pretrain_steps=1), progress=False)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_run_refuses_no_seed_and_a_seed_twice(tmp_path, seeds):
    with pytest.raises(ValueError, match="`seeds` must be different integers, at least one"):
        experiment.run(tmp_path, seeds, SHORT)
