"""What fusion_attention does not do: accept what is wrong, touch what is not its own, or write
where it refuses."""

import ctypes
import dataclasses
import math
import mmap
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers import WORDS_HERE, assert_same
from helpers_cases import INT_MAX, INT_MIN, STATS
from helpers_fusion import (
    LAYOUTS,
    RECTANGLE,
    SPECS,
    TRIANGLE,
    Case,
    Shape,
    Way,
    best_in,
    by_pair,
    check,
    expected,
    fields_of,
    kernel,
    make_case,
    run,
    run_guarded,
    table,
    text,
    various,
)
from helpers_memory import LIBC, MAP_NORESERVE, Arena, Died, in_child, map_pages, view
from helpers_runner import BY_TASK, FLUSH_LEFT, QEMU, need_aarch64, packed, play, program
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import BSND, PA_BSND, TND
from oracle_fusion import BNSD, BSH, SBH, SLOPE, spans_of
from test_bad_input import OTHER_MACHINES_ISA, Bad, check_refused, shape, with_entry
from test_memory import (
    DEFAULT,
    FLAGS,
    FLOAT_ENVIRONMENT,
    FLUSH,
    INVALID_OR_ZERO_DIVIDE,
    sanitized_environment,
)

from gen import bind, spec

ALL = tuple(SPECS)
Q_ENDS, KV_ENDS = "actual_seq_qlen", "actual_seq_kvlen"

# ---- bad input ----------------------------------------------------------------------------------

PADDED = Shape(
    lens_q=(5, 5),
    lens_kv=(9, 9),
    heads_kv=2,
    group=3,
    mode=0,
    mask="given",
    mask_batch=True,
    mask_heads=True,
    hidden=0.2,
    band=(3, 4),
    pse="full",
    sinks="plain",
    keep_prob=0.5,
    bits=True,
)
ENDS = {"lens_q": (5, 2), "lens_kv": (9, 4), "pad_q": 1, "pad_kv": 2, "unused": 1}
TND_CALL = dataclasses.replace(PADDED, **ENDS, layout=TND, mask_batch=False, mask_heads=False)
LAST_ROWS = {"pse": "last_rows", "pse_each": False, "heads_kv": 1}
# name of the base -> kernel, call
BASES: dict[str, tuple[str, Shape]] = {
    "bsnd": ("f32_all", PADDED),
    "sbh": ("f32_all", dataclasses.replace(PADDED, layout=SBH)),
    "bnsd": ("f32_all", dataclasses.replace(PADDED, layout=BNSD)),
    "tnd": ("f32_all", TND_CALL),
    "prefix": ("f32_all", dataclasses.replace(PADDED, mode=6, mask="formula")),
    "split": ("f32_all", dataclasses.replace(TND_CALL, mode=7, mask="formula", pse="none")),
    "rows": ("f32_all", dataclasses.replace(PADDED, lens_kv=(5, 5), **LAST_ROWS)),
    "tnd_rows": ("f32_all", dataclasses.replace(TND_CALL, lens_kv=(5, 2), **LAST_ROWS)),
    "slope": ("f32_all", dataclasses.replace(PADDED, pse="slope", pse_type=SLOPE)),
    "none": ("f16_none", dataclasses.replace(PADDED, sinks="none")),
}


def base(name: str) -> tuple[bind.Kernel, Case, dict[str, Any]]:
    """A call that is accepted: its kernel, its case and all its fields."""
    of, call = BASES[name]
    k = kernel(of)
    case = make_case(k, call)
    return k, case, {**fields_of(k, case), **case.outputs()}


