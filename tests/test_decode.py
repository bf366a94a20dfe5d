"""incre_flash_attention against its oracle: every layout, format, length, mask and option."""

import dataclasses
import math

import numpy as np
import oracle_decode as oracle
import pytest
from helpers import BF16, ISAS_HERE, same_bits
from helpers_cases import INT_MIN, STATS
from helpers_decode import (
    CODED,
    PAIRS,
    SCALED,
    SMALL,
    SPECS,
    Case,
    Shape,
    Way,
    best_in,
    by_pair,
    check,
    check_call,
    check_guarded,
    execute,
    fields_of,
    formats_of,
    has,
    in_floats,
    isas_in,
    kernel,
    make_case,
    run,
    with_feature,
)
from oracle import BSND, PA_BSND
from oracle_decode import BNSD, BSH, CHANNEL, PA_BNSD, PAGED, TENSOR, TOKEN, by_row

ALL = tuple(SPECS)
STATS_HERE = with_feature("stats")


def some(shape: Shape, **changes: object) -> Shape:
    return dataclasses.replace(shape, **changes)


def can_leave_value_out(name: str) -> bool:
    """Whether a key's first channels can be the value: stored alike, and enough of them."""
    widths = SPECS[name]["dk"], SPECS[name]["dv"]
    return formats_of(name) in (("", ""), ("i8", "i8")) and widths[1] <= widths[0]


def test_every_instruction_set_is_present():
    for name in ALL:
        assert tuple(kernel(name).isas()) == isas_in(name)
        plain = SPECS[name]["dtype"] == "bf16" and formats_of(name) == ("", "")
        assert ("amx" in isas_in(name)) == (plain and "amx" in ISAS_HERE)


# ---- layouts, rows, heads -----------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layouts", PAIRS)
def test_every_layout(name, isa, layouts):
    layout_q, layout_kv = layouts
    shape = Shape(
        lens=(37, 5, 0),
        seq_q=3,
        heads_kv=2,
        group=3,
        layout_q=layout_q,
        layout_kv=layout_kv,
        room=2,
        block_size=5,
        pse="each",
        mask="each",
        mask_rows=True,
        seed=layout_q * 7 + layout_kv,
    )
    check_guarded(name, shape, Way(isa))
    check_guarded(name, some(shape, seq_q=1), Way(isa, "left", strides=True))


@by_pair(*ALL)
def test_every_number_of_rows(name, isa):
    """The later ones of which see no key of the second batch's, or few."""
    for rows in range(1, 17):
        group, layout = 1 + rows % 3, (BSND, BNSD)[rows % 2]
        shape = Shape(
            lens=(41, 7),
            seq_q=rows,
            heads_kv=2,
            group=group,
            layout_q=layout,
            layout_kv=layout,
            seed=rows,
        )
        check_call(name, shape, isa)


@by_pair(*ALL)
def test_any_number_of_heads(name, isa):
    """From multi-head to multi-query; more than 32 pairs of a row and a head are computed another
    way, by rows or by heads."""
    for group in (*range(1, 13), 15, 16, 17, 31, 32, 33, 40, 64):
        check_call(name, Shape(lens=(19,), group=group, seed=group), isa)
    for heads_kv, group, rows in ((8, 1, 1), (4, 2, 2), (3, 5, 7), (2, 33, 1), (2, 3, 11)):
        shape = Shape(lens=(35, 12), heads_kv=heads_kv, group=group, seq_q=rows, seed=group)
        check_call(name, shape, isa)
    for group in (2, 3, 5, 7, 11, 16):
        check_call(name, Shape(lens=(40,), group=group, seq_q=16, seed=group), isa)


@by_pair(*ALL)
def test_every_number_of_keys(name, isa):
    for n in (*range(0, 20), *range(30, 35), *range(62, 67), *range(94, 99), *range(126, 131)):
        check_call(name, Shape(lens=(n,), group=1 + n % 4, spread="growing", seed=n), isa)


@by_pair(*filter(can_leave_value_out, ALL))
def test_values_in_the_first_channels_of_the_keys(name, isa):
    for group, rows in ((1, 1), (3, 4), (16, 1), (16, 3)):
        for layout in (BSND, PA_BSND):
            shape = Shape(
                lens=(50, 20),
                seq_q=rows,
                heads_kv=2,
                group=group,
                layout_kv=layout,
                value=False,
                seed=group,
            )
            k = kernel(name)
            case = make_case(k, shape)
            got = run(k, case, isa)
            check(case.args, got, isa)
            copy = case.changed(value=case.args.key[..., : k.dv].copy())
            check(copy.args, run(k, copy, isa), isa)


