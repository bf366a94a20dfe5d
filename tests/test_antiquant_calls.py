"""sparse_flash_attention_antiquant: what a call promises beside its numbers. Bits that nothing
around a row changes, memory to the byte, and refusals of what can be wrong with a cache of
records."""

import ctypes
import dataclasses
import mmap
from typing import Any

import numpy as np
import pytest
from helpers import ISAS_HERE, SMALL_RECORDS, by_pair, by_way, kernel, same_bits
from helpers_cases import (
    INT_MAX,
    INT_MIN,
    Case,
    Shape,
    Way,
    make_case,
    packed,
    run,
    run_guarded,
    strided_records,
)
from helpers_memory import LIBC, MAP_NORESERVE, Died, map_pages, view
from oracle import BSND, PA_BSND, TND
from test_antiquant import EVERY, paged_only, shape_of
from test_bad_input import Bad, check_refused
from test_determinism import LONG, assert_same, batches, differs, execute
from test_properties import assert_close, merged, parts_of, with_shape

from gen.isa import ISAS

ROWS, PAGES = "bf16_i8_alone", "bf16_fp8_page"  # records of 108 bytes; of 128, 4 behind a page
HERE = Shape(
    lens_q=(2, 0, 1),
    lens_kv=(300, 9, 140),
    layout_q=TND,
    layout_kv=PA_BSND,
    block_size=16,
    sparse_mode=3,
    lists="blocks",
    list_length=200,
    sinks="plain",
    seed=17,
)
assert dataclasses.replace(HERE, lens_q=(), lens_kv=(), list_length=0, heads_kv=2, group=3) == (
    dataclasses.replace(LONG, lens_q=(), lens_kv=(), list_length=0)
)


# ---- determinism --------------------------------------------------------------------------------


@by_way(*SMALL_RECORDS)
def test_threads_task_order_and_partials(name, isa, group):
    k = kernel(name)
    heads = 1 if paged_only(name) else 2
    shape = dataclasses.replace(HERE, lists="none", group=group, heads_kv=heads)
    case = make_case(k, shape)
    want = run(k, case, isa, chunk_keys=128)
    for workers in (1, 3, 8):
        for partials in (False, True):
            got = execute(k, case, isa, order=workers, workers=workers, partials=partials)
            assert_same(got, want)
    assert differs(run(k, case, isa, chunk_keys=256), want), "the control did not change a bit"


@by_way("f16_i8_tails", "bf16_fp8_page")
def test_the_batch_around_a_row(name, isa, group):
    k = kernel(name)
    case = make_case(k, dataclasses.replace(HERE, group=group))
    want = run(k, case, isa, chunk_keys=128)
    ends = [0, *case.args.actual_seq_lengths_query]
    for order in ([0], [2], [2, 1, 0], [2, 2, 0, 1, 0]):
        got = run(k, batches(case, order), isa, chunk_keys=128)
        at = 0
        for b in order:
            n = ends[b + 1] - ends[b]
            mine, whole = slice(at, at + n), slice(ends[b], ends[b + 1])
            assert same_bits(got["attention_out"][mine], want["attention_out"][whole])
            assert same_bits(got["softmax_lse"][:, mine], want["softmax_lse"][:, whole])
            at += n


@by_way(*SMALL_RECORDS, few=2)
def test_where_pages_lie(name, isa, group):
    """The same pages anywhere in a larger pool."""
    k = kernel(name)
    case = make_case(k, dataclasses.replace(HERE, group=group))
    want = run(k, case, isa)
    a = case.args
    for seed in range(3):
        place = np.random.default_rng(seed).permutation(len(a.key) + 7)[: len(a.key)]
        used = (a.block_table >= 0) & (a.block_table < len(a.key))
        table = np.where(used, place[np.where(used, a.block_table, 0)], 2**31 - 1)
        pool = np.full((len(place) + 7, *a.key.shape[1:]), 0xFF, np.uint8)
        pool[place] = a.key
        moved = case.changed(key=pool, block_table=table.astype(np.int32))
        assert_same(run(k, moved, isa), want)


