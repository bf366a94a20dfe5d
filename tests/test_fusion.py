"""fusion_attention against its oracle: every layout, mode, mask, bias and option."""

import dataclasses

import numpy as np
import oracle_fusion as oracle
import pytest
from helpers import ISAS_HERE, same_bits
from helpers_cases import SPREADS, STATS
from helpers_fusion import (
    LAYOUTS,
    PADDED,
    SPECS,
    WAYS,
    Case,
    Shape,
    Way,
    best_in,
    by_pair,
    check,
    check_call,
    check_guarded,
    expected,
    has,
    in_floats,
    isas_in,
    kernel,
    make_case,
    prepared,
    rows_of,
    run,
    shapes,
    with_feature,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, TND
from oracle_fusion import (
    BNSD,
    FLT_MAX,
    INNER,
    OUTER,
    SBH,
    SLOPE,
    SLOPE_SQRT,
    flat,
    keep_by_mask,
    unflat,
)

from gen.isa import ISAS
from gen.train import BLOCK, QUERIES

ALL = tuple(SPECS)


def some(shape: Shape, **changes: object) -> Shape:
    return dataclasses.replace(shape, **changes)


def test_every_instruction_set_is_present():
    for name in ALL:
        assert tuple(kernel(name).isas()) == isas_in(name)
        assert set(isas_in(name)) >= {isa for isa in ISAS_HERE if not ISAS[isa].tiles}


@by_pair(*ALL)
@settings(max_examples=20)
@given(data=st.data())
def test_any_call(name, isa, data):
    """Any two of its axes meet, between guard pages."""
    shape = data.draw(shapes(name))
    check_guarded(name, shape, dataclasses.replace(data.draw(WAYS), isa=isa))


# ---- layouts, rows, heads -----------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(name, isa, layout):
    shape = Shape(
        lens_q=(21, 21, 21),
        lens_kv=(37, 37, 37),
        heads_kv=2,
        group=3,
        layout=layout,
        mode=3,
        mask="formula",
        seed=layout,
    )
    if layout == TND:
        shape = some(shape, lens_q=(21, 0, 5), lens_kv=(37, 8, 0), pad_q=3, pad_kv=2, unused=2)
    check_guarded(name, shape, Way(isa))
    check_guarded(name, shape, Way(isa, "left", strides=True, by_task=True))


@by_pair(*ALL)
def test_every_number_of_queries_and_keys(name, isa):
    """From none to past the edges of tasks and blocks, with one head and with three."""
    edges = {n + some for n in (BLOCK, 2 * BLOCK, QUERIES, 2 * QUERIES) for some in (-1, 0, 1)}
    for n in (*range(0, 14), *range(15, 36, 3), *sorted(edges)):
        for m, group, mode in ((n, 1, 3), (7, 3, 1), (n + 5, 1, 2)):
            sizes = {"lens_q": (n,), "lens_kv": (m,), "spread": "growing"}
            check_call(name, Shape(**sizes, group=group, mode=mode, mask="formula", seed=n), isa)
        check_call(name, Shape(lens_q=(5,), lens_kv=(n,), group=2, seed=n), isa)


@by_pair(*ALL)
def test_any_number_of_heads(name, isa):
    for heads_kv, group in ((1, 1), (1, 7), (1, 16), (1, 33), (2, 5), (3, 3), (8, 1), (16, 2)):
        shape = Shape(lens_q=(9,), lens_kv=(19,), heads_kv=heads_kv, group=group, seed=group)
        check_call(name, shape, isa)


@by_pair(*ALL)
def test_batches_of_many_lengths(name, isa):
    """TND: empty ones anywhere, of queries, of keys or of both, and batches that are not used."""
    lens_q, lens_kv = (0, 5, 0, 100, 1, 3, 0, 2), (4, 0, 0, 70, 1, 2, 0, 130)
    for mode in (0, 3, 7, 8):
        for unused, pad in ((0, 0), (3, 4)):
            shape = Shape(
                lens_q=lens_q,
                lens_kv=lens_kv,
                heads_kv=2,
                group=2,
                layout=TND,
                pad_q=pad,
                pad_kv=pad,
                unused=unused,
                mode=mode,
                mask="formula",
                band=(60, 2) if mode > 6 else None,
                seed=mode,
            )
            check_call(name, shape, isa)


@by_pair(*ALL)
def test_scale_zero_is_one_and_negative_turns_the_order(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(9,), lens_kv=(33,), group=3, seed=4))
    zero, one = (run(k, case.changed(scale_value=scale), isa) for scale in (0.0, 1.0))
    assert same_bits(zero["attention_out"], one["attention_out"])
    minus = case.changed(scale_value=-0.25)
    turned = case.changed(query=-case.args.query, scale_value=0.25)
    outs = [run(k, c, isa)["attention_out"] for c in (minus, turned)]
    assert same_bits(*outs)
    check(minus, {"attention_out": outs[0]}, isa)


