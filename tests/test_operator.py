"""sparse_flash_attention against the oracle: every layout, list, type, instruction set."""

import dataclasses

import numpy as np
import pytest
from helpers import (
    ISAS_HERE,
    SPECS,
    WORDS_HERE,
    by_pair,
    by_way,
    check,
    check_stats,
    enough_heads,
    groups_of,
    isas_in,
    kernel,
    on_tiles,
    same_bits,
    shipped,
)
from helpers_cases import Shape, Way, make_case, run, run_guarded, shapes
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, PA_BSND, TND, flat, rows, sparse_flash_attention

from gen.isa import ISAS

SMALL = ("f32_small", "f16_small", "bf16_small")
OTHERS = tuple(name for name in SPECS if name not in SMALL)
WAYS = st.builds(
    Way,
    flush=st.sampled_from(("left", "right")),
    strides=st.booleans(),
    chunk_keys=st.sampled_from((0, 128)),
    by_task=st.booleans(),
    partials=st.booleans(),
    stats=st.sampled_from((True, True, True, False)),
)


def check_call(name: str, shape: Shape, way: Way) -> None:
    """One call between guard pages against the oracle."""
    k = kernel(name)
    case = make_case(k, shape)
    got = run_guarded(k, case, way)
    check(case.args, got, way.isa)


def some(shape: Shape, **changes: object) -> Shape:
    return dataclasses.replace(shape, **changes)


def test_every_instruction_set_is_present():
    """Run-time choice finds what the processor says it has."""
    for name in SMALL:
        assert set(kernel(name).isas()) == set(isas_in(name))
    assert isas_in("bf16_small") == isas_in("f16_small") == ISAS_HERE
    assert isas_in("f32_small") == WORDS_HERE


def groups_on(name: str, isa: str) -> st.SearchStrategy[int]:
    """Heads of a group: on tiles also as many as go another way there, and the ends of a tile."""
    few = st.integers(1, 5)
    if groups_of(name, isa, 3) == (3,):
        return few
    many = st.sampled_from((16, 17, 20, 32, 33))
    return many if enough_heads(name, isa, 1) > 1 else st.one_of(few, st.sampled_from((8, 9)), many)


@by_pair(*SMALL)
@settings(max_examples=100)
@given(data=st.data())
def test_any_call(name, isa, data):
    shape = data.draw(shapes(rope=kernel(name).rope > 0, slots=True, groups=groups_on(name, isa)))
    way = dataclasses.replace(data.draw(WAYS), isa=isa)
    check_call(name, shape, way)


@by_pair(*OTHERS)
@settings(max_examples=20)
@given(data=st.data())
def test_any_call_of_other_widths_and_maths(name, isa, data):
    shape = data.draw(shapes(rope=kernel(name).rope > 0, slots=False, groups=groups_on(name, isa)))
    way = dataclasses.replace(data.draw(WAYS), isa=isa)
    check_call(name, shape, way)


@pytest.mark.parametrize("name", shipped())
@settings(max_examples=16)
@given(data=st.data())
def test_any_call_of_shipped_headers(name, data):
    k = kernel(name)
    slots = k.name.endswith("_slots")
    shape = data.draw(
        shapes(rope=k.rope > 0, slots=slots, max_keys=40, max_rows=2, groups=st.integers(1, 3))
    )
    for isa in k.isas():
        enough = some(shape, group=enough_heads(name, isa, shape.group))
        check_call(name, enough, dataclasses.replace(data.draw(WAYS), isa=isa))


@by_pair("f32_small", "bf16_small")
@pytest.mark.parametrize("lists", ["none", "blocks", "slots"])
def test_key_counts_round_every_tile_and_chunk(name, isa, lists):
    """0, 1, and one less and one more than everything that can be a tile or a chunk."""
    k = kernel(name)
    counts = sorted(
        {
            *range(0, 20),
            *(n + d for n in (24, 32, 48, 64, 96, 128, 192, 256, 384, 512) for d in (-1, 0, 1)),
        }
    )
    for n in counts:
        shape = Shape(
            lens_q=(1,),
            lens_kv=(max(n, 1),),
            group=2,
            spread="growing",
            seed=n,
            lists=lists,
            list_length=n,
        )
        case = make_case(k, shape)
        if lists == "none":
            case = make_case(k, some(shape, lens_kv=(n,)))
        else:  # all of the list is good
            ids = np.random.default_rng(n).permutation(n).astype(np.int32)
            case = case.changed(sparse_indices=ids.reshape(1, 1, 1, n))
            refill(case)
        for chunk in (0, 128):
            check(case.args, run(k, case, isa, chunk_keys=chunk), isa)


