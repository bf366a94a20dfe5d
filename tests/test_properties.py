"""What has to hold between two calls, whatever the numbers are: no oracle is needed to see it."""

import dataclasses

import numpy as np
import pytest
from helpers import assert_same, by_way, kernel, same_bits
from helpers_cases import TENSORS, Case, Shape, make_case, random_list, run, shapes, strided
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, PA_BSND, TND, flat, sparse_flash_attention

SMALL = ("f32_small", "f16_small", "bf16_small")
BY_WAY = by_way(*SMALL)  # name, isa, group: 3 heads, and on tiles also more than 16
PLAIN = Shape(lens_q=(3, 2), lens_kv=(70, 45), heads_kv=2, group=3, sparse_mode=3, seed=12)
NORMAL = ("normal", "equal", "growing", "dominant")


def assert_close(x: dict, y: dict, dtype: np.dtype) -> None:
    """Equal but for the order of rounding: outputs to units in the last place of the largest."""
    unit = {"float32": 2.0**-19, "float16": 2.0**-9, "bfloat16": 2.0**-6}[dtype.name]
    for name in x:
        a, b = x[name].astype(np.float64), y[name].astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        finite = np.where(np.isfinite(b), abs(b), 0.0)
        limit = (unit if name == "attention_out" else 2e-5) * max(finite.max(initial=0.0), 1e-30)
        with np.errstate(invalid="ignore"):
            assert (same | (abs(a - b) <= limit)).all(), name


def with_shape(**changes: object) -> Shape:
    return dataclasses.replace(PLAIN, **changes)


@BY_WAY
@settings(max_examples=15)
@given(data=st.data())
def test_strided_is_packed(name, isa, group, data):
    k = kernel(name)
    case = make_case(
        k, data.draw(shapes(rope=True, slots=True, groups=st.integers(group - 2, group + 2)))
    )
    rng = np.random.default_rng(case.shape.seed)
    fields = dict(case.inputs())
    strides = {}
    for tensor in TENSORS:
        if tensor in fields:
            fields[tensor], strides[f"{tensor}_stride"] = strided(rng, fields[tensor])
    outputs = case.outputs()
    assert k.run(**{**fields, **case.sizes(), **strides, **outputs, "isa": k.isas()[isa]}).ok
    assert_same(outputs, run(k, case, isa))


@by_way("bf16_small")
def test_heads_and_batches_may_share_memory(name, isa, group):
    """Inputs that overlap themselves: head 1 starts one row behind head 0, batch 1 two rows."""
    k = kernel(name)
    case = make_case(k, with_shape(group=group, lens_kv=(9, 9), joined_k=True, sparse_mode=0))
    width = k.dk + k.rope
    rng = np.random.default_rng(0)
    memory = rng.standard_normal((12, width)).astype(case.dtype)
    key = np.stack(
        [np.stack([memory[b * 2 + h : b * 2 + h + 9] for h in range(2)], axis=1) for b in range(2)]
    )
    outputs = case.outputs()
    fields = {**case.inputs(), **case.sizes(), **outputs, "key": memory, "isa": k.isas()[isa]}
    assert k.run(**fields, key_stride=(2 * width, width, width)).ok
    assert_same(outputs, run(k, case.changed(key=key), isa))


@BY_WAY
def test_joined_rows_are_separate_rows(name, isa, group):
    k = kernel(name)
    apart = make_case(k, with_shape(group=group, lists="blocks", list_length=20))
    whole = run(k, apart, isa)
    for joined in (("query",), ("key",), ("query", "key")):
        changes = {}
        for tensor in joined:
            parts = [getattr(apart.args, tensor), getattr(apart.args, f"{tensor}_rope")]
            changes |= {tensor: np.concatenate(parts, axis=-1), f"{tensor}_rope": None}
        assert_same(run(k, apart.changed(**changes), isa), whole)


