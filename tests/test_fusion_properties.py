"""What has to hold between two calls of fusion_attention, whatever the numbers are: bits that do
not depend on what should not matter, bytes that must not matter, and one call written as another.
"""

import dataclasses

import helpers_decode
import numpy as np
import oracle_decode
import oracle_fusion as oracle
import pytest
from helpers import assert_same, same_bits
from helpers_cases import STATS
from helpers_fusion import (
    LAYOUTS,
    SPECS,
    Case,
    Shape,
    by_pair,
    by_row,
    check,
    execute,
    fields_of,
    in_floats,
    isas_in,
    kernel,
    make_case,
    rows_of,
    run,
    shapes,
    text,
    with_feature,
    with_gaps,
)
from helpers_memory import in_child
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, TND
from oracle_fusion import BNSD, NO_LIMIT, OUTER, SLOPE, flat, spans_of, unflat

from gen import bind
from gen.isa import ISAS

ALL = tuple(SPECS)
SMALL = ("f32_all", "f16_none", "bf16_all")
UNITS = {"float32": 2.0**-19, "float16": 2.0**-9, "bfloat16": 2.0**-6}
# A task's queries and a block's keys end at 96: several of both, with rests.
PLAIN = Shape(lens_q=(110, 110), lens_kv=(230, 230), heads_kv=2, group=2, seed=12)
LONG = Shape(
    lens_q=(110, 0, 37, 200),
    lens_kv=(230, 3, 40, 200),
    heads_kv=2,
    group=2,
    layout=TND,
    mode=3,
    mask="formula",
    pse="full",
    keep_prob=0.8,
    pad_q=2,
    pad_kv=3,
    unused=1,
    seed=17,
)


def with_shape(**changes: object) -> Shape:
    return dataclasses.replace(PLAIN, **changes)


def differs(x: dict, y: dict) -> bool:
    return not all(same_bits(x[name], y[name]) for name in x)


def assert_close(x: dict, y: dict, dtype: np.dtype) -> None:
    """Equal but for the order of rounding: outputs to units in the last place of the largest."""
    for name in ("attention_out", *STATS):
        a, b = x[name].astype(np.float64), y[name].astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        largest = np.where(np.isfinite(b), abs(b), 0.0).max(initial=1e-30)
        limit = (UNITS[dtype.name] if name == "attention_out" else 2e-5) * largest
        with np.errstate(invalid="ignore"):
            assert (same | (abs(a - b) <= limit)).all(), name


# ---- the same numbers elsewhere -----------------------------------------------------------------


def relaid(case: Case, layout: int) -> Case:
    """A call of equal lengths in another layout."""
    a, old = case.args, case.args.input_layout
    changes = {
        n: unflat(flat(getattr(a, n), old), layout, a.batch) for n in ("query", "key", "value")
    }
    ends = {"actual_seq_qlen": None, "actual_seq_kvlen": None}
    if layout == TND:
        rows = [n for _, n, _, _ in spans_of(a)], [n for _, _, _, n in spans_of(a)]
        ends = {n: np.cumsum(r) for n, r in zip(ends, rows, strict=True)}
    if a.pse is not None and a.pse.ndim > 2 and layout == TND:
        changes["pse"] = a.pse.reshape(-1)
    made = case.changed(**changes, **ends, input_layout=layout)
    made.shape = dataclasses.replace(case.shape, layout=layout)
    return made


@by_pair(*ALL)
def test_layouts_only_change_addresses(name, isa):
    """With a mask, a bias and dropout: the same bits, in every place."""
    k = kernel(name)
    for mode, mask in ((1, "given"), (3, "formula"), (4, "formula")):
        shape = with_shape(
            mode=mode, mask=mask, hidden=0.3, band=(70, 60), pse="full", keep_prob=0.8
        )
        base = in_floats(make_case(k, shape))
        want = rows_of(base, run(k, base, isa))
        for layout in LAYOUTS:
            other = relaid(base, layout)
            assert_same(rows_of(other, run(k, other, isa)), want, (mode, layout))