@by_pair("f32_small", "f16_small", "bf16_small", "bf16_259")
@pytest.mark.parametrize("value", [False, True], ids=["joined", "apart"])
def test_few_heads_round_every_tile_of_keys(name, isa, value):
    """1 .. 9 heads, and keys one under, at and one over each tile, block and window; scores grow,
    so that each block's largest is above the last one's, and every rescale runs."""
    k = kernel(name)
    counts = sorted({1, 2, 3, *(n + d for n in (4, 8, 16, 32, 48, 96, 160) for d in (-1, 0, 1))})
    for group in range(1, 10):
        for n in counts:
            shape = Shape(
                lens_q=(1,), lens_kv=(n,), group=group, spread="growing", value=value, seed=n
            )
            case = make_case(k, shape)
            check(case.args, run(k, case, isa), isa)


@by_pair("f32_small", "bf16_259")
def test_few_heads_do_not_see_each_other(name, isa):
    """Heads are cut into tiles by their number: a NaN in one's query stays there, and a NaN key
    reaches all."""
    k = kernel(name)
    for group in range(1, 10):
        clean = make_case(k, Shape(lens_kv=(53,), group=group, seed=group))
        before = run(k, clean, isa)["attention_out"].reshape(group, -1)
        for h in range(group):
            query = clean.args.query.copy()
            query[..., h, 0] = np.nan
            after = run(k, clean.changed(query=query), isa)["attention_out"].reshape(group, -1)
            assert np.isnan(after[h].astype(np.float64)).all()
            others = np.arange(group) != h
            assert same_bits(before[others], after[others])
        for at in (0, 15, 16, 47, 48, 52):
            key = clean.args.key.copy()
            key[0, at, 0, 1] = np.nan
            got = run(k, clean.changed(key=key), isa)
            assert np.isnan(got["attention_out"].astype(np.float64)).all(), (group, at)


def refill(case) -> None:
    """Numbers everywhere: for cases whose lists are replaced after poisoning."""
    rng = np.random.default_rng(case.shape.seed)
    for name in ("query", "query_rope", "key", "key_rope", "value"):
        tensor = getattr(case.args, name)
        if tensor is not None:
            tensor[...] = rng.standard_normal(tensor.shape)


@by_pair("f32_small", "f16_small", "bf16_259", also=("bf16_small",))
def test_any_number_of_heads(name, isa):
    for group in (*range(1, 36), 47, 48, 49, 63, 64, 65, 127, 128):
        shape = Shape(
            lens_q=(2,),
            lens_kv=(21,),
            group=group,
            seed=group,
            sparse_mode=3,
            value=group % 2 == 1,
            joined_q=group % 3 == 0 and kernel(name).rope > 0,
        )
        check_call(name, shape, Way(isa, ("left", "right")[group % 2]))


