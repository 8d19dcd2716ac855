"""`calm-fast compose --cache-augmenter`: the augmenters read the training rows once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from test_pipeline import SETTINGS, quiet, same, weights
from tiny import SENTENCES, completions, write_rows
from typer.testing import CliRunner

from calm_fast.cli import app
from calm_fast.composing import run
from calm_fast.hf.cached_states import writer


def test_a_run_reads_the_states_from_disk(anchor, stranger, sibling, tmp_path, monkeypatch) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", completions(SENTENCES[:20]))
    written = []
    save = writer.save_file
    monkeypatch.setattr(writer, "save_file", lambda *args, **kwargs: written.append(1) or save(*args, **kwargs))
    settings = replace(SETTINGS, cache_augmenter=tmp_path / "states")
    parts = [stranger, sibling]
    plain = run(rows, anchor, parts, tmp_path / "plain", SETTINGS, say=quiet)
    cached = run(rows, anchor, parts, tmp_path / "cached", settings, say=quiet)
    again = run(rows, anchor, parts, tmp_path / "again", settings, say=quiet)
    assert written == [1]
    assert same(weights(tmp_path / "cached"), weights(tmp_path / "again"))
    # rows of other batches add the same terms in another order; AdamW's first steps have the size of the learning rate
    # whatever the gradient's, so losses are compared and not weights
    for one, other in zip(plain["loss"], cached["loss"], strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    assert again["loss"] == cached["loss"]
    with pytest.raises(ValueError, match="max_length of the rows 40, not 48"):
        run(rows, anchor, parts, tmp_path / "other", replace(settings, max_length=40), say=quiet)


def test_the_command_takes_a_folder(anchor, sibling, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", completions(SENTENCES[:8]))
    given = ["compose", rows, "--anchor", anchor, "--augmenter", sibling, "--out", tmp_path / "out", "--connections",
             "uniform:2", "--steps", "2", "--warmup", "1", "--cache-augmenter", tmp_path / "states"]  # fmt: skip
    result = CliRunner().invoke(app, [str(arg) for arg in given])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "states" / "states-00000.safetensors").is_file()
