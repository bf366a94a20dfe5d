"""Tensors, kernels and limits as steps that can be timed in turn: what bench/run.py is made of.

Clocks wander, so a figure is never a time alone: `alternate` runs all steps one after another,
many times over, and ratios are formed inside one round, between neighbours.
"""

import ctypes
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gen import bind

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
MADE = ROOT / "build" / "bench"

NAME = "hl_sparse_flash_attention_bf16_d512_rope64"
SPEC = ["--op", "sparse_flash_attention", "--dtype", "bf16", "--dk", "512", "--rope", "64"]
LIBS = {"builtin": (), "sleef": ("-lsleef", "-lm"), "libm": ("-lm",)}
DV, WIDTH = 512, 576  # value channels, and those of a joined row
ROW_BYTES = 2 * WIDTH
SCALE = 192**-0.5  # the model's own: 128 + 64 channels before absorption
LARGEST = 131072  # keys of the largest cache
WARM = 32768  # keys that the samples of one table row wander over
READ_AHEAD = 4  # rows; beyond that nothing is gained
VECTOR_BYTES = {"scalar": 16, "neon": 16, "avx2": 32, "avx512": 64}

Step = Callable[[], float]
Times = dict[str, np.ndarray]


def alternate(steps: dict[str, Step], rounds: int) -> Times:
    """Every step once a round, in the given order, after one round that does not count."""
    made: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            value = step()
            if i > 0:
                made[name].append(value)
    return {name: np.array(values) for name, values in made.items()}


@dataclass(frozen=True)
class Shape:
    """One query row over `read` of `keys` keys; all of them: dense. again: the same ones in every
    call, else others."""

    heads: int
    read: int
    keys: int
    again: bool = False

    @property
    def title(self) -> str:
        keys = f"{self.read} of {self.keys}" if self.read < self.keys else f"dense {self.keys}"
        return f"{keys}, again" if self.again else keys

    @property
    def flops(self) -> int:
        return 2 * self.heads * (WIDTH + DV) * self.read

    @property
    def bytes(self) -> int:
        return ROW_BYTES * self.read


# ---- tensors ------------------------------------------------------------------------------------


@functools.cache
def rng() -> np.random.Generator:
    """One source, so that every run sees the same tensors."""
    return np.random.default_rng(20261121)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that starts a cache line, as an engine's allocator gives."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(count + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + count].view(dtype).reshape(shape)


def normal(*shape: int) -> np.ndarray:
    """Standard normal bf16. Scores have a deviation of 1.7, as in trained models: a few keys of
    2048 carry most of the weight, and no weight is so small that it is not computed."""
    made = aligned(shape, ml_dtypes.bfloat16)
    for row in range(0, shape[0], 8192):
        part = made[row : row + 8192]
        part[:] = rng().standard_normal(part.shape, np.float32).astype(ml_dtypes.bfloat16)
    return made


@functools.cache
def cache() -> np.ndarray:
    """Latent rows, nope and rope channels joined."""
    return normal(LARGEST, WIDTH)


@functools.cache
def queries() -> np.ndarray:
    return normal(128, WIDTH)


