"""What is measured, what was promised of it, and how a measurement is written down.

One row of the main table is a case: a kernel of the catalogue, a shape, an instruction set.
"""

import fnmatch
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import decode
import measure as m
import numpy as np
import training
from tensors import Shape

from gen import matrix, spec
from gen.isa import ISAS

# Promises for the reference machine (an Intel Xeon with AMX): the share of P, the peak of bf16 tile
# products, of R, the bandwidth of reading such rows, or of the float32 multiply-add peak. Keys:
# header, heads, selection and keys; "best" is the instruction set that a plan chooses.
MLA = "bf16_d512_rope64"
DENSE = ("dense", 2048), ("dense", 8192), ("dense", 32768)
SPARSE = ("list", 2048)
LETTERS = {"matrix": "P", "read": "R", "fma": "FMA"}
F16_TIMES = 3.0  # the matrix unit over AVX-512 at 128 heads of float16


@dataclass(frozen=True)
class Target:
    """At least `share` of the limit of that kind."""

    kind: str
    share: float


def promised() -> dict[tuple[str, int, str, int, str], Target]:
    """(header, heads, selection, keys, instruction set or "best") -> what was promised."""
    made = {}

    def add(kind: str, heads: int, shares: tuple[float, ...], isa: str = "best") -> None:
        for (selection, keys), share in zip((*DENSE, SPARSE), shares, strict=True):
            if share:
                made[MLA, heads, selection, keys, isa] = Target(kind, share / 100)

    add("matrix", 128, (57, 57, 47, 45))
    add("matrix", 64, (47, 47, 47, 34))
    add("read", 16, (45, 74, 74, 42))
    for heads in (8, 4, 2):
        add("read", heads, (56, 75, 75, 48))
    add("read", 1, (62, 75, 75, 60))
    for isa in ("avx512", "avx2"):
        add("fma", 128, (70, 70, 70, 70), isa)
    return made


PROMISED = promised()


# ---- cases --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One row of the main table. best: whether a plan would choose this instruction set here."""

    path: Path
    shape: Shape
    isa: str
    best: bool = False
    limited_by: str = ""  # the instruction set whose peak bounds it, if it is another one

    @property
    def header(self) -> str:
        """The header's name without the operator's."""
        return short(self.path.stem)

    @property
    def label(self) -> str:
        """What ONLY=<pattern> is held against."""
        return f"{self.header} {self.shape.title} {self.isa}"

    @property
    def target(self) -> Target | None:
        """What was promised; a share of P only where there is such a unit."""
        shape = self.shape
        if self.path.stem.startswith(decode.PREFIX):
            return self.decode_target
        key = (self.header, shape.heads, shape.selection, shape.keys)
        found = PROMISED.get((*key, self.isa)) or (
            PROMISED.get((*key, "best")) if self.best else None)
        if found and found.kind == "matrix" and self.isa not in m.MATRIX_ISAS:
            return None
        return found

    @property
    def decode_target(self) -> Target | None:
        """The same of the decode operator, which was promised shares of R alone."""
        key = (self.path.stem.removeprefix(decode.PREFIX), self.shape)
        share = decode.PROMISED.get((*key, self.isa))
        if share is None and self.best:
            share = decode.PROMISED.get((*key, "best"))
        return Target("read", share) if share else None


def short(name: str) -> str:
    """hl_sparse_flash_attention_f32_d64 -> f32_d64, hl_incre_flash_attention_f32_d64 ->
    decode_f32_d64, hl_fusion_attention_f32_d64 -> prefill_f32_d64, hl_fusion_attention_grad_f32_d64
    -> backward_f32_d64."""
    if name.startswith(decode.PREFIX):
        return f"decode_{name.removeprefix(decode.PREFIX)}"
    if name.startswith(training.PREFIX + training.GRADIENT):
        return f"backward_{name.removeprefix(training.PREFIX + training.GRADIENT)}"
    if name.startswith(training.PREFIX):
        return f"prefill_{name.removeprefix(training.PREFIX)}"
    return name.removeprefix("hl_").removeprefix("sparse_flash_attention_").removeprefix(
        "antiquant_")


def matches(pattern: str, label: str) -> bool:
    """Whether one of the patterns between | is in the label; * and ? as in file names."""
    return any(fnmatch.fnmatchcase(label, f"*{part.strip()}*") for part in pattern.split("|"))


def mla(heads: int, selection: str, keys: int, cache_keys: int = 0) -> Shape:
    return Shape(heads, 1, keys, cache_keys or keys, selection)


def mla_shapes(heads: tuple[int, ...], selection: str = "list") -> list[Shape]:
    """Dense caches of three sizes, and 2048 selected of the largest."""
    return [shape for n in heads for shape in
            (*(mla(n, *dense) for dense in DENSE), mla(n, selection, 2048, 32768))]


