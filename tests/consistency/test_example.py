"""The example runs, and its vote is right more often than one sample."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "self_consistency_tiny.py"


def test_example_votes_better_than_a_single_sample(capsys) -> None:
    spec = importlib.util.spec_from_file_location("self_consistency_tiny", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    try:
        module.main(["--questions", "24"])
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    first, voted = map(float, re.search(r"first sample ([\d.]+), adaptive vote over 16 ([\d.]+)", text).groups())
    assert voted > first + 0.2, text
    drawn, early = map(float, re.search(r"stopping early: ([\d.]+) samples a question, ([\d.]+)", text).groups())
    assert drawn < 16 and early > first, text
    right, slip = map(float, re.search(r"right rationale (-[\d.]+), of one with a slip (-[\d.]+)", text).groups())
    assert right > slip, text
