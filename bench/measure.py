"""Tensors, kernels and limits as steps that can be timed in turn: what bench/run.py is made of.

Clocks wander, so a figure is never a time alone: `alternate` runs all steps one after another,
many times over, and ratios are formed inside one round, between neighbours.
"""

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import decode
import numpy as np
import training
from tensors import (
    MOST_HEADS,
    SCORE_DEVIATION,
    Shape,
    Tensors,
    allocate,
    exact,
    held_keys,
    lists,
    normal_once,
    pages,
    tensors,
)

from gen import bind, names, spec
from gen.formats import Plan, layout

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
READ_AHEAD = 1024  # bytes; beyond that nothing is gained
ROWS_AHEAD = 4  # of a gather
SAMPLE_NS = 2e6  # a sample of a kernel is as many calls as fill this
READ_SAMPLE_NS = 3e5
BLOCK_SIZE = 64  # of pages, where scales lie behind a page's rows
SWEPT = 1 << 30  # bytes read before a call that is to find cold caches
VECTOR_BYTES = {"scalar": 16, "neon": 16, "avx2": 32, "avx512": 64}
MATRIX_ISAS = ("amx",)  # whose limit is the matrix unit, not a vector's multiply-adds

Step = Callable[[], float]
Times = dict[str, np.ndarray]


# ---- figures ------------------------------------------------------------------------------------


def alternate(steps: dict[str, Step], rounds: int, seconds: float = 0) -> Times:
    """Every step once a round, in the given order, after one round that does not count. With
    `seconds`, rounds stop once they are over, but not before there are five."""
    made: dict[str, list[float]] = {name: [] for name in steps}
    begin = time.monotonic()
    for i in range(rounds + 1):
        if seconds and i > 5 and time.monotonic() - begin > seconds:
            break
        for name, step in steps.items():
            value = step()
            if i > 0:
                made[name].append(value)
    return {name: np.array(values) for name, values in made.items()}


def spread(values: Sequence[float] | np.ndarray) -> float:
    """How far the middle four fifths of the samples are apart, relative to their median."""
    low, high = np.percentile(values, [10, 90])
    return float((high - low) / np.median(values))


def limit_kind(isa: str, flops: float, read_bytes: float, peak: float, bandwidth: float) -> str:
    """Which limit binds work of so many operations and bytes, given GFLOP/s and GB/s."""
    if flops / read_bytes < peak / bandwidth:
        return "read"
    return "matrix" if isa in MATRIX_ISAS else "fma"


def checked(ns: float) -> float:
    """Nanoseconds as C returned them; a negative number is a status."""
    if ns < 0:
        raise RuntimeError(f"the kernel refused the call with status {ns:.0f}")
    return ns


C_LETTERS = {"p": ctypes.c_void_p, "i": ctypes.c_int, "z": ctypes.c_size_t, "l": ctypes.c_int64,
             "f": ctypes.c_float, "d": ctypes.c_double, "v": None}


def declare(function: Any, parameters: str, result: str) -> Any:
    """The function of a C library with its types said, a letter each."""
    function.argtypes = [C_LETTERS[letter] for letter in parameters]
    function.restype = C_LETTERS[result]
    return function


# ---- tensors ------------------------------------------------------------------------------------


@functools.cache
def records(made: "Build", rows: int) -> tuple[np.ndarray, np.ndarray]:
    """A cache of records of normal rows, written by the header's own routine, and the numbers that
    it reads back: [rows][1][dk]. (tests/test_rows.py holds both against an oracle.)"""
    memory, numbers = build_cache(made, rows), allocate((rows, 1, made.dk), np.float32)
    shared = {"rows": rows, "records": memory, "numbers_f32": 1,
              "block_size": BLOCK_SIZE if made.record.behind else 0}
    made.kernel.quantise_rows(nope=normal_once("key", rows, 1, made.dk, np.float32),
                              **shared).check()
    made.kernel.dequantise_rows(nope=numbers, **shared).check()
    return memory, numbers