@by_pair(*ALL)
@settings(max_examples=6)
@given(data=st.data())
def test_strided_is_packed(name, isa, data):
    k = kernel(name)
    case = make_case(k, data.draw(shapes(name)))
    rng = np.random.default_rng(case.shape.seed)
    fields, outputs = fields_of(k, case, isa), case.outputs()
    for tensor in ("query", "key", "value"):
        memory, stride = with_gaps(rng, fields[tensor], case.args.input_layout)
        fields |= {tensor: memory, f"{tensor}_stride": stride}
    assert k.run(**fields, **outputs).ok
    assert_same(outputs, run(k, case, isa))


@by_pair(*SMALL)
def test_heads_and_batches_may_share_memory(name, isa):
    """Inputs that overlap themselves: head 1 starts one row behind head 0, batch 1 two rows."""
    k = kernel(name)
    case = make_case(k, with_shape(lens_q=(4, 4), lens_kv=(9, 9)))
    rng = np.random.default_rng(0)
    changes, fields = {}, {}
    for tensor, width in (("key", k.dk), ("value", k.dv)):
        memory = rng.standard_normal((12, width)).astype(case.dtype)
        heads = [[memory[b * 2 + h : b * 2 + h + 9] for h in range(2)] for b in range(2)]
        changes[tensor] = np.stack([np.stack(one, axis=1) for one in heads])
        fields |= {tensor: memory, f"{tensor}_stride": (2 * width, width, width)}
    assert_same(run(k, case, isa, **fields), run(k, case.changed(**changes), isa))


