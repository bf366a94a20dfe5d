"""The oracle of fusion attention on cases that were worked out by hand or in its documents, and on
itself."""

import dataclasses
import math

import numpy as np
import oracle_fusion as oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, TND
from oracle_fusion import (
    BNSD,
    FLT_MAX,
    INNER,
    LAST_ROWS,
    NO_LIMIT,
    ONE_ROW,
    OUTER,
    SBH,
    SLOPE,
    SLOPE_SQRT,
    Args,
    flat,
    fusion_attention,
    fusion_attention_grad,
    keep,
    keep_by_mask,
    mask_for,
    pack,
    philox,
    plain,
    spans,
    unflat,
)

LN2, LN3 = math.log(2), math.log(3)


def args(**changes: object) -> Args:
    """One query, one head, one channel: keys are scores, values 1, 10, 100."""
    base = {
        "query": np.ones((1, 1, 1, 1), np.float32),
        "key": np.array([0.0, LN2, LN3], np.float32).reshape(1, 3, 1, 1),
        "value": np.array([1.0, 10.0, 100.0], np.float32).reshape(1, 3, 1, 1),
    }
    return Args(**{**base, **changes})


def out(**changes: object) -> float:
    return float(fusion_attention(args(**changes)).out.reshape(-1)[0])


def ends(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def some(
    rng: np.random.Generator, lens_q: tuple, lens_kv: tuple, n1: int = 2, n2: int = 1, **changes
) -> Args:
    """A TND call of random numbers."""
    shapes = (sum(lens_q), n1, 5), (sum(lens_kv), n2, 5), (sum(lens_kv), n2, 3)
    q, k, v = (rng.standard_normal(shape) for shape in shapes)
    base = {
        "input_layout": TND,
        "actual_seq_qlen": np.cumsum(lens_q),
        "actual_seq_kvlen": np.cumsum(lens_kv),
    }
    return Args(q, k, v, **{**base, **changes})


def picture(seen: np.ndarray) -> list[str]:
    return ["".join("x" if one else "." for one in row) for row in seen]


# ---- softmax ------------------------------------------------------------------------------------


def test_weights_are_exponentials():
    got = fusion_attention(args())
    assert got.out[0, 0, 0] == pytest.approx((1 + 20 + 300) / 6)
    assert (got.max[0, 0], got.sum[0, 0]) == (np.float32(LN3), pytest.approx(2.0))
    assert got.lse[0, 0] == pytest.approx(math.log(6))
    assert plain(args())[0, 0, 0] == pytest.approx((1 + 20 + 300) / 6)


def test_scale_zero_is_one():
    assert out(scale_value=0.0) == out(scale_value=1.0)
    assert out(scale_value=2.0) == pytest.approx((1 + 40 + 900) / 14)


def test_softcap_comes_before_pse_and_inner_is_scaled():
    cap, pse = 0.5, np.array([3.0, 0.0, -1.0], np.float32)
    s = cap * np.tanh(2 * np.array([0.0, LN2, LN3]) / cap)
    for kind, factor in ((INNER, 2), (OUTER, 1)):
        p = np.exp(s + factor * pse)
        want = p @ [1.0, 10.0, 100.0] / p.sum()
        got = out(softcap=cap, scale_value=2.0, pse=pse.reshape(1, 1, 1, 3), pse_type=kind)
        assert got == pytest.approx(want)


def test_inner_is_the_sum_scaled():
    pse = np.array([0.0, LN2, -LN3], np.float32).reshape(1, 1, 1, 3)
    want = (1 + 10 * 4**2 + 100) / (1 + 4**2 + 1)
    assert out(pse=pse, scale_value=2.0) == pytest.approx(want)


def test_a_sink_has_no_value():
    sink = np.array([LN2], np.float32)
    got = fusion_attention(args(sinks=sink))
    assert got.out[0, 0, 0] == pytest.approx((1 + 20 + 300) / 8)
    assert got.sum[0, 0] == pytest.approx(8 / 3) and got.lse[0, 0] == pytest.approx(math.log(8))
    got = fusion_attention(args(sinks=np.array([3.0], np.float32)))
    assert (got.max[0, 0], got.sum[0, 0] > 1) == (3.0, True)


# ---- rows without keys --------------------------------------------------------------------------


def stats(a: Args) -> list[tuple[float, ...]]:
    got = fusion_attention(a)
    assert not got.out[got.lse == -np.inf].any()
    return [tuple(float(x[i, 0]) for x in (got.max, got.sum, got.lse)) for i in range(len(got.out))]


NONE, ZERO = (-FLT_MAX, FLT_MAX, -math.inf), (0.0, 0.0, -math.inf)


def test_rows_without_keys():
    rng = np.random.default_rng(0)
    tnd = some(rng, (3, 2), (1, 0), n1=1, sparse_mode=3, mask_from_mode=1)
    more = dataclasses.replace(tnd, query=rng.standard_normal((7, 1, 5)))
    got = stats(more)
    assert got[:2] == [NONE] * 2 and got[2][1] == 1.0
    assert got[3:] == [ZERO] * 4, "two rows of a batch without keys, two behind the last end"
    hidden = args(atten_mask=np.ones((1, 1, 1, 3), np.uint8), sparse_mode=1)
    assert stats(hidden) == [NONE]
    none = args(key=np.zeros((1, 0, 1, 1)), value=np.zeros((1, 0, 1, 1)))
    assert stats(none) == [ZERO]


def test_rows_without_keys_but_with_a_sink():
    sink = np.array([2.5], np.float32)
    rng = np.random.default_rng(0)
    a = some(rng, (3, 2), (1, 0), n1=1, sparse_mode=3, mask_from_mode=1, sinks=sink)
    a = dataclasses.replace(a, query=rng.standard_normal((6, 1, 5)))
    got = stats(a)
    for row in (0, 1, 3, 4):
        assert got[row] == (2.5, 1.0, 2.5)
        assert not fusion_attention(a).out[row].any()
    assert got[5] == ZERO, "nobody's row"
    assert stats(dataclasses.replace(a, sinks=np.array([-np.inf])))[:2] == [NONE] * 2


def test_ends_that_do_not_grow_are_empty_batches():
    """The document's lists."""
    assert spans(ends(2, 4, 4, 6, 8), 5, 8) == [(0, 2), (2, 2), (4, 0), (4, 2), (6, 2)]
    assert spans(ends(2, 5, 9, 0, 0), 5, 12) == [(0, 2), (2, 3), (5, 4), (9, 0), (0, 0)]


def test_what_a_row_does_not_see_does_not_count():
    rng = np.random.default_rng(0)
    a = some(rng, (4,), (4,), sparse_mode=2, mask_from_mode=1)
    want, dout = fusion_attention(a), rng.standard_normal((4, 2, 3))
    grads = fusion_attention_grad(a, dout)
    for tensor in (a.key, a.value):
        tensor[3] = np.nan
    got, nan = fusion_attention(a), fusion_attention_grad(a, dout)
    assert (got.out[:3] == want.out[:3]).all() and np.isnan(got.out[3]).all()
    assert np.allclose(nan.dquery[:3], grads.dquery[:3]) and np.isnan(nan.dquery[3]).all()


# ---- masks --------------------------------------------------------------------------------------


def test_modes_by_hand():
    none = NO_LIMIT
    assert picture(keep(0, 4, 4, 1, 0, 0)) == ["x...", "xx..", ".xx.", "..xx"]
    assert picture(keep(0, 3, 5, none, 1, 0)) == ["xx...", "xxx..", "xxxx."]
    assert picture(keep(0, 4, 3, 9, -3, 0)) == ["...", "...", "...", "x.."]
    assert picture(keep(0, 4, 4, -2, 3, 0)) == ["..xx", "...x", "....", "...."]
    assert picture(keep(2, 3, 5, 0, 0, 0)) == ["x....", "xx...", "xxx.."]
    assert picture(keep(3, 3, 5, 0, 0, 0)) == ["xxx..", "xxxx.", "xxxxx"]
    assert picture(keep(3, 4, 2, 0, 0, 0)) == ["..", "..", "x.", "xx"]
    assert picture(keep(4, 3, 5, 1, 1, 0)) == [".xxx.", "..xxx", "...xx"]
    assert picture(keep(6, 4, 6, 0, 0, 4)) == ["xxxx..", "xxxx..", "xxxxx.", "xxxxxx"]
    assert picture(keep(5, 4, 2, 0, 0, 1)) == ["x.", "x.", "x.", "xx"]
    assert keep(1, 2, 2, 0, 0, 0).all()


def test_prefixes_of_the_document():
    """Batches with prefixes 4 and 5: each has its own."""
    a = args(
        query=np.zeros((2, 4, 1, 1)),
        key=np.zeros((2, 6, 1, 1)),
        value=np.zeros((2, 6, 1, 1)),
        sparse_mode=6,
        mask_from_mode=1,
        prefix=ends(4, 5),
    )
    assert [int(p.seen[0].sum()) for p in oracle.parts(a)] == [4, 5]


TOKENS = st.one_of(st.integers(-12, 12), st.sampled_from([NO_LIMIT, -NO_LIMIT, 2**62, -(2**62)]))


@settings(max_examples=400)
@given(
    mode=st.integers(0, 6),
    sq=st.integers(0, 9),
    skv=st.integers(0, 9),
    before=TOKENS,
    behind=TOKENS,
    prefix=st.integers(0, 10),
)
def test_the_formula_is_the_mask_that_is_passed(mode, sq, skv, before, behind, prefix):
    want = keep(mode, sq, skv, before, behind, prefix)
    assert picture(keep_by_mask(mode, sq, skv, before, behind, prefix)) == picture(want)


@pytest.mark.parametrize("mode", range(9))
def test_both_ways_to_read_a_mask_give_one_result(mode):
    rng = np.random.default_rng(mode)
    lens_q, lens_kv = (3, 0, 4, 2), (5, 2, 4, 6)
    a = some(rng, lens_q, lens_kv, n1=4, n2=2, sparse_mode=mode, band=1, next_tokens=1)
    a.pre_tokens, a.prefix = 2, ends(2, 0, 1, 4)
    band = (a.pre_tokens, a.next_tokens)
    if mode in (0, 1, 5):  # one mask for all batches: the longest one's upper left corner
        a.atten_mask = mask_for(mode, 4, 6, *band, 1)[None, None]
    else:
        a.atten_mask = mask_for(mode, 4, 6, *band, 0)[None, None]
    want = fusion_attention(a)
    if mode not in (0, 1, 5):
        assert np.array_equal(fusion_attention(a, keep_by_mask).out, want.out)
    if mode in (1, 2, 3, 4, 6, 7, 8, 0):
        by_formula = dataclasses.replace(a, atten_mask=None, mask_from_mode=1)
        assert np.array_equal(fusion_attention(by_formula).out, want.out)
    unmasked = dataclasses.replace(a, atten_mask=None)
    assert mode == 1 or not np.array_equal(fusion_attention(unmasked).out, want.out)


def documented(mode: int, before: int, behind: int) -> np.ndarray:
    """get_atten_mask of the document's example, for 256 queries and keys."""
    ones = np.ones((256, 256))
    if mode in (0, 4):
        return np.triu(ones, k=behind + 1) + np.tril(ones, k=-before - 1)
    return np.zeros((256, 256)) if mode == 1 else np.triu(ones, k=1)


@pytest.mark.parametrize(
    "mode,before,behind",
    [(0, 128, 128), (1, 65536, 65536), (2, 65536, 0), (3, 65536, 0), (4, 128, 128)],
)
def test_masks_of_the_document(mode, before, behind):
    """Its list of sparse_params: what its own reference hides, which adds -10000."""
    want = documented(mode, before, behind) == 0
    assert np.array_equal(keep(mode, 256, 256, before, behind, 0), want)
    assert np.array_equal(keep_by_mask(mode, 256, 256, before, behind, 0), want)
    rng = np.random.default_rng(mode)
    q, k, v = (rng.standard_normal((1, 2, 256, 8)) for _ in range(3))
    a = Args(q, k, v, BNSD, scale_value=0.08838, sparse_mode=mode, band=1)
    a.pre_tokens, a.next_tokens = before, behind
    a.atten_mask = mask_for(mode, 256, 256, before, behind, 0)[None, None]
    s = q @ k.swapaxes(2, 3) * float(np.float32(0.08838)) - 10000.0 * ~want
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    want = p / p.sum(axis=-1, keepdims=True) @ v
    assert np.allclose(fusion_attention(a).out, flat(want, BNSD), rtol=1e-12, atol=1e-14)


def card(whole: Args, q: tuple, kv: tuple, lens_q: tuple, lens_kv: tuple, **changes) -> Args:
    """Some rows of a call, and of keys, as a call of their own."""
    return dataclasses.replace(
        whole,
        query=whole.query[q[0] : q[1]],
        key=whole.key[kv[0] : kv[1]],
        value=whole.value[kv[0] : kv[1]],
        actual_seq_qlen=ends(*lens_q),
        actual_seq_kvlen=ends(*lens_kv),
        **changes,
    )


def test_mode_7_of_the_document():
    """Two cards share the queries of the second batch: 4 x 6 becomes 2 x 6 and 2 x 6."""
    whole = some(np.random.default_rng(7), (3, 4, 5, 4), (3, 6, 5, 4), n1=2, mask_from_mode=1)
    whole.sparse_mode = 3
    one = card(whole, (0, 5), (0, 9), (3, 5), (3, 9), sparse_mode=7, band=1)
    one.pre_tokens, one.next_tokens = 6, -2
    two = card(whole, (5, 16), (3, 18), (2, 7, 11), (6, 11, 15))
    got = np.concatenate([fusion_attention(a).out for a in (one, two)])
    assert np.array_equal(got, fusion_attention(whole).out)
    assert picture([p.seen for p in oracle.parts(one)][2]) == ["xxx...", "xxxx.."]
    by_mask = [fusion_attention(a, keep_by_mask).out for a in (one, two)]
    assert np.array_equal(np.concatenate(by_mask), got)


def test_mode_8_of_the_document():
    """5 x 4 becomes 2 x 4 and 3 x 4."""
    whole = some(np.random.default_rng(8), (3, 5, 5, 4), (3, 4, 5, 4), n1=2, mask_from_mode=1)
    whole.sparse_mode = 2
    one = card(whole, (0, 5), (0, 7), (3, 5), (3, 7))
    two = card(whole, (5, 17), (3, 16), (3, 8, 12), (4, 9, 13), sparse_mode=8, band=1)
    two.pre_tokens, two.next_tokens = 4, 1
    got = np.concatenate([fusion_attention(a).out for a in (one, two)])
    assert np.array_equal(got, fusion_attention(whole).out)
    assert picture(next(oracle.parts(two)).seen) == ["xxx.", "xxxx", "xxxx"]


def test_the_batch_with_the_band_has_queries():
    rng = np.random.default_rng(0)
    for mode, want in ((7, [3, 3, 4, 3]), (8, [2, 4, 2, 2])):
        a = some(rng, (0, 2, 1, 0), (2, 2, 0, 3), sparse_mode=mode)
        assert oracle.modes_of(a) == want
    alone = some(rng, (2,), (5,), sparse_mode=7)
    assert oracle.modes_of(alone) == [4], "a single batch is a band"
    assert oracle.modes_of(some(rng, (0,), (5,), sparse_mode=7)) == [3]


def test_bytes_count_in_modes_0_1_and_5_only():
    rng = np.random.default_rng(0)
    a = some(rng, (4,), (4,), band=1, prefix=ends(2), pre_tokens=1, next_tokens=9)
    a.atten_mask = (rng.random((1, 1, 5, 6)) < 0.4).astype(np.uint8)
    given = a.atten_mask[0, 0, :4, :4] == 0
    for mode in range(7):
        a.sparse_mode = mode
        formula = keep(mode, 4, 4, 1, 9, 2)
        want = given & formula if mode == 0 else given if mode in (1, 5) else formula
        assert np.array_equal(next(oracle.parts(a)).seen, want), mode
    a.sparse_mode, a.band = 0, 0
    assert np.array_equal(next(oracle.parts(a)).seen, given)
    assert next(oracle.parts(dataclasses.replace(a, atten_mask=None))).seen.all()


def test_masks_of_every_batch_and_head():
    rng = np.random.default_rng(1)
    q, k = rng.standard_normal((2, 3, 2, 4)), rng.standard_normal((2, 5, 2, 4))
    for batch, heads in ((1, 1), (2, 1), (1, 2), (2, 2)):
        mask = (rng.random((batch, heads, 3, 5)) < 0.5).astype(np.uint8)
        a = Args(q, k, k, atten_mask=mask, sparse_mode=1)
        for p in oracle.parts(a):
            assert np.array_equal(p.seen, mask[p.b % batch, p.h % heads] == 0)


# ---- layouts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [BSND, SBH, BNSD, TND])
def test_layouts_only_change_addresses(layout):
    rng = np.random.default_rng(0)
    a = some(rng, (3, 3), (4, 4), n1=4, n2=2, sparse_mode=3, mask_from_mode=1)
    want = fusion_attention(a)
    tensors = {n: unflat(getattr(a, n), layout, 2) for n in ("query", "key", "value")}
    other = Args(**tensors, input_layout=layout, sparse_mode=3, mask_from_mode=1)
    if layout == TND:
        other.actual_seq_qlen, other.actual_seq_kvlen = ends(3, 6), ends(4, 8)
    assert (other.batch, other.heads_q, other.heads_kv) == (2, 4, 2)
    got = fusion_attention(other)
    assert np.array_equal(got.out, want.out) and np.array_equal(got.lse, want.lse)
    for name, tensor in tensors.items():
        assert np.array_equal(flat(tensor, layout), getattr(a, name))
    dout = rng.standard_normal((6, 4, 3))
    grads = [fusion_attention_grad(a, dout), fusion_attention_grad(other, unflat(dout, layout, 2))]
    for name in ("dquery", "dkey", "dvalue", "dpse"):
        assert np.array_equal(*(getattr(g, name) for g in grads))


def test_batches_are_calls_of_their_own():
    rng = np.random.default_rng(0)
    a = some(rng, (3, 0, 4), (5, 2, 6), n1=4, n2=2, keep_prob=0.5, sparse_mode=3, mask_from_mode=1)
    a.pse = rng.standard_normal(4 * (15 + 24))
    got = fusion_attention(dataclasses.replace(a, keep_prob=1.0)).out
    for pse, q, k in ((a.pse[:60], (0, 3), (0, 5)), (a.pse[60:], (3, 7), (7, 13))):
        rows = q[1] - q[0]
        one = card(a, q, k, (rows,), (k[1] - k[0],), pse=pse, keep_prob=1.0)
        assert np.array_equal(fusion_attention(one).out, got[q[0] : q[1]])
    bits = dataclasses.replace(a, dropout_mask=oracle.generated_mask(a))
    assert np.array_equal(fusion_attention(bits).out, fusion_attention(a).out)


# ---- bias ---------------------------------------------------------------------------------------


def test_slopes():
    a = args(
        query=np.ones((1, 2, 1, 1)),
        pse=np.array([[2.0]]),
        pse_type=SLOPE,
        q_start=3,
        kv_start=1,
    )
    assert np.array_equal(next(oracle.parts(a)).pse, [[-4.0, -2.0, 0.0], [-6.0, -4.0, -2.0]])
    a.pse_type = SLOPE_SQRT
    assert np.allclose(next(oracle.parts(a)).pse[1], [-2 * 3**0.5, -2 * 2**0.5, -2])


def test_the_last_rows_stand_for_all():
    """Of a bias that depends on the distance only; 1100 queries, of which 1024 rows are kept."""
    n, rng = 1100, np.random.default_rng(0)
    by_distance = rng.standard_normal((2, 2 * n))
    i, j = np.arange(n)[:, None], np.arange(n)
    full = by_distance[:, i - j + n]
    q = rng.standard_normal((1, n, 2, 2))
    a = Args(q, q, q, sparse_mode=2, mask_from_mode=1, pse=full[None])
    short = dataclasses.replace(a, pse=full[None, :, -1024:], pse_shape=LAST_ROWS)
    for p, other in zip(oracle.parts(a), oracle.parts(short), strict=True):
        assert np.array_equal(p.pse[p.seen], other.pse[p.seen])
    tnd = dataclasses.replace(short, input_layout=TND, query=q[0, :50], key=q[0, :50])
    tnd.value, tnd.actual_seq_qlen, tnd.actual_seq_kvlen = tnd.key, ends(30, 50), ends(30, 50)
    for p in oracle.parts(tnd):
        m = len(p.q)
        assert np.array_equal(p.pse, full[p.h, :m, :m]), "each batch counts its own rows and keys"


def test_shapes_of_pse():
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 3, 2, 4)), rng.standard_normal((2, 5, 2, 4))
    for batch in (1, 2):
        full, row = rng.standard_normal((batch, 2, 3, 5)), rng.standard_normal((batch, 2, 5))
        a = Args(q, k, k, pse=full, pse_type=OUTER)
        b = Args(q, k, k, pse=row, pse_type=OUTER, pse_shape=ONE_ROW)
        for p, other in zip(oracle.parts(a), oracle.parts(b), strict=True):
            assert np.array_equal(p.pse, full[p.b % batch, p.h])
            assert np.array_equal(other.pse, row[None, p.b % batch, p.h].repeat(3, axis=0))
    tnd = some(rng, (2, 1), (3, 2), n1=2, pse_type=OUTER, pse_shape=ONE_ROW, pse=np.arange(10.0))
    assert [p.pse[0].tolist() for p in oracle.parts(tnd)] == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9]]
    tnd = dataclasses.replace(tnd, pse_shape=oracle.FULL, pse=np.arange(16.0))
    assert [p.pse.ravel()[0] for p in oracle.parts(tnd)] == [0, 6, 12, 14]


