"""The hazard table (docs/hazards.md), cases 28 to 44: numbers that are not numbers, too large, too
small, or worth nothing, for every shipped header and instruction set."""

import ctypes
import functools
import os
from collections.abc import Iterator
from typing import Any

import helpers_every as every
import helpers_hazards as hz
import ml_dtypes
import numpy as np
import pytest
from helpers_hazards import (
    APPENDS,
    DECODES,
    FORWARD,
    GRADS,
    HEADERS,
    RECORDS,
    SPARSE,
    TRAINS,
    appending,
    args_of,
    changed,
    differs,
    feature,
    filled,
    made,
    refused,
    same,
    with_feature,
)
from oracle import TND
from test_memory import DEFAULT, FLOAT_ENVIRONMENT, FLUSH, INVALID_OR_ZERO_DIVIDE

from gen import bind
from gen.isa import ISAS

CODES = tuple(n for n in DECODES if "_i8_" in n)
PLAIN = tuple(n for n in HEADERS if n not in RECORDS + CODES)  # whose caches are numbers
BIASED = tuple(n for n in FORWARD if n not in SPARSE)  # with numbers that are added to scores


def every_header(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


def numbers(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float64)


def by_rows(call: every.Call, got: dict[str, np.ndarray]) -> np.ndarray:
    """attention_out (dquery) of a BSND call of one batch: [rows][heads][channels]."""
    return got["dquery" if call.grads else "attention_out"][0]


def no_rope(a: Any) -> dict[str, np.ndarray]:
    """Rotary channels, if they lie apart, of zeros."""
    names = [n for n in ("query_rope", "key_rope") if getattr(a, n, None) is not None]
    return {n: np.zeros_like(getattr(a, n)) for n in names}


def value_row(call: every.Call, j: int, dtype: np.dtype) -> np.ndarray:
    """Channels of value row j of a call of one batch and kv head."""
    a, k = args_of(call), call.kernel
    value = a.key if getattr(a, "value", None) is None else a.value
    return value.reshape(-1, value.shape[-1])[j, : k.dv].astype(dtype)


def apart(name: str, keys: int, rows: int = 1, heads: int = 2, **more: Any) -> every.Call:
    """A dense call, numbers everywhere; values apart from keys where the header can."""
    if name in SPARSE and name not in RECORDS:
        more = {"value": True, **more}
    return filled(made(name, (keys,), rows=rows, heads=heads, **more))


def with_number(call: every.Call, tensor: str, at: tuple[int, ...], x: float) -> every.Call:
    """One number of a tensor replaced; `at` are its first axes, and the channel."""
    other = getattr(args_of(call), tensor).copy()
    other[at] = x
    return changed(call, **{tensor: other})


# ---- 28 to 31: what is not read, what nobody sees -----------------------------------------------


@every_header(*HEADERS)
def test_hazard_28_bytes_that_no_row_sees(name):
    """Rows behind lengths, unused pages, slack of pages: NaN (0xff) or numbers, the same bits."""
    tried = 0
    for call, other in hidden(name):
        if hz.images(call.inputs()) == hz.images(other.inputs()):
            continue
        tried += 1
        for isa in every.isas_in(name):
            same(other.run(isa), call.run(isa), isa)
    assert tried > 0, "nothing was hidden"


def hidden(name: str) -> Iterator[tuple[every.Call, every.Call]]:
    """Calls, and the same with other bytes in what no row sees."""
    for call in (*every.calls(name, 28, 3), hz.full(name)[0]):
        yield call, filled(call)
    if name in TRAINS:
        call = made(name, (20, 30), rows=9, layout=TND, mode=2, mask="formula", pad_q=3, pad_kv=5)
        yield call, filled(call)
    if name in CODES:  # every byte is a number there: rows behind the lengths
        call = made(name, (20, 9), rows=2, room=7)
        key, value = args_of(call).key.copy(), args_of(call).value.copy()
        for x in (key, value):
            x[0, 20:], x[1, 9:] = 85, -128
        yield call, changed(call, key=key, value=value)


def causal(name: str, keys: int, rows: int, **more: Any) -> every.Call:
    if name in DECODES:
        return made(name, (keys,), rows=rows, **more)
    mode = {"mode": 3, "mask": "formula"} if name in TRAINS else {"sparse_mode": 3}
    return made(name, (keys,), rows=rows, **mode, **more)


@every_header(*PLAIN)
def test_hazard_29_nan_in_keys_that_a_row_does_not_reach(name):
    """Inside the length, behind the causal end: rows in front of it keep their bits, the last is
    NaN."""
    call = filled(causal(name, 40, 4))
    for isa in every.isas_in(name):
        want = by_rows(call, call.run(isa))
        for tensor in ("key", "value"):
            if getattr(args_of(call), tensor, None) is None:
                continue
            got = by_rows(call, with_number(call, tensor, (0, 39, 0, 3), np.nan).run(isa))
            assert got[:3].tobytes() == want[:3].tobytes(), (isa, tensor)
            assert np.isnan(numbers(got[3])).any(), (isa, tensor)


@every_header(*HEADERS)
def test_hazard_30_nothing_is_read_behind_the_channels(name):
    """One key, one row: the last channel is the last byte before a forbidden page. Every width from
    1 on: tests/test_words.py (tails)."""
    call = made(name, (1,), rows=1, heads=1)
    for isa in every.isas_in(name):
        same(call.guarded(isa, "right"), call.run(isa), isa)


def nothing_seen(name: str) -> list[every.Call]:
    """Calls whose rows see no key, in every way there is to say so."""
    if name in SPARSE:
        dense = made(name, (0,), rows=2)
        lists = made(name, (9,), rows=2, lists="blocks", list_length=3)
        none = np.full_like(args_of(lists).sparse_indices, -1)
        return [dense, changed(lists, sparse_indices=none)]
    if name in DECODES:
        masked = made(name, (9,), rows=2, mask="each", mask_rows=True)
        a = args_of(masked)
        biased = made(name, (9,), rows=2, pse="each")
        return [
            made(name, (0,), rows=2, room=5),
            filled(changed(masked, atten_mask=np.ones_like(a.atten_mask))),
            filled(changed(biased, pse_shift=np.full_like(args_of(biased).pse_shift, -np.inf))),
        ]
    masked = made(name, (9,), rows=9, mode=1, mask="given")
    biased = made(name, (9,), rows=9, pse="full")
    calls = [
        made(name, (9,), rows=9, mode=4, mask="formula", band=(-20, -20)),
        made(name, (0,), rows=3),
        filled(changed(masked, atten_mask=np.ones_like(args_of(masked).atten_mask))),
    ]
    if name not in GRADS:
        calls.append(filled(changed(biased, pse=np.full_like(args_of(biased).pse, -np.inf))))
    return calls


@every_header(*HEADERS)
def test_hazard_31_rows_that_see_no_key(name):
    """0, LSE -infinity, nothing is NaN: by length, list, mask in bytes, mode, bias of -infinity."""
    for n, call in enumerate(nothing_seen(name)):
        for isa in every.isas_in(name):
            got = call.run(isa)
            if call.grads:
                assert all(not got[x].any() for x in ("dquery", "dkey", "dvalue")), (n, isa)
                continue
            assert not got["attention_out"].view(np.uint8).any(), (n, isa)
            if "softmax_lse" in got:
                assert np.isneginf(got["softmax_lse"]).all(), (n, isa)
    seen = made(name, (9,), rows=2)
    assert by_rows(seen, seen.run()).any()


# ---- 32 to 35: not numbers ----------------------------------------------------------------------


def bias_name(name: str) -> str:
    return "pse_shift" if name in DECODES else "pse"


def biased(name: str, at: int | None, x: float) -> every.Call:
    """Row 1 of 3 has bias x for key `at`, or for all."""
    form = {"pse": "each"} if name in DECODES else {"pse": "full"}
    call = filled(made(name, (20,), rows=3, heads=1, **form))
    if call.grads:
        return call
    pse = getattr(args_of(call), bias_name(name))
    pse = np.where(np.isnan(numbers(pse)), 0, numbers(pse)).astype(pse.dtype)
    pse[:, :, 1, slice(None) if at is None else at] = x
    return changed(call, **{bias_name(name): pse})


@every_header(*BIASED)
def test_hazard_32_bias_that_is_no_number(name):
    """-infinity leaves a key out. Finite numbers are arithmetic, in units of log2: pse_shift below
    -2.36e38 is -infinity there, and a row of such numbers is 0. NaN and +infinity make the row NaN.
    No other row changes by a bit."""
    plain = biased(name, 7, 0.0)
    for isa in every.isas_in(name):
        want = by_rows(plain, plain.run(isa))
        k = plain.kernel
        half = k.dtype == np.float16
        lowest = -65504.0 if half else -3.38e38
        for x, none in ((-np.inf, True), (lowest, name in DECODES and not half)):
            one, every_key = biased(name, 7, x), biased(name, None, x)
            got = one.run(isa)
            one.check(got, isa)
            out = by_rows(one, got)
            assert np.isfinite(numbers(out)).all() and differs({"x": out}, {"x": want}), (isa, x)
            assert out[::2].tobytes() == want[::2].tobytes()
            out = by_rows(every_key, every_key.run(isa))
            assert np.isfinite(numbers(out)).all(), (isa, x)
            assert out[1].any() != none, (isa, x)
            assert out[::2].tobytes() == want[::2].tobytes()
        for x in (np.nan, np.inf):
            out = by_rows(plain, biased(name, 7, x).run(isa))
            assert np.isnan(numbers(out[1])).all(), (isa, x)
            assert out[::2].tobytes() == want[::2].tobytes(), (isa, x)


@every_header(*sorted(set(FORWARD) & set(PLAIN)))
def test_hazard_33_infinity_in_queries_and_keys(name):
    """A score of +infinity: its row is not finite (infinity - infinity), the LSE +infinity or NaN;
    other rows keep every bit. A score of -infinity: as if the key were not there."""
    call = apart(name, 20, rows=3, heads=1)
    query = args_of(call).query.copy()
    query[..., 2] = 1
    call = changed(call, query=query, scale_value=0.1)
    for isa in every.isas_in(name):
        want = by_rows(call, call.run(isa))
        for x in (np.inf, -np.inf):  # times numbers of both signs
            out = by_rows(call, with_number(call, "query", (0, 1, 0, 2), x).run(isa))
            assert not np.isfinite(numbers(out[1])).any(), (isa, x)
            assert out[::2].tobytes() == want[::2].tobytes(), (isa, x)
        met = with_number(call, "key", (0, 5, 0, 2), np.inf).run(isa)
        assert not np.isfinite(numbers(by_rows(call, met))).any(), isa
        if "softmax_lse" in met:
            assert not (np.isneginf(met["softmax_lse"]) | np.isfinite(met["softmax_lse"])).any()
        left = numbers(by_rows(call, with_number(call, "key", (0, 5, 0, 2), -np.inf).run(isa)))
        in_two_parts = ISAS[isa].tiles and call.kernel.dtype == np.float16  # of which one is NaN
        assert np.isfinite(left).all() or in_two_parts, isa


@every_header(*HEADERS)
def test_hazard_34_nan_in_what_a_row_attends_to(name):
    """In an element of query, key or value (of records: of rotary channels) in turn: every row that
    meets it is NaN, no other changes by a bit."""
    call = apart(name, 33, rows=2, heads=2)
    a = args_of(call)
    last = a.query.shape[-1] - 1
    spots: list[tuple[str, tuple[int, ...]]] = [("query", (0, 1, 0, c)) for c in (0, last)]
    for tensor in ("key", "value", "query_rope", "key_rope"):
        x = getattr(a, tensor, None)
        if x is None or x.dtype in (np.int8, np.uint8):
            continue
        at = (0, 1, 0) if tensor.startswith("query") else (0, 30, 0)
        spots += [(tensor, (*at, c)) for c in (0, x.shape[-1] - 1)]
    for isa in every.isas_in(name):
        want = by_rows(call, call.run(isa))
        for tensor, at in spots:
            hurt = with_number(call, tensor, at, np.nan)
            got = by_rows(call, hurt.run(isa))
            bad = np.isnan(numbers(got)).any(axis=-1)
            if tensor.startswith("query"):
                assert bad.tolist() == [[False, False], [True, False]], (isa, tensor, at)
                assert got[0].tobytes() == want[0].tobytes()
                assert got[1, 1].tobytes() == want[1, 1].tobytes()
            else:
                assert bad.all(), (isa, tensor, at)
            if tensor == "key":
                assert np.isnan(numbers(got)).all() or call.grads, (isa, at)


@every_header(*sorted(set(FORWARD) - set(RECORDS)))
def test_hazard_35_values_that_are_no_numbers_with_a_weight_of_zero(name):
    """A weight that has become 0 times infinity or NaN is NaN: not finite, and never a number that
    means nothing."""
    call = apart(name, 20, rows=1, heads=2)
    a = args_of(call)
    if a.value.dtype == np.int8:
        numbers_of = np.full_like(a.antiquant_scale, np.inf)  # V's scales take the place
        half = a.antiquant_scale.size // 2
        numbers_of.reshape(-1)[:half] = a.antiquant_scale.reshape(-1)[:half]
        for isa in every.isas_in(name):
            got = changed(call, antiquant_scale=numbers_of).run(isa)
            assert not np.isfinite(numbers(got["attention_out"])).any()
        return
    key, query = np.zeros_like(a.key), np.ones_like(a.query)
    key[0, 3] = 1  # takes all the weight: all other scores are 1000 lower
    zeros = no_rope(a)
    sharp = changed(call, key=key, query=query, scale_value=1000.0, **zeros)
    for isa in every.isas_in(name):
        clean = sharp.run(isa)["attention_out"]
        assert np.isfinite(numbers(clean)).all()
        for x in (np.inf, -np.inf, np.nan):
            out = numbers(with_number(sharp, "value", (0, 11, 0, 4), x).run(isa)["attention_out"])
            assert not np.isfinite(out[..., 4]).any(), (isa, x)
            rest = np.delete(out, [4, 5] if ISAS[isa].tiles else [4], axis=-1)
            assert np.isfinite(rest).all(), (isa, x)


# ---- 36 to 39: too large, too small -------------------------------------------------------------


@every_header(*sorted(set(FORWARD) - set(RECORDS)))
def test_hazard_36_finite_numbers_of_any_size_are_finite_results(name):
    """float16: the largest there are. bfloat16 and float32: as long as products of queries and keys
    are numbers, and values times keys (weights are normalised last)."""
    call = apart(name, 12, rows=2, heads=2)
    a = args_of(call)
    half = a.query.dtype == np.float16
    large, value = (65504.0, 65504.0) if half else (1e17, 2e37)
    signs = np.random.default_rng(36)
    changes: dict[str, Any] = {}
    for tensor in ("query", "query_rope", "key", "key_rope", "value"):
        x = getattr(a, tensor, None)
        if x is None or x.dtype == np.int8:
            continue
        size = value if tensor == "value" else large
        changes[tensor] = (size * signs.choice([-1.0, 1.0], x.shape)).astype(x.dtype)
    big = changed(call, scale_value=1.0, **changes)
    for isa in every.isas_in(name):
        for output, x in big.run(isa).items():
            assert np.isfinite(numbers(x)).all(), (isa, output)
    if not half and a.key.dtype != np.int8:  # the control: further on float32 ends
        over = changed(big, key=(1e30 * np.ones(a.key.shape)).astype(a.key.dtype))
        assert not all(np.isfinite(numbers(x)).all() for x in over.run().values())


@every_header(*sorted(set(FORWARD) & set(PLAIN)))
def test_hazard_37_weights_below_the_smallest_normal_number_are_zero(name):
    """exp(x) = 0 below ln(FLT_MIN) = -87.3: no subnormal weight reaches the product with V, so that
    no data make it slow. (The function over its whole range: tests/test_exp2.py. Codes take the
    same.)"""
    call = apart(name, 8, rows=1, heads=2)
    a = args_of(call)
    query, value = np.zeros_like(a.query), np.zeros_like(a.value)
    query[..., 0] = 1
    value[0, 5] = 2.0**15 if a.query.dtype == np.float16 else 2.0**110
    for below, seen in ((-80.0, True), (-90.0, False), (-96.0, False), (-103.0, False)):
        key = np.zeros_like(a.key)
        key[0, 5, :, 0] = below
        zeros = no_rope(a)
        low = changed(call, key=key, query=query, value=value, scale_value=1.0, **zeros)
        for isa in every.isas_in(name):
            out = np.zeros((*a.query.shape[:-1], call.kernel.dv), np.float32)
            low.run(isa, out_f32=1, attention_out=out)
            assert out.any() == seen, (isa, below)


def flushing() -> tuple[Any, int, int, int]:
    """Sets the control register; its default, the bits that flush, those of traps' flags."""
    lib = ctypes.CDLL(str(bind.compile_c({"control.c": FLOAT_ENVIRONMENT})))
    return lib, DEFAULT, FLUSH, INVALID_OR_ZERO_DIVIDE


def tasks_under(call: every.Call, isa: str, mode: int, lib: Any, default: int) -> tuple[Any, int]:
    """The call's tasks with the control register set; outputs and the register afterwards."""
    k, outputs = call.kernel, call.outputs()
    plan, result = k.plan(**{**call.fields(isa), **outputs})
    assert result.ok, result
    workspace = np.zeros(plan.task_bytes, np.uint8)
    lib.set_control(mode)
    for i in range(plan.n_tasks):
        k.task(plan, i, workspace)
    after = lib.get_control()
    lib.set_control(default)
    return outputs, after


def plain_calls(name: str) -> list[every.Call]:
    return [made(name, (33,), rows=2, heads=2, spread=s) for s in ("normal", "tiny")]


@every_header(*HEADERS)
def test_hazard_38_subnormal_numbers_flushed_or_not(name):
    """FTZ and DAZ, set by somebody else: the bounds hold and the bits stay set."""
    lib, default, flush, _ = flushing()
    for call in plain_calls(name):
        for isa in every.isas_in(name):
            for mode in (default, default | flush):
                got, after = tasks_under(call, isa, mode, lib, default)
                assert after & ~0x3F == mode & ~0x3F
                call.check(got, isa)


@every_header(*HEADERS)
def test_hazard_39_no_exception_that_somebody_traps(name):
    """Finite numbers: no invalid operation, no division by zero; rounding mode and masks as before,
    whichever they are, and memory-safe under each."""
    lib, default, _, trapped = flushing()
    for call in plain_calls(name)[:1]:
        call = filled(call)
        for isa in every.isas_in(name):
            got, after = tasks_under(call, isa, default, lib, default)
            assert after & trapped == 0, (isa, hex(after))
            call.check(got, isa)
            for rounding in (0x2000, 0x4000, 0x6000):
                got, after = tasks_under(call, isa, default | rounding, lib, default)
                assert after & ~0x3F == (default | rounding) & ~0x3F
                assert np.isfinite(numbers(by_rows(call, got))).all(), (isa, rounding)
    control = filled(made("hl_sparse_flash_attention_f32_d64", (9,), rows=1))
    bad = with_number(control, "key", (0, slice(None), 0, 1), np.inf)
    _, after = tasks_under(bad, "scalar", default, lib, default)
    assert after & trapped, "the control: infinity raises the flag"


# ---- 40 to 42: options and quantised numbers ----------------------------------------------------


@every_header(*HEADERS)
def test_hazard_40_scale_and_softcap(name):
    """Not finite: refused. Negative scales are legal. 0 is 0 for the sparse operators (their mean),
    and the documented default 1 for the others. softcap 0 is none; negative: refused."""
    call = filled(made(name, (20,), rows=1))
    for x in (np.nan, np.inf, -np.inf):
        refused(call, {"scale_value": x}, "VALUE", "scale_value", "FINITE")
    minus = changed(call, scale_value=-0.25)
    for isa in every.isas_in(name):
        if not call.grads:
            minus.check(minus.run(isa), isa)
        zero, one = call.run(isa, scale_value=0.0), call.run(isa, scale_value=1.0)
        if name in SPARSE:
            assert differs(zero, one) and not zero["softmax_max"].any()
            assert (zero["softmax_sum"] == 20).all()
        elif not call.grads:
            same(zero, one, isa)
    if feature(name, "softcap"):
        for x in (np.nan, np.inf, -np.inf, -1.0):
            refused(call, {"softcap": x}, "VALUE", "softcap", "FINITE")
        same(call.run(softcap=0.0), call.run())
        assert differs(call.run(softcap=0.5), call.run())
    elif "softcap" in fields_of(name):
        refused(call, {"softcap": 1.0}, "UNSUPPORTED", "softcap")


def fields_of(name: str) -> set[str]:
    k = every.kernel(name)
    return {f.name for f in k.header.structs[f"{k.op}_args"]}


@every_header(*sorted(set(SPARSE) | (set(with_feature("sinks")) - set(GRADS))))
def test_hazard_41_sinks(name):
    """-infinity: none. +infinity: takes all, the row is 0. NaN: its head is NaN, no other."""
    call = filled(made(name, (20,), rows=2, heads=3, sinks="plain"))
    without = changed(call, sinks=None)
    for isa in every.isas_in(name):
        plain = call.run(isa)["attention_out"]
        for x in (-np.inf, np.inf, np.nan):
            one = changed(call, sinks=np.array([1.0, x, -1.0], np.float32))
            clean = changed(call, sinks=np.array([1.0, 0.0, -1.0], np.float32))
            out = by_rows(one, one.run(isa))
            others = by_rows(clean, clean.run(isa))
            assert out[:, ::2].tobytes() == others[:, ::2].tobytes(), (isa, x)
            if np.isnan(x):
                assert np.isnan(numbers(out[:, 1])).all(), isa
            elif x > 0:
                assert not out[:, 1].any(), isa
            else:
                none = by_rows(without, without.run(isa))
                assert np.allclose(numbers(out[:, 1]), numbers(none[:, 1]), atol=1e-2), isa
        assert plain.any()


@every_header(*RECORDS)
def test_hazard_42_records_of_all_codes_and_special_scales(name):
    """All 256 codes, NaN's too; scales of 0, NaN and infinity."""
    call = filled(made(name, (4,), rows=1, heads=2, spread="codes"))
    a = args_of(call)
    fields = {what: (kind, n) for what, kind, n in (*a.record.fields, *a.record.behind)}
    kind, n = fields["nope"]
    at = offset_of(a, "nope")
    key = a.key.copy()
    codes = np.arange(n, dtype=np.uint8)
    finite = codes.copy()
    if kind == "e4m3":
        finite[(finite & 0x7F) == 0x7F] = 0x7E
    rows = key.reshape(-1, key.shape[-1])
    for i in range(len(rows)):
        rows[i, at : at + n] = np.roll(finite, 7 * i)
    legal = changed(call, key=key)
    for isa in every.isas_in(name):
        legal.check(legal.run(isa), isa)
    scale_kind, scales = fields["scale"]
    width = {"f32": 4, "f16": 2, "bf16": 2, "e8m0": 1}[scale_kind]
    first = offset_of(a, "scale")
    specials = {"e8m0": [b"\xff"], "f32": [np.float32(x).tobytes() for x in (np.nan, np.inf)]}
    for special in specials[scale_kind]:
        hurt = key.copy().reshape(-1, key.shape[-1])
        for row in hurt:
            row[first : first + width] = np.frombuffer(special, np.uint8)
        hurt = changed(call, key=hurt.reshape(key.shape))
        for isa in every.isas_in(name):
            out = numbers(hurt.run(isa)["attention_out"])
            assert not np.isfinite(out).any(axis=-1).any() or not np.isfinite(out).all(), isa
    if scale_kind == "f32":
        zero = key.copy().reshape(-1, key.shape[-1])
        zero[:, first : first + 4 * scales] = 0
        zero = changed(call, key=zero.reshape(key.shape))
        for isa in every.isas_in(name):
            got = zero.run(isa)
            zero.check(got, isa)
            assert not got["attention_out"][..., :n].any(), isa
    if kind == "e4m3":
        wrong = key.copy()
        wrong.reshape(-1, key.shape[-1])[:, at] = 0x7F
        for isa in every.isas_in(name):
            out = changed(call, key=wrong).run(isa)["attention_out"]
            assert np.isnan(numbers(out)).all(), "NaN's code is NaN"


def offset_of(a: Any, what: str) -> int:
    """Where a field begins in the oracle's row of a record and of what lies behind its page."""
    at = 0
    for name, kind, n in (*a.record.fields, *a.record.behind):
        if name == what:
            return at
        at += a.record.bytes_of(((name, kind, n),), a.query.dtype)
    raise KeyError(what)


@every_header(*CODES)
def test_hazard_42_int8_of_all_codes_and_special_scales(name):
    for mode in (0, 1, 2):
        call = made(name, (8,), rows=1, heads=2, antiquant=mode)
        a = args_of(call)
        key, value = a.key.copy(), a.value.copy()
        for x in (key, value):
            flat = x.reshape(-1, x.shape[-1])
            for i, row in enumerate(flat):
                row[...] = (
                    np.roll(np.arange(256), 11 * i)[: len(row)].astype(np.uint8).view(np.int8)
                )
        legal = changed(call, key=key, value=value)
        for isa in every.isas_in(name):
            legal.check(legal.run(isa), isa)
            zeros = changed(legal, antiquant_scale=np.zeros_like(a.antiquant_scale))
            got = zeros.run(isa)
            zeros.check(got, isa)
            assert not got["attention_out"].any()
            for x in (np.nan, np.inf):
                hurt = np.full_like(a.antiquant_scale, x)
                out = changed(legal, antiquant_scale=hurt).run(isa)["attention_out"]
                assert not np.isfinite(numbers(out)).any(), (isa, mode, x)


@every_header(*APPENDS)
def test_hazard_42_rows_of_zeros_are_written_without_dividing_by_zero(name):
    """What is written as 0 is read back as 0, not as NaN, whatever the scales; nothing is divided
    by 0 on the way."""
    lib, default, _, trapped = flushing()
    k = every.kernel(name)
    for isa in [i for i in every.isas_in(name) if not ISAS[i].tiles]:
        if name in RECORDS:
            continue_with_records(k, isa, lib, default, trapped)
            continue
        fields = appending(name)
        for side in ("key", "value"):
            fields[side] = np.zeros_like(fields[side])
            fields[f"{side}_cache"].view(np.uint8)[...] = 0xFF
        lib.set_control(default)
        assert k.append(**fields, isa=k.isas()[isa]).ok
        assert lib.get_control() & trapped == 0, isa
        for b, first, n in ((0, 17, 3), (1, 2, 2)):
            for t in range(first, first + n):
                page, slot = fields["block_table"][b, t // 4], t % 4
                assert not fields["key_cache"][page, slot].any(), (isa, b, t)
                assert not fields["value_cache"][page, slot].any(), (isa, b, t)


def continue_with_records(k: Any, isa: str, lib: Any, default: int, trapped: int) -> None:
    """Rows of zeros as records and back; the control, rows of ones, is no zero."""
    width, block = k.dk + k.rope, {} if "v4" not in k.name else {"block_size": 4}
    for x, some in ((0.0, False), (1.0, True)):
        rows = np.full((4, width), x, k.dtype)
        records, back = np.full(1 << 13, 0xFF, np.uint8), np.full((4, width), 7, np.float32)
        common = {"rows": 4, "isa": k.isas()[isa], **block}
        lib.set_control(default)
        assert k.quantise_rows(nope=rows, records=records, **common).ok
        assert k.dequantise_rows(records=records, nope=back, numbers_f32=1, **common).ok
        assert lib.get_control() & trapped == 0, isa
        assert back.any() == some and np.isfinite(back).all(), isa


# ---- 43, 44 -------------------------------------------------------------------------------------

CONVERT = """
void hazard_bf16(const float *x, uint16_t *y, long n);
void hazard_f16(const float *x, uint16_t *y, long n);
void hazard_bf16(const float *x, uint16_t *y, long n)
{ for (long i = 0; i < n; ++i) y[i] = hl_bf16_of_float(x[i]); }
void hazard_f16(const float *x, uint16_t *y, long n)
{ for (long i = 0; i < n; ++i) y[i] = hl_f16_of_float(x[i]); }
"""


def test_hazard_43_float_to_bfloat16_and_float16():
    """To nearest even, NaN stays NaN whichever bits it has, what is too large is infinity. Every
    1031st of the 2^32 numbers, all of them with HEADLIGHT_EXHAUSTIVE=1; the vectors' words are
    tests/test_words.py::test_conversions'."""
    text = every.text("hl_sparse_flash_attention_f32_d64")
    k = bind.load(text, defines=("HL_ISA_ONLY_SCALAR",), flags=("-O1",), extra=CONVERT)
    step = 1 if os.environ.get("HEADLIGHT_EXHAUSTIVE") == "1" else 1031
    with np.errstate(all="ignore"):
        for begin in range(0, 1 << 32, step << 22):
            end = min(begin + (step << 22), 1 << 32)
            bits = np.arange(begin, end, step, dtype=np.uint64)
            bits = np.append(bits, [0x7F800001, 0xFF800001, 0x7F7FFFFF, 0x00000001, 0x33000001])
            x = bits.astype(np.uint32).view(np.float32)
            for function, kind in (("bf16", ml_dtypes.bfloat16), ("f16", np.float16)):
                y = np.empty(len(x), np.uint16)
                convert = k.library[f"hazard_{function}"]
                convert.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_long]
                convert(x.ctypes.data, y.ctypes.data, len(x))
                want = x.astype(kind)
                nan = np.isnan(x)
                assert np.isnan(y.view(kind)[nan].astype(np.float32)).all()
                assert (y[~nan] == want.view(np.uint16)[~nan]).all(), (function, hex(begin))
    with np.errstate(all="ignore"):
        rounded = x.astype(ml_dtypes.bfloat16).view(np.uint16)[~nan]
    down = (x.view(np.uint32) >> 16).astype(np.uint16)  # the control: cut off, not rounded
    assert (down[~nan] != rounded).any()


@every_header(*HEADERS)
def test_hazard_44_one_key_and_other_special_contexts(name):
    """One key: its value in every bit. One key that takes all, all the same, signs that cancel:
    within the bound of every element."""
    for isa in every.isas_in(name):
        if name in FORWARD and name not in RECORDS and args_one(name).value is not None:
            call = apart(name, 1, rows=1, heads=2)
            out = by_rows(call, call.run(isa))[0]
            if args_of(call).value.dtype != np.int8:
                want = value_row(call, 0, out.dtype)
                assert all(o.tobytes() == want.tobytes() for o in out), isa
        for call in special(name):
            call.check(call.run(isa), isa)


def args_one(name: str) -> Any:
    return args_of(apart(name, 1, rows=1, heads=2))


@functools.cache
def special(name: str) -> list[every.Call]:
    """Made once for all instruction sets, with what the oracle says of them."""
    spreads = ("dominant", "equal", "cancel")
    return [made(name, (50,), rows=2, heads=2, spread=spread) for spread in spreads]