def shifted(array: np.ndarray, offset: int, multiple: int) -> np.ndarray:
    """A copy that starts some bytes behind a 64-byte line."""
    offset = offset // multiple * multiple
    memory = np.empty(array.nbytes + 192, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    copy = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


@by_pair(*SMALL)
def test_alignment(name, isa):
    """Every buffer at other offsets that its elements allow, the workspace at any."""
    k = kernel(name)
    case = make_case(k, dataclasses.replace(LONG, lens_q=(40, 9, 0, 3), lens_kv=(40, 9, 2, 101)))
    want = run(k, case, isa)
    need = k.workspace_bytes(**fields_of(k, case, isa), **case.outputs())
    for offset in (1, 2, 4, 6, 10, 34, 63):
        outputs = {n: shifted(x, offset, x.itemsize) for n, x in case.outputs().items()}
        fields = {**fields_of(k, case, isa), **outputs}
        for i, (name_of, array) in enumerate(case.inputs().items()):
            fields[name_of] = shifted(array, offset + i, array.itemsize)
        workspace = shifted(np.full(need, 0xFF, np.uint8), offset, 1)
        assert k.run(**fields, workspace=workspace).ok
        assert_same(outputs, want, offset)


# ---- order, threads, company --------------------------------------------------------------------


@by_pair(*ALL)
def test_threads_and_the_order_of_tasks(name, isa):
    k = kernel(name)
    case = in_floats(make_case(k, LONG))
    want = run(k, case, isa)
    for workers in (1, 3, 8):
        assert_same(execute(k, case, isa, order=workers, workers=workers), want, workers)
    other = case.changed(dropout_offset=case.args.dropout_offset ^ 1)
    assert differs(run(k, other, isa), want), "the control did not change a bit"


@pytest.mark.parametrize("name", ["bf16_all"])
@pytest.mark.parametrize("threads", [1, 3])
def test_openmp_changes_no_bit(name, threads):
    serial, isas = kernel(name), isas_in(name)
    case = make_case(serial, LONG)
    want = {isa: run(serial, case, isa) for isa in isas}
    parallel = bind.load(
        text(name),
        flags=("-O2", "-fopenmp"),
        extra="#include <omp.h>\nvoid set_threads(int n);\n"
        "void set_threads(int n) { omp_set_num_threads(n); }",
    )

    def calls() -> dict[str, dict[str, np.ndarray]]:
        parallel.library.set_threads(threads)
        return {isa: run(parallel, case, isa) for isa in isas}

    got = in_child(calls)
    for isa in isas:
        assert_same(got[isa], want[isa])


@by_pair(*SMALL)
def test_what_the_workspace_held_before(name, isa):
    k = kernel(name)
    case = make_case(k, LONG)
    seen = []
    for byte in (0x00, 0xFF, 0x7F):
        fields, outputs = fields_of(k, case, isa), case.outputs()
        workspace = np.full(k.workspace_bytes(**fields, **outputs), byte, np.uint8)
        assert k.run(**fields, **outputs, workspace=workspace).ok
        seen.append(outputs)
    assert_same(seen[1], seen[0])
    assert_same(seen[2], seen[0])


def batches(case: Case, order: list[int]) -> Case:
    """The batches of a TND call with a bias for each pair in another order, or some of them."""
    a = case.args
    spans = spans_of(a)
    rows = np.concatenate([np.arange(s[0], s[0] + s[1]) for s in map(spans.__getitem__, order)])
    keys = np.concatenate([np.arange(s[2], s[2] + s[3]) for s in map(spans.__getitem__, order)])
    blocks = np.split(a.pse, np.cumsum([a.heads_q * s[1] * s[3] for s in spans])[:-1])
    return case.changed(
        query=a.query[rows],
        key=a.key[keys],
        value=a.value[keys],
        pse=np.concatenate([blocks[b] for b in order]),
        actual_seq_qlen=np.cumsum([spans[b][1] for b in order]),
        actual_seq_kvlen=np.cumsum([spans[b][3] for b in order]),
    )


@by_pair(*ALL)
def test_the_batches_around_a_row(name, isa):
    """One by one, turned round, and some of them often; without dropout, which counts batches."""
    k = kernel(name)
    case = in_floats(make_case(k, dataclasses.replace(LONG, keep_prob=0.0)))
    want, spans = rows_of(case, run(k, case, isa)), spans_of(case.args)
    for order in ([0], [2], [3, 2, 1, 0], [2, 1] * 9 + [0, 2]):
        other = batches(case, order)
        rows = np.concatenate([np.arange(s[0], s[0] + s[1]) for s in map(spans.__getitem__, order)])
        assert_same(rows_of(other, run(k, other, isa)), {n: x[rows] for n, x in want.items()})


@by_pair(*ALL)
def test_the_rows_around_a_row(name, isa):
    """Queries 0 .. n - 1 of a call, in two calls that meet anywhere, as modes 3 and 4 say it."""
    k = kernel(name)
    for mode in (1, 2, 3):
        base = make_case(k, with_shape(lens_q=(110,), lens_kv=(130,), mode=mode, mask="formula"))
        case = in_floats(base)
        whole = rows_of(case, run(k, case, isa))
        for cut in (1, 12, 48, 95, 109):
            for rows, first in ((slice(0, cut), 0), (slice(cut, 110), cut)):
                behind = {2: first, 3: first + 20, 1: NO_LIMIT}[mode]  # of row 0, from column 0
                some = case.changed(
                    query=case.args.query[:, rows].copy(),
                    sparse_mode=0,
                    band=1,
                    pre_tokens=NO_LIMIT,
                    next_tokens=behind,
                )
                got = rows_of(some, run(k, some, isa))
                assert_same(got, {n: x[rows] for n, x in whole.items()}, (mode, cut))


def card(case: Case, q: slice, kv: slice, lens_q: list, lens_kv: list, **changes) -> Case:
    """Some rows of a TND call, and of keys, as a call of their own."""
    a = case.args
    return case.changed(
        query=a.query[q].copy(),
        key=a.key[kv].copy(),
        value=a.value[kv].copy(),
        actual_seq_qlen=np.cumsum(lens_q),
        actual_seq_kvlen=np.cumsum(lens_kv),
        **changes,
    )


@by_pair(*ALL)
@pytest.mark.parametrize("mode", [3, 2])
def test_long_sequences_in_two_calls(name, isa, mode):
    """Modes 7 and 8: the queries of the second batch are cut anywhere, each half with all of its
    keys. As the document has it: of mode 3 the first card's last batch is a band, of mode 2 the
    second card's first one. The same bits."""
    k = kernel(name)
    base = Shape(
        lens_q=(20, 120, 9),
        lens_kv=(30, 140, 12),
        heads_kv=2,
        group=2,
        layout=TND,
        mode=mode,
        mask="formula",
    )
    case = in_floats(make_case(k, base))
    whole = rows_of(case, run(k, case, isa))
    for cut in (1, 47, 96, 119):
        band = {"sparse_mode": 7, "band": 1, "pre_tokens": 140, "next_tokens": cut - 120}
        one = card(case, slice(0, 20 + cut), slice(0, 170), [20, cut], [30, 140])
        two = card(case, slice(20 + cut, 149), slice(30, 182), [120 - cut, 9], [140, 12])
        if mode == 3:
            one = one.changed(**band)
        else:  # j <= i + cut, counted from the lower right corner of (120 - cut) x 140
            behind = cut - (140 - (120 - cut))
            band |= {"sparse_mode": 8, "next_tokens": behind}
            two = two.changed(**band)
        got = [rows_of(c, run(k, c, isa)) for c in (one, two)]
        joined = {n: np.concatenate([half[n] for half in got]) for n in whole}
        assert_same(joined, whole, cut)


@by_pair("f32_all", "bf16_all")
def test_a_causal_row_is_a_decode_step(name, isa):
    """Row i of a causal call, and incre_flash_attention with i + 1 keys: both within the decode
    operator's error rule, as they do not add in the same order."""
    k, step = kernel(name), helpers_decode.kernel(name)
    shape = Shape(lens_q=(120,), lens_kv=(120,), heads_kv=2, group=2, mode=3, mask="formula")
    case = make_case(k, shape)
    a, got = case.args, run(k, case, isa)["attention_out"]
    for i in (0, 1, 31, 95, 96, 119):
        args = oracle_decode.Args(
            query=a.query[:, i : i + 1].copy(),
            key=a.key[:, : i + 1].copy(),
            value=a.value[:, : i + 1].copy(),
            dk=k.dk,
            dv=k.dv,
            scale_value=a.scale_value,
        )
        known = helpers_decode.expected(args)
        helpers_decode.check(args, {"attention_out": got[:, i : i + 1]}, isa, known=known)
        one = helpers_decode.Case(helpers_decode.Shape(), args)
        out = helpers_decode.run(step, one, isa)["attention_out"]
        limit = UNITS[k.dtype.name] * abs(known.want.out).max()
        assert abs(out.astype(np.float64) - got[:, i : i + 1]).max() <= limit


# ---- bytes that do not matter -------------------------------------------------------------------


@by_pair(*ALL)
def test_memory_that_no_row_sees(name, isa):
    """Other bytes in the place of NaN and 0xff, wherever nothing is a pair of a batch."""
    k = kernel(name)
    masked = dataclasses.replace(
        PLAIN, lens_kv=(300, 300), mode=0, mask="given", band=(20, 30), pse="full", hidden=0.2
    )
    for shape in (dataclasses.replace(LONG, lens_q=(110, 0, 37, 20), mode=2), masked):
        case = in_floats(make_case(k, shape))
        want, a = run(k, case, isa), case.args
        for byte in (0x00, 0x3C):
            changes = {}
            for name_of in ("query", "key", "value", "pse"):
                old = getattr(a, name_of)
                unread = np.isnan(old.astype(np.float32))
                assert unread.any() or (name_of == "query" and shape is masked), name_of
                other = np.full(old.itemsize, byte, np.uint8).view(old.dtype)[0]
                changes[name_of] = np.where(unread, other, old)
            assert_same(run(k, case.changed(**changes), isa), want, byte)


def only_rows(case: Case, got: dict, want: dict, reached: np.ndarray, what: object) -> None:
    """NaN in these rows [rows][N1], bits as before in all others."""
    found, clean = rows_of(case, got), rows_of(case, want)
    out = np.ascontiguousarray(found["attention_out"]).astype(np.float32)
    assert np.isnan(out[reached]).any(axis=-1).all(), f"{what}: NaN is lost"
    for name in found:
        assert same_bits(found[name][~reached], clean[name][~reached]), f"{what}: {name}"


@by_pair(*SMALL)
@pytest.mark.parametrize("mode", [1, 2, 3, 4, 6])
def test_nan_reaches_the_rows_that_see_it(name, isa, mode):
    """One element of a key, of a value, of a query, of a bias: rows that do not see it keep every
    bit. In values infinity too, whose weight of 0 would be NaN."""
    k = kernel(name)
    shape = with_shape(
        lens_q=(100,),
        lens_kv=(110,),
        mode=mode,
        mask="given",
        hidden=0.5,
        band=(30, 9),
        pse="full",
    )
    case = in_floats(make_case(k, shape))
    a, want = case.args, run(k, case, isa)
    seen = np.stack([p.seen for p in oracle.parts(a)])  # [N1][Sq][Skv]
    rng = np.random.default_rng(mode)
    for j in (0, 5, 50, 95, 96, 109):
        n2 = int(rng.integers(2))
        heads = np.arange(4) // 2 == n2
        reached = (seen[:, :, j] & heads[:, None]).T
        for tensor, bad in (("key", np.nan), ("value", np.nan), ("value", np.inf)):
            other = getattr(a, tensor).copy()
            other[0, j, n2, rng.integers(0, other.shape[-1])] = bad
            got = run(k, case.changed(**{tensor: other}), isa)
            if bad == np.inf:  # infinite, or NaN
                out = rows_of(case, got)["attention_out"]
                assert not np.isfinite(out[reached]).all(axis=-1).any()
                out[reached] = np.nan
            only_rows(case, got, want, reached, (tensor, j))
    i, h = 57, 1
    query, pse = a.query.copy(), a.pse.copy()
    query[0, i, h, 0] = np.nan
    j = int(np.flatnonzero(seen[h, i])[0])
    pse[0, h, i, j] = np.nan
    reached = np.zeros((100, 4), bool)
    reached[i, h] = True
    for changes in ({"query": query}, {"pse": pse}):
        only_rows(case, run(k, case.changed(**changes), isa), want, reached, "one row")


@by_pair(*SMALL)
def test_a_query_of_nan_that_sees_nothing(name, isa):
    """Rows in front of the first key: no score, no NaN."""
    k = kernel(name)
    shape = Shape(lens_q=(9,), lens_kv=(2,), group=3, mode=3, mask="formula", seed=1)
    case = make_case(k, shape)
    want = run(k, case, isa)
    query = case.args.query.copy()
    query[:, :7] = np.nan
    assert_same(run(k, case.changed(query=query), isa), want)


@by_pair(*SMALL)
def test_bytes_of_a_mask_that_is_not_needed(name, isa):
    """Modes 2, 3, 4, 6, 7 and 8 read none, nor does a mask of another shape matter."""
    k = kernel(name)
    for mode in (2, 3, 4, 6, 7, 8):
        shape = Shape(lens_q=(30,), lens_kv=(40,), layout=TND, mode=mode, mask="given")
        case = make_case(k, shape)
        want = run(k, case, isa)
        for mask in (np.full((1, 1, 3, 5), 0xFF, np.uint8), np.zeros((1, 1, 1, 1), np.uint8)):
            assert_same(run(k, case.changed(atten_mask=mask), isa), want, mode)
        by_formula = case.changed(atten_mask=None, mask_from_mode=1)
        assert_same(run(k, by_formula, isa), want, mode)


# ---- one call written as another ----------------------------------------------------------------


@by_pair(*ALL)
def test_scores_that_grow_from_block_to_block(name, isa):
    """The running maximum moves in every block, for every row; and never, the other way round."""
    k = kernel(name)
    for spread in ("growing", "falling"):
        shape = with_shape(lens_q=(100, 100), lens_kv=(700, 700), spread=spread)
        case = make_case(k, dataclasses.replace(shape, heads_kv=1, group=1))
        check(case, run(k, case, isa), isa)
        scores = oracle.scores(next(oracle.parts(case.args)), case.args) * case.args.scale
        tops = [scores[:, j : j + 96].max(axis=1) for j in range(0, 700, 96)]
        rises = (np.diff(tops, axis=0) > 0).mean()
        assert rises > 0.9 if spread == "growing" else rises < 0.1, "the control does not move"


@by_pair(*ALL)
def test_gqa_is_repeated_heads(name, isa):
    k = kernel(name)
    gqa = in_floats(make_case(k, with_shape(mode=3, mask="formula", keep_prob=0.7)))
    repeated = {n: np.repeat(getattr(gqa.args, n), 2, axis=-2) for n in ("key", "value")}
    got = run(k, gqa.changed(**repeated), isa)
    assert_same(got, run(k, gqa, isa))


@by_pair(*ALL)
def test_a_masked_key_is_no_key(name, isa):
    """Keys that a mask leaves out for all, and the same call without them."""
    k = kernel(name)
    case = make_case(k, with_shape(lens_q=(9,), lens_kv=(140,), mode=1, mask="given"))
    case.args.atten_mask[...] = np.random.default_rng(0).random(140) < 0.5
    kept = np.flatnonzero(case.args.atten_mask[0, 0, 0] == 0)
    fewer = case.changed(
        key=case.args.key[:, kept].copy(),
        value=case.args.value[:, kept].copy(),
        atten_mask=None,
    )
    assert_close(run(k, case, isa), run(k, fewer, isa), case.dtype)


@by_pair(*ALL)
def test_a_formula_is_a_mask(name, isa):
    """Every mode's formula as bytes of mode 1: the same bits."""
    k = kernel(name)
    for mode in (0, 2, 3, 4, 5, 6):
        case = in_floats(make_case(k, with_shape(mode=mode, mask="formula", band=(40, 9))))
        a = case.args
        seen = np.stack([p.seen for p in oracle.parts(a) if p.h == 0])
        mask = (~seen[:, None]).astype(np.uint8)
        by_bytes = case.changed(sparse_mode=1, atten_mask=mask, mask_from_mode=0)
        assert_same(run(k, case, isa), run(k, by_bytes, isa), mode)


@by_pair(*with_feature("pse_types"))
def test_slopes_are_a_bias(name, isa):
    """Powers of two, so that the bias is exact in every type; and both biases, moved by scale."""
    k = kernel(name)
    case = make_case(k, with_shape(lens_q=(50, 50), lens_kv=(90, 90)))
    case.args.scale_value = 0.25
    slopes = np.array([[1, 0.5, 0.25, 0.125]], np.float32)
    distance = abs(np.arange(90) - np.arange(50)[:, None] - 7)
    pse = (-slopes[0, :, None, None] * distance)[None].astype(case.dtype)
    by_slope = case.changed(pse=slopes, pse_type=SLOPE, q_start=10, kv_start=3)
    outer = case.changed(pse=pse, pse_type=OUTER)
    inner = case.changed(pse=4 * pse)
    want = run(k, by_slope, isa)
    for other in (outer, inner):
        assert_close(run(k, other, isa), want, case.dtype)


@by_pair(*SMALL)
def test_a_bias_of_nothing_changes_nothing(name, isa):
    k = kernel(name)
    case = make_case(k, PLAIN)
    nothing = case.changed(
        pse=np.zeros((1, 4, 110, 230), case.dtype),
        atten_mask=np.zeros((1, 1, 110, 230), np.uint8),
        keep_prob=1.0,
        band=1,
        pre_tokens=NO_LIMIT,
        next_tokens=NO_LIMIT,
    )
    got, want = run(k, nothing, isa), run(k, case, isa)
    if ISAS[isa].tiles:  # scores meet scale_value before a bias, else in the exponent
        assert_close(got, want, case.dtype)
    else:
        assert_same(got, want)


@by_pair(*with_feature("sinks"))
def test_a_sink_is_a_key_without_value(name, isa):
    k = kernel(name)
    case = make_case(k, with_shape(lens_q=(9, 9), lens_kv=(45, 45)))
    a = case.args
    query = a.query.copy()
    query[..., -1] = 1.0
    key, value = (np.concatenate([x, np.zeros_like(x[:, :1])], axis=1) for x in (a.key, a.value))
    key[:, :45, :, -1], key[:, 45, :, -1] = 0.0, 3.0
    longer = case.changed(query=query, key=key, value=value, scale_value=0.5)
    with_sink = case.changed(
        query=query,
        key=key[:, :45].copy(),
        value=value[:, :45].copy(),
        scale_value=0.5,
        sinks=np.full(a.heads_q, 1.5, np.float32),
    )
    assert_close(run(k, with_sink, isa), run(k, longer, isa), case.dtype)


@by_pair(*ALL)
def test_scale_moves_between_query_and_scale_value(name, isa):
    """Powers of two change no digit."""
    k = kernel(name)
    case = make_case(k, PLAIN).changed(scale_value=0.25)
    double = case.changed(query=case.args.query * 2, scale_value=0.125)
    assert_same(run(k, double, isa), run(k, case, isa))


# ---- dropout ------------------------------------------------------------------------------------


def counting(name: str, keys: int, **changes: object) -> Case:
    """All weights alike and values of 1: out counts what is kept."""
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(100,), lens_kv=(keys,), group=2, **changes))
    ones = np.ones_like(case.args.value)
    return in_floats(case.changed(query=0 * case.args.query, value=ones))