@pytest.mark.parametrize("isa", ISAS_HERE)
@pytest.mark.parametrize("block", [1, 2, 4, 8, 16, 32, 64, 128])
def test_every_sparse_block_size(isa, block):
    for page, mode in ((1, 0), (3, 3), (16, 3), (130, 0)):
        shape = Shape(
            lens_q=(3, 1),
            lens_kv=(300, 129),
            layout_kv=PA_BSND,
            block_size=page,
            lists="blocks",
            list_length=max(300 // block, 2),
            sparse_block_size=block,
            sparse_mode=mode,
            seed=block * 7 + page,
            spread="growing",
        )
        check_call("bf16_small", shape, Way(isa, chunk_keys=128))


@by_way("f16_small", few=1)
def test_every_page_size(name, isa, group):
    for page in (*range(1, 20), 31, 32, 33, 63, 64, 65, 127, 128, 129, 480, 1024):
        for lists in ("none", "blocks", "slots"):
            shape = Shape(
                lens_q=(2, 1),
                lens_kv=(67, 140),
                group=group,
                layout_q=TND,
                layout_kv=PA_BSND,
                block_size=page,
                lists=lists,
                list_length=30,
                seed=page,
            )
            check_call(name, shape, Way(isa, strides=page % 2 == 0))


@pytest.mark.parametrize("isa", ISAS_HERE)
@pytest.mark.parametrize(
    "spread",
    ["normal", "flat", "huge", "dominant", "equal", "growing", "falling", "cancel", "tiny"],
)
def test_hostile_spreads_over_several_chunks(isa, spread):
    for name in (*SMALL, "f32_sleef", "f32_libm", "bf16_sleef", "bf16_libm"):
        if isa not in isas_in(name):
            continue
        for group in groups_of(name, isa, 3):
            shape = Shape(
                lens_q=(2,),
                lens_kv=(700,),
                group=group,
                sparse_mode=3,
                spread=spread,
                seed=3,
                value=spread == "cancel",
            )
            check_call(name, shape, Way(isa, chunk_keys=128, partials=True, by_task=True))


@pytest.mark.parametrize("name", shipped())
def test_the_shapes_in_use(name):
    """Decode of one row over 600 selected keys of 4096, 16 heads, paged; the last row of two."""
    k = kernel(name)
    for isa in k.isas():
        shape = Shape(
            lens_q=(2,),
            lens_kv=(4096,),
            group=enough_heads(name, isa, 16),
            layout_kv=PA_BSND,
            block_size=128,
            lists="blocks",
            list_length=600,
            sparse_mode=3,
            seed=11,
        )
        case = make_case(k, shape)
        ids = np.random.default_rng(5).permutation(4096)[: 2 * 600].astype(np.int32)
        case = case.changed(sparse_indices=ids.reshape(1, 2, 1, 600))
        refill(case)
        check(case.args, run(k, case, isa), isa, strict=True)


@pytest.mark.parametrize("isa", ISAS_HERE[1:])
def test_deepseek_decode(isa):
    """128 heads over one cache, 2048 of 8192 keys: the shape that the operator is for."""
    k = kernel("hl_sparse_flash_attention_bf16_d512_rope64")
    shape = Shape(lens_q=(1,), lens_kv=(8192,), group=128, layout_kv=PA_BSND, block_size=128)
    case = make_case(k, shape)
    ids = np.random.default_rng(6).permutation(8192)[:2048].astype(np.int32)
    case = case.changed(sparse_indices=ids.reshape(1, 1, 1, 2048))
    check(case.args, run(k, case, isa), isa, strict=True)


@by_way(*sorted(SPECS), few=8)
def test_error_rule_on_realistic_scores(name, isa, group):
    """Enough rows that the plain implementation's largest error is not luck: no slack is needed."""
    k = kernel(name)
    for sharpness in (1.0, 4.0):  # the largest P of a row: some hundredths, and most of it
        shape = Shape(lens_q=(12,), lens_kv=(400,), group=group, sparse_mode=3, value=True, seed=7)
        case = make_case(k, shape)
        case = case.changed(scale_value=abs(case.args.scale_value) * sharpness)
        check(case.args, run(k, case, isa, chunk_keys=128), isa, strict=True)


# ---- rules that are exact -----------------------------------------------------------------------


@by_way(*SMALL)
def test_rows_that_see_nothing_are_zero_in_every_bit(name, isa, group):
    k = kernel(name)
    for layout, lists, sinks in (
        (BSND, "blocks", "none"),
        (TND, "blocks", "plain"),
        (PA_BSND, "slots", "plain"),
        (PA_BSND, "slots", "none"),
    ):
        query = BSND if layout == PA_BSND else layout
        shape = Shape(
            lens_q=(2, 1),
            lens_kv=(9, 0),
            layout_q=query,
            layout_kv=layout,
            pad_q=2,
            group=group,
            lists=lists,
            list_length=4,
            sinks=sinks,
            seed=1,
        )
        case = make_case(k, shape)
        case = case.changed(sparse_indices=np.full_like(case.args.sparse_indices, -1))
        got = run(k, case, isa)
        want = sparse_flash_attention(case.args)
        assert not got["attention_out"].view(np.uint8).any()
        check_stats(case.args, got, want, isa)
        assert same_bits(got["softmax_sum"], want.sum.astype(np.float32))
        if sinks == "none":
            assert not got["softmax_max"].view(np.uint8).any()


@by_pair("f32_small", also=("bf16_small", "f16_small"))
def test_causal_rows_before_the_first_key_are_empty(name, isa):
    for sinks in ("none", "plain"):
        for way in (Way(isa), Way(isa, chunk_keys=128, partials=True, by_task=True)):
            for group in groups_of(name, isa, 2):
                shape = Shape(
                    lens_q=(7,), lens_kv=(3,), group=group, sparse_mode=3, sinks=sinks, seed=2
                )
                check_call(name, shape, way)


@by_way("f32_small", "bf16_small", few=1)
def test_scale_zero_is_the_mean_and_negative_turns_the_order(name, isa, group):
    k = kernel(name)
    case = make_case(k, Shape(lens_kv=(33,), group=group, value=True, seed=4))
    got = run(k, case.changed(scale_value=0.0), isa)
    mean = case.args.value.astype(np.float64).mean(axis=1)[0, 0]
    assert np.allclose(got["attention_out"].astype(np.float64), mean, atol=2e-2)
    assert not got["softmax_max"].any() and (got["softmax_sum"] == 33).all()
    minus = case.changed(scale_value=-case.args.scale_value)
    turned = case.changed(query=-case.args.query, query_rope=-case.args.query_rope)
    assert same_bits(run(k, minus, isa)["attention_out"], run(k, turned, isa)["attention_out"])


@by_way(*SMALL)
@pytest.mark.parametrize("lists", ["none", "blocks"])
def test_nan_reaches_its_own_row_and_no_other(name, isa, group, lists):
    """One NaN (or infinity) in each kind of element in turn; what other rows see does not change
    by a bit, even where they share the tile, the block or the page. Up to 16 heads on tiles take
    the channels of V in pairs: there it reaches the other of its pair, see
    tests/test_amx.py::test_a_value_that_is_not_finite_stays_in_its_channel."""
    k = kernel(name)
    shape = Shape(
        lens_q=(4, 3),
        lens_kv=(40, 50),
        heads_kv=2,
        group=group,
        layout_kv=PA_BSND,
        block_size=16,
        lists=lists,
        list_length=25,
        sparse_mode=3,
        value=True,
        seed=9,
        sinks="plain",
    )
    clean = make_case(k, shape)
    before = run(k, clean, isa)
    seen = {(r.row, r.n2): set(r.kv_rows.tolist()) for r in rows(clean.args)}
    heads = clean.args.heads_q
    busy = max(range(7), key=lambda row: len(seen.get((row, 1), ())))
    assert seen[busy, 1]
    for name_of, poison in (
        ("query", np.nan),
        ("query_rope", np.nan),
        ("key", np.nan),
        ("key_rope", np.nan),
        ("value", np.nan),
        ("key", np.inf),
        ("value", -np.inf),
        ("sinks", np.nan),
    ):
        tensor = getattr(clean.args, name_of)
        if tensor is None:
            continue
        bad = tensor.copy()
        if name_of == "sinks":
            bad[group] = poison
            hit = {(row, group) for row, _ in seen}
        elif name_of.startswith("query"):
            flat(bad)[busy, group + 1, -1] = poison
            hit = {(busy, group + 1)}
        else:
            victim = min(seen[busy, 1])
            flat(bad)[victim, 1, 0] = poison
            hit = {
                (row, group + g)
                for (row, n2), rows_seen in seen.items()
                for g in range(group)
                if n2 == 1 and victim in rows_seen
            }
        assert hit
        changed = clean.changed(**{name_of: bad})
        after = run(k, changed, isa)
        if np.isinf(poison) and on_tiles(clean.args, isa) and clean.dtype == np.float16:
            # two parts of infinity, infinity and what is left of it, are a NaN
            changed = clean.changed(**{name_of: np.where(np.isinf(bad), np.nan, bad)})
        want = sparse_flash_attention(changed.args).out.reshape(-1, heads, k.dv)
        out0 = before["attention_out"].reshape(-1, heads, k.dv)
        out1 = after["attention_out"].reshape(-1, heads, k.dv)
        for row in range(len(out0)):
            for h in range(heads):
                if (row, h) in hit:
                    got = out1[row, h].astype(np.float64)
                    finite = np.isfinite(want[row, h])
                    if name_of == "value" and ISAS[isa].tiles and group <= 16:
                        finite = np.repeat(finite[::2] & finite[1::2], 2)
                    assert (np.isfinite(got) == finite).all()
                    if np.isnan(poison) and name_of != "value":
                        assert np.isnan(got).all()
                else:
                    assert same_bits(out0[row, h], out1[row, h]), (name_of, row, h)


@by_pair("f32_small", also=("bf16_small", "f16_small"))
def test_nan_in_the_last_key_of_a_chunk_is_not_lost(name, isa):
    """A maximum that drops NaN, or an exponential that clamps it, would lose it at any position."""
    k = kernel(name)
    for group in groups_of(name, isa, 3):
        case = make_case(k, Shape(lens_kv=(300,), group=group, value=True, seed=1))
        for at in (0, 1, 31, 32, 63, 64, 127, 128, 129, 255, 256, 298, 299):
            key = case.args.key.copy()
            key[0, at, 0, 3] = np.nan
            got = run(k, case.changed(key=key), isa, chunk_keys=128)
            for output in ("attention_out", "softmax_max", "softmax_sum", "softmax_lse"):
                assert np.isnan(got[output]).all(), (output, at)


@by_way("f16_small", "bf16_small", few=2)
def test_finite_numbers_of_any_size_give_finite_results(name, isa, group):
    """The largest float16 and bfloat16 numbers: scores far beyond both types' range."""
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(1,), lens_kv=(40,), group=group, seed=8))
    big = 60000.0 if name == "f16_small" else 1e16
    for tensor in (case.args.query, case.args.query_rope, case.args.key, case.args.key_rope):
        tensor[...] = np.sign(tensor.astype(np.float32)) * big
    got = run(k, case, isa)
    for name_of, array in got.items():
        assert np.isfinite(array.astype(np.float64)).all(), name_of