@BY_WAY
def test_value_null_is_the_nope_part_of_key(name, isa, group):
    k = kernel(name)
    for joined in (False, True):
        case = make_case(k, with_shape(group=group, joined_k=joined))
        copy = case.args.key[..., : k.dv].copy()
        assert_close(run(k, case.changed(value=copy), isa), run(k, case, isa), case.dtype)


@BY_WAY
def test_gqa_is_repeated_heads(name, isa, group):
    k = kernel(name)
    for lists in ("none", "blocks", "slots"):
        mode = 0 if lists == "slots" else 3
        gqa = make_case(k, with_shape(group=group, lists=lists, list_length=20, sparse_mode=mode))
        a, changes = gqa.args, {}
        for tensor in ("key", "key_rope"):
            changes[tensor] = np.repeat(getattr(a, tensor), group, axis=-2)
        if a.sparse_indices is not None:
            changes["sparse_indices"] = np.repeat(a.sparse_indices, group, axis=-2)
        x, y = run(k, gqa, isa), run(k, gqa.changed(**changes), isa)
        for stat in ("softmax_max", "softmax_sum", "softmax_lse"):
            b, n2, s1, g = x[stat].shape
            x[stat] = x[stat].transpose(0, 1, 3, 2).reshape(b, n2 * g, s1, 1).copy()
        assert_close(x, y, gqa.dtype)


def with_lists(case: Case, lists: list[np.ndarray]) -> Case:
    """The case with one list a (row, kv head), each as long as the longest; -1 behind."""
    shape = case.args.sparse_indices.shape
    length = max(map(len, lists), default=0)
    ids = np.full((len(lists), length), -1, np.int32)
    for row, one in zip(ids, lists, strict=True):
        row[: len(one)] = one
    return case.changed(sparse_indices=ids.reshape(*shape[:-1], length))


def lists_of(case: Case) -> np.ndarray:
    return case.args.sparse_indices.reshape(-1, case.args.sparse_indices.shape[-1])


def before_end(one: np.ndarray) -> np.ndarray:
    """A list up to its first negative id."""
    ends = np.flatnonzero(one < 0)
    return one[: ends[0]] if len(ends) else one


@BY_WAY
@settings(max_examples=10)
@given(seed=st.integers(0, 2**20), spread=st.sampled_from(NORMAL))
def test_permuted_list_is_the_same_selection(name, isa, group, seed, spread):
    k = kernel(name)
    shape = with_shape(group=group, lists="blocks", list_length=40, seed=seed, spread=spread)
    case = make_case(k, shape)
    rng = np.random.default_rng(seed)
    lists = [before_end(one) for one in lists_of(case)]
    kept, turned = with_lists(case, lists), with_lists(case, [rng.permutation(x) for x in lists])
    assert_same(run(k, kept, isa), run(k, case, isa))
    assert_close(run(k, turned, isa), run(k, kept, isa), case.dtype)