@by_pair(*SMALL)
def test_zero_is_the_default_of_every_size(name, isa):
    """batch of lengths, heads, rows, widths: what is left at 0 is what the struct says."""
    k = kernel(name)
    case = make_case(k, Shape(lens=(9, 9), pse="each", mask="each", lengths="none", seed=1))
    want = run(k, case, isa)
    for zero in (
        "seq_q",
        "heads_q",
        "heads_kv",
        "lengths",
        "pse_batch",
        "pse_width",
        "mask_batch",
        "mask_rows",
        "mask_width",
        "isa",
    ):
        got = run(k, case, **{"isa": k.isas()[isa], zero: 0})
        if zero == "isa":
            check(case.args, got, best_in(name))
        else:
            assert same_bits(got["attention_out"], want["attention_out"]), zero


@by_pair(*SMALL)
def test_scale_zero_is_one_and_negative_turns_the_order(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens=(33,), group=3, seed=4))
    zero, one = (run(k, case.changed(scale_value=scale), isa) for scale in (0.0, 1.0))
    assert same_bits(zero["attention_out"], one["attention_out"])
    minus = case.changed(scale_value=-0.25)
    turned = case.changed(query=-case.args.query, scale_value=0.25)
    outs = [run(k, c, isa)["attention_out"] for c in (minus, turned)]
    assert same_bits(*outs)
    check(minus.args, {"attention_out": outs[0]}, isa)


# ---- bias and masks -----------------------------------------------------------------------------


@by_pair(*ALL)
def test_bias(name, isa):
    """In every shape, also wider than the cache."""
    for pse in ("one", "each"):
        for rows, wider, layout in ((1, 0, BSND), (1, 13, BNSD), (5, 3, BNSD)):
            shape = Shape(
                lens=(33, 12),
                seq_q=rows,
                heads_kv=2,
                group=2,
                layout_q=layout,
                layout_kv=layout,
                pse=pse,
                wider=wider,
                seed=rows,
            )
            case = check_call(name, shape, isa)
            assert abs(case.args.pse_shift[..., 0].astype(np.float32)).max() > 0.5


@by_pair(*SMALL)
def test_a_bias_of_minus_infinity_leaves_out(name, isa):
    """As masks that are added do. Whole blocks of it, at the start too."""
    k = kernel(name)
    for hidden in (slice(0, 1), slice(0, 70), slice(40, 140), slice(3, 150)):
        case = make_case(k, Shape(lens=(150,), group=3, pse="one", seed=3))
        case.args.pse_shift[..., hidden] = -np.inf
        case.args.key[:, hidden] = 1.0
        if case.args.value is not None:
            case.args.value[:, hidden] = 1.0
        check(case.args, run(k, case, isa, chunk_keys=128), isa)


@by_pair(*SMALL)
def test_a_bias_of_minus_infinity_over_all_keys_is_a_row_that_sees_nothing(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens=(150, 9), group=3, pse="each", seed=3))
    case.args.pse_shift[1] = -np.inf
    got = run(k, case, isa, chunk_keys=128)
    assert not got["attention_out"][1].view(np.uint8).any()
    if k.stats:
        assert np.isneginf(got["softmax_lse"][1]).all() and not got["softmax_sum"][1].any()
    assert np.isfinite(got["attention_out"][0].astype(np.float32)).all()


@by_pair(*ALL)
def test_masks_of_every_shape(name, isa):
    for mask in ("one", "each"):
        for rows, mask_rows in ((1, False), (4, False), (4, True)):
            for hidden, wider in ((0.5, 0), (0.95, 21)):
                shape = Shape(
                    lens=(60, 33),
                    seq_q=rows,
                    heads_kv=2,
                    group=2,
                    mask=mask,
                    mask_rows=mask_rows,
                    hidden=hidden,
                    wider=wider,
                    seed=rows,
                )
                check_call(name, shape, isa)