@by_pair(*ALL)
@pytest.mark.parametrize("spread", SPREADS)
def test_scores_of_all_sizes(name, isa, spread):
    """Of realistic ones so many that the error rule needs no slack."""
    shape = Shape(
        lens_q=(130,),
        lens_kv=(230,),
        group=2,
        layout=BNSD,
        mode=3,
        mask="formula",
        spread=spread,
        seed=len(spread),
    )
    check_call(name, shape, isa, strict=spread in ("normal", "flat"))


@by_pair("f32_all", "f32_wide")
def test_relative_error_in_float32(name, isa):
    case = check_call(name, Shape(lens_q=(200,), lens_kv=(200,), group=2, mode=2, seed=3), isa)
    out = flat(run(kernel(name), case, isa)["attention_out"], BSND)
    exact = oracle.fusion_attention(case.args).out
    assert np.linalg.norm(out - exact) <= 1e-6 * np.linalg.norm(exact)


# ---- masks --------------------------------------------------------------------------------------

BANDS = ((3, 2), (2**31 - 1, 0), (9, -3), (-3, 7), (0, 0), (-4, -4), (2**62, -(2**62)), (1, 2**62))


@by_pair(*ALL)
@pytest.mark.parametrize("mode", range(9))
def test_every_mode(name, isa, mode):
    """More queries than keys and fewer, by formula and with the mask that the mode wants, against
    the formulas and against that mask."""
    layouts = (TND,) if mode > 6 else (TND, BNSD) if mode != 5 else (BNSD,)
    for layout in layouts:
        for lens_q, lens_kv in (((30, 30), (41, 41)), ((41, 41), (30, 30)), ((5, 5), (5, 5))):
            if layout == TND:
                lens_q, lens_kv = (*lens_q, 3), (*lens_kv, 110)
            for mask in ("formula", "given"):
                shape = Shape(
                    lens_q=lens_q,
                    lens_kv=lens_kv,
                    group=2,
                    layout=layout,
                    mode=mode,
                    mask=mask,
                    band=(12, 4),
                    mask_batch=mode == 5,
                    seed=mode,
                )
                case = check_call(name, shape, isa)
                if mode not in (0, 1, 5):
                    by_mask = oracle.fusion_attention(case.args, keep_by_mask).out
                    assert np.array_equal(prepared(name, shape)[1].want.out, by_mask)


@by_pair("f32_all", "bf16_all")
def test_bands_of_any_sign(name, isa):
    """Modes 0, 4, 7 and 8, also where a band leaves rows without a key, or all of them."""
    for mode in (0, 4, 7, 8):
        for band in BANDS:
            for lens_q, lens_kv in (((20,), (33,)), ((33,), (20,)), ((120,), (130,))):
                shape = Shape(
                    lens_q=lens_q,
                    lens_kv=lens_kv,
                    layout=TND if mode > 6 else SBH,
                    mode=mode,
                    mask="formula",
                    band=band,
                )
                check_call(name, shape, isa)


