"""The key-value arithmetic experiment: its data, its scoring, and the whole pipeline with few steps."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from html import unescape

import pytest
import torch

import calm_fast
from calm_fast.experiments import key_value_arithmetic as experiment
from calm_fast.experiments.key_value_arithmetic import data, evaluation, parts, report, speed, training

WORLD = data.World.create(5, keys=60)
EVERY_KEY = torch.arange(60)


def schedule(steps: int) -> training.Schedule:
    return training.Schedule(steps=steps, rows=64, weight_decay=0.01, rate=5e-3, warmup=10)


# values 0 to 4 are learned in seconds; the experiment's own recipe takes minutes
LEARNS = training.Recipe(
    keys=100,
    max_value=4,
    train_fraction=0.5,
    width=32,
    a=schedule(150),
    b=schedule(150),
    composition=schedule(300),
    eval_rows=300,
)
SHORT = replace(LEARNS, a=schedule(20), b=schedule(20), composition=schedule(20), eval_rows=50)

TASKS = {
    "substitution": lambda n, rng: data.substitution(WORLD, EVERY_KEY, n, rng),
    "facts": lambda n, rng: data.facts(WORLD, EVERY_KEY, n, rng),
    "numeric": lambda n, rng: data.numeric(WORLD, n, rng),
    "echo": lambda n, rng: data.echo(WORLD, n, rng),
    "kv_arithmetic": lambda n, rng: data.kv_arithmetic(WORLD, EVERY_KEY, n, rng),
    "mixed_arithmetic": lambda n, rng: data.mixed_arithmetic(WORLD, EVERY_KEY, n, rng),
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def keys_in(ids: torch.Tensor, world: data.World) -> set[int]:
    return set((ids[ids >= world.key_offset] - world.key_offset).tolist())


def expected_answer(prompt: str) -> str:
    """Return the answer to a prompt's text, computed independently of the code that made it."""
    words = prompt.split()
    values = [str(WORLD.values[int(w[1:])].item()) if w.startswith("k") else w for w in words]
    if words[-1] == "=":
        a, b = int(values[0]), int(values[2])
        return f"{a + b if values[1] == '+' else a - b} <eos>"
    if words[-1] == ":":
        return f"{' '.join(values[:3])} <eos>"
    return values[-1]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_true_and_only_their_answers_are_labelled(task):
    batch = TASKS[task](200, rng())
    assert batch.input_ids.shape == batch.labels.shape == (200, data.ROW)
    assert batch.input_ids.min() >= 0 and batch.input_ids.max() < WORLD.vocab_size
    for ids, labels in zip(batch.input_ids.tolist(), batch.labels.tolist(), strict=True):
        labelled = [i for i, label in enumerate(labels) if label != data.IGNORE]
        first, last = labelled[0], labelled[-1]
        assert labelled == list(range(first, last + 1)) and first > 0
        assert [labels[i] for i in labelled] == [ids[i] for i in labelled]
        assert all(token == data.PAD for token in ids[last + 1 :])
        assert data.PAD not in ids[: last + 1]
        assert WORLD.decode(ids[first : last + 1]) == expected_answer(WORLD.decode(ids[:first]))


def test_keys_split_into_disjoint_parts_that_cover_all():
    trained, unseen = set(WORLD.train_keys.tolist()), set(WORLD.unseen_keys.tolist())
    assert len(trained) == 12 and len(unseen) == 48
    assert not trained & unseen and trained | unseen == set(range(60))
    with pytest.raises(ValueError, match="train_fraction"):
        data.World.create(0, keys=10, train_fraction=1.0)


def test_composition_never_trains_on_unseen_keys_and_is_scored_on_no_other():
    mixture, generator = data.mixture_composition(WORLD), rng()
    seen = set().union(*(keys_in(data.draw(mixture, 128, generator).input_ids, WORLD) for _ in range(20)))
    assert seen == set(WORLD.train_keys.tolist())
    asked = set()
    for task, make in evaluation.TASKS.items():
        found = keys_in(make(WORLD, WORLD.unseen_keys, 500, rng()).input_ids, WORLD)
        assert bool(found) == (task != "numeric")
        asked |= found
    assert asked == set(WORLD.unseen_keys.tolist())


