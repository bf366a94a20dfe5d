"""Kernels and random calls of incre_flash_attention, and how results are held against its oracle.

A Shape says what a call looks like; make_case fills it with numbers. Whatever the call must not
read is NaN (tensors, scales), bytes 0xff (codes, pages, masks) or nonsense (tables and lengths).
"""

import dataclasses
import functools
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle_decode as oracle
import pytest
from helpers import (
    BF16,
    FEW_HEADS,
    ISAS_HERE,
    LIBS,
    ROOT,
    Sizes,
    check_errors,
    check_statistics,
    float32_error,
    rounded_bound,
)
from helpers_cases import INT_MAX, INT_MIN, SPREADS, STATS, fill, poison, strided, unstrided
from helpers_memory import Arena, in_child
from hypothesis import strategies as st
from oracle import BLOCKS, BSND, PA_BSND, SLOTS, weigh
from oracle_decode import (
    BNSD,
    BSH,
    CHANNEL,
    PA_BNSD,
    PAGED,
    TENSOR,
    TOKEN,
    Args,
    Output,
    by_row,
    group_of,
    is_codes,
    stored_type,
    width,
)

from gen import bind, spec
from gen.isa import ISAS

OP = "incre_flash_attention"
FEATURES = ("stats", "sinks", "window", "softcap", "alibi", "slots", "pages")
# Small and odd, so that every vector has a tail; between them every format on either side, every
# feature, and none.
SPECS: dict[str, dict[str, Any]] = {
    "f32_all": {"dtype": "f32", "dk": 15, "dv": 7, "features": list(FEATURES)},
    "f16_none": {"dtype": "f16", "dk": 33, "dv": 40},
    "bf16_all": {"dtype": "bf16", "dk": 32, "dv": 32, "features": list(FEATURES)},
    "f32_wide": {"dtype": "f32", "dk": 24, "dv": 131, "features": ["stats"]},
    "bf16_mla": {"dtype": "bf16", "dk": 72, "dv": 64, "features": ["stats", "sinks"]},
    "bf16_i8": {
        "dtype": "bf16",
        "dk": 40,
        "dv": 24,
        "kv": "i8",
        "features": ["stats", "softcap", "slots", "pages"],
    },
    "f16_i8xe4m3": {"dtype": "f16", "dk": 19, "dv": 36, "kv": "i8xe4m3", "features": ["window"]},
    "bf16_i4": {
        "dtype": "bf16",
        "dk": 48,
        "dv": 33,
        "kv": "i4_32",
        "features": ["stats", "alibi", "slots", "pages"],
    },
    "bf16_bf16xi8": {"dtype": "bf16", "dk": 16, "dv": 20, "kv": "bf16xi8", "features": ["stats"]},
    "f16_e4m3xi4": {"dtype": "f16", "dk": 32, "dv": 70, "kv": "e4m3xi4_64"},
    "f16_i4xf16": {"dtype": "f16", "dk": 150, "dv": 16, "kv": "i4_128xf16", "features": ["sinks"]},
    "bf16_tails": {
        "dtype": "bf16",
        "dk": 33,
        "dv": 49,
        "features": ["stats", "window", "softcap"],
        "isa": ["avx512", "amx"],
    },
    "bf16_heads": {
        "dtype": "bf16",
        "dk": 256,
        "dv": 224,
        "features": ["stats", "sinks", "window", "alibi"],
    },
}
# What tiles have beside the other kernels': channels that are no whole column and values wider than
# keys; every width of the steps through the values. Words are tried on the others.
TILED = ("bf16_tails", "bf16_heads")
SMALL = ("f32_all", "f16_none", "bf16_all")  # that have no codes
CODED = (
    "bf16_i8",
    "f16_i8xe4m3",
    "bf16_bf16xi8",
    "f16_e4m3xi4",
)  # whose scales are tensors of their own
SCALED = (*CODED, "bf16_i4", "f16_i4xf16")
POINTERS = (
    "query",
    "key",
    "value",
    "pse_shift",
    "atten_mask",
    "actual_seq_lengths",
    "kv_padding_size",
    "block_table",
    "antiquant_scale",
    "antiquant_offset",
    "quant_scale2",
    "quant_offset2",
    "alibi_slopes",
    "sinks",
)


def table(name: str, **changes: Any) -> dict[str, Any]:
    """The generator's table of one of SPECS. A name that lists all features would be too long for
    some of its header's lines."""
    return {"op": OP, "name": f"hl_decode_{name}", **SPECS[name], **changes}


def has(name: str, feature: str) -> bool:
    return feature in header(name).kernels[0].features


def with_feature(feature: str) -> tuple[str, ...]:
    return tuple(name for name in SPECS if has(name, feature))


@functools.cache
def header(name: str) -> Any:
    """The generator's Header of one of SPECS, or of a shipped header."""
    if name in SPECS:
        return spec.parse_header(table(name))
    return next(h for h in spec.load_catalogue() if h.name == name)


def isas_in(name: str) -> tuple[str, ...]:
    """The instruction sets that a kernel has and that run here: tiles only where both sides of the
    cache are plain bfloat16."""
    return tuple(isa for isa in ISAS_HERE if isa in header(name).kernels[0].isa)


def best_in(name: str) -> str:
    """The one that plan chooses."""
    return isas_in(name)[-1]


