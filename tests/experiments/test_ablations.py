"""The ablations of the key-value arithmetic experiment: what each variant is, and the run with few steps."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace

import pytest
import torch

from calm_fast.experiments import key_value_arithmetic as experiment
from calm_fast.experiments.intervals import interval
from calm_fast.experiments.key_value_arithmetic import (
    ablations,
    ablations_report,
    data,
    encoder,
    evaluation,
    parts,
    training,
)


def schedule(steps: int) -> training.Schedule:
    return training.Schedule(steps=steps, rows=32, weight_decay=0.01, rate=5e-3, warmup=5)


SHORT = training.Recipe(
    keys=60,
    max_value=4,
    train_fraction=0.5,
    width=32,
    a=schedule(6),
    b=schedule(6),
    encoder=schedule(6),
    composition=schedule(6),
    eval_rows=40,
)
KNOWN = ablations.variants(SHORT)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    folder, bar = tmp_path_factory.mktemp("parts"), parts.bars(False)
    found = ablations.shared_parts(SHORT, 3, folder, bar)
    found.encoder = ablations.shared_encoder(SHORT, 3, folder, found.world, bar)
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All variants of seed 3, and two of seed 4; the folder and the results of the last call."""
    out = tmp_path_factory.mktemp("ablations")
    ablations.run(out, [3], recipe=SHORT, progress=False)
    return out, ablations.run(out, [3, 4], ["standard", "lora"], recipe=SHORT, progress=False)


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_only_new_parameters_train_and_every_variant_starts_as_the_anchor(shared):
    ids = data.numeric(shared.world, 16, torch.Generator().manual_seed(0)).input_ids
    before = state(shared.b)
    with torch.no_grad():
        plain = shared.b(input_ids=ids).logits
        for name, variant in KNOWN.items():
            model = ablations.build(variant, shared, SHORT, 3)
            torch.testing.assert_close(model(input_ids=ids).logits, plain, msg=name)
            assert any(p.requires_grad for p in model.parameters())
            for key, p in model.named_parameters():
                assert p.requires_grad == (key.startswith("connections.") or "lora_" in key), (name, key)
    assert before.keys() == shared.b.state_dict().keys()  # LoRA went into a copy


def test_variants_differ_in_one_thing(shared):
    standard = KNOWN["standard"]
    assert standard.connections == SHORT.connections
    for name in ("random", "anchor"):
        assert KNOWN[name].connections == standard.connections and KNOWN[name].augmenter != standard.augmenter
    counts = {"last-layer": 1, "connections-1": 1, "connections-2": 2, "standard": 3, "connections-5": 5}
    for name, count in counts.items():
        assert KNOWN[name].augmenter == "A" and len(set(KNOWN[name].connections)) == count
    nested = [set(KNOWN[n].connections) for n in ("connections-1", "connections-2", "standard", "connections-5")]
    assert all(small < large for small, large in zip(nested, nested[1:], strict=False))
    assert KNOWN["last-layer"].connections == ((SHORT.layers - 1, SHORT.layers - 1),)


def test_an_encoder_learns_the_values_of_keys_and_comes_back_from_its_file(tmp_path):
    recipe = replace(SHORT, encoder=replace(SHORT.encoder, steps=150, rows=32, rate=1e-2))
    world = training.token_world(recipe, 3)
    found = ablations.shared_encoder(recipe, 3, tmp_path, world, parts.bars(False))
    assert encoder.named_right(found, world, torch.arange(60), 50, 0) > 90
    again = ablations.shared_encoder(recipe, 3, tmp_path, world, lambda title, line: pytest.fail("trains again"))
    for key, value in found.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)


@pytest.mark.parametrize("name", ["prompt-only", "encoder-prompt", "encoder-reencode"])
def test_a_bidirectional_variant_reads_no_answer(shared, name):
    model = ablations.build(KNOWN[name], shared, SHORT, 3)
    with torch.no_grad():
        for parameter in model.connections.parameters():
            parameter.add_(0.1)
        ids = data.kv_arithmetic(shared.world, torch.arange(60), 4, torch.Generator().manual_seed(0)).input_ids
        other = ids.clone()
        other[:, data.ANSWER_START] = data.PLUS
        one, two = (model(input_ids=x, use_cache=False, **training.reading(model)).logits for x in (ids, other))
    torch.testing.assert_close(one[:, : data.ANSWER_START], two[:, : data.ANSWER_START])
    written = evaluation.generate_answers(model, data.Batch(ids, ids))
    assert written.shape == (4, data.ROW - data.ANSWER_START)


def test_the_random_augmenter_is_a_before_its_training(shared):
    untrained = training.tiny_llama(SHORT, shared.world.vocab_size, training.seeds(3)["init_a"])
    for name, value in untrained.state_dict().items():
        assert torch.equal(shared.initial.state_dict()[name], value)
    assert not torch.equal(shared.initial.lm_head.weight, shared.a.lm_head.weight)


def test_each_variant_reads_its_own_augmenter(shared):
    sources = {"standard": shared.a, "random": shared.initial, "anchor": shared.b, "last-layer": shared.a}
    for name, source in sources.items():
        composed = ablations.build(KNOWN[name], shared, SHORT, 3)
        read = {n: p for n, p in composed.named_parameters() if n.startswith("augmenters.0.") and "q_proj" in n}
        given = {n: p for n, p in source.named_parameters() if "q_proj" in n}
        assert len(read) == len(given) == SHORT.layers
        for (_, one), (_, other) in zip(read.items(), given.items(), strict=True):
            assert torch.equal(one, other)
        assert composed.anchor is shared.b