@by_way(*EVERY, few=1)
def test_the_cache_at_any_offset(name, isa, group):
    """At every multiple of what a record's widest number needs, those of 16 among them, whatever
    lies around it."""
    k = kernel(name)
    shape = shape_of(
        name, lens_q=(2,), lens_kv=(19,), group=group, block_size=5, lists="blocks", list_length=9,
        seed=5,
    )  # fmt: skip
    case = make_case(k, shape)
    key = case.inputs()["key"].reshape(-1)
    align = case.args.record.align(case.dtype)
    want = run(k, case, isa)
    memory = np.full(key.nbytes + 512, 0xFF, np.uint8)
    first = -memory.ctypes.data % 64
    for offset in sorted({*range(0, 66, align), *range(0, 256, 16)}):
        at = first + offset
        memory[...] = offset
        memory[at : at + key.nbytes] = key
        got = run(k, case, isa, key=memory[at : at + key.nbytes])
        assert_same(got, want)


@by_way(*SMALL_RECORDS, few=2)
def test_gaps_between_records_and_pages(name, isa, group):
    """Any strides that the records' alignment allows: the same bits."""
    k = kernel(name)
    for layout in (BSND, TND, PA_BSND):
        query = TND if layout == TND else BSND
        shape = shape_of(
            name, lens_q=(1, 2), lens_kv=(21, 30), heads_kv=2, group=group, layout_q=query,
            layout_kv=layout, block_size=7, seed=layout,
        )  # fmt: skip
        case = make_case(k, shape)
        want = run(k, case, isa)
        for seed in range(3):
            memory, strides = strided_records(np.random.default_rng(seed), case.args)
            assert_same(run(k, case, isa, key=memory, key_stride=strides), want)


@by_way("f16_i8_tails", "bf16_fp8_wide", "bf16_i8_alone", few=2)
@pytest.mark.parametrize("cuts", [[35], [20, 20, 50]])
def test_merged_parts_are_the_whole(name, isa, group, cuts):
    """A context in parts, a part without keys, a row without keys in any part; sinks."""
    k = kernel(name)
    shape = with_shape(
        group=group, sparse_mode=0, lens_kv=(70, 0), sinks="plain", pad_q=1, joined_q=True
    )
    case = make_case(k, shape)
    parts = parts_of(k, case, cuts, isa)
    got, whole = merged(k, case, parts), run(k, case, isa)
    if ISAS[isa].tiles:  # where P is rounded depends on the part's own maximum
        got, whole = ({n: one[n] for n in ("softmax_lse",)} for one in (got, whole))
    assert_close(got, whole, case.dtype)
    exact = merged(k, case, parts, out_f32=1)["attention_out"]
    assert same_bits(exact.astype(case.dtype), merged(k, case, parts)["attention_out"])


# ---- memory -------------------------------------------------------------------------------------


@by_pair(*SMALL_RECORDS)
@pytest.mark.parametrize("flush", ["left", "right"])
def test_no_byte_outside_the_cache_is_read(name, isa, flush):
    """The last record ends, or the first begins, at a page that may not be touched: few keys and
    many, every way through a block."""
    k = kernel(name)
    for n in (1, 2, 3, 7, 16, 17, 33, 49):
        for group in (1 + n % 3, 17):
            shape = shape_of(
                name, lens_q=(1,), lens_kv=(n,), group=group, block_size=1 + n % 5, spare_blocks=0,
                seed=n, lengths_given=False,
            )  # fmt: skip
            if paged_only(name) and n % shape.block_size:
                shape = dataclasses.replace(shape, lengths_given=True)
            case = make_case(k, shape)
            want = run(k, case, isa)
            assert_same(run_guarded(k, case, Way(isa, flush)), want)


@pytest.mark.parametrize("name", [ROWS, PAGES])
def test_a_cache_that_is_too_short_is_noticed(name):
    """The control: one byte less than a call needs."""
    k = kernel(name)
    shape = shape_of(name, lens_kv=(8,), block_size=4, spare_blocks=0)
    case = make_case(k, shape)
    run_guarded(k, case, Way("scalar"))
    case.extra["seq_kv" if name == ROWS else "num_blocks"] = 9
    table = None if name == ROWS else np.array([[0, 2]], np.int32)
    lens = np.array([9 if name == ROWS else 8], np.int32)
    with pytest.raises(Died):
        longer = case.changed(actual_seq_lengths_kv=lens, block_table=table)
        run_guarded(k, longer, Way("scalar"))


