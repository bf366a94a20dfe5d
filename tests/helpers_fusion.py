"""Kernels and random calls of fusion_attention and fusion_attention_grad, and how results are held
against their oracle.

A Shape says what a call looks like; make_case fills it with numbers. Whatever the call must not
read is NaN (tensors), bytes 0xff (masks) or nonsense (what options make unused).
"""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import oracle_fusion as oracle
import pytest
from helpers import (
    BF16,
    ISAS_HERE,
    LIBS,
    ROOT,
    WORDS_HERE,
    absolute_slack,
    check_errors,
    check_statistics,
    float32_error,
    floor_of,
    last_place,
    rounded_bound,
)
from helpers import Sizes as RowSizes
from helpers_cases import SPREADS, STATS, fill, poison, strided, unstrided
from helpers_memory import Arena, in_child
from hypothesis import strategies as st
from oracle import BSND, TND
from oracle_fusion import (
    BNSD,
    BSH,
    FULL,
    INNER,
    LAST_ROWS,
    ONE_ROW,
    OUTER,
    SBH,
    SLOPE,
    SLOPE_SQRT,
    Args,
    Output,
    flat,
    rows_in,
    spans_of,
    unflat,
)

from gen import bind, spec
from gen.isa import ISAS

OP, GRAD = "fusion_attention", "fusion_attention_grad"
FEATURES = ("pse_types", "softcap", "sinks")
# Small and odd, so that every vector has a tail; between them every type, all features, and none.
SPECS: dict[str, dict[str, Any]] = {
    "f32_all": {"dtype": "f32", "dk": 15, "dv": 7, "features": list(FEATURES)},
    "f16_none": {"dtype": "f16", "dk": 33, "dv": 20},
    "bf16_all": {"dtype": "bf16", "dk": 32, "dv": 32, "features": list(FEATURES)},
    "f32_wide": {"dtype": "f32", "dk": 136, "dv": 131, "features": ["sinks"]},
}
# And those of tests/test_fusion_tiles.py: whole columns of 32 channels, that can be loaded as tiles
# where they are, and others; a step of 128 keys, of 64 and of 256, whose panel is small; float16.
ON_TILES = {"dtype": "bf16", "isa": ["avx512", "amx"]}
IN_PARTS = {"dtype": "f16", "isa": ["avx512", "amx"]}
TILE_SPECS: dict[str, dict[str, Any]] = {
    "bf16_whole": {"dk": 64, "dv": 64, "features": list(FEATURES), **ON_TILES},
    "bf16_tails": {"dk": 40, "dv": 17, **ON_TILES},
    "bf16_128": {"dk": 128, "dv": 128, **ON_TILES},
    "bf16_mla": {"dk": 576, "dv": 512, **ON_TILES},
    "f16_whole": {"dk": 64, "dv": 64, "features": list(FEATURES), **IN_PARTS},
    "f16_tails": {"dk": 40, "dv": 17, **IN_PARTS},
    "f16_128": {"dk": 128, "dv": 128, **IN_PARTS},
}
GRAD_FEATURES = FEATURES[:2]
GRAD_SPECS: dict[str, dict[str, Any]] = {
    "f32_grad": {"dtype": "f32", "dk": 15, "dv": 7, "features": list(GRAD_FEATURES)},
    "f16_grad": {"dtype": "f16", "dk": 33, "dv": 20},
    "bf16_grad": {"dtype": "bf16", "dk": 32, "dv": 32, "features": list(GRAD_FEATURES)},
}
GRAD_TILE_SPECS = {f"{name}_grad": TILE_SPECS[name] for name in ("bf16_tails", "bf16_128")}
GRADS = GRAD_SPECS | GRAD_TILE_SPECS
EVERY = SPECS | TILE_SPECS | GRADS
FORWARD = {"f32_grad": "f32_all", "f16_grad": "f16_none", "bf16_grad": "bf16_all"}
FORWARD |= {name: name.removesuffix("_grad") for name in GRAD_TILE_SPECS}
FORWARD |= {  # the shipped ones
    "hl_fusion_attention_grad_bf16_d128": "hl_fusion_attention_bf16_d128",
    "hl_fusion_attention_grad_f32_d64_pse_types_softcap": (
        "hl_fusion_attention_f32_d64_pse_types_softcap_sinks"
    ),
}
LAYOUTS = (BSND, BSH, SBH, BNSD, TND)
PADDED = LAYOUTS[:4]
INPUTS = (
    "query",
    "key",
    "value",
    "pse",
    "atten_mask",
    "prefix",
    "actual_seq_qlen",
    "actual_seq_kvlen",
    "dropout_mask",
    "sinks",
)
OPTIONS = (
    "input_layout",
    "sparse_mode",
    "mask_from_mode",
    "band",
    "pre_tokens",
    "next_tokens",
    "pse_type",
    "pse_shape",
    "q_start",
    "kv_start",
    "dropout_seed",
    "dropout_offset",
    "scale_value",
    "keep_prob",
    "softcap",
)


def table(name: str, **changes: Any) -> dict[str, Any]:
    """The generator's table of one of EVERY."""
    op = GRAD if name in GRADS else OP
    return {"op": op, "name": f"hl_fa_{name}", **EVERY[name], **changes}


def has(name: str, feature: str) -> bool:
    return feature in header(name).kernels[0].features


def with_feature(feature: str) -> tuple[str, ...]:
    return tuple(name for name in SPECS if has(name, feature))


@functools.cache
def header(name: str) -> Any:
    """The generator's Header of one of EVERY, or of a shipped header."""
    if name in EVERY:
        return spec.parse_header(table(name))
    return next(h for h in spec.load_catalogue() if h.name == name)