@by_pair("f32_all", "bf16_i8")
def test_types_of_masks(name, isa):
    """bool, int8 and uint8 are bytes, and any that is not 0 leaves out."""
    k = kernel(name)
    case = make_case(k, Shape(lens=(40,), mask="one", seed=5))
    want = run(k, case, isa)
    mask = case.args.atten_mask
    for other in (mask.view(np.int8), mask != 0, (mask != 0).astype(np.int8)):
        got = run(k, case, isa, atten_mask=other)
        assert same_bits(got["attention_out"], want["attention_out"])


@by_pair(*ALL)
def test_rows_that_see_nothing_are_zero_in_every_bit(name, isa):
    """A mask over all keys, no keys, more rows than keys: none of them a mean of anything."""
    k = kernel(name)
    sinks = ("none", "plain") if has(name, "sinks") else ("none",)
    for sink in sinks:
        for shape in (
            Shape(lens=(20, 150), seq_q=2, group=3, mask="each", hidden=1.1, sinks=sink, seed=1),
            Shape(lens=(0, 0), seq_q=1, group=2, heads_kv=2, sinks=sink, seed=2),
            Shape(lens=(0,), layout_kv=PA_BSND, sinks=sink, seed=3),
        ):
            case = make_case(k, shape)
            got = run(k, case, isa, chunk_keys=128)
            assert not got["attention_out"].view(np.uint8).any()
            check(case.args, got, isa)
            if k.stats and sink == "none":
                assert not got["softmax_max"].view(np.uint8).any()
                assert not got["softmax_sum"].view(np.uint8).any()
            elif k.stats:
                assert (got["softmax_sum"] == 1).all()
        early = make_case(k, Shape(lens=(3,), seq_q=9, group=2, sinks=sink, seed=4))
        got = run(k, early, isa)
        assert not got["attention_out"][:, :6].view(np.uint8).any()
        assert got["attention_out"][:, 6:].astype(np.float32).any()
        check(early.args, got, isa)


@by_pair(*SMALL)
def test_one_row_that_sees_nothing_between_others(name, isa):
    """By the mask of that row alone."""
    k = kernel(name)
    case = make_case(k, Shape(lens=(30,), seq_q=5, group=2, mask="one", mask_rows=True, seed=6))
    refill(case)
    case.args.atten_mask[0, 2] = 9
    got = run(k, case, isa)
    assert not got["attention_out"][:, 2].view(np.uint8).any()
    check(case.args, got, isa)


def refill(case: Case) -> None:
    """Numbers everywhere: for cases whose masks or lengths are replaced after poisoning."""
    rng = np.random.default_rng(case.shape.seed)
    for name in ("query", "key", "value", "pse_shift"):
        tensor = getattr(case.args, name)
        if tensor is not None:
            tensor[...] = rng.standard_normal(tensor.shape)


# ---- lengths, padding, pages --------------------------------------------------------------------


@by_pair(*ALL)
def test_lengths_of_every_form(name, isa):
    for lengths, lens in (
        ("none", (21, 21)),
        ("one", (21, 21)),
        ("each", (21, 0)),
        ("more", (4, 21)),
        ("each", (0, 0)),
    ):
        for room in (0, 3) if lengths != "none" else (0,):
            shape = Shape(lens=lens, lengths=lengths, room=room, heads_kv=2, group=2, seed=2)
            case = check_call(name, shape, isa)
            assert (case.args.actual_seq_lengths is None) == (lengths == "none")


@by_pair(*ALL)
def test_left_padding(name, isa):
    """Also more of it than there is room: such a batch sees no key."""
    empty = 0
    for padding, tight, room in (
        (0, True, 4),
        (3, False, 0),
        (3, False, 5),
        (-7, True, 2),
        (9, True, 5),  # begins before the cache for the longer ones
        (80, True, 1),  # ends before it
    ):
        shape = Shape(
            lens=(33, 20, 6),
            seq_q=2,
            group=2,
            padding=padding,
            tight=tight,
            room=room,
            pse="each",
            mask="each",
            wider=1,
            seed=room,
        )
        case = check_call(name, shape, isa)
        assert case.args.kv_padding_size is not None
        empty += sum(oracle.span(case.args, b) == (0, 0) for b in range(3))
    assert empty == 1 + 3