@functools.cache
def text(name: str) -> str:
    """The header's C text: the committed file for the shipped ones."""
    shipped = ROOT / "include" / f"{name}.h"
    return shipped.read_text() if shipped.is_file() else bind.header_text(header(name))


def formats_of(name: str) -> tuple[str, str]:
    """How keys and values are stored, as the oracle calls it."""
    dtype = header(name).kernels[0].dtype
    sides = header(name).kernels[0].kv.split("x")
    return tuple("" if side == dtype else side for side in (sides[0], sides[-1]))


@functools.cache
def kernel(name: str) -> bind.Kernel:
    """The compiled kernel, once for the whole run."""
    return bound(name, bind.load(text(name), libs=LIBS["builtin"]))


def bound(name: str, made: bind.Kernel) -> bind.Kernel:
    """A kernel with what tests want to know of it."""
    of = header(name).kernels[0]
    made.dtype = bind.DTYPES[of.dtype]
    made.formats, made.features = formats_of(name), of.features
    return made


def by_pair(*names: str) -> pytest.MarkDecorator:
    """Parametrises name and isa: every kernel on every instruction set that runs here; those that
    are there for tiles on tiles alone."""
    pairs = [
        (name, isa)
        for name in names
        for isa in isas_in(name)
        if name not in TILED or ISAS[isa].tiles
    ]
    return pytest.mark.parametrize("name,isa", pairs)


# ---- a call -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One call: what hypothesis draws, small enough to read in a failure report."""

    lens: tuple[int, ...] = (8,)
    seq_q: int = 1
    heads_kv: int = 1
    group: int = 1
    layout_q: int = BSND
    layout_kv: int = BSND
    room: int = 0  # cache rows that no batch needs
    lengths: str = "each"  # none (all batches are full), one for all, each, more than there are
    padding: int | None = None  # kv_padding_size
    tight: bool = False  # the cache has no rows for it: some batches may see no key at all
    block_size: int = 16
    spare_blocks: int = 2  # that nobody uses, and unused entries of the table
    slots: bool = False
    pages: bool = False  # an array of pointers in the place of key, value and table
    value: bool = True
    pse: str = "none"  # none, one for all batches, each
    mask: str = "none"  # none, one, each
    mask_rows: bool = False  # a row of the mask for each query row
    hidden: float = 0.3  # share of keys that the mask leaves out
    wider: int = 0  # columns of pse and mask behind the needed ones
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    sinks: str = "none"  # none, plain, infinite
    antiquant: int = CHANNEL
    antiquant_f32: bool = True
    offset: bool = True
    quant: str = "none"  # none, tensor, channel
    quant_offset: bool = True
    quant_bf16: bool = False
    spread: str = "normal"
    seed: int = 0


