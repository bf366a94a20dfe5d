"""The same rows in call after call, and everything that may not change their bits: repeats.c on a
shipped header.

    for family in families(name):
        found = repeat(name, isa, family, count=1000)
        assert found.differing == 0, found

A family is a row or some, watched in calls (variants) that place them elsewhere: alone, first, last
and among others of other lengths; in every layout, in pages of several sizes, shuffled. repeats.c
adds threads, the order of tasks, partials, addresses and what memory held before.
"""

import ctypes
import dataclasses
import functools
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers_decode
import helpers_every as every
import helpers_fusion
import numpy as np
import oracle_decode
from helpers_cases import STATS, Case, Shape, make_case, poison, random_pages, split
from helpers_runner import AARCH64, QEMU
from oracle import BSND, PA_BSND, TND
from oracle_decode import BNSD, BSH, PA_BNSD
from oracle_fusion import SBH, flat, unflat

from gen import bind

PAGES = (1, 3, 16, 64, 128)
COMPOSITIONS = ((0,), (0, 1, 2), (2, 1, 0), (3, 1, 0, 2))  # alone, first, last, among; 0 is watched
KEYS = (300, 45, 9, 130)  # of the watched batch (three chunks) and of the others
FEW, MANY = 3, 33  # heads: with more than 32 every instruction set takes its other way
SOURCE = Path(__file__).resolve().parent / "repeats.c"


@dataclass
class Variant:
    """A call, and which elements of its outputs are watched: flat indices, in the rows' order."""

    case: Any
    watched: dict[str, np.ndarray]


@dataclass
class Family:
    what: str
    variants: list[Variant]


# ---- sparse_flash_attention, and its sister ------------------------------------------------------


@dataclass
class Batch:
    """One batch by itself: rows of a tensor, and its list of blocks."""

    query: np.ndarray
    key: np.ndarray
    lists: np.ndarray


