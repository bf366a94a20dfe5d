"""incre_flash_attention on calls that nobody thought of, and what has to hold between two calls
whatever the numbers are."""

import dataclasses

import numpy as np
import oracle_decode as oracle
import pytest
from helpers import assert_same
from helpers_decode import (
    PAIRS,
    SMALL,
    SPECS,
    WAYS,
    Case,
    Shape,
    by_pair,
    check_guarded,
    fields_of,
    has,
    in_floats,
    kernel,
    make_case,
    relaid,
    run,
    shapes,
    with_feature,
    with_gaps,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, PA_BSND
from oracle_decode import CHANNEL, PA_BNSD, PAGED, TENSOR, TOKEN, by_row

ALL = tuple(SPECS)
UNITS = {"float32": 2.0**-19, "float16": 2.0**-9, "bfloat16": 2.0**-6}
PLAIN = Shape(lens=(150, 45), heads_kv=2, group=3, seed=12)


def with_shape(**changes: object) -> Shape:
    return dataclasses.replace(PLAIN, **changes)


def assert_close(x: dict, y: dict, dtype: np.dtype) -> None:
    """Equal but for the order of rounding: outputs to units in the last place of the largest."""
    for name in x:
        a, b = x[name].astype(np.float64), y[name].astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        largest = np.where(np.isfinite(b), abs(b), 0.0).max(initial=1e-30)
        limit = (UNITS[dtype.name] if name == "attention_out" else 2e-5) * largest
        with np.errstate(invalid="ignore"):
            assert (same | (abs(a - b) <= limit)).all(), name


@by_pair(*ALL)
@settings(max_examples=12)
@given(data=st.data())
def test_any_call(name, isa, data):
    shape = data.draw(shapes(name))
    check_guarded(name, shape, dataclasses.replace(data.draw(WAYS), isa=isa))


@by_pair(*SMALL)
@settings(max_examples=20)
@given(data=st.data())
def test_any_call_without_codes(name, isa, data):
    shape = data.draw(shapes(name, max_keys=40))
    check_guarded(name, shape, dataclasses.replace(data.draw(WAYS), isa=isa))


@by_pair(*ALL)
@settings(max_examples=4)
@given(data=st.data())
def test_strided_is_packed(name, isa, data):
    k = kernel(name)
    case = make_case(k, data.draw(shapes(name)))
    rng = np.random.default_rng(case.shape.seed)
    fields, outputs = fields_of(k, case, isa), case.outputs(stats=k.stats)
    for tensor in ("query", "key", "value"):
        if tensor in fields:
            layout = fields["layout_query" if tensor == "query" else "layout_kv"]
            fields[tensor], fields[f"{tensor}_stride"] = with_gaps(rng, fields[tensor], layout)
    assert k.run(**fields, **outputs).ok
    assert_same(outputs, run(k, case, isa))


@by_pair(*ALL)
@pytest.mark.parametrize("mode", [CHANNEL, TOKEN])
def test_layouts_and_pages_only_change_addresses(name, isa, mode):
    """The same sequences in every layout, in pages of several sizes, as slots and as pointers."""
    k = kernel(name)
    coded = any(map(oracle.is_codes, k.formats))
    if mode == TOKEN and not coded:
        mode = TENSOR  # has no numbers to say it of: only another seed
    shape = with_shape(
        seq_q=3, room=2, pse="each", mask="each", mask_rows=True, antiquant=mode, seed=mode
    )
    base = in_floats(make_case(k, shape))
    want = run(k, base, isa, chunk_keys=128)
    ways = [{}]
    if has(name, "pages"):
        ways.append({"pages": True})
    if has(name, "slots"):
        ways.append({"slots": True})
    for layout_q, layout_kv in PAIRS:
        paged = layout_kv in PAGED
        for size in (1, 3, 16, 128) if paged else (16,):
            for how in ways if paged else [{}]:
                got = run(k, relaid(base, layout_q, layout_kv, size, **how), isa, chunk_keys=128)
                got["attention_out"] = by_row(got["attention_out"], layout_q)
                assert_same(got, want, (layout_q, layout_kv, size, how))


@by_pair(*ALL)
def test_left_padding_only_changes_addresses(name, isa):
    """The same keys at the end of the cache, with bias and mask moved along."""
    k = kernel(name)
    shape = with_shape(seq_q=2, pse="each", mask="each", antiquant=TOKEN, seed=4)
    base = in_floats(make_case(k, shape))
    a, pad, room = base.args, 3, 8
    lens = [oracle.span(a, b)[1] for b in range(a.batch)]
    seq = a.seq_kv + room
    changes: dict = {"kv_padding_size": np.array([pad], np.int32)}

    def moved(old: np.ndarray, axis: int, b: int, n: int, new: np.ndarray) -> None:
        """The first n of an axis of batch b, to where its keys begin now."""
        begin = seq - pad - n
        at = [b] + [slice(None)] * (new.ndim - 1)
        at[axis] = slice(begin, begin + n)
        was = [b] + [slice(None)] * (new.ndim - 1)
        was[axis] = slice(0, n)
        new[tuple(at)] = old[tuple(was)]

    for name_of, axis in (("key", 1), ("value", 1), ("pse_shift", 3), ("atten_mask", 2)):
        old = getattr(a, name_of)
        shape = list(old.shape)
        shape[axis] = seq
        new = np.full(shape, 0xFF, np.uint8) if old.dtype == np.uint8 else None
        if new is None:
            new = np.zeros(shape, old.dtype)
        for b, n in enumerate(lens):
            moved(old, axis, b, n, new)
        changes[name_of] = new
    if a.antiquant_mode == TOKEN:
        for name_of in ("antiquant_scale", "antiquant_offset"):
            old = getattr(a, name_of).reshape(-1, a.batch, a.seq_kv)
            new = np.full((len(old), a.batch, seq), np.nan, np.float32)
            for b, n in enumerate(lens):
                new[:, b, seq - pad - n : seq - pad] = old[:, b, :n]
            changes[name_of] = new.reshape(-1)
    got = run(k, base.changed(**changes), isa, chunk_keys=128)
    assert_same(got, run(k, base, isa, chunk_keys=128))


@by_pair(*SMALL)
def test_heads_and_batches_may_share_memory(name, isa):
    """Inputs that overlap themselves: head 1 starts one row behind head 0, batch 1 two rows."""
    k = kernel(name)
    case = make_case(k, with_shape(lens=(9, 9), lengths="none"))
    rng = np.random.default_rng(0)
    changes, fields = {}, {}
    for tensor, width in (("key", k.dk), ("value", k.dv)):
        memory = rng.standard_normal((12, width)).astype(case.dtype)
        heads = [[memory[b * 2 + h : b * 2 + h + 9] for h in range(2)] for b in range(2)]
        changes[tensor] = np.stack([np.stack(one, axis=1) for one in heads])
        fields |= {tensor: memory, f"{tensor}_stride": (2 * width, width, width)}
    assert_same(run(k, case, isa, **fields), run(k, case.changed(**changes), isa))


@by_pair(*ALL)
def test_gqa_is_repeated_heads(name, isa):
    k = kernel(name)
    for rows in (1, 4):
        gqa = make_case(k, with_shape(seq_q=rows, antiquant=TENSOR))
        repeated = {n: np.repeat(getattr(gqa.args, n), 3, axis=-2) for n in ("key", "value")}
        assert_close(run(k, gqa, isa), run(k, gqa.changed(**repeated), isa), gqa.dtype)


@by_pair(*ALL)
def test_a_masked_key_is_no_key(name, isa):
    """Keys that a mask leaves out, and the same call without them."""
    k = kernel(name)
    case = make_case(k, with_shape(lens=(140,), mask="one", antiquant=TENSOR, seed=3))
    kept = np.flatnonzero(case.args.atten_mask[0, 0] == 0)
    fewer = case.changed(
        key=case.args.key[:, kept].copy(),
        value=case.args.value[:, kept].copy(),
        atten_mask=None,
        actual_seq_lengths=None,
        lengths=0,
    )
    assert_close(run(k, case, isa), run(k, fewer, isa), case.dtype)


@by_pair(*with_feature("window"))
def test_a_window_is_a_mask(name, isa):
    k = kernel(name)
    case = make_case(k, with_shape(lens=(140,), seq_q=3, seed=3))
    for window in (1, 30, 139, 1000):
        j, i = np.arange(140), np.arange(3)[:, None]
        mask = (j <= 140 - 3 + i - window).astype(np.uint8)[None]
        got = [
            run(k, case.changed(**change), isa, chunk_keys=128)
            for change in ({"window": window}, {"atten_mask": mask})
        ]
        assert_close(*got, case.dtype)


@by_pair(*with_feature("alibi"))
def test_slopes_are_a_bias(name, isa):
    """Powers of two, so that the bias is exact in every type."""
    k = kernel(name)
    case = make_case(k, with_shape(lens=(100, 100), seq_q=2, seed=3))
    slopes = np.array([1, 0.5, 0.25, 0.125, 2, 0], np.float32)
    distance = np.arange(100) - (100 - 2 + np.arange(2)[:, None])
    pse = (slopes[:, None, None] * distance)[None].astype(case.dtype)
    got = [
        run(k, case.changed(**change), isa)
        for change in ({"alibi_slopes": slopes}, {"pse_shift": pse})
    ]
    assert_close(*got, case.dtype)


@by_pair(*SMALL)
def test_a_bias_of_nothing_changes_nothing(name, isa):
    k = kernel(name)
    case = make_case(k, with_shape(seq_q=2))
    nothing = case.changed(
        pse_shift=np.zeros((1, 6, 2, 150), case.dtype), atten_mask=np.zeros((1, 1, 150), np.uint8)
    )
    assert_same(run(k, nothing, isa), run(k, case, isa))


@by_pair(*with_feature("sinks"))
def test_a_sink_is_a_key_without_value(name, isa):
    k = kernel(name)
    case = make_case(k, with_shape(lens=(45, 45), lengths="none"))
    a = case.args
    query = a.query.copy()
    query[..., -1] = 1.0
    key, value = (np.concatenate([x, np.zeros_like(x[:, :1])], axis=1) for x in (a.key, a.value))
    key[:, :45, :, -1], key[:, 45, :, -1] = 0.0, 3.0
    longer = case.changed(query=query, key=key, value=value, scale_value=0.5)
    sinks = np.full(a.heads_q, 1.5, np.float32)
    with_sink = case.changed(
        query=query,
        key=key[:, :45].copy(),
        value=value[:, :45].copy(),
        scale_value=0.5,
        sinks=sinks,
    )
    assert_close(run(k, with_sink, isa), run(k, longer, isa), case.dtype)


@by_pair(*ALL)
def test_scale_moves_between_query_and_scale_value(name, isa):
    """Powers of two change no digit."""
    k = kernel(name)
    case = make_case(k, with_shape(seq_q=2))
    case = case.changed(scale_value=0.25)
    double = case.changed(query=case.args.query * 2, scale_value=0.125)
    assert_same(run(k, double, isa), run(k, case, isa))


@by_pair("bf16_i8", "f16_i8xe4m3", "f16_e4m3xi4")
def test_one_number_for_all_is_one_for_each(name, isa):
    """A scale and an offset per tensor, and the same ones per channel and per token."""
    k = kernel(name)
    case = make_case(k, with_shape(antiquant=TENSOR, seed=2))
    want = run(k, case, isa)
    for mode in (CHANNEL, TOKEN):
        other = case.changed(antiquant_mode=mode)
        changes = {}
        for numbers in ("antiquant_scale", "antiquant_offset"):
            sides = [side for side in (0, 1) if oracle.is_codes(k.formats[side])]
            each = [oracle.per_tensor(other.args, side) for side in sides]
            changes[numbers] = np.repeat(getattr(case.args, numbers), each)
        assert_close(run(k, other.changed(**changes), isa), want, case.dtype)


def test_relaid_calls_are_other_calls():
    """The control for what is said of layouts: the arrays do differ, and unread bytes are 0xff."""
    base = make_case(kernel("f32_all"), with_shape(seq_q=2))
    for layout_q, layout_kv in PAIRS[1:]:
        other = relaid(base, layout_q, layout_kv)
        assert isinstance(other, Case) and other.args.layout_kv == layout_kv
        if layout_kv in (PA_BSND, PA_BNSD):
            assert np.isnan(other.args.key).any()
    assert relaid(base, BSND, BSND).args.key.tobytes() == base.args.key.tobytes()