# ---- dropout ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter,key,want",
    [
        ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_words(counter, key, want):
    assert " ".join(f"{word:08x}" for word in philox(np.array(counter), key)) == want


def test_which_word_is_whose():
    """Row 2, key 6 of the second head of the second of two batches, seed and offset of two halves
    each."""
    rng = np.random.default_rng(0)
    a = some(rng, (2, 3), (4, 7), n1=2, keep_prob=0.5)
    a.dropout_seed, a.dropout_offset = -(1 << 40) + 5, 2**32 - 1
    words = philox(np.array([6 // 4, 2, 1 * 2 + 1, 2**32 - 1]), (5, 0xFFFFFF00))
    part = list(oracle.parts(a))[3]
    assert part.kept[2, 6] == (2.0 if words[2] < 2**31 else 0.0)
    bits = oracle.kept_bits(a, 1, 1, 3, 7)
    for share in (0.1, 0.9, 1.0, 2.0**-32, 2.0**-40):
        other = dataclasses.replace(a, keep_prob=share)
        limit = int(float(np.float32(share)) * 2**32)
        assert oracle.kept_bits(other, 1, 1, 3, 7)[2, 6] == (int(words[2]) < limit)
    assert bits.shape == (3, 7)


def test_bits_of_the_mask():
    """Element 8 n + k is bit k of byte n; batches of TND follow each other."""
    assert pack(np.array([1, 0, 0, 1, 0, 0, 0, 0, 0, 1])).tolist() == [9, 2]
    a = some(np.random.default_rng(0), (2, 1), (3, 2), n1=2, keep_prob=0.5)
    bits = np.arange(16) % 3 == 0
    a.dropout_mask = pack(bits)
    got = np.concatenate([p.kept.ravel() for p in oracle.parts(a)])
    assert np.array_equal(got, 2.0 * bits)


def test_dropout_scales_and_leaves_the_sum_alone():
    a = args(dropout_mask=np.array([0b101], np.uint8), keep_prob=0.5)
    got = fusion_attention(a)
    assert got.out[0, 0, 0] == pytest.approx((1 + 300) / 6 / 0.5)
    assert got.sum[0, 0] == pytest.approx(2.0)
    rng = np.random.default_rng(0)
    many = some(rng, (300,), (300,), n1=1, keep_prob=0.3)
    assert next(oracle.parts(many)).kept.mean() == pytest.approx(1.0, abs=0.02)
    other = dataclasses.replace(many, dropout_offset=1)
    same = next(oracle.parts(many)).kept == next(oracle.parts(other)).kept
    assert same.mean() == pytest.approx(0.3**2 + 0.7**2, abs=0.02)


# ---- gradients ----------------------------------------------------------------------------------


GRADS = [
    {},
    {"scale_value": 0.3, "sparse_mode": 3, "mask_from_mode": 1},
    {"pse_type": OUTER, "scale_value": 0.5},
    {"pse_type": INNER, "scale_value": -0.5, "softcap": 0.7},
    {"keep_prob": 0.6, "dropout_seed": 9, "sparse_mode": 2, "mask_from_mode": 1},
    {"keep_prob": 0.6, "softcap": 2.0, "sparse_mode": 4, "mask_from_mode": 1, "band": 1},
]


@pytest.mark.parametrize("changes", GRADS)
def test_gradients_are_finite_differences(changes):
    """Rows without keys, a batch without any, two heads that share a key head."""
    rng = np.random.default_rng(3)
    a = some(rng, (3, 2, 4), (2, 0, 5), n1=4, n2=2, **changes)
    a.pre_tokens, a.next_tokens = 2, 1
    a.pse = rng.standard_normal(4 * (6 + 20))
    dout = rng.standard_normal((9, 4, 3))
    got = fusion_attention_grad(a, dout)
    step = 1e-5
    for name in ("query", "key", "value", "pse"):
        x = getattr(a, name)
        want = np.zeros(x.shape)
        for at in np.ndindex(x.shape):
            old = x[at]
            both = []
            for side in (step, -step):
                x[at] = old + side
                both.append((fusion_attention(a).out * dout).sum())
            x[at] = old
            want[at] = (both[0] - both[1]) / (2 * step)
        assert np.allclose(getattr(got, f"d{name}"), want, rtol=1e-6, atol=1e-8), name
        assert want.any()


def test_the_plain_gradient_is_near():
    rng = np.random.default_rng(3)
    a = some(rng, (9,), (11,), n1=4, n2=2, scale_value=0.3, keep_prob=0.8)
    dout = rng.standard_normal((9, 4, 3))
    want = fusion_attention_grad(a, dout)
    for dtype, limit in ((np.float32, 1e-5), (np.float16, 1e-2)):
        narrow = {n: getattr(a, n).astype(dtype) for n in ("query", "key", "value")}
        low = dataclasses.replace(a, **narrow)
        got = fusion_attention_grad(low, dout.astype(dtype), plain(low))
        for name in ("dquery", "dkey", "dvalue", "dpse"):
            x, exact = getattr(got, name), getattr(want, name)
            assert x.dtype == dtype and abs(x - exact).max() < limit * abs(exact).max()