SMALL = Shape(4, 4, 256, 256, value=True)  # of a small model: a call of microseconds
SHAPES = {
    MLA: mla_shapes((128, 64, 16, 8, 4, 2, 1)),
    "f16_d512_rope64": mla_shapes((128,)),
    "bf16_d512_rope64_slots": [mla(128, "slots", 2048, 32768), mla(16, "slots", 2048, 32768)],
    "bf16_d128_rope64": [Shape(16, 16, 4096, 4096, value=True),
                         Shape(16, 16, 1024, 1024, "causal", rows=128, value=True)],
    "f32_d64": [SMALL, Shape(32, 8, 4096, 4096, value=True)],
    "bf16_i8_656_d512_rope64": mla_shapes((128, 64, 16, 8, 4, 2, 1)),
    "bf16_fp8_656_d512_rope64_slots": mla_shapes((128, 16, 1), "slots"),
    "bf16_fp8_v4_d448_rope64_slots": mla_shapes((128, 16), "slots"),
    "f32_d32_rope8": [mla(4, "dense", 64), mla(4, "list", 32, 64)],
}


def shapes_of(kernel: spec.Kernel, quick: bool) -> list[Shape]:
    """The shapes of a kernel; of one that nobody wrote down, such as every kernel can run."""
    if kernel.decodes:
        usual = [decode.gqa(4096), decode.gqa(16384)]
        return decode.QUICK if quick else decode.SHAPES.get(
            kernel.name.removeprefix(decode.PREFIX), usual)
    if kernel.trains:
        return training.QUICK if quick else training.SHAPES.get(
            kernel.name.removeprefix(training.PREFIX), training.PROMPTS)
    if quick:
        listed = "slots" if "slots" in kernel.features else "list"
        return [mla(16, "dense", 512), mla(16, listed, 128, 1024)]
    usual = [mla(16, "dense", 8192), mla(16, "list", 2048, 32768)]
    return SHAPES.get(short(kernel.name), usual)


def headers(quick: bool) -> list[spec.Header]:
    """What is shipped, and what else is measured: other caches when decoding, other types and
    channels of prefill."""
    shipped = spec.load_catalogue()
    known = {header.name for header in shipped}
    wanted = [decode.PREFIX + name for name in decode.SHAPES]
    wanted += [training.PREFIX + name for name in training.SHAPES]
    wanted = [] if quick else [name for name in wanted if name not in known]
    return shipped + [m.described(Path(name)) for name in wanted]


def cases(include: Path, quick: bool) -> tuple[list[Case], list[str]]:
    """All rows, and the instruction sets that are left out because this machine lacks them. Plain
    C is measured where it is all there is, and on one shape of the other headers."""
    made: list[Case] = []
    lacking: set[str] = set()
    for header in headers(quick):
        path = include / f"{header.name}.h"
        kernel = header.kernels[0]
        isas = list(m.build(path).isas)
        lacking |= set(kernel.isa) - set(isas)
        vectors = [isa for isa in isas if isa != "scalar"] or isas
        for shape in shapes_of(kernel, quick):
            made += [Case(path, shape, isa, isa == isas[0], limit_isa(kernel, shape, isa))
                     for isa in vectors]
        if "scalar" in isas[1:]:
            plain = [training.SCALAR] if kernel.trains and not quick else shapes_of(kernel, quick)
            made.append(Case(path, scalar_shape(plain), "scalar"))
    return made, sorted(lacking)


def limit_isa(kernel: spec.Kernel, shape: Shape, isa: str) -> str:
    """The instruction set that computes: where tiles are no help, an instruction set with tiles
    takes the words of another."""
    if kernel.trains:
        return isa
    if isa in m.MATRIX_ISAS and shape.heads // shape.kv_heads < matrix.least_heads(kernel):
        return ISAS[isa].rows_by
    return isa


def scalar_shape(shapes: list[Shape]) -> Shape:
    """The shape with the least work: plain C is a fallback."""
    return min(shapes, key=lambda shape: shape.batch * shape.heads * training.pairs(shape))


# ---- records ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One object of results.json, field by field. rows: of each sequence of the batch. dk:
    channels of a score, with those of the position. layout: of the cache, with the tokens of a
    page. warm: false where caches were swept before each call. ms and spread: median and
    (90th - 10th percentile) / median of the samples. limit: GFLOP/s, or GB/s where limit_kind is
    read. rel_err: of the L2 norm, against float64. peer: null for this project's kernels, whose
    isa is the instruction set; a peer chooses its own: null."""

    kernel: str
    op: str
    isa: str | None
    threads: int
    rows: int
    heads: int
    kv_heads: int
    dk: int
    dv: int
    keys: int
    cache_keys: int
    kv_format: str
    selection: str
    batch: int
    layout: str
    warm: bool
    ms: float
    spread: float
    gflops: float
    gbps: float
    limit_kind: str
    limit: float
    share_of_limit: float
    rel_err: float
    peer: str | None = None

    def json(self) -> dict[str, Any]:
        return asdict(self)


FIGURES = ("ms", "spread", "gflops", "gbps", "limit_kind", "limit", "share_of_limit", "rel_err")


def identity(record: dict[str, Any]) -> tuple[Any, ...]:
    """What was measured, without the figures."""
    return tuple(value for name, value in record.items() if name not in FIGURES)


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Both; of what was measured again, the new figures, in the old place."""
    by_identity = {identity(record): record for record in old}
    by_identity |= {identity(record): record for record in new}
    return list(by_identity.values())