@by_pair(*SMALL_RECORDS)
def test_workspace_to_the_byte(name, isa):
    """What plan says is needed is enough (between guard pages elsewhere), one byte less is not; it
    does not grow with the context."""
    k = kernel(name)
    for group in (1, 4, 20):
        needs = set()
        for n in (1, 40, 700):
            case = make_case(k, shape_of(name, lens_kv=(n,), group=group))
            fields = {**case.inputs(), **case.sizes(), **case.outputs(), "isa": k.isas()[isa]}
            need = k.workspace_bytes(**fields)
            plan, result = k.plan(**fields)
            assert result.ok and plan.task_bytes == need
            needs.add(need)
        assert len(needs) == 1
        workspace = np.full(need, 0xFF, np.uint8)
        short = k.run(**fields, workspace=workspace, capacity=need - 1)
        assert (short.status_name, short.limit) == ("HL_ERR_WORKSPACE", need)
        assert (workspace == 0xFF).all()
        assert k.run(**fields, workspace=workspace).ok


@by_way(ROWS, PAGES, few=1)
def test_offsets_beyond_two_to_the_33_bytes(name, isa, group):
    """A cache of 16 GiB that is not there but for two pages, at its ends; and two far apart."""
    k = kernel(name)
    shape = Shape(lens_kv=(200,), layout_kv=PA_BSND, block_size=128, group=group, spare_blocks=0)
    case = make_case(k, shape)
    want = run(k, case, isa)
    memory, (page, row, head) = packed(case.args)
    page = page or memory[0].nbytes
    memory = np.concatenate([memory.reshape(-1), np.full(page, 0xFF, np.uint8)])
    pages = [memory[i * page : (i + 1) * page] for i in case.args.block_table[0]]
    count = (1 << 34) // page
    address = map_pages((count + 1) * page, mmap.PROT_READ | mmap.PROT_WRITE, MAP_NORESERVE)
    far = 1 << 33
    try:
        for stride, first, second in ((page, count - 1, 0), (far, 1, 0)):
            for place, one in ((first, pages[0]), (second, pages[1])):
                view(address + place * stride, one.shape, one.dtype)[...] = one
            more = {
                "key": address,
                "key_stride": (stride, row, head),
                "num_blocks": max(first, second) + 1,
                "block_table": np.array([[first, second]], np.int32),
            }
            assert_same(run(k, case, isa, **more), want)
    finally:
        LIBC.munmap(address, (count + 1) * page)


# ---- what a plan says ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [ROWS, PAGES])
def test_a_plan_fills_in_packed_strides(name):
    """In bytes: of a record, and of a page with what lies behind its rows and fills it up; those
    rows are as far apart as the call says."""
    k = kernel(name)
    case = make_case(k, Shape(lens_kv=(20,), layout_kv=PA_BSND, block_size=7, group=3))
    fields = {**case.inputs(), **case.sizes(), **case.outputs()}
    plan, result = k.plan(**fields)
    assert result.ok
    stride = plan.args.key_stride
    want = (7 * 108, 108, 108) if name == ROWS else (10 * 96, 128, 128)  # 7 * (128 + 4) = 924
    assert (stride.batch, stride.row, stride.head) == want
    wide, result = k.plan(**{**fields, "key_stride": (0, want[1] + 4, 0)})
    assert result.ok
    assert wide.args.key_stride.batch == (want[0] if name == ROWS else 10 * 96)
    wider, result = k.plan(**{**fields, "key_stride": (0, want[1] + 40, 0)})
    assert wider.args.key_stride.batch == (want[0] if name == ROWS else 13 * 96)
    assert plan.args.isa == k.isas()[ISAS_HERE[-1]]


@by_way(*SMALL_RECORDS, few=1)
def test_a_plan_is_plain_data(name, isa, group):
    k = kernel(name)
    case = make_case(k, dataclasses.replace(HERE, group=group))
    want, outputs = run(k, case, isa, chunk_keys=128), case.outputs()
    fields = {**case.inputs(), **case.sizes(), **outputs, "isa": k.isas()[isa]}
    plan, result = k.plan(**fields, chunk_keys=128)
    assert result.ok
    copy = type(plan)()
    ctypes.memmove(ctypes.addressof(copy), ctypes.addressof(plan), ctypes.sizeof(plan))
    ctypes.memset(ctypes.addressof(plan), 0xFF, ctypes.sizeof(plan))
    k.execute(copy)
    assert_same(outputs, want)


