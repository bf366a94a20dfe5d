"""Random calls of sparse_flash_attention and its antiquant sister, and the ways to lay them out in
memory.

A Shape says what a call looks like; make_case fills it with numbers, or with records. Whatever the
call must not read is NaN (tensors), bytes 0xff (records, what pads them) or nonsense (tables and
lists behind their ends).
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from helpers_memory import Arena, in_child
from hypothesis import strategies as st
from oracle import BLOCKS, BSND, PA_BSND, SLOTS, TND, Args, Record, field_bytes, flat, rows

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)
TENSORS = ("query", "query_rope", "key", "key_rope", "value")
POINTERS = (
    *TENSORS,
    "sparse_indices",
    "sparse_lengths",
    "block_table",
    "actual_seq_lengths_query",
    "actual_seq_lengths_kv",
    "sinks",
)
STATS = ("softmax_max", "softmax_sum", "softmax_lse")
BLOCKS_AND_DENSE = ("none", "blocks", "blocks", "blocks")
SPREADS = ("normal", "flat", "huge", "dominant", "equal", "growing", "falling", "cancel", "tiny")
# And of records: any codes, with scales of 0.1 .. 1, or of -100 .. 100.
RECORD_SPREADS = (*SPREADS, "codes", "wild")
NOT_READ = 0x10001  # what `value` points to where the cache holds records


@dataclass(frozen=True)
class Shape:
    """One call: what hypothesis draws, small enough to read in a failure report."""

    lens_q: tuple[int, ...] = (1,)
    lens_kv: tuple[int, ...] = (8,)
    heads_kv: int = 1
    group: int = 1
    layout_q: int = BSND
    layout_kv: int = BSND
    pad_q: int = 0  # rows behind the longest query (BSND) or behind the last end (TND)
    pad_kv: int = 0
    block_size: int = 16  # paged
    spare_blocks: int = 2  # blocks in the pool that nobody uses, and unused table entries
    lists: str = "none"  # none, blocks, slots
    list_length: int = 8
    list_lengths: bool = False  # slots: with sparse_lengths
    sparse_block_size: int = 1
    sparse_mode: int = 0
    joined_q: bool = False
    joined_k: bool = False
    value: bool = False
    sinks: str = "none"  # none, plain, infinite
    spread: str = "normal"
    lengths_given: bool = True  # BSND and PA: False means NULL, when all lengths are full
    seed: int = 0


@dataclass
class Case:
    """A call's inputs. `args` is the oracle's view; fields() the kernel's."""

    shape: Shape
    args: Args
    extra: dict[str, Any] = field(default_factory=dict)  # further fields of the C struct

    @property
    def dtype(self) -> np.dtype:
        return self.args.query.dtype

    def changed(self, **changes: Any) -> "Case":
        """The same call with some of the oracle's arguments replaced."""
        return Case(self.shape, dataclasses.replace(self.args, **changes), dict(self.extra))

    def sizes(self) -> dict[str, Any]:
        """Every size and option of the C struct."""
        a = self.args
        tnd = a.layout_query == TND
        made = {
            "batch": len(a.actual_seq_lengths_query) if tnd else a.query.shape[0],
            "seq_q": a.query.shape[-3],
            "heads_q": a.heads_q,
            "heads_kv": a.heads_kv,
            "sparse_block_size": a.sparse_block_size,
            "layout_query": a.layout_query,
            "layout_kv": a.layout_kv,
            "sparse_mode": a.sparse_mode,
            "index_kind": a.index_kind,
            "scale_value": a.scale_value,
        }
        if a.sparse_indices is not None:
            made["list_length"] = a.sparse_indices.shape[-1]
        if a.layout_kv == PA_BSND:
            made["num_blocks"], made["block_size"] = a.key.shape[:2]
            made["max_blocks"] = a.block_table.shape[1]
        else:
            made["seq_kv"] = a.key.shape[-3]
        return {**made, **self.extra}

    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays behind the input pointers that are not NULL."""
        named = {name: getattr(self.args, name) for name in POINTERS}
        if self.args.record is not None:
            named["key"] = packed(self.args)[0]
        return {name: array for name, array in named.items() if array is not None}

    def stats_shape(self) -> tuple[int, ...]:
        """[B][N2][S1][G] or [N2][T1][G]."""
        shape = self.args.query.shape[:-2]
        return (*shape[:-1], self.args.heads_kv, shape[-1], self.args.heads_q // self.args.heads_kv)

    def outputs(self, arena: Arena | None = None, stats: bool = True) -> dict[str, np.ndarray]:
        """Fresh outputs, every byte 0xff: NaN."""
        dtype = np.dtype(np.float32) if self.extra.get("out_f32") else self.dtype
        shapes = {"attention_out": ((*self.args.query.shape[:-1], self.args.dv), dtype)}
        if stats:
            shapes |= {name: (self.stats_shape(), np.dtype(np.float32)) for name in STATS}
        if arena is not None:
            return {name: arena.room(*shape) for name, shape in shapes.items()}
        return {name: poison(*shape) for name, shape in shapes.items()}


def poison(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array whose bytes are all 0xff."""
    return (
        np.full(math.prod(shape) * np.dtype(dtype).itemsize, 0xFF, np.uint8)
        .view(dtype)
        .reshape(shape)
    )