@by_pair(*ALL)
def test_without_a_mask_the_mode_does_not_matter(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(9,), lens_kv=(12,), layout=TND, band=(1, 1)))
    want = run(k, case, isa)
    for mode in range(1, 9):
        got = run(k, case.changed(sparse_mode=mode), isa)
        assert all(same_bits(got[n], want[n]) for n in want), mode


@by_pair(*ALL)
def test_masks_of_every_shape(name, isa):
    """One for all, for each batch, for each head, larger than needed, in modes 0, 1 and 5."""
    for mode in (0, 1, 5):
        for batch, heads in ((False, False), (True, False), (False, True), (True, True)):
            for hidden, wider in ((0.5, 0), (0.97, 21)):
                shape = Shape(
                    lens_q=(20, 20),
                    lens_kv=(33, 33),
                    heads_kv=2,
                    group=2,
                    mode=mode,
                    mask="given",
                    mask_batch=batch,
                    mask_heads=heads,
                    hidden=hidden,
                    wider=wider,
                    band=(14, 5) if mode == 0 else None,
                    seed=mode,
                )
                check_call(name, shape, isa)


@by_pair(*ALL)
def test_whole_blocks_that_bytes_hide(name, isa):
    """Blocks of keys that no row of a task sees, that some do, at the start and at the end."""
    k = kernel(name)
    for hidden in (slice(0, 100), slice(90, 200), slice(190, 300), slice(1, 299)):
        case = make_case(k, Shape(lens_q=(110,), lens_kv=(300,), group=2, mode=1, mask="given"))
        case.args.atten_mask[..., hidden] = 1
        for rows in (slice(0, 0), slice(0, 50), slice(50, 110), slice(3, 4)):
            some_see = case.changed(atten_mask=case.args.atten_mask.copy())
            some_see.args.atten_mask[..., rows, hidden] = 0
            check(some_see, run(k, some_see, isa), isa)


@by_pair("f32_all", "bf16_all")
def test_types_of_masks(name, isa):
    """bool, int8 and uint8 are bytes, and any that is not 0 leaves out."""
    k = kernel(name)
    shape = Shape(lens_q=(9,), lens_kv=(40,), mode=1, mask="given", hidden=0.4, seed=5)
    case = make_case(k, shape)
    want = run(k, case, isa)
    mask = case.args.atten_mask
    for other in (mask.view(np.int8), mask != 0, (mask != 0).astype(np.int8)):
        got = run(k, case, isa, atten_mask=other)
        assert same_bits(got["attention_out"], want["attention_out"])


@by_pair("f16_none", "f32_wide")
@pytest.mark.parametrize("params", [(0, 128, 128), (1, 65536, 65536), (2, 65536, 0), (3, 65536, 0)])
def test_sparse_params_of_the_document(name, isa, params):
    """test_npu_flash_attention: [1, 8, 256, 256] and its list of modes and bands, in BNSD; against
    the oracle and, at the document's own precision, against its reference, which adds -10000."""
    documented(name, isa, *params)


@by_pair("f16_none", "f32_wide")
def test_band_of_the_document(name, isa):
    """Mode 4, the last of its list."""
    documented(name, isa, 4, 128, 128)


def documented(name: str, isa: str, mode: int, before: int, behind: int) -> None:
    shape = Shape(
        lens_q=(256,),
        lens_kv=(256,),
        heads_kv=8,
        layout=BNSD,
        mode=mode,
        mask="given",
        band=(before, behind),
        seed=mode,
    )
    k = kernel(name)
    case = make_case(k, shape).changed(scale_value=0.08838)
    got = run(k, case, isa)
    a = case.args
    hidden = ~oracle.keep(mode, 256, 256, before, behind, 0)
    q, key, v = (x.astype(np.float32) for x in (a.query, a.key, a.value))
    s = q @ key.swapaxes(2, 3) * np.float32(0.08838) + np.float32(-10000.0) * hidden
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    want = p / p.sum(axis=-1, keepdims=True) @ v
    assert np.allclose(got["attention_out"].astype(np.float32), want, rtol=0.01, atol=0.01)
    check(case, got, isa)