@by_pair(*SMALL)
def test_the_kept_share(name, isa):
    """As many weights as keep_prob says, within four standard deviations, in every head; and all of
    them with 1. What is lost is made up for."""
    k = kernel(name)
    for share in (0.9, 0.5, 0.1):
        case = counting(name, 400, keep_prob=share)
        out = rows_of(case, run(k, case, isa))["attention_out"][:, :, 0]
        kept = out * np.float32(share)
        assert abs(kept.mean(axis=0) - share).max() < 4 * (share * (1 - share) / 40000) ** 0.5
        assert kept.std() > 0.5 * (share * (1 - share) / 400) ** 0.5, "every row keeps as many"
        assert abs(kept * 400 - np.rint(kept * 400)).max() < 1e-2
    whole = counting(name, 400, keep_prob=1.0)
    assert (abs(run(k, whole, isa)["attention_out"] - 1) < 1e-5).all()


@by_pair(*SMALL)
def test_dropout_is_played_again(name, isa):
    """Seed and offset of dropout_state give the same bits; another offset, or seed, others."""
    k = kernel(name)
    case = in_floats(make_case(k, with_shape(keep_prob=0.6)))
    first = run(k, case, isa)
    seed, offset, elements = map(int, first["dropout_state"])
    assert elements == 2 * 4 * 110 * 230
    assert_same(run(k, case.changed(dropout_seed=seed, dropout_offset=offset), isa), first)
    for changes in (
        {"dropout_seed": seed ^ 1},
        {"dropout_seed": seed ^ (1 << 62)},
        {"dropout_offset": offset ^ 1},
    ):
        assert not same_bits(
            run(k, case.changed(**changes), isa)["attention_out"], first["attention_out"]
        )


