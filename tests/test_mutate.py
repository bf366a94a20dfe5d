"""A handful of mutants that are killed, headers without a defect that are not: the control of
tests/mutate.py, and of the tests that it runs."""

import mutate
import pytest

PLAIN = "hl_sparse_flash_attention_f32_d64"
CODES = "hl_sparse_flash_attention_antiquant_bf16_i8_656_d512_rope64"
DECODE = "hl_incre_flash_attention_bf16_i8_d128"
TRAIN = "hl_fusion_attention_f32_d64_pse_types_softcap_sinks"
GRADS = "hl_fusion_attention_grad_f32_d64_pse_types_softcap"
# header, function, what stands there, what stands there instead
FIXED = [
    (PLAIN, "check_sizes", "a->chunk_keys % 128 != 0", "a->chunk_keys % 64 != 0"),
    (PLAIN, "hl_check_ranges", "b < a_end", "b <= a_end"),
    (PLAIN, "merge_state_scalar", "hl_vmax_scalar(m_t, m_u)", "m_t"),
    (CODES, "check_lengths", "id >= a->num_blocks", "id > a->num_blocks"),
    (DECODE, "check_layout", "a->block_size < 1", "a->block_size < 0"),
    (DECODE, "new_rows", "a->lengths != NULL", "a->lengths == NULL"),
    (TRAIN, "hl_vexp2_avx2", "2.40226477e-1f", "2.4e-1f"),
    (GRADS, "hl_check_apart", "count[least] > 1", "count[least] > 2"),
]


@pytest.mark.parametrize("header,ending,old,new", FIXED, ids=[f"{h}-{e}" for h, e, *_ in FIXED])
def test_killed(header, ending, old, new, tmp_path):
    mutant = mutate.named(header, ending, old, new)
    fate, by = mutate.killed_first(mutant, tmp_path)
    assert fate == "killed", by


@pytest.mark.parametrize("header,region", [(PLAIN, "scalar"), (TRAIN, "avx2")])
def test_a_header_without_a_defect_survives(header, region):
    """The control: what kills mutants kills nothing else."""
    assert mutate.control(header, region) == ("survived", "")


def test_what_the_optimiser_makes_the_same_of_is_no_mutant(tmp_path):
    same = mutate.named(PLAIN, "hl_check_apart", "turn < 3", "turn <= 2")
    assert mutate.same_object(same, tmp_path)
    other = mutate.named(PLAIN, "hl_check_apart", "turn < 3", "turn < 2")
    assert not mutate.same_object(other, tmp_path)


def test_a_defect_is_found_again_in_another_header():
    """Where the same lines have other names and numbers."""
    mutant = mutate.named(PLAIN, "check_lengths", "id >= a->num_blocks", "id > a->num_blocks")
    other = mutate.original(CODES)
    changed = mutant.elsewhere(other)
    assert changed != other and "if (id > a->num_blocks) {" in changed
    assert mutant.elsewhere(mutate.original(PLAIN)) == mutant.text()
    assert mutant.elsewhere("int x;") == "int x;"


def test_every_kind_of_defect_and_every_page_is_drawn():
    drawn = mutate.draw(3, 300)
    assert len(set(drawn)) == 300 and drawn[:60] == mutate.draw(3, 60)
    assert {m.header for m in drawn} == set(mutate.every.HEADERS)
    assert {m.region for m in drawn} >= set(mutate.REGIONS) - {"neon", *absent()}
    kinds = {"compare", "arithmetic", "number", "logic", "negate", "delete", "check", "swap"}
    assert kinds | {"lane"} <= {m.kind for m in drawn}
    for mutant in drawn[:20]:
        assert mutant.text() != mutate.original(mutant.header) and mutant.diff()


def absent() -> set[str]:
    return set(mutate.REGIONS) - {"shared", "neon", *mutate.helpers.ISAS_HERE}


def test_the_log_is_told_with_its_survivors():
    row = {"fate": "killed", "stage": 1, "region": "scalar", "page": "check", "kind": "swap"}
    lived = {**row, "fate": "survived", "header": "hl_x", "function": "f", "diff": "-a\n+b"}
    said = mutate.report([row, lived, {**row, "fate": "stillborn"}, {**row, "fate": "equivalent"}])
    assert "50.0% killed" in said and "hl_x f (check, swap)\n-a\n+b" in said