# ---- rows without keys --------------------------------------------------------------------------


@by_pair(*ALL)
def test_rows_without_keys_are_zero_in_every_bit(name, isa):
    k = kernel(name)
    for hide in ("mask", "mode", "band", "nothing"):
        shape = Shape(lens_q=(100,), lens_kv=(30,), group=2, mode=3, mask="formula")
        if hide == "mask":
            shape = some(shape, mode=1, mask="given", hidden=1.1)
        if hide == "band":
            shape = some(shape, mode=4, band=(20, -9))
        if hide == "nothing":
            shape = some(shape, lens_kv=(0,))
        case = make_case(k, shape)
        got = rows_of(case, run(k, case, isa))
        none = expected(case.args).size.keys == 0
        assert none.any() and (none.all() == (hide in ("mask", "nothing")))
        assert not np.ascontiguousarray(got["attention_out"][none]).view(np.uint8).any()
        limit = np.float32(0 if hide == "nothing" else FLT_MAX)
        assert (got["softmax_max"][none] == -limit).all()
        assert (got["softmax_sum"][none] == limit).all()
        assert np.isneginf(got["softmax_lse"][none]).all()
        check(case, run(k, case, isa), isa)


@by_pair(*ALL)
def test_rows_behind_the_last_end_see_nothing(name, isa):
    """Not even the keys that are behind the last end too; with a sink nothing either."""
    k = kernel(name)
    sinks = ("none", "plain") if has(name, "sinks") else ("none",)
    for sink in sinks:
        for order in (0, 1):
            shape = Shape(
                lens_q=(4, 2),
                lens_kv=(3, 0),
                group=2,
                layout=TND,
                pad_q=101,
                pad_kv=7,
                sinks=sink,
                stats_order=order,
            )
            case = make_case(k, shape)
            got = rows_of(case, run(k, case, isa))
            assert not np.ascontiguousarray(got["attention_out"][4:]).view(np.uint8).any()
            for stat in STATS[:2]:
                assert not got[stat][6:].view(np.uint32).any()
            assert np.isneginf(got["softmax_lse"][6:]).all()
            if sink == "plain":
                assert (got["softmax_sum"][4:6] == 1).all()
                assert np.allclose(got["softmax_max"][4:6], case.args.sinks, rtol=1e-6)
            check(case, run(k, case, isa), isa)


@by_pair(*ALL)
def test_a_bias_of_minus_infinity_leaves_out(name, isa):
    """As masks that are added do; over all keys of a row it is a row without keys."""
    k = kernel(name)
    for hidden in (slice(0, 1), slice(0, 100), slice(40, 140), slice(3, 150), slice(0, 150)):
        shape = Shape(lens_q=(9,), lens_kv=(150,), group=2, pse="full", seed=3)
        case = make_case(k, shape)
        case.args.scale_value = abs(case.args.scale)
        case.args.pse[..., :7, hidden] = -np.inf
        check(case, run(k, case, isa), isa)


# ---- bias, softcap, sinks -----------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bias_of_every_shape(name, isa, layout):
    for pse in ("full", "one_row"):
        for kind in (INNER, OUTER) if has(name, "pse_types") else (INNER,):
            for each in (True,) if layout == TND else (True, False):
                shape = Shape(
                    lens_q=(13, 13),
                    lens_kv=(21, 21),
                    heads_kv=2,
                    group=2,
                    layout=layout,
                    mode=3,
                    mask="formula",
                    pse=pse,
                    pse_type=kind,
                    pse_each=each,
                    seed=kind,
                )
                if layout == TND:
                    shape = some(shape, lens_q=(13, 0, 9), lens_kv=(21, 4, 100), pad_q=2, unused=1)
                case = check_call(name, shape, isa)
                assert np.nanmax(abs(case.args.pse.astype(np.float64))) > 0.5


