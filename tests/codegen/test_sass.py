"""Reading machine code: the main loop and its mix, chains of products, the model's figure."""

from __future__ import annotations

import pytest

from calm_fast.benchmarks.sass import Instruction, Loop, blocks, main_loop, product_loops
from calm_fast.benchmarks.speed_model import PEAK_TFLOPS, predict, product_cost, shared_bytes

# an outer loop around two loops in a row; the second has more products, and a part of it stands after the end
NESTED = """
.text._kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR8], RZ, !UPT, gsb0 ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR8], R8, gsb0 ;
        /*0030*/              @!P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   WARPGROUP.ARRIVE ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR8], R8, gsb0 ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8].tnspB, R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   BRA `(.L_x_4) ;
.L_x_3:
        /*0090*/                   MUFU.EX2 R3, R3 ;
        /*00a0*/               @P0 FFMA R3, R3, R4, R5 ;
        /*00b0*/                   BRA.U UP0, `(.L_x_2) ;
        /*00c0*/             @!UP1 BRA `(.L_x_0) ;
        /*00d0*/                   EXIT ;
.L_x_4:
        /*00e0*/                   FMNMX R3, R3, R4, !PT ;
        /*00f0*/                   BRA `(.L_x_3) ;
.L_x_5:
        /*0100*/                   BRA `(.L_x_5);
"""


def test_main_loop_is_the_innermost_with_the_most_products():
    loop = main_loop(product_loops(blocks(NESTED)))
    assert loop.mix == {
        "all": 10,
        "HGMMA.64x64x16": 1,
        "HGMMA.64x128x16": 1,
        "EX2": 1,
        "FMA": 1,
        "ADD/MAX": 1,
        "WARPGROUP": 2,
    }


def test_of_loops_with_the_same_products_the_shortest_is_the_main_one():
    text = """
.L_a:
        /*0000*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0010*/                   FADD R3, R3, R4 ;
        /*0020*/               @P0 BRA `(.L_a) ;
.L_b:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0040*/               @P0 BRA `(.L_b) ;
        /*0050*/                   EXIT ;
"""
    assert main_loop(product_loops(blocks(text))).mix == {"all": 2, "HMMA.16816": 1}


def test_a_step_leaves_out_what_a_branch_may_skip():
    text = """
.L_a:
        /*0000*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0010*/               @P1 BRA `(.L_wait) ;
.L_go_on:
        /*0020*/               @P0 BRA `(.L_full) ;
        /*0030*/                   FSEL R3, R3, RZ, P2 ;
        /*0040*/                   FSEL R4, R4, RZ, P2 ;
.L_full:
        /*0050*/                   HMMA.16816.F32.BF16 R8, R3, R2, R8 ;
        /*0060*/               @P3 BRA `(.L_a) ;
        /*0070*/                   EXIT ;
.L_wait:
        /*0080*/               @P4 BRA `(.L_wait) ;
        /*0090*/                   BRA `(.L_go_on) ;
"""
    assert main_loop(product_loops(blocks(text))).mix == {"all": 5, "HMMA.16816": 2}


def test_products_on_two_sides_of_a_branch_are_all_in_the_step():
    text = """
.L_a:
        /*0000*/               @P0 BRA `(.L_b) ;
        /*0010*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*0020*/                   BRA `(.L_c) ;
.L_b:
        /*0030*/                   HMMA.16816.F32.BF16 R8, R3, R2, R8 ;
.L_c:
        /*0040*/               @P3 BRA `(.L_a) ;
        /*0050*/                   EXIT ;
"""
    assert main_loop(product_loops(blocks(text))).mix == {"all": 5, "HMMA.16816": 2}


def test_code_without_a_loop_of_products_has_no_main_loop():
    text = """
        /*0000*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
.L_a:
        /*0010*/                   FADD R3, R3, R4 ;
        /*0020*/               @P0 BRA `(.L_a) ;
        /*0030*/                   EXIT ;
"""
    assert main_loop(product_loops(blocks(text))) is None


def test_every_instruction_is_read_once_with_its_operands():
    found = [i for block in blocks(NESTED) for i in block.instructions]
    assert len(found) == 17
    assert found[1] == Instruction("HGMMA.64x64x16.F32.BF16", "R8, gdesc[UR8], RZ, !UPT, gsb0")
    assert found[10].opcode == "FFMA"


