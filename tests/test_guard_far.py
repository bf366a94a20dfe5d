"""Hazard 19: offsets above 2^31 elements and 2^33 bytes, in memory that is not there but for the
pages that a call touches. Every shipped header, layout and instruction set.

A small call is made twice: on ordinary memory, and with its tensors far apart, or as the last batch
or the last rows of a call that is too large to be made, of which only the last tasks are run.
"""

import functools
import math
import mmap
from collections.abc import Iterator
from functools import partial
from typing import Any

import helpers_cases
import helpers_decode
import helpers_every as every
import helpers_fusion
import numpy as np
import pytest
from helpers import same_bits
from helpers_guard import FULL, note
from helpers_memory import LIBC, MAP_NORESERVE, Died, Survey, in_child, view
from oracle import BSND, PA_BSND, SLOTS, TND

from gen import bind

FAR = 1 << 33  # bytes
Outputs = dict[str, np.ndarray]
SLICE = (
    "hl_sparse_flash_attention_bf16_d128_rope64",
    "hl_sparse_flash_attention_antiquant_bf16_fp8_v4_d448_rope64_slots",
    "hl_incre_flash_attention_bf16_i8_d128",
    "hl_fusion_attention_f32_d64_pse_types_softcap_sinks",
    "hl_fusion_attention_grad_bf16_d128",
)
SOME = [(name, every.isas_in(name)[-1]) for name in SLICE]
BY_PAIR = pytest.mark.parametrize("name,isa", every.pairs() if FULL else SOME)


class Sparse:
    """Memory by the terabyte, zero wherever nothing was written."""

    def __init__(self) -> None:
        self.maps: list[tuple[int, int]] = []

    def __enter__(self) -> "Sparse":
        return self

    def __exit__(self, *exc: object) -> None:
        for address, size in self.maps:
            LIBC.munmap(address, size)

    def room(self, size: int) -> int:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        address = LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0)
        assert address not in (None, (1 << 64) - 1), f"no {size} bytes of address space"
        self.maps.append((address, size))
        return address

    def strided(
        self,
        shape: tuple[int, ...],
        dtype: np.dtype,
        strides: tuple[int, ...],
        first: int = 0,
        size: int = 0,
    ) -> np.ndarray:
        """An array with strides in elements, the first one so many elements into its memory, which
        has `size` of them, or as many as it takes."""
        item = np.dtype(dtype).itemsize
        size = size or 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
        base = view(self.room(size * item) + first * item, (1,), np.dtype(dtype))
        return np.lib.stride_tricks.as_strided(base, shape, tuple(s * item for s in strides))

    def corner(
        self, shape: tuple[int, ...], dtype: np.dtype, full: tuple[int, ...], at: tuple[int, ...]
    ) -> tuple[int, np.ndarray]:
        """The part of a packed array [full] that begins at `at`: the array's address, the part."""
        strides = np.cumprod([1, *full[:0:-1]], dtype=object)[::-1]
        first = sum(int(a * s) for a, s in zip(at, strides, strict=True))
        size = math.prod(full)
        part = self.strided(shape, dtype, tuple(int(s) for s in strides), first, size)
        return part.ctypes.data - first * np.dtype(dtype).itemsize, part


# ---- strides -------------------------------------------------------------------------------------


def tensors(call: every.Call) -> dict[str, tuple[str, Any]]:
    """Arguments with strides -> the field of these, and what makes rows of the argument."""
    of = every.description(call.name)
    if of.trains:
        layout = (call.case.case if call.grads else call.case).args.input_layout
        by_row = partial(helpers_fusion.by_row, layout=layout)
        return {n: (f"{field}_stride", by_row) for n, field in helpers_fusion.TENSORS.items()}
    names = ("query", "key", "value", "attention_out")
    if of.decodes:
        a = call.case.args
        layouts = (a.layout_query, a.layout_kv, a.layout_kv, a.layout_query)
        made = [partial(helpers_decode.by_row, layout=layout) for layout in layouts]
        fields = ("query_stride", "key_stride", "value_stride", "out_stride")
        return dict(zip(names, zip(fields, made, strict=True), strict=True))
    made = {n: (f"{n}_stride", lambda x: x) for n in helpers_cases.TENSORS}
    made["attention_out"] = ("out_stride", lambda x: x)
    if of.record:
        del made["value"]
        if call.case.args.record.behind:
            del made["key"]
    return made