@by_pair(*with_feature("pse_types"))
@pytest.mark.parametrize("kind", [SLOPE, SLOPE_SQRT])
def test_slopes(name, isa, kind):
    """ALiBi by a number a head, whatever the positions of the first query and key are; more queries
    than keys too."""
    for layout in (BNSD, TND):
        for starts in ((0, 0), (7, 0), (0, 50), (-3, 2000), (2**33, 2**33 + 5)):
            for each in (False, True):
                shape = Shape(
                    lens_q=(13, 13),
                    lens_kv=(101, 101),
                    group=3,
                    layout=layout,
                    mode=1,
                    mask="formula",
                    pse="slope",
                    pse_type=kind,
                    pse_each=each,
                    starts=starts,
                    seed=kind,
                )
                check_call(name, shape, isa)


@by_pair("f32_all", "bf16_all")
def test_the_last_rows_of_a_bias_stand_for_all(name, isa):
    """More rows than the 1024 that are stored, below the diagonal and above it; TND, where batches
    are shorter than the stored ones; and the same numbers as with the whole bias."""
    k = kernel(name)
    base = Shape(lens_q=(1100,), lens_kv=(1100,), pse="last_rows", seed=1)
    for mode, mask, band in ((2, "formula", None), (0, "formula", (9, 1000)), (3, "none", None)):
        case = check_call(name, some(base, mode=mode, mask=mask, band=band), isa)
    tnd = some(base, lens_q=(30, 1030, 0), lens_kv=(30, 1030, 0), layout=TND, pse_each=False)
    check_call(name, some(tnd, mode=3, mask="formula", wider=5, pad_q=3), isa)
    case = make_case(k, some(base, mode=2, mask="formula"))
    pse = next(oracle.parts(dataclasses.replace(case.args, pse_type=OUTER))).pse
    pse = np.where(np.tri(1100, dtype=bool), pse, 0.0).astype(k.dtype)[None, None]
    whole = case.changed(pse=pse, pse_shape=oracle.FULL)
    got = [run(k, c, isa) for c in (in_floats(case), in_floats(whole))]
    assert all(same_bits(got[0][n], got[1][n]) for n in got[0])


@by_pair(*with_feature("softcap"))
def test_softcap(name, isa):
    for cap in (0.01, 0.5, 5.0, 100.0, 1e6):
        for spread in ("normal", "huge", "flat"):
            for pse in ("none", "full"):
                shape = Shape(
                    lens_q=(9,),
                    lens_kv=(40,),
                    group=2,
                    softcap=cap,
                    spread=spread,
                    pse=pse,
                    mode=3,
                    mask="formula",
                )
                check_call(name, shape, isa)


@by_pair(*with_feature("sinks"))
def test_sinks(name, isa):
    for sinks in ("plain", "infinite"):
        for lens_q, lens_kv in (((9,), (40,)), ((40,), (9,)), ((5,), (0,)), ((100,), (250,))):
            for layout in (SBH, TND):
                shape = Shape(
                    lens_q=lens_q,
                    lens_kv=lens_kv,
                    heads_kv=2,
                    group=3,
                    layout=layout,
                    sinks=sinks,
                    mode=3,
                    mask="formula",
                    seed=len(sinks),
                )
                check_call(name, shape, isa)


# ---- dropout ------------------------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout(name, isa, layout):
    """The generator's bits and given ones, whole blocks that are not seen between them."""
    for bits in (False, True):
        for share in (0.9, 0.25, 1.0, 2.0**-20):
            shape = Shape(
                lens_q=(17, 17),
                lens_kv=(110, 110),
                heads_kv=2,
                group=2,
                layout=layout,
                mode=4,
                mask="formula",
                band=(20, 3),
                keep_prob=share,
                bits=bits,
                seed=int(4 * share),
            )
            if layout == TND:
                shape = some(shape, lens_q=(17, 3, 0, 7), lens_kv=(110, 0, 3, 5), pad_q=2)
            check_call(name, shape, isa)


