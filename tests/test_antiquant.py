"""sparse_flash_attention_antiquant against the oracle: every record, layout, list, instruction set,
code and scale. What it shares with the plain operator is tested there; here it is drawn too."""

import dataclasses
import itertools

import numpy as np
import pytest
from helpers import (
    BF16,
    SHIPPED_RECORDS,
    SMALL_RECORDS,
    as_computed,
    by_pair,
    by_way,
    check,
    enough_heads,
    groups_of,
    header,
    isas_in,
    kernel,
    same_bits,
)
from helpers_cases import (
    NOT_READ,
    RECORD_SPREADS,
    Case,
    Shape,
    make_case,
    packed,
    run,
    run_guarded,
    shapes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, PA_BSND, TND, field_bytes, flat, rows, sparse_flash_attention
from test_operator import WAYS, groups_on

from gen.isa import ISAS

EVERY = (*SMALL_RECORDS, *SHIPPED_RECORDS)


def paged_only(name: str) -> bool:
    """Whether scales lie behind the rows of a page: one layout, one kv head."""
    return bool(kernel(name).record.behind)


def shape_of(name: str, **changes: object) -> Shape:
    """A Shape that the kernel's cache can have: what is said of another becomes paged."""
    made = Shape(**changes)
    if not paged_only(name):
        return made
    return dataclasses.replace(made, layout_kv=PA_BSND, heads_kv=1)


def drawn(name: str, **more: object) -> st.SearchStrategy[Shape]:
    """Any small call of a kernel."""
    return shapes(
        rope=kernel(name).rope > 0,
        slots="slots" in header(name).kernels[0].features,
        layouts=(PA_BSND,) if paged_only(name) else (BSND, TND, PA_BSND),
        heads_kv=(1,) if paged_only(name) else (1, 1, 2),
        spreads=RECORD_SPREADS,
        **more,
    )


def fields_of(case: Case) -> dict[str, np.ndarray]:
    """The numbers of a call's records, to be looked at and changed: nope, rope, scale."""
    return field_bytes(flat(case.args.key), case.args.record, case.dtype)


# ---- every shape --------------------------------------------------------------------------------


def test_every_instruction_set_is_present():
    for name in EVERY:
        assert set(kernel(name).isas()) == set(isas_in(name))


@by_pair(*SMALL_RECORDS)
@settings(max_examples=30)
@given(data=st.data())
def test_any_call(name, isa, data):
    """Between guard pages, with gaps between records and pages, in every layout."""
    shape = data.draw(drawn(name, groups=groups_on(name, isa)))
    case = make_case(kernel(name), shape)
    way = dataclasses.replace(data.draw(WAYS), isa=isa)
    check(case.args, run_guarded(kernel(name), case, way), isa)


@pytest.mark.parametrize("name", SHIPPED_RECORDS)
@settings(max_examples=14)
@given(data=st.data())
def test_any_call_of_shipped_headers(name, data):
    k = kernel(name)
    shape = data.draw(drawn(name, max_keys=40, max_rows=2, groups=st.integers(1, 3)))
    for isa in k.isas():
        enough = dataclasses.replace(shape, group=enough_heads(name, isa, shape.group))
        case = make_case(k, enough)
        way = dataclasses.replace(data.draw(WAYS), isa=isa)
        check(case.args, run_guarded(k, case, way), isa)


@by_pair(*SMALL_RECORDS)
def test_any_number_of_heads(name, isa):
    """Every way through a block, each with several numbers of keys."""
    k = kernel(name)
    for group in (*range(1, 10), 15, 16, 17, 18, 31, 32, 33, 34, 48, 65, 128):
        shape = shape_of(
            name,
            lens_q=(2,),
            lens_kv=(19 + group,),
            group=group,
            seed=group,
            sparse_mode=3,
            joined_q=group % 2 == 0,
            spread=RECORD_SPREADS[group % len(RECORD_SPREADS)],
        )
        case = make_case(k, shape)
        check(case.args, run(k, case, isa), isa)


@by_way(*SMALL_RECORDS, few=3)
def test_key_counts_round_every_block_and_chunk(name, isa, group):
    """Scores grow, so that each block's largest is above the last one's, and every rescale runs."""
    k = kernel(name)
    counts = sorted(
        {
            *range(0, 6),
            *(n + d for n in (8, 16, 32, 48, 64, 128, 256, 512) for d in (-1, 0, 1)),
            770,
        }
    )  # on tiles a block of 256 is decoded beside the products of the one before, by turns
    for n in counts:
        case = make_case(k, shape_of(name, lens_kv=(n,), group=group, spread="growing", seed=n))
        for chunk in (0, 128) if n > 128 else (0,):
            check(case.args, run(k, case, isa, chunk_keys=chunk), isa)


@pytest.mark.parametrize("name", SHIPPED_RECORDS)
@pytest.mark.parametrize("group", [1, 2, 4, 7, 16, 17, 33, 128])
def test_the_shipped_shape(name, group):
    """A list over pages in no order; on tiles fewer keys, where they are emulated."""
    k = kernel(name)
    for isa in k.isas():
        few = ISAS[isa].tiles or group == 128
        keys = 70 if few else 300
        shape = Shape(lens_kv=(keys,), group=group, layout_kv=PA_BSND, block_size=16, seed=group)
        case = make_case(k, shape)
        ids = np.random.default_rng(group).permutation(keys)[: keys - 9].astype(np.int32)
        case = case.changed(sparse_indices=ids.reshape(1, 1, 1, -1))
        check(case.args, run(k, case, isa), isa)


@by_way("f16_i8_tails", "bf16_fp8_page", few=8)
def test_error_rule_on_realistic_scores(name, isa, group):
    """Enough rows that the plain implementation's largest error is not luck: no slack is needed."""
    k = kernel(name)
    shape = shape_of(name, lens_q=(6,), lens_kv=(300,), group=group, sparse_mode=3, seed=7)
    case = make_case(k, shape)
    case = case.changed(scale_value=abs(case.args.scale_value))
    check(case.args, run(k, case, isa, chunk_keys=128), isa, strict=True)


@by_way("f16_i8_tails", "bf16_fp8_wide", few=2)
def test_layouts_only_change_addresses(name, isa, group):
    """The same records in BSND, TND, and pages: the same bits; two kv heads."""
    k = kernel(name)
    base = make_case(k, Shape(lens_q=(2, 2), lens_kv=(40, 40), heads_kv=2, group=group, seed=3))
    a = base.args
    want = run(k, base, isa)["attention_out"]
    tnd = base.changed(
        query=a.query.reshape(4, *a.query.shape[2:]),
        query_rope=a.query_rope.reshape(4, *a.query_rope.shape[2:]),
        key=a.key.reshape(80, *a.key.shape[2:]),
        layout_query=TND,
        layout_kv=TND,
        actual_seq_lengths_query=np.array([2, 4], np.int32),
        actual_seq_lengths_kv=np.array([40, 80], np.int32),
    )
    assert same_bits(run(k, tnd, isa)["attention_out"], want.reshape(4, *want.shape[2:]))
    order = np.random.default_rng(1).permutation(10)
    pages = np.empty_like(a.key.reshape(10, 8, *a.key.shape[2:]))
    pages[order] = a.key.reshape(pages.shape)
    table = order.astype(np.int32).reshape(2, 5)
    paged = base.changed(key=pages, layout_kv=PA_BSND, block_table=table)
    assert same_bits(run(k, paged, isa)["attention_out"], want)


@by_pair(*SMALL_RECORDS)
def test_value_is_never_read(name, isa):
    """Any pointer, or none."""
    k = kernel(name)
    for group in groups_of(name, isa, 2):
        case = make_case(k, shape_of(name, lens_kv=(40,), group=group, value=True, seed=1))
        assert case.extra["value"] == NOT_READ
        got = run(k, case, isa)
        for other in (0, case.args.query.ctypes.data, 2**63):
            case.extra["value"] = other
            assert same_bits(run(k, case, isa)["attention_out"], got["attention_out"])


@by_way(*SMALL_RECORDS, few=1)
def test_what_is_asked_for_twice_may_say_what_is_so(name, isa, group):
    """quant modes, repository mode, tile size and rope: 0 or the only value that is right."""
    k = kernel(name)
    case = make_case(k, shape_of(name, lens_kv=(9,), group=group, seed=2))
    want = run(k, case, isa)["attention_out"]
    said = {
        "key_quant_mode": 2,
        "value_quant_mode": 2,
        "quant_scale_repo_mode": 1,
        "tile_size": case.args.record.tile,
        "rope_head_dim": k.rope,
        "attention_mode": 2,
    }
    assert same_bits(run(k, case, isa, **said)["attention_out"], want)


# ---- every code, and scales of any kind ---------------------------------------------------------


def single_keys(name: str, group: int, count: int) -> Case:
    """Rows that see one key each, every one another, which is what they return."""
    lens = (1,) * count
    shape = shape_of(name, lens_q=lens, lens_kv=lens, group=group, block_size=1, spare_blocks=0)
    for seed in range(50):
        case = make_case(kernel(name), dataclasses.replace(shape, seed=seed))
        if len({int(r.kv_rows[0]) for r in rows(case.args)}) == count:
            break
    case.args.scale_value = 0.01
    case.extra["out_f32"] = 1
    return case


def check_single(name: str, case: Case, isa: str) -> None:
    """Words return float32's product itself. Tiles weigh with a number near 1 and divide by it; of
    float16 in two parts by a sum of what was not rounded to those."""
    got = flat(run(kernel(name), case, isa)["attention_out"])
    near = 2.0**-22 if case.dtype == BF16 else 2.0**-15
    for r in rows(as_computed(case.args, isa)):
        assert r.v.shape == (1, kernel(name).dv)
        if ISAS[isa].tiles:
            assert np.allclose(got[r.row], r.v, rtol=near, atol=0.0)
        else:
            assert (got[r.row] == r.v).all()


@by_way(*EVERY, few=1)
def test_every_code(name, isa, group):
    """All 256 codes through the whole kernel, at every place in a vector, with several scales."""
    k = kernel(name)
    is_e4m3 = fields_of(single_keys(name, group, 1))["nope"].dtype != np.int8
    shown = min(k.dk, k.dv)  # of a row's codes
    count = -(-256 // shown) + 1
    case = single_keys(name, group, count)
    fields = fields_of(case)
    codes = np.arange(count).reshape(count, 1, 1) * shown + np.arange(k.dk)
    for turn, scale in enumerate((1.0, 0.3, -2.5)):
        codes = (codes + 37 * turn) % 256
        nan = (codes & 0x7F == 0x7F) & is_e4m3
        assert len(np.unique(codes[..., :shown])) == 256
        fields["nope"].view(np.uint8)[...] = np.where(nan, 0, codes)
        fields["scale"][...] = 120 + turn if scale_kind(name) == "e8m0" else scale
        check_single(name, case, isa)


@by_way("bf16_fp8_wide", "bf16_fp8_page", "bf16_fp8_codes", few=1)
def test_both_nan_codes(name, isa, group):
    """0x7f and 0xff make their own row NaN, wherever in it they are, and no other row."""
    k = kernel(name)
    places = (0, 1, 15, 16, k.dk - 1)
    case = single_keys(name, group, 2 * len(places))
    fields_of(case)["nope"][...] = 1.0
    order = [r.kv_rows[0] for r in rows(case.args)]
    for i, at in enumerate(places):
        for code, row in ((0x7F, 2 * i), (0xFF, 2 * i + 1)):
            clean = run(k, case, isa)["attention_out"]
            bad = case.changed(key=case.args.key.copy())
            fields_of(bad)["nope"].view(np.uint8)[order[row], 0, at] = code
            got = run(k, bad, isa)
            assert np.isnan(got["attention_out"][row]).all()
            assert np.isnan(got["softmax_lse"][row]).all()
            others = np.arange(2 * len(places)) != row
            assert same_bits(got["attention_out"][others], clean[others])


NANS = {  # quiet, signalling, with every bit set
    np.dtype(np.float32): (0x7FC00000, 0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFF8000),
    np.dtype(np.float16): (0x7E00, 0x7C01, 0xFC01, 0x7FFF, 0xFFFF),
    BF16: (0x7FC0, 0x7F81, 0xFF81, 0x7FFF, 0xFFFF),
    np.dtype(np.uint8): (255,),
}


@by_way(*EVERY, few=1)
def test_every_nan_is_a_nan(name, isa, group):
    """Scales and rotary channels of any bits that mean one: nothing rounds them away."""
    for what in ("scale", "rope"):
        case = single_keys(name, group, 8)
        fields = fields_of(case)
        fields["nope"][...] = 1.0
        if what not in fields:
            continue
        places = [r.kv_rows[0] for r in rows(case.args)]
        bits = NANS[fields[what].dtype]
        field = fields[what].view(f"u{fields[what].itemsize}")
        for row, one in enumerate(bits):
            field[places[row], 0, row % field.shape[-1]] = one
        got = run(kernel(name), case, isa)
        nan = np.arange(8) < len(bits)
        assert (np.isnan(got["attention_out"]).all(axis=(1, 2, 3)) == nan).all(), what
        assert not np.isnan(got["attention_out"][~nan]).any()
        assert (np.isnan(got["softmax_lse"]).reshape(8, -1).all(axis=1) == nan).all(), what


FINITE = {"zero": 0.0, "minus zero": -0.0, "negative": -0.75, "subnormal": 1e-40, "large": 30.0}
FINITE_POWERS = {"2^-127": 0, "2^-126": 1, "1": 127, "2^4": 131}


def scale_kind(name: str) -> str:
    record = kernel(name).record
    return next(kind for what, kind, _ in (*record.fields, *record.behind) if what == "scale")


def with_scale(case: Case, at: int, t: int, scale: float) -> tuple[Case, int]:
    """One scale of the key that the last row sees as number `at`; where that key lies."""
    row = list(rows(case.args))[-1].kv_rows[at]
    changed = case.changed(key=case.args.key.copy())
    fields_of(changed)["scale"][row, 0, t] = scale
    return changed, row


@by_way(*SMALL_RECORDS, few=2)
def test_finite_scales_of_any_kind(name, isa, group):
    """Beside ordinary keys, in the first and in the last tile of one."""
    k = kernel(name)
    scales = FINITE_POWERS if scale_kind(name) == "e8m0" else FINITE
    shape = shape_of(name, lens_q=(2,), lens_kv=(37,), group=group, sparse_mode=3, seed=4)
    clean = make_case(k, shape)
    for (what, scale), t, at in zip(scales.items(), (0, -1) * 3, (36, 0, 20, 1, 15), strict=False):
        case, _ = with_scale(clean, at, t, scale)
        try:
            check(case.args, run(k, case, isa), isa)
        except AssertionError as error:
            raise AssertionError(f"scale {what}, key {at}: {error}") from error


@by_way(*SMALL_RECORDS, few=1)
def test_one_key_with_any_finite_scale_is_returned(name, isa, group):
    """As float32 has the product, subnormal or not; on tiles subnormal numbers count as 0."""
    k = kernel(name)
    few_bits = scale_kind(name) == "f16"
    largest, smallest = (3e4, 2.0**-24) if few_bits else (2.0**100, 2.0**-140)
    scales = [0.0, -0.0, -0.75, 1.0 / 3.0, smallest, -smallest, largest, -largest]
    if scale_kind(name) == "e8m0":
        scales = [0, 1, 2, 120, 127, 200, 227, 90]
    case = single_keys(name, group, len(scales))
    case.args.scale_value = 0.0
    fields = fields_of(case)
    for row, scale in zip([r.kv_rows[0] for r in rows(case.args)], scales, strict=True):
        fields["scale"][row] = scale
    fields["nope"][...] = np.arange(k.dk) % 15 - 7
    got = flat(run(k, case, isa)["attention_out"])
    for r in rows(as_computed(case.args, isa)):
        if ISAS[isa].tiles:
            near = 2.0**-22 if case.dtype == BF16 else 2.0**-15
            assert np.allclose(got[r.row], r.v, rtol=near, atol=2.0**-125), scales[r.row]
        else:
            assert (got[r.row] == r.v).all(), scales[r.row]


@by_way(*SMALL_RECORDS, few=2)
def test_scales_that_are_not_finite(name, isa, group):
    """NaN, or infinite with products of one sign: NaN where the oracle says so, in the rows that
    see it. A score of -infinity has no weight, but its value is NaN."""
    k = kernel(name)
    shape = shape_of(name, lens_q=(2,), lens_kv=(37,), group=group, sparse_mode=3, seed=4)
    clean = make_case(k, shape)
    clean.args.scale_value = 0.1
    fields_of(clean)["nope"][...] = 1.0
    kinds = (255,) if scale_kind(name) == "e8m0" else (np.nan, np.inf, -np.inf)
    for sign in (1, -1):
        for tensor in (clean.args.query, clean.args.query_rope):
            if tensor is not None:
                tensor[...] = sign * abs(tensor)
        before = run(k, clean, isa)
        for scale, (at, t) in itertools.product(kinds, ((36, 0), (0, -1), (20, 0))):
            case, _ = with_scale(clean, at, t, scale)
            got = run(k, case, isa)
            want = sparse_flash_attention(as_computed(case.args, isa))
            out = got["attention_out"].astype(np.float64)
            assert (np.isnan(out) == np.isnan(want.out)).all(), (scale, at)
            assert np.isnan(want.out).any() or np.isinf(scale)  # it may lie behind the value
            for stat in ("max", "lse"):
                found, exact = got[f"softmax_{stat}"], getattr(want, stat)
                if not np.isinf(scale):
                    assert (np.isnan(found) == np.isnan(exact)).all(), (scale, at, stat)
                assert (np.isfinite(found) == np.isfinite(exact)).all(), (scale, at, stat)
            if at == 36:  # the first row does not see the last key
                assert same_bits(got["attention_out"][:, 0], before["attention_out"][:, 0])


@by_way(*SHIPPED_RECORDS, few=1)
def test_a_nan_reaches_the_rows_that_see_it_and_no_others(name, isa, group):
    """One NaN of each kind that a record can hold, in lists that share the block and the page."""
    k = kernel(name)
    shape = shape_of(
        name,
        lens_q=(3, 2),
        lens_kv=(20, 24),
        group=group,
        lists="blocks",
        list_length=12,
        layout_kv=PA_BSND,
        block_size=8,
        seed=9,
    )
    clean = make_case(k, shape)
    before = flat(run(k, clean, isa)["attention_out"])
    seen = {r.row: set(r.kv_rows.tolist()) for r in rows(clean.args)}
    busy = max(seen, key=lambda row: len(seen[row]))
    victim = min(seen[busy])
    for what in ("nope", "rope", "scale"):
        bad = clean.changed(key=clean.args.key.copy())
        numbers = fields_of(bad)[what]
        if numbers.dtype == np.int8:
            continue
        numbers[victim, 0, -1] = 255 if numbers.dtype == np.uint8 else np.nan
        after = flat(run(k, bad, isa)["attention_out"])
        hit = [row for row in seen if victim in seen[row]]
        assert 0 < len(hit) < len(seen)
        for row in range(len(after)):
            if row in hit:
                assert np.isnan(after[row].astype(np.float32)).all(), (what, row)
            else:
                assert same_bits(after[row], before[row]), (what, row)


# ---- what nobody reads --------------------------------------------------------------------------


def read_bytes(case: Case) -> np.ndarray:
    """Which bytes of the cache some row needs: those of numbers, in records that it sees."""
    a = case.args
    mark = np.zeros_like(a.key)
    for field in field_bytes(mark, a.record, case.dtype).values():
        field.view(np.uint8)[...] = 1
    seen = np.zeros(flat(a.key).shape[:2], bool)
    for r in rows(a):
        seen[r.kv_rows, r.n2] = True
    flat(mark)[~seen] = 0
    return packed(dataclasses.replace(a, key=mark))[0].reshape(-1) == 1


@by_way(*EVERY, few=1)
@pytest.mark.parametrize("lists", ["none", "blocks", "slots"])
def test_bytes_that_nobody_reads_change_nothing(name, isa, group, lists):
    """Padding of records and pages, records behind the lengths or that no list names, pages of
    nobody: 0xff in them as well as anything else."""
    k = kernel(name)
    if lists == "slots" and "slots" not in header(name).kernels[0].features:
        return
    shape = shape_of(
        name,
        lens_q=(2, 1),
        lens_kv=(21, 10),
        group=group,
        pad_kv=3,
        layout_kv=PA_BSND,
        block_size=6,
        lists=lists,
        list_length=9,
        list_lengths=lists == "slots",
        seed=6,
    )
    case = make_case(k, shape)
    memory, read = case.inputs()["key"], read_bytes(case)
    assert 0 < read.sum() < read.size
    assert (memory.reshape(-1)[~read] == 0xFF).all()
    want = run(k, case, isa)
    check(case.args, want, isa)
    rng = np.random.default_rng(2)
    for other in (np.zeros(read.size, np.uint8), rng.integers(0, 256, read.size).astype(np.uint8)):
        changed = np.where(read, memory.reshape(-1), other).reshape(memory.shape)
        got = run(k, case, isa, key=changed)
        assert all(same_bits(got[n], want[n]) for n in want)
    one = np.flatnonzero(read)
    changed = memory.copy().reshape(-1)
    changed[one] ^= 0x3C
    got = run(k, case, isa, key=changed)
    assert not same_bits(got["attention_out"], want["attention_out"]), "the control changed no bit"


# ---- rules that are exact -----------------------------------------------------------------------


@by_way(*SMALL_RECORDS, few=2)
def test_rows_that_see_nothing_are_zero_in_every_bit(name, isa, group):
    k = kernel(name)
    for sinks in ("none", "plain"):
        shape = shape_of(
            name, lens_q=(2, 1), lens_kv=(9, 0), pad_q=2, group=group, lists="blocks",
            list_length=4, sinks=sinks, seed=1,
        )  # fmt: skip
        case = make_case(k, shape)
        case = case.changed(sparse_indices=np.full_like(case.args.sparse_indices, -1))
        got, want = run(k, case, isa), sparse_flash_attention(case.args)
        assert not got["attention_out"].view(np.uint8).any()
        assert same_bits(got["softmax_sum"], want.sum.astype(np.float32))


@by_way(*SMALL_RECORDS, few=2)
def test_float_output_is_the_output_before_rounding(name, isa, group):
    k = kernel(name)
    case = make_case(k, shape_of(name, lens_q=(2,), lens_kv=(50,), group=group, seed=6))
    rounded = run(k, case, isa)["attention_out"]
    case.extra["out_f32"] = 1
    exact = run(k, case, isa)["attention_out"]
    assert exact.dtype == np.float32 and same_bits(exact.astype(case.dtype), rounded)


def test_control_a_wrong_scale_is_noticed():
    """The comparison itself: one scale of one key, 2 % off."""
    k = kernel("bf16_i8_alone")
    case = make_case(k, Shape(lens_q=(1,), lens_kv=(3,), group=2, seed=1))
    got = run(k, case, "scalar")
    other = case.changed(key=case.args.key.copy())
    fields_of(other)["scale"][1] *= 1.02
    with pytest.raises(AssertionError):
        check(other.args, got, "scalar")