@by_pair(*SMALL)
def test_left_padding_needs_lengths_and_a_dense_cache(name, isa):
    k = kernel(name)
    for shape in (
        Shape(lens=(20, 20), lengths="none", seed=1),
        Shape(lens=(20, 9), layout_kv=PA_BSND, seed=1),
    ):
        case = make_case(k, shape)
        want = run(k, case, isa)
        for padding in (1, 19, 1000, -1):
            size = np.array([padding], np.int32)
            got = run(k, case, isa, kv_padding_size=size)
            assert same_bits(got["attention_out"], want["attention_out"])


@by_pair(*ALL)
@pytest.mark.parametrize("size", [1, 3, 16, 128])
def test_pages(name, isa, size):
    """Shuffled blocks, with nonsense behind the entries in use, of every layout; rows that lie
    apart; more than one chunk."""
    for layout_q, layout_kv in PAIRS:
        if layout_kv not in PAGED:
            continue
        shape = Shape(
            lens=(150, 0, 17),
            seq_q=2,
            heads_kv=2,
            group=2,
            layout_q=layout_q,
            layout_kv=layout_kv,
            block_size=size,
            seed=size,
        )
        check_guarded(name, shape, Way(isa, strides=layout_q == BSND, chunk_keys=128))


@by_pair(*with_feature("slots"))
def test_slots(name, isa):
    """An entry a token."""
    for layout_q, layout_kv in ((BSND, PA_BSND), (BNSD, PA_BNSD)):
        for size in (1, 16, 100):
            shape = Shape(
                lens=(140, 9),
                seq_q=3,
                heads_kv=2,
                group=2,
                layout_q=layout_q,
                layout_kv=layout_kv,
                block_size=size,
                slots=True,
                seed=size,
            )
            check_guarded(name, shape, Way(isa, chunk_keys=128))


@by_pair(*with_feature("pages"))
def test_page_pointers(name, isa):
    """Each page between forbidden pages of its own, nonsense behind the pointers in use."""
    values = (True, False) if can_leave_value_out(name) else (True,)
    for layout_q, layout_kv in ((BSH, PA_BSND), (BNSD, PA_BNSD)):
        for size in (1, 16, 48):
            for value in values:
                shape = Shape(
                    lens=(60, 0, 33),
                    seq_q=2,
                    heads_kv=2,
                    group=2,
                    layout_q=layout_q,
                    layout_kv=layout_kv,
                    block_size=size,
                    pages=True,
                    value=value,
                    seed=size,
                )
                check_guarded(name, shape, Way(isa, ("left", "right")[value]))


@by_pair(*SMALL, "bf16_i8")
def test_blocks_may_be_shared(name, isa):
    """All sequences in the same blocks, one of them twice in a row."""
    k = kernel(name)
    case = make_case(k, Shape(lens=(40, 40, 33), layout_kv=PA_BSND, block_size=8, seed=4))
    if k.formats == ("", ""):
        refill(case)
    table = case.args.block_table.copy()
    table[:, :5] = table[0, [0, 1, 1, 3, 4]]
    case = case.changed(block_table=table)
    got = run(k, case, isa)
    check(case.args, got, isa)
    assert not same_bits(got["attention_out"][0], np.zeros_like(got["attention_out"][0]))


# ---- quantised caches ---------------------------------------------------------------------------


@by_pair(*CODED)
@pytest.mark.parametrize("mode", [CHANNEL, TENSOR, TOKEN])
def test_antiquant(name, isa, mode):
    for f32 in (True, False):
        for offset in (True, False):
            for layout, rows in ((BSND, 1), (PA_BSND, 3), (BNSD, 2)):
                shape = Shape(
                    lens=(50, 31),
                    seq_q=rows,
                    heads_kv=2,
                    group=3,
                    layout_q=BNSD if layout == BNSD else BSND,
                    layout_kv=layout,
                    antiquant=mode,
                    antiquant_f32=f32,
                    offset=offset,
                    padding=3 if layout == BSND else None,
                    seed=rows,
                )
                case = check_call(name, shape, isa)
                a = case.args
                expected = np.float32 if f32 or mode == TOKEN else case.dtype
                assert a.antiquant_scale.dtype == expected
                assert (a.antiquant_offset is not None) == offset