def test_a_trains_on_every_key_and_b_on_none():
    generator = rng()
    b = torch.cat([data.draw(data.mixture_b(WORLD), 256, generator).input_ids for _ in range(10)])
    a = torch.cat([data.draw(data.mixture_a(WORLD), 256, generator).input_ids for _ in range(10)])
    assert not keys_in(b, WORLD) and keys_in(a, WORLD) == set(range(60))
    assert data.EQUALS not in a  # A never sees arithmetic


def test_draw_fills_the_batch_with_the_shares_of_the_mixture():
    batch = data.draw(data.mixture_b(WORLD), 100, rng())
    assert len(batch) == 100
    assert (batch.input_ids[:, data.EXPRESSION] == data.EQUALS).sum() == 70


def test_answer_loss_is_the_mean_over_answer_tokens_only():
    model = training.tiny_llama(SHORT, WORLD.vocab_size, seed=1)
    batch = data.draw(data.mixture_a(WORLD), 32, rng())
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids).logits.double().log_softmax(dim=-1)
        by_hand = [
            -logits[row, column - 1, batch.input_ids[row, column]]
            for row, column in (batch.labels != data.IGNORE).nonzero().tolist()
        ]
        loss = training.answer_loss(model, batch)
    torch.testing.assert_close(loss.double(), torch.stack(by_hand).mean(), rtol=1e-5, atol=0)


def test_added_tokens_are_the_mean_row_and_leave_old_logits_alone():
    model = training.tiny_llama(SHORT, WORLD.key_offset, seed=1)
    batch = data.numeric(WORLD, 8, rng())
    with torch.no_grad():
        before = model(input_ids=batch.input_ids).logits
        training.add_tokens(model, WORLD.vocab_size)
        after = model(input_ids=batch.input_ids).logits
    assert model.config.vocab_size == WORLD.vocab_size
    torch.testing.assert_close(after[..., : WORLD.key_offset], before)
    for table in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        mean = table[: WORLD.key_offset].mean(dim=0)
        torch.testing.assert_close(table[WORLD.key_offset :], mean.expand(60, -1))


def test_exact_match_is_what_greedy_generation_gives():
    model = training.tiny_llama(SHORT, WORLD.key_offset, seed=1)
    training.train(model, data.mixture_b(WORLD), schedule(100), seed=2)
    training.add_tokens(model, WORLD.vocab_size)
    composed = calm_fast.compose(model, training.tiny_llama(SHORT, WORLD.vocab_size, 3), [(1, -1), (1, 0)], num_heads=4)
    for connection in composed.connections:
        torch.nn.init.normal_(connection.o_proj.weight, std=0.02)
    batch = data.Batch.cat([data.numeric(WORLD, 150, rng()), data.echo(WORLD, 150, rng())])
    for scored in (model, composed):
        verdicts = evaluation.exact_matches(scored, batch, rows=128)
        written = evaluation.generate_answers(scored, batch)
        assert torch.equal((written == batch.input_ids[:, data.ANSWER_START :]).all(dim=1), verdicts)
        assert 0 < verdicts.sum() < len(batch)  # both kinds of rows were compared


def test_an_answer_without_its_end_is_wrong():
    class Parrot(torch.nn.Module):
        """Writes the gold answer, but never <eos>."""

        def forward(self, input_ids, logits_to_keep, use_cache):
            following = torch.cat([input_ids[:, 1:], input_ids[:, -1:]], dim=1)[:, logits_to_keep]
            logits = torch.nn.functional.one_hot(following, WORLD.vocab_size).float()
            logits[..., data.EOS] = self.end
            return type("Output", (), {"logits": logits})

    model, batch = Parrot(), data.numeric(WORLD, 10, rng())
    model.end = 0.0
    assert not evaluation.exact_matches(model, batch).any()
    model.end = torch.nn.functional.one_hot(torch.tensor([0, 1, 0, 0]), 4)[:, 1] * 2.0
    assert evaluation.exact_matches(model, batch).all()