# ---- bad input ----------------------------------------------------------------------------------

PAGED = Shape(
    lens_q=(2, 1), lens_kv=(20, 9), group=4, layout_kv=PA_BSND, block_size=4, spare_blocks=2,
    lists="blocks", list_length=6, seed=1,
)  # fmt: skip
BASES = {
    "rows": (ROWS, dataclasses.replace(PAGED, layout_kv=BSND, heads_kv=2, pad_kv=1)),
    "tnd": (ROWS, dataclasses.replace(PAGED, layout_q=TND, layout_kv=TND, pad_kv=2)),
    "paged rows": (ROWS, dataclasses.replace(PAGED, heads_kv=2)),
    "tails": ("f16_i8_tails", dataclasses.replace(PAGED, heads_kv=2)),
    "pages": (PAGES, PAGED),
}


def base(name: str) -> tuple[Any, Case, dict[str, Any]]:
    """A call that is accepted: kernel, case and fields."""
    which, shape = BASES[name]
    k = kernel(which)
    case = make_case(k, shape)
    return k, case, {**case.inputs(), **case.sizes(), **case.outputs()}


def only(base_name: str, argument: str, value: int, limit: int) -> Bad:
    """A field that is 0 or one number."""
    change = {argument: value}
    return Bad(base_name, change, "UNSUPPORTED", argument, "EQUAL", (), value, limit)


def moved(argument: str, offset: int, limit: int, base_name: str) -> Bad:
    """A pointer that is off by some bytes."""
    return Bad(
        base_name,
        lambda fields: {argument: fields[argument].ctypes.data + offset},
        "ALIGN",
        argument,
        "MULTIPLE_OF",
        (),
        offset,
        limit,
    )


def steps(base_name: str, strides: tuple[int, int, int], rule: str, value: int, limit: int) -> Bad:
    change = {"key_stride": strides}
    return Bad(base_name, change, "SHAPE", "key_stride", rule, (), value, limit)


def over_the_cache(fields: dict[str, Any]) -> dict[str, Any]:
    return {"attention_out": fields["key"].ctypes.data}


