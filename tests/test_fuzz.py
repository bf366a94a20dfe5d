"""The fuzz targets of tests/fuzz for a few seconds: kept inputs again, new ones, and defects that
have to be found. `make fuzz` runs them for as long as asked."""

import itertools
import re

import helpers_fuzz as fuzzing
import pytest

SPARSE, DECODE = "sparse_flash_attention", "incre_flash_attention"
SECONDS = 2
# One small header of each operator: time goes into compiling.
SMALL = {
    SPARSE: "hl_sparse_flash_attention_f32_d32_rope8",
    "sparse_flash_attention_antiquant": "hl_sparse_flash_attention_antiquant_bf16_fp8_v4_d448_"
    "rope64_slots",
    DECODE: "hl_incre_flash_attention_f32_d64_stats_sinks_window_softcap_alibi",
    "fusion_attention": "hl_fusion_attention_f32_d64_pse_types_softcap_sinks",
    "fusion_attention_grad": "hl_fusion_attention_grad_f32_d64_pse_types_softcap",
}
SCALAR = "hl_incre_flash_attention_f16_i8_d32"  # plain C only


def program(target, op, name="", change=None):
    name = name or SMALL[op]
    return fuzzing.build(target, op, (name,), change={name: change} if change else None)


def run(tmp_path, target, op, name="", change=None, seconds=SECONDS):
    """Kept inputs, then new ones for some seconds."""
    name = name or SMALL[op]
    corpus = tmp_path / "corpus"
    fuzzing.unpack(target, op, corpus, (name,))
    return fuzzing.fuzz(program(target, op, name, change), corpus, seconds=seconds, seed=1)


@pytest.mark.parametrize("op", SMALL)
def test_checks(op, tmp_path):
    found = run(tmp_path, "checks", op)
    assert not found.failure, found.failure
    # Most of what is tried is refused, but not all; else nothing behind the first check is seen.
    assert found.calls > 5000
    assert found.calls // 50 < found.accepted < found.calls


def test_calls_that_are_run(tmp_path):
    """And what plain C made of them is what the oracle makes of them."""
    op, name = DECODE, SCALAR
    found = run(tmp_path, "run", op, name)
    assert not found.failure, found.failure
    assert found.accepted > 50
    dump = tmp_path / "dump"
    again = fuzzing.fuzz(
        program("run", op, name), tmp_path / "corpus", runs=0, env={"FUZZ_DUMP": str(dump)}
    )
    assert not again.failure, again.failure
    calls = itertools.islice(fuzzing.read_dump(dump, op, (name,)), 250)
    agreed = [d for d in calls if fuzzing.oracle_agrees(d)]
    assert len(agreed) > 15
    with pytest.raises(AssertionError):  # other results would have been noticed
        for d in agreed:
            out = d.pieces["attention_out"]
            out.data = bytes(byte ^ 0x40 for byte in out.data)
            fuzzing.oracle_agrees(d)


# What is taken out of a header's text: (target, what, by what, what the finding says).
DEFECTS = {
    "a_bound_of_the_table": (
        "checks",
        "if (a->block_table[at] > most) {",
        "if (a->block_table[at] > most + 1) {",
        "names no block",
    ),
    "an_overlap": (
        "checks",
        "&& b < a_end && range[j].bytes != 0 && i != j) {",
        "&& b + 64 < a_end && range[j].bytes != 0 && i != j) {",
        "overlaps",
    ),
    "an_argument_of_another_struct": (
        "checks",
        "{a->pse_width, HL_ARG_PSE_WIDTH}",
        "{a->pse_width, HL_ARG_PREFIX}",
        "none of the struct",
    ),
    "a_key_too_many": (
        "run",
        "const int32_t end = g->length - g->rows + i + 1;",
        "const int32_t end = g->length - g->rows + i + 2;",
        "SEGV|no number",
    ),
    "an_uninitialised_word": (
        "run",
        "        hl_vstore_scalar(t->l + h, hl_vzero_scalar());\n",
        "",
        "no number|depends on",
    ),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_seeded_defects_are_found(defect, tmp_path):
    target, what, by, said = DEFECTS[defect]
    found = run(tmp_path, target, DECODE, SCALAR, (what, by), seconds=30)
    assert re.search(said, found.failure), found.failure or found.log[-500:]


def test_kept_inputs_are_read_back(tmp_path):
    for op in SMALL:
        kept = tmp_path / op
        count = fuzzing.unpack("checks", op, kept)
        assert count > 20
        assert len(list(kept.iterdir())) == count