def far_strides(shape: tuple[int, ...], item: int, axis: int) -> tuple[int, ...]:
    """In elements: one axis 2^33 bytes and a row apart, the others packed."""
    outer = len(shape) - 1
    strides, step = [0] * outer, shape[-1]
    for i in reversed([i for i in range(outer) if i != axis % outer]):
        strides[i], step = step, step * max(shape[i], 1)
    strides[axis % outer] = FAR // item + shape[-1]
    return (*strides, 1)


def apart(call: every.Call, isa: str, turn: int) -> Outputs:
    """The call with each tensor spread along some axis."""
    with Sparse() as sparse:
        outputs = call.outputs()
        fields: dict[str, Any] = {**call.fields(isa), **outputs}
        far: dict[str, np.ndarray] = {}
        for i, (name, (field, by_row)) in enumerate(tensors(call).items()):
            if fields.get(name) is None:
                continue
            rows = by_row(fields[name])
            strides = far_strides(rows.shape, rows.itemsize, turn + i)
            far[name] = sparse.strided(rows.shape, rows.dtype, strides)
            far[name][...] = rows
            triple = (0,) * (4 - len(strides)) + strides[:-1]
            fields |= {name: far[name].ctypes.data, field: triple}
        call.kernel.run(**fields).check()
        for name in outputs.keys() & far.keys():
            tensors(call)[name][1](outputs[name])[...] = far[name]
        return {name: array.copy() for name, array in outputs.items()}


def spread_shapes(name: str) -> Iterator[Any]:
    """Two of everything, in each layout."""
    of = every.description(name)
    if of.trains:
        for layout in helpers_fusion.LAYOUTS:
            yield helpers_fusion.Shape(
                lens_q=(3, 3), lens_kv=(5, 5), heads_kv=2, group=2, layout=layout
            )
    elif of.decodes:
        for layouts in helpers_decode.PAIRS:
            kind = dict(zip(("layout_q", "layout_kv"), layouts, strict=True))
            yield helpers_decode.Shape(
                lens=(5, 7), seq_q=2, heads_kv=2, group=2, block_size=3, **kind
            )
    else:
        kinds = [(BSND, BSND), (TND, TND)] if "BSND" in of.layout_kv else []
        heads = 2 if kinds else 1
        for layout_q, layout_kv in (*kinds, (BSND, PA_BSND), (TND, PA_BSND)):
            for group in (2, 33):
                yield helpers_cases.Shape(
                    lens_q=(2, 2), lens_kv=(5, 7), heads_kv=heads, group=group, layout_q=layout_q,
                    layout_kv=layout_kv, block_size=3, value=True, joined_k=group == 33,
                )  # fmt: skip


def same(call: every.Call, isa: str, other: Any, what: str) -> None:
    """A call made elsewhere has the bits of an ordinary one."""
    want = call.run(isa)
    try:
        got = in_child(other)
    except Died as death:
        raise AssertionError(f"{what}: {death}") from None
    for name in got:
        assert same_bits(got[name], want[name]), f"{what}: {name}"


@BY_PAIR
def test_strides_beyond_two_to_the_33_bytes(name, isa):
    """Batches, rows or heads of every tensor, inputs and outputs, 8 GiB apart."""
    calls = 0
    for shape in spread_shapes(name):
        call = every.call_of(name, shape)
        for turn in range(3):
            same(call, isa, partial(apart, call, isa, turn), f"turn {turn} of {shape}")
            calls += 1
    note("strides", name, isa, Survey(calls))


# ---- the last of very many -----------------------------------------------------------------------


ROWS, TOKENS = (1 << 28) + 3, (1 << 25) + 5  # S1 and S2 of every batch, or in front of the last