def longs(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def end(argument: str, values: np.ndarray, at: int, rule: str, limit: int) -> Bad:
    value = int(values[at])
    return Bad("tnd", {argument: values}, "LENGTH", argument, rule, (at,), value, limit)


def null(base_name: str, argument: str, **more: Any) -> Bad:
    return Bad(base_name, {argument: None, **more}, "NULL", argument, "NOT_NULL")


def unsupported(base_name: str, argument: str, value: Any, rule: str, **more: Any) -> Bad:
    found = value if isinstance(value, int) else None
    if rule == "NULL":
        found = None
    change = {argument: value, **more}
    return Bad(base_name, change, "UNSUPPORTED", argument, rule, (), found, None)


def moved(
    base_name: str,
    argument: str,
    to: str,
    status: str,
    rule: str,
    offset: int = 0,
    limit: int | None = None,
) -> Bad:
    """An argument where another one (or itself, some bytes on) lies. Where it is another one, that
    one moves to memory with room for both: what lies behind it is then no third argument."""

    def change(fields: dict[str, Any]) -> dict[str, Any]:
        if to == argument:
            return {argument: fields[to].ctypes.data + offset}
        old = fields[to]
        room = np.zeros(old.nbytes + fields[argument].nbytes + offset + 64, np.uint8)
        there = room[: old.nbytes].view(old.dtype).reshape(old.shape)
        there[...] = old
        return {to: there, argument: room.ctypes.data + offset}

    return Bad(base_name, change, status, argument, rule, (), offset if limit else None, limit)


def wrong_triangle(mode: int, at: tuple[int, int]) -> Bad:
    """One byte of the compressed mask that is not as the operator wants it."""
    mask = (RECTANGLE if mode == 6 else TRIANGLE[0, 0]).copy()
    mask[at] ^= 1
    change = {
        "atten_mask": mask,
        "sparse_mode": mode,
        "mask_check": 1,
        **sized(mask),
        "prefix": longs(3, 4),
    }
    limit = 1 - int(mask[at])
    return Bad("bsnd", change, "VALUE", "atten_mask", "EQUAL", at, int(mask[at]), limit)


def sized(mask: np.ndarray) -> dict[str, int]:
    rows, width = mask.shape
    return {"mask_batch": 1, "mask_heads": 1, "mask_rows": rows, "mask_width": width}


FLOATS, BYTES = np.zeros(4096, np.float32), np.zeros(4096, np.uint8)
SMALL_MASK = {"atten_mask": BYTES, "mask_batch": 1, "mask_heads": 1}
OUTPUTS = ("attention_out", *STATS, "dropout_state")
NUMBERS = {  # argument -> its least and most
    "sparse_mode": (0, 8),
    "mask_from_mode": (0, 1),
    "mask_check": (0, 1),
    "band": (0, 1),
    "pse_type": (0, 3),
    "pse_shape": (0, 2),
    "stats_order": (0, 1),
    "inner_precise": (0, 2),
    "out_f32": (0, 1),
}
TABLE = [
    # Required pointers, and those that go together.
    *(null("bsnd", n) for n in ("query", "key", "value", "attention_out")),
    *(null("tnd", n) for n in (Q_ENDS, KV_ENDS)),
    null("prefix", "prefix"),
    null("bsnd", "prefix", sparse_mode=6),
    null("bsnd", "prefix", sparse_mode=5, atten_mask=None, mask_from_mode=1),
    # Pointers that must not be there.
    *(unsupported("bsnd", n, longs(5, 10), "NULL") for n in (Q_ENDS, KV_ENDS)),
    *(unsupported("split", "pse", FLOATS, "NULL", sparse_mode=n) for n in (7, 8)),
    # Features that a kernel does not have.
    unsupported("none", "sinks", FLOATS, "NULL"),
    unsupported("none", "softcap", 1.0, "NULL"),
    *(unsupported("none", "pse_type", n, "NULL") for n in (1, 2, 3)),
    # Sizes.
    *(
        shape("bsnd", n, v)
        for v in (-1, INT_MIN)
        for n in ("batch", "seq_q", "seq_kv", "pse_batch", "pse_width", "mask_rows", "mask_width")
    ),
    *(
        shape("bsnd", n, v, limit=1)
        for v in (-1, INT_MIN)
        for n in ("heads_q", "heads_kv", "mask_batch", "mask_heads")
    ),
    shape("bsnd", "heads_q", 0, limit=1),
    *(shape("bsnd", n, low - 1, limit=low) for n, (low, _) in NUMBERS.items()),
    *(
        shape("bsnd", n, v, "AT_MOST", most)
        for n, (_, most) in NUMBERS.items()
        for v in (most + 1, INT_MAX)
    ),
    *(shape("bsnd", "stats_width", v, "EQUAL", 8) for v in (2, 7, 9, -1, INT_MAX)),
    *(shape("bsnd", n, v, "EQUAL", 2) for n in ("pse_batch", "mask_batch") for v in (3, INT_MAX)),
    *(shape("bsnd", "mask_heads", v, "EQUAL", 6) for v in (2, 7)),
    *(Bad("bsnd", {"heads_kv": v}, "SHAPE", "heads_q", "MULTIPLE_OF", (), 6, v) for v in (4, 5, 7)),
    # Masks and biases that are too small.
    *(shape("bsnd", "mask_rows", v, "AT_LEAST", 5) for v in (1, 4)),
    *(shape("bsnd", "mask_width", v, "AT_LEAST", 9) for v in (1, 8)),
    *(shape("tnd", "mask_rows", v, "AT_LEAST", 5) for v in (1, 4)),
    *(shape("tnd", "mask_width", v, "AT_LEAST", 9) for v in (1, 8)),
    *(shape(b, "pse_width", v, "AT_LEAST", 1024) for b in ("rows", "tnd_rows") for v in (5, 1023)),
    # Layouts and modes.
    *(
        unsupported("bsnd", "input_layout", v, "GENERATED")
        for v in (PA_BSND, 5, 7, -1, INT_MAX, INT_MIN)
    ),
    *(
        Bad(b, {"sparse_mode": v}, "UNSUPPORTED", "sparse_mode", "AT_MOST", (), v, 6)
        for b in ("sbh", "bnsd")
        for v in (7, 8)
    ),
    Bad("tnd", {"sparse_mode": 5}, "UNSUPPORTED", "sparse_mode", "EQUAL", (), 5, 6),
    *(
        Bad(b, {"sparse_mode": v}, "UNSUPPORTED", "sparse_mode", "AT_MOST", (), v, 3)
        for b, v in (("rows", 4), ("tnd_rows", 4))
    ),
    Bad(
        "rows",
        {"sparse_mode": 6, "prefix": longs(1, 2)},
        "UNSUPPORTED",
        "sparse_mode",
        "AT_MOST",
        (),
        6,
        3,
    ),
    # Lengths.
    Bad(
        "rows",
        {"seq_kv": 4, "key_stride": (75, 15, 15), "value_stride": (35, 7, 7)},
        "SHAPE",
        "seq_kv",
        "EQUAL",
        (),
        4,
        5,
    ),
    Bad(
        "tnd_rows",
        {KV_ENDS: longs(5, 8, 0)},
        "LENGTH",
        KV_ENDS,
        "EQUAL",
        (1,),
        3,
        2,
    ),
    *(end(Q_ENDS, longs(v, 7, 0), 0, "AT_LEAST", 0) for v in (-1, -(2**63))),
    *(end(Q_ENDS, longs(5, v, 0), 1, "AT_LEAST", 5) for v in (4, 1, -1)),
    *(end(Q_ENDS, longs(5, v, 0), 1, "AT_MOST", 8) for v in (9, INT_MAX, 2**62)),
    *(end(KV_ENDS, longs(9, 13, v), 2, "AT_MOST", 15) for v in (16, 2**32 + 3, 2**63 - 1)),
    end(KV_ENDS, longs(9, 13, 12), 2, "AT_LEAST", 13),
    end(Q_ENDS, longs(5, 0, 7), 2, "EQUAL", 0),
    end(KV_ENDS, longs(9, 0, -1), 2, "EQUAL", 0),
    *(
        Bad(
            "prefix",
            with_entry("prefix", (b,), v),
            "LENGTH",
            "prefix",
            "AT_LEAST",
            (b,),
            v,
            0,
        )
        for b in (0, 1)
        for v in (-1, -(2**63))
    ),
    # Numbers.
    *(
        Bad("bsnd", {n: v}, "VALUE", n, "FINITE")
        for n in ("scale_value", "softcap")
        for v in (math.nan, math.inf, -math.inf)
    ),
    Bad("bsnd", {"softcap": -1.0}, "VALUE", "softcap"),
    *(Bad("bsnd", {"keep_prob": v}, "VALUE", "keep_prob", "AT_MOST") for v in (1.0001, math.inf)),
    *(
        Bad("bsnd", {"keep_prob": v}, "VALUE", "keep_prob", "AT_LEAST")
        for v in (-0.5, -1e-30, -math.inf)
    ),
    # The reciprocal of 1e-39 is infinite: what is dropped would be 0 times that.
    *(Bad("bsnd", {"keep_prob": v}, "VALUE", "keep_prob", "FINITE") for v in (math.nan, 1e-39)),
    *(shape("bsnd", "dropout_offset", v) for v in (-1, -(2**63))),
    *(shape("bsnd", "dropout_offset", v, "AT_MOST", 2**32 - 1) for v in (2**32, 2**63 - 1)),
    # The mask that a mode wants to be given, on request.
    *(wrong_triangle(2, at) for at in ((0, 0), (0, 1), (2047, 2047), (100, 101))),
    *(wrong_triangle(mode, (5, 5)) for mode in (3, 4)),
    *(wrong_triangle(6, at) for at in ((2048, 1023), (2048, 1024), (3071, 2047), (9, 9))),
    *(
        Bad(
            "bsnd",
            {**SMALL_MASK, "sparse_mode": 2, "mask_check": 1, "mask_rows": r, "mask_width": c},
            "SHAPE",
            n,
            "EQUAL",
            (),
            found,
            2048,
        )
        for n, r, c, found in (("mask_rows", 9, 2048, 9), ("mask_width", 2048, 9, 9))
    ),
    # Sizes that together do not fit in memory.
    Bad(
        "bsnd",
        {"batch": INT_MAX, "seq_q": 2**20, "heads_q": 1020, "heads_kv": 1020}
        | dict.fromkeys(("pse", "atten_mask", "sinks", "dropout_mask"))
        | {"pse_batch": 1, "mask_batch": 1, "mask_heads": 1, "keep_prob": 1.0},
        "SHAPE",
        "query",
        "ADDRESSABLE",
    ),
    Bad("bsnd", {"query_stride": (2**62, 0, 0)}, "SHAPE", "query", "ADDRESSABLE"),
    Bad("tnd", {"key_stride": (0, 2**62, 0)}, "SHAPE", "key", "ADDRESSABLE"),
    # Strides.
    *(
        Bad(b, {f"{n}_stride": s}, "SHAPE", f"{n}_stride", "AT_LEAST", (), -4, 0)
        for b in ("bsnd", "bnsd")
        for n in ("query", "key", "value", "out")
        for s in ((-4, 0, 0), (0, -4, 0), (0, 0, -4))
    ),
    Bad("bsnd", {"out_stride": (0, 0, 6)}, "SHAPE", "out_stride", "AT_LEAST", (), 6, 7),
    Bad("bsnd", {"out_stride": (0, 41, 0)}, "SHAPE", "out_stride", "AT_LEAST", (), 41, 42),
    Bad("bsnd", {"out_stride": (209, 0, 0)}, "SHAPE", "out_stride", "AT_LEAST", (), 209, 210),
    *(unsupported("bsnd", "isa", v, "GENERATED") for v in (OTHER_MACHINES_ISA, 5, 6, 31, -1)),
    # Alignment: each tensor to its element, nothing more.
    *(
        moved("bsnd", n, n, "ALIGN", "MULTIPLE_OF", o, 4)
        for o in (1, 2, 3)
        for n in ("query", "key", "value", "pse", "sinks", "attention_out", *STATS)
    ),
    *(
        moved(b, n, n, "ALIGN", "MULTIPLE_OF", o, 8)
        for o in (1, 4)
        for b, n in (
            ("tnd", Q_ENDS),
            ("tnd", KV_ENDS),
            ("prefix", "prefix"),
            ("bsnd", "dropout_state"),
        )
    ),
    *(moved("slope", "pse", "pse", "ALIGN", "MULTIPLE_OF", o, 4) for o in (1, 2)),
    *(moved("none", n, n, "ALIGN", "MULTIPLE_OF", 1, 2) for n in ("query", "pse")),
    # Outputs over anything else.
    *(
        moved(b, n, m, "ALIAS", "DISJOINT")
        for b, m in (
            ("bsnd", "query"),
            ("bsnd", "key"),
            ("bsnd", "value"),
            ("bsnd", "pse"),
            ("bsnd", "atten_mask"),
            ("bsnd", "dropout_mask"),
            ("bsnd", "sinks"),
            ("tnd", Q_ENDS),
            ("tnd", KV_ENDS),
            ("prefix", "prefix"),
        )
        for n in ("attention_out", "softmax_lse")
    ),
    moved("bsnd", "softmax_max", "softmax_sum", "ALIAS", "DISJOINT"),
]


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_refused(bad):
    """By plan and by the one call alike, in a sentence with the argument, its place, value and
    limit; nothing is written."""
    k, _, fields = base(bad.base)
    check_refused(k, fields, bad)


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_accepted(name):
    """The control: each call of the table is fine but for the one change."""
    k, case, fields = base(name)
    result = k.run(**fields)
    assert result.ok and result.error_text == "", result.error_text
    check(case, {n: fields[n] for n in case.outputs()}, best_in(BASES[name][0]))
    plan, _ = k.plan(**fields)
    assert plan.n_tasks > 0 and plan.work > 0 and plan.group == 3
    assert plan.band_batch == (1 if name == "split" else -1)


def test_the_right_triangles_are_accepted():
    """With mask_check: the masks that the operator's document shows, any byte but 0 for 1."""
    k, case, fields = base("bsnd")
    for mode in (2, 3, 4, 6):
        for ones in (1, 0xFF):
            mask = (RECTANGLE if mode == 6 else TRIANGLE[0, 0]) * np.uint8(ones)
            other = case.changed(sparse_mode=mode, prefix=longs(3, 4), atten_mask=mask[None, None])
            got = {**fields, **other.inputs(), **other.sizes(), "mask_check": 1}
            result = k.run(**{**got, **other.outputs()})
            assert result.ok, result.error_text
    ok = {**fields, "mask_check": 1}
    assert k.run(**ok).ok, "a mask that a mode needs has no shape that it must have"


def test_null_structs():
    k, _, fields = base("bsnd")
    args, error, plan = k.args(**fields), k.Error(), k.Plan()
    place = ctypes.byref
    assert k._c_plan(None, place(args), place(error)) == k.constants["HL_ERR_NULL"]
    assert k.result(-1, error).argument == "PLAN"
    assert k._c_plan(place(plan), None, place(error)) == k.constants["HL_ERR_NULL"]
    assert k.result(-1, error).argument == "ARGS"
    assert k._c(None, None, 0, place(error)) == k.constants["HL_ERR_NULL"]
    assert k._c_workspace_bytes(None) == 0
    bad = k.args(**{**fields, "batch": -1})
    assert k._c_plan(place(plan), place(bad), None) == k.constants["HL_ERR_SHAPE"]
    assert k._c(place(bad), None, 0, None) == k.constants["HL_ERR_SHAPE"]
    assert k._c_plan(place(plan), place(args), None) == 0


def test_workspace_to_the_byte():
    k, _, fields = base("tnd")
    need = k.workspace_bytes(**fields)
    plan, _ = k.plan(**fields)
    assert need > 0 and need == plan.task_bytes
    assert need == eval(k.header.text.split("_WORKSPACE_BYTES ((size_t)")[1].split(")")[0])
    before = fields["attention_out"].tobytes()
    workspace = np.full(need, 0xFF, np.uint8)
    for capacity in (0, 1, need - 1):
        result = k.run(**fields, workspace=workspace, capacity=capacity)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "WORKSPACE")
        assert (result.rule, result.value, result.limit) == ("AT_LEAST", capacity, need)
    result = k.run(**fields, workspace=None, capacity=need)
    assert (result.status_name, result.argument) == ("HL_ERR_NULL", "WORKSPACE")
    assert fields["attention_out"].tobytes() == before and (workspace == 0xFF).all()
    assert k.run(**fields, workspace=workspace, capacity=need).ok


