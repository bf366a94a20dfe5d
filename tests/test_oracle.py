"""The oracle against numbers worked out by hand: what checks everything else is checked first."""

import numpy as np
from helpers_cases import packed
from oracle import (
    BSND,
    PA_BSND,
    RECORDS,
    SLOTS,
    TND,
    Args,
    Record,
    decode,
    decoded,
    scales_of,
    sparse_flash_attention,
)

LN2 = np.log(2.0)


def one_channel(scores: list[float], values: list[float], **more: object) -> Args:
    """A query of 1 against keys that are their own scores: scale 1, one head, one batch."""
    key = np.array(scores).reshape(1, -1, 1, 1)
    value = np.array(values).reshape(1, -1, 1, 1)
    query = np.ones((1, more.pop("rows", 1), 1, 1))
    return Args(query=query, key=key, value=value, scale_value=1.0, dv=1, **more)


def lists(*ids: int) -> np.ndarray:
    return np.array(ids, np.int32).reshape(1, 1, 1, -1)


def test_two_keys():
    got = sparse_flash_attention(one_channel([0.0, LN2], [3.0, 9.0]))
    assert np.allclose(got.out.ravel(), (1 * 3 + 2 * 9) / 3)
    assert np.allclose([got.max.item(), got.sum.item(), got.lse.item()], [LN2, 1.5, np.log(3)])


def test_duplicates_count_and_out_of_range_is_skipped():
    a = one_channel([0.0, 0.0], [3.0, 9.0], sparse_indices=lists(1, 7, 1, 0, -1, 0))
    assert np.allclose(sparse_flash_attention(a).out, (9 + 9 + 3) / 3)


def test_list_ends_at_any_negative():
    for end in (-1, -2, -(2**31)):
        a = one_channel([0.0, 0.0], [3.0, 9.0], sparse_indices=lists(1, end, 0))
        assert np.allclose(sparse_flash_attention(a).out, 9)


def test_blocks_are_cut_at_the_threshold():
    a = one_channel(
        [0.0] * 5,
        [1.0, 2.0, 3.0, 4.0, 5.0],
        sparse_indices=lists(1, 2),
        sparse_block_size=2,
        actual_seq_lengths_kv=np.array([3], np.int32),
    )
    assert np.allclose(sparse_flash_attention(a).out, 3)


def test_mode_3_is_aligned_at_the_bottom_right():
    a = one_channel([0.0] * 2, [2.0, 4.0], rows=3, sparse_mode=3)
    got = sparse_flash_attention(a)
    assert np.allclose(got.out.ravel(), [0, 2, 3])
    assert np.allclose(got.sum.ravel(), [0, 1, 2])
    assert np.isneginf(got.lse.ravel()[0]) and got.max.ravel()[0] == 0


def test_empty_rows_and_sinks():
    sink = np.array([LN2], np.float32)
    a = one_channel([0.0], [6.0], sinks=sink)
    assert np.allclose(sparse_flash_attention(a).out, 2, rtol=1e-6)
    a = one_channel([0.0], [6.0], sinks=sink, sparse_indices=lists(-1))
    got = sparse_flash_attention(a)
    assert [got.out.item(), got.sum.item()] == [0, 1] and got.max.item() == got.lse.item() == sink
    a.sinks = np.array([-np.inf], np.float32)
    got = sparse_flash_attention(a)
    assert [got.out.item(), got.max.item(), got.sum.item()] == [0, 0, 0] and got.lse == -np.inf
    a = one_channel([0.0], [6.0], sinks=np.array([np.inf], np.float32))
    got = sparse_flash_attention(a)
    assert got.out.item() == 0 and got.max.item() == np.inf and got.sum.item() == 1


def test_slots_have_holes_and_an_lse_without_sink():
    a = one_channel(
        [0.0, 0.0],
        [3.0, 9.0],
        sparse_indices=lists(-1, 1, 2, -5, 1, 0),
        sparse_lengths=np.array([[[5]]], np.int32),
        index_kind=SLOTS,
        sinks=np.zeros(1, np.float32),
    )
    got = sparse_flash_attention(a)
    assert np.allclose([got.out.item(), got.sum.item(), got.lse.item()], [6, 3, LN2])


def test_pages_and_ends():
    key = np.arange(6.0).reshape(3, 2, 1, 1)
    a = Args(
        query=np.zeros((2, 1, 1)),
        key=key,
        value=key,
        scale_value=1.0,
        dv=1,
        layout_query=TND,
        layout_kv=PA_BSND,
        block_table=np.array([[2, 0], [1, -1]], np.int32),
        actual_seq_lengths_query=np.array([1, 1], np.int32),
        actual_seq_lengths_kv=np.array([3, 2], np.int32),
    )
    got = sparse_flash_attention(a)
    assert np.allclose(got.out.ravel(), [(4 + 5 + 0) / 3, 0])  # batch 1 is empty, row 1 is padding
    a.actual_seq_lengths_query = np.array([0, 2], np.int32)
    assert np.allclose(sparse_flash_attention(a).out.ravel(), [2.5, 2.5])


def test_heads_share_keys_and_padding_is_zero():
    rng = np.random.default_rng(1)
    query, key = rng.standard_normal((2, 3, 4, 5)), rng.standard_normal((2, 6, 2, 5))
    a = Args(
        query=query,
        key=key,
        scale_value=0.5,
        dv=3,
        actual_seq_lengths_query=np.array([1, 3], np.int32),
        layout_query=BSND,
    )
    got = sparse_flash_attention(a)
    assert got.out.shape == (2, 3, 4, 3) and got.max.shape == (2, 2, 3, 2)
    assert not got.out[0, 1:].any() and np.isneginf(got.lse[0, :, 1:]).all()
    s = 0.5 * key[1, :, 1] @ query[1, 2, 3]
    p = np.exp(s - s.max())
    assert np.allclose(got.out[1, 2, 3], p @ key[1, :, 1, :3] / p.sum())
    assert np.allclose(got.lse[1, 1, 2, 1], np.log(np.exp(s).sum()))