@BY_WAY
@pytest.mark.parametrize("block", [1, 4, 128])
def test_list_of_all_keys_is_dense(name, isa, group, block):
    k = kernel(name)
    for layout in (BSND, TND, PA_BSND):
        shape = with_shape(group=group, layout_q=TND if layout == TND else BSND, layout_kv=layout)
        dense = make_case(k, shape)
        n = -(-max(shape.lens_kv) // block)
        outer = (*dense.args.query.shape[:-2], 2)
        ids = np.broadcast_to(np.arange(n, dtype=np.int32), (*outer, n)).copy()
        listed = dense.changed(sparse_indices=ids, sparse_block_size=block)
        assert_same(run(k, listed, isa, chunk_keys=128), run(k, dense, isa, chunk_keys=128))


@by_way("bf16_small")
@pytest.mark.parametrize("block", [2, 8, 32, 128])
def test_a_list_of_blocks_is_the_list_of_their_tokens(name, isa, group, block):
    k = kernel(name)
    shape = with_shape(
        group=group, lists="blocks", list_length=12, sparse_block_size=block, lens_kv=(300, 290)
    )
    case = make_case(k, shape)
    tokens = [
        np.concatenate(
            [np.arange(i * block, i * block + block) for i in one if i < 300] or [np.zeros(0, int)]
        )
        for one in (before_end(ids).tolist() for ids in lists_of(case))
    ]
    wide = with_lists(case, tokens).changed(sparse_block_size=1)
    assert_same(run(k, case, isa), run(k, wide, isa))
    cut = run(k, case, isa, chunk_keys=128)  # chunks are cut by entries: other sums, same numbers
    assert_close(cut, run(k, wide, isa, chunk_keys=128), case.dtype)


@BY_WAY
def test_mode_3_list_of_the_last_row_serves_earlier_rows(name, isa, group):
    """Several tokens in one step: one list for all, each row cut at its own threshold."""
    k = kernel(name)
    shape = with_shape(group=group, lens_q=(4, 4), lens_kv=(50, 45), lists="blocks", list_length=30)
    case = make_case(k, shape)
    rng = np.random.default_rng(3)
    last = [random_list(rng, 30, 45).clip(-1, 44) for _ in range(2 * 2)]
    shared = [last[2 * b + n] for b in range(2) for _ in range(4) for n in range(2)]
    clean = make_case(k, dataclasses.replace(shape, lists="none")).args
    case = case.changed(key=clean.key, key_rope=clean.key_rope)
    cut = []
    for at, one in enumerate(shared):
        b, i = divmod(at // 2, 4)
        threshold = shape.lens_kv[b] - 4 + i + 1
        cut.append(np.array([t for t in before_end(one) if t < threshold]))
    assert_same(run(k, with_lists(case, shared), isa), run(k, with_lists(case, cut), isa))


@BY_WAY
def test_layouts_only_change_addresses(name, isa, group):
    """The same tokens in BSND, TND and pages of several sizes: the same bits."""
    k = kernel(name)
    lens_q, lens_kv = (3, 2), (70, 45)
    base = make_case(k, with_shape(group=group, pad_q=1, pad_kv=3))
    a = base.args
    want = run(k, base, isa)
    tnd = base.changed(
        **{
            t: np.concatenate([getattr(a, t)[0, :n], getattr(a, t)[1, :m]])
            for t, (n, m) in {
                "query": lens_q,
                "query_rope": lens_q,
                "key": lens_kv,
                "key_rope": lens_kv,
            }.items()
        },
        layout_query=TND,
        layout_kv=TND,
        actual_seq_lengths_query=np.array([3, 5], np.int32),
        actual_seq_lengths_kv=np.array([70, 115], np.int32),
    )
    got = run(k, tnd, isa)["attention_out"]
    assert same_bits(got[:3], want["attention_out"][0, :3])
    assert same_bits(got[3:], want["attention_out"][1, :2])
    for size in (1, 3, 16, 64):
        needed = [-(-n // size) for n in lens_kv]
        table = np.full((2, max(needed) + 1), -1, np.int32)
        order = np.random.default_rng(size).permutation(sum(needed)).astype(np.int32)
        table[0, : needed[0]], table[1, : needed[1]] = order[: needed[0]], order[needed[0] :]
        changes = {"layout_kv": PA_BSND, "block_table": table}
        for tensor in ("key", "key_rope"):
            dense = getattr(a, tensor)
            pool = np.full((sum(needed), size, *dense.shape[2:]), np.nan, dense.dtype)
            for b in range(2):
                for j in range(lens_kv[b]):
                    pool[table[b, j // size], j % size] = dense[b, j]
            changes[tensor] = pool
        assert_same(run(k, base.changed(**changes), isa), want)


@BY_WAY
def test_slots_are_positions_in_the_whole_tensor(name, isa, group):
    """Slots b * S2 + j of a list without holes, against the same list of positions."""
    k = kernel(name)
    case = make_case(k, with_shape(group=group, sparse_mode=0, lists="blocks", list_length=20))
    rng = np.random.default_rng(8)
    lists = [rng.permutation(45)[:20] for _ in lists_of(case)]
    clean = make_case(k, with_shape(group=group)).args
    case = with_lists(case.changed(key=clean.key, key_rope=clean.key_rope), lists)
    batch = np.arange(2).reshape(2, 1, 1, 1)
    by_slot = case.changed(
        sparse_indices=(case.args.sparse_indices + 70 * batch).astype(np.int32),
        index_kind=1,
        actual_seq_lengths_kv=None,
    )
    assert_same(run(k, by_slot, isa), run(k, case, isa))
    holes = np.full((*by_slot.args.sparse_indices.shape[:-1], 40), -1, np.int32)
    holes[..., ::2] = by_slot.args.sparse_indices
    assert_close(run(k, by_slot.changed(sparse_indices=holes), isa), run(k, case, isa), case.dtype)


@BY_WAY
def test_scale_moves_between_query_and_scale_value(name, isa, group):
    """Powers of two change no digit."""
    k = kernel(name)
    case = make_case(k, with_shape(group=group))
    double = case.changed(
        query=case.args.query * 2,
        query_rope=case.args.query_rope * 2,
        scale_value=case.args.scale_value / 2,
    )
    assert_same(run(k, double, isa), run(k, case, isa))


@BY_WAY
def test_every_key_twice_is_the_same_mean(name, isa, group):
    k = kernel(name)
    case = make_case(k, with_shape(group=group, sparse_mode=0, lists="blocks", list_length=8))
    ids = [before_end(one) for one in lists_of(case)]
    once = run(k, with_lists(case, ids), isa)
    twice = run(k, with_lists(case, [np.concatenate([x, x]) for x in ids]), isa)
    twice["softmax_sum"] = twice["softmax_sum"] / 2
    seen = np.isfinite(once["softmax_lse"])
    twice["softmax_lse"][seen] -= np.float32(np.log(2))
    assert_close(twice, once, case.dtype)


@BY_WAY
def test_a_sink_is_a_key_without_value(name, isa, group):
    k = kernel(name)
    case = make_case(
        k,
        with_shape(
            group=group, value=True, sparse_mode=0, lens_kv=(45, 45), joined_k=True, joined_q=True
        ),
    )
    a = case.args
    query = a.query.copy()
    query[..., -1] = 1.0
    key = np.concatenate([a.key, np.zeros_like(a.key[:, :1])], axis=1)
    key[:, :45, :, -1] = 0.0
    key[:, 45, :, -1] = 3.0
    value = np.concatenate([a.value, np.zeros_like(a.value[:, :1])], axis=1)
    lens = np.array([46, 46], np.int32)
    longer = case.changed(query=query, key=key, value=value, actual_seq_lengths_kv=lens)
    sink = np.float32(3.0) * np.float32(a.scale_value)
    with_sink = case.changed(
        query=query, key=key[:, :45].copy(), sinks=np.full(a.heads_q, sink, np.float32)
    )
    assert_close(run(k, with_sink, isa), run(k, longer, isa), case.dtype)


# ---- parts of one context -----------------------------------------------------------------------


def parts_of(k, case: Case, cuts: list[int], isa: str) -> list[dict[str, np.ndarray]]:
    """The call on each of the ranges of keys between the cuts; sinks go to the first."""
    made = []
    for i, (lo, hi) in enumerate(zip([0, *cuts], [*cuts, 70], strict=True)):
        lens = np.clip(np.array(case.shape.lens_kv) - lo, 0, hi - lo).astype(np.int32)
        part = case.changed(
            key=case.args.key[:, lo:hi].copy(),
            key_rope=None if case.args.key_rope is None else case.args.key_rope[:, lo:hi].copy(),
            actual_seq_lengths_kv=lens,
            sinks=case.args.sinks if i == 0 else None,
        )
        part.extra["out_f32"] = 1
        made.append(run(k, part, isa))
    return made


def merged(
    k, case: Case, parts: list[dict[str, np.ndarray]], **more: object
) -> dict[str, np.ndarray]:
    """merge_parts of the results, into fresh outputs."""
    outputs = case.outputs()
    if more.get("out_f32"):
        outputs["attention_out"] = np.empty(outputs["attention_out"].shape, np.float32)
    tnd = case.args.layout_query == TND
    result = k.merge_parts(
        out=[p["attention_out"] for p in parts],
        max=[p["softmax_max"] for p in parts],
        sum=[p["softmax_sum"] for p in parts],
        parts=len(parts),
        batch=1 if tnd else case.args.query.shape[0],
        seq_q=case.args.query.shape[-3],
        heads_q=case.args.heads_q,
        heads_kv=case.args.heads_kv,
        **{**outputs, **more},
    )
    assert result.ok, result.error_text
    return outputs


@BY_WAY
@pytest.mark.parametrize("cuts", [[35], [1], [70], [0], [20, 20, 50], []])
@pytest.mark.parametrize("sinks", ["none", "plain"])
def test_merged_parts_are_the_whole(name, isa, group, cuts, sinks):
    """Halves, a part without keys, a row without keys in any part."""
    k = kernel(name)
    case = make_case(
        k, with_shape(group=group, sparse_mode=0, lens_kv=(70, 0), sinks=sinks, pad_q=1)
    )
    whole = run(k, case, isa)
    parts = parts_of(k, case, cuts, isa)
    assert_close(merged(k, case, parts), whole, case.dtype)
    exact = merged(k, case, parts, out_f32=1)
    assert same_bits(
        exact["attention_out"].astype(case.dtype), merged(k, case, parts)["attention_out"]
    )


@pytest.mark.parametrize("name", ["f32_80", "bf16_259", "f16_128"])
def test_merged_parts_of_wide_values(name):
    """More channels than merge takes at a time."""
    k = kernel(name)
    case = make_case(k, with_shape(sparse_mode=0))
    parts = parts_of(k, case, [20, 50], "scalar")
    assert_close(merged(k, case, parts), run(k, case, "scalar"), case.dtype)
    exact = merged(k, case, parts, out_f32=1)["attention_out"]
    assert same_bits(exact.astype(case.dtype), merged(k, case, parts)["attention_out"])


def test_merged_parts_of_tnd_and_of_growing_scores():
    k = kernel("f32_small")
    case = make_case(
        k,
        with_shape(
            sparse_mode=0, layout_q=TND, layout_kv=TND, lens_q=(2,), lens_kv=(70,), spread="growing"
        ),
    )
    parts = []
    for lo, hi in ((0, 30), (30, 70)):
        part = case.changed(
            key=case.args.key[lo:hi].copy(),
            key_rope=case.args.key_rope[lo:hi].copy(),
            actual_seq_lengths_kv=np.array([hi - lo], np.int32),
        )
        part.extra["out_f32"] = 1
        parts.append(run(k, part, "scalar"))
    got = merged(k, case, parts)
    assert_close(got, run(k, case, "scalar"), case.dtype)
    want = sparse_flash_attention(case.args)
    assert np.allclose(got["attention_out"], want.out, atol=1e-5)
    assert flat(got["attention_out"]).shape == (2, 6, k.dv)


def test_merge_may_write_max_and_sum_over_a_part():
    k = kernel("f32_small")
    case = make_case(k, with_shape(sparse_mode=0))
    parts = parts_of(k, case, [33], "scalar")
    want = merged(k, case, parts)
    over = {"softmax_max": parts[0]["softmax_max"], "softmax_sum": parts[1]["softmax_sum"]}
    got = merged(k, case, parts, **over)
    assert same_bits(got["attention_out"], want["attention_out"])
    assert same_bits(over["softmax_max"], want["softmax_max"])
    assert same_bits(over["softmax_sum"], want["softmax_sum"])


def test_a_nan_part_stays_a_nan():
    k = kernel("f32_small")
    case = make_case(k, with_shape(sparse_mode=0))
    parts = parts_of(k, case, [33], "scalar")
    for part in parts[1].values():
        part.reshape(-1)[0] = np.nan
    got = merged(k, case, parts)
    assert np.isnan(got["attention_out"][0, 0, 0]).all() and np.isnan(
        got["softmax_sum"][0, 0, 0, 0]
    )
    assert not np.isnan(got["attention_out"][0, 0, 1:]).any()