def last_rows(call: every.Call, isa: str) -> Outputs:
    """A call of one batch as the last of three, whose rows are ROWS and whose keys are TOKENS; or
    in TND as the last rows. Paged: ids at the far end of the pool, a table of 2^31 entries."""
    a, fields, outputs = call.case.args, call.fields(isa), call.outputs()
    tnd_q, tnd_kv = a.layout_query == TND, a.layout_kv == TND
    paged = a.layout_kv == PA_BSND
    rows, tokens = a.query.shape[-3], a.key.shape[-3]
    parts: dict[str, np.ndarray] = {}
    with Sparse() as sparse:

        def put(name: str, array: np.ndarray, full: tuple[int, ...], at: tuple[int, ...]) -> None:
            fields[name], part = sparse.corner(array.shape, array.dtype, full, at)
            part[...] = array
            if name in outputs:
                parts[name] = part

        for name, array in {**call.inputs(), **outputs}.items():
            tail = array.shape[1:] if tnd_q else array.shape[2:]
            if name in ("query", "query_rope", "attention_out", "sparse_indices", "sparse_lengths"):
                full = (ROWS + rows, *tail) if tnd_q else (3, ROWS, *tail)
                put(name, array, full, (ROWS if tnd_q else 2, *(0,) * (len(full) - 1)))
            elif name.startswith("softmax"):
                heads, group = a.heads_kv, a.heads_q // a.heads_kv
                full = (heads, ROWS + rows, group) if tnd_q else (3, heads, ROWS, group)
                put(name, array, full, (0, ROWS, 0) if tnd_q else (2, 0, 0, 0))
            elif name in ("key", "key_rope", "value") and not paged:
                tail = array.shape[1:] if tnd_kv else array.shape[2:]
                full = (TOKENS + tokens, *tail) if tnd_kv else (3, TOKENS, *tail)
                put(name, array, full, (TOKENS if tnd_kv else 2, *(0,) * (len(full) - 1)))
        fields["batch"] = 2 if tnd_q else 3
        fields["seq_q"] = ROWS + rows if tnd_q else ROWS
        fields["actual_seq_lengths_query"] = [ROWS, ROWS + rows] if tnd_q else [0, 0, rows]
        if not paged:
            fields["seq_kv"] = TOKENS + tokens if tnd_kv else TOKENS
            ends = [TOKENS, TOKENS + tokens] if tnd_kv else [0, 0, tokens]
            fields["actual_seq_lengths_kv"] = ends
        else:
            far_pages(sparse, call, fields)
            length = int(a.actual_seq_lengths_kv[0])
            fields["actual_seq_lengths_kv"] = [0] * (fields["batch"] - 1) + [length]
        last = rows * a.heads_kv if tnd_q else 0
        plan, result = call.kernel.plan(**{**fields, **{n: fields[n] for n in outputs}})
        result.check()
        workspace = np.zeros(plan.task_bytes, np.uint8)
        first = plan.n_tasks - last if tnd_q else 2 * ROWS * a.heads_kv
        for i in range(first, first + rows * a.heads_kv):
            call.kernel.task(plan, i, workspace)
        return {name: part.copy() for name, part in parts.items()}


def far_pages(sparse: Sparse, call: every.Call, fields: dict[str, Any]) -> None:
    """The pages of a call at the far end of a pool, in the opposite order; its table (of the last
    batch) behind 2^31 - 1 entries for each other one, if blocks are that small."""
    a = call.case.args
    size = a.key.shape[-3] if a.layout_kv == PA_BSND else a.key.shape[-2]
    pools = {n: x for n, x in call.inputs().items() if n in ("key", "key_rope", "value")}
    record = getattr(a, "record", None)
    pages = len(a.key)
    if record is not None:
        pools.pop("value", None)
    if record is not None and record.behind:
        memory, (page, _, _) = helpers_cases.packed(a)
        whole = np.zeros(pages * page, np.uint8)
        whole[: memory.size] = memory.reshape(-1)
        pools["key"] = whole.reshape(pages, page)
    narrowest = min(pool[0].nbytes for pool in pools.values())
    count = 2 * FAR // narrowest
    for name, pool in pools.items():
        full = (count, *pool.shape[1:])
        at = (count - pages, *(0,) * (pool.ndim - 1))
        fields[name], part = sparse.corner(pool.shape, pool.dtype, full, at)
        part[...] = pool[::-1]
    fields["num_blocks"] = count
    table = a.block_table[-1:].astype(np.int64)
    inside = (table >= 0) & (table < pages)
    moved = np.where(inside, count - 1 - table, -1).astype(np.int32)
    entries = (2**31 - 1) // size
    batch = fields["batch"]
    full, at = (batch, entries), (batch - 1, 0)
    fields["block_table"], part = sparse.corner(moved.shape, moved.dtype, full, at)
    part[...] = moved
    fields["max_blocks"] = entries
    if getattr(a, "index_kind", 0) == SLOTS and not every.description(call.name).decodes:
        lists = view(fields["sparse_indices"], (1,), np.dtype(np.int32))
        shape = a.sparse_indices.shape
        tnd = a.layout_query == TND
        full = (ROWS + shape[0], *shape[1:]) if tnd else (3, ROWS, *shape[2:])
        skipped = ROWS * int(np.prod(shape[1:])) if tnd else 2 * ROWS * int(np.prod(shape[2:]))
        lists = view(fields["sparse_indices"] + 4 * skipped, shape, np.dtype(np.int32))
        inside = (a.sparse_indices >= 0) & (a.sparse_indices < pages * size)
        block, token = np.divmod(a.sparse_indices, size)
        lists[...] = np.where(inside, (count - 1 - block) * size + token, -1)