@dataclass
class Case:
    """A call's inputs. `args` is the oracle's view; inputs() and sizes() the kernel's."""

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
        made = {
            "batch": a.batch,
            "seq_q": a.seq_q,
            "heads_q": a.heads_q,
            "heads_kv": a.heads_kv,
            "lengths": a.lengths,
            "layout_query": a.layout_query,
            "layout_kv": a.layout_kv,
            "index_kind": a.index_kind,
            "antiquant_mode": a.antiquant_mode,
            "window": a.window,
            "scale_value": a.scale_value,
            "softcap": a.softcap,
        }
        if a.layout_kv in PAGED:
            made["block_size"], made["max_blocks"] = a.block_size, a.block_table.shape[1]
            if not self.shape.pages:
                made["num_blocks"] = a.key.shape[0]
        else:
            made["seq_kv"] = a.seq_kv
        if a.pse_shift is not None:
            made["pse_batch"], made["pse_width"] = len(a.pse_shift), a.pse_shift.shape[-1]
        if a.atten_mask is not None:
            made["mask_batch"], made["mask_rows"], made["mask_width"] = a.atten_mask.shape
        if a.antiquant_scale is not None:
            made["antiquant_f32"] = int(a.antiquant_scale.dtype == np.float32)
        if a.quant_scale2 is not None:
            made["quant_per_channel"] = int(a.quant_scale2.size > 1)
            made["quant_bf16"] = int(a.quant_scale2.dtype == BF16)
        return {**made, **self.extra}

    def inputs(self) -> dict[str, Any]:
        """The arrays behind the input pointers that are not NULL; pages as a list of arrays."""
        named = {name: getattr(self.args, name) for name in POINTERS}
        if self.shape.pages:
            for tensor in ("key", "value"):
                if named[tensor] is not None:
                    named[f"{tensor}_pages"] = self.pages(named[tensor])
            named |= dict.fromkeys(("key", "value", "block_table"))
        return {name: array for name, array in named.items() if array is not None}

    def pages(self, pool: np.ndarray) -> list[np.ndarray | int | None]:
        """Each block by itself, where a batch needs it; nonsense behind that."""
        a, made = self.args, []
        copies = [page.copy() for page in pool]
        for b in range(a.batch):
            needed = -(-oracle.span(a, b)[1] // a.block_size)
            for i, block in enumerate(a.block_table[b]):
                made.append(copies[block] if i < needed else (None, 16, -16)[i % 3])
        return made

    def outputs(self, arena: Arena | None = None, stats: bool = True) -> dict[str, np.ndarray]:
        """Fresh outputs, every byte 0xff: NaN, or -1. Stats as the extra field "stats" says."""
        a = self.args
        dtype = np.dtype(np.float32) if self.extra.get("out_f32") else self.dtype
        if a.quant_scale2 is not None:
            dtype = np.dtype(np.int8)
        shapes = {"attention_out": ((*a.query.shape[:-1], a.dv), dtype)}
        if stats:
            shape = (a.batch, a.heads_q, a.seq_q)
            shapes |= {name: (shape, np.dtype(np.float32)) for name in STATS}
        if arena is not None:
            return {name: arena.room(*shape) for name, shape in shapes.items()}
        return {name: poison(*shape) for name, shape in shapes.items()}


def in_floats(case: Case) -> Case:
    """The call with its output as it is before rounding: where bits are compared, all of them."""
    case.extra["out_f32"] = 1
    return case


def fields_of(k: bind.Kernel, case: Case, isa: str | int = 0) -> dict[str, Any]:
    """All fields of a call but its outputs."""
    isa = k.isas()[isa] if isinstance(isa, str) else isa
    return {**case.inputs(), **case.sizes(), "isa": isa}


def run(k: bind.Kernel, case: Case, isa: str | int = 0, **more: Any) -> dict[str, np.ndarray]:
    """The one-call function on ordinary memory; asserts that it is accepted."""
    outputs = case.outputs(stats=k.stats)
    result = k.run(**{**fields_of(k, case, isa), **outputs, **more})
    assert result.ok, f"{result.error_text} ({case.shape})"
    return outputs


# ---- ways to call -------------------------------------------------------------------------------


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


def with_gaps(
    rng: np.random.Generator, tensor: np.ndarray, layout: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """A tensor with gaps of 0xff between batches, rows and heads: flat memory and the strides."""
    return strided(rng, by_row(tensor, layout))


def run_guarded(k: bind.Kernel, case: Case, way: Way) -> dict[str, np.ndarray]:
    """One call in a child process, every buffer between forbidden pages, inputs read-only."""
    rng = np.random.default_rng(case.shape.seed)
    a, fields = case.args, {**fields_of(k, case, way.isa), "chunk_keys": way.chunk_keys}
    with Arena(way.flush) as arena:
        for name, array in case.inputs().items():
            if name.endswith("_pages"):
                fields[name] = place_pages(arena, array)
                continue
            if way.strides and name in ("query", "key", "value"):
                layout = a.layout_query if name == "query" else a.layout_kv
                array, fields[f"{name}_stride"] = with_gaps(rng, array, layout)
            fields[name] = arena.place(array)
        outputs = places = case.outputs(arena, way.stats and k.stats)
        if way.strides:
            shape = by_row(places["attention_out"], a.layout_query).shape
            memory, fields["out_stride"] = strided(rng, poison(shape, outputs_type(case)))
            places = {**places, "attention_out": arena.room(memory.shape, memory.dtype)}
        arena.protect()
        what = f"{way} {case.shape}"
        result = in_child(lambda: call_guarded(k, {**fields, **places}, way), what)
        assert result.ok, f"{result.error_text} ({what})"
        arena.check()
        if way.strides:
            memory = places["attention_out"]
            found = unstrided(memory, shape, fields["out_stride"])
            outputs["attention_out"] = by_row(found, a.layout_query).copy()
            found.view(f"u{found.itemsize}")[...] = 0
            assert (memory.view(np.uint8) == 0xFF).sum() == memory.nbytes - found.nbytes, (
                f"a gap between rows of attention_out was written ({what})"
            )
        return {name: array.copy() for name, array in outputs.items()}


def outputs_type(case: Case) -> np.dtype:
    return case.outputs(stats=False)["attention_out"].dtype


def place_pages(arena: Arena, pages: list[Any]) -> list[Any]:
    """Each page between forbidden pages of its own; one that is there twice stays one."""
    placed: dict[int, np.ndarray] = {}
    for page in pages:
        if isinstance(page, np.ndarray) and id(page) not in placed:
            placed[id(page)] = arena.place(page)
    return [placed.get(id(page), page) for page in pages]


def call_guarded(k: bind.Kernel, fields: dict[str, Any], way: Way) -> bind.Result:
    """In the child: workspace and partials of exactly the bytes asked for, guarded too."""
    with Arena(way.flush) as arena:
        plan, result = k.plan(**fields)
        if not result.ok:
            return result
        if way.partials and plan.split_bytes:
            partials = arena.room((plan.split_bytes,), np.uint8)
            fields = {**fields, "partials": partials, "partials_bytes": partials.nbytes}
            plan, result = k.plan(**fields)
        if way.by_task and result.ok:
            workspace = arena.room((plan.task_bytes,), np.uint8)
            for i in reversed(range(plan.n_tasks)):
                k.task(plan, i, workspace)
            for i in reversed(range(plan.n_merges)):
                k.merge(plan, i)
        elif result.ok:
            workspace = arena.room((k.workspace_bytes(**fields),), np.uint8)
            result = k.run(**fields, workspace=workspace)
        arena.check()
        return result


def execute(
    k: bind.Kernel,
    case: Case,
    isa: str,
    *,
    order: int | None = None,
    workers: int = 1,
    partials: bool = False,
    chunk_keys: int = 128,
) -> dict[str, np.ndarray]:
    """plan, tasks in an order (a seed) on some threads, merges."""
    outputs = case.outputs(stats=k.stats)
    fields = {**fields_of(k, case, isa), **outputs, "chunk_keys": chunk_keys}
    plan, result = k.plan(**fields)
    assert result.ok, result.error_text
    if partials:
        room = np.full(plan.split_bytes, 0xFF, np.uint8)
        plan, result = k.plan(**fields, partials=room, partials_bytes=room.nbytes)
        assert result.ok and plan.n_merges > 0, result.error_text
    tasks = None
    if order is not None:
        tasks = np.random.default_rng(order).permutation(plan.n_tasks).tolist()
    k.execute(plan, tasks, workers)
    return outputs


# ---- filling a call with numbers ----------------------------------------------------------------


def make_case(k: bind.Kernel, shape: Shape) -> Case:
    """The call that a Shape describes, for a kernel's widths, type and formats."""
    rng = np.random.default_rng(shape.seed)
    batch, n1, n2 = len(shape.lens), shape.heads_kv * shape.group, shape.heads_kv
    table = None
    if shape.layout_kv in PAGED:
        table, outer = random_table(rng, shape)
    else:
        padding = 0 if shape.tight else max(shape.padding or 0, 0)
        outer = (batch, max(shape.lens, default=0) + padding + shape.room)
    n_rows = math.prod(outer)
    q = np.zeros((batch * shape.seq_q, n1, k.dk))
    tensors = [np.zeros((n_rows, n2, k.dk)), np.zeros((n_rows, n2, k.dv))]
    scale = fill(rng, shape, q, tensors[0], tensors[1])
    if table is not None:  # in the order of the batches' own keys, not of the pool
        tensors = [spread_over(x, table, shape) for x in tensors]
    stored = [
        store(rng, x, kind, k.dtype, shape.spread)
        for x, kind in zip(tensors, k.formats, strict=True)
    ]
    key, value = (x.reshape(*outer, *x.shape[1:]) for x in stored)
    query = q.reshape(batch, shape.seq_q, n1, k.dk).astype(k.dtype)
    args = Args(
        query=by_row(query, shape.layout_q).copy(),
        key=by_row(key, shape.layout_kv).copy(),
        value=by_row(value, shape.layout_kv).copy() if shape.value else None,
        dk=k.dk,
        dv=k.dv,
        formats=k.formats,
        block_table=table,
        layout_query=shape.layout_q,
        layout_kv=shape.layout_kv,
        index_kind=SLOTS if shape.slots else BLOCKS,
        antiquant_mode=shape.antiquant if any(map(is_codes, k.formats)) else CHANNEL,
        window=shape.window,
        softcap=shape.softcap,
        scale_value=scale,
    )
    set_lengths(rng, args, shape)
    set_antiquant(rng, args, shape, tensors)
    set_bias_and_mask(rng, args, shape)
    set_heads(rng, args, shape)
    set_quant(rng, args, shape)
    poison_unread(args)
    return Case(shape, args)


def random_table(
    rng: np.random.Generator, shape: Shape, share: bool = True
) -> tuple[np.ndarray, tuple[int, int]]:
    """A block table (or one of slots) over a shuffled pool, nonsense behind the entries in use,
    and the pool's shape. Sometimes two batches share a first page."""
    size = shape.block_size
    needed = [-(-n // size) for n in shape.lens]
    pool = rng.permutation(sum(needed) + shape.spare_blocks)
    nonsense = [INT_MIN, INT_MAX, -1, len(pool)]
    table = rng.choice(nonsense, (len(needed), max(needed, default=0) + shape.spare_blocks))
    at = 0
    for b, n in enumerate(needed):
        table[b, :n] = pool[at : at + n]
        at += n
    if share and len(needed) > 1 and min(needed[:2]) > 0 and rng.random() < 0.3:
        table[1, 0] = table[0, 0]
    if not shape.slots:
        return table.astype(np.int32), (len(pool), size)
    entries = max(shape.lens, default=0) + shape.spare_blocks
    slots = rng.choice([INT_MIN, INT_MAX, -1, len(pool) * size], (len(needed), entries))
    for b, n in enumerate(shape.lens):
        j = np.arange(n)
        slots[b, :n] = table[b, j // size] * size + j % size
    return slots.astype(np.int32), (len(pool), size)


def spread_over(x: np.ndarray, table: np.ndarray, shape: Shape) -> np.ndarray:
    """Rows dealt out so that a batch's keys are in the order in which they were made: spreads that
    grow from key to key do so in a paged cache too."""
    made, at = x.copy(), 0
    for b, n in enumerate(shape.lens):
        j, size = np.arange(n), 1 if shape.slots else shape.block_size
        places = table[b, j // size].astype(np.int64) * size + j % size
        made[places] = x[at : at + n]
        at += n
    return made


def set_lengths(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """actual_seq_lengths, however many there are, and kv_padding_size."""
    if shape.padding is not None:
        a.kv_padding_size = np.array([shape.padding], np.int32)
    full = a.layout_kv not in PAGED and set(shape.lens) <= {a.seq_kv}
    if shape.lengths == "none" and full:
        return
    if shape.lengths == "one" and len(set(shape.lens)) == 1:
        a.actual_seq_lengths, a.lengths = np.array(shape.lens[:1], np.int32), 1
        return
    more = [INT_MIN, INT_MAX] if shape.lengths == "more" else []
    a.actual_seq_lengths = np.array([*shape.lens, *more], np.int32)
    a.lengths = len(a.actual_seq_lengths) if rng.random() < 0.5 else 0


LARGEST = {"i8": 127.0, "e4m3": 448.0}


def store(
    rng: np.random.Generator, x: np.ndarray, kind: str, dtype: np.dtype, spread: str
) -> np.ndarray:
    """Rows of float64 [rows][heads][channels] in a format; codes that fill their range."""
    if group_of(kind):
        return store_group(rng, x, kind)
    if not is_codes(kind):
        return x.astype(dtype)
    codes = x / unit(x, kind)
    return (np.rint(codes) if kind == "i8" else codes).astype(stored_type(kind, dtype))


def unit(x: np.ndarray, kind: str) -> float:
    """What one step of the codes of a whole tensor stands for."""
    return float(abs(x).max(initial=0.0)) / LARGEST[kind] or 1.0


def store_group(rng: np.random.Generator, x: np.ndarray, kind: str) -> np.ndarray:
    """4-bit codes with scales behind them; every bit that no channel has is 1."""
    channels, group = x.shape[-1], group_of(kind)
    made = np.full((*x.shape[:-1], width(kind, channels)), 0xFF, np.uint8)
    scales_at = -(-channels // 4) * 2
    nibbles = np.full((*x.shape[:-1], 2 * scales_at), 15, np.uint8)
    scales = made[..., scales_at:].view(np.float16)
    for g in range(scales.shape[-1]):
        part = slice(g * group, min((g + 1) * group, channels))
        scale = abs(x[..., part]).max(axis=-1) / 7 * rng.choice([-1.0, 1.0], x.shape[:-1])
        scales[..., g] = scale
        scale = scales[..., g].astype(np.float64)[..., None]
        with np.errstate(all="ignore"):
            codes = np.where(scale != 0, np.rint(x[..., part] / scale), -8.0)
        nibbles[..., part] = np.clip(codes, -8, 7).astype(np.int8).view(np.uint8) & 15
    made[..., :scales_at] = nibbles[..., ::2] | nibbles[..., 1::2] << 4
    return made


def set_antiquant(
    rng: np.random.Generator, a: Args, shape: Shape, tensors: list[np.ndarray]
) -> None:
    """Scales around that of the tensor, some of them negative, and offsets of some steps."""
    if not any(map(is_codes, a.formats)):
        return
    dtype = np.dtype(np.float32)
    if not shape.antiquant_f32 and a.antiquant_mode != TOKEN:
        dtype = a.query.dtype
    scales, offsets = [], []
    for side, x in enumerate(tensors):
        if is_codes(a.formats[side]):
            n = oracle.per_tensor(a, side)
            some = rng.uniform(0.5, 1.5, n) * np.where(rng.random(n) < 0.1, -1.0, 1.0)
            scales.append(unit(x, a.formats[side]) * some)
            offsets.append(rng.integers(-40, 40, n) / 4)
    a.antiquant_scale = np.concatenate(scales).astype(dtype)
    if shape.offset:
        a.antiquant_offset = np.concatenate(offsets).astype(dtype)


def needed_width(a: Args) -> int:
    """Columns of mask and pse that some batch has a key for."""
    return max((sum(oracle.span(a, b)) for b in range(a.batch)), default=0)


def set_bias_and_mask(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """pse_shift and atten_mask; columns behind the needed ones, if any, leave everything out."""
    columns = needed_width(a) + shape.wider
    if shape.pse != "none":
        batch = 1 if shape.pse == "one" else a.batch
        pse = 2 * rng.standard_normal((batch, a.heads_q, a.seq_q, columns))
        a.pse_shift = pse.astype(a.query.dtype)
    if shape.mask != "none":
        batch, mask_rows = 1 if shape.mask == "one" else a.batch, a.seq_q if shape.mask_rows else 1
        hidden = rng.random((batch, mask_rows, columns)) < shape.hidden
        a.atten_mask = np.where(hidden, rng.choice([1, 2, 0x80, 0xFF], hidden.shape), 0)
        a.atten_mask = a.atten_mask.astype(np.uint8)


def set_heads(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """What there is a number a head of."""
    if shape.alibi:
        a.alibi_slopes = rng.uniform(-0.1, 0.5, a.heads_q).astype(np.float32)
    if shape.sinks != "none":
        a.sinks = (2 * rng.standard_normal(a.heads_q)).astype(np.float32)
        if shape.sinks == "infinite":
            a.sinks[rng.random(a.heads_q) < 0.5] = rng.choice([np.inf, -np.inf])


def set_quant(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """quant_scale2 and quant_offset2: codes that fill the range, and some that leave it."""
    if shape.quant == "none":
        return
    n = 1 if shape.quant == "tensor" else a.heads_q * a.dv
    dtype = BF16 if shape.quant_bf16 else np.dtype(np.float32)
    size = {"cancel": 0.5, "tiny": 1e8}.get(shape.spread, 250.0)
    a.quant_scale2 = (rng.uniform(0.3, 2.0, n) * rng.choice([-1.0, 1.0], n) * size).astype(dtype)
    if shape.quant_offset:
        a.quant_offset2 = (20 * rng.standard_normal(n)).astype(dtype)


def poison_unread(a: Args) -> None:
    """0xff into every key and value row that no row sees, into every pse and antiquant number that
    no row needs, and into the mask where no key is."""
    n_rows = math.prod(by_row(a.key, a.layout_kv).shape[:2])
    k_seen = np.zeros((n_rows, a.heads_kv), bool)
    pse_seen = np.zeros(0 if a.pse_shift is None else a.pse_shift.shape, bool)
    token_seen = np.zeros((a.batch, a.seq_kv), bool)
    for r in oracle.rows(a):
        k_seen[r.at, r.n2] = True
        token_seen[r.b, r.columns] = True
        if a.pse_shift is not None:
            pse_seen[r.b % len(pse_seen), r.heads, r.i][:, r.columns] = True
    for tensor in (a.key, a.value):
        if tensor is not None and tensor.size:
            stored = by_row(tensor, a.layout_kv)  # assigned element by element: views may be turned
            flat_seen = k_seen.reshape(stored.shape[:3])
            stored[~flat_seen] = np.frombuffer(b"\xff" * tensor.itemsize, tensor.dtype)[0]
    if a.pse_shift is not None:
        a.pse_shift[~pse_seen] = np.nan
    if a.antiquant_scale is not None and a.antiquant_mode == TOKEN:
        sides = sum(map(is_codes, a.formats))
        unread = ~np.tile(token_seen.reshape(-1), sides)
        for numbers in (a.antiquant_scale, a.antiquant_offset):
            if numbers is not None:
                numbers[unread] = np.nan
    if a.atten_mask is not None:
        poison_mask(a)


def poison_mask(a: Args) -> None:
    """Any bytes in columns of the mask that are no key's of any batch that reads it."""
    used = np.zeros((len(a.atten_mask), a.atten_mask.shape[-1]), bool)
    for b in range(a.batch):
        begin, length = oracle.span(a, b)
        used[b % len(used), begin : begin + length] = True
    for mask, columns in zip(a.atten_mask, used, strict=True):
        mask[:, ~columns] = np.arange((~columns).sum()) % 3 * 127


# ---- the same numbers elsewhere ------------------------------------------------------------------


def relaid(case: Case, layout_q: int, layout_kv: int, size: int = 16, **how: bool) -> Case:
    """A dense BSND call in other layouts; paged ones in shuffled blocks of some size, as slots or
    pages if `how` says so. Whatever is no key of a batch is 0xff."""
    a = case.args
    shape = dataclasses.replace(
        case.shape, layout_q=layout_q, layout_kv=layout_kv, block_size=size, **how
    )
    changes: dict[str, Any] = {
        "query": by_row(a.query, layout_q).copy(),
        "layout_query": layout_q,
        "layout_kv": layout_kv,
    }
    if layout_kv in PAGED:
        changes |= paged(a, shape)
    else:
        for name in ("key", "value"):
            tensor = getattr(a, name)
            changes[name] = None if tensor is None else by_row(tensor, layout_kv).copy()
    made = case.changed(**changes)
    made.shape = shape
    return made


def paged(a: Args, shape: Shape) -> dict[str, Any]:
    """What changes where the keys of a dense BSND cache, which start at its first row, are dealt
    out to blocks."""
    rng = np.random.default_rng(shape.block_size)
    lens = tuple(oracle.span(a, b)[1] for b in range(a.batch))
    table, outer = random_table(rng, dataclasses.replace(shape, lens=lens), share=False)
    changes: dict[str, Any] = {
        "layout_kv": shape.layout_kv,
        "block_table": table,
        "index_kind": SLOTS if shape.slots else BLOCKS,
        "actual_seq_lengths": np.array(lens, np.int32),
        "lengths": 0,
    }
    for name in ("key", "value"):
        tensor = getattr(a, name)
        if tensor is None:
            continue
        changes[name] = by_row(poison((*outer, *tensor.shape[2:]), tensor.dtype), shape.layout_kv)
        changes[name] = changes[name].copy()
        moved = dataclasses.replace(a, **{**changes, "key": changes[name]})
        pool = by_row(changes[name], shape.layout_kv)
        for b, n in enumerate(lens):
            at = oracle.places(moved, b, np.arange(n))
            pool[at // outer[1], at % outer[1]] = tensor[b, :n]
    if a.antiquant_mode == TOKEN:
        for name in ("antiquant_scale", "antiquant_offset"):
            numbers = getattr(a, name)
            if numbers is not None:
                old = numbers.reshape(-1, a.batch, a.seq_kv)
                new = np.full((*old.shape[:2], moved.seq_kv), np.nan, np.float32)
                width = min(old.shape[2], new.shape[2])
                new[..., :width] = old[..., :width]
                changes[name] = new.reshape(-1)
    return changes


# ---- the error rule -----------------------------------------------------------------------------


def sizes(a: Args) -> Sizes:
    """What rounding is relative to, [B][S1][N1] and for values [B][S1][N1][DV]."""
    shape = (a.batch, a.seq_q, a.heads_q)
    score, keys = np.zeros(shape), np.zeros(shape)
    value, spread = np.zeros((*shape, a.dv)), np.zeros((*shape, a.dv))
    with np.errstate(all="ignore"):
        for r in oracle.rows(a):
            if len(r.k) == 0:
                continue
            keys[r.b, r.i, r.heads] = len(r.k)
            size = abs(a.scale) * (abs(r.q.astype(np.float64)) @ r.k_size.astype(np.float64).T)
            bias = abs(r.pse.astype(np.float64)) + abs(r.slopes[:, None] * r.distance)
            bias = np.where(np.isfinite(bias), bias, 0.0)
            score[r.b, r.i, r.heads] = (size + abs(a.softcap) + bias).max(axis=1)
            s = oracle.scores(r, a, np.float64)
            value[r.b, r.i, r.heads] = weigh(s, r.v_size.astype(np.float64), None)[0]
            if tiles_take(a):  # only there it is asked for
                spread[r.b, r.i, r.heads] = spread_of(s, r.v.astype(np.float64), r.sinks)
    return Sizes(score, keys, value, spread)


def spread_of(s: np.ndarray, v: np.ndarray, sinks: np.ndarray | None) -> np.ndarray:
    """sum p |v - o|, [G][DV], o being the mean of v; a sink takes of the weights, not of the
    mean."""
    made = np.zeros((len(s), v.shape[1]))
    shares = np.ones(len(s)) if sinks is None else weigh(s, np.ones((len(v), 1)), sinks)[0][:, 0]
    for head, scores in enumerate(s):
        p = np.exp(scores - scores.max())
        p /= p.sum()
        made[head] = shares[head] * (p @ abs(v - p @ v))
    return np.nan_to_num(made, nan=0.0, posinf=0.0)


def tiles_take(a: Args) -> bool:
    """Whether an instruction set with tiles computes a call on them: caches of bfloat16; and with
    more queries than one tile holds, nothing that changes scores."""
    many = a.heads_q // a.heads_kv * a.seq_q > FEW_HEADS
    changed = a.pse_shift is not None or a.alibi_slopes is not None or a.softcap != 0
    return a.query.dtype == BF16 and a.formats == ("", "") and not (many and changed)


def tile_error(a: Args, isa: str, size: Sizes) -> np.ndarray:
    """What weights in bfloat16 add to the error, as helpers.tile_error says."""
    if not ISAS[isa].tiles or not tiles_take(a):
        return np.zeros(1)
    return 2.0**-8 / (1 - 2.0**-8) * size.spread


@dataclass
class Expected:
    """What the oracle says of a call: its outputs, those of the plain implementation, sizes."""

    want: Output
    plain: np.ndarray
    size: Sizes


def expected(a: Args) -> Expected:
    return Expected(oracle.incre_flash_attention(a), oracle.plain(a), sizes(a))


def check(
    a: Args,
    got: dict[str, np.ndarray],
    isa: str,
    strict: bool = False,
    known: Expected | None = None,
) -> Output:
    """All outputs of one call, made on an instruction set, against the oracle; strict: enough
    elements for the error rule to need no slack but FlashAttention's."""
    known = known or expected(a)
    want, size = known.want, known.size
    by_head = dataclasses.replace(size, score=size.score[..., None], keys=size.keys[..., None])
    error = float32_error(by_head, a.dk) + tile_error(a, isa, size)
    out, exact = (by_row(x, a.layout_query) for x in (got["attention_out"], want.exact))
    if a.quant_scale2 is not None:
        check_codes(a, out, exact, rounded_bound(error, exact, np.dtype(np.float32), size))
    else:
        bound = rounded_bound(error, exact, out.dtype, size)
        check_errors(out, exact, known.plain, size, bound, a.query.dtype, strict)
    check_statistics(got, want, size.score.swapaxes(1, 2))
    return want


@functools.lru_cache(maxsize=64)
def prepared(name: str, shape: Shape) -> tuple[Case, Expected]:
    """A call and its oracle, once for all instruction sets: not to be written to."""
    case = make_case(kernel(name), shape)
    return case, expected(case.args)


def check_call(name: str, shape: Shape, isa: str, **more: Any) -> Case:
    """One call on ordinary memory against the oracle."""
    case, known = prepared(name, shape)
    check(case.args, run(kernel(name), case, isa, **more), isa, known=known)
    return case


def check_guarded(name: str, shape: Shape, way: Way) -> None:
    """One call between guard pages against the oracle."""
    case, known = prepared(name, shape)
    check(case.args, run_guarded(kernel(name), case, way), way.isa, known=known)


def check_codes(a: Args, got: np.ndarray, exact: np.ndarray, bound: np.ndarray) -> None:
    """int8 output: the code of some number within the bound, which is nearly always one code."""
    assert got.dtype == np.int8
    ends = [oracle.quantise(a, exact + side).astype(int) for side in (-bound, bound)]
    low, high = np.minimum(*ends), np.maximum(*ends)
    far = np.maximum(low - got, got - high)
    assert far.max(initial=0) <= 0, f"a code is {far.max()} off"


# ---- what hypothesis draws ----------------------------------------------------------------------


PAIRS = (
    *((layout, layout) for layout in (BSND, BSH, BNSD)),
    *((layout, PA_BSND) for layout in (BSND, BSH, BNSD)),
    (BNSD, PA_BNSD),
)
WAYS = st.builds(
    Way,
    flush=st.sampled_from(("left", "right")),
    strides=st.booleans(),
    chunk_keys=st.sampled_from((0, 128)),
    by_task=st.booleans(),
    partials=st.booleans(),
    stats=st.sampled_from((True, True, True, False)),
)


@st.composite
def shapes(
    draw: Any,
    name: str,
    *,
    max_keys: int = 70,
    max_rows: int = 16,
    spreads: tuple[str, ...] = SPREADS,
) -> Shape:
    """Any small call of a kernel: each axis by itself, so that any two of them meet."""

    def either(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    layout_q, layout_kv = either(*PAIRS)
    paged = layout_kv in PAGED
    batch = either(1, 1, 2, 3)
    keys = st.one_of(st.integers(0, max_keys), st.sampled_from((0, 1, 15, 16, 17, 31, 32, 33, 64)))
    lens = tuple(draw(st.lists(keys, min_size=batch, max_size=batch)))
    lengths = either("none", "one", "each", "each", "more")
    if lengths in ("none", "one"):
        lens = lens[:1] * batch
    coded = any(map(is_codes, formats_of(name)))
    pages = paged and has(name, "pages") and either(False, False, True)
    slots = paged and not pages and has(name, "slots") and either(False, False, True)
    modes = (CHANNEL, TENSOR, TOKEN) if coded else (CHANNEL,)
    dk, dv = header(name).kernels[0].dk, header(name).kernels[0].dv
    alike = dv <= dk and formats_of(name) in (("", ""), ("i8", "i8"))
    quantised = either("none", "none", "none", "tensor", "channel")
    return Shape(
        lens=lens,
        seq_q=draw(st.one_of(st.just(1), st.integers(1, max_rows))),
        heads_kv=either(1, 1, 2, 3),
        group=draw(st.one_of(st.integers(1, 5), st.sampled_from((8, 16, 33)))),
        layout_q=layout_q,
        layout_kv=layout_kv,
        room=0 if lengths == "none" else either(0, 0, 1, 9),
        lengths=lengths,
        padding=either(None, None, -3, 0, 1, 7),
        tight=either(False, False, True),
        block_size=either(1, 3, 7, 16, 16, 48, 128),
        spare_blocks=draw(st.integers(0, 3)),
        slots=slots,
        pages=pages,
        value=not alike or draw(st.booleans()),
        pse=either("none", "one", "each"),
        mask=either("none", "one", "each"),
        mask_rows=draw(st.booleans()),
        hidden=either(0.05, 0.5, 0.97),
        wider=either(0, 0, 1, 40),
        window=either(0, 0, 1, 5, 40) if has(name, "window") else 0,
        softcap=either(0.0, 0.5, 30.0) if has(name, "softcap") else 0.0,
        alibi=has(name, "alibi") and draw(st.booleans()),
        sinks=either("none", "none", "plain", "infinite") if has(name, "sinks") else "none",
        antiquant=either(*modes),
        antiquant_f32=draw(st.booleans()),
        offset=draw(st.booleans()),
        quant=quantised,
        quant_offset=draw(st.booleans()),
        quant_bf16=draw(st.booleans()),
        spread=either(*spreads),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def various(name: str, seed: int, count: int) -> list[tuple[Shape, Way]]:
    """Calls of all kinds, drawn once: for programs that run many calls in one go. No pages, whose
    addresses no file can hold."""
    rng = np.random.default_rng(seed)
    made = []

    def either(*values: Any) -> Any:
        return values[rng.integers(0, len(values))]

    for _ in range(count):
        layout_q, layout_kv = either(*PAIRS)
        slots = layout_kv in PAGED and has(name, "slots") and either(False, True)
        shape = Shape(
            lens=tuple(rng.integers(0, 150, either(1, 2, 3)).tolist()),
            seq_q=either(1, 1, 2, 5, 16),
            heads_kv=either(1, 2),
            group=either(1, 2, 3, 4, 7, 9, 33),
            layout_q=layout_q,
            layout_kv=layout_kv,
            room=either(0, 3),
            padding=either(None, 2),
            block_size=either(1, 3, 16, 48),
            slots=slots,
            pse=either("none", "one", "each"),
            mask=either("none", "one", "each"),
            mask_rows=either(False, True),
            window=either(0, 1, 40) if has(name, "window") else 0,
            softcap=either(0.0, 5.0) if has(name, "softcap") else 0.0,
            alibi=has(name, "alibi") and either(False, True),
            sinks=either("none", "plain", "infinite") if has(name, "sinks") else "none",
            antiquant=either(CHANNEL, TENSOR, TOKEN),
            antiquant_f32=either(False, True),
            offset=either(False, True),
            quant=either("none", "none", "tensor", "channel"),
            quant_bf16=either(False, True),
            spread=either(*SPREADS),
            seed=int(rng.integers(1 << 30)),
        )
        way = Way(
            flush=either("left", "right"),
            chunk_keys=either(0, 128),
            by_task=either(False, True),
            partials=either(False, True),
            stats=has(name, "stats") and either(True, True, False),
        )
        made.append((shape, way))
    return made