@pytest.mark.parametrize(("second", "chained"), [("R8", True), ("R24", False)])
def test_a_chain_is_two_products_in_a_row_on_one_accumulator(second, chained):
    text = f"""
        /*0000*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR8], R8, gsb0 ;
        /*0010*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 {second}, gdesc[UR8], {second}, gsb0 ;
"""
    assert blocks(text)[0].has_chain is chained


def loop_of(*instructions: tuple[int, str, str]) -> Loop:
    return Loop(tuple(Instruction(opcode, operands) for count, opcode, operands in instructions for _ in range(count)))


def test_the_model_adds_products_and_the_longest_of_the_rest():
    """128 x 64 scores of head dim 128 by 8 warps: 2 * 2 * 128 * 64 * 128 operations at 4096 a cycle are 1024 cycles."""
    products = (
        (8, "HGMMA.64x64x16.F32.BF16", "R88, gdesc[UR8], R88"),
        (4, "HGMMA.64x128x16", "R24, R88, gdesc[UR8], R24"),
    )
    issue = predict(loop_of(*products, (34, "MUFU.EX2", "R3, R3"), (366, "FFMA", "R3, R3, R4, R5")), 8)
    assert (issue.flop, issue.product_cycles, issue.other_cycles) == (4 << 20, 1024, 400 * 8 / 4)
    assert issue.cycles == 1824
    assert issue.tflops == pytest.approx(PEAK_TFLOPS * 1024 / 1824)
    exponentials = predict(loop_of(*products, (200, "MUFU.EX2", "R3, R3")), 8)
    assert exponentials.other_cycles == 200 * 32 * 8 / 16  # longer than 400 cycles of issue
    shared = predict(loop_of(*products, (100, "LDSM.16.M88.4", "R4, [R5]")), 8)
    assert shared.other_cycles == 100 * 512 * 8 / 128
    spilled = predict(loop_of(*products, (200, "STL.64", "[R1], R4"), (300, "LDL", "R4, [R1]")), 8)
    assert spilled.other_cycles == (200 * 256 + 300 * 128) * 8 / 128  # longer than 500 / 4 cycles of issue each
    loaded = predict(loop_of(*products, (32, "LDG.E.128", "R4, desc[UR6][R2.64]")), 8)
    assert loaded.other_cycles == 32 * 512 * 8 / 64
    copied = predict(loop_of(*products, (32, "LDGSTS.E.BYPASS.128", "[R5], desc[UR4][R2.64]")), 8)
    assert copied.other_cycles == 32 * 8 / 4  # nothing but their issue


def test_a_narrow_product_costs_what_its_operands_in_shared_memory_take():
    both = Instruction("HGMMA.64x16x16.F32.BF16", "R8, gdesc[UR8], R8, gsb0")
    one = Instruction("HGMMA.64x16x16.F32.BF16", "R8, R88, gdesc[UR8], R8, gsb0")
    assert product_cost(both, 8) == (2 * 2 * 64 * 16 * 16, 2 * (64 + 16) * 16 * 2 / 128)
    assert product_cost(one, 4) == (2 * 64 * 16 * 16, 8)
    assert product_cost(Instruction("HMMA.16816.F32.BF16", "R8, R4, R2, R8"), 4) == (4 * 4096, 4)
    with pytest.raises(ValueError, match="must be HGMMA"):
        product_cost(Instruction("UTCHMMA", "gdesc[UR8]"), 4)


@pytest.mark.parametrize(
    ("opcode", "operands", "size"),
    [
        ("LDS", "R4, [R5]", 128),
        ("LDS.128", "R4, [R5]", 512),
        ("STS.U16", "[R5], R4", 64),
        ("LDSM.16.MT88", "R4, [R5]", 128),
        ("STSM.16.M88.4", "[R5], R4", 512),
        ("LDS", "RZ, [RZ]", 0),
        ("LDGSTS.E.BYPASS.128", "[R5], desc[UR4][R2.64]", 0),
    ],
)
def test_bytes_of_shared_memory(opcode, operands, size):
    assert shared_bytes(Instruction(opcode, operands)) == size