@by_pair(*SCALED)
def test_every_code(name, isa):
    """All bytes that are numbers, as keys and as values, with scales of any sign."""
    k = kernel(name)
    rng = np.random.default_rng(3)
    case = make_case(k, Shape(lens=(80,), heads_kv=2, group=2, seed=8))
    for side in ("key", "value"):
        tensor, kind = getattr(case.args, side), formats_of(name)[side == "value"]
        if kind in ("i8", "e4m3"):
            codes = rng.permutation(np.arange(tensor.size) % 256).astype(np.uint8)
            if kind == "e4m3":
                codes[codes & 0x7F == 0x7F] ^= 1
            tensor.view(np.uint8)[...] = codes.reshape(tensor.shape)
        elif kind:
            scales_at = -(-(k.dk, k.dv)[side == "value"] // 4) * 2
            tensor[..., :scales_at] = rng.integers(0, 256, (*tensor.shape[:-1], scales_at))
    check(case.args, run(k, case, isa), isa)


@by_pair(*CODED)
def test_offsets_that_cancel_most_of_a_code(name, isa):
    """Then a number is as small as the rounding of its parts allows."""
    k = kernel(name)
    for mode in (CHANNEL, TENSOR, TOKEN):
        case = make_case(k, Shape(lens=(60,), group=2, antiquant=mode, spread="equal", seed=2))
        case.args.antiquant_offset[...] = np.where(case.args.antiquant_offset > 0, -97.3, 101.9)
        check(case.args, run(k, case, isa), isa)


# ---- quantised output ---------------------------------------------------------------------------


@by_pair(*ALL)
def test_codes_of_the_output(name, isa):
    """Per tensor and per channel, float and bfloat16, with and without offset."""
    for quant in ("tensor", "channel"):
        for bf16 in (False, True):
            for offset in (False, True):
                for layout, rows in ((BSND, 1), (BNSD, 3)):
                    shape = Shape(
                        lens=(50, 3),
                        seq_q=rows,
                        heads_kv=2,
                        group=3,
                        layout_q=layout,
                        layout_kv=layout,
                        quant=quant,
                        quant_offset=offset,
                        quant_bf16=bf16,
                        seed=rows,
                    )
                    case = check_call(name, shape, isa)
                    assert case.args.quant_scale2.dtype == (BF16 if bf16 else np.float32)


@by_pair(*ALL)
def test_codes_of_the_output_are_the_rounded_float_output(name, isa):
    """Exactly, on any numbers: a call with float output says what was rounded."""
    k = kernel(name)
    for quant, rows, group in (("tensor", 1, 4), ("channel", 3, 3), ("channel", 16, 3)):
        shape = Shape(lens=(70, 20), seq_q=rows, group=group, quant=quant, seed=rows)
        case = make_case(k, shape)
        got = run(k, case, isa)["attention_out"]
        exact = case.changed(quant_scale2=None, quant_offset2=None)
        exact.extra["out_f32"] = 1
        want = oracle.quantise(case.args, run(k, exact, isa)["attention_out"])
        assert (got == want).all() and abs(got.astype(int)).max() > 100


def single(k, values: np.ndarray) -> Case:
    """Each batch has one key, whose value is what comes out: exactly."""
    n = len(values)
    case = make_case(k, Shape(lens=(1,) * n, seed=1))
    case.args.query[...] = case.args.key[...] = 1.0
    case.args.value[...] = values.reshape(n, 1, 1, 1)
    return case


@by_pair(*SMALL)
def test_codes_of_exact_numbers(name, isa):
    """Halves go to the even code, product and sum are rounded one after the other, and what does
    not fit saturates."""
    k = kernel(name)
    values = np.array([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 63.5, 127, 128, 200, -128, -129, -300, 0])
    case = single(k, values)
    for scale, offset in ((1.0, 0.0), (0.5, 0.0), (1.0, 0.5), (2.0, -0.5), (-1.0, 3.0)):
        made = case.changed(
            quant_scale2=np.array([scale], np.float32),
            quant_offset2=np.array([offset], np.float32),
        )
        got = run(k, made, isa)["attention_out"]
        want = oracle.incre_flash_attention(made.args).out
        assert (got == want).all(), (scale, offset)
        by_hand = np.clip(np.rint(values * scale + offset), -128, 127)
        assert (got[:, 0, 0, 0] == by_hand).all()
    x, scales = np.float32(1.375), np.float32([33.3, 7.7, 21.7, 19.9, 50.3, 3.3])
    case = single(k, np.array([x]))
    moved = []
    for scale in scales:
        product = x * scale
        offset = np.float32(0.5) - product
        made = case.changed(quant_scale2=scale.reshape(1), quant_offset2=offset.reshape(1))
        assert float(product) + float(offset) == 0.5
        assert (run(k, made, isa)["attention_out"] == 0).all(), scale
        moved.append(np.rint(float(x) * float(scale) + float(offset)))
    assert 1 in moved, "one rounding alone would not be noticed"


@by_pair(*SMALL)
def test_rows_that_see_nothing_become_the_code_of_zero(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens=(0, 5), group=2, quant="channel", seed=3))
    for offset in (0.0, 2.5, 3.5, -7.6, 999.0, -999.0):
        case.args.quant_offset2[...] = offset
        got = run(k, case, isa)["attention_out"]
        assert (got[0] == np.clip(np.rint(np.float32(offset)), -128, 127)).all()
        check(case.args, {"attention_out": got}, isa)
    case = case.changed(quant_offset2=None)
    assert not run(k, case, isa)["attention_out"][0].any()