def record_tensors(shape: Shape, dk: int, dv: int, dtype: Any, made: "Build") -> Tensors:
    """The same with a cache of records."""
    held = held_keys(shape)
    query = normal_once("query", shape.rows, max(MOST_HEADS, shape.heads), dk, dtype)
    memory, numbers = records(made, held)
    page = held // len(memory)
    entries = lists(shape.cache_keys, shape.keys) if shape.listed else None
    return Tensors(np.ascontiguousarray(query[:, : shape.heads]),
                   memory[: shape.cache_keys // page], None, entries, dv,
                   SCORE_DEVIATION / dk**0.5, numbers[: shape.cache_keys], page)


def tensors_of(shape: Shape, dk: int, dv: int, dtype: Any, made: "Build | None") -> Tensors:
    """Of either kind of cache; `made`: whose records it is of."""
    return record_tensors(shape, dk, dv, dtype, made) if made else tensors(shape, dk, dv, dtype)


@functools.cache
def reference(shape: Shape, dk: int, dv: int, dtype: Any, made: "Build | None" = None,
              turn: int = 0) -> np.ndarray:
    """[rows][heads][dv] in float64, of call number `turn`."""
    if shape.kv_heads == 1 and shape.rows == 1 and shape.heads < MOST_HEADS:
        most = replace(shape, heads=MOST_HEADS)  # of the same keys: computed once for all heads
        return reference(most, dk, dv, dtype, made, turn)[:, : shape.heads]
    t = tensors_of(shape, dk, dv, dtype, made)
    k = (t.key if t.numbers is None else t.numbers)[t.ids(turn)]
    v = k[..., :dv] if t.value is None else t.value[t.ids(turn)]
    group = shape.heads // shape.kv_heads
    return np.concatenate([
        exact(t.query[:, n * group : (n + 1) * group], k[:, n], v[:, n], t.scale,
              shape.selection == "causal")
        for n in range(shape.kv_heads)], axis=1)


def relative_error(out: np.ndarray, want: np.ndarray) -> float:
    """Of the L2 norm."""
    difference = out.astype(np.float64).reshape(want.shape) - want
    return float(np.linalg.norm(difference) / np.linalg.norm(want))


class Turn:
    """Hands out call numbers 0 .. count-1 again and again. Steps that are compared share one, or
    each would find in a cache what the one before it has just read."""

    def __init__(self, count: int) -> None:
        self.count, self.at = count, 0

    def take(self, many: int = 1) -> int:
        """The first of the next `many`, modulo their number."""
        first = self.at
        self.at = (first + many) % self.count
        return first


# ---- limits -------------------------------------------------------------------------------------


@functools.cache
def limits_library() -> ctypes.CDLL:
    path = bind.compile_c({"limits.c": (BENCH / "limits.c").read_text()})
    library = ctypes.CDLL(str(path))
    declare(library.bench_has_tiles, "", "i")
    declare(library.bench_fma_peak, "il", "d")
    declare(library.bench_tile_peak, "il", "d")
    declare(library.bench_read, "ppiiiiz", "d")
    declare(library.bench_gather, "pzpiiiii", "d")
    declare(library.bench_sweep, "pz", "v")
    return library


@functools.cache
def has_tiles() -> bool:
    """Whether this machine and system have AMX."""
    return bool(limits_library().bench_has_tiles())


def tile_peak(int8: bool, steps: int = 4000) -> Step:
    """GFLOP/s of bf16 (GOP/s of int8) tile products with four accumulators."""
    return lambda: limits_library().bench_tile_peak(int(int8), steps)


def peak(isa: str, steps: int = 200_000) -> Step:
    """GFLOP/s that bound an instruction set: its float32 multiply-adds in registers, or bf16 tile
    products."""
    if isa in MATRIX_ISAS:
        return tile_peak(False)
    return lambda: limits_library().bench_fma_peak(VECTOR_BYTES[isa], steps)


class Read:
    """GB/s of reading groups of whole ranges, one group after the other."""

    def __init__(self, groups: list[list[np.ndarray]], ahead: int,
                 turn: Turn | None = None) -> None:
        ranges = [part for group in groups for part in group]
        self.bases = (ctypes.c_void_p * len(ranges))(*(part.ctypes.data for part in ranges))
        self.sizes = (ctypes.c_size_t * len(ranges))(*(part.nbytes for part in ranges))
        self.each, self.ahead = len(groups[0]), ahead
        self.turn = turn or Turn(len(groups))
        self.bytes = sum(part.nbytes for part in groups[0])
        self.count, self.kept = 1, groups
        self.count = max(1, round(READ_SAMPLE_NS * self() / self.bytes))

    def __call__(self) -> float:
        ns = limits_library().bench_read(self.bases, self.sizes, self.each, self.turn.count,
                                         self.turn.take(self.count), self.count, self.ahead)
        return self.bytes * self.count / ns


def ranges_of(shape: Shape, t: Tensors) -> list[list[np.ndarray]]:
    """Whole ranges as large as what a call reads. A list's rows: consecutive ones in their place,
    over the whole cache in turn, so that they come out of the same level of caches."""
    held = [x for x in (t.key, t.value) if x is not None]
    if not shape.listed:
        return [held]
    starts = range(0, shape.cache_keys - shape.keys + 1, shape.keys)
    return [[x[start // t.page : (start + shape.keys) // t.page] for x in held]
            for start in starts]


def reads(shape: Shape, t: Tensors, turn: Turn) -> dict[str, Step]:
    """Reading what a call reads, as the hardware prefetches it and with prefetches."""
    groups = ranges_of(shape, t)
    return {"plain": Read(groups, 0, turn), "ahead": Read(groups, READ_AHEAD, turn)}


class Gather:
    """GB/s of reading listed rows."""

    def __init__(self, key: np.ndarray, entries: np.ndarray, ahead: int,
                 turn: Turn | None = None, sample_ns: float = READ_SAMPLE_NS) -> None:
        self.key, self.entries, self.ahead = key, entries, ahead
        self.lists = (ctypes.c_void_p * len(entries))(*(e.ctypes.data for e in entries))
        self.row_bytes = key[0].nbytes
        if self.row_bytes % 64:
            raise ValueError(f"rows of {self.row_bytes} bytes; fix: a multiple of 64")
        self.turn, self.count = turn or Turn(len(entries)), 1
        self.bytes = entries.shape[1] * self.row_bytes
        self.count = max(1, round(sample_ns * self() / self.bytes))

    def __call__(self) -> float:
        ns = limits_library().bench_gather(
            self.key.ctypes.data, self.row_bytes, self.lists, self.entries.shape[1],
            self.turn.count, self.turn.take(self.count), self.count, self.ahead)
        return self.bytes * self.count / ns


@functools.cache
def swept_memory(size: int) -> np.ndarray:
    memory = allocate((size,), np.uint8)
    memory[:] = 1  # or all of it would be the one page of zeros
    return memory


def after_sweep(step: Step, size: int) -> Step:
    """A step that finds none of its memory in a cache."""
    memory = swept_memory(size)

    def run() -> float:
        limits_library().bench_sweep(memory.ctypes.data, memory.nbytes)
        return step()

    return run


# ---- kernels ------------------------------------------------------------------------------------


@functools.cache
def driver() -> ctypes.CDLL:
    path = bind.compile_c({"driver.c": (BENCH / "driver.c").read_text()},
                          flags=("-O2", "-pthread"))
    library = ctypes.CDLL(str(path))
    declare(library.bench_calls, "ppziiipz", "d")
    declare(library.bench_plans, "pppi", "d")
    declare(library.bench_routines, "ppi", "d")
    declare(library.bench_threads, "pppllzip", "d")
    return library


@dataclass(frozen=True)
class Build:
    """A kernel of a header, compiled as a user would: plain -O2."""

    kernel: bind.Kernel
    record: Plan | None = None  # of what the cache is made
    decodes: spec.Kernel | None = None  # how a kernel of the decode operator is described
    trains: spec.Kernel | None = None  # and one of prefill and training

    @property
    def dk(self) -> int:
        """Channels of a score, with those of the position."""
        return self.kernel.dk + self.kernel.rope

    @property
    def dv(self) -> int:
        return self.kernel.dv

    @property
    def of_records(self) -> "Build | None":
        """Itself where its cache is made of records."""
        return self if self.record else None

    @property
    def kv_format(self) -> str:
        """The element type of the cache, f32, f16, bf16, or its record, or how the decode operator
        names it: i8, i4_32, bf16xi8."""
        if self.decodes:
            return self.decodes.kv
        return self.record.record.name if self.record else self.dtype

    @property
    def dtype(self) -> str:
        """Of query and output."""
        return next(name for name, dtype in bind.DTYPES.items() if dtype == self.kernel.dtype)

    @functools.cached_property
    def isas(self) -> dict[str, int]:
        """The instruction sets that header and machine have, the best first."""
        found = self.kernel.isas()
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def tensors(self, shape: Shape) -> Tensors:
        if self.decodes:
            return decode.tensors(self.decodes, shape)
        if self.trains:
            return training.tensors_of(self.trains, shape)
        return tensors_of(shape, self.dk, self.dv, self.kernel.dtype, self.of_records)

    def reference(self, shape: Shape, turn: int = 0) -> np.ndarray:
        if self.decodes:
            return decode.reference(self.decodes, shape)
        return reference(shape, self.dk, self.dv, self.kernel.dtype, self.of_records, turn)

    def outputs(self, shape: Shape) -> dict[str, np.ndarray]:
        """Memory for what a call writes."""
        if self.trains:
            return training.outputs(self.trains, shape)
        return {"attention_out": allocate((shape.calls, shape.heads, self.dv), self.kernel.dtype)}

    def error(self, shape: Shape, outputs: dict[str, np.ndarray]) -> float:
        """Of what the first call wrote."""
        if self.trains:
            return training.error(self.trains, shape, outputs)
        return relative_error(outputs["attention_out"], self.reference(shape))

    def place(self, shape: Shape) -> str:
        """The layout of a shape's cache."""
        return f"PA_BSND {BLOCK_SIZE}" if self.record and self.record.behind else shape.place

    def flops(self, shape: Shape) -> int:
        if self.trains:
            return training.flops(self.trains, shape)
        return shape.flops(self.dk, self.dv)

    def bytes(self, shape: Shape) -> int:
        if self.decodes:
            return decode.cache_bytes(self.decodes, shape)
        if self.trains:
            return training.bytes_of(self.trains, shape)
        if self.record:
            return shape.kv_heads * shape.keys * (self.record.bytes + self.record.behind)
        return shape.bytes(self.dk, self.dv, self.kernel.dtype.itemsize)

    def address(self, suffix: str) -> int:
        """Of a function of the kernel."""
        return ctypes.cast(self.kernel.library[self.kernel.name + suffix], ctypes.c_void_p).value


@functools.cache
def build(path: Path) -> Build:
    """The only kernel of a header. One that is not shipped is generated: its name says what it
    is."""
    header = described(path)
    kernel = header.kernels[0]
    made = bind.load(path if path.exists() else header)
    record = layout(kernel.record, kernel.dtype) if kernel.record else None
    return Build(made, record, kernel if kernel.decodes else None,
                 kernel if kernel.trains else None)


def described(path: Path) -> spec.Header:
    """The header of that name, in the catalogue or not."""
    shipped = [header for header in spec.load_catalogue() if header.name == path.stem]
    return shipped[0] if shipped else spec.parse_header(names.parse(path.stem))


def build_cache(made: Build, rows: int) -> np.ndarray:
    """Memory for so many records: [rows][1][bytes], or [pages][bytes of a page]."""
    plan = made.record
    if not plan.behind:
        return allocate((rows, 1, plan.bytes), np.uint8)
    body = BLOCK_SIZE * (plan.bytes + plan.behind)
    page = -(-body // plan.record.page_multiple) * plan.record.page_multiple
    return allocate((rows // BLOCK_SIZE, page), np.uint8)


class Routine:
    """One of the routines that write and read records, as a step: nanoseconds a call."""

    def __init__(self, made: Build, suffix: str, fields: dict[str, Any], count: int = 1) -> None:
        kernel = made.kernel
        self.address, self.count = made.address(f"_{suffix}"), count
        self.args = kernel.struct(kernel.Rows[suffix], fields)

    def __call__(self) -> float:
        ns = driver().bench_routines(self.address, ctypes.byref(self.args), self.count)
        return checked(ns) / self.count


# The relative error beyond which a result is wrong and not worth timing.
WRONG = {"f32": 1e-4, "f16": 4e-3, "bf16": 6e-3}


class Calls:
    """Calls of one kernel on one shape, with list after list. As a step: nanoseconds a call, over
    as many calls as fill SAMPLE_NS."""

    def __init__(self, made: Build, shape: Shape, isa: str, **options: Any) -> None:
        self.build, self.shape, self.tensors = made, shape, made.tensors(shape)
        kernel, t = made.kernel, self.tensors
        self.outputs = made.outputs(shape)
        self.turn = Turn(1 if t.lists is None else len(t.lists))
        self.fields = [self.fields_of(turn, made.isas[isa], options)
                       for turn in range(self.turn.count)]
        self.kept = [kernel.args(**fields) for fields in self.fields]
        self.args = (kernel.Args * len(self.kept))(*self.kept)
        needed = kernel.workspace_bytes(**self.fields[0])
        self.workspace = allocate((max(needed, 64),), np.uint8)
        self.count = 1
        self.error = self.check(options)
        self.count = max(1, round(SAMPLE_NS / self()))

    def fields_of(self, turn: int, isa: int, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call; block_size in the options makes the cache a paged one."""
        shape, t, constants = self.shape, self.tensors, self.build.kernel.constants
        if self.build.decodes:
            return decode.fields(shape, t, constants) | self.outputs | {"isa": isa} | options
        if self.build.trains:
            made = training.fields(self.build.trains, shape)
            return made | self.outputs | {"isa": isa} | options
        known = ("hl_sparse_flash_attention", "hl_sparse_flash_attention_antiquant")
        if self.build.kernel.op not in known:
            raise NotImplementedError(f"arguments of {self.build.kernel.op}; fix: add them here")
        fields: dict[str, Any] = {
            "query": t.query, "key": t.key, "value": t.value, **self.outputs,
            "batch": 1, "seq_q": shape.rows, "heads_q": shape.heads, "heads_kv": shape.kv_heads,
            "seq_kv": shape.cache_keys, "scale_value": t.scale, "isa": isa,
            "sparse_mode": 3 if shape.selection == "causal" else 0}
        if t.lists is not None:
            fields |= {"sparse_indices": t.lists[turn], "list_length": shape.keys}
        if shape.selection == "slots":
            fields["index_kind"] = constants["HL_INDEX_SLOTS"]
        if t.page > 1:  # one behind the other, each with its scales
            table = np.arange(len(t.key), dtype=np.int32).reshape(1, -1)
            fields |= {
                "layout_kv": constants["HL_LAYOUT_PA_BSND"], "block_table": table,
                "num_blocks": table.size, "max_blocks": table.size, "block_size": t.page,
                "actual_seq_lengths_kv": np.array([shape.cache_keys], np.int32)}
        if "block_size" in options:
            table = pages(shape.cache_keys, options["block_size"])
            fields |= {
                "layout_kv": constants["HL_LAYOUT_PA_BSND"], "block_table": table,
                "num_blocks": table.size, "max_blocks": table.size,
                "actual_seq_lengths_kv": np.array([shape.cache_keys], np.int32)}
        return fields | options

    def check(self, options: dict[str, Any]) -> float:
        """The error of the first call, which every other one is like. (The rows of a paged cache
        are others than the reference's; tests hold such calls against the contiguous ones.)"""
        self()
        self.turn.at = 0
        if "block_size" in options:
            return 0.0
        error = self.build.error(self.shape, self.outputs)
        if not error < WRONG[self.build.dtype]:
            raise RuntimeError(f"{self.build.kernel.name}, {self.shape.title}: the output is off "
                               f"by {error:.2g} of its norm")
        return error

    def __call__(self) -> float:
        return self.timed(self.count)

    def timed(self, count: int) -> float:
        """Nanoseconds a call, of `count` calls."""
        ns = driver().bench_calls(
            self.build.address(""), self.args, ctypes.sizeof(self.build.kernel.Args),
            len(self.args), self.turn.take(count), count, self.workspace.ctypes.data,
            self.workspace.nbytes)
        return checked(ns) / count

    def once(self) -> float:
        """Nanoseconds of a single call."""
        return self.timed(1)

    def plan(self, count: int = 200) -> Step:
        """Nanoseconds of the checks alone."""
        plan = self.build.kernel.Plan()
        return lambda: checked(driver().bench_plans(
            self.build.address("_plan"), ctypes.byref(plan), self.args, count)) / count

    def planned(self) -> ctypes.Structure:
        plan, result = self.build.kernel.plan(**self.fields[0])
        result.check()
        return plan

    def partials(self) -> dict[str, Any]:
        """Options that split a row over tasks; none if it is one task anyway."""
        memory = allocate((max(self.planned().split_bytes, 1),), np.uint8)
        return {"partials": memory, "partials_bytes": memory.nbytes} if memory.size > 1 else {}

    def tasks(self) -> int:
        """How many tasks a call is."""
        return self.planned().n_tasks

    def on_threads(self, threads: int) -> Step:
        """Nanoseconds on the wall of one call's tasks and merges on so many threads."""
        plan = self.planned()
        memory = allocate((max(plan.task_bytes, 1) * threads,), np.uint8)
        return lambda: checked(driver().bench_threads(
            ctypes.byref(plan), self.build.address("_task"), self.build.address("_merge"),
            plan.n_tasks, plan.n_merges, plan.task_bytes, threads, memory.ctypes.data))