def test_composition_computes_with_unseen_keys_and_leaves_a_and_b_alone():
    world, alone, _ = parts.train_parts(LEARNS, 1, parts.bars(False))
    before = {name: copy.deepcopy(model.state_dict()) for name, model in alone.items()}
    composed, losses = parts.train_composition(LEARNS, 1, world, alone, parts.bars(False))
    for name, model in alone.items():
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[name][key]), (name, key)
    assert len(losses) == 300
    table = evaluation.accuracies({**alone, "AB": composed}, world, world.unseen_keys, 300, seed=1)
    assert min(row["AB"] for row in table.values()) > 90, table
    assert max(table["kv_arithmetic"]["A"], table["kv_arithmetic"]["B"]) < 40, table  # 9 answers: chance is high
    assert table["substitution"]["B"] < 40 and table["numeric"]["A"] < 40, table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run seed 3 twice and seed 4 once; return the folder and the results of each."""
    out = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        folder = tmp_path_factory.mktemp(name)
        out.append((folder, experiment.run(folder, seed, recipe=SHORT, progress=False, measure_speed=False)))
    return out


def test_results_json_has_the_promised_format(runs):
    folder, returned = runs[0]
    results = json.loads((folder / "results.json").read_text())
    assert results == returned
    assert list(results) == ["accuracy", "seconds", "seed", "versions"] and results["seed"] == 3
    assert list(results["accuracy"]) == ["substitution", "numeric", "kv_arithmetic"]
    for row in results["accuracy"].values():
        assert list(row) == ["A", "B", "AB"] and all(0 <= value <= 100 for value in row.values())
    assert all(value >= 0 for value in results["seconds"].values())
    assert results["seconds"]["total"] >= results["seconds"]["train_composition"] > 0
    assert results["versions"]["torch"] == torch.__version__


def test_same_seed_same_results_other_seed_others(runs):
    def curves(folder):
        return re.findall(r"<svg.*?</svg>", (folder / "report.html").read_text(), re.DOTALL)[0]

    (first, a), (again, b), (other, _) = runs
    assert a["accuracy"] == b["accuracy"]
    assert curves(first) == curves(again) != curves(other)


def test_report_is_self_contained_and_shows_both_tables(runs):
    folder, results = runs[0]
    page = (folder / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page) and "@import" not in page and "<script" not in page
    assert page.count("<svg") == 1
    for task, row in results["accuracy"].items():
        assert all(f"<b>{value:.1f}</b>" in page for value in row.values())
        assert all(f"<td>{value:.1f}</td>" in page for value in report.PAPER[task].values())
    q = torch.empty(1, 7, 4, 8)
    assert str(calm_fast.explain("cross_attention", q, q, q, causal=True)) in unescape(page)


def test_run_refuses_a_negative_seed(tmp_path):
    with pytest.raises(ValueError, match="run: `seed` must be a non-negative int, got -1"):
        experiment.run(tmp_path, -1)


def test_layer_is_checked_before_it_is_timed(monkeypatch):
    case = speed.Case("tiny", 2, 9, 24, 32, 4, training=True)
    measured = speed.measure(case, seconds=0)
    assert measured.ours_ms > 0 and measured.eager_ms > 0
    assert 0 < measured.eager_error < 1e-5
    # Which of the two the CPU takes depends on whether the native library was built here.
    assert measured.choice.startswith(("cross_attention: native (", "cross_attention: torch ("))
    monkeypatch.setattr(calm_fast.CrossAttention, "forward", lambda self, anchor, augmenter, causal: anchor)
    with pytest.raises(RuntimeError, match="not timed"):
        speed.measure(case, seconds=0)


def test_report_with_speed_names_ratio_and_threads(runs):
    _, results = runs[0]
    measured = speed.Measurement(speed.CASES[0], 30.0, 20.0, 1e-6, 2e-6, "cross_attention: torch (why)", 1)
    page = report.html(report.Story(results, {"A": [1.0, 0.5]}, [], [], [measured], []))
    assert "<b>1.50x</b>" in page and "1 thread(s)" in page and "cross_attention: torch (why)" in page