def run(kernel: Any, case: Case, isa: str | int = 0, **more: Any) -> dict[str, np.ndarray]:
    """The one-call function on ordinary memory; asserts that it is accepted."""
    outputs = case.outputs()
    isa = kernel.isas()[isa] if isinstance(isa, str) else isa
    result = kernel.run(**{**case.inputs(), **case.sizes(), **outputs, "isa": isa, **more})
    assert result.ok, result.error_text
    return outputs


@dataclass(frozen=True)
class Way:
    """How a call is made; none of it may change what is computed."""

    isa: str = "scalar"
    flush: str = "right"
    strides: bool = False
    chunk_keys: int = 0
    by_task: bool = False  # plan, tasks from the last to the first, merges; else the one call
    partials: bool = False
    stats: bool = True


def run_guarded(kernel: Any, case: Case, way: Way) -> dict[str, np.ndarray]:
    """One call in a child process, every buffer between forbidden pages, inputs read-only."""
    rng = np.random.default_rng(case.shape.seed)
    fields = {**case.sizes(), "isa": kernel.isas()[way.isa], "chunk_keys": way.chunk_keys}
    with Arena(way.flush) as arena:
        for name, array in case.inputs().items():
            if way.strides and name == "key" and case.args.record is not None:
                array, fields["key_stride"] = strided_records(rng, case.args)
            elif way.strides and name in TENSORS:
                array, fields[f"{name}_stride"] = strided(rng, array)
            fields[name] = arena.place(array)
        outputs = places = case.outputs(arena, way.stats)
        if way.strides:
            memory, fields["out_stride"] = strided(rng, places["attention_out"])
            places = {**places, "attention_out": arena.room(memory.shape, memory.dtype)}
        arena.protect()
        result = in_child(
            lambda: call_guarded(kernel, {**fields, **places}, way), f"{way} {case.shape}"
        )
        assert result.ok, f"{result.error_text} ({way} {case.shape})"
        arena.check()
        if way.strides:
            memory = places["attention_out"]
            found = unstrided(memory, outputs["attention_out"].shape, fields["out_stride"])
            outputs["attention_out"] = found.copy()
            found.view(np.uint16 if found.itemsize == 2 else np.uint32)[...] = 0
            written = (memory.view(np.uint8) != 0xFF).sum()
            assert written == found.nbytes, "a gap between rows of attention_out was written"
        return {name: array.copy() for name, array in outputs.items()}


