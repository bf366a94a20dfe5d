"""The oracle against numbers worked out by hand: what checks everything else is checked first."""

import numpy as np
from oracle import BSND, PA_BSND, SLOTS, TND, Args, sparse_flash_attention

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