def isas_in(name: str) -> tuple[str, ...]:
    """The instruction sets that a kernel has and that run here."""
    return tuple(isa for isa in ISAS_HERE if isa in header(name).kernels[0].isa)


def best_in(name: str) -> str:
    """The one that plan chooses."""
    return isas_in(name)[-1]


@functools.cache
def text(name: str) -> str:
    """The header's C text: the committed file for the shipped ones."""
    shipped = ROOT / "include" / f"{name}.h"
    return shipped.read_text() if shipped.is_file() else bind.header_text(header(name))


@functools.cache
def kernel(name: str) -> bind.Kernel:
    """The compiled kernel, once for the whole run."""
    made = bind.load(text(name), libs=LIBS["builtin"])
    made.dtype = bind.DTYPES[header(name).kernels[0].dtype]
    return made


def by_pair(*names: str) -> pytest.MarkDecorator:
    """Parametrises name and isa: every kernel on every instruction set that runs here."""
    return pytest.mark.parametrize("name,isa", [(n, isa) for n in names for isa in isas_in(n)])


# ---- a call -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """One call: what hypothesis draws, small enough to read in a failure report."""

    lens_q: tuple[int, ...] = (8,)  # all the same but in TND
    lens_kv: tuple[int, ...] = (8,)
    heads_kv: int = 1
    group: int = 1
    layout: int = BSND
    pad_q: int = 0  # TND: rows behind the last end
    pad_kv: int = 0
    unused: int = 0  # TND: batches behind the others, whose ends are 0
    mode: int = 0
    mask: str = "none"  # none, formula (mask_from_mode), given (atten_mask)
    mask_batch: bool = False  # a mask of its own for each batch, each head
    mask_heads: bool = False
    hidden: float = 0.0  # share of pairs that the mask of modes 0, 1 and 5 leaves out besides
    wider: int = 0  # columns and rows of the mask behind the needed ones
    band: tuple[int, int] | None = None
    pse: str = "none"  # none, full, one_row, last_rows, slope
    pse_type: int = INNER
    pse_each: bool = True  # a bias of its own for each batch
    starts: tuple[int, int] = (0, 0)
    softcap: float = 0.0
    sinks: str = "none"  # none, plain, infinite
    keep_prob: float = 0.0
    bits: bool = False  # which weights are kept is given
    stats_width: int = 8
    stats_order: int = 0
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
        rows = [rows_in(x, a.input_layout) for x in (a.query, a.key)]
        each = 1 if a.input_layout == TND else max(a.batch, 1)
        made = {
            "batch": a.batch,
            "seq_q": rows[0] // each,
            "seq_kv": rows[1] // each,
            "heads_q": a.heads_q,
            "heads_kv": a.heads_kv,
            "stats_width": self.shape.stats_width,
            "stats_order": self.shape.stats_order,
            **{name: getattr(a, name) for name in OPTIONS},
        }
        if a.pse is not None:
            made["pse_batch"] = a.batch if a.pse.ndim == 1 else len(a.pse)
        if a.pse is not None and a.pse_shape == LAST_ROWS:
            made["pse_width"] = a.pse.shape[-1]
        if a.atten_mask is not None:
            names = ("mask_batch", "mask_heads", "mask_rows", "mask_width")
            made |= dict(zip(names, a.atten_mask.shape, strict=True))
        return {**made, **self.extra}

    def inputs(self) -> dict[str, np.ndarray]:
        """The arrays behind the input pointers that are not NULL."""
        named = {name: getattr(self.args, name) for name in INPUTS}
        named = {name: array for name, array in named.items() if array is not None}
        assert all(array.flags.c_contiguous for array in named.values())
        return named

    def stats_shape(self) -> tuple[int, ...]:
        """[B][N1][S1], TND [T1][N1]."""
        a, rows = self.args, rows_in(self.args.query, self.args.input_layout)
        if a.input_layout == TND:
            return (rows, a.heads_q)
        return (a.batch, a.heads_q, rows // max(a.batch, 1))

    def outputs(self, arena: Arena | None = None, stats: bool = True) -> dict[str, np.ndarray]:
        """Fresh outputs, every byte 0xff: NaN, or -1."""
        a, f32 = self.args, np.dtype(np.float32)
        dtype = f32 if self.extra.get("out_f32") else self.dtype
        shapes = {"attention_out": ((*a.query.shape[:-1], a.dv), dtype)}
        if stats:
            one = self.stats_shape()
            shapes |= dict.fromkeys(STATS[:2], ((*one, self.shape.stats_width), f32))
            shapes |= {"softmax_lse": (one, f32), "dropout_state": ((3,), np.dtype(np.int64))}
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
    outputs = case.outputs()
    result = k.run(**{**fields_of(k, case, isa), **outputs, **more})
    assert result.ok, f"{result.error_text} ({case.shape})"
    return outputs


def execute(
    k: bind.Kernel, case: Case, isa: str, *, order: int | None = None, workers: int = 1
) -> dict[str, np.ndarray]:
    """plan, and its tasks in an order (a seed) on some threads."""
    outputs = case.outputs()
    plan, result = k.plan(**fields_of(k, case, isa), **outputs)
    assert result.ok, result.error_text
    tasks = None
    if order is not None:
        tasks = np.random.default_rng(order).permutation(plan.n_tasks).tolist()
    k.execute(plan, tasks, workers)
    return outputs


def rows_of(case: Case, got: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The outputs as the oracle has them: [rows][N1][DV], and of statistics, of which every number
    has to be there stats_width times, [rows][N1]."""
    made = {"attention_out": flat(got["attention_out"], case.args.input_layout)}
    for name in STATS:
        if name not in got:
            continue
        stat = got[name]
        if name != "softmax_lse":
            bits = stat.view(np.uint32)
            assert (bits == bits[..., :1]).all(), f"{name} is not the same number in all places"
            stat = stat[..., 0]
        made[name] = by_rows(case, stat)
    return made


def by_rows(case: Case, stat: np.ndarray) -> np.ndarray:
    """One number of each row and head: [rows][N1]."""
    a = case.args
    if a.input_layout != TND:
        return stat.swapaxes(1, 2).reshape(-1, a.heads_q)
    if case.shape.stats_order == 0:
        return stat
    made, at = stat.copy(), 0
    for first, sq, _, _ in spans_of(a):
        if sq:
            block = stat.reshape(-1)[at : at + sq * a.heads_q]
            made[first : first + sq] = block.reshape(a.heads_q, sq).T
            at += sq * a.heads_q
    return made


# ---- ways to call -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """How a call is made; none of it may change what is computed."""

    isa: str = "scalar"
    flush: str = "right"
    strides: bool = False
    by_task: bool = False  # plan, tasks from the last to the first; else the one call
    stats: bool = True


def by_row(tensor: np.ndarray, layout: int) -> np.ndarray:
    """[B][S][N][..] or [T][N][..] of a tensor in any layout; a view."""
    if layout == SBH:
        return tensor.swapaxes(0, 1)
    return tensor.swapaxes(1, 2) if layout == BNSD else tensor


def with_gaps(
    rng: np.random.Generator, tensor: np.ndarray, layout: int
) -> tuple[np.ndarray, tuple[int, ...]]:
    """A tensor with gaps of 0xff between batches, rows and heads: flat memory and the strides."""
    return strided(rng, by_row(tensor, layout))


TENSORS = {"query": "query", "key": "key", "value": "value", "attention_out": "out"}
TENSORS |= {name: name for name in ("dout", "dquery", "dkey", "dvalue")}  # argument -> its stride


def run_guarded(k: bind.Kernel, case: Case, way: Way) -> dict[str, np.ndarray]:
    """One call in a child process, every buffer between forbidden pages, inputs read-only."""
    with Arena(way.flush) as arena:
        fields, outputs = fields_of(k, case, way.isa), case.outputs(arena, way.stats)
        return call_between_pages(k, arena, fields, outputs, way, case.args.input_layout)


def call_between_pages(
    k: bind.Kernel,
    arena: Arena,
    fields: dict[str, Any],
    outputs: dict[str, np.ndarray],
    way: Way,
    layout: int,
) -> dict[str, np.ndarray]:
    """Copies inputs to the arena, gives tensors strides if asked for, calls and looks."""
    said = {n: x.shape if isinstance(x, np.ndarray) else x for n, x in fields.items()}
    rng, what, places = np.random.default_rng(0), f"{way} {said}", dict(outputs)
    for name, array in list(fields.items()):
        if isinstance(array, np.ndarray):
            if way.strides and name in TENSORS:
                array, fields[f"{TENSORS[name]}_stride"] = with_gaps(rng, array, layout)
            fields[name] = arena.place(array)
    shapes = {}
    for name in outputs if way.strides else ():
        if name in TENSORS:
            shape = by_row(outputs[name], layout).shape
            memory, stride = strided(rng, poison(shape, outputs[name].dtype))
            fields[f"{TENSORS[name]}_stride"] = stride
            places[name], shapes[name] = arena.room(memory.shape, memory.dtype), (shape, stride)
    arena.protect()
    result = in_child(lambda: call_guarded(k, {**fields, **places}, way), what)
    assert result.ok, f"{result.error_text} ({what})"
    arena.check()
    made = {name: array.copy() for name, array in outputs.items()}
    for name, (shape, stride) in shapes.items():
        found = unstrided(places[name], shape, stride)
        made[name] = by_row(found, layout).copy()
        found.view(f"u{found.itemsize}")[...] = 0
        gaps = places[name].nbytes - found.nbytes
        written = (places[name].view(np.uint8) == 0xFF).sum() != gaps
        assert not written, f"a gap between rows of {name} was written ({what})"
    return made


def call_guarded(k: bind.Kernel, fields: dict[str, Any], way: Way) -> bind.Result:
    """In the child: a workspace of exactly the bytes asked for, guarded too."""
    with Arena(way.flush) as arena:
        if way.by_task:
            plan, result = k.plan(**fields)
            if result.ok:
                workspace = arena.room((plan.task_bytes,), np.uint8)
                for i in reversed(range(plan.n_tasks)):
                    k.task(plan, i, workspace)
        else:
            workspace = arena.room((k.workspace_bytes(**fields),), np.uint8)
            result = k.run(**fields, workspace=workspace)
        arena.check()
        return result


# ---- filling a call with numbers ----------------------------------------------------------------


def make_case(k: bind.Kernel, shape: Shape) -> Case:
    """The call that a Shape describes, for a kernel's widths and type."""
    rng = np.random.default_rng(shape.seed)
    n1, n2, tnd = shape.heads_kv * shape.group, shape.heads_kv, shape.layout == TND
    assert tnd or all(len(set(lens)) <= 1 for lens in (shape.lens_q, shape.lens_kv))
    rows = [sum(shape.lens_q) + shape.pad_q * tnd, sum(shape.lens_kv) + shape.pad_kv * tnd]
    q = np.zeros((rows[0], n1, k.dk))
    key, value = np.zeros((rows[1], n2, k.dk)), np.zeros((rows[1], n2, k.dv))
    scale = fill(rng, shape, q, key, value)
    batch = len(shape.lens_q)
    tensors = (unflat(x, shape.layout, batch).astype(k.dtype) for x in (q, key, value))
    args = Args(
        *tensors,
        input_layout=shape.layout,
        sparse_mode=shape.mode,
        mask_from_mode=int(shape.mask == "formula"),
        softcap=shape.softcap,
        scale_value=scale,
        keep_prob=shape.keep_prob,
    )
    if tnd:
        zeros = np.zeros(shape.unused, np.int64)
        args.actual_seq_qlen = np.append(np.cumsum(shape.lens_q, dtype=np.int64), zeros)
        args.actual_seq_kvlen = np.append(np.cumsum(shape.lens_kv, dtype=np.int64), zeros)
    if shape.band is not None:
        args.band, (args.pre_tokens, args.next_tokens) = 1, shape.band
    set_mask(rng, args, shape)
    set_pse(rng, args, shape)
    set_dropout(rng, args, shape)
    if shape.sinks != "none":
        args.sinks = (2 * rng.standard_normal(n1)).astype(np.float32)
        if shape.sinks == "infinite":
            args.sinks[rng.random(n1) < 0.5] = rng.choice([np.inf, -np.inf])
    poison_unread(args)
    return Case(shape, args)


def longest(a: Args) -> tuple[int, int]:
    """Most queries and most keys of a batch."""
    spans = spans_of(a)
    return max((s[1] for s in spans), default=0), max((s[3] for s in spans), default=0)


TRIANGLE, RECTANGLE = oracle.upper_triangle()[None, None], oracle.triangle_and_rectangle()


def set_mask(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """prefix, and the mask that a caller passes: of modes 0, 1 and 5 that of its formula (of the
    first batch's prefix, or of each) with more left out; of the others the triangle."""
    spans = spans_of(a)
    if shape.mode in (5, 6):
        a.prefix = np.array([rng.integers(0, s[3] + 1) for s in spans], np.int64)
    if shape.mask != "given":
        return
    if shape.mode not in (0, 1, 5):
        a.atten_mask = RECTANGLE[None, None] if shape.mode == 6 else TRIANGLE
        return
    n_batch = a.batch if shape.mask_batch else 1
    heads, (sq, skv) = a.heads_q if shape.mask_heads else 1, longest(a)
    columns = (n_batch, heads, sq + shape.wider, skv + shape.wider)
    hide = rng.random(columns) < shape.hidden
    band = shape.band or (oracle.NO_LIMIT, oracle.NO_LIMIT)
    for b in range(n_batch):
        prefix = int(a.prefix[b]) if a.prefix is not None else 0
        formula = oracle.full_mask(shape.mode, sq, skv, *band, prefix)
        hide[b, :, :sq, :skv] |= formula.astype(bool)
    a.atten_mask = np.where(hide, rng.choice([1, 2, 0x80, 0xFF], columns), 0).astype(np.uint8)


def set_pse(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """pse in the shape that is asked for."""
    if shape.pse == "none":
        return
    batch = a.batch if shape.pse_each else 1
    spans, sq, skv = spans_of(a), *longest(a)
    a.pse_type = shape.pse_type
    if shape.pse == "slope":
        a.pse = rng.uniform(-0.02, 0.2, (batch, a.heads_q)).astype(np.float32)
        a.q_start, a.kv_start = shape.starts
        return
    a.pse_shape = {"full": FULL, "one_row": ONE_ROW, "last_rows": LAST_ROWS}[shape.pse]
    if shape.pse == "last_rows":
        width = max(skv + shape.wider, 1024)
        by_distance = 2 * rng.standard_normal((batch, a.heads_q, 1024 + 2 * width))
        row, column = np.arange(1024)[:, None], np.arange(width)
        pse = by_distance[..., row - column + width]
    elif a.input_layout == TND:
        each = (s[1] * s[3] if shape.pse == "full" else s[3] for s in spans)
        pse = 2 * rng.standard_normal(a.heads_q * sum(each))
    else:
        rows = (sq,) if shape.pse == "full" else ()
        pse = 2 * rng.standard_normal((batch, a.heads_q, *rows, skv))
    if shape.pse_type == INNER:  # as large behind the scale as it is before
        pse = pse / (abs(a.scale) or 1.0)
    a.pse = pse.astype(a.query.dtype, order="C")


def set_dropout(rng: np.random.Generator, a: Args, shape: Shape) -> None:
    """A seed and an offset of two halves each, or bits; nonsense in bits that nobody has."""
    a.dropout_seed = int(rng.integers(-(2**63), 2**63))
    a.dropout_offset = int(rng.integers(0, 2**32))
    if shape.bits:
        n = sum(sq * skv for _, sq, _, skv in spans_of(a)) * a.heads_q
        bits = rng.random(-(-n // 8) * 8) < a.kept_share
        a.dropout_mask = oracle.pack(bits)


def poison_unread(a: Args) -> None:
    """0xff into query rows that are nobody's, into key and value rows that no row sees, into every
    number of pse that no row needs, and into the mask where no pair is."""
    query, key = flat(a.query, a.input_layout), flat(a.key, a.input_layout)
    q_seen, k_seen = np.zeros(len(query), bool), np.zeros(key.shape[:2], bool)
    pse_seen = None if a.pse is None else np.zeros(a.pse.shape, bool)
    for p, near in zip(oracle.parts(a), oracle.parts(numbered(a)), strict=True):
        q_seen[p.rows] = True
        k_seen[p.keys, p.n2] |= p.seen.any(axis=0)
        if pse_seen is not None and a.pse_type in (INNER, OUTER):
            mark_pse(a, p, near.pse, pse_seen)
    for name, used in (("query", q_seen), ("key", k_seen), ("value", k_seen)):
        tensor = getattr(a, name)
        rows = flat(tensor, a.input_layout).copy()
        rows[~used] = np.frombuffer(b"\xff" * tensor.itemsize, tensor.dtype)[0]
        setattr(a, name, unflat(rows, a.input_layout, a.batch))
    if pse_seen is not None and a.pse_type in (INNER, OUTER):
        a.pse[~pse_seen] = np.nan
    if a.atten_mask is not None and a.sparse_mode in (0, 1, 5):
        poison_mask(a)


def numbered(a: Args) -> Args:
    """The call with the place of each number of pse in its stead."""
    if a.pse is None or a.pse_type not in (INNER, OUTER):
        return dataclasses.replace(a, pse=None, keep_prob=0.0, dropout_mask=None)
    places = np.arange(a.pse.size, dtype=np.float64).reshape(a.pse.shape)
    changes = {"pse": places, "pse_type": OUTER, "keep_prob": 0.0, "dropout_mask": None}
    return dataclasses.replace(a, **changes)


def mark_pse(a: Args, p: oracle.Part, places: np.ndarray, pse_seen: np.ndarray) -> None:
    """The numbers of pse that a part needs; LAST_ROWS: all that stand for a distance it has."""
    if a.pse_shape != LAST_ROWS:
        pse_seen.reshape(-1)[places[p.seen].astype(np.int64)] = True
        return
    i, j = np.nonzero(p.seen)
    width = a.pse.shape[-1]
    row, column = np.arange(1024)[:, None], np.arange(width)
    pse_seen[p.b % len(a.pse), p.h] |= np.isin(width - 1024 + row - column, i - j)


def poison_mask(a: Args) -> None:
    """Any bytes in places of the mask that are no pair's of any batch that reads it."""
    used = np.zeros(a.atten_mask.shape, bool)
    for b, (_, sq, _, skv) in enumerate(spans_of(a)):
        used[b % len(used), :, :sq, :skv] = True
    a.atten_mask[~used] = np.arange((~used).sum()) % 3 * 127


# ---- the error rule -----------------------------------------------------------------------------


def sizes(a: Args) -> RowSizes:
    """What rounding is relative to: score and keys [rows][N1], value and spread [rows][N1][DV]."""
    shape = (rows_in(a.query, a.input_layout), a.heads_q)
    score, keys = np.zeros(shape), np.zeros(shape)
    value, spread = np.zeros((*shape, a.dv)), np.zeros((*shape, a.dv))
    with np.errstate(all="ignore"):
        for p in oracle.parts(a):
            keys[p.rows, p.h] = p.seen.sum(axis=1)
            score[p.rows, p.h] = score_sizes(p, a).max(axis=1, initial=0.0)
            w = oracle.probabilities(p, a, np.float64) * p.kept
            value[p.rows, p.h] = oracle.times(p.seen, w, abs(p.v.astype(np.float64)))
            if a.query.dtype == BF16:  # only there it is asked for
                spread[p.rows, p.h] = spread_of(p, a)
    return RowSizes(score, keys, np.nan_to_num(value, nan=0.0), np.nan_to_num(spread, nan=0.0))


def spread_of(p: oracle.Part, a: Args) -> np.ndarray:
    """sum p |v - o|, [Sq][DV], o being the mean of v, which dropout has multiplied; a sink takes of
    the weights, not of the mean."""
    w = oracle.probabilities(p, a, np.float64)
    shares = np.maximum(w.sum(axis=1, keepdims=True), 1e-300)
    made = np.zeros((len(w), a.dv))
    for i, one in enumerate(w / shares):
        mine = p.seen[i]
        v = p.kept[i][mine, None] * p.v[mine].astype(np.float64)
        made[i] = shares[i] * (one[mine] @ abs(v - one[mine] @ v))
    return made


def score_sizes(p: oracle.Part, a: Args) -> np.ndarray:
    """[Sq][Skv] as large as the parts that scores are sums of."""
    q, k = abs(p.q.astype(np.float64)), abs(p.k.astype(np.float64))
    size = abs(a.scale) * (q @ k.T) + abs(a.softcap) + abs(p.pse)
    return np.where(p.seen & np.isfinite(size), size, 0.0)


@dataclass
class Expected:
    """What the oracle says of a call: its outputs, those of the plain implementation, sizes."""

    want: Output
    plain: np.ndarray
    size: RowSizes


def expected(a: Args) -> Expected:
    return Expected(oracle.fusion_attention(a), oracle.plain(a), sizes(a))


def tile_share() -> float:
    """What rounding the weights of a mean to bfloat16 does to it, of sum p |v - o|."""
    return 2.0**-8 / (1 - 2.0**-8)


def check(
    case: Case,
    got: dict[str, np.ndarray],
    isa: str,
    strict: bool = False,
    known: Expected | None = None,
) -> Output:
    """All outputs of one call, made on an instruction set, against the oracle; strict: enough
    elements for the error rule to need no slack but FlashAttention's."""
    a, known = case.args, known or expected(case.args)
    want, size, found = known.want, known.size, rows_of(case, got)
    by_head = dataclasses.replace(size, score=size.score[..., None], keys=size.keys[..., None])
    error = float32_error(by_head, a.query.shape[-1])
    if ISAS[isa].tiles:  # weights are rounded, as helpers.tile_error says
        split = case.dtype == np.float16
        error = error + (2 * 2.0**-16 * size.value if split else tile_share() * size.spread)
    out = found["attention_out"]
    bound = rounded_bound(error, want.out, out.dtype, size)
    check_errors(out, want.out, known.plain, size, bound, case.dtype, strict)
    check_statistics(found, want, size.score)
    for name in STATS:
        if name in found:
            exact = getattr(want, name.removeprefix("softmax_"))
            special = ~np.isfinite(exact) | (abs(exact) == oracle.FLT_MAX) | (exact == 0)
            same = found[name].astype(np.float64) == exact
            assert (same | np.isnan(exact) | ~special | (known.size.keys > 0)).all(), name
    check_state(case, got)
    return want


def check_state(case: Case, got: dict[str, np.ndarray]) -> None:
    """dropout_state: seed, offset and how many weights there are; of calls with queries."""
    a, state = case.args, got.get("dropout_state")
    if state is not None and a.query.size:
        n = a.heads_q * sum(sq * skv for _, sq, _, skv in spans_of(a))
        assert state.tolist() == [a.dropout_seed, a.dropout_offset, n]


@functools.lru_cache(maxsize=64)
def prepared(name: str, shape: Shape) -> tuple[Case, Expected]:
    """A call and its oracle, once for all instruction sets: not to be written to."""
    case = make_case(kernel(name), shape)
    return case, expected(case.args)


def check_call(name: str, shape: Shape, isa: str, strict: bool = False, **more: Any) -> Case:
    """One call on ordinary memory against the oracle."""
    case, known = prepared(name, shape)
    check(case, run(kernel(name), case, isa, **more), isa, strict, known=known)
    return case


def check_guarded(name: str, shape: Shape, way: Way) -> None:
    """One call between guard pages against the oracle."""
    case, known = prepared(name, shape)
    check(case, run_guarded(kernel(name), case, way), way.isa, known=known)


# ---- gradients ----------------------------------------------------------------------------------


@dataclass
class GradCase:
    """A call of the backward operator behind one of the forward operator."""

    case: Case
    dout: np.ndarray
    forward: dict[str, np.ndarray]  # attention_out, softmax_max, softmax_sum of the forward kernel

    def inputs(self) -> dict[str, np.ndarray]:
        made = {**self.case.inputs(), "dout": self.dout}
        made.pop("sinks", None)  # they are in max and sum
        made |= {n: self.forward[n] for n in ("attention_out", "softmax_max", "softmax_sum")}
        return made

    def outputs(self, arena: Arena | None = None) -> dict[str, np.ndarray]:
        """Fresh gradients, every byte 0xff; that of pse where it has one."""
        a = self.case.args
        dtype = np.dtype(np.float32) if self.case.extra.get("out_f32") else self.case.dtype
        shapes = {f"d{name}": getattr(a, name).shape for name in ("query", "key", "value")}
        if has_dpse(a):
            shapes["dpse"] = a.pse.shape
        room = arena.room if arena is not None else poison
        return {name: room(shape, dtype) for name, shape in shapes.items()}


def has_dpse(a: Args) -> bool:
    """HL_PSE_FULL with a bias of its own for each batch."""
    if a.pse is None or a.pse_type not in (INNER, OUTER) or a.pse_shape != FULL:
        return False
    return a.pse.ndim == 1 or len(a.pse) == a.batch


def make_grad_case(name: str, shape: Shape, isa: str = WORDS_HERE[-1]) -> GradCase:
    """The forward kernel's call, made, and random gradients of its output; 0xff in rows that are
    nobody's."""
    k = kernel(FORWARD[name])
    case = make_case(k, shape)
    a = case.args
    rng = np.random.default_rng(shape.seed + 1)
    rows = rng.standard_normal((rows_in(a.query, a.input_layout), a.heads_q, a.dv))
    rows = rows.astype(case.dtype)
    used = np.zeros(len(rows), bool)
    for first, sq, _, _ in spans_of(a):
        used[first : first + sq] = True
    rows[~used] = np.frombuffer(b"\xff" * rows.itemsize, rows.dtype)[0]
    forward = run(k, case, isa)
    return GradCase(case, unflat(rows, a.input_layout, a.batch), forward)


def grad_fields(k: bind.Kernel, grad: GradCase, isa: str | int = 0) -> dict[str, Any]:
    """All fields of a call of the backward operator but its outputs."""
    isa = k.isas()[isa] if isinstance(isa, str) else isa
    return {**grad.inputs(), **grad.case.sizes(), "isa": isa}


def run_grad(k: bind.Kernel, grad: GradCase, isa: str | int = 0, **more) -> dict[str, np.ndarray]:
    """The one-call function on ordinary memory; asserts that it is accepted."""
    outputs = grad.outputs()
    result = k.run(**{**grad_fields(k, grad, isa), **outputs, **more})
    assert result.ok, f"{result.error_text} ({grad.case.shape})"
    return outputs


def run_grad_guarded(k: bind.Kernel, grad: GradCase, way: Way) -> dict[str, np.ndarray]:
    """One call in a child process, every buffer between forbidden pages, inputs read-only."""
    with Arena(way.flush) as arena:
        fields, outputs = grad_fields(k, grad, way.isa), grad.outputs(arena)
        return call_between_pages(k, arena, fields, outputs, way, grad.case.args.input_layout)


def grad_rows(a: Args, got: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Gradients as the oracle has them."""
    made = {n: flat(x, a.input_layout) for n, x in got.items() if n != "dpse"}
    return made | ({"dpse": got["dpse"].reshape(-1)} if "dpse" in got else {})


@dataclass
class ExpectedGrads:
    """The oracle's gradients, the plain implementation's, and a bound of each element's error."""

    want: oracle.Grads
    plain: oracle.Grads
    bound: oracle.Grads


@functools.lru_cache(maxsize=64)
def prepared_grad(name: str, shape: Shape) -> tuple[GradCase, ExpectedGrads]:
    """A call and its oracle, once for all instruction sets: not to be written to."""
    grad = make_grad_case(name, shape)
    return grad, expected_grads(grad)


def expected_grads(grad: GradCase) -> ExpectedGrads:
    a = grad.case.args
    want = oracle.fusion_attention_grad(a, grad.dout)
    plain = oracle.fusion_attention_grad(a, grad.dout, grad.forward["attention_out"])
    return ExpectedGrads(want, plain, grad_bounds(grad))


def grad_bounds(grad: GradCase) -> oracle.Grads:
    """What float32 in any order can do to each element, and attention_out's rounding, of which
    rowsum(P o dP) = rowsum(dO o O) is made. u = 2^-24; per pair of a row and a key
        P:  4 delta + gamma of it, delta = (DK + 8) u |score|, gamma = (2 keys + 64) u;
        dP: (DV + 8) u of sum |dO| |v|, as the row's sum, which has u' sum |dO| |O| besides."""
    a, u = grad.case.args, 2.0**-24
    out = flat(grad.forward["attention_out"], a.input_layout).astype(np.float64)
    dout = flat(grad.dout, a.input_layout)
    query, key, value = (flat(x, a.input_layout) for x in (a.query, a.key, a.value))
    made = oracle.Grads(*(np.zeros(x.shape) for x in (query, key, value)), np.zeros(0))
    dpse, dtype = [], grad.forward["attention_out"].dtype
    narrow, floor, tiny = last_place(dtype), floor_of(dtype), 2.0**-120
    with np.errstate(all="ignore"):
        for p in oracle.parts(a):
            do, o = abs(dout[p.rows, p.h].astype(np.float64)), abs(out[p.rows, p.h])
            q, k, v = (np.nan_to_num(abs(x.astype(np.float64))) for x in (p.q, p.k, p.v))
            do, o = np.nan_to_num(do), np.nan_to_num(o)
            keys, terms = p.seen.sum(axis=1, keepdims=True), a.heads_q * p.seen.shape[0]
            score = score_sizes(p, a).max(axis=1, keepdims=True, initial=0.0)
            delta, gamma = (a.query.shape[-1] + 8) * u * score, (2 * keys + 64) * u
            some = (4 * delta + gamma) * np.exp(np.minimum(4 * delta, 50.0))
            w = oracle.probabilities(p, a, np.float64)
            dw = np.where(p.seen, do @ v.T * p.kept, 0.0)
            row = (w * dw).sum(axis=1, keepdims=True)
            rounding = (do * (narrow * o + floor)).sum(axis=1, keepdims=True)
            size = w * (dw + row)
            e = size * (some + (a.dv + 8 + 2 * keys) * u) + w * (rounding + some * row)
            e += tiny * (dw + row)
            scale, p_kept = abs(a.scale), w * p.kept
            made.dquery[p.rows, p.h] = scale * ((e + (keys + 8) * u * size) @ k)
            made.dkey[p.keys, p.n2] += scale * ((e + (terms + 8) * u * size).T @ q)
            made.dvalue[p.keys, p.n2] += (p_kept * (some + (terms + 8) * u) + tiny * p.kept).T @ do
            dpse.append(((e + 8 * u * size) * (scale if a.pse_type == INNER else 1)).reshape(-1))
    made.dpse = np.concatenate([np.zeros(0), *dpse])
    return made


def check_grads(
    grad: GradCase, got: dict[str, np.ndarray], isa: str, known: ExpectedGrads, strict: bool = False
) -> None:
    """Every gradient within its bound; strict, of many elements: and no further off than twice the
    plain implementation's in the query's type (on average half as far again)."""
    found = grad_rows(grad.case.args, got)
    for name, x in found.items():
        exact, reference, bound = (
            getattr(of, name) for of in (known.want, known.plain, known.bound)
        )
        x, dtype = x.astype(np.float64), got[name].dtype
        assert (np.isnan(x) == np.isnan(exact)).all(), f"{name}: NaN here or there"
        if not x.size:
            continue
        error, other = (np.nan_to_num(abs(y.astype(np.float64) - exact)) for y in (x, reference))
        if ISAS[isa].tiles:  # the matrices are rounded there too
            bound = bound + 2 * other.max()
        bound = bound + last_place(dtype) * (abs(exact) + bound) + 2 * floor_of(dtype) + 2.0**-120
        worst = np.nan_to_num(error / bound).max()
        assert worst <= 1.0, f"{name}: an element's error is {worst:.3g} times its bound"
        if not strict:
            continue
        slack = absolute_slack(exact, dtype)
        assert error.max() <= 2 * other.max() + slack, (
            f"{name}: largest error {error.max():.3g}, the plain one's {other.max():.3g}"
        )
        assert error.mean() <= 1.5 * other.mean() + slack, (
            f"{name}: mean error {error.mean():.3g}, the plain one's {other.mean():.3g}"
        )


def check_grad(name: str, shape: Shape, isa: str, strict: bool = False) -> GradCase:
    """One call of the backward operator on ordinary memory against the oracle."""
    grad, known = prepared_grad(name, shape)
    check_grads(grad, run_grad(kernel(name), grad, isa), isa, known, strict)
    return grad


# ---- what hypothesis draws ----------------------------------------------------------------------


WAYS = st.builds(
    Way,
    flush=st.sampled_from(("left", "right")),
    strides=st.booleans(),
    by_task=st.booleans(),
    stats=st.sampled_from((True, True, True, False)),
)
EDGES = (0, 1, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65)


@st.composite
def shapes(
    draw: Any,
    name: str,
    *,
    longest: int = 40,
    spreads: tuple[str, ...] = SPREADS,
    plain_sinks: bool = False,
) -> Shape:
    """Any small call of a kernel: each axis by itself, so that any two of them meet."""

    def either(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    layout = either(*LAYOUTS, TND)
    batch = either(1, 1, 2, 3)
    length = st.one_of(st.integers(0, longest), st.sampled_from(EDGES))
    lens_q, lens_kv = (
        tuple(draw(st.lists(length, min_size=batch, max_size=batch))) for _ in range(2)
    )
    if layout != TND:
        lens_q, lens_kv = lens_q[:1] * batch, lens_kv[:1] * batch
    mask = either("none", "formula", "given", "given")
    modes = [0, 0, 1, 2, 3, 4, 6] + ([7, 8] if layout == TND else [5])
    mode = either(*modes)
    typed = has(name, "pse_types")
    pse_types = (INNER, OUTER, SLOPE, SLOPE_SQRT) if typed else (INNER,)
    pse = "none" if mode in (7, 8) else either("none", "full", "one_row", "last_rows")
    pse_type = either(*pse_types)
    if pse != "none" and pse_type in (SLOPE, SLOPE_SQRT):
        pse = "slope"
    if pse == "last_rows" and (mode not in (0, 2, 3) or lens_q != lens_kv or max(lens_q) < 30):
        pse = "full"
    tokens = st.one_of(st.integers(-20, 40), st.sampled_from((0, 1, 2**31 - 1, -(2**31), 2**62)))
    sinks = ("none", "none", "plain", "plain" if plain_sinks else "infinite")
    return Shape(
        lens_q=lens_q,
        lens_kv=lens_kv,
        heads_kv=either(1, 1, 2, 3),
        group=draw(st.integers(1, 4)),
        layout=layout,
        pad_q=either(0, 0, 1, 5),
        pad_kv=either(0, 0, 1, 5),
        unused=either(0, 0, 1, 2),
        mode=mode,
        mask=mask,
        mask_batch=layout != TND and draw(st.booleans()),
        mask_heads=layout != TND and draw(st.booleans()),
        hidden=either(0.0, 0.05, 0.5, 0.97),
        wider=either(0, 0, 1, 20),
        band=either(None, (draw(tokens), draw(tokens))),
        pse=pse,
        pse_type=pse_type,
        pse_each=layout == TND or draw(st.booleans()),
        starts=(draw(st.integers(-9, 50)), draw(st.integers(-9, 50))),
        softcap=either(0.0, 0.5, 30.0) if has(name, "softcap") else 0.0,
        sinks=either(*sinks) if has(name, "sinks") else "none",
        keep_prob=either(0.0, 0.0, 1.0, 0.9, 0.1),
        bits=draw(st.booleans()),
        stats_width=either(8, 1),
        stats_order=either(0, 0, 1) if layout == TND else 0,
        spread=either(*spreads),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


def various(name: str, seed: int, count: int) -> list[tuple[Shape, Way]]:
    """Calls of all kinds, drawn once: for programs that run many calls in one go."""
    rng = np.random.default_rng(seed)
    made = []

    def either(*values: Any) -> Any:
        return values[rng.integers(0, len(values))]

    for _ in range(count):
        layout = either(*LAYOUTS, TND)
        batch = either(1, 2, 3)
        lens_q, lens_kv = (tuple(rng.integers(0, 160, batch).tolist()) for _ in range(2))
        if layout != TND:
            lens_q, lens_kv = lens_q[:1] * batch, lens_kv[:1] * batch
        mode = either(0, 1, 2, 3, 4, 6, *((7, 8) if layout == TND else (5,)))
        pse = "none" if mode > 6 else either("none", "full", "one_row")
        kind = either(INNER, OUTER, SLOPE, SLOPE_SQRT) if has(name, "pse_types") else INNER
        shape = Shape(
            lens_q=lens_q,
            lens_kv=lens_kv,
            heads_kv=either(1, 2),
            group=either(1, 2, 3),
            layout=layout,
            pad_q=either(0, 3),
            pad_kv=either(0, 3),
            unused=either(0, 2),
            mode=mode,
            mask=either("none", "formula", "formula")
            if mode not in (0, 1, 5)
            else either("formula", "given"),
            hidden=either(0.0, 0.5),
            band=either(None, (20, 3), (90, -4), (-3, 100)),
            pse="slope" if pse != "none" and kind in (SLOPE, SLOPE_SQRT) else pse,
            pse_type=kind,
            softcap=either(0.0, 5.0) if has(name, "softcap") else 0.0,
            sinks=either("none", "plain", "infinite") if has(name, "sinks") else "none",
            keep_prob=either(0.0, 0.7),
            bits=either(False, True),
            stats_width=either(1, 8),
            stats_order=either(0, 1) if layout == TND else 0,
            spread=either(*SPREADS),
            seed=int(rng.integers(1 << 30)),
        )
        made.append(
            (
                shape,
                Way(
                    flush=either("left", "right"),
                    by_task=either(False, True),
                    stats=either(True, True, False),
                ),
            )
        )
    return made