def sparse_batches(name: str, heads: int) -> tuple[Case, list[Batch]]:
    """A call to take scale, sinks and the like from, and batches to make others of."""
    k, rng = every.kernel(name), np.random.default_rng(5)
    rows, block = (2, 1, 3, 1), 4
    longest = -(-max(KEYS) // block)
    made = []
    for b, keys in enumerate(KEYS):
        shape = Shape((rows[b],), (keys,), group=heads, joined_q=True, joined_k=True, seed=b)
        paged = "BSND" not in every.description(name).layout_kv
        shape = dataclasses.replace(shape, layout_kv=PA_BSND if paged else BSND, spare_blocks=0)
        a = make_case(k, shape).args
        lists = np.full((rows[b], 1, longest), -1, np.int32)
        for row in lists[:, 0]:
            row[: -(-keys // block)] = rng.permutation(-(-keys // block))
        key = a.key.reshape(-1, *a.key.shape[2:])
        if paged:
            key = key.reshape(len(a.key), -1, *a.key.shape[2:])[a.block_table[0]]
            key = key.reshape(-1, *key.shape[2:])
        made.append(Batch(a.query[0], key[:keys], lists))
    base = make_case(k, Shape((1,), (8,), group=heads, seed=9, layout_kv=shape.layout_kv))
    base.args.sinks = rng.standard_normal(heads).astype(np.float32)
    return base, made


def padded(arrays: list[np.ndarray], more: int = 0) -> np.ndarray:
    """[batch][rows] of arrays of different lengths, 0xff behind them; integers: -1."""
    longest = max(map(len, arrays)) + more
    made = poison((len(arrays), longest, *arrays[0].shape[1:]), arrays[0].dtype)
    for to, array in zip(made, arrays, strict=True):
        to[: len(array)] = array
    return made


def sparse_call(name: str, base: Case, some: list[Batch], layout: int, page: int) -> Case:
    """The batches in a layout; `page` tokens a page where it is paged, and rows of queries as TND
    in every other of those."""
    k, rng = every.kernel(name), np.random.default_rng(page)
    tnd = layout == TND or (layout == PA_BSND and page % 2 == 0)
    lens_q, lens_kv = [len(b.query) for b in some], [len(b.key) for b in some]
    queries, lists = [b.query for b in some], [b.lists for b in some]
    keys, table = [b.key for b in some], None
    if layout == PA_BSND:
        shape = Shape(tuple(lens_q), tuple(lens_kv), block_size=page, spare_blocks=3, seed=page)
        table, outer = unshared_pages(rng, shape)
        pool = poison((*outer, *keys[0].shape[1:]), keys[0].dtype)
        for row, key in zip(table, keys, strict=True):
            j = np.arange(len(key))
            pool[row[j // page], j % page] = key
        key_memory = pool
    else:
        key_memory = np.concatenate(keys) if layout == TND else padded(keys, 2)
    args = dataclasses.replace(
        base.args,
        query=np.concatenate(queries) if tnd else padded(queries, 1),
        query_rope=None,
        key=key_memory,
        key_rope=None,
        sparse_indices=np.concatenate(lists) if tnd else padded(lists, 1),
        sparse_block_size=4,
        block_table=table,
        layout_query=TND if tnd else BSND,
        layout_kv=layout,
        sparse_mode=3,
        actual_seq_lengths_query=lengths(lens_q, tnd),
        actual_seq_lengths_kv=lengths(lens_kv, layout == TND),
    )
    if k.rope and page % 3 != 0:
        args.query, args.query_rope = split(args.query, k.dk)
        if args.record is None:
            args.key, args.key_rope = split(args.key, k.dk)
    return Case(base.shape, args, dict(base.extra))


def lengths(each: list[int], ends: bool) -> np.ndarray:
    return (np.cumsum(each) if ends else np.array(each)).astype(np.int32)


def unshared_pages(rng: np.random.Generator, shape: Shape) -> tuple[np.ndarray, tuple[int, int]]:
    """A shuffled table in which no two batches share a page."""
    while True:
        table, outer = random_pages(rng, shape)
        size = shape.block_size
        used = np.concatenate(
            [row[: -(-n // size)] for row, n in zip(table, shape.lens_kv, strict=True)]
        )
        if len(set(used.tolist())) == len(used):
            return table, outer


def sparse_families(name: str) -> Iterator[Family]:
    of = every.description(name)
    for heads in (FEW, MANY):
        base, batches = sparse_batches(name, heads)
        base.extra = {"out_f32": 1, "chunk_keys": 128}
        ways = [(BSND, 1), (TND, 1)] if "BSND" in of.layout_kv else []
        ways += [(PA_BSND, page) for page in PAGES if "PA_BSND" in of.layout_kv]
        variants = []
        for layout, page in ways:
            for order in COMPOSITIONS:
                case = sparse_call(name, base, [batches[b] for b in order], layout, page)
                variants.append(Variant(case, sparse_watched(case, order)))
        yield Family(f"{heads} heads", variants)


def sparse_watched(case: Case, order: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Batch 0, wherever it is."""
    a, at = case.args, order.index(0)
    out = places((*a.query.shape[:-1], a.dv))
    stats = places(case.stats_shape())
    if a.layout_query == TND:
        ends = [0, *a.actual_seq_lengths_query]
        mine = slice(ends[at], ends[at + 1])
        made = {"attention_out": out[mine]}
        return made | {stat: stats[:, mine].swapaxes(0, 1) for stat in STATS}
    rows = slice(0, a.actual_seq_lengths_query[at])
    made = {"attention_out": out[at, rows]}
    return made | {stat: stats[at, :, rows].swapaxes(0, 1) for stat in STATS}


def places(shape: tuple[int, ...]) -> np.ndarray:
    return np.arange(int(np.prod(shape)), dtype=np.int64).reshape(shape)


# ---- incre_flash_attention -----------------------------------------------------------------------


def some_batches(case: helpers_decode.Case, order: tuple[int, ...]) -> helpers_decode.Case:
    """Batches of a dense BSND call, in an order."""
    a, take = case.args, list(order)
    changes: dict[str, Any] = {
        "query": a.query[take],
        "key": a.key[take],
        "value": None if a.value is None else a.value[take],
        "actual_seq_lengths": a.actual_seq_lengths[take],
        "lengths": 0,
    }
    for name in ("pse_shift", "atten_mask"):
        if (tensor := getattr(a, name)) is not None:
            changes[name] = tensor[take]
    if a.antiquant_mode == oracle_decode.TOKEN:
        for name in ("antiquant_scale", "antiquant_offset"):
            numbers = getattr(a, name).reshape(-1, a.batch, a.seq_kv)
            changes[name] = numbers[:, take].reshape(-1).copy()
    made = case.changed(**changes)
    made.shape = dataclasses.replace(
        case.shape, lens=tuple(case.shape.lens[b] for b in take), lengths="each"
    )
    return made


def decode_families(name: str) -> Iterator[Family]:
    k = every.kernel(name)
    shape = helpers_decode.Shape(
        lens=KEYS,
        heads_kv=2,
        room=2,
        pse="each",
        mask="each",
        window=150 if helpers_decode.has(name, "window") else 0,
        softcap=8.0 if helpers_decode.has(name, "softcap") else 0.0,
        alibi=helpers_decode.has(name, "alibi"),
        sinks="plain" if helpers_decode.has(name, "sinks") else "none",
        antiquant=oracle_decode.TOKEN if any(map(oracle_decode.is_codes, k.formats)) else 0,
        seed=3,
    )
    plain = {"pse": "none", "mask": "none", "softcap": 0.0, "alibi": False, "antiquant": 0}
    ways = [(layout, layout, 1) for layout in (BSND, BSH, BNSD)]
    ways += [(BSND, PA_BSND, page) for page in PAGES[::2]]
    ways += [(BNSD, PA_BNSD, page) for page in PAGES[1::2]]
    for heads, rows, changes in ((1, 3, {}), (FEW, 1, plain), (17, 2, {})):
        made = dataclasses.replace(shape, group=heads, seq_q=rows, **changes)
        base, variants = helpers_decode.make_case(k, made), []
        base.extra = {"chunk_keys": 128, **({"out_f32": 1} if heads != FEW else {})}
        for order in COMPOSITIONS:
            dense = some_batches(base, order)
            for layout_q, layout_kv, page in ways:
                case = helpers_decode.relaid(dense, layout_q, layout_kv, page)
                at, a = order.index(0), case.args
                out = places((*a.query.shape[:-1], a.dv))
                watched = {"attention_out": oracle_decode.by_row(out, layout_q)[at]}
                if k.stats:
                    stats = places((a.batch, a.heads_q, a.seq_q))
                    watched |= dict.fromkeys(STATS, stats[at])
                variants.append(Variant(case, watched))
        yield Family(f"{heads} heads, {rows} rows{', plain' if changes else ''}", variants)


# ---- fusion_attention and its gradients ----------------------------------------------------------


def train_call(name: str, some: list[Any], layout: int, pad: int) -> Any:
    """Batches, each a call of one batch in BSND, in TND with `pad` rows of nobody's behind them, or
    in another layout, for which they have to be of one length."""
    a, dense = some[0].args, [b.args for b in some]
    changes: dict[str, Any] = {"input_layout": layout}
    for tensor in ("query", "key", "value"):
        rows = np.concatenate([getattr(b, tensor)[0] for b in dense])
        if layout == TND:
            rows = np.concatenate([rows, poison((pad, *rows.shape[1:]), rows.dtype)])
        changes[tensor] = unflat(rows, layout, len(some))
    for ends, tensor in (("actual_seq_qlen", "query"), ("actual_seq_kvlen", "key")):
        each = [getattr(b, tensor).shape[1] for b in dense]
        changes[ends] = np.cumsum(each, dtype=np.int64) if layout == TND else None
    if a.pse is not None:
        joined = [b.pse for b in dense]
        changes["pse"] = (
            np.concatenate([p.reshape(-1) for p in joined])
            if layout == TND
            else np.concatenate(joined)
        )
    made = some[0].changed(**changes)
    made.shape = dataclasses.replace(some[0].shape, layout=layout)
    return made


def train_batches(name: str, shape: helpers_fusion.Shape, lens: list[tuple[int, int]]) -> list[Any]:
    """Calls of one batch each; all take the scale of the first."""
    forward = helpers_fusion.FORWARD.get(name, name)
    k, made = helpers_fusion.kernel(forward), []
    for b, (rows, keys) in enumerate(lens):
        one = dataclasses.replace(shape, lens_q=(rows,), lens_kv=(keys,), seed=b + 1)
        case = helpers_fusion.make_case(k, one)
        scale = made[0].args.scale_value if made else case.args.scale_value
        state = dict.fromkeys(("dropout_seed", "dropout_offset"), 77)
        made.append(case.changed(scale_value=scale, sinks=None, **state))
    return made


def train_families(name: str) -> Iterator[Family]:
    """Neighbours of other lengths in TND; all layouts where they are of one; dropout, whose numbers
    belong to a batch's place, in all layouts of one order."""
    plain = helpers_fusion.Shape(heads_kv=2, group=2, mode=3, mask="formula", pse="full")
    other, same = [(70, 300), (33, 40), (100, 17), (1, 130)], [(70, 130)] * 4
    dropped = dataclasses.replace(plain, keep_prob=0.8, pse="none", mode=0, mask="none")
    softcap = 8.0 if helpers_fusion.has(name, "softcap") else 0.0
    plain = dataclasses.replace(plain, softcap=softcap)
    layouts = (BSND, BSH, SBH, BNSD, TND)
    for what, shape, lens, ways in (
        ("TND", plain, other, [(order, TND) for order in COMPOSITIONS]),
        ("one length", plain, same, [(o, x) for o in COMPOSITIONS for x in layouts]),
        ("dropout", dropped, same, [((1, 0, 2), x) for x in layouts]),
    ):
        batches, variants = train_batches(name, shape, lens), []
        for order, layout in ways:
            case = train_call(name, [batches[b] for b in order], layout, 3 * (order[0] + 1))
            case.extra = {"out_f32": 1} if what != "one length" else {}
            variants.append(train_variant(name, case, order, lens))
        yield Family(what, variants)


def train_variant(
    name: str, case: Any, order: tuple[int, ...], lens: list[tuple[int, int]]
) -> Variant:
    """Its watched batch; gradients behind a forward pass, whose results are inputs."""
    at, a = order.index(0), case.args
    begins = [[0, *np.cumsum([lens[b][side] for b in order])] for side in (0, 1)]
    q, kv = (slice(begin[at], begin[at + 1]) for begin in begins)

    def mine(shape: tuple[int, ...], rows: slice) -> np.ndarray:
        return flat(places(shape), a.input_layout)[rows]

    if not every.description(name).backward:
        out = (*a.query.shape[:-1], a.dv)
        stats = helpers_fusion.by_rows(case, places(case.stats_shape()))[q]
        wide = stats[..., None] * case.shape.stats_width + np.arange(case.shape.stats_width)
        watched = {"attention_out": mine(out, q), "softmax_lse": stats}
        return Variant(case, watched | dict.fromkeys(STATS[:2], wide))
    grad = gradients_of(name, case, order)
    watched = {"dquery": mine(a.query.shape, q)}
    watched |= {f"d{n}": mine(getattr(a, n).shape, kv) for n in ("key", "value")}
    return Variant(grad, watched)


def gradients_of(name: str, case: Any, order: tuple[int, ...]) -> helpers_fusion.GradCase:
    """dout that belongs to the batches, wherever they are."""
    a = case.args
    rows = flat(a.query, a.input_layout)
    dout = np.zeros((*rows.shape[:-1], a.dv))
    spans = helpers_fusion.spans_of(a)
    for b, (first, n, _, _) in zip(order, spans, strict=False):
        rng = np.random.default_rng(100 + b)
        dout[first : first + n] = rng.standard_normal((n, *dout.shape[1:]))
    dout = unflat(dout.astype(case.dtype), a.input_layout, a.batch)
    forward = helpers_fusion.kernel(helpers_fusion.FORWARD[name])
    before, case.extra = case.extra, {}
    results = helpers_fusion.run(forward, case, helpers_fusion.WORDS_HERE[-1])
    case.extra = before
    return helpers_fusion.GradCase(case, dout, results)


# ---- repeats -------------------------------------------------------------------------------------


@functools.cache
def families(name: str) -> list[Family]:
    of = every.description(name)
    if of.trains:
        return list(train_families(name))
    return list(decode_families(name) if of.decodes else sparse_families(name))


class RepeatKernel(ctypes.Structure):
    _fields_ = [
        *((n, ctypes.c_void_p) for n in ("run", "plan", "task", "merge", "workspace_bytes")),
        *(
            (n, ctypes.c_int64)
            for n in (
                "args_bytes",
                "plan_bytes",
                "n_tasks",
                "task_bytes",
                "n_merges",
                "split_bytes",
                "partials",
                "partials_bytes",
            )
        ),
    ]


class RepeatPiece(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("offset", ctypes.c_int64),
        ("bytes", ctypes.c_int64),
        ("element", ctypes.c_int64),
        ("align", ctypes.c_int64),
        ("watched", ctypes.c_void_p),
        ("n_watched", ctypes.c_int64),
    ]


class RepeatVariant(ctypes.Structure):
    _fields_ = [
        ("args", ctypes.c_void_p),
        ("piece", ctypes.POINTER(RepeatPiece)),
        ("pieces", ctypes.c_int64),
    ]


class RepeatWay(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_int64) for n in ("repeat", "variant", "workers", "partials", "shift", "status")
    ]


@functools.cache
def driver() -> ctypes.CDLL:
    """repeats.c, once for all headers."""
    made = ctypes.CDLL(
        str(
            bind.compile_c(
                {SOURCE.name: SOURCE.read_text()},
                flags=("-std=gnu99", "-O2", "-Wall", "-Wextra"),
                libs=("-pthread",),
            )
        )
    )
    made.repeats.restype = ctypes.c_int64
    made.repeats.argtypes = (
        *(ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64,) * 4,
        *(ctypes.c_void_p,) * 3,
    )
    return made


def address(function: Any) -> int:
    return ctypes.cast(function, ctypes.c_void_p).value


def bound(k: bind.Kernel) -> RepeatKernel:
    """A kernel's functions, and where its structs have what repeats.c needs."""

    def at(kind: type[ctypes.Structure], field: str) -> int:
        return getattr(kind, field).offset if hasattr(kind, field) else -1

    library, name = k.library, k.name
    return RepeatKernel(
        run=address(library[name]),
        plan=address(library[f"{name}_plan"]),
        task=address(library[f"{name}_task"]),
        merge=address(library[f"{name}_merge"]) if k.merges else None,
        workspace_bytes=address(library[f"{name}_workspace_bytes"]),
        args_bytes=ctypes.sizeof(k.Args),
        plan_bytes=ctypes.sizeof(k.Plan),
        **{n: at(k.Plan, n) for n in ("n_tasks", "task_bytes", "n_merges", "split_bytes")},
        **{n: at(k.Args, n) for n in ("partials", "partials_bytes")},
    )


def alignment(k: bind.Kernel, name: str, array: np.ndarray) -> int:
    """What a buffer's address has to be a multiple of: its element, of records their own."""
    record = getattr(k, "record", None)
    if name == "key" and record is not None:
        return record.align(k.dtype)
    if array.dtype == np.uint8 and name in ("key", "value"):
        return 2  # rows of int4 end in float16 numbers
    return array.itemsize


@dataclass
class Found:
    """What came of some repeats."""

    count: int
    differing: int
    bits: int
    watched: int
    way: dict[str, int]  # of the first that differs

    def __str__(self) -> str:
        return f"{self.differing} of {self.count} differ, in {self.bits} bits; first: {self.way}"


@dataclass
class Piece:
    """A buffer of a call: an input's bytes or an output's size, and what is watched of it."""

    offset: int
    array: np.ndarray
    align: int
    output: bool
    watched: np.ndarray


def pieces_of(k: bind.Kernel, variant: Variant) -> list[Piece]:
    case, made = variant.case, []
    grads = isinstance(case, helpers_fusion.GradCase)
    outputs = case.outputs() if grads else case.outputs(stats=k.stats)
    for n, array in {**case.inputs(), **outputs}.items():
        at = variant.watched.get(n, np.zeros(0)) if n in outputs else np.zeros(0)
        offset, array = getattr(k.Args, n).offset, np.ascontiguousarray(array)
        at = np.ascontiguousarray(at, np.int64).reshape(-1)
        made.append(Piece(offset, array, alignment(k, n, array), n in outputs, at))
    return made


def sizes_of(case: Any) -> dict[str, Any]:
    """Of any operator's case."""
    return case.case.sizes() if isinstance(case, helpers_fusion.GradCase) else case.sizes()


def watched_bytes(pieces: list[Piece]) -> int:
    return sum(p.watched.size * p.array.itemsize for p in pieces)


def repeat(
    name: str, isa: str, family: Family, count: int, kernel: bind.Kernel | None = None
) -> Found:
    """Repeats of a family on one instruction set; of another kernel with the same structs if one
    is given."""
    k, kept = kernel or every.kernel(name), []
    variants, total = (RepeatVariant * len(family.variants))(), 0
    for to, variant in zip(variants, family.variants, strict=True):
        args = k.args(**sizes_of(variant.case), isa=k.isas()[isa])
        buffers = pieces_of(k, variant)
        pieces, total = (RepeatPiece * len(buffers))(), watched_bytes(buffers)
        for piece, p in zip(pieces, buffers, strict=True):
            piece.data = None if p.output else p.array.ctypes.data
            piece.offset, piece.bytes = p.offset, p.array.nbytes
            piece.element, piece.align = p.array.itemsize, p.align
            piece.watched, piece.n_watched = p.watched.ctypes.data, p.watched.size
        to.args, to.piece, to.pieces = ctypes.addressof(args), pieces, len(buffers)
        kept += [args, buffers, pieces]
    want, way, bits = np.zeros(total, np.uint8), RepeatWay(), ctypes.c_int64()
    bound_one = bound(k)
    differing = driver().repeats(
        *(ctypes.byref(bound_one), variants, len(variants), 0, count, total),
        *(want.ctypes.data, ctypes.byref(way), ctypes.byref(bits)),
    )
    found = {n: getattr(way, n) for n, _ in RepeatWay._fields_}
    return Found(count, differing, bits.value, total, found)


def written(k: bind.Kernel, isa: int, family: Family) -> bytes:
    """A family as a program made of repeats.c reads it."""
    parts, total = [], 0
    for variant in family.variants:
        args = k.args(**sizes_of(variant.case), isa=isa)
        buffers = pieces_of(k, variant)
        total = watched_bytes(buffers)
        parts += [struct.pack("<2q", ctypes.sizeof(args), len(buffers)), bytes(args)]
        for p in buffers:
            numbers = (p.offset, p.array.nbytes, p.array.itemsize, p.align, p.watched.size)
            parts.append(struct.pack("<6q", *numbers, p.output))
            parts += [] if p.output else [p.array.tobytes()]
            parts.append(p.watched.tobytes())
    return b"".join([struct.pack("<2q", total, len(family.variants)), *parts])


def repeat_on_neon(name: str, family: Family, count: int) -> Found:
    """The same under qemu, in a program of its own."""
    k = every.kernel(name)
    files = {"header.h": every.text(name), "repeats.c": SOURCE.read_text()}
    named = [f"-DKERNEL={name}", f"-DOPERATOR={k.op}"]
    named += [] if k.merges else ["-DWITHOUT_MERGES"]
    program = bind.compile_c(
        files,
        compiler=AARCH64,
        flags=("-std=gnu99", "-O2", *named),
        libs=("-pthread",),
        suffix=".bin",
    )
    data = written(k, k.constants["HL_ISA_NEON"], family)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "variants"
        path.write_bytes(data)
        command = [*QEMU, program, path, str(count)]
        ran = subprocess.run(command, check=True, capture_output=True, text=True)
    differing, bits, *way = map(int, ran.stdout.split())
    names = [n for n, _ in RepeatWay._fields_]
    (total,) = struct.unpack_from("<q", data)
    return Found(count, differing, bits, total, dict(zip(names, way, strict=True)))