@by_pair(*ALL)
def test_float_output_is_the_output_before_rounding(name, isa):
    k = kernel(name)
    for rows, layout in ((1, BSND), (3, BNSD)):
        shape = Shape(lens=(50,), seq_q=rows, group=3, layout_q=layout, layout_kv=layout, seed=6)
        case = make_case(k, shape)
        rounded = run(k, case, isa)["attention_out"]
        case.extra["out_f32"] = 1
        exact = run(k, case, isa)["attention_out"]
        assert exact.dtype == np.float32 and same_bits(exact.astype(case.dtype), rounded)
        check(case.args, {"attention_out": exact}, isa)


# ---- extensions ---------------------------------------------------------------------------------


@by_pair(*with_feature("window"))
def test_windows(name, isa):
    for window in (1, 2, 16, 33, 127, 128, 129, 200, 2**31 - 1):
        for rows, lens in ((1, (150, 3)), (7, (150, 3))):
            shape = Shape(lens=lens, seq_q=rows, group=2, window=window, mask="each", seed=window)
            check_call(name, shape, isa, chunk_keys=128)


@by_pair(*with_feature("softcap"))
def test_softcaps(name, isa):
    for cap in (1e-3, 0.5, 3.0, 30.0, 1e4):
        for spread in ("normal", "huge", "tiny", "growing"):
            shape = Shape(lens=(70,), group=3, softcap=cap, pse="one", spread=spread, seed=5)
            check_call(name, shape, isa)


@by_pair(*with_feature("alibi"))
def test_slopes(name, isa):
    """In tokens from the query, also where keys do not start with the cache's first row."""
    for rows in (1, 5):
        for padding in (None, 2):
            shape = Shape(
                lens=(60, 31), seq_q=rows, heads_kv=2, group=2, alibi=True, padding=padding, seed=1
            )
            check_call(name, shape, isa)


@by_pair(*with_feature("sinks"))
def test_sinks(name, isa):
    for sinks in ("plain", "infinite"):
        for rows, lens in ((1, (40, 0)), (4, (2, 140))):
            shape = Shape(lens=lens, seq_q=rows, heads_kv=2, group=3, sinks=sinks, seed=rows)
            check_call(name, shape, isa, chunk_keys=128)