def test_parts_from_the_folder_are_those_that_were_trained(tmp_path, shared):
    bar = parts.bars(False)
    world, models, _ = parts.train_parts(SHORT, 3, bar)
    trained = ablations.shared_parts(SHORT, 3, tmp_path, bar)
    read = ablations.shared_parts(SHORT, 3, tmp_path, lambda title, line: pytest.fail(f"trains {title} again"))
    for found in (trained, read):
        for model, name in ((found.a, "A"), (found.b, "B")):
            for key, value in models[name].state_dict().items():
                assert torch.equal(model.state_dict()[key], value)
        assert found.alone == trained.alone and torch.equal(found.world.values, world.values)


@pytest.mark.parametrize("name", ["lora", "lora-keys"])
def test_lora_has_the_size_of_the_standard_composition(shared, name):
    sizes = [ablations.trainable(ablations.build(KNOWN[n], shared, SHORT, 3)) for n in ("standard", name)]
    one_rank = ablations.trainable(ablations.with_lora(shared.b, KNOWN[name].lora, 1, 0))
    assert abs(sizes[0] - sizes[1]) <= one_rank / 2


def test_only_an_adapter_on_the_embedding_can_tell_keys_apart(shared):
    keys = shared.world.key(torch.tensor([[1], [2]]))
    for name, apart in (("lora", False), ("lora-keys", True)):
        model = ablations.build(KNOWN[name], shared, SHORT, 3)
        for key, p in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(p)
        with torch.no_grad():  # one at a time: a product may round the rows of a batch differently
            first, second = (model(input_ids=key).logits for key in keys[:, None])
        assert torch.equal(first, second) != apart


def test_the_standard_variant_is_the_demos_composition(finished, tmp_path):
    demo = experiment.run(tmp_path, 3, recipe=SHORT, progress=False, measure_speed=False)["accuracy"]
    _, results = finished
    for task, row in demo.items():
        assert results["variants"]["standard"]["accuracy"][task]["seeds"]["3"] == row["AB"]
        assert all(results["alone"][name][task]["seeds"]["3"] == row[name] for name in ("A", "B"))


def test_results_hold_every_finished_variant_with_its_interval(finished):
    out, results = finished
    assert json.loads((out / "results.json").read_text()) == results
    assert list(results["variants"]) == list(KNOWN) and results["seeds"] == [3, 4]
    for name, row in results["variants"].items():
        seeds = ["3", "4"] if name in ("standard", "lora") else ["3"]
        for cell in (*row["accuracy"].values(), row["loss"]):
            assert list(cell["seeds"]) == seeds
            expected = interval(list(cell["seeds"].values()))
            assert {k: cell[k] for k in expected} == pytest.approx(expected, abs=1e-3)
    row, standard = (results["variants"][n]["accuracy"]["kv_arithmetic"]["seeds"] for n in ("lora", "standard"))
    difference = results["variants"]["lora"]["difference"]["seeds"]
    assert difference == {seed: pytest.approx(row[seed] - standard[seed]) for seed in ("3", "4")}
    assert "difference" not in results["variants"]["standard"]


def test_a_second_call_trains_nothing_again(finished, monkeypatch, tmp_path):
    out, results = finished
    monkeypatch.setattr(ablations, "train", lambda *args: pytest.fail("trained again"))
    monkeypatch.setattr(ablations, "train_parts", lambda *args: pytest.fail("trained again"))
    again = ablations.run(out, [3, 4], ["lora", "standard"], recipe=SHORT, progress=False)
    assert again == results


def test_a_folder_of_other_settings_or_another_variant_is_refused(finished, monkeypatch):
    out, _ = finished
    with pytest.raises(ValueError, match="`out_dir` must be a new folder .* with other eval_rows"):
        ablations.run(out, [3], recipe=replace(SHORT, eval_rows=41), progress=False)
    changed = dict(KNOWN, random=replace(KNOWN["random"], connections=((0, 0),)))
    monkeypatch.setattr(ablations, "variants", lambda recipe: changed)
    with pytest.raises(ValueError, match="`out_dir` must be a folder whose seed_3/random.json is of today's"):
        ablations.run(out, [3], ["standard"], recipe=SHORT, progress=False)


@pytest.mark.parametrize(
    ("seeds", "names", "message"),
    [
        ([], None, "`seeds` must be different non-negative ints, at least one, got \\[\\]"),
        ([1, 1], None, "`seeds` must be different"),
        ([-1], None, "`seeds` must be different non-negative"),
        ([0], [], "`variants` must be different ones of standard, .*, got none"),
        ([0], ["lora", "lora"], "`variants` must be different ones"),
        ([0], ["vanilla"], "`variants` must be different ones of standard, .*, got vanilla"),
    ],
)
def test_bad_seeds_and_variants_are_named(tmp_path, seeds, names, message):
    with pytest.raises(ValueError, match=f"ablations.run: {message}"):
        ablations.run(tmp_path / "new", seeds, names, recipe=SHORT)
    assert not (tmp_path / "new").exists()


def test_without_peft_only_lora_fails_and_before_any_training(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="the variants lora and lora-keys need PEFT"):
        ablations.run(tmp_path, [3], recipe=SHORT, progress=False)
    assert not list(tmp_path.iterdir())


def test_tables_show_every_variant_and_say_what_is_unfinished(finished):
    out, results = finished
    text, page = (out / "ablations.md").read_text(), (out / "ablations.html").read_text()
    assert (text, page) == (ablations_report.markdown(results), ablations_report.html(results))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 2 + len(KNOWN) and len({line.count("|") for line in table}) == 1
    for variant in KNOWN.values():
        assert f"| {variant.title} |" in text and variant.title in page
    assert "for 6 steps on 30 of 60 keys" in text and "seeds 3, 4" in text and "fewer seeds so far" in text
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", page) and "<script" not in page and page.count("<svg") == 1
