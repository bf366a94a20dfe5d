"""The same for what stands beside the operators: routines that write and read rows of a cache, and
merge_parts. Every buffer flush left and flush right; each, moved by an element, is noticed."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import helpers_decode
import helpers_every as every
import numpy as np
import oracle
import pytest
from helpers import same_bits
from helpers_guard import FULL, note, tile_of
from helpers_memory import Arena, Died, in_child, survey
from oracle import BSND, PA_BSND

from gen import bind

CACHES = [
    name
    for name in every.HEADERS
    if every.description(name).record or every.description(name).decodes
]
ROUTINES = [(name, routine) for name in CACHES for routine in every.kernel(name).Rows]
MERGING = [name for name in every.HEADERS if every.kernel(name).parts]


@dataclass
class Rows:
    """A call of a routine: its inputs, the memory it writes (as it is before), its numbers."""

    name: str
    routine: str
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    sizes: dict[str, Any] = field(default_factory=dict)

    def placed(self, arena: Arena) -> dict[str, Any]:
        fields = {n: arena.place(x) for n, x in self.inputs.items()}
        for name, before in self.outputs.items():
            fields[name] = arena.room(before.shape, before.dtype)
            fields[name][...] = before
        arena.protect()
        return fields

    def call(self, isa: str, fields: dict[str, Any], **lies: Any) -> bind.Result:
        k = every.kernel(self.name)
        number = {} if self.routine == "convert" else {"isa": k.isas()[isa]}
        return getattr(k, self.routine)(**{**fields, **self.sizes, **number, **lies})

    def guarded(self, isa: str, flush: str) -> dict[str, np.ndarray]:
        with Arena(flush) as arena:
            fields = self.placed(arena)
            in_child(lambda: self.call(isa, fields)).check()
            arena.check()
            return {name: fields[name].copy() for name in self.outputs}


def memory_of(name: str, rows: int, block: int) -> int:
    """Bytes of so many records one after another, pages filled up but for the last."""
    of = every.description(name)
    record, dtype = oracle.RECORDS[of.kv], bind.DTYPES[of.dtype]
    size = record.bytes_of(record.fields, dtype)
    if not record.behind:
        return rows * size
    behind = record.bytes_of(record.behind, dtype)
    page = -(-block * (size + behind) // record.page_multiple) * record.page_multiple
    last = (rows - 1) // block
    return last * page + block * size + (rows - last * block) * behind if rows else 0


def of_records(name: str, routine: str, rows: int, i: int) -> Rows:
    """The i-th call with so many rows."""
    of = every.description(name)
    rng = np.random.default_rng(i)
    dtype = np.dtype(np.float32) if i % 2 else bind.DTYPES[of.dtype]
    paged = "BSND" not in of.layout_kv
    block = (1, 3, 16, 7)[i % 4]
    blocks = {"block_size": block if paged else 0}
    joined = i % 3 == 0
    nope = rng.standard_normal((rows, of.dk + of.rope * joined)).astype(dtype)
    rope = {} if joined else {"rope": rng.standard_normal((rows, of.rope)).astype(dtype)}
    count = memory_of(name, rows, block)
    memory = rng.integers(0, 120, count).astype(np.uint8)
    numbers = {"numbers_f32": i % 2}
    if routine == "quantise_rows":
        sizes = {"rows": rows, **numbers, **blocks, "power_of_2": i // 2 % 2}
        return Rows(name, routine, {"nope": nope, **rope}, {"records": memory}, sizes)
    if routine == "dequantise_rows":
        outputs = {"nope": np.zeros_like(nope), **{n: np.zeros_like(x) for n, x in rope.items()}}
        return Rows(
            name, routine, {"records": memory}, outputs, {"rows": rows, **numbers, **blocks}
        )
    if routine == "convert":
        sizes = {"rows": rows, "back": i % 2}
        return Rows(name, routine, {"from": memory}, {"to": np.zeros_like(memory)}, sizes)
    heads = 1 if paged else 1 + i % 2
    shape = (1, rows)
    new = {"nope": rng.standard_normal((*shape, heads, nope.shape[1])).astype(dtype)}
    if rope:
        new["rope"] = rng.standard_normal((*shape, heads, of.rope)).astype(dtype)
    first = i % 5
    total = first + rows
    sizes = {"batch": 1, "rows": rows, "heads_kv": heads, **numbers}
    new["positions"] = np.array([first], np.int32)
    new["lengths"] = np.array([rows], np.int32)
    if paged or i % 2:
        pages = max(-(-total // block), 1)
        new["block_table"] = rng.permutation(pages).astype(np.int32)
        count = memory_of(name, pages * block, block) if paged else 0
        sizes |= {"layout_kv": PA_BSND, "num_blocks": pages, "block_size": block}
        sizes["max_blocks"] = pages
        total = pages * block
    else:
        sizes |= {"layout_kv": BSND, "seq_kv": total}
    count = count if paged else total * heads * memory_of(name, 1, 1)
    return Rows(name, routine, new, {"key": np.zeros(count, np.uint8)}, sizes)


def of_decode(name: str, rows: int, i: int) -> Rows:
    """append to a cache of keys and values."""
    of, rng = every.description(name), np.random.default_rng(i)
    number = np.dtype(np.float32) if i % 2 else bind.DTYPES[of.dtype]
    formats_ = helpers_decode.formats_of(name)
    coded = formats_ != ("", "")
    heads, first, block = 1 + i % 2, i % 5, (1, 3, 16, 7)[i % 4]
    total = first + rows
    pages = max(-(-total // block), 1)
    paged = i % 3 > 0
    dtypes = [np.int8 if kind else bind.DTYPES[of.dtype] for kind in formats_]
    new = {
        n: rng.standard_normal((1, rows, heads, d)).astype(number)
        for n, d in (("key", of.dk), ("value", of.dv))
    }
    outer = (pages, block) if paged else (1, total)
    caches = {
        f"{n}_cache": np.zeros((*outer, heads, d), dtype)
        for n, d, dtype in zip(("key", "value"), (of.dk, of.dv), dtypes, strict=True)
    }
    new["positions"], new["lengths"] = np.array([first], np.int32), np.array([rows], np.int32)
    sizes = {"batch": 1, "rows": rows, "heads_kv": heads, "numbers_f32": i % 2}
    if paged:
        new["block_table"] = rng.permutation(pages).astype(np.int32)
        sizes |= {"layout_kv": PA_BSND, "num_blocks": pages, "block_size": block}
        sizes["max_blocks"] = pages
    else:
        sizes |= {"layout_kv": BSND, "seq_kv": total}
    outputs: dict[str, np.ndarray] = dict(caches)
    if coded:
        mode = i % 3
        sizes |= {"antiquant_mode": mode, "antiquant_f32": 1}
        sides = [d for d, kind in zip((of.dk, of.dv), formats_, strict=True) if kind]
        if mode == helpers_decode.TOKEN:
            width = outer[0] * outer[1] if paged else total
            outputs["token_scales"] = np.zeros((len(sides), width), np.float32)
        else:
            count = sum(1 if mode == helpers_decode.TENSOR else heads * d for d in sides)
            new["antiquant_scale"] = rng.uniform(0.01, 0.02, count).astype(np.float32)
            new["antiquant_offset"] = np.ones(count, np.float32)
    return Rows(name, "append", new, outputs, sizes)


def made(name: str, routine: str, rows: int, i: int) -> Rows:
    if every.description(name).decodes:
        return of_decode(name, rows, i)
    return of_records(name, routine, rows, i)


@dataclass(frozen=True)
class RowsJob:
    """A call on each instruction set, from both sides: the same bytes."""

    name: str
    routine: str
    rows: int
    i: int

    def __call__(self) -> int:
        call, calls, want = made(self.name, self.routine, self.rows, self.i), 0, None
        for isa in every.isas_in(self.name):
            for flush in ("right", "left"):
                got = call.guarded(isa, flush)
                want = want or got
                for name in got:
                    same = got[name].tobytes() == want[name].tobytes()
                    assert same, f"{isa} {flush}: other bytes of {name}"
                calls += 1
        return calls


@pytest.mark.parametrize("name,routine", ROUTINES)
def test_rows(name, routine):
    """0 rows .. past two tiles of keys, whole pages and parts of them, every type of number."""
    past = 2 * max(tile_of(name, isa).block for isa in every.isas_in(name)) + 1
    some = [RowsJob(name, routine, n, n + 5 * i) for n in range(past + 1) for i in range(12)]
    note("rows", f"{name}-{routine}", "all", survey(some if FULL else some[7 :: len(some) // 9]))


@pytest.mark.parametrize("name,routine", ROUTINES if FULL else ROUTINES[::4])
def test_every_buffer_of_rows_is_guarded(name, routine):
    """Each of them moved by an element into the page before it or behind it."""
    for i in range(0, 60 if FULL else 10, 5):  # by which append begins at its cache's first row
        call = made(name, routine, 9, i)
        for isa in every.isas_in(name)[-2 if FULL else -1 :]:
            for flush, side in (("right", 1), ("left", -1)):
                missed = lies(call, isa, flush, side)
                assert not missed, f"{i} {isa} {flush}: {missed}"


def lies(call: Rows, isa: str, flush: str, side: int) -> list[str]:
    """Names of buffers whose lie nobody noticed."""
    missed = []
    record = every.description(call.name).record
    with Arena(flush) as arena:
        fields = call.placed(arena)
        in_child(lambda: call.call(isa, fields)).check()
        for name in (*call.inputs, *call.outputs):
            step = fields[name].itemsize if record is None or step_free(name) else 4
            moved = {name: fields[name].ctypes.data + side * step}
            try:
                result = in_child(partial(call.call, isa, fields, **moved))
            except Died:
                continue
            refused = not result.ok and name in ("lengths", "positions", "block_table")
            if not refused and not in_part(call, name):
                missed.append(f"{name} {result.error_text}")
    return missed


def step_free(name: str) -> bool:
    """Whether a buffer holds numbers and no records, which are aligned to 4 bytes."""
    return name not in ("records", "from", "to", "key")


def in_part(call: Rows, name: str) -> bool:
    """Whether some page of the cache is appended to in part only: it may lie at either end."""
    whole = call.sizes["rows"] % (call.sizes.get("block_size") or 1) == 0
    return call.routine == "append" and name in call.outputs and not whole


# ---- merge_parts ---------------------------------------------------------------------------------


def part_fields(name: str, rows: int, heads: int, parts: int, seed: int) -> dict[str, Any]:
    """Results of several calls over parts of one context."""
    k, rng = every.kernel(name), np.random.default_rng(seed)
    shape = (parts, 1, 1, rows, heads) if not k.decodes else (parts, 1, heads, rows)
    return {
        "out": rng.standard_normal((parts, 1, rows, heads, k.dv)).astype(np.float32),
        "max": rng.standard_normal(shape).astype(np.float32),
        "sum": rng.uniform(0.0, 2.0, shape).astype(np.float32),
    }


def merge(
    name: str, flush: str, rows: int, heads: int, parts: int, lie: tuple[str, int] = ("", 0)
) -> dict[str, np.ndarray]:
    """merge_parts between guard pages: tables of pointers, every part, every result."""
    k = every.kernel(name)
    inputs = part_fields(name, rows, heads, parts, rows + heads)
    dtype = bind.DTYPES[every.description(name).dtype]
    with Arena(flush) as arena:
        fields: dict[str, Any] = {}
        for what, array in inputs.items():
            places = [arena.place(part).ctypes.data for part in array]
            if lie[0] == f"last {what}":
                places[-1] += lie[1]
            fields[what] = arena.place(np.array(places, np.uint64))
        outputs = {"attention_out": arena.room((1, rows, heads, k.dv), dtype)}
        for stat in bind.STATS:
            outputs[stat] = arena.room((rows * heads,), np.float32)
        arena.protect()
        sizes = {"parts": parts, "batch": 1, "seq_q": rows, "heads_q": heads, "heads_kv": 1}
        every_field = {**sizes, **{n: x.ctypes.data for n, x in (fields | outputs).items()}}
        if lie[0] in every_field:
            every_field[lie[0]] += lie[1]

        def call() -> int:
            args, error = k.Parts(), k.Error()
            for n, x in every_field.items():
                setattr(args, n, x)
            return k._c_merge_parts(bind.ctypes.byref(args), bind.ctypes.byref(error))

        assert in_child(call) == 0
        arena.check()
        return {n: x.copy() for n, x in outputs.items()}


@pytest.mark.parametrize("name", MERGING)
def test_merge_parts(name):
    """0 .. 9 rows, heads, 1 .. 5 parts; from both sides the same bits."""

    def job(rows: int, heads: int, parts: int) -> int:
        left, right = (merge(name, flush, rows, heads, parts) for flush in ("left", "right"))
        assert all(same_bits(left[n], right[n]) for n in left), (rows, heads, parts)
        return 2

    sizes = [(r, h, p) for r in range(10) for h in (1, 2, 3, 17) for p in range(1, 6)]
    some = [functools.partial(job, *size) for size in (sizes if FULL else sizes[3::29])]
    note("merge", name, "all", survey(some))


@pytest.mark.parametrize("name", MERGING if FULL else MERGING[-1:])
def test_every_buffer_of_merge_parts_is_guarded(name):
    """Its tables and each last part, too."""
    for flush, side in (("right", 1), ("left", -1)):
        for what, step in buffers_of_merge(name):
            merge(name, flush, 3, 2, 3)
            with pytest.raises(Died):
                merge(name, flush, 3, 2, 3, (what, side * step))


def buffers_of_merge(name: str) -> Iterator[tuple[str, int]]:
    item = bind.DTYPES[every.description(name).dtype].itemsize
    yield from (("out", 8), ("max", 8), ("sum", 8), ("attention_out", item))
    yield from ((f"last {what}", 4) for what in ("out", "max", "sum"))
    yield from ((stat, 4) for stat in bind.STATS)