@by_pair("f32_all", "bf16_all")
def test_all_extensions_together(name, isa):
    for seed in range(6):
        shape = Shape(
            lens=(170, 31),
            seq_q=1 + 3 * (seed % 3),
            heads_kv=2,
            group=(1, 3, 9)[seed % 3],
            layout_kv=PA_BSND,
            block_size=16,
            slots=seed % 2 == 0,
            pages=seed % 2 == 1,
            window=(0, 40, 150)[seed % 3],
            softcap=20.0,
            alibi=True,
            sinks="plain",
            pse="one",
            mask="each",
            hidden=0.2,
            quant=("none", "channel")[seed // 3],
            seed=seed,
        )
        check_guarded(name, shape, Way(isa, chunk_keys=128, by_task=True, partials=True))


# ---- chunks and parts ---------------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layout", [BSND, PA_BSND, BNSD])
def test_chunks_and_partials(name, isa, layout):
    """The same bits whether a row is one task or many, and right."""
    k = kernel(name)
    for lens, rows, group in (((300, 129, 128, 0), 1, 3), ((257, 130), 5, 7)):
        shape = Shape(
            lens=lens,
            seq_q=rows,
            group=group,
            layout_q=BNSD if layout == BNSD else BSND,
            layout_kv=layout,
            mask="each",
            hidden=0.1,
            seed=rows,
        )
        case = in_floats(make_case(k, shape))
        whole = run(k, case, isa, chunk_keys=128)
        check(case.args, whole, isa)
        for partials in (False, True):
            got = execute(k, case, isa, partials=partials)
            for output in whole:
                assert same_bits(got[output], whole[output]), (output, partials)


@by_pair(*SMALL)
@pytest.mark.parametrize(
    "spread", ["flat", "huge", "dominant", "equal", "growing", "falling", "cancel", "tiny"]
)
def test_hostile_spreads_over_several_chunks(name, isa, spread):
    for group, rows in ((3, 1), (9, 4)):
        shape = Shape(lens=(500,), seq_q=rows, group=group, spread=spread, seed=3)
        k = kernel(name)
        case = make_case(k, shape)
        check(case.args, execute(k, case, isa, partials=True), isa)


@by_pair(*ALL)
def test_error_rule_on_realistic_scores(name, isa):
    """Enough elements that the plain implementation's largest error is not luck: no slack is
    needed."""
    k = kernel(name)
    for sharpness in (1.0, 4.0):
        case = make_case(k, Shape(lens=(400,), seq_q=12, heads_kv=2, group=4, seed=7))
        case = case.changed(scale_value=abs(case.args.scale_value) * sharpness)
        check(case.args, run(k, case, isa, chunk_keys=128), isa, strict=True)


def parts_of(k, case: Case, cuts: list[int], isa: str) -> list[dict[str, np.ndarray]]:
    """The call on each of the ranges of keys between the cuts; sinks go to the first."""
    a, made = case.args, []
    for i, (lo, hi) in enumerate(zip([0, *cuts], [*cuts, a.seq_kv], strict=True)):
        part = case.changed(
            key=a.key[:, lo:hi].copy(),
            value=a.value[:, lo:hi].copy(),
            actual_seq_lengths=np.clip(a.actual_seq_lengths - lo, 0, hi - lo).astype(np.int32),
            sinks=a.sinks if i == 0 else None,
        )
        part.extra["out_f32"] = 1
        made.append(run(k, part, isa))
    return made


@by_pair(*STATS_HERE)
@pytest.mark.parametrize("cuts", [[35], [1], [70], [20, 20, 50], []])
def test_merged_parts_are_the_whole(name, isa, cuts):
    """Halves, a part without keys, a batch without keys in any part."""
    k = kernel(name)
    sinks = "plain" if has(name, "sinks") else "none"
    case = make_case(k, Shape(lens=(70, 0), heads_kv=2, group=3, sinks=sinks, seed=12))
    whole = run(k, case, isa)
    parts = parts_of(k, case, cuts, isa)
    for float_out in (0, 1):
        case.extra["out_f32"] = float_out
        outputs = case.outputs()
        result = k.merge_parts(
            out=[p["attention_out"] for p in parts],
            max=[p["softmax_max"] for p in parts],
            sum=[p["softmax_sum"] for p in parts],
            parts=len(parts),
            batch=2,
            seq_q=1,
            heads_q=6,
            heads_kv=2,
            out_f32=float_out,
            **outputs,
        )
        assert result.ok, result.error_text
        check(case.args, outputs, isa)
        for stat in STATS:
            assert np.allclose(outputs[stat], whole[stat], rtol=1e-6, atol=1e-6)
    assert math.isinf(outputs["softmax_lse"][1, 0, 0]) == (sinks == "none")


def test_kernels_without_statistics_have_no_merge_parts():
    k = kernel("f16_none")
    assert not k.stats and kernel("f32_all").stats
    with pytest.raises(TypeError, match=r"no merge_parts; fix: add the feature stats"):
        k.merge_parts(parts=1)


@by_pair("f32_all", "bf16_mla")
def test_statistics_that_are_not_wanted_change_nothing(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens=(50,), seq_q=3, group=4, seed=6))
    whole = run(k, case, isa)
    for left_out in (STATS[:1], STATS[1:2], STATS[2:], STATS[:2], STATS[1:], STATS):
        outputs = case.outputs()
        given = {n: None if n in left_out else array for n, array in outputs.items()}
        assert k.run(**fields_of(k, case, isa), **given).ok
        for output in given:
            if output not in left_out:
                assert same_bits(outputs[output], whole[output])