@by_way("bf16_small", few=2)
def test_outputs_that_are_not_wanted_change_nothing(name, isa, group):
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(3,), lens_kv=(50,), group=group, sparse_mode=3, seed=6))
    whole = run(k, case, isa)
    stats = ("softmax_max", "softmax_sum", "softmax_lse")
    for left_out in ((stats[0],), (stats[1],), (stats[2],), stats[:2], stats[1:], stats):
        outputs = case.outputs()
        given = {n: None if n in left_out else array for n, array in outputs.items()}
        fields = {**case.inputs(), **case.sizes(), **given, "isa": k.isas()[isa]}
        assert k.run(**fields).ok
        for output in given:
            if output not in left_out:
                assert same_bits(outputs[output], whole[output])


@by_way(*SMALL)
def test_float_output_is_the_output_before_rounding(name, isa, group):
    k = kernel(name)
    case = make_case(k, Shape(lens_q=(2,), lens_kv=(50,), group=group, sparse_mode=3, seed=6))
    rounded = run(k, case, isa)["attention_out"]
    case.extra["out_f32"] = 1
    exact = run(k, case, isa)["attention_out"]
    assert exact.dtype == np.float32 and same_bits(exact.astype(case.dtype), rounded)


def test_best_instruction_set_is_the_default():
    k = kernel("bf16_small")
    case = make_case(k, Shape(lens_q=(2,), lens_kv=(99,), group=5, seed=2))
    best = max(k.isas(), key=k.isas().get)
    assert same_bits(run(k, case)["attention_out"], run(k, case, best)["attention_out"])