def lists(keys: int, read: int) -> np.ndarray:
    """Disjoint lists over all keys, in no order: an indexer's come by score, not by place."""
    return rng().permutation(keys).astype(np.int32)[: keys // read * read].reshape(-1, read)


@functools.cache
def pages(keys: int, block_size: int) -> np.ndarray:
    """A block table whose blocks lie anywhere."""
    return rng().permutation(keys // block_size).astype(np.int32).reshape(1, -1)


@dataclass(frozen=True)
class Case:
    """What one call reads: rows of a piece of the cache, those in `list`, or all."""

    keys: np.ndarray
    list: np.ndarray | None


class Rotation:
    """Cases that together touch every row of a cache (dense: of WARM keys). Whoever asks gets the
    next ones, so that a call finds its rows where they lie when other layers ran in between: in
    L3 or memory, not in L2."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases, self.at = cases, 0

    def take(self, count: int = 1) -> int:
        """The index of the first of the next `count` cases, modulo their number."""
        first = self.at
        self.at = (first + count) % len(self.cases)
        return first


@functools.cache
def rotation_over(keys: int, read: int, again: bool) -> Rotation:
    if read < keys:
        cases = [Case(cache()[:keys], entries) for entries in lists(keys, read)]
    else:
        starts = range(0, max(WARM, keys), keys)
        cases = [Case(cache()[start : start + keys], None) for start in starts]
    return Rotation(cases[:1] if again else cases)


def rotation(shape: Shape) -> Rotation:
    """The one rotation over a cache for all that read as many rows at a time."""
    return rotation_over(shape.keys, shape.read, shape.again)


# ---- limits -------------------------------------------------------------------------------------


@functools.cache
def limits_library() -> ctypes.CDLL:
    path = bind.compile_c({"limits.c": (BENCH / "limits.c").read_text()})
    library = ctypes.CDLL(str(path))
    library.bench_peak.argtypes = (ctypes.c_int, ctypes.c_int64)
    library.bench_read.argtypes = (
        ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int)
    library.bench_peak.restype = library.bench_read.restype = ctypes.c_double
    return library


def peak(isa: str, steps: int = 200_000) -> Step:
    """GFLOP/s of float32 multiply-adds in registers."""
    return lambda: limits_library().bench_peak(VECTOR_BYTES[isa], steps)


def read(shape: Shape, ahead: int) -> Step:
    """GB/s of reading the rows of a shape's cases in turn, in the order of their lists."""
    turn = rotation(shape)

    def step() -> float:
        case = turn.cases[turn.take()]
        entries = None if case.list is None else case.list.ctypes.data
        return shape.bytes / limits_library().bench_read(
            case.keys.ctypes.data, ROW_BYTES, entries, shape.read, ahead)

    return step


# ---- kernels ------------------------------------------------------------------------------------


class Build:
    """A header compiled with the driver behind it: plain -O2, as a user would."""

    def __init__(self, math: str = "builtin") -> None:
        path = ROOT / "include" / f"{NAME}.h"
        if math != "builtin":
            MADE.mkdir(parents=True, exist_ok=True)
            path = MADE / f"{NAME}_{math}.h"
            command = [sys.executable, "-m", "gen", "header", *SPEC, "--math", math, "-o", path]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        name = bind.parse(path.read_text()).kernels[0]
        self.kernel = bind.load(
            path, name, flags=("-O2", "-pthread", f"-I{BENCH}"), libs=LIBS[math],
            defines=(f"KERNEL {name}",), extra=(BENCH / "driver.c").read_text())
        self.isas = self.kernel.isas()
        p, i, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
        self.run = self.function("run", p, i, i, i, p, size)
        self.plan = self.function("plan", p, i, i, i)
        self.threads = self.function("threads", p, i, p, size)
        self.exp2 = self.function("exp2", i, p, p, size, i)

    def function(self, name: str, *types: Any) -> Callable[..., float]:
        """A function of bench/driver.c."""
        function = self.kernel.library[f"bench_{name}"]
        function.argtypes, function.restype = types, ctypes.c_double
        return function

    def calls(self, shape: Shape, isa: str, **options: Any) -> "Calls":
        """Decode steps of one shape; options are fields of the arguments."""
        return Calls(self, shape, self.isas[isa], options)

    def exp2_alone(self, isa: str, count: int = 4000) -> Step:
        """Nanoseconds an element of 2^x alone, in L1, over the range of real scores."""
        x = -rng().exponential(4.0, 1024).astype(np.float32)
        y = np.empty_like(x)
        return lambda: checked(
            self.exp2(self.isas[isa], x.ctypes.data, y.ctypes.data, x.size, count)
        ) / (x.size * count)


def checked(ns: float) -> float:
    if ns < 0:
        raise RuntimeError(f"the kernel refused the call with status {ns:.0f}")
    return ns


class Calls:
    """Calls of one kernel on the cases of a shape, in turn. As a step: nanoseconds a call, over as
    many calls as fill two milliseconds."""

    def __init__(self, build: Build, shape: Shape, isa: int, options: dict[str, Any]) -> None:
        self.build, self.shape = build, shape
        self.turn = rotation(shape)
        self.out = aligned((shape.heads, DV), ml_dtypes.bfloat16)
        self.fields = [self.fields_of(case, isa, options) for case in self.turn.cases]
        self.kept = [build.kernel.args(**fields) for fields in self.fields]
        self.args = (build.kernel.Args * len(self.kept))(*self.kept)
        bytes_ = build.kernel.workspace_bytes(**self.fields[0])
        self.workspace = aligned((max(bytes_, 1),), np.uint8)
        self.count = 1
        self.check()
        self.count = max(1, round(2e6 / self()))

    def fields_of(self, case: Case, isa: int, options: dict[str, Any]) -> dict[str, Any]:
        """The arguments of one call; block_size in the options makes the cache a paged one."""
        keys = self.shape.keys
        fields: dict[str, Any] = {
            "query": queries(), "key": case.keys, "attention_out": self.out, "batch": 1,
            "seq_q": 1, "heads_q": self.shape.heads, "seq_kv": keys, "scale_value": SCALE,
            "isa": isa}
        if case.list is not None:
            fields |= {"sparse_indices": case.list, "list_length": len(case.list)}
        if "block_size" in options:
            table = pages(keys, options["block_size"])
            fields |= {
                "layout_kv": self.build.kernel.constants["HL_LAYOUT_PA_BSND"],
                "block_table": table, "num_blocks": table.size, "max_blocks": table.size,
                "actual_seq_lengths_kv": np.array([keys], np.int32)}
        return fields | options

    def check(self) -> None:
        """Wrong results are not worth timing: one case against float64."""
        first = self.turn.at
        self()
        fields, case = self.fields[first], self.turn.cases[first]
        ids = np.arange(self.shape.keys) if case.list is None else case.list
        if "block_table" in fields:
            size = fields["block_size"]
            ids = fields["block_table"][0, ids // size] * size + ids % size
        q = queries()[: self.shape.heads].astype(np.float64)
        want = attend(q, case.keys[ids].astype(np.float64))
        self.error = np.linalg.norm(self.out.astype(np.float64) - want) / np.linalg.norm(want)
        if not self.error < 4e-3:
            raise RuntimeError(f"{self.shape}: the output is off by {self.error:.2g} of its norm")

    def __call__(self) -> float:
        ns = self.build.run(self.args, len(self.args), self.turn.take(self.count), self.count,
                            self.workspace.ctypes.data, self.workspace.nbytes)
        return checked(ns) / self.count

    def plan(self, count: int = 200) -> Step:
        """Nanoseconds of the checks alone."""
        return lambda: checked(self.build.plan(self.args, len(self.args), 0, count)) / count

    def partials(self) -> dict[str, Any]:
        """Options that split a row over tasks; none if it is one task anyway."""
        plan, result = self.build.kernel.plan(**self.fields[0])
        result.check()
        memory = aligned((plan.split_bytes,), np.uint8)
        return {"partials": memory, "partials_bytes": memory.nbytes} if memory.size else {}

    def tasks(self) -> int:
        """How many tasks a call is."""
        return self.build.kernel.plan(**self.fields[0])[0].n_tasks

    def on_threads(self, threads: int) -> Step:
        """Nanoseconds on the wall of one call's tasks and merges on so many threads."""
        each = self.build.kernel.plan(**self.fields[0])[0].task_bytes
        memory = aligned((each * threads,), np.uint8)

        def step() -> float:
            case = ctypes.byref(self.args[self.turn.take()])
            return checked(
                self.build.threads(case, threads, memory.ctypes.data, memory.nbytes))

        return step


# ---- a peer -------------------------------------------------------------------------------------


def attend(q: np.ndarray, k: np.ndarray) -> np.ndarray:
    """Attention as one composes it from NumPy, in the type of its arguments."""
    s = (q @ k.T) * np.asarray(SCALE, q.dtype)
    s -= s.max(axis=1, keepdims=True)
    p = np.exp(s, out=s)
    return (p @ k[:, :DV]) / p.sum(axis=1, keepdims=True)


def widen(x: np.ndarray) -> np.ndarray:
    """bf16 to float32 by a shift: several times as fast as astype."""
    return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