# ---- outputs ------------------------------------------------------------------------------------


@by_pair(*ALL)
@pytest.mark.parametrize("layout", [BSND, TND])
def test_outputs_that_are_not_wanted(name, isa, layout):
    """Any of the statistics and the state of dropout may be NULL."""
    k = kernel(name)
    shape = Shape(lens_q=(20, 20), lens_kv=(30, 30), layout=layout, keep_prob=0.5)
    case = make_case(k, shape)
    want = run(k, case, isa)
    for missing in (*STATS, "dropout_state"):
        got = run(k, case, isa, **{missing: None})
        assert (got.pop(missing).view(np.uint8) == 0xFF).all()
        assert all(same_bits(got[n], want[n]) for n in got), missing


@by_pair(*ALL)
def test_statistics_eight_times_or_once_and_in_both_orders(name, isa):
    k = kernel(name)
    lens = {"lens_q": (20, 0, 7, 1), "lens_kv": (30, 2, 0, 5)}
    base = Shape(**lens, heads_kv=2, group=2, layout=TND, mode=3, mask="formula", pad_q=3)
    made = []
    for width in (8, 1):
        for order in (0, 1):
            case = make_case(k, some(base, stats_width=width, stats_order=order))
            made.append(rows_of(case, run(k, case, isa)))
            if order == 1:  # as the hardware has them: batch by batch [N1][S1]
                first = run(k, case, isa)["softmax_max"].reshape(-1, width)[:80, 0]
                assert same_bits(first.reshape(4, 20).T.copy(), made[-1]["softmax_max"][:20])
    for got in made[1:]:
        assert all(same_bits(got[n], made[0][n]) for n in got)


@by_pair(*ALL)
def test_output_in_floats(name, isa):
    """Not rounded to the query's type; rounded it is what is returned otherwise."""
    k = kernel(name)
    for layout in LAYOUTS:
        case = make_case(k, Shape(lens_q=(30,), lens_kv=(40,), group=2, layout=layout, seed=1))
        want = run(k, case, isa)["attention_out"]
        wide = run(k, in_floats(case), isa)["attention_out"]
        assert wide.dtype == np.float32 and same_bits(wide.astype(case.dtype), want)
        check(case, {"attention_out": wide}, isa)


@by_pair(*ALL)
def test_zero_is_the_default_of_every_size(name, isa):
    k = kernel(name)
    shape = Shape(
        lens_q=(9, 9),
        lens_kv=(12, 12),
        heads_kv=2,
        pse="full",
        mode=1,
        mask="given",
        hidden=0.3,
    )
    case = make_case(k, shape)
    want = run(k, case, isa)
    zeros = ("heads_kv", "pse_batch", "pse_width", "mask_batch", "mask_heads", "mask_rows")
    for zero in (*zeros, "mask_width", "stats_width", "isa"):
        got = run(k, case, **{"isa": k.isas()[isa], zero: 0})
        if zero == "isa":
            check(case, got, best_in(name))
        else:
            assert all(same_bits(got[n], want[n]) for n in want), zero


@by_pair("f32_all", "bf16_all")
def test_inner_precise_is_accepted_and_changes_nothing(name, isa):
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(9,), lens_kv=(5,), mode=3, mask="formula"))
    want = run(k, case, isa)
    for value in (0, 1, 2):
        got = run(k, case, isa, inner_precise=value)
        assert all(same_bits(got[n], want[n]) for n in want)


# ---- the binding --------------------------------------------------------------------------------


def joined(case: Case, name: str) -> np.ndarray:
    """BSH or SBH as the operator's users have it, with gaps between rows."""
    tensor = getattr(case.args, name)
    rows = tensor.reshape(*tensor.shape[:2], -1)
    return np.concatenate([rows, rows], axis=-1)[..., : rows.shape[-1]]