def test_the_workspace_overlaps_nothing():
    k, case, fields = base("bsnd")
    need = k.workspace_bytes(**fields)
    pool = np.full(need + 16384, 0xFF, np.uint8)
    for victim in (*case.inputs(), *case.outputs()):
        held = pool.tobytes()
        place = {victim: (pool.ctypes.data + 63) // 64 * 64}
        result = k.run(**{**fields, **place}, workspace=pool)
        assert result.status_name == "HL_ERR_ALIAS", (victim, result)
        assert result.argument in (victim.upper(), "WORKSPACE") and pool.tobytes() == held


def test_neighbours_do_not_overlap():
    """The control of the alias checks: outputs and inputs that touch are fine."""
    k, case, fields = base("tnd")
    want = run(k, case)
    names = [n for n in fields if isinstance(fields[n], np.ndarray)]
    names.sort(key=lambda n: -fields[n].itemsize)
    pool = np.zeros(sum(fields[n].nbytes for n in names), np.uint8)
    at, places = 0, dict(fields)
    for n in names:
        place = pool[at : at + fields[n].nbytes]
        place[...] = fields[n].reshape(-1).view(np.uint8)
        places[n] = place.view(fields[n].dtype).reshape(fields[n].shape)
        at += fields[n].nbytes
    result = k.run(**places)
    assert result.ok, result.error_text
    assert all(places[n].tobytes() == want[n].tobytes() for n in want)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_to_do_needs_nothing(layout):
    """No batch, no rows, no keys: accepted, and memory that would be empty may be NULL."""
    k = kernel("f32_all")
    for lens_q, lens_kv in (((), ()), ((0, 0), (4, 4)), ((4, 4), (0, 0)), ((0, 0), (0, 0))):
        case = make_case(k, Shape(lens_q=lens_q, lens_kv=lens_kv, layout=layout))
        inputs = {n: x for n, x in case.inputs().items() if x.size}
        outputs = {n: x for n, x in case.outputs().items() if x.size}
        result = k.run(**{**case.sizes(), **inputs, **outputs})
        assert result.ok, (layout, lens_q, lens_kv, result.error_text)
        if "attention_out" in outputs:
            check(case, outputs, best_in("f32_all"))


NASTY = st.one_of(st.integers(-3, 20), st.sampled_from([INT_MIN, INT_MAX, 2**62, -(2**63), 0]))


def acceptable(ends: list[int], total: int) -> bool:
    """The documented rule for ends, once more: they do not fall, stay within the rows, and zeros
    behind the last one are batches that are not used."""
    used = list(ends)
    while used and used[-1] == 0:
        used.pop()
    return all(0 <= x <= total for x in used) and used == sorted(used)


@settings(max_examples=100)
@given(data=st.data())
def test_any_ends_are_refused_or_right(data):
    """Nonsense in ends, between guard pages: refused exactly when the rules say so, otherwise the
    oracle's numbers."""
    k = kernel("f32_all")
    call = Shape(lens_q=(5, 0, 4), lens_kv=(7, 3, 4), layout=TND, pad_q=2, pad_kv=3, group=2)
    clean = make_case(k, call)
    rng = np.random.default_rng(1)
    changes = {n: rng.standard_normal(getattr(clean.args, n).shape) for n in ("key", "value")}
    changes["query"] = rng.standard_normal(clean.args.query.shape)
    changes = {n: x.astype(np.float32) for n, x in changes.items()}
    for name in (Q_ENDS, KV_ENDS):
        ends = getattr(clean.args, name).copy()
        for _ in range(data.draw(st.integers(0, 2))):
            ends[data.draw(st.integers(0, 2))] = data.draw(NASTY)
        changes[name] = ends
    case = clean.changed(**changes)
    sizes = clean.sizes()
    fine = acceptable(changes[Q_ENDS].tolist(), 11) and acceptable(changes[KV_ENDS].tolist(), 17)
    if fine:
        check(case, run_guarded(k, case, Way("scalar")), "scalar")
        return
    with Arena() as arena:
        fields = {n: arena.place(x) for n, x in case.inputs().items()} | sizes
        outputs = clean.outputs(arena)
        arena.protect()
        result = in_child(lambda: k.run(**fields, **outputs, workspace=np.zeros(1 << 20, np.uint8)))
        assert result.status_name == "HL_ERR_LENGTH" and result.error_text
        assert all((x.view(np.uint8) == 0xFF).all() for x in outputs.values())


def test_struct_fields_are_those_of_the_compiler():
    """Sizes and offsets against what C says, for the operator's structs."""
    header = bind.parse(text("f32_all"))
    made = bind.structures(header)
    lines = []
    for name in ("args", "plan"):
        of = f"hl_fusion_attention_{name}"
        lines.append(f'_Static_assert(sizeof({of}) == {ctypes.sizeof(made[of])}, "{name}");')
        for field, *_ in made[of]._fields_:
            offset = getattr(made[of], field).offset
            lines.append(f'_Static_assert(offsetof({of}, {field}) == {offset}, "{field}");')
    assert len(lines) > 60
    source = "\n".join(['#include "header.h"', *lines, ""])
    bind.compile_c({"header.h": header.text, "sizes.c": source})


def test_another_prefix_and_name():
    small = {"isa": ["scalar"], "features": [], "layout_q": ["BSND", "TND"]}
    small |= {"prefix": "zz", "name": "zz_my_attention"}
    k = bind.load(spec.parse_header({**table("f32_all"), **small}))
    assert (k.name, k.op, k.stats) == ("zz_my_attention", "zz_fusion_attention", True)
    for layout in (BSND, TND):
        case = make_case(k, Shape(lens_q=(40,), lens_kv=(41,), layout=layout, mode=2, mask="given"))
        check(case, run(k, case), "scalar")
    bad = k.run(**{**fields_of(k, case), **case.outputs(), "input_layout": BNSD})
    assert (bad.status_name, bad.argument) == ("ZZ_ERR_UNSUPPORTED", "INPUT_LAYOUT")
    assert k.workspace_bytes(**fields_of(k, case), **case.outputs()) < 64 << 10, "for small targets"


# ---- memory -------------------------------------------------------------------------------------


def test_a_kernel_that_reads_too_far_is_noticed():
    """The control for everything below: one more key, one more column than there is."""
    k = kernel("f32_all")
    case = make_case(k, Shape(lens_q=(3,), lens_kv=(9,), pse="one_row"))
    case.extra["seq_kv"] = 10
    with pytest.raises(Died):
        run_guarded(k, case, Way(WORDS_HERE[-1]))


@by_pair(*ALL)
@pytest.mark.parametrize("flush", ["left", "right"])
def test_every_edge(name, isa, flush):
    """Queries, keys and heads from 0 or 1 past any tile; bits and bytes of masks to the last."""
    k = kernel(name)
    for n in (*range(0, 10), 15, 17, 31, 33, 95, 97, 145):
        call = Shape(
            lens_q=(n + 1,),
            lens_kv=(n,),
            group=1 + n % 5,
            layout=LAYOUTS[n % 5],
            mode=(0, 1, 2, 3)[n % 4],
            mask="given",
            hidden=0.2,
            pse="full" if n % 2 else "one_row",
            keep_prob=0.5,
            bits=n % 3 > 0,
            stats_width=1 if n % 4 else 8,
            seed=n,
        )
        case = make_case(k, call)
        check(case, run_guarded(k, case, Way(isa, flush, strides=n % 6 == 5)), isa)


@by_pair("bf16_all")
def test_offsets_beyond_two_to_the_33_bytes(name, isa):
    """Two batches, two rows or two heads 16 GiB apart, in memory that is not there but for them."""
    k = kernel(name)
    far = (1 << 33) // 2
    call = Shape(lens_q=(2, 2), lens_kv=(2, 2), heads_kv=2, seed=5)
    case = make_case(k, call)
    want = run(k, case, isa)
    size = (far + 4096) * 2
    memory = map_pages(size, mmap.PROT_READ | mmap.PROT_WRITE, MAP_NORESERVE)
    try:
        for axis in range(3):
            stride = [0, 0, 0]
            small = [n for n in range(3) if n != axis]
            stride[small[1]], stride[small[0]], stride[axis] = k.dk, 2 * k.dk, far
            steps = (*(2 * s for s in stride), 2)
            place = np.lib.stride_tricks.as_strided(
                view(memory, (1,), case.dtype), case.args.key.shape, steps
            )
            place[...] = case.args.key
            changes = {"key": memory, "key_stride": tuple(stride)}
            assert_same(run(k, case, isa, **changes), want)
    finally:
        LIBC.munmap(memory, size)


def check_played(name: str, command: Sequence[str], isas: Sequence[str], seed: int, **env) -> None:
    """Calls of all kinds in another program, against the oracle."""
    k = kernel(name)
    number = {isa: k.constants[f"HL_ISA_{isa.upper()}"] for isa in isas}
    made, calls = [], []
    for call, way in various(name, seed, 40):
        case = make_case(k, call)
        known = expected(case.args)
        for isa in isas:
            outputs = case.outputs(stats=way.stats)
            args = k.args(**case.sizes(), isa=number[isa])
            mode = BY_TASK * way.by_task | FLUSH_LEFT * (way.flush == "left")
            calls.append((packed(args, mode, case.inputs(), outputs), outputs))
            made.append((case, isa, known))
    _, results = play(command, calls, **env)
    for (case, isa, known), got in zip(made, results, strict=True):
        check(case, got, isa, known=known)


@pytest.mark.parametrize("name", ["f32_all", "f16_none"])
def test_sanitizers(name):
    """Address and undefined-behaviour sanitizers, where every access is still there to be seen."""
    flags = ("-O0", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    built = program(text(name), kernel(name).name, compiler="gcc", flags=flags)
    check_played(name, (str(built),), WORDS_HERE, 9, env=sanitized_environment())


@pytest.mark.parametrize("name", ["f32_all", "f16_none", "bf16_all"])
def test_on_another_processor(name):
    """NEON and scalar code on an emulated 64-bit Arm, between guard pages too."""
    need_aarch64()
    built = program(text(name), kernel(name).name)
    check_played(name, (*QEMU, str(built)), ("scalar", "neon"), 5)


@pytest.fixture(scope="module")
def control() -> ctypes.CDLL:
    """Reads and writes the processor's floating-point control and status."""
    return ctypes.CDLL(str(bind.compile_c({"control.c": FLOAT_ENVIRONMENT})))


@by_pair("f32_all", "f16_none", "bf16_all")
def test_floating_point_state_is_left_alone(name, isa, control):
    """Control bits as before; for finite inputs no invalid operation and no division by zero, which
    some callers trap; and results are right with subnormal numbers flushed too."""
    k = kernel(name)
    for call, _ in various(name, 3, 12):
        plain = {"spread": "normal", "sinks": call.sinks.replace("infinite", "plain")}
        case = finite(make_case(k, dataclasses.replace(call, **plain)))
        known = expected(case.args)
        for mode in (DEFAULT, DEFAULT | FLUSH):
            outputs = case.outputs()
            plan, result = k.plan(**fields_of(k, case, isa), **outputs)
            assert result.ok, result.error_text
            workspace = np.zeros(plan.task_bytes, np.uint8)
            control.set_control(mode)
            for i in range(plan.n_tasks):
                k.task(plan, i, workspace)
            after = control.get_control()
            control.set_control(DEFAULT)
            assert mode & ~FLAGS == after & ~FLAGS
            assert after & INVALID_OR_ZERO_DIVIDE == 0, (hex(after), call)
            check(case, outputs, isa, known=known)


def finite(case: Case) -> Case:
    """Numbers in the place of NaN that nobody may read."""
    changes = {}
    for name in ("query", "key", "value", "pse"):
        tensor = getattr(case.args, name)
        if tensor is not None:
            changes[name] = np.where(
                np.isnan(tensor.astype(np.float32)), tensor.dtype.type(1), tensor
            )
    return case.changed(**changes)


@by_pair("f32_all")
def test_ends_are_read_once_and_no_further(name, isa):
    """Lists end with the last batch; the statistics with the last row."""
    k = kernel(name)
    for batch in (1, 2, 5):
        call = Shape(lens_q=(2,) * batch, lens_kv=(3,) * batch, layout=TND, mode=6, mask="formula")
        case = make_case(k, call)
        for flush in ("left", "right"):
            got = run_guarded(k, case, Way(isa, flush, by_task=True))
            check(case, got, isa)
            assert len(spans_of(case.args)) == batch and len(case.args.prefix) == batch


def test_bsh_is_the_memory_of_bsnd():
    k, case, fields = base("bsnd")
    want = run(k, case)
    outputs = case.outputs()
    assert k.run(**{**fields, **outputs, "input_layout": BSH}).ok
    assert_same(outputs, want)


@by_pair("f32_all", "bf16_all")
def test_what_was_in_the_workspace_enters_no_arithmetic(name, isa, control):
    """Scores that no row of a panel sees were not computed, but capped all the same: a signalling
    NaN of the workspace raised the invalid-operation flag, which some callers trap."""
    shape = Shape(lens_q=(60,), lens_kv=(60,), mode=3, mask="formula", softcap=5.0, seed=3)
    case = make_case(kernel(name), shape)
    k, outputs = kernel(name), case.outputs()
    fields = {**case.inputs(), **case.sizes(), **outputs, "isa": k.isas()[isa]}
    workspace = np.full(k.workspace_bytes(**fields) // 4, 0x7FA00000, np.uint32)
    control.set_control(DEFAULT)
    result = k.run(**fields, workspace=workspace)
    after = control.get_control()
    control.set_control(DEFAULT)
    assert result.ok and after & 1 == 0, hex(after)
    check(case, outputs, isa)