@by_pair(*ALL)
@pytest.mark.parametrize("layout", [BSND, BNSD, TND])
def test_the_generators_bits_as_a_mask(name, isa, layout):
    """dropout_mask with the generator's bits: the same bits of the output, on every instruction
    set, so that all of them keep the same weights."""
    k = kernel(name)
    shape = with_shape(layout=layout, keep_prob=0.6, mode=3, mask="formula")
    case = in_floats(make_case(k, shape))
    bits = oracle.generated_mask(case.args)
    got = run(k, case.changed(dropout_mask=bits), isa)
    assert_same(got, run(k, case, isa))
    ones = np.full_like(bits, 0xFF)
    assert differs(run(k, case.changed(dropout_mask=ones), isa), got), "the control changed nothing"


@by_pair(*SMALL)
def test_the_last_bit_of_keep_prob(name, isa):
    """Just below a weight's word and just above it: dropped, and kept."""
    k = kernel(name)
    case = in_floats(make_case(k, Shape(lens_q=(2,), lens_kv=(9,), keep_prob=0.5)))
    blocks = oracle.philox(
        np.array([[j, i, 0, case.args.dropout_offset] for i in range(2) for j in range(2)]),
        (case.args.dropout_seed & 0xFFFFFFFF, case.args.dropout_seed >> 32 & 0xFFFFFFFF),
    )
    words = blocks.reshape(2, 8)
    for i, j in ((0, 0), (0, 5), (1, 2), (1, 7)):
        kept = []
        for side in (0.0, 1.0):
            share = np.nextafter(np.float32(words[i, j] / 2**32), np.float32(side))
            share = np.nextafter(share, np.float32(side))
            some = case.changed(keep_prob=float(share))
            bits = oracle.generated_mask(some.args)
            assert_same(run(k, some, isa), run(k, some.changed(dropout_mask=bits), isa))
            kept.append(np.unpackbits(bits, bitorder="little")[9 * i + j])
        assert kept == [0, 1]


@by_pair(*SMALL)
def test_dropout_does_not_reach_the_statistics(name, isa):
    k = kernel(name)
    case = make_case(k, with_shape(mode=3, mask="formula"))
    want, got = (run(k, case.changed(keep_prob=share), isa) for share in (1.0, 0.5))
    for stat in STATS:
        same = same_bits(got[stat], want[stat])  # on tiles the sum is in another order
        assert same or (ISAS[isa].tiles and np.allclose(got[stat], want[stat], rtol=1e-6))


def test_relaid_calls_are_other_calls():
    """The control for what is said of layouts: the arrays do differ."""
    base = make_case(kernel("f32_all"), PLAIN)
    for layout in LAYOUTS[2:]:
        other = relaid(base, layout)
        assert other.args.query.shape != base.args.query.shape
    assert relaid(base, BSND).args.key.tobytes() == base.args.key.tobytes()
    assert by_row(relaid(base, BNSD).args.key, BNSD).shape == base.args.key.shape
