"""The decode operator's oracle on cases that were worked out by hand, and on itself."""

import math

import numpy as np
import pytest
from oracle import BSND, PA_BSND, SLOTS
from oracle_decode import (
    BNSD,
    PA_BNSD,
    TENSOR,
    TOKEN,
    Args,
    by_row,
    decode_group,
    incre_flash_attention,
    plain,
    quantise,
    width,
)

LN2, LN3 = math.log(2), math.log(3)


def args(**changes: object) -> Args:
    """One head, one channel: keys are scores, values 1, 10, 100."""
    base = {
        "query": np.ones((1, 1, 1, 1), np.float32),
        "key": np.array([0.0, LN2, LN3], np.float32).reshape(1, 3, 1, 1),
        "value": np.array([1.0, 10.0, 100.0], np.float32).reshape(1, 3, 1, 1),
        "dk": 1,
        "dv": 1,
    }
    return Args(**{**base, **changes})


def lens(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def out(**changes: object) -> float:
    return float(incre_flash_attention(args(**changes)).out.reshape(-1)[0])


def test_weights_are_exponentials():
    got = incre_flash_attention(args())
    assert got.out[0, 0, 0, 0] == pytest.approx((1 + 20 + 300) / 6)
    assert (got.max[0, 0, 0], got.sum[0, 0, 0]) == (np.float32(LN3), pytest.approx(2.0))
    assert got.lse[0, 0, 0] == pytest.approx(math.log(6))
    assert plain(args())[0, 0, 0, 0] == pytest.approx((1 + 20 + 300) / 6)


def test_scale_zero_is_one_and_softcap_comes_before_bias():
    assert out(scale_value=0.0) == out(scale_value=1.0)
    assert out(scale_value=2.0) == pytest.approx((1 + 40 + 900) / 14)
    cap, pse = 0.5, np.array([3.0, 0.0, -1.0], np.float32).reshape(1, 1, 1, 3)
    s = cap * np.tanh(np.array([0.0, LN2, LN3]) / cap) + pse[0, 0, 0]
    p = np.exp(s)
    want = p @ [1.0, 10.0, 100.0] / p.sum()
    assert out(softcap=cap, pse_shift=pse) == pytest.approx(want)


def test_alibi_counts_tokens_from_the_query():
    query = np.ones((1, 2, 1, 1), np.float32)
    slopes = np.array([LN2], np.float32)
    key = np.zeros((1, 3, 1, 1), np.float32)
    got = incre_flash_attention(args(query=query, key=key, alibi_slopes=slopes))
    assert got.max[0, 0].tolist() == [0.0, 0.0]  # the nearest key is at the query itself
    assert got.out[0, :, 0, 0] == pytest.approx([(10 + 0.5) / 1.5, (100 + 5 + 0.25) / 1.75])


@pytest.mark.parametrize("layout", [BSND, BNSD])
def test_rows_are_causal_from_the_right_and_windows_end_there(layout):
    query = by_row(np.zeros((1, 5, 1, 1), np.float32), layout)
    a = args(query=query, key=by_row(args().key, layout), value=by_row(args().value, layout))
    a.layout_query = a.layout_kv = layout
    got = by_row(incre_flash_attention(a).out, layout)
    assert got[0, :, 0, 0] == pytest.approx([0, 0, 1, 5.5, 37])
    a.window = 2
    got = by_row(incre_flash_attention(a).out, layout)
    assert got[0, :, 0, 0] == pytest.approx([0, 0, 1, 5.5, 55])
    a.window = 1
    assert by_row(incre_flash_attention(a).out, layout)[0, :, 0, 0].tolist() == [0, 0, 1, 10, 100]


def test_masked_keys_are_absent():
    hide = np.array([[[0, 7, 0, 1, 1]]], np.uint8)
    assert out(atten_mask=hide) == pytest.approx((1 + 300) / 4)
    got = incre_flash_attention(args(atten_mask=np.ones((1, 1, 3), np.uint8)))
    assert (got.out, got.max, got.sum, got.lse) == (0, 0, 0, -np.inf)
    sink = np.array([-3.0], np.float32)
    got = incre_flash_attention(args(atten_mask=np.ones((1, 1, 3), np.uint8), sinks=sink))
    assert (got.out, got.max, got.sum, got.lse) == (0, -3, 1, -3)


def test_a_sink_weighs_and_has_no_value():
    sink = np.array([LN2], np.float32)
    assert out(sinks=sink) == pytest.approx((1 + 20 + 300) / 8)


@pytest.mark.parametrize(
    ("length", "padding", "want"),
    [
        (2, None, 5.5),
        (2, 0, 55),
        (2, -4, 55),  # counts as 0
        (2, 1, 5.5),
        (1, 1, 10),
        (2, 2, 0),  # begin < 0
        (0, 4, 0),  # end < 0
        (None, 1, 37),  # without lengths: not looked at
    ],
)
def test_left_padding(length, padding, want):
    pad = None if padding is None else lens(padding)
    length = None if length is None else lens(length)
    assert out(
        query=np.zeros((1, 1, 1, 1), np.float32), actual_seq_lengths=length, kv_padding_size=pad
    ) == pytest.approx(want)


def test_columns_of_mask_and_bias_are_cache_rows():
    zero = np.zeros((1, 1, 1, 1), np.float32)
    shifted = {"query": zero, "actual_seq_lengths": lens(2), "kv_padding_size": lens(0)}
    assert out(**shifted, atten_mask=np.array([[[0, 1, 0]]], np.uint8)) == 100
    pse = np.array([9.0, LN2, LN3], np.float32).reshape(1, 1, 1, 3)
    assert out(**shifted, pse_shift=pse) == pytest.approx((20 + 300) / 5)


def test_one_length_serves_all_batches_and_more_are_left_alone():
    two = {n: np.repeat(getattr(args(), n), 2, axis=0) for n in ("query", "key", "value")}
    two["query"] *= 0
    one = incre_flash_attention(args(**two, actual_seq_lengths=lens(2), lengths=1))
    assert one.out.reshape(-1).tolist() == [5.5, 5.5]
    more = incre_flash_attention(args(**two, actual_seq_lengths=lens(1, 2, -7), lengths=3))
    assert more.out.reshape(-1).tolist() == [1, 5.5]


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("layout", [PA_BSND, PA_BNSD])
def test_pages(layout, slots):
    """Tokens 0, 1, 2 in blocks 1, 1, 0 of two tokens."""

    def pool(x: np.ndarray) -> np.ndarray:
        made = np.full((2, 2, 1, 1), np.nan, np.float32)
        made[1, 0], made[1, 1], made[0, 0] = x[0]
        return by_row(made, layout)

    table = np.array([[2, 3, 0, -9] if slots else [1, 0, -9]], np.int32)
    assert out(
        query=by_row(args().query, layout),
        key=pool(args().key),
        value=pool(args().value),
        block_table=table,
        actual_seq_lengths=lens(3),
        index_kind=SLOTS if slots else 0,
        layout_query=BNSD,
        layout_kv=layout,
    ) == pytest.approx((1 + 20 + 300) / 6)


def test_codes_get_their_offset_and_then_their_scale():
    def codes(*values: int) -> np.ndarray:
        return np.array(values, np.int8).reshape(1, -1, 1, 1)

    coded = {"formats": ("i8", "i8"), "key": codes(0, 0), "value": codes(-128, 100)}
    f32 = np.float32
    per_tensor = {**coded, "antiquant_mode": TENSOR, "antiquant_scale": np.array([1, 0.5], f32)}
    assert out(**per_tensor) == -7
    assert out(**per_tensor, antiquant_offset=np.array([9, 4], f32)) == -5
    per_token = {**coded, "antiquant_mode": TOKEN}
    per_token["antiquant_scale"] = np.array([1, 1, 0.5, 2], f32)
    assert out(**per_token) == (-64 + 200) / 2
    per_token["antiquant_offset"] = np.array([0, 0, 128, 0], f32)
    assert out(**per_token) == 100


def test_channels_have_scales_of_their_head():
    key = np.zeros((1, 1, 2, 3), np.float32)
    value = np.ones((1, 1, 2, 2), np.int8)
    a = args(query=np.zeros((1, 1, 4, 3), np.float32), key=key, value=value, dk=3, dv=2)
    a.formats, a.antiquant_scale = ("", "i8"), np.array([1, 2, 3, 4], np.float32)
    assert incre_flash_attention(a).out.reshape(4, 2).tolist() == [[1, 2], [1, 2], [3, 4], [3, 4]]


def test_four_bit_rows():
    """Five channels: -1, 7, -8, 0, 3 at half, in three bytes filled up to four, and one scale."""
    row = np.array([0x7F, 0x08, 0xF3, 0xFF, *np.array([0.5], np.float16).tobytes()], np.uint8)
    row = row.astype(np.uint8)
    assert len(row) == width("i4_32", 5)
    assert decode_group(row, "i4_32", 5).tolist() == [-0.5, 3.5, -4.0, 0.0, 1.5]
    assert [width("i4_32", n) for n in (1, 4, 32, 33, 128)] == [4, 4, 18, 22, 72]
    assert width("i4_128", 128) == 66 and width("i8", 33) == 33


def test_codes_of_the_output_are_rounded_to_even_and_saturate():
    a = args(quant_scale2=np.ones(1, np.float32))
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 127.5, 1e9, -128.5, -129, np.inf, -np.inf])
    want = [0, 2, 2, 0, -2, 127, 127, -128, -128, 127, -128]
    assert quantise(a, x).tolist() == want
    # product and sum are rounded by themselves: fused, this would be a little more than a half
    x, scale = np.float32(1.375), np.float32(33.3)
    product = x * scale
    assert float(x) * float(scale) > float(product)
    a = args(quant_scale2=scale.reshape(1), quant_offset2=(np.float32(0.5) - product).reshape(1))
    assert quantise(a, x.reshape(1)).tolist() == [0]


def test_nothing_seen_is_quantised_too():
    a = args(atten_mask=np.ones((1, 1, 3), np.uint8), quant_scale2=np.ones(1, np.float32))
    assert incre_flash_attention(a).out.item() == 0
    a.quant_offset2 = np.array([-500.0], np.float32)
    assert incre_flash_attention(a).out.item() == -128