def sparse_shapes(name: str) -> Iterator[Any]:
    """One batch of two rows: dense, by list, by slot; few heads and many."""
    of = every.description(name)
    kinds = [(BSND, BSND), (TND, TND)] if "BSND" in of.layout_kv else []
    heads = 2 if kinds else 1
    for layout_q, layout_kv in (*kinds, (BSND, PA_BSND), (TND, PA_BSND)):
        for lists in ("none", "blocks", *(["slots"] * ("slots" in of.features))):
            for size in (1, 3) if layout_kv == PA_BSND else (1,):
                yield helpers_cases.Shape(
                    lens_q=(2,), lens_kv=(9,), heads_kv=heads, group=33 if lists == "none" else 9,
                    layout_q=layout_q, layout_kv=layout_kv, lists=lists, list_length=9, value=True,
                    block_size=size, sparse_mode=0, sinks="plain", seed=4,
                )  # fmt: skip


def decode_shapes(name: str) -> Iterator[Any]:
    has = every.description(name).features
    for i, layouts in enumerate(helpers_decode.PAIRS):
        kind = dict(zip(("layout_q", "layout_kv"), layouts, strict=True))
        for size in (1, 3) if layouts[1] in helpers_decode.PAGED else (1,):
            yield helpers_decode.Shape(
                lens=(9,), seq_q=2, heads_kv=2, group=2 + 15 * (i % 2), block_size=size, pse="one",
                mask="one", mask_rows=True, lengths="none", antiquant=helpers_decode.TOKEN, seed=i,
                sinks="plain" if "sinks" in has else "none", **kind,
            )  # fmt: skip


BATCHES = (1 << 26) + 3  # by which queries, results and statistics are far
WIDE = 2**31 - 1


