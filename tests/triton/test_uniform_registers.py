"""The reader of machine code can find what it looks for."""

from tests.triton.uniform_registers import read_before_set

CODE = """
        /*0000*/                   ULDC.64 UR4, c[0x0][0x208] ;
        /*0010*/              @!P1 BRA `(.L_x_0) ;
        /*0020*/                   R2UR UR58, R3 ;
        /*0030*/                   R2UR P2, UR59, R4 ;
.L_x_0:
        /*0040*/                   UIADD3 UR60, UP0, UR5, 0x2, URZ ;
        /*0050*/                   HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR56].tnspB, R24 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
"""


def test_a_register_that_one_path_leaves_unset_is_found() -> None:
    found = "HGMMA.64x32x16.F32.BF16 R24, R56, gdesc[UR56].tnspB, R24"
    assert read_before_set(CODE) == [found]
    always = CODE.replace("@!P1 BRA `(.L_x_0)", "     NOP")
    assert read_before_set(always) == []


def test_both_operands_in_shared_memory_take_four_registers() -> None:
    both = CODE.replace("@!P1 BRA `(.L_x_0)", "     NOP").replace("R24, R56, gdesc", "R24, gdesc")
    assert len(read_before_set(both)) == 1