@pytest.mark.parametrize("how", ["BSND", "BSH", "SBH", "BNSD", "TND", "SBH joined", "BSH joined"])
@pytest.mark.parametrize("name", ["f32_all", "f16_none"])
def test_attend_reads_sizes_options_and_strides_from_arrays(name, how):
    k = kernel(name)
    layout = oracle.LAYOUTS[how.split()[0]]
    shape = Shape(
        lens_q=(7, 7),
        lens_kv=(9, 9),
        heads_kv=2,
        group=3,
        layout=layout,
        mode=4,
        mask="given",
        band=(3, 2),
        pse="full",
        keep_prob=0.7,
    )
    case = make_case(k, shape)
    a = case.args
    fields = {**case.inputs(), "sparse_mode": 4, "scale_value": a.scale_value, "keep_prob": 0.7}
    fields |= {"pre_tokens": 3, "next_tokens": 2, "atten_mask": a.atten_mask[0, 0]}
    fields |= {"dropout_seed": a.dropout_seed, "dropout_offset": a.dropout_offset}
    if layout in (SBH, BNSD):
        fields["input_layout"] = how.split()[0]
    if layout == TND:
        ends = ("actual_seq_qlen", "actual_seq_kvlen")
        fields |= {n: getattr(a, n).tolist() for n in ends}
    if "joined" in how:
        fields |= {n: joined(case, n) for n in ("query", "key", "value")}
    got = k.attend(**fields)
    outer = a.query.shape[:-1]
    assert got.out.shape == ((*outer[:2], 6 * k.dv) if "joined" in how else (*outer, k.dv))
    outputs = {**got.outputs, "attention_out": got.out.reshape(*outer, k.dv)}
    assert outputs["softmax_max"].shape[-1] == 8
    check(case, outputs, best_in(name))


def test_attend_reads_the_shape_of_a_bias():
    k = kernel("f32_all")
    for pse, layout in (("one_row", BSND), ("one_row", TND), ("full", TND), ("slope", BSND)):
        kind = SLOPE if pse == "slope" else OUTER
        shape = Shape(lens_q=(3, 3), lens_kv=(5, 5), layout=layout, pse=pse, pse_type=kind)
        case = make_case(k, some(shape, pse_each=layout == TND))
        fields = {**case.inputs(), "scale_value": case.args.scale_value, "pse_type": kind}
        if pse == "one_row" and layout == BSND:  # [B][N][1][S]
            fields["pse"] = fields["pse"][:, :, None]
        check(case, k.attend(**fields, stats_width=1).outputs, best_in("f32_all"))
    rows = Shape(lens_q=(1030,), lens_kv=(1030,), pse="last_rows")
    case = make_case(k, rows)
    got = k.attend(**case.inputs(), scale_value=case.args.scale_value)
    check(case, got.outputs, best_in("f32_all"))


def test_a_binding_says_what_a_kernel_does_not_have():
    k = kernel("f32_all")
    with pytest.raises(TypeError, match=r"no merge_parts; fix: call it once"):
        k.merge_parts()
    with pytest.raises(TypeError, match=r"no gradients; fix: load fusion_attention_grad"):
        k.gradients()
    with pytest.raises(TypeError, match=r"prefix is int32; fix: pass int64"):
        k.run(prefix=np.zeros(3, np.int32))
    apart = np.zeros((1, 2, 1, 30), np.float32)[..., ::2]
    with pytest.raises(ValueError, match="fix: make the last axis contiguous"):
        k.attend(query=apart, key=apart, value=apart)


def test_padded_layouts_are_named():
    """The control for what is said of all of them."""
    assert len(set(LAYOUTS)) == 5 and TND not in PADDED
    rows = np.arange(24.0).reshape(6, 2, 2)
    assert all((flat(unflat(rows, n, 2), n) == rows).all() for n in PADDED)
