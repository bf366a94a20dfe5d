"""A slice of make compilers: one header of each operator has the same bits from other compilers,
and none makes one operation of a product and a sum that a header writes as two."""

import functools
import re

import compilers
import helpers_every as every
import pytest
from helpers import WORDS_HERE, same_bits

from gen import bind

ISA = WORDS_HERE[min(1, len(WORDS_HERE) - 1)]  # AVX2, or what there is
FEATURES = "hl_incre_flash_attention_f32_d64_stats_sinks_window_softcap_alibi"
OTHERS = (("gcc", "-O0", "-std=c99"), ("clang", "-O1", "-std=c99"))  # contraction off; on


@functools.cache
def wanted(name: str) -> list[dict]:
    """From the library that all tests use: GCC, as gnu, where all may be contracted."""
    return [call.run(ISA) for call in compilers.calls_of(name, 2)]


@pytest.mark.parametrize("compiler,level,standard", OTHERS)
@pytest.mark.parametrize("name", compilers.QUICK)
def test_other_compilers_make_the_same_bits(name, compiler, level, standard):
    flags, defines = (level, standard, "-w"), (f"HL_ISA_ONLY_{ISA.upper()}",)
    other = bind.load(every.text(name), compiler=compiler, flags=flags, defines=defines)
    for call, want in zip(compilers.calls_of(name, 2), wanted(name), strict=True):
        got = call.outputs()
        result = other.run(**{**call.fields(0), **got, "isa": other.isas()[ISA]})
        assert result.ok, result.error_text
        assert all(same_bits(got[output], want[output]) for output in want), call.case.shape


def without_rounding(text: str) -> str:
    """The header with nothing that keeps products apart."""
    plain = re.sub(r"(#define HL_ROUNDED\(x\)) __asm__.*", r"\1 (void)(x)", text)
    plain = re.sub(r"return hl_vkeep_(\w+)\((_mm\d+_mul_ps\(x, y\))\);", r"return \2;", plain)
    assert plain != text
    return plain


@pytest.mark.parametrize("compiler,level", [("gcc", "-Os"), ("clang", "-O1")])
def test_nothing_is_fused_that_is_not_written(compiler, level):
    """The header with most options, all contraction allowed; and without its guard more is."""
    text = every.text(FEATURES)
    asked, made = compilers.fused_by_itself(text, compiler, level, "fast", ISA)
    assert asked == made > 0
    flags = (level, "-std=gnu99", "-w", "-ffp-contract=fast")
    control = compilers.fused(without_rounding(text), compiler, flags, ISA)
    assert control > asked, "the control is fused no more than it says"


def test_sums_of_rows_that_are_not_finite_were_fused():
    """Training adds rows with a NaN or an infinity by themselves: their finite numbers had other
    bits from Clang."""
    text = every.text("hl_fusion_attention_grad_bf16_d128")
    asked, made = compilers.fused_by_itself(text, "clang", "-O1", "fast", ISA)
    assert asked == made > 0