# ---- records ------------------------------------------------------------------------------------


def bytes_of(*parts: object) -> np.ndarray:
    """Numbers one after another, as bytes."""
    return np.concatenate([np.atleast_1d(part).view(np.uint8) for part in parts])


def test_a_record_of_int8_by_its_places():
    """656 bytes: codes at 0, rotary channels of the query's type at 512, scales at 640."""
    row = np.zeros(656, np.uint8)
    row[0], row[127], row[128], row[511] = 0x80, 0x7F, 0xFF, 2
    row[512:516] = bytes_of(np.array([1.5, -2.0], np.float16))
    row[640:656] = bytes_of(np.array([0.5, 3.0, 0.0, -0.25], np.float32))
    got = decode(row, RECORDS["i8_656"], np.dtype(np.float16))
    assert got.shape == (576,) and got.dtype == np.float32
    assert [got[0], got[127], got[128], got[511]] == [-64.0, 63.5, -3.0, -0.5]
    assert list(got[512:515]) == [1.5, -2.0, 0.0]


def test_a_record_of_fp8_by_its_places():
    """656 bytes: codes at 0, scales at 512, bfloat16 at 528, whatever the query is."""
    row = np.zeros(656, np.uint8)
    row[:5] = [0x38, 0xB8, 0x7E, 0x01, 0x7F]  # 1, -1, 448, 2^-9, NaN
    row[384] = 0x40  # 2
    row[512:528] = bytes_of(np.array([0.5, 1, 1, 1000.0], np.float32))
    row[528:530] = [0x80, 0x3F]  # 1 in bfloat16
    for dtype in (np.float16, np.float32):
        got = decode(row, RECORDS["fp8_656"], np.dtype(dtype))
        assert list(got[:4]) == [0.5, -0.5, 224.0, 2.0**-10] and np.isnan(got[4])
        assert got[384] == 2000.0 and got[512] == 1.0


def test_a_page_of_fp8_by_its_places():
    """Two tokens of 576 bytes, then 8 bytes of exponents each: 1168 bytes, filled up to 1728."""
    key = np.zeros((2, 2, 1, 584), np.uint8)
    key[0, 1, 0, 0], key[0, 1, 0, 447], key[0, 1, 0, 448:450] = 0x38, 0x38, [0x80, 0x3F]
    key[0, 1, 0, 576:584] = [127, 1, 1, 1, 1, 1, 130, 9]
    key[1, 0, 0, 576] = 77
    a = Args(
        query=np.zeros((1, 1, 1, 512), np.float16),
        key=key,
        scale_value=1.0,
        dv=512,
        record=RECORDS["fp8_v4"],
    )
    got = decoded(a).key
    assert got.shape == (2, 2, 1, 512)
    assert [got[0, 1, 0, c] for c in (0, 1, 447, 448)] == [1.0, 0.0, 8.0, 1.0]
    memory, strides = packed(a)
    assert strides == (1728, 576, 0)
    assert memory.shape == (1728 + 1168,)  # what would fill the last page up is not the cache's
    assert memory[576] == 0x38 and memory[576 + 447] == 0x38 and memory[576 + 449] == 0x3F
    assert list(memory[1152:1168]) == [0] * 8 + [127, 1, 1, 1, 1, 1, 130, 9]
    assert (memory[1168:1728] == 0xFF).all() and memory[1728 + 1152] == 77


def test_scales_by_exponent():
    codes = np.array([0, 1, 126, 127, 128, 254, 255], np.uint8)
    got = scales_of(codes, "e8m0")
    assert list(got[:-1]) == [2.0**-127, 2.0**-126, 0.5, 1.0, 2.0, 2.0**127] and np.isnan(got[-1])


def test_the_last_scale_may_have_fewer_channels():
    record = Record((("scale", "f32", 2), ("nope", "i8", 5)), tile=3)
    row = bytes_of(np.array([1.0, 10.0], np.float32), np.arange(1, 6, dtype=np.int8))
    assert list(decode(row, record, np.dtype(np.float16))) == [1, 2, 3, 40, 50]


def test_a_product_is_rounded_once():
    record = Record((("scale", "f32", 1), ("nope", "i8", 1)), tile=1)
    scale = np.float32(0.1)
    row = bytes_of(np.array([scale]), np.array([3], np.int8))
    assert decode(row, record, np.dtype(np.float16))[0] == scale * np.float32(3)


def test_attention_over_records_is_attention_over_their_numbers():
    """Two keys, worked out by hand: k is 2 and 6, with weights 1/4 and 3/4 once q = ln 3 / 4."""
    record = Record((("nope", "i8", 1), ("pad", "bytes", 3), ("scale", "f32", 1)), tile=1)
    rows_ = [
        bytes_of(np.array([n], np.int8), np.full(3, 0xFF, np.uint8), np.array([s], np.float32))
        for n, s in ((4, 0.5), (-3, -2.0))
    ]
    a = Args(
        query=np.full((1, 1, 1, 1), np.log(3) / 4),
        key=np.stack(rows_).reshape(1, 2, 1, 8),
        scale_value=1.0,
        dv=1,
        record=record,
    )
    assert np.isclose(sparse_flash_attention(a).out.item(), 0.25 * 2 + 0.75 * 6)
    assert np.isclose(sparse_flash_attention(a).max.item(), 6 * np.log(3) / 4)