def call_guarded(kernel: Any, fields: dict[str, Any], way: Way) -> Any:
    """In the child: workspace and partials of exactly the bytes asked for, guarded too."""
    with Arena(way.flush) as arena:
        plan, result = kernel.plan(**fields)
        if not result.ok:
            return result
        if way.partials and plan.split_bytes:
            partials = arena.room((plan.split_bytes,), np.uint8)
            fields = {**fields, "partials": partials, "partials_bytes": partials.nbytes}
            plan, result = kernel.plan(**fields)
        if way.by_task and result.ok:
            workspace = arena.room((plan.task_bytes,), np.uint8)
            for i in reversed(range(plan.n_tasks)):
                kernel.task(plan, i, workspace)
            for i in reversed(range(plan.n_merges)):
                kernel.merge(plan, i)
        elif result.ok:
            workspace = arena.room((kernel.workspace_bytes(**fields),), np.uint8)
            result = kernel.run(**fields, workspace=workspace)
        arena.check()
        return result


# ---- numbers ------------------------------------------------------------------------------------


def fill(
    rng: np.random.Generator, shape: Shape, q: np.ndarray, k: np.ndarray, v: np.ndarray | None
) -> float:
    """Fills float64 rows (q, k joined: nope and rope) with a score spread; returns the scale."""
    width = q.shape[-1]
    scale = 1 / math.sqrt(width)
    q[...] = rng.standard_normal(q.shape)
    k[...] = rng.standard_normal(k.shape)
    if v is not None:
        v[...] = rng.standard_normal(v.shape)
    towards = np.linspace(0.5, 1.5, width)
    steps = np.linspace(0.0, 1.0, len(k))[:, None, None]
    match shape.spread:
        case "flat":
            k[...] *= 1e-3
        case "huge":  # scores of some thousands: one key takes all
            scale *= 1000.0
        case "dominant":
            q[...] = abs(q)
            k[rng.integers(0, max(len(k), 1)) :: 40] = 6.0
        case "equal":
            k[...] = k[:1]
        case "growing" | "falling":  # each block's largest score is above (below) the last one's
            q[...] = towards + 0.1 * q
            up = steps if shape.spread == "growing" else 1 - steps
            k[...] = 60.0 / math.sqrt(width) * up * towards + 0.05 * k
        case "cancel":  # values of both signs that nearly cancel
            if v is not None:
                v[...] = np.where(np.arange(len(v))[:, None, None] % 2, 100.0, -100.0) + v
        case "tiny":  # subnormal numbers in float16, and scores of nothing in all types
            k[...] *= 1e-6
            if v is not None:
                v[...] *= 1e-7
    if rng.random() < 0.1:
        scale = -scale
    if rng.random() < 0.03:
        scale = 0.0
    return scale


# ---- lists --------------------------------------------------------------------------------------