@dataclass(frozen=True)
class Measured:
    """A record with the shares of both limits, round by round medians, for the printed table."""

    record: Record
    shape: Shape
    of_compute: float
    of_read: float
    peak: float  # GFLOP/s
    bandwidth: float  # GB/s
    gather: float | None = None  # GB/s of reading the listed rows themselves
    of_matrix: float | None = None  # prefill on vectors: the share of P, where there are tiles
    target: Target | None = None

    @property
    def reached(self) -> bool:
        share = self.of_read if self.target.kind == "read" else self.of_compute
        return share >= self.target.share


def written(made: m.Build, shape: Shape, isa: str | None, ns: np.ndarray, peak: np.ndarray,
            bandwidth: np.ndarray, error: float, **more: Any) -> tuple[Record, float, float]:
    """The record of samples (ns a call) with the limits that were measured around each of them,
    and the shares of both. In `more`: threads, warm, peer, and `limit_isa`, whose limit holds
    where it is not that of `isa`."""
    flops, size = made.flops(shape), made.bytes(shape)
    threads = more.get("threads", 1)
    kind = m.limit_kind(more.pop("limit_isa", isa), flops, size, float(np.median(peak)),
                        float(np.median(bandwidth)))
    of_compute = float(np.median(flops / ns / (peak * threads)))
    of_read = float(np.median(size / ns / bandwidth))
    ms = float(np.median(ns)) / 1e6
    record = Record(
        kernel=made.kernel.name, op=made.kernel.op.removeprefix("hl_"), isa=isa, threads=threads,
        rows=shape.rows, heads=shape.heads, kv_heads=shape.kv_heads, dk=made.dk, dv=made.dv,
        keys=shape.keys, cache_keys=shape.cache_keys, kv_format=made.kv_format,
        selection=shape.selection, batch=shape.batch, layout=made.place(shape),
        warm=more.get("warm", True), ms=ms, spread=m.spread(ns),
        gflops=flops / ms / 1e6, gbps=size / ms / 1e6, limit_kind=kind,
        limit=float(np.median(bandwidth) if kind == "read" else np.median(peak) * threads),
        share_of_limit=of_read if kind == "read" else of_compute, rel_err=error,
        peer=more.get("peer"))
    return record, of_compute, of_read


def measure(case: Case, rounds: int, seconds: float) -> Measured:
    """One kernel on one shape, with a look at its limits before and after each sample."""
    made = m.build(case.path)
    calls = m.Calls(made, case.shape, case.isa)
    reads = m.reads(case.shape, calls.tensors, calls.turn)
    gather: dict[str, m.Step] = {}
    t = calls.tensors
    if case.shape.listed and t.page == 1 and t.key[0].nbytes % 64 == 0:
        gather = {"gather": m.Gather(t.key, t.lists, 0, calls.turn),
                  "gather ahead": m.Gather(t.key, t.lists, m.ROWS_AHEAD, calls.turn)}
    limited_by = case.limited_by or case.isa
    peak = m.peak(limited_by)
    tiles = made.trains and limited_by not in m.MATRIX_ISAS and m.has_tiles()
    matrix_peak = {"tiles": m.tile_peak(False)} if tiles else {}
    t = m.alternate({
        "peak before": peak, **{f"{name} before": step for name, step in reads.items()},
        **{f"{name} before": step for name, step in matrix_peak.items()}, "ns": calls,
        **{f"{name} after": step for name, step in matrix_peak.items()},
        "peak after": peak, **{f"{name} after": step for name, step in reads.items()}, **gather,
    }, rounds, seconds)
    peaks, bandwidth = around(t)
    record, of_compute, of_read = written(made, case.shape, case.isa, t["ns"], peaks, bandwidth,
                                          calls.error, limit_isa=limited_by)
    gathered = None
    if gather:
        gathered = float(np.median(np.maximum(t["gather"], t["gather ahead"])))
    target = case.target
    if target and target.kind == "read" and record.limit_kind == "fma":
        target = None  # promised of a machine whose arithmetic is not what binds here
    of_matrix = None
    if matrix_peak:
        peaks_of_tiles = (t["tiles before"] + t["tiles after"]) / 2
        of_matrix = float(np.median(made.flops(case.shape) / t["ns"] / peaks_of_tiles))
    return Measured(record, case.shape, of_compute, of_read, float(np.median(peaks)),
                    float(np.median(bandwidth)), gathered, of_matrix, target)


def around(t: m.Times) -> tuple[np.ndarray, np.ndarray]:
    """Peak and read bandwidth of each round: the mean of before and after, the better way to
    read."""
    peaks = (t["peak before"] + t["peak after"]) / 2
    better = [np.maximum(t[f"plain {when}"], t[f"ahead {when}"]) for when in ("before", "after")]
    return peaks, (better[0] + better[1]) / 2
