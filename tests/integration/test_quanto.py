"""optimum-quanto on a CPU: int8 weights in parts and in the base of dual LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("optimum.quanto")

from quantised import check_files, check_in_role, check_under_dual_lora  # noqa: E402


@pytest.mark.integration(tool="quanto", what="int8 weights: anchor, augmenter, `QuantoConfig`", verdict="works")
@pytest.mark.parametrize("role", ["anchor", "augmenter"])
def test_a_part_is_quantised(role: str, tmp_path: Path) -> None:
    check_in_role("quanto int8", role, tmp_path)


@pytest.mark.integration(tool="quanto", what="int8 weights: base of dual LoRA", verdict="works")
def test_dual_lora_over_a_quantised_base(tmp_path: Path) -> None:
    check_under_dual_lora("quanto int8", tmp_path)


@pytest.mark.integration(
    tool="quanto", what="files of a composition whose parts are quantised while loading", verdict="works"
)
def test_files(tmp_path: Path) -> None:
    check_files("quanto int8", tmp_path)
