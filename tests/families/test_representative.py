"""The checks of docs/models.md on one class of each kind; `make families` runs them on all."""

from __future__ import annotations

import os
import time

import matrix
import pytest
import transformers
from checks import ALONE, in_role
from shrink import families, tiny_model

# attention, fused projections, several residual scales, mixtures of experts, latent attention, recurrent, hybrids,
# decoders of encoder-decoders, plain layers, and those that must be refused
REPRESENTATIVE = (
    "llama", "gpt2", "gpt_neox", "gptj", "opt", "bloom", "falcon", "mpt", "gemma2", "phi3", "glm4", "mixtral",
    "gpt_oss", "deepseek_v3", "mamba", "mamba2", "qwen3_next", "bart", "ctrl", "modernbert-decoder", "xlm", "rwkv",
    "longcat_flash", "blt", "musicgen", "bert", "roberta", "seq2seq/t5", "seq2seq/bart", "encoder/bert",
    "encoder/deberta-v2", "encoder/nystromformer",
)  # fmt: skip
CHECKS = ("compose", "identity", "no leak", "greedy", "training")
KEPT = matrix.read()["classes"]


@pytest.mark.parametrize("family", REPRESENTATIVE)
def test_the_outcomes_are_those_of_the_page(family: str) -> None:
    assert family in families()
    if family not in KEPT:
        pytest.skip(f"docs/models.md has no outcome of it yet: make families ARGS={family}")
    for check in matrix.wanted_checks(family, (*CHECKS, *ALONE)):
        outcome, note = KEPT[family].get(check, ("not run", ""))
        if outcome not in (matrix.WORKS, matrix.REFUSED):
            continue  # transformers' own faults, and what the page says was not run
        role, _, name = check.rpartition(": ")
        try:
            in_role(family, role, name) if role else ALONE[name](family)
        except ValueError as problem:
            # the beginning: what the error says of versions and shapes may change
            assert outcome == matrix.REFUSED and str(problem)[:60] == note[:60], f"{check}: {problem}"
        else:
            assert outcome == matrix.WORKS, f"{check} works now; run `make families ARGS={family}`"


def test_the_page_is_written_from_the_kept_outcomes() -> None:
    if matrix.read().get("transformers") != transformers.__version__:
        pytest.skip("the page was made with another release of transformers, which has other classes")
    assert matrix.PAGE.read_text() == matrix.page(matrix.read()), "run `make families ARGS=--page`"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # os.fork, Python 3.12
def test_a_wrong_composition_fails_its_check() -> None:
    def leaking() -> None:
        from checks import no_leak

        model = tiny_model("llama")
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda _m, _a, out: (out[0] + out[0][:, -1:], *out[1:]))
        no_leak(model)

    (error,) = matrix.apart(lambda: [matrix.error_of(leaking)], 60)
    assert error.startswith("AssertionError differs by")
    assert list(matrix.apart(lambda: [matrix.error_of(lambda: None)], 60)) == [None]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_check_that_hangs_or_ends_its_process_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    import checks

    faults = {"dies": lambda _: os._exit(3), "hangs": lambda _: time.sleep(60), "fine": lambda _: None}
    monkeypatch.setattr(checks, "ALONE", faults)
    monkeypatch.setattr(checks, "plain", lambda family, name: None)
    outcomes = matrix.run_family("llama", ["fine", "dies", "hangs"], 1.0)
    assert outcomes["fine"] == [matrix.WORKS, ""] and outcomes["dies"] == [matrix.FAILS, "the process died"]
    assert outcomes["hangs"][0] == matrix.LATE
