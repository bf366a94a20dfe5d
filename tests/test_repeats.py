"""A slice of make determinism: every shipped header on every instruction set here, some repeats in
as many ways; and defects seeded into a header, which the same repeats have to notice."""

import functools

import helpers_every as every
import pytest
from helpers_repeat import families, repeat

from gen import bind
from gen.isa import ISAS

REPEATS = {False: 14, True: 2}  # tiles may be emulated: a repeat takes a hundred times as long
# A header with a defect in it: the factor of its scores is sometimes a little more. When?
DEFECTS = {
    "address": "(int64_t)((uintptr_t)a->query / 4 % 2)",
    "batch": "(int64_t)a->batch % 2",
    "page": "(int64_t)a->block_size / 16 % 2",
    "order": "0",  # the factor is wrong wherever it is used, every other time
}
SEEDED = {  # of each operator the one that compiles in the shortest time
    "hl_sparse_flash_attention_f32_d32_rope8": DEFECTS,
    "hl_incre_flash_attention_f16_i8_d32": DEFECTS,
    "hl_fusion_attention_f32_d64_pse_types_softcap_sinks": ("address", "batch", "order"),
    "hl_fusion_attention_grad_f32_d64_pse_types_softcap": ("address", "batch", "order"),
}


@every.by_pair()
def test_the_same_bits_whatever_is_around_a_row(name, isa):
    """Alone, first, last and among others; every layout, pages of 1 to 128, shuffled; 1 to 16
    threads, any order of tasks and merges, partials or not; any address."""
    for family in families(name):
        found = repeat(name, isa, family, REPEATS[ISAS[isa].tiles])
        assert found.watched > 0
        assert found.differing == 0, f"{family.what}: {found}"


@functools.cache
def seeded(name: str) -> bind.Kernel:
    """The header's plain C with all of DEFECTS, none of them switched on."""
    text = every.text(name)
    at = "p.scale_log2 = a->scale_value * 1.44269504f;"
    assert text.count(at) == 1 and "plan->scale_log2" in text
    conditions = [DEFECTS[defect] if defect in SEEDED[name] else "0" for defect in DEFECTS]
    cases = "".join(f"(hl_seeded == {i} && ({c}) != 0) || " for i, c in enumerate(conditions))
    text = text.replace("plan->scale_log2", "hl_seeded_scale(plan->scale_log2)")
    text = text.replace(
        at, f"p.scale_log2 = a->scale_value * ({cases} 0 ? 1.442696f : 1.44269504f);"
    )
    before = """
#include <stdint.h>
static int hl_seeded = -1;
static int hl_seeded_calls;
static inline float hl_seeded_scale(float x)
{
    return hl_seeded == 3 && ++hl_seeded_calls % 2 != 0 ? x * 1.000001f : x;
}
"""
    setter = "void seed(int defect);\nvoid seed(int defect) { hl_seeded = defect; }"
    made = bind.load(before + text, flags=("-O0",), defines=("HL_ISA_ONLY_SCALAR",), extra=setter)
    plain = every.kernel(name)
    made.dtype, made.record = plain.dtype, getattr(plain, "record", None)
    return made


@pytest.mark.parametrize("name,defect", [(n, d) for n, found in SEEDED.items() for d in found])
def test_repeats_notice(name, defect):
    """The control: what depends on an address, on the batches around, on the size of pages or on
    what was computed before has other bits in some repeat; without a defect none has."""
    k, family = seeded(name), families(name)[0]
    k.library.seed(-1)
    assert repeat(name, "scalar", family, 35, k).differing == 0
    k.library.seed(list(DEFECTS).index(defect))
    found = repeat(name, "scalar", family, 35, k)
    k.library.seed(-1)
    assert found.differing > 0 and found.way["status"] == 0
