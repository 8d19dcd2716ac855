"""bitsandbytes on a CPU: int8 and nf4 weights in parts and in the base of dual LoRA."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")

from quantised import check_files, check_in_role, check_quantised_files, check_under_dual_lora  # noqa: E402

# bitsandbytes tells each time that it multiplies in float16
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.mark.parametrize("role", ["anchor", "augmenter"])
@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(
            "bitsandbytes int8",
            marks=pytest.mark.integration(tool="bitsandbytes", what="int8: anchor, augmenter", verdict="works"),
        ),
        pytest.param(
            "bitsandbytes nf4",
            marks=pytest.mark.integration(tool="bitsandbytes", what="nf4: anchor, augmenter", verdict="works"),
        ),
    ],
)
def test_a_part_is_quantised(kind: str, role: str, tmp_path: Path) -> None:
    check_in_role(kind, role, tmp_path)


@pytest.mark.integration(tool="bitsandbytes", what="int8 and nf4: base of dual LoRA", verdict="works")
@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_dual_lora_over_a_quantised_base(kind: str, tmp_path: Path) -> None:
    check_under_dual_lora(kind, tmp_path)


@pytest.mark.integration(
    tool="bitsandbytes", what="files of a composition whose parts are quantised while loading", verdict="works"
)
@pytest.mark.parametrize("kind", ["bitsandbytes int8", "bitsandbytes nf4"])
def test_files(kind: str, tmp_path: Path) -> None:
    check_files(kind, tmp_path)


@pytest.mark.integration(tool="bitsandbytes", what="a composition of parts that were saved quantised", verdict="works")
def test_quantised_files(tmp_path: Path) -> None:
    check_quantised_files("bitsandbytes nf4", tmp_path)