def random_list(rng: np.random.Generator, length: int, n: int) -> np.ndarray:
    """A list of block ids for a context of n blocks: one of the kinds that occur, or that should
    not occur and still must be right."""
    nonsense = np.array([INT_MIN, INT_MAX, -7, -1, n, n + 1, 0, 1 << 24], np.int64)
    kind = rng.integers(0, 9)
    if n == 0 or kind == 0:  # nothing at all
        return rng.choice([-1, INT_MIN], 1).repeat(length)
    if kind == 1:  # nothing but ids out of range
        return rng.choice([n, n + 3, INT_MAX, INT_MAX // 128], length)
    if kind == 2:  # one id over and over
        return np.full(length, rng.integers(0, n))
    ids = rng.permutation(n)[:length]
    if kind == 3:
        ids = np.sort(ids)
    if kind in (4, 5):  # any ids, some twice, some out of range
        ids = rng.integers(0, n + 2, length)
    if kind == 6 and length:
        ids[rng.random(len(ids)) < 0.3] = INT_MAX
    made = rng.choice(nonsense, length)  # behind the end: never to be looked at
    end = len(ids) if kind in (3, 4) else rng.integers(0, len(ids) + 1)
    made[:end] = ids[:end]
    if end < length:
        made[end] = rng.choice([-1, -1, INT_MIN, -7])
    return made


def random_slots(rng: np.random.Generator, length: int, n: int) -> np.ndarray:
    """A list of physical slots with holes anywhere."""
    holes = np.array([INT_MIN, -123456, -1, n, n + 1, INT_MAX, 1 << 24], np.int64)
    made = rng.choice(holes, length)
    if n and rng.random() < 0.9:
        some = rng.random(length) < rng.choice([0.1, 0.7, 1.0])
        made[some] = rng.integers(0, n, int(some.sum()))
    return made


# ---- a whole call -------------------------------------------------------------------------------


def make_case(kernel: Any, shape: Shape) -> Case:
    """The call that a Shape describes, for a kernel's widths and type."""
    rng = np.random.default_rng(shape.seed)
    batch, tnd_q, tnd_kv = len(shape.lens_q), shape.layout_q == TND, shape.layout_kv == TND
    n1, n2 = shape.heads_kv * shape.group, shape.heads_kv
    width = kernel.dk + kernel.rope
    if tnd_q:
        shape_q: tuple[int, ...] = (sum(shape.lens_q) + shape.pad_q,)
    else:
        shape_q = (batch, max(shape.lens_q, default=0) + shape.pad_q)
    table = None
    if shape.layout_kv == PA_BSND:
        table, shape_kv = random_pages(rng, shape)
    elif tnd_kv:
        shape_kv = (sum(shape.lens_kv) + shape.pad_kv,)
    else:
        shape_kv = (batch, max(shape.lens_kv, default=0) + shape.pad_kv)
    q = np.zeros((math.prod(shape_q), n1, width))
    k = np.zeros((math.prod(shape_kv), n2, width))
    record: Record | None = getattr(kernel, "record", None)
    v = np.zeros((len(k), n2, kernel.dv)) if shape.value and record is None else None
    scale = fill(rng, shape, q, k, v)
    if record is not None:
        stored = encode(rng, k, record, kernel.dtype, shape.spread)
    else:
        stored = k.astype(kernel.dtype)
    args = Args(
        query=q.reshape(*shape_q, n1, width).astype(kernel.dtype),
        key=stored.reshape(*shape_kv, n2, stored.shape[-1]),
        record=record,
        value=None if v is None else v.reshape(*shape_kv, n2, kernel.dv).astype(kernel.dtype),
        scale_value=scale,
        dv=kernel.dv,
        block_table=table,
        sparse_block_size=shape.sparse_block_size,
        layout_query=shape.layout_q,
        layout_kv=shape.layout_kv,
        sparse_mode=shape.sparse_mode,
        index_kind=SLOTS if shape.lists == "slots" else BLOCKS,
    )
    set_lengths(args, shape)
    if shape.lists != "none":
        set_lists(rng, args, shape, math.prod(shape_q))
    if shape.sinks != "none":
        args.sinks = (2 * rng.standard_normal(n1)).astype(np.float32)
        if shape.sinks == "infinite":
            args.sinks[rng.random(n1) < 0.5] = rng.choice([np.inf, -np.inf])
    if kernel.rope and not shape.joined_q:
        args.query, args.query_rope = split(args.query, kernel.dk)
    if kernel.rope and not shape.joined_k and record is None:
        args.key, args.key_rope = split(args.key, kernel.dk)
    poison_unread(args)
    return Case(shape, args, {"value": NOT_READ} if record is not None and shape.value else {})


def split(joined: np.ndarray, dk: int) -> tuple[np.ndarray, np.ndarray]:
    """Nope and rope apart."""
    return joined[..., :dk].copy(), joined[..., dk:].copy()


def random_pages(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, tuple[int, int]]:
    """A block table over a shuffled pool, nonsense behind the entries in use, and the pool's
    shape. Sometimes two batches share a first page."""
    size = shape.block_size
    needed = [-(-n // size) for n in shape.lens_kv]
    pool = rng.permutation(sum(needed) + shape.spare_blocks)
    full = max(needed, default=0) + (shape.spare_blocks if shape.lengths_given else 0)
    nonsense = [INT_MIN, INT_MAX, -1, len(pool)]
    table = rng.choice(nonsense, (len(needed), full)).astype(np.int32)
    at = 0
    for b, n in enumerate(needed):
        table[b, :n] = pool[at : at + n]
        at += n
    if len(needed) > 1 and min(needed[:2]) > 0 and rng.random() < 0.3:
        table[1, 0] = table[0, 0]
    return table, (len(pool), size)


def set_lengths(args: Args, shape: Shape) -> None:
    """Lengths or ends, as each layout has them."""
    if shape.layout_q == TND:
        args.actual_seq_lengths_query = np.cumsum(shape.lens_q, dtype=np.int32)
    elif shape.lengths_given or shape.pad_q or len(set(shape.lens_q)) > 1:
        args.actual_seq_lengths_query = np.array(shape.lens_q, np.int32)
    if shape.layout_kv == TND:
        args.actual_seq_lengths_kv = np.cumsum(shape.lens_kv, dtype=np.int32)
    else:
        full = args.key.shape[1]
        if shape.layout_kv == PA_BSND:
            full *= args.block_table.shape[1]
        if shape.lengths_given or set(shape.lens_kv) != {full}:
            args.actual_seq_lengths_kv = np.array(shape.lens_kv, np.int32)


def set_lists(rng: np.random.Generator, args: Args, shape: Shape, n_rows: int) -> None:
    """sparse_indices and sparse_lengths, nonsense in padding rows."""
    lists = rng.choice([INT_MIN, INT_MAX, -1, 0], (n_rows, shape.heads_kv, shape.list_length))
    row = 0
    for b, s1 in enumerate(shape.lens_q):
        row = row if shape.layout_q == TND else b * args.query.shape[1]
        for _ in range(s1):
            for n2 in range(shape.heads_kv):
                if shape.lists == "slots":
                    made = random_slots(rng, shape.list_length, len(flat(args.key)))
                else:
                    made = random_list(
                        rng, shape.list_length, -(-shape.lens_kv[b] // shape.sparse_block_size)
                    )
                lists[row, n2] = made
            row += 1
    outer = args.query.shape[:-2]
    args.sparse_indices = lists.astype(np.int32).reshape(*outer, *lists.shape[1:])
    if shape.lists == "slots" and shape.list_lengths:
        args.sparse_lengths = rng.integers(
            0, shape.list_length + 1, (*outer, shape.heads_kv), dtype=np.int32
        )


def poison_unread(args: Args) -> None:
    """NaN into every query row that is padding and every key and value row that no row sees."""
    q_seen = np.zeros(math.prod(args.query.shape[:-2]), bool)
    k_seen = np.zeros((math.prod(args.key.shape[:-2]), args.heads_kv), bool)
    for r in rows(args):
        q_seen[r.row] = True
        k_seen[r.kv_rows, r.n2] = True
    for name in TENSORS:
        tensor = getattr(args, name)
        if tensor is not None and tensor.size:
            unread = ~(q_seen if name.startswith("query") else k_seen)
            flat(tensor)[unread] = 0xFF if tensor.dtype == np.uint8 else np.nan


# ---- records ------------------------------------------------------------------------------------

LARGEST = {"i8": 127.0, "e4m3": 448.0}


def encode(
    rng: np.random.Generator, numbers: np.ndarray, record: Record, dtype: np.dtype, spread: str
) -> np.ndarray:
    """Records of rows of float64: bytes [..][those of a record and of its piece behind a page]. A
    tile's largest magnitude becomes the largest code, and half of the scales are negative where
    their type can be. What pads them is 0xff."""
    size = record.bytes_of((*record.fields, *record.behind), dtype)
    made = np.full((*numbers.shape[:-1], size), 0xFF, np.uint8)
    fields = field_bytes(made, record, dtype)
    kinds = {what: kind for what, kind, _ in (*record.fields, *record.behind)}
    nope = fields["nope"].shape[-1]
    if "rope" in fields:
        fields["rope"][...] = numbers[..., nope:]
    if spread in ("codes", "wild"):
        random_codes(rng, fields, kinds, -100.0 if spread == "wild" else 0.1)
        return made
    for t in range(fields["scale"].shape[-1]):
        channels = slice(t * record.tile, min((t + 1) * record.tile, nope))
        some = numbers[..., channels]
        scale = abs(some).max(axis=-1) / LARGEST[kinds["nope"]]
        if kinds["scale"] == "e8m0":
            code = np.clip(np.ceil(np.log2(np.maximum(scale, 1e-60))) + 127, 0, 254)
            fields["scale"][..., t] = code
            scale = np.ldexp(1.0, code.astype(int) - 127)
        else:
            scale = scale * rng.choice([-1.0, 1.0], scale.shape)
            fields["scale"][..., t] = scale
            scale = fields["scale"][..., t].astype(np.float64)
        with np.errstate(all="ignore"):
            codes = np.where(scale[..., None] != 0, some / scale[..., None], 0.0)
        most = LARGEST[kinds["nope"]]
        codes = np.clip(codes, -most, most)
        fields["nope"][..., channels] = np.rint(codes) if kinds["nope"] == "i8" else codes
    return made


def random_codes(
    rng: np.random.Generator, fields: dict[str, np.ndarray], kinds: dict[str, str], least: float
) -> None:
    """Every code with the same probability, but for NaNs; scales from a range of them."""
    codes = rng.integers(0, 256, fields["nope"].shape).astype(np.uint8)
    if kinds["nope"] == "e4m3":
        codes = np.where(codes & 0x7F == 0x7F, codes ^ 1, codes).astype(np.uint8)
    fields["nope"].view(np.uint8)[...] = codes
    if kinds["scale"] == "e8m0":
        fields["scale"][...] = rng.integers(120, 130, fields["scale"].shape)
    else:
        fields["scale"][...] = rng.uniform(
            least, -least if least < 0 else 1.0, fields["scale"].shape
        )


def packed(a: Args, row: int = 0, page: int = 0) -> tuple[np.ndarray, tuple[int, int, int]]:
    """The records of a call in memory, one after another, and the strides (page, row, head) in
    bytes. Where they have pieces behind the rows of a page: whole pages, `row` bytes from row to
    row, `page` bytes more than they need from page to page, but not behind the last one."""
    if not a.record.behind:
        return a.key, (0, 0, 0)
    size = a.record.bytes_of(a.record.fields, a.query.dtype)
    pages, rows_, _, both = a.key.shape
    row = row or size
    every = rows_ * (row + both - size)
    filled = -(-every // a.record.page_multiple) * a.record.page_multiple
    memory = np.full((pages, filled + page), 0xFF, np.uint8)
    for i in range(rows_):
        memory[:, i * row : i * row + size] = a.key[:, i, 0, :size]
        behind = rows_ * row + i * (both - size)
        memory[:, behind : behind + both - size] = a.key[:, i, 0, size:]
    if pages == 0:
        return memory.reshape(-1), (filled + page, row, 0)
    # what fills the last page up is not memory that a call may touch
    return memory.reshape(-1)[: memory.size - (filled + page - every)], (filled + page, row, 0)


def strided_records(rng: np.random.Generator, a: Args) -> tuple[np.ndarray, tuple[int, ...]]:
    """The same records with gaps of 0xff in any place that strides allow."""
    align = a.record.align(a.query.dtype)
    if not a.record.behind:
        return strided(rng, a.key, align)
    size = a.record.bytes_of(a.record.fields, a.query.dtype)
    row, page = (align * int(rng.integers(0, 5)) for _ in range(2))
    return packed(a, size + row, page)


# ---- memory layouts -----------------------------------------------------------------------------


def strided(
    rng: np.random.Generator, tensor: np.ndarray, multiple: int = 1
) -> tuple[np.ndarray, tuple[int, ...]]:
    """The same tensor with gaps of NaN between heads, rows and batches, its axes in any order in
    memory: the memory (flat) and the strides (batch, row, head) that find it."""
    outer = tensor.shape[:-1]
    strides = [0] * len(outer)
    step = tensor.shape[-1] + int(rng.integers(0, 4)) * multiple
    for axis in rng.permutation(len(outer)):
        strides[axis] = step
        step = step * max(outer[axis], 1) + int(rng.integers(0, 5)) * multiple
    size = tensor.size and tensor.shape[-1] + sum(
        (n - 1) * stride for n, stride in zip(outer, strides, strict=True)
    )  # nothing behind the last element: a guarded copy ends there
    memory = poison((max(size, 1),), tensor.dtype)
    place = np.lib.stride_tricks.as_strided(
        memory, tensor.shape, (*(s * tensor.itemsize for s in strides), tensor.itemsize)
    )
    place[...] = tensor
    return memory, tuple([1] * (3 - len(strides)) + strides)


def unstrided(memory: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    """The tensor that strides find in flat memory."""
    steps = [s * memory.itemsize for s in strides[-(len(shape) - 1) :]]
    return np.lib.stride_tricks.as_strided(memory, shape, (*steps, memory.itemsize))


# ---- what hypothesis draws ----------------------------------------------------------------------


SMALL_GROUPS = st.integers(1, 5)


@st.composite
def shapes(
    draw: Any,
    *,
    rope: bool,
    slots: bool,
    layouts: tuple[int, ...] = (BSND, TND, PA_BSND),
    max_keys: int = 70,
    max_rows: int = 4,
    groups: st.SearchStrategy[int] = SMALL_GROUPS,
    heads_kv: tuple[int, ...] = (1, 1, 2, 3),
    spreads: tuple[str, ...] = SPREADS,
) -> Shape:
    """Any small call."""
    layout_kv = draw(st.sampled_from(layouts))
    layout_q = draw(st.sampled_from((BSND, TND))) if layout_kv == PA_BSND else layout_kv
    batch = draw(st.integers(1, 3))
    lens_q = tuple(draw(st.lists(st.integers(0, max_rows), min_size=batch, max_size=batch)))
    keys = st.one_of(st.integers(0, max_keys), st.sampled_from((0, 1, 15, 16, 17, 31, 32, 33, 64)))
    lens_kv = tuple(draw(st.lists(keys, min_size=batch, max_size=batch)))
    kinds = ["none", "blocks", "blocks", "blocks"] + ["slots", "slots"] * slots
    lists = draw(st.sampled_from(kinds))
    by_slot = lists == "slots"
    return Shape(
        lens_q=lens_q,
        lens_kv=lens_kv,
        heads_kv=draw(st.sampled_from(heads_kv)),
        group=draw(groups),
        layout_q=layout_q,
        layout_kv=layout_kv,
        pad_q=draw(st.sampled_from((0, 0, 1, 3))),
        pad_kv=draw(st.sampled_from((0, 0, 1, 9))),
        block_size=draw(st.sampled_from((1, 3, 7, 16, 16, 48, 128))),
        spare_blocks=draw(st.integers(0, 3)),
        lists=lists,
        list_length=draw(st.sampled_from((0, 1, 2, 5, 8, 16, 17, 40, max_keys + 3))),
        list_lengths=by_slot and draw(st.booleans()),
        sparse_block_size=1 if by_slot else draw(st.sampled_from((1, 1, 2, 4, 8, 16, 64, 128))),
        sparse_mode=0 if by_slot else draw(st.sampled_from((0, 3))),
        joined_q=rope and draw(st.booleans()),
        joined_k=rope and draw(st.booleans()),
        value=draw(st.booleans()),
        sinks=draw(st.sampled_from(("none", "none", "plain", "infinite"))),
        spread=draw(st.sampled_from(spreads)),
        lengths_given=draw(st.booleans()),
        seed=draw(st.integers(0, 2**32 - 1)),
    )
