"""The comparison with FlexAttention: its templates render to kernels, and the figure is the hand-computed one."""

from __future__ import annotations

import ast
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # the tool is a script with helpers beside it, not a package

import peers  # noqa: E402

from calm_fast.benchmarks.machine_code import Compiled, Facts  # noqa: E402
from calm_fast.benchmarks.sass import Instruction, Loop  # noqa: E402
from calm_fast.benchmarks.speed_model import PEAK_TFLOPS  # noqa: E402


def step(products: int, others: int) -> Loop:
    """A step of products of 64 x 64 x 16, which take 32 cycles each for a warpgroup."""
    product = Instruction("HGMMA.64x64x16.F32.BF16", "R8, gdesc[UR8], R8, gsb0")
    return Loop((*[product] * products, *[Instruction("FADD")] * others))


def test_backward_counts_five_products_over_the_time_of_seven():
    parts = [peers.Part(64, 64, 4), peers.Part(64, 64, 3)]
    loops = [step(16, 0), step(12, 0)]  # head dim 64: 4 instructions for each product of a tile
    share = peers.attention_tflops(loops, parts, [4, 4], 64, 5) / PEAK_TFLOPS
    assert share == pytest.approx(5 / 7)
    loops = [step(16, 512), step(12, 384)]  # a warpgroup issues 4 instructions a cycle, one of each warp
    share = peers.attention_tflops(loops, parts, [4, 4], 64, 5) / PEAK_TFLOPS
    assert share == pytest.approx(5 / 7 / 2)


def test_the_fastest_loop_with_the_products_of_the_part_is_taken():
    facts = Facts(90, 100, 240, 0, 0, 0, 0, (), (), loops=(step(16, 9), step(12, 7), step(12, 5)))
    (found,) = peers.loops_of(facts, [peers.Part(64, 64, 3)], 64, 4)
    assert len(found.instructions) == 17
    assert peers.loops_of(facts, [peers.Part(64, 64, 2)], 64, 4) is None


def test_a_launch_of_its_own_for_dv_is_in_our_row():
    specs = {"dkdv_bf16_d256_causal_sm90", "dv_bf16_d256_causal_sm90", "dq_bf16_d256_causal_sm90"}
    assert peers.our_kernels("backward", 256, specs) == {"dkdv": 3, "dv": 2, "dq": 3}
    assert peers.our_kernels("backward", 128, specs) == {"dkdv": 4, "dq": 3}


def test_the_best_kernel_is_shown_and_the_best_that_the_model_prices_in_full():
    facts = Facts(90, 100, 240, 0, 0, 0, 0, (), ())
    spilled, waiting = replace(facts, local_accesses=4), replace(facts, verdicts=("(C7515) serialized",))
    rows = [
        peers.Row("forward", 64, "FlexAttention", str(tflops), (found,), (), tflops)
        for tflops, found in ((300, facts), (500, spilled), (400, facts), (450, waiting))
    ]
    assert [row.tflops for row in peers.best(rows)] == [500, 400]
    assert [row.tflops for row in peers.best(rows[2:3])] == [400]
    assert [row.tflops for row in peers.best(rows[1:2])] == [500]


def test_a_kernel_is_compiled_once(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="the key of what is kept holds Triton's version, which is not installed")
    facts = Facts(90, 100, 240, 0, 0, 0, 0, (), ())
    compiled = []
    monkeypatch.setattr(peers, "COMPILED", tmp_path / "kept")
    monkeypatch.setattr(
        peers, "compile_cubin", lambda spec, arch: compiled.append(spec.num_warps) or Compiled(b"", 0, 0, "")
    )
    monkeypatch.setattr(peers, "read_facts", lambda *_: facts)
    specs = [SimpleNamespace(source="one", constexprs={}, num_warps=warps, num_stages=2) for warps in (4, 8, 4)]
    assert [peers.kept_facts(spec) for spec in specs] == [facts] * 3
    assert compiled == [4, 8]
    monkeypatch.setattr(peers, "read_facts", lambda *_: replace(facts, shared=2**20))
    other = SimpleNamespace(source="two", constexprs={}, num_warps=4, num_stages=2)
    assert peers.kept_facts(other) == peers.kept_facts(other) == "1048576 bytes of shared memory"
    reader = tmp_path / "sass.py"
    reader.write_text("# another reader of machine code")
    monkeypatch.setattr(peers, "sass", SimpleNamespace(__file__=str(reader)))
    monkeypatch.setattr(peers, "read_facts", lambda *_: facts)
    assert peers.kept_facts(other) == facts


@pytest.mark.parametrize(("ours", "says"), [(11, ""), (9, "behind 10.0: theirs")])
def test_a_row_that_is_behind_is_named(ours, says, monkeypatch, tmp_path, capsys):
    pytest.importorskip("triton", reason="the page names Triton's version, which is not installed")
    facts = Facts(90, 100, 240, 0, 0, 0, 0, (), ())

    def row(who, config, tflops):
        return peers.Row("forward", 64, who, config, (facts,), (step(4, 4),), tflops)

    class Now:
        """A pool that runs what it is given at once."""

        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, call, *args):
            return SimpleNamespace(result=lambda: call(*args))

    monkeypatch.setattr(peers, "ProcessPoolExecutor", Now)
    monkeypatch.setattr(peers, "PAGE", tmp_path / "docs" / "ops" / "peers.md")
    peers.PAGE.parent.mkdir(parents=True)
    monkeypatch.setattr(peers, "HEAD_DIMS", (64,))
    monkeypatch.setattr(peers, "our_row", lambda *_: row("calm_fast", "ours", ours))
    monkeypatch.setattr(peers, "flex_configs", lambda *_: [None])
    monkeypatch.setattr(peers, "flex_row", lambda *_: row("FlexAttention", "theirs", 10))
    assert peers.write_page(1, ("forward",)) == bool(says)
    printed = capsys.readouterr().out
    assert says in printed
    assert ("behind 10" in printed) == bool(says)
    assert "| forward | 64 | calm_fast | ours |" in peers.PAGE.read_text()


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_templates_of_the_installed_torch_render(direction):
    pytest.importorskip("triton", reason="inductor's templates need Triton, which is not installed")
    configs = peers.flex_configs(direction, 128)
    assert len(configs) > 1
    options, parts = peers.flex_options(direction, 128, configs[-1])
    source, arguments = peers.render(direction, 128, options)
    functions = {node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    assert {"peer_kernel", "load_checked_2d"} < functions
    assert "{{" not in source
    assert {"arg_Q", "arg_LSE", "out_ptr0"} < set(arguments)
    assert sum(part.products for part in parts) == (2 if direction == "forward" else 7)