def last_batch(call: every.Call, isa: str) -> Outputs:
    """A call of one batch as the last of BATCHES (a dense cache) or of three (paged); mask and pse
    with rows of 2^31 - 1 columns."""
    a, outputs = call.case.args, call.outputs()
    fields = call.fields(isa)
    paged = a.layout_kv in helpers_decode.PAGED
    batch = 3 if paged else BATCHES
    parts: dict[str, np.ndarray] = {}
    with Sparse() as sparse:

        def put(name: str, array: np.ndarray, full: tuple[int, ...], at: tuple[int, ...]) -> None:
            fields[name], part = sparse.corner(array.shape, array.dtype, full, at)
            part[...] = array
            if name in outputs:
                parts[name] = part

        fields["batch"] = batch
        for name, array in {**call.inputs(), **outputs}.items():
            zeros = (0,) * (array.ndim - 1)
            if name in ("query", *outputs) or (name in ("key", "value") and not paged):
                put(name, array, (batch, *array.shape[1:]), (batch - 1, *zeros))
            elif name == "pse_shift":
                put(name, array, (*array.shape[:-1], WIDE), (0, *zeros))
                fields["pse_width"] = WIDE
            elif name == "atten_mask":
                put(name, array, (*array.shape[:-1], WIDE), (0, *zeros))
                fields["mask_width"] = WIDE
        if paged:
            far_pages(sparse, call, fields)
            fields["actual_seq_lengths"], fields["lengths"] = [0, 0, 9], 3
        for name in ("antiquant_scale", "antiquant_offset"):
            array = getattr(a, name)
            if array is not None:
                width = fields["max_blocks"] * fields["block_size"] if paged else a.seq_kv
                each = array.reshape(-1, 1, array.size // len(sides(call)))
                keys = min(each.shape[-1], 9)
                put(name, each[..., :keys], (len(each), batch, width), (0, batch - 1, 0))
        plan, result = call.kernel.plan(**{**fields, **{n: fields[n] for n in outputs}})
        result.check()
        workspace = np.zeros(plan.task_bytes, np.uint8)
        for i in range(plan.n_tasks - a.heads_kv, plan.n_tasks):
            call.kernel.task(plan, i, workspace)
        return {name: part.copy() for name, part in parts.items()}


def sides(call: every.Call) -> list[str]:
    """Sides of a cache that hold codes."""
    return [kind for kind in call.case.args.formats if kind]


def train_shapes(name: str) -> Iterator[Any]:
    """Rows that see the keys beside them: every tensor that a pair has an element of, and none."""
    for layout in (BSND, helpers_fusion.BNSD, TND):
        for pairs in (True, False):
            once = FULL and layout == TND
            if every.description(name).backward and not pairs and not once:
                continue  # tasks of keys look at every block of rows: such a call takes a while
            more: dict[str, Any] = {"mask": "formula"}
            if pairs:
                more = {"mask": "given", "mask_heads": layout != TND, "pse": "full"}
                more |= {"pse_type": helpers_fusion.INNER, "keep_prob": 0.6, "bits": True}
            yield helpers_fusion.Shape(
                lens_q=(SMALL,), lens_kv=(SMALL,), heads_kv=2, layout=layout, band=(8, 5), **more,
            )  # fmt: skip


SMALL = 64  # rows and keys of the call that is the end of a large one
# Rows and keys in front of it, with and without pairs: whole blocks of every instruction set, so
# that the small call has the same.
PAIRED, LONG = 11 * 96 * 1024, 2731 * 96 * 1024


def last_pairs(call: every.Call, isa: str) -> Outputs:
    """The last rows and keys of one very long sequence, of which each row sees a few beside it."""
    grad = call.case if call.grads else None
    case = grad.case if grad else call.case
    a, outputs = case.args, call.outputs()
    fields = {**call.fields(isa), **outputs}
    paired = a.pse is not None
    before = PAIRED if paired else LONG
    total = before + SMALL
    parts: dict[str, np.ndarray] = {}
    with Sparse() as sparse:

        def put(name: str, array: np.ndarray, axes: tuple[int, ...]) -> None:
            """Rows or keys along some axes are the last of so many."""
            full = tuple(total if i in axes else n for i, n in enumerate(array.shape))
            at = tuple(before if i in axes else 0 for i in range(array.ndim))
            fields[name], part = sparse.corner(array.shape, array.dtype, full, at)
            part[...] = array
            if name in outputs:
                parts[name] = part

        tnd = a.input_layout == TND
        rows = 0 if tnd else 2 if a.input_layout == helpers_fusion.BNSD else 1
        for name, array in {**call.inputs(), **outputs}.items():
            if name in helpers_fusion.TENSORS:
                put(name, array, (rows,))
            elif name in helpers_cases.STATS:
                put(name, array, (0 if tnd else 2,))
            elif name in ("pse", "dpse"):
                put(name, array.reshape(-1, a.heads_q, SMALL, SMALL), (2, 3))
            elif name == "atten_mask":
                put(name, array, (2, 3))
            elif name == "dropout_mask":
                bits = np.unpackbits(array, bitorder="little")[: a.heads_q * SMALL * SMALL]
                packed = np.packbits(bits.reshape(-1, SMALL), axis=-1, bitorder="little")
                packed = packed.reshape(a.heads_q, SMALL, SMALL // 8)
                full = (a.heads_q, total, total // 8)
                fields[name], part = sparse.corner(
                    packed.shape, packed.dtype, full, (0, before, before // 8)
                )
                part[...] = packed
        fields |= {"seq_q": total, "seq_kv": total}
        if tnd:
            fields |= {"actual_seq_qlen": [total], "actual_seq_kvlen": [total]}
        if a.atten_mask is not None:
            fields |= {"mask_rows": total, "mask_width": total}
        plan, result = call.kernel.plan(**fields)
        result.check()
        workspace = np.zeros(plan.task_bytes, np.uint8)
        run_last(call, plan, workspace, a.heads_kv)
        made = {name: part.copy() for name, part in parts.items()}
        return {name: beside(call, name, made[name]) for name in made}


def run_last(call: every.Call, plan: Any, workspace: np.ndarray, heads: int) -> None:
    """The last two pieces of each kv head, of queries and of keys."""
    ends = [plan.n_tasks]
    if call.grads:
        ends = [plan.q_tasks, plan.n_tasks]
    first = 0
    for end in ends:
        each = (end - first) // heads
        for head in range(heads):
            for i in range(3):
                call.kernel.task(plan, first + (head + 1) * each - 1 - i, workspace)
        first = end


def beside(call: every.Call, name: str, array: np.ndarray) -> np.ndarray:
    """The rows and keys all of whose partners are among the last ones: others differ, as the short
    call has no others."""
    case = call.case.case if call.grads else call.case
    layout, skip = case.args.input_layout, 16
    if name == "dpse":
        return array.reshape(-1, case.args.heads_q, SMALL, SMALL)[:, :, skip:, skip:]
    if name in helpers_cases.STATS:
        return array[skip:] if layout == TND else array[:, :, skip:]
    rows = array if layout == TND else helpers_fusion.by_row(array, layout)
    return rows[skip:] if layout == TND else rows[:, skip:]


@pytest.mark.parametrize("name,isa", every.pairs() if FULL else SOME[:-1])
def test_the_last_of_very_many(name, isa):
    """Packed tensors of terabytes: queries, caches, lists, tables, masks, biases, bits, results and
    statistics, each with its offset computed from sizes."""
    of, calls = every.description(name), 0
    kinds = (train_shapes, last_pairs) if of.trains else (decode_shapes, last_batch)
    shapes, other = kinds if of.trains or of.decodes else (sparse_shapes, last_rows)
    for shape in shapes(name):
        call = every.call_of(name, shape)
        want = {n: end(call, n, x) for n, x in call.run(isa).items()}
        try:
            got = in_child(partial(other, call, isa))
        except Died as death:
            raise AssertionError(f"{shape}: {death}") from None
        assert got
        for what in got:
            assert same_bits(got[what], want[what]), f"{what} of {shape}"
        calls += 1
    note("last", name, isa, Survey(calls))


def end(call: every.Call, name: str, array: np.ndarray) -> np.ndarray:
    """What the large call has of an output of the small one."""
    trains = every.description(call.name).trains and name != "dropout_state"
    return beside(call, name, array) if trains else array


# ---- the control ---------------------------------------------------------------------------------


class Narrow(every.Call):
    """A call of the same header with all offsets in 32 bits."""

    @property
    def kernel(self) -> bind.Kernel:
        return narrow(self.name)


@functools.cache
def narrow(name: str) -> bind.Kernel:
    return bind.load(every.text(name).replace("ptrdiff_t", "int32_t"), flags=("-O1", "-w"))


@pytest.mark.parametrize("name", SLICE if FULL else ["hl_sparse_flash_attention_f32_d32_rope8"])
def test_offsets_of_32_bits_are_noticed(name):
    """The control: such a header dies of these calls, refuses them or is wrong."""
    of = every.description(name)
    kinds = (train_shapes, last_pairs) if of.trains else (decode_shapes, last_batch)
    shapes, other = kinds if of.trains or of.decodes else (sparse_shapes, last_rows)
    isa = "scalar"
    assert narrow(name).isas()
    for shape in shapes(name):
        call = every.call_of(name, shape)
        want = {n: end(call, n, x) for n, x in call.run(isa).items()}
        try:
            got = in_child(partial(other, Narrow(name, call.case), isa))
        except (Died, AssertionError):
            continue
        assert not all(same_bits(got[n], want[n]) for n in got), shape