SOME = np.zeros(64, np.float32)
TABLE = [
    *(only("rows", f"{n}_quant_mode", v, 2) for n in ("key", "value") for v in (1, 3, -1, INT_MIN)),
    *(only("pages", "quant_scale_repo_mode", v, 1) for v in (2, -1, INT_MAX)),
    *(only("rows", "tile_size", v, 32) for v in (1, 31, 33, 64, -32)),
    only("tails", "tile_size", 32, 10),
    *(only("rows", "rope_head_dim", v, 0) for v in (64, 1, -1)),
    *(only("pages", "rope_head_dim", v, 32) for v in (64, 31, -32)),
    *(
        Bad(base_name, {f"{n}_dequant_scale": SOME}, "UNSUPPORTED", f"{n}_dequant_scale", "NULL")
        for n in ("key", "value")
        for base_name in ("rows", "pages")
    ),
    Bad("rows", {"query_rope": SOME}, "UNSUPPORTED", "query_rope", "NULL"),
    # What lies behind the rows of a page is one a row.
    *(
        Bad("pages", {"heads_kv": v}, "SHAPE", "heads_kv", "EQUAL", (), v, 1)
        for v in (2, 4)
    ),
    *(
        Bad("pages", {"layout_kv": v}, "UNSUPPORTED", "layout_kv", "GENERATED", (), v)
        for v in (BSND, TND, 3, -1)
    ),
    Bad("rows", {"layout_kv": TND}, "UNSUPPORTED", "layout_kv", "PAIRED", (), TND, BSND),
    Bad("tnd", {"layout_kv": BSND}, "UNSUPPORTED", "layout_kv", "PAIRED", (), BSND, TND),
    # A record starts at a multiple of its widest number.
    *(moved("key", o, 4, "rows") for o in (1, 2, 3)),
    moved("key", 1, 2, "tails"),
    moved("key", 1, 2, "pages"),
    *(
        steps(base_name, strides, "MULTIPLE_OF", max(strides), limit)
        for base_name, limit, all_strides in (
            ("rows", 4, ((8191, 0, 0), (0, 218, 0), (0, 0, 110), (0, 217, 0))),
            ("tnd", 4, ((0, 218, 0), (0, 0, 109))),
            ("paged rows", 4, ((901, 0, 0),)),
            ("tails", 2, ((4097, 0, 0), (0, 105, 0), (0, 0, 53))),
            ("pages", 2, ((961, 0, 0), (0, 129, 0), (0, 0, 129))),
        )
        for strides in all_strides
    ),
    *(
        steps(base_name, strides, "AT_LEAST", -4, 0)
        for base_name in ("rows", "pages")
        for strides in ((-4, 0, 0), (0, -4, 0), (0, 0, -4))
    ),
    # Memory.
    *(Bad(b, {"key": None}, "NULL", "key", "NOT_NULL") for b in ("rows", "pages")),
    *(
        Bad(b, {"key_stride": (0, 2**62, 0)}, "SHAPE", "key", "ADDRESSABLE")
        for b in ("rows", "pages")
    ),
    *(
        Bad(
            base_name,
            lambda f, n=n: {n: f["key"].ctypes.data + f["key"].nbytes // 8 * 8 - 8},
            "ALIAS",
            n,
            "DISJOINT",
        )
        for base_name in ("rows", "pages")
        for n in ("softmax_max", "softmax_lse")
    ),
    *(
        Bad(b, over_the_cache, "ALIAS", "attention_out", "DISJOINT")
        for b in ("rows", "pages")
    ),
]  # fmt: skip


@pytest.mark.parametrize("bad", TABLE, ids=lambda bad: bad.id)
def test_refused(bad):
    k, _, fields = base(bad.base)
    check_refused(k, fields, bad)


@pytest.mark.parametrize("name", BASES)
def test_the_bases_are_accepted(name):
    """The control: each call of the table is fine but for the one change."""
    k, _, fields = base(name)
    result = k.run(**fields)
    assert result.ok and result.error_text == ""


def test_a_tnd_query_with_a_bsnd_cache_is_told_why():
    k, _, fields = base("tnd")
    sentence = k.run(**{**fields, "layout_kv": BSND}).error_text
    assert sentence == "layout_kv has to be paged (2), or laid out as the query is: 1; it is 0"


def test_value_overlaps_what_it_likes():
    """It is not read: its pointer may be that of an output."""
    k, case, fields = base("rows")
    want = run(k, case)
    assert k.run(**{**fields, "value": fields["attention_out"].ctypes.data + 1}).ok
    assert_same({n: fields[n] for n in want}, want)


@pytest.mark.parametrize("name", ["rows", "pages"])
def test_outputs_may_touch_the_cache(name):
    """The control of the alias checks: an output that begins where the last record ends, and what
    fills the last page up, belong to nobody."""
    k, case, fields = base(name)
    want = run(k, case)
    key, lse = fields["key"].reshape(-1), fields["softmax_lse"]
    pool = np.zeros(key.nbytes + lse.nbytes + 4, np.uint8)
    assert key.nbytes % 4 == 0
    pool[: key.nbytes] = key
    behind = pool[key.nbytes : key.nbytes + lse.nbytes].view(np.float32).reshape(lse.shape)
    assert k.run(**{**fields, "key": pool[: key.nbytes], "softmax_lse": behind}).ok
    assert same_bits(behind, want["softmax_lse"])
    one_less = pool[key.nbytes - 4 : key.nbytes - 4 + lse.nbytes].view(np.float32)
    result = k.run(**{**fields, "key": pool[: key.nbytes], "softmax_lse": one_less})
    assert (result.status_name, result.argument) == ("HL_ERR_ALIAS", "SOFTMAX_LSE")


@pytest.mark.parametrize("name", ["rows", "tnd", "pages"])
@pytest.mark.parametrize("size", ["batch", "seq_q", "heads_q"])
def test_nothing_to_do_needs_nothing(name, size):
    """An extent of 0: accepted, the cache may be anything, its alignment too."""
    k, case, fields = base(name)
    padding = size == "batch" and name == "tnd"  # every row is
    zero = {**fields, size: 0, "key": fields["key"] if padding else None}
    if size == "seq_q":
        zero["actual_seq_lengths_query"] = np.zeros(2, np.int32)
    before = {n: fields[n].tobytes() for n in case.outputs()}
    assert k.run(**zero, workspace=np.zeros(1 << 19, np.uint8)).ok
    if not padding:
        assert {n: fields[n].tobytes() for n in before} == before
