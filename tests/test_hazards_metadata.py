"""The hazard table (docs/hazards.md), cases 1 to 27: metadata, sizes and memory, for every shipped
header. Each test is named after its case's number."""

import itertools
import mmap
from typing import Any

import helpers_every as every
import helpers_hazards as hz
import numpy as np
import pytest
from helpers_cases import INT_MAX, INT_MIN
from helpers_hazards import (
    APPENDS,
    CACHES,
    DECODES,
    FLUSHES,
    FORWARD,
    HEADERS,
    NEGATIVE,
    RECORDS,
    SLOTS,
    SPARSE,
    TRAINS,
    append_refused,
    appending,
    args_of,
    changed,
    differs,
    limit_of,
    made,
    paged,
    refused,
    same,
    with_entry,
)
from helpers_memory import LIBC, MAP_NORESERVE, Arena, Died, in_child, map_pages, view
from oracle import TND

INT64_MAX, INT64_MIN = 2**63 - 1, -(2**63)


def every_header(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


# ---- 1 to 7: block tables -----------------------------------------------------------------------


@every_header(*CACHES)
def test_hazard_01_negative_block_id(name):
    """In any needed entry, first or last."""
    call = paged(name)
    table = args_of(call).block_table
    for at, value in itertools.product(((0, 0), (0, 4), (1, 0), (1, 2)), NEGATIVE):
        changes = {"block_table": with_entry(table, at, value)}
        refused(
            call, changes, "BLOCK_ID", "block_table", "AT_LEAST", position=at, value=value, limit=0
        )
    hz.accepted(call)


@every_header(*APPENDS)
def test_hazard_01_negative_block_id_of_new_rows(name):
    table = appending(name)["block_table"]
    for at, value in itertools.product(((0, 4), (1, 0)), NEGATIVE):
        append_refused(
            name, {"block_table": with_entry(table, at, value)}, "BLOCK_ID", "block_table"
        )
    assert every.kernel(name).append(**appending(name)).ok


@every_header(*CACHES)
def test_hazard_02_block_id_behind_the_last_block(name):
    call = paged(name)
    table, blocks = args_of(call).block_table, call.sizes()["num_blocks"]
    for at, value in itertools.product(((0, 0), (0, 4), (1, 2)), (blocks, blocks + 1, INT_MAX)):
        changes = {"block_table": with_entry(table, at, value)}
        expected = {"position": at, "value": value, "limit": blocks - 1}
        refused(call, changes, "BLOCK_ID", "block_table", "AT_MOST", **expected)
    last = with_entry(table, (1, 2), blocks - 1)
    hz.accepted(call, block_table=last)


@every_header(*APPENDS)
def test_hazard_02_block_id_behind_the_last_block_of_new_rows(name):
    fields = appending(name)
    blocks = fields["num_blocks"]
    for value in (blocks, INT_MAX):
        table = with_entry(fields["block_table"], (0, 4), value)
        append_refused(name, {"block_table": table}, "BLOCK_ID", "block_table")


def short_table(call: every.Call) -> np.ndarray:
    """The table cut off behind the last entry that the last batch needs."""
    table, size = args_of(call).block_table, call.sizes()["block_size"]
    batch = len(table)
    needed = -(-int(np.asarray(getattr(args_of(call), hz.lengths_argument(call.name)))[-1]) // size)
    return table.reshape(-1)[: (batch - 1) * table.shape[1] + needed].copy()


@every_header(*CACHES)
def test_hazard_03_entries_that_are_not_needed_are_not_read(name):
    """Nonsense between the batches' needed entries (helpers_cases.random_pages), and a forbidden
    page right behind the last one. The sweep: tests/test_memory.py and its like."""
    call = paged(name, (9, 14, 6))
    isas = every.isas_in(name)
    for isa, got in hz.between_pages(call, {"block_table": short_table(call)}, isas).items():
        same(got, call.run(isa), isa)
    with pytest.raises(Died):  # the control: one entry less than needed
        hz.between_pages(call, {"block_table": short_table(call)[:-1].copy()}, isas[:1])


@every_header(*CACHES)
def test_hazard_04_block_row_shorter_than_needed(name):
    call = paged(name)
    limit, argument = limit_of(call), hz.lengths_argument(name)
    for value in (limit + 1, limit + 4, INT_MAX):
        changes = {argument: np.array([20, value], np.int32)}
        expected = {"position": (1,), "value": value, "limit": limit}
        refused(call, changes, "LENGTH", argument, "AT_MOST", **expected)


@every_header(*APPENDS)
def test_hazard_04_new_rows_behind_the_last_page(name):
    limit = appending(name)["max_blocks"] * 4
    for first in (limit - 2, limit, INT_MAX, -1, INT_MIN):
        append_refused(name, {"positions": np.array([first, 2], np.int32)}, "LENGTH", "positions")


@every_header(*CACHES)
def test_hazard_05_the_last_tile_reads_no_further_table_entry(name):
    """Lengths around tiles and pages, the table flush with a forbidden page."""
    isas = every.isas_in(name)
    for keys, size in ((1, 1), (15, 16), (17, 16), (31, 7), (33, 5), (64, 48)):
        call = made(name, (keys,), layout_kv=2, block_size=size, seed=keys)
        for isa, got in hz.between_pages(call, {"block_table": short_table(call)}, isas).items():
            same(got, call.run(isa), (isa, keys, size))


def dealt_out(call: every.Call, size: int, seed: int) -> every.Call:
    """A paged call of one batch with the same keys in shuffled pages of another size."""
    a, sizes = args_of(call), call.sizes()
    length = int(np.asarray(getattr(a, hz.lengths_argument(call.name)))[0])
    blocks = -(-length // size)
    table = np.random.default_rng(seed).permutation(blocks + 2)[:blocks].astype(np.int32)[None]
    j = np.arange(length)
    old = a.block_table[0, j // sizes["block_size"]], j % sizes["block_size"]
    new = table[0, j // size], j % size
    changes: dict[str, Any] = {"block_table": table}
    for tensor in ("key", "key_rope", "value"):
        rows = getattr(a, tensor, None)
        if rows is not None:
            bytes_of = np.full((blocks + 2, size, *rows.shape[2:]), 0, rows.dtype)
            bytes_of.view(np.uint8)[...] = 0xFF
            bytes_of[new] = rows[old]
            changes[tensor] = bytes_of
    return changed(call, **changes)


@every_header(*CACHES)
def test_hazard_06_any_page_size(name):
    """1, 3, 7, 480: the same bits from each; the control, other keys, has others."""
    call = made(name, (50,), rows=3, layout_kv=2, block_size=16)
    for isa in every.isas_in(name):
        want = call.run(isa)
        for size in (1, 3, 7, 48, 130, 480):
            same(dealt_out(call, size, size).run(isa), want, (isa, size))
        if isa == "scalar":
            turned = dealt_out(call, 7, 1)
            table = args_of(turned).block_table
            assert differs(changed(turned, block_table=table[:, ::-1].copy()).run(isa), want)


@every_header(*CACHES)
def test_hazard_07_a_page_that_is_there_twice(name):
    """Shared by two sequences, and twice in one: the same bits as with copies of it."""
    call = paged(name, (12, 12), rows=1)
    a = args_of(call)
    table, copied = a.block_table.copy(), {}
    shares = (((1, 0), (0, 0)), ((1, 1), (0, 1)), ((0, 2), (0, 0)))
    table_shared = table.copy()
    for to, from_ in shares:
        table_shared[to] = table_shared[from_]
    for tensor in ("key", "key_rope", "value"):
        rows = getattr(a, tensor, None)
        if rows is not None:
            rows = rows.copy()
            for to, from_ in shares:
                rows[table[to]] = rows[table[from_]]
            copied[tensor] = rows
    assert len({int(table[at]) for pair in shares for at in pair}) == 5, "already shared"
    for isa in every.isas_in(name):
        shared = changed(call, block_table=table_shared).run(isa)
        same(shared, changed(call, **copied).run(isa), isa)
        assert differs(shared, call.run(isa)), "the control: the pages were the same anyway"


# ---- 8 to 11: lists -----------------------------------------------------------------------------

FLASH_MLA = (INT_MIN, -123456, -1, 114514, 1919810, 2147480000, INT_MAX)


def with_list(call: every.Call, ids: tuple[int, ...], slots: bool = False) -> every.Call:
    """A dense call in which every row has this list, -1 behind it."""
    a = args_of(call)
    row = np.full(max(len(ids), 8), -1, np.int32)
    row[: len(ids)] = ids
    lists = np.broadcast_to(row, (*a.query.shape[:-2], a.heads_kv, len(row))).copy()
    return changed(hz.filled(call), sparse_indices=lists, index_kind=int(slots))


@every_header(*SPARSE)
def test_hazard_08_ids_out_of_range(name):
    """Past the threshold: skipped. Negative: the list's end. With strict_lists all but -1 are
    errors, and name the entry."""
    keys = 20
    call = made(name, (keys,), rows=1)
    for bad in (*FLASH_MLA, keys, keys + 1, keys - 1):
        one = with_list(call, (3, bad, 7, keys - 1))
        without = with_list(call, (3,) if bad < 0 else (3, 7, keys - 1))
        for isa in every.isas_in(name):
            got = one.run(isa)
            one.check(got, isa)
            if bad != keys - 1:
                same(got, without.run(isa), (isa, bad))
        if bad in (-1, keys - 1):
            continue
        rule, limit = ("AT_LEAST", -1) if bad < 0 else ("AT_MOST", keys - 1)
        expected = {"position": (0, 1), "value": bad, "limit": limit}
        refused(one, {"strict_lists": 1}, "INDEX", "sparse_indices", rule, **expected)
    assert differs(with_list(call, (3, 7)).run(), with_list(call, (3, 8)).run())


@every_header(*SLOTS)
def test_hazard_08_slots_out_of_range(name):
    """Physical slots: whatever names none is a hole, anywhere in the list."""
    call = paged(name, (20,), rows=1)
    slots = call.sizes()["num_blocks"] * 4
    for bad in (*FLASH_MLA, slots, slots + 1):
        one = with_list(call, (3, bad, 7, slots - 1), slots=True)
        for isa in every.isas_in(name):
            got = one.run(isa)
            one.check(got, isa)
            same(got, with_list(call, (3, 7, slots - 1), slots=True).run(isa), (isa, bad))
        if bad != -1:
            refused(one, {"strict_lists": 1}, "INDEX", "sparse_indices", position=(0, 1))


@every_header(*SPARSE)
def test_hazard_09_ids_behind_this_sequence_or_its_causal_end(name):
    """Inside the buffer, but past this batch's length, or past row i's threshold: skipped."""
    for mode, rows in ((0, 1), (3, 3)):
        call = made(name, (9, 20), rows=rows, sparse_mode=mode)
        ids = np.random.default_rng(mode).permutation(20).astype(np.int32)
        whole = with_list(call, tuple(ids))
        lists = args_of(whole).sparse_indices.copy()
        for b, length in enumerate((9, 20)):
            for i in range(rows):
                limit = length - rows + i + 1 if mode == 3 else length
                kept = ids[ids < limit]
                lists[b, i, :, :] = -1
                lists[b, i, :, : len(kept)] = kept
        for isa in every.isas_in(name):
            got = whole.run(isa)
            whole.check(got, isa)
            same(got, changed(whole, sparse_indices=lists).run(isa), isa)
    refused(whole, {"strict_lists": 1}, "INDEX", "sparse_indices", "AT_MOST")


@every_header(*SPARSE)
def test_hazard_10_duplicates_and_any_order(name):
    """Counted as often as they are there, in the order of the list; an error with strict_lists."""
    call = made(name, (20,), rows=1)
    twice, once = with_list(call, (5, 2, 5, 9)), with_list(call, (5, 2, 9))
    for isa in every.isas_in(name):
        got = twice.run(isa)
        twice.check(got, isa)
        assert differs(got, once.run(isa)), "a duplicate did not count"
        unsorted = with_list(call, (19, 3, 11, 0, 7))
        unsorted.check(unsorted.run(isa), isa)
    refused(twice, {"strict_lists": 1}, "INDEX", "sparse_indices", "UNIQUE", position=(0, 2))
    assert once.kernel.run(**once.fields(), **once.outputs(), strict_lists=1).ok


def is_empty(got: dict[str, np.ndarray]) -> bool:
    """Out +0.0 in every bit, LSE -inf, as of rows that see no key."""
    lse = got.get("softmax_lse")
    return not got["attention_out"].view(np.uint8).any() and (lse is None or np.isneginf(lse).all())


@every_header(*SPARSE)
def test_hazard_11_lists_of_nothing(name):
    call = made(name, (20,), rows=2)
    for ids in ((), (INT_MIN,), (INT_MAX, 20, 21, 1 << 24)):
        for isa in every.isas_in(name):
            got = with_list(call, ids).run(isa)
            assert is_empty(got), (isa, ids)
            assert not got["softmax_sum"].any() and not got["softmax_max"].any()
    assert not is_empty(with_list(call, (19,)).run())
    if name in SLOTS:
        slots = paged(name, (20,), rows=2, lists="slots", list_length=4, list_lengths=True)
        none = changed(slots, sparse_lengths=np.zeros_like(args_of(slots).sparse_lengths))
        assert all(is_empty(none.run(isa)) for isa in every.isas_in(name))


# ---- 12 to 15: lengths --------------------------------------------------------------------------


def with_length(name: str, argument: str, value: int) -> tuple[every.Call, dict[str, Any], int]:
    """A call whose second batch has a bad length, how, and where."""
    if name in TRAINS:
        call = made(name, (20, 9), layout=TND)
        return call, {argument: with_entry(getattr(args_of(call), argument), 1, value)}, 1
    call = paged(name)
    given = getattr(args_of(call), argument)
    return call, {argument: with_entry(given, 1, value)}, 1


def length_arguments() -> list[tuple[str, str]]:
    made_of = []
    for name in HEADERS:
        if name in TRAINS:
            made_of += [(name, "actual_seq_qlen"), (name, "actual_seq_kvlen")]
        elif name in DECODES:
            made_of.append((name, "actual_seq_lengths"))
        else:
            made_of += [(name, "actual_seq_lengths_query"), (name, "actual_seq_lengths_kv")]
    return made_of


@pytest.mark.parametrize("name,argument", length_arguments())
def test_hazard_12_negative_length(name, argument):
    for value in NEGATIVE:
        call, changes, at = with_length(name, argument, value)
        expected = {"position": (at,), "value": value}
        refused(call, changes, "LENGTH", argument, "AT_LEAST", **expected)


@every_header(*APPENDS)
def test_hazard_12_negative_length_of_new_rows(name):
    for value in NEGATIVE:
        append_refused(name, {"lengths": np.array([3, value], np.int32)}, "LENGTH", "lengths")


@every_header(*SLOTS)
def test_hazard_12_negative_length_of_lists(name):
    call = paged(name, (20,), rows=1, lists="slots", list_length=4, list_lengths=True)
    for value in (*NEGATIVE, 5, INT_MAX):
        lengths = np.full_like(args_of(call).sparse_lengths, value)
        refused(call, {"sparse_lengths": lengths}, "LENGTH", "sparse_lengths", value=value)


@pytest.mark.parametrize("name,argument", length_arguments())
def test_hazard_13_length_beyond_the_capacity(name, argument):
    """One more than there is room for, and the largest numbers."""
    for value in (INT_MAX, INT_MAX - 1, 1000):
        call, changes, at = with_length(name, argument, value)
        expected = {"position": (at,), "value": value}
        refused(call, changes, "LENGTH", argument, "AT_MOST", **expected)
    if name in TRAINS:
        refused(call, {argument: with_entry(changes[argument], 1, INT64_MAX)}, "LENGTH", argument)


@every_header(*APPENDS)
def test_hazard_13_more_new_rows_than_there_are(name):
    for value in (4, INT_MAX):
        append_refused(name, {"lengths": np.array([3, value], np.int32)}, "LENGTH", "lengths")


@every_header(*HEADERS)
def test_hazard_14_extents_of_zero(name):
    """No batch, no row: nothing to do, every pointer may be NULL. No key: rows of zeros, and the
    cache may be NULL."""
    k = every.kernel(name)
    call, plain = made(name, (0,), rows=2), made(name, (8,), rows=1)
    no_cache = {}
    if args_of(call).key.size == 0:  # a pool of pages is there even if nobody has one
        no_cache = dict.fromkeys(set(hz.pointers(name)) & {"key", "key_rope", "value"})
    for isa in every.isas_in(name):
        got = call.run(isa, **no_cache)
        assert is_empty(got) if not call.grads else not got["dquery"].any(), isa
        assert not is_empty(plain.run(isa)) if not call.grads else True
    fields = {**plain.fields(), **plain.outputs()}
    numbers = {n: v for n, v in fields.items() if not isinstance(v, np.ndarray)}
    result = k.run(**{**numbers, "batch": 0}, workspace=None, capacity=0)
    assert result.ok, result
    if name not in DECODES:  # seq_q 0 is 1 there
        by_query = ("query", "query_rope", "attention_out", "dout", "dquery", "dpse")
        without = {n: v for n, v in fields.items() if n not in by_query}
        if "actual_seq_lengths_query" in without:
            without["actual_seq_lengths_query"] = np.zeros(1, np.int32)
        if name in hz.GRADS:  # gradients of keys that nobody sees: zeros
            assert k.run(**{**without, "seq_q": 0}).ok
            assert not fields["dkey"].any() and not fields["dvalue"].any()
        else:
            result = k.run(**{**without, "seq_q": 0}, workspace=None, capacity=0)
            assert result.ok, result
    if name in SPARSE:
        assert k.run(**{**plain.fields(), **plain.outputs(), "heads_q": 0}).ok
    if name in TRAINS:  # the operator's head_num is required
        refused(plain, {"heads_q": 0}, "SHAPE", "heads_q", "AT_LEAST", limit=1)


def ends_arguments() -> list[tuple[str, str]]:
    tnd = [n for n in SPARSE if "TND" in every.description(n).layout_kv]
    sparse = [(n, a) for n in tnd for a in ("actual_seq_lengths_query", "actual_seq_lengths_kv")]
    return sparse + [(n, a) for n in TRAINS for a in hz.ENDS.values()]


@pytest.mark.parametrize("name,argument", ends_arguments())
def test_hazard_15_ends_that_fall_or_go_too_far(name, argument):
    """Ends of sequences end to end, the first of which is the first sequence's (there is no leading
    0): they must not fall, the last must not be past the rows there are. Rows behind it are
    nobody's and become 0."""
    more = {"layout": TND} if name in TRAINS else {"layout_kv": TND}
    call = made(name, (20, 9, 5), **more)
    ends = getattr(args_of(call), argument)
    total = int(ends[-1])
    first, second = int(ends[0]), int(ends[1])
    for at, value in ((1, first - 1), (1, -5), (2, second - 1), (2, total + 1), (0, -1)):
        refused(call, {argument: with_entry(ends, at, value)}, "LENGTH", argument)
    if (
        argument.endswith(("query", "qlen")) and name in FORWARD
    ):  # the last row belongs to nobody now
        shorter = changed(call, **{argument: with_entry(ends, 2, total - 1)})
        for isa in every.isas_in(name):
            got = shorter.run(isa)
            assert not got["attention_out"][-1].view(np.uint8).any()
            same_but = call.run(isa)["attention_out"][: total - 2]
            assert got["attention_out"][: total - 2].tobytes() == same_but.tobytes()


# ---- 16 to 21: shapes ---------------------------------------------------------------------------


@every_header(*HEADERS)
def test_hazard_16_heads_that_do_not_divide(name):
    call = made(name, (8,), rows=1, heads=6)
    for heads_q, heads_kv in ((6, 4), (6, 7), (1, 2), (7, 6)):
        changes = {"heads_q": heads_q, "heads_kv": heads_kv}
        refused(call, changes, "SHAPE", "heads_q", "MULTIPLE_OF", value=heads_q, limit=heads_kv)
    for argument, value in itertools.product(("heads_q", "heads_kv"), NEGATIVE):
        refused(call, {argument: value}, "SHAPE", argument, "AT_LEAST")
    k, d = every.kernel(name), every.description(name)
    assert (k.dk, k.dv) == (d.dk, d.dv), "channels are the header's, no argument says otherwise"


@every_header(*HEADERS)
def test_hazard_17_more_causal_rows_than_keys(name):
    """Aligned at the bottom right: the first rows see nothing."""
    rows, keys = 7, 3
    more = {"mode": 3, "mask": "formula"} if name in TRAINS else {"sparse_mode": 3}
    call = made(name, (keys,), rows=rows, **({} if name in DECODES else more))
    for isa in every.isas_in(name):
        got = call.run(isa)
        call.check(got, isa)
        out = got["dquery" if call.grads else "attention_out"]
        if not call.grads:  # there 0 may be -0: it is multiplied by the scale
            assert not out[:, : rows - keys].view(np.uint8).any(), isa
        assert not out[:, : rows - keys].any(), isa
        assert all(out[:, i].any() for i in range(rows - keys + 1, rows)), isa


@every_header(*hz.with_feature("window"))
def test_hazard_18_extreme_windows(name):
    """0 is no window; the largest is none either, without overflow; negative ones are refused."""
    call = made(name, (20,), rows=5)
    for isa in every.isas_in(name):
        want = call.run(isa)
        for window in (20, 21, INT_MAX - 1, INT_MAX):
            same(call.run(isa, window=window), want, (isa, window))
        assert differs(call.run(isa, window=3), want)
    for window in NEGATIVE:
        refused(call, {"window": window}, "SHAPE", "window", "AT_LEAST", limit=0)


@every_header(*TRAINS)
def test_hazard_18_extreme_bands(name):
    """pre_tokens and next_tokens of any sign and size, against the oracle's whole numbers."""
    ends = (INT64_MIN, -(2**40) - 1, -(2**31), -30, 0, 30, 2**31 - 1, 2**62, INT64_MAX)
    for n, band in enumerate(itertools.product(ends, ends)):
        call = made(name, (20,), rows=9, heads=1, mode=4 * (n % 2), mask="formula", band=band)
        isa = every.isas_in(name)[n % len(every.isas_in(name))]
        if not call.grads:
            assert isinstance(args_of(call).pre_tokens, int)
        got = call.run(isa)
        if n % 7 == 0:
            call.check(got, isa)
        out = got["dvalue" if call.grads else "attention_out"]
        assert np.isfinite(out.astype(np.float64)).all()


FAR = 1 << 33  # bytes


@every_header(*HEADERS)
def test_hazard_19_offsets_beyond_two_to_the_31_elements(name):
    """Two pages (or batches) 8 GiB apart, in memory that is not there but where they lie."""
    if name in TRAINS:
        call = made(name, (20, 20))
    else:
        call = paged(name, (8,), rows=1)
        table = args_of(call).block_table.copy()
    key = call.inputs()["key"]
    packed = call.kernel.plan(**call.fields(), **call.outputs())[0].args.key_stride
    apart = 2 if name in TRAINS else call.sizes()["num_blocks"]
    element = 1 if name in RECORDS else key.itemsize
    stride = (FAR // element, packed.row, packed.head)
    size = apart * FAR
    address = map_pages(size, mmap.PROT_READ | mmap.PROT_WRITE, MAP_NORESERVE)
    try:
        memory, step = key.reshape(-1).view(np.uint8), packed.batch * element
        for i in range(apart):
            page = memory[i * step : (i + 1) * step]
            view(address + i * FAR, page.shape, page.dtype)[...] = page
        for isa in every.isas_in(name):
            got = call.run(isa, key=address, key_stride=stride)
            same(got, call.run(isa), isa)
            if name not in TRAINS and isa == "scalar":  # the control: other pages, other bits
                assert differs(call.run(isa, block_table=table[:, ::-1].copy() % 2), got)
    finally:
        LIBC.munmap(address, size)


@every_header(*HEADERS)
def test_hazard_20_sizes_that_do_not_fit_in_memory(name):
    """A product past the address space is refused, and the argument named."""
    call = made(name, (8,), rows=1)
    lengths = {
        n: None for n in hz.pointers(name) if n.startswith("actual_seq") and "PA" not in str(n)
    }
    stride = {"query_stride": (2**62, 0, 0), "batch": 2}
    if name in CACHES and "BSND" not in every.description(name).layout_kv:
        lengths = {}
        stride["batch"] = 1
        stride["query_stride"] = (0, 2**62, 0)
        stride["seq_q"] = 3
        lengths = {"actual_seq_lengths_query": None}
    refused(call, {**lengths, **stride}, "SHAPE", "query", "ADDRESSABLE")
    if name in TRAINS:
        big = {"batch": INT_MAX, "seq_q": 2**26, "seq_kv": 2**26, "heads_q": 2, "heads_kv": 1}
    elif name in DECODES:
        big = {"batch": INT_MAX, "seq_kv": INT_MAX, "heads_q": 65536, "heads_kv": 65536}
    else:
        big = {"batch": INT_MAX, "seq_q": INT_MAX, "heads_q": 128}
    if name not in RECORDS or "BSND" in every.description(name).layout_kv:
        refused(call, {**lengths, **big}, "SHAPE", "", "ADDRESSABLE")


@every_header(*HEADERS)
def test_hazard_21_strides(name):
    """Negative: refused. Gaps anywhere: the bits of packed tensors. 0 is packed: a broadcast cannot
    be said. Rows of an output that would overlap: refused."""
    call = made(name, (8, 8), rows=2, heads=2)
    outs = ("dquery", "dkey", "dvalue") if call.grads else ("out",)
    tensors = ["query", "key", *outs] + (["value"] if name not in RECORDS else [])
    for tensor, bad in itertools.product(tensors, ((-1, 0, 0), (0, -1, 0), (0, 0, -8))):
        refused(call, {f"{tensor}_stride": bad}, "SHAPE", f"{tensor}_stride", "AT_LEAST", limit=0)
    k = every.kernel(name)
    channels = {"out": k.dv, "dquery": k.dk, "dkey": k.dk, "dvalue": k.dv}
    for tensor in outs:
        heads = 1 if tensor in ("dkey", "dvalue") else 2
        row = heads * channels[tensor]
        overlapping = [(0, row - 1, 0), (2 * row - 1, 0, 0)]
        overlapping += [(0, 0, channels[tensor] - 1)] if heads > 1 else []
        for bad in overlapping:
            refused(call, {f"{tensor}_stride": bad}, "SHAPE", f"{tensor}_stride", "AT_LEAST")
    for isa in every.isas_in(name):
        same(call.guarded(isa, strides=True), call.run(isa), isa)


# ---- 22, 23: where memory lies ------------------------------------------------------------------


def neighbours(first: np.ndarray, second: np.ndarray, shared: int) -> tuple[np.ndarray, ...]:
    """Fresh memory in which the last `shared` bytes of one array are the first of another; the two
    places, and all of it."""
    pool = np.zeros(first.nbytes + second.nbytes + 128, np.uint8)
    at = first.nbytes + (-(pool.ctypes.data + first.nbytes)) % 64  # where the second one begins
    begin = at + shared - first.nbytes
    places = []
    for array, start in ((first, begin), (second, at)):
        place = pool[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        places.append(place)
    return (*places, pool)


def overlap_pairs(call: every.Call) -> list[tuple[str, str]]:
    """Every output with every other argument."""
    outputs, inputs = tuple(call.outputs()), tuple(call.inputs())
    return [(o, n) for o in outputs for n in (*inputs, *outputs) if n != o]


@every_header(*HEADERS)
def test_hazard_22_outputs_overlap_nothing(name):
    """One shared element, at either end, of every output with every input and every other output:
    refused, nothing written. Side by side: fine, and the same bits."""
    for call in hz.full(name):
        k, fields = call.kernel, {**call.fields(), **call.outputs()}
        want = call.run()
        for output, other in overlap_pairs(call):
            a, b = fields[output], fields[other]
            shared = max(a.itemsize, b.itemsize, 4 if name in RECORDS else 1)
            for turned, n in itertools.product((False, True), (shared, 0)):
                first, second, pool = neighbours(*((b, a) if turned else (a, b)), n)
                out, in_ = (second, first) if turned else (first, second)
                out.view(np.uint8)[...] = 0xFF
                in_[...] = b
                before = pool.tobytes()
                result = k.run(**{**fields, output: out, other: in_})
                if n:
                    assert result.status_name == "HL_ERR_ALIAS", (output, other, result)
                    assert result.argument in (output.upper(), other.upper())
                    assert pool.tobytes() == before
                else:
                    assert result.ok, (output, other, result)
                    assert out.tobytes() == want[output].tobytes(), (output, other)


@every_header(*HEADERS)
def test_hazard_22_workspace_and_partials_overlap_nothing(name):
    """...with any argument, at either end; and with each other."""
    call = hz.full(name)[0]
    k, fields = call.kernel, {**call.fields(), **call.outputs()}
    need = k.workspace_bytes(**fields)
    scratch = np.zeros(need, np.uint8)
    splits = "partials" in hz.pointers(name)
    for argument, array in {**call.inputs(), **call.outputs()}.items():
        for turned, n in itertools.product((False, True), (8, 0)):
            pair = (array, scratch) if turned else (scratch, array)
            first, second, pool = neighbours(*pair, n)
            work, moved = (second, first) if turned else (first, second)
            moved[...] = array
            before = pool.tobytes()
            places = {**fields, argument: moved}
            result = k.run(**places, workspace=work)
            assert result.ok == (n == 0), (argument, result)
            if n:
                assert result.status_name == "HL_ERR_ALIAS" and pool.tobytes() == before, argument
                if splits:
                    more = {"partials": work.ctypes.data, "partials_bytes": work.nbytes}
                    assert k.plan(**places, **more)[1].status_name == "HL_ERR_ALIAS", argument
    if splits:
        more = {"partials": scratch.ctypes.data, "partials_bytes": scratch.nbytes}
        result = k.run(**fields, **more, workspace=scratch)
        assert result.status_name == "HL_ERR_ALIAS"


NOT_READ = {  # pointers that have to be NULL in these headers, or that are not read
    "partials": "its own test",
    "key_dequant_scale": "reserved",
    "value_dequant_scale": "reserved",
    "key_pages": "the feature pages",
    "value_pages": "the feature pages",
    "dequant_scale1": "queries of int8",
    "quant_scale1": "queries of int8",
    "dequant_scale2": "queries of int8",
}


@every_header(*HEADERS)
def test_hazard_22_every_pointer_is_tried(name):
    """The control of the two tests above: what they leave out has to be NULL."""
    tried = {n for call in hz.full(name) for n in (*call.inputs(), *call.outputs())}
    left = set(hz.pointers(name)) - tried - {"partials"}
    call = made(name, (8,), rows=1)
    for argument in left:
        if name in RECORDS and argument == "value":
            continue  # documented: not read
        if argument == "actual_seq_lengths_query" or argument == "dropout_state":
            raise AssertionError(f"{argument} is read but not tried")
        some = [64] if argument.endswith("_pages") else 64
        result = call.kernel.plan(**{**call.fields(), **call.outputs(), argument: some})[1]
        assert result.status_name == "HL_ERR_UNSUPPORTED", (argument, result)
        assert argument in NOT_READ or result.rule in ("NULL", "GENERATED"), argument


@every_header(*HEADERS)
def test_hazard_23_misaligned_pointers(name):
    """Every pointer at every offset that is no multiple of its element: refused, unwritten."""
    for call in hz.full(name):
        for argument, array in {**call.inputs(), **call.outputs()}.items():
            size = 1 if name in RECORDS and argument in ("key", "value") else array.itemsize
            for off in (o for o in range(1, 16) if o % size):
                address = array.ctypes.data + off
                expected = {"value": off % size, "limit": size}
                refused(call, {argument: address}, "ALIGN", argument, "MULTIPLE_OF", **expected)


@every_header(*HEADERS)
def test_hazard_23_no_alignment_but_the_elements(name):
    """All arguments and the workspace at every such offset of a cache line: the same bits."""
    call = hz.full(name)[0]
    for isa in every.isas_in(name):
        fields, want = {**call.fields(isa), **call.outputs()}, call.run(isa)
        need = call.kernel.workspace_bytes(**fields)
        for off in (1, 2, 4, 6, 8, 12, 16, 20, 34, 40, 52, 60, 62, 63):
            moved = {}
            for n, array in fields.items():
                if not isinstance(array, np.ndarray):
                    continue
                size = record_align(name) if n == "key" and name in RECORDS else array.itemsize
                pool = np.zeros(array.nbytes + 128, np.uint8)
                start = -pool.ctypes.data % 64 + off // size * size
                moved[n] = pool[start : start + array.nbytes].view(array.dtype)
                moved[n] = moved[n].reshape(array.shape)
                moved[n][...] = array
            pool = np.zeros(need + 128, np.uint8)
            start = -pool.ctypes.data % 64 + off
            workspace = pool[start : start + need]
            result = call.kernel.run(**{**fields, **moved}, workspace=workspace)
            assert result.ok, (off, result)
            same({n: moved[n] for n in want}, want, (isa, off))


def record_align(name: str) -> int:
    """What a cache of records has to be aligned to: its widest number."""
    return {"i8_656": 4, "fp8_656": 4, "fp8_v4": 2}[every.description(name).kv]


# ---- 25 to 27 -----------------------------------------------------------------------------------


@every_header(*HEADERS)
def test_hazard_25_workspace_to_the_byte(name):
    """One byte less, none, or NULL: refused. The exact size between forbidden pages: enough."""
    call = made(name, (20,), rows=2)
    k, fields = call.kernel, {**call.fields(), **call.outputs()}
    need = k.workspace_bytes(**fields)
    room = np.full(need, 0xC3, np.uint8)
    before = hz.images(fields)
    for capacity in (0, 1, need - 1):
        result = k.run(**fields, workspace=room, capacity=capacity)
        assert (result.status_name, result.argument) == ("HL_ERR_WORKSPACE", "WORKSPACE")
        assert (result.value, result.limit) == (capacity, need)
    result = k.run(**fields, workspace=None, capacity=need)
    assert (result.status_name, result.argument) == ("HL_ERR_NULL", "WORKSPACE")
    assert hz.images(fields) == before and (room == 0xC3).all()
    for isa, flush in itertools.product(every.isas_in(name), FLUSHES):
        same(call.guarded(isa, flush), call.run(isa), (isa, flush))


@every_header(*CACHES)
def test_hazard_26_untrusted_indices_and_tables(name):
    """Whatever whole numbers lists, tables and lengths hold: refused, or nothing but the tensors is
    read; nothing has to be switched on for that, and nothing switches it off."""
    calls = [paged(name, (20, 9), rows=2)]
    if name in SPARSE:
        calls = [paged(name, (20, 9), rows=2, lists="blocks", list_length=9)]
        calls += [paged(name, (20, 9), lists="slots", list_lengths=True)] * (name in SLOTS)
    rng = np.random.default_rng(26)
    with Arena() as arena:
        jobs = []
        for call in calls:
            inputs = {n: arena.place(a) for n, a in call.inputs().items()}
            jobs.append((call, inputs, call.outputs(arena)))
        room = arena.room((1 << 20,), np.uint8)
        isas = every.kernel(name).isas().values()

        def attempts() -> tuple[int, int]:
            counts = [0, 0]
            for call, inputs, outputs in jobs:
                whole = [n for n, a in inputs.items() if a.dtype == np.int32]
                original = {n: inputs[n].copy() for n in whole}
                for _ in range(60):
                    for n in whole:
                        inputs[n][...] = original[n]
                    for n in rng.choice(whole, rng.integers(1, 3)):
                        scribble(rng, inputs[n])
                    for isa in isas:
                        fields = {**call.sizes(), **inputs, **outputs, "isa": isa}
                        counts[call.kernel.run(**fields, workspace=room).ok] += 1
            return tuple(counts)

        no, yes = in_child(attempts, name)
        arena.check()
    assert no > 0 and yes > 0, "all refused or all accepted: nothing was tried"
    assert "UNCHECKED" not in every.text(name) and "NO_CHECK" not in every.text(name)


NASTY = np.array([INT_MIN, INT_MAX, -1, -2, 0, 1, 5, 19, 20, 21, 1 << 24, -123456], np.int64)


def scribble(rng: np.random.Generator, array: np.ndarray) -> None:
    """Some elements replaced by numbers that could hurt."""
    flat = array.reshape(-1)
    for at in rng.integers(0, flat.size, rng.integers(1, 4)):
        flat[at] = rng.choice(NASTY)


@every_header(*HEADERS)
def test_hazard_27_the_cost_is_known_before(name):
    """plan says how many multiply-adds and tasks a call has and how much workspace, without reading
    a tensor: a caller refuses what is too much. Legal sizes of any size do not overflow it."""
    k, costs = every.kernel(name), []
    for keys in (10, 20, 1000):
        call = made(name, (keys,), rows=2)
        plan, result = k.plan(**call.fields(), **call.outputs())
        assert result.ok
        pairs = 2 * keys * call.sizes()["heads_q"]
        assert plan.work >= pairs * (k.dk + k.dv) and plan.n_tasks >= 1
        costs.append((plan.work, plan.task_bytes))
    assert costs[0][0] < costs[1][0] < costs[2][0]
    assert len({room for _, room in costs}) == 1, "the workspace does not depend on the keys"
    huge = made(name, (8,), rows=1)
    sizes = {**huge.sizes(), "batch": 1}
    most = 2**24
    if name in TRAINS:
        sizes |= {"seq_q": most, "seq_kv": most}
    elif name in DECODES or "BSND" in every.description(name).layout_kv:
        sizes |= {"seq_kv": most}
    else:
        sizes |= {"num_blocks": 1, "max_blocks": 1, "block_size": most}
    places = {}
    for i, n in enumerate(n for n in hz.pointers(name) if n in {**huge.inputs(), **huge.outputs()}):
        places[n] = (i + 1) << 40  # nothing is there, and nothing is read there
    for n in hz.pointers(name):
        if n.startswith("actual_seq") or n == "block_table":
            places[n] = None
    if sizes.get("layout_kv") == 2:
        places["block_table"] = np.zeros((1, 1), np.int32)
    places = {n: p for n, p in places.items() if p is not None}
    plan, result = k.plan(**sizes, **places)
    assert result.ok, result
    assert plan.work >= most