# ---- numbers that are not finite ----------------------------------------------------------------


@by_pair(*SMALL)
def test_nan_reaches_its_own_row_and_no_other(name, isa):
    """One NaN in each kind of element in turn; what other rows and heads see does not change by a
    bit, even where they share the cache row and see it as masked or as not there yet."""
    k = kernel(name)
    for group, rows in ((3, 4), (9, 5)):
        shape = Shape(
            lens=(40, 50), seq_q=rows, heads_kv=2, group=group, mask="each", mask_rows=True, seed=9
        )
        clean = make_case(k, shape)
        refill(clean)
        before = run(k, clean, isa)["attention_out"]
        columns = {(r.b, r.i): r.columns for r in oracle.rows(clean.args) if r.n2 == 1}
        for tensor in ("query", "key", "value"):
            bad = getattr(clean.args, tensor).copy()
            victim = columns[1, 0][-1]  # the latest that the first row sees
            hidden = np.setdiff1d(columns[1, rows - 1], columns[1, 0])[-1]
            for at in (victim, hidden) if tensor != "query" else (victim,):
                bad[...] = getattr(clean.args, tensor)
                hit = np.zeros(before.shape[:3], bool)
                if tensor == "query":
                    bad[1, 0, group + 1, -1] = np.nan
                    hit[1, 0, group + 1] = True
                else:
                    bad[1, at, 1, 0] = np.nan
                    for i in range(rows):
                        hit[1, i, group:] = at in columns[1, i]
                assert hit.any() and not hit[1].all()
                after = run(k, clean.changed(**{tensor: bad}), isa)["attention_out"]
                nan = np.isnan(after.astype(np.float32))
                assert nan[hit].any(axis=-1).all(), (tensor, at)
                if tensor != "value":
                    assert nan[hit].all()
                assert same_bits(after[~hit], before[~hit]), (tensor, at)


@by_pair(*SMALL)
def test_nan_in_the_last_key_of_a_chunk_is_not_lost(name, isa):
    k = kernel(name)
    for group in (1, 3, 17):
        case = make_case(k, Shape(lens=(300,), group=group, seed=1))
        for at in (0, 1, 31, 32, 127, 128, 129, 255, 256, 298, 299):
            key = case.args.key.copy()
            key[0, at, 0, 3] = np.nan
            for output, array in run(k, case.changed(key=key), isa, chunk_keys=128).items():
                assert np.isnan(array.astype(np.float32)).all(), (output, at)


@by_pair(*with_feature("softcap"))
def test_a_softcap_hides_no_nan(name, isa):
    """Nor a number beyond it: infinity is the cap."""
    k = kernel(name)
    for group in (1, 9):
        case = make_case(k, Shape(lens=(40,), group=group, softcap=5.0, seed=1))
        case.args.query[0, 0, 0, 0] = np.nan
        got = run(k, case, isa)["attention_out"].astype(np.float32)
        assert np.isnan(got[0, 0, 0]).all() and not np.isnan(got[0, 0, 1:]).any()
        case.args.query[0, 0, 0] = 1e30
        check(case.args, run(k, case, isa), isa)


@by_pair("f16_none", "bf16_all")
def test_finite_numbers_of_any_size_give_finite_results(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens=(40,), group=3, seed=8))
    big = 60000.0 if name == "f16_none" else 1e16
    for tensor in (case.args.query, case.args.key):
        tensor[...] = np.sign(tensor.astype(np.float32)) * big
    for array in run(k, case, isa).values():
        assert np.isfinite(array.astype(np.float64)).all()


@by_pair("bf16_mla", "f16_none")
def test_table_of_the_second_batch_only(name, isa):
    """Nothing of a batch that has no keys is looked at, wherever it stands."""
    k = kernel(name)
    case = make_case(k, Shape(lens=(0, 33), layout_kv=PA_BSND, block_size=4, group=2, seed=3))
    case.args.block_table[0] = INT_MIN
    got = run(k, case, isa)
    check(case.args, got, isa)
    assert not by_row(got["attention_out"], BSND)[0].view(np.uint8).any()
