"""The tables beside the main one: limits of the machine, cold caches, two threads, what lists,
pages, checks and the choice of --math cost."""

import functools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cases
import measure as m
import numpy as np
import training
from cases import MLA, Measured, mla
from measure import alternate
from tables import Table, ms, number, percent
from tensors import LARGEST, allocate, lists, normal_once, rng

from gen import bind, spec

NAME = f"hl_sparse_flash_attention_{MLA}"
SPEC = ["--op", "sparse_flash_attention", "--dtype", "bf16", "--dk", "512", "--rope", "64"]
LIBS = {"builtin": (), "sleef": ("-lsleef", "-lm"), "libm": ("-lm",)}
EXP2_ISAS = ("avx512", "avx2", "neon", "scalar")  # of bench/words.h
ROW_BYTES = 1152  # of the latent cache in bf16
BLOCK_SIZE = 64  # of paged caches
READ_SIZES = (512 << 10, 2048 * ROW_BYTES, 8192 * ROW_BYTES, 32768 * ROW_BYTES, 67 << 20,
              134 << 20, 1 << 30)


@dataclass(frozen=True)
class Bench:
    """How often and how much is measured."""

    include: Path
    quick: bool
    rounds: int

    @functools.cached_property
    def mla(self) -> m.Build:
        """The DeepSeek-shaped kernel in bf16, which the tables here are about."""
        return m.build(self.include / f"{NAME}.h")

    @property
    def vectors(self) -> list[str]:
        """Its instruction sets here but plain C, the best first."""
        return [isa for isa in self.mla.isas if isa != "scalar"] or ["scalar"]

    @property
    def swept(self) -> int:
        """Bytes between a call and the next on cold caches."""
        return 64 << 20 if self.quick else m.SWEPT

    def scaled(self, keys: int) -> int:
        """A number of keys, an eighth of it in quick runs."""
        return keys // 8 if self.quick else keys


def limits(bench: Bench) -> Table:
    """Peaks of arithmetic, of reading and of gathering."""
    table = Table("Limits of this machine, one core", ["what", "median", "lowest", "highest"],
                  "Measured in this process, in turn. Reading: the better of what the hardware "
                  "prefetches and prefetches\n1 KiB ahead. Gathering: rows of 1152 bytes in no "
                  "order, plain or prefetched 4 rows ahead.")
    steps: dict[str, m.Step] = {}
    if m.has_tiles():
        steps |= {"tile products, bf16 (P), GFLOP/s": m.tile_peak(False),
                  "tile products, int8, GOP/s": m.tile_peak(True)}
    steps |= {f"float32 multiply-add, {isa}, GFLOP/s": m.peak(isa)
              for isa in bench.mla.isas if isa in m.VECTOR_BYTES}
    memory = m.swept_memory(bench.swept)
    for size in READ_SIZES:
        if size <= memory.nbytes:
            steps |= either(f"read {size / 1e6:.1f} MB, GB/s",
                            *(m.Read([[memory[:size]]], ahead) for ahead in (0, m.READ_AHEAD)))
    for keys in (32768, LARGEST, m.SWEPT // ROW_BYTES):
        if keys * ROW_BYTES <= memory.nbytes:
            rows = memory[: keys * ROW_BYTES].reshape(keys, ROW_BYTES)
            entries = lists(keys, 2048)
            turn = m.Turn(len(entries))
            steps |= either(f"gather 2048 rows of {keys} ({keys * ROW_BYTES / 1e6:.0f} MB), GB/s",
                            *(m.Gather(rows, entries, ahead, turn) for ahead in (0, m.ROWS_AHEAD)))
    times = alternate(steps, bench.rounds, seconds=20)
    for what, values in times.items():
        if not what.endswith("*"):
            better = np.maximum(values, times.get(f"{what}*", values))
            table.add(what, *(number(f(better)) for f in (np.median, np.min, np.max)))
    return table


def either(name: str, plain: m.Step, ahead: m.Step) -> dict[str, m.Step]:
    """Two ways to the same figure, of which the better one counts."""
    return {name: plain, f"{name}*": ahead}


def cold(bench: Bench) -> tuple[Table, list[Measured]]:
    """Sparse decode that finds nothing in a cache, beside the warm one and reading alone."""
    table = Table(
        f"Cold caches: {bench.swept >> 20} MiB read before each call, one call a sample",
        ["shape", "isa", "warm ms", "cold ms", "cold / warm", "gather cold ms", "at the peak ms",
         "bound by"],
        "gather cold: a plain read of the same rows after such a sweep. at the peak: the "
        "arithmetic alone. bound by:\nthe longer of the two.", left=2)
    made, found = bench.mla, []
    isa = bench.vectors[0]
    for heads in (128, 16):
        shape = mla(heads, "list", bench.scaled(2048), bench.scaled(32768))
        calls = m.Calls(made, shape, isa)
        t = calls.tensors
        gathers = [m.Gather(t.key, t.lists, ahead, sample_ns=0) for ahead in (0, m.ROWS_AHEAD)]
        times = alternate({
            "peak before": m.peak(isa), "warm": calls.once,
            "cold": m.after_sweep(calls.once, bench.swept),
            "plain": m.after_sweep(gathers[0], bench.swept),
            "ahead": m.after_sweep(gathers[1], bench.swept), "peak after": m.peak(isa),
        }, max(3, bench.rounds // 2))
        peak = (times["peak before"] + times["peak after"]) / 2
        bandwidth = np.maximum(times["plain"], times["ahead"])
        record, of_compute, of_read = cases.written(made, shape, isa, times["cold"], peak,
                                                    bandwidth, calls.error, warm=False)
        found.append(Measured(record, shape, of_compute, of_read, float(np.median(peak)),
                              float(np.median(bandwidth))))
        reading = float(np.median(made.bytes(shape) / bandwidth))
        least = float(np.median(made.flops(shape) / peak))
        bound = "rows out of memory" if reading > least else "arithmetic"
        table.add(shape.title, isa, ms(times["warm"]), ms(times["cold"]),
                  f"{np.median(times['cold'] / times['warm']):.2f}", ms(reading), ms(least), bound)
    return table, found


# ---- threads ------------------------------------------------------------------------------------


@contextmanager
def all_processors() -> Iterator[int]:
    """Lifts a pin to one core; how many processors there are then."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, ALLOWED)
    try:
        yield len(ALLOWED)
    finally:
        os.sched_setaffinity(0, before)


ALLOWED = os.sched_getaffinity(0)  # when the process began


def threads(bench: Bench) -> tuple[Table, list[Measured]]:
    """The same call on one thread and on two."""
    table = Table("Two threads", ["shape", "isa", "one thread ms", "two ms", "times as fast"],
                  "Times by the clock on the wall, tasks and merges of one plan.", left=2)
    made, isa, found = bench.mla, bench.vectors[0], []
    with all_processors() as processors:
        if processors < 2:
            table.note = "Left out: this process may use one processor only."
            return table, found
        for heads in (128, 16):
            shape = mla(heads, "dense", bench.scaled(8192))
            whole = m.Calls(made, shape, isa)
            calls = m.Calls(made, shape, isa, **whole.partials())
            reads = m.reads(shape, calls.tensors, calls.turn)
            t = alternate({
                "peak before": m.peak(isa), **{f"{n} before": step for n, step in reads.items()},
                "one": calls.on_threads(1), "two": calls.on_threads(2),
                "peak after": m.peak(isa), **{f"{n} after": step for n, step in reads.items()},
            }, bench.rounds)
            peaks, bandwidth = cases.around(t)
            record, of_compute, of_read = cases.written(
                made, shape, isa, t["two"], peaks, bandwidth, calls.error, threads=2)
            found.append(Measured(record, shape, of_compute, of_read, float(np.median(peaks)),
                                  float(np.median(bandwidth))))
            table.add(shape.title, isa, ms(t["one"]), ms(t["two"]),
                      f"{np.median(t['one'] / t['two']):.2f}")
    return table, found


# ---- what else costs ----------------------------------------------------------------------------


def list_cost(bench: Bench) -> Table:
    """The same list length out of ever larger caches."""
    sizes = (8192, 32768, LARGEST)
    table = Table("Cost follows the list: 2048 keys selected of ever more",
                  ["what", *(f"of {keys}, ms" for keys in sizes), "growth"],
                  "Growth: the largest cache over the smallest. Reading alone: the same rows.")

    def add(what: str, t: m.Times) -> None:
        growth = float(np.median(t[str(sizes[-1])] / t[str(sizes[0])]))
        table.add(what, *map(ms, t.values()), f"{growth:.3f}")

    shapes = {str(keys): mla(1, "list", 2048, keys) for keys in sizes}
    for heads in (128, 16, 1):
        for isa in bench.vectors:
            calls = {keys: m.Calls(bench.mla, replace(shape, heads=heads), isa)
                     for keys, shape in shapes.items()}
            add(f"{heads} head{'s' if heads > 1 else ''}, {isa}", alternate(calls, bench.rounds))
    held = {keys: bench.mla.tensors(shape) for keys, shape in shapes.items()}
    reads = alternate({keys: m.Gather(t.key, t.lists, m.ROWS_AHEAD) for keys, t in held.items()},
                      bench.rounds)
    add("reading alone", {keys: 2048 * ROW_BYTES / speed for keys, speed in reads.items()})
    return table


def ways(bench: Bench) -> Table:
    """Paging, checks and splitting, each relative to the plain call."""
    isa = bench.vectors[0]
    table = Table(f"Relative to the plain call on one thread ({isa})",
                  ["shape", "paged", "checks", "share", "tasks", "split"],
                  f"paged: blocks of {BLOCK_SIZE} anywhere. checks: plan, and its share of a call. "
                  "split: the row is cut into\ntasks and merged, on one thread.")
    for heads in (128, 16, 1):
        for shape in (mla(heads, "list", 2048, 32768), mla(heads, "dense", 8192)):
            plain = m.Calls(bench.mla, shape, isa)
            steps = {"plain": plain, "plan": plain.plan(),
                     "paged": m.Calls(bench.mla, shape, isa, block_size=BLOCK_SIZE)}
            options = plain.partials()
            if options:
                steps["split"] = m.Calls(bench.mla, shape, isa, **options)
            t = alternate(steps, bench.rounds)
            cells = [shape.title, f"{np.median(t['paged'] / t['plain']):.3f}",
                     f"{np.median(t['plan']):.0f} ns", percent(np.median(t["plan"] / t["plain"]))]
            split = [str(steps["split"].tasks()), f"{np.median(t['split'] / t['plain']):.3f}"] \
                if options else ["1", ""]
            table.add(*cells, *split)
    return table


@functools.cache
def with_math(math: str) -> m.Build:
    """The kernel generated with a --math, and 2^x alone behind it."""
    path = bind.cache_folder() / f"{NAME}_{math}.h"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "gen", "header", *SPEC, "--math", math, "-o", path]
    subprocess.run(command, cwd=m.ROOT, check=True, stdout=subprocess.DEVNULL)
    extra = (m.BENCH / "exp2_time.c").read_text()
    return m.Build(bind.load(path, flags=("-O2", f"-I{m.BENCH}"), libs=LIBS[math], extra=extra))


def exp2_alone(made: m.Build, isa: str, count: int = 4000) -> m.Step:
    """Nanoseconds an element of 2^x alone, in L1, over the range of real scores."""
    x = -rng().exponential(4.0, 1024).astype(np.float32)
    y = np.empty_like(x)
    run: Any = made.kernel.library.bench_exp2
    m.declare(run, "ippzi", "d")
    return lambda: m.checked(
        run(made.isas[isa], x.ctypes.data, y.ctypes.data, x.size, count)) / (x.size * count)


def maths(bench: Bench) -> Table:
    """The choices of --math: whole calls, and 2^x alone."""
    builds = {math: with_math(math) for math in LIBS}
    table = Table("--math: whole calls relative to builtin, and 2^x alone",
                  ["isa, heads", *builds, *(f"2^x {math}" for math in builds)],
                  "Calls: 2048 of 32768 keys. 2^x: ns an element, out of L1 and back.")
    rows = [(isa, heads) for isa in EXP2_ISAS for heads in (128, 16)
            if isa in builds["builtin"].isas and isa != "scalar"]
    for isa, heads in [*rows, ("scalar", 8)]:
        shape = mla(heads, "list", 2048, 32768)
        present = {math: made for math, made in builds.items() if isa in made.isas}
        t = alternate({math: m.Calls(made, shape, isa) for math, made in present.items()},
                      bench.rounds)
        alone = alternate({math: exp2_alone(made, isa) for math, made in present.items()},
                          bench.rounds)
        cells = [f"{np.median(t[math] / t['builtin']):.3f}" if math in t else "" for math in LIBS]
        cells += [f"{np.median(alone[math]):.3f}" if math in t else "" for math in LIBS]
        table.add(f"{isa}, {heads}", *cells)
    return table


# ---- caches of records --------------------------------------------------------------------------


RECORDS = ("bf16_i8_656_d512_rope64", "bf16_fp8_656_d512_rope64_slots",
           "bf16_fp8_v4_d448_rope64_slots")


def of_records(bench: Bench) -> dict[str, m.Build]:
    """The kernels whose caches are made of records, by their formats."""
    made = [m.build(bench.include / f"hl_sparse_flash_attention_antiquant_{name}.h")
            for name in RECORDS]
    return {build.kv_format: build for build in made}


def beside_bf16(bench: Bench) -> Table:
    """Records against plain rows, the same shapes in turn."""
    table = Table("Caches of records: time relative to the bf16 cache",
                  ["record", "heads", "isa", "dense 2048", "dense 8192", "dense 32768",
                   "2048 of 32768"],
                  "Below 1: faster than bf16 rows, which take 1152 bytes a token.", left=3)
    for name, build in of_records(bench).items():
        if (build.dk, build.dv) != (bench.mla.dk, bench.mla.dv):
            continue  # other channels, other work
        listed = "list" if name == "i8_656" else "slots"
        for heads in (128, 16, 8, 4, 2, 1):
            for isa in bench.vectors:
                cells = []
                for selection, keys, cache in (("dense", 2048, 0), ("dense", 8192, 0),
                                               ("dense", 32768, 0), ("list", 2048, 32768)):
                    plain = m.Calls(bench.mla, mla(heads, selection, keys, cache), isa)
                    other = mla(heads, listed if cache else selection, keys, cache)
                    t = alternate({"plain": plain, "records": m.Calls(build, other, isa)},
                                  bench.rounds, seconds=3)
                    cells.append(f"{np.median(t['records'] / t['plain']):.2f}")
                table.add(name, str(heads), isa, *cells)
    return table


def writing(bench: Bench) -> Table:
    """Rows of bf16 into records and back, against reading as many bytes."""
    table = Table("Writing records: 32768 rows of bf16, and one",
                  ["record", "isa", "quantise, ns a row", "of read", "append", "of read",
                   "dequantise", "of read", "append one row, ns"],
                  "of read: bytes read and written over the time, against the bandwidth of reading "
                  "as many.", left=2)
    rows = bench.scaled(32768)
    for name, build in of_records(bench).items():
        source = normal_once("key", rows, 1, build.dk, build.kernel.dtype)
        memory = m.build_cache(build, rows)
        block = m.BLOCK_SIZE if build.record.behind else 0
        both = source.nbytes + memory.nbytes
        read = m.swept_memory(max(both, bench.swept))[:both]
        paged = {"layout_kv": build.kernel.constants["HL_LAYOUT_PA_BSND"], "block_size": block,
                 "num_blocks": len(memory), "max_blocks": len(memory),
                 "block_table": np.arange(len(memory), dtype=np.int32)} if block else {
                     "seq_kv": rows}
        for isa in bench.vectors:
            shared = {"rows": rows, "isa": build.isas[isa]}
            place = {"block_size": block} if block else {}
            into = {"nope": source, "key": memory, "batch": 1,
                    "positions": np.zeros(1, np.int32), **shared, **paged}
            steps = {
                "plain": m.Read([[read]], 0), "ahead": m.Read([[read]], m.READ_AHEAD),
                "quantise_rows": m.Routine(build, "quantise_rows", {
                    "nope": source, "records": memory, **shared, **place}),
                "append": m.Routine(build, "append", into),
                "dequantise_rows": m.Routine(build, "dequantise_rows", {
                    "nope": allocate(source.shape, source.dtype), "records": memory, **shared,
                    **place}),
                "one": m.Routine(build, "append", {**into, "rows": 1}, count=200),
            }
            t = alternate(steps, bench.rounds, seconds=10)
            speed = np.maximum(t["plain"], t["ahead"])
            cells = []
            for routine in ("quantise_rows", "append", "dequantise_rows"):
                cells += [f"{np.median(t[routine]) / rows:.0f}",
                          percent(np.median(both / t[routine] / speed))]
            table.add(name, isa, *cells, f"{np.median(t['one']):.0f}")
    return table


# ---- masks of prefill ---------------------------------------------------------------------------


def masks(bench: Bench) -> Table:
    """What a mask leaves out is not to be computed: time against the tiles that hold a pair."""
    made = m.build(bench.include / f"{training.PREFIX}bf16_d128.h")
    table = Table(
        "Masks of prefill: time relative to every row seeing every key",
        ["selection", "isa", "time", "share of tiles", "time / tiles", "share of pairs"],
        "Tiles: of as many rows and keys as a task computes together. Those that a mask hides are "
        "left out; of those\nthat it cuts, at least what some row sees is computed.", left=2)
    full = training.in_little(training.FULL, bench.scaled(training.FULL.keys))
    for isa in (isa for isa in made.isas if isa != "scalar"):
        plain = m.Calls(made, full, isa)
        rows, keys = training.grain(made.trains, isa)
        for shape in (training.PROMPTS[-1], *training.MASKED):
            cut = training.in_little(shape, full.keys)
            t = alternate({"plain": plain, "cut": m.Calls(made, cut, isa)}, bench.rounds, seconds=8)
            time = float(np.median(t["cut"] / t["plain"]))
            share = training.tiles(cut, rows, keys)
            table.add(cut.selection, isa, f"{time:.3f}", f"{share:.3f}", f"{time / share:.2f}",
                      f"{training.pairs(cut) / training.pairs(full):.3f}")
    return table


# ---- what checking costs ------------------------------------------------------------------------


def checked_shapes(made: m.Build) -> dict[str, m.Shape]:
    """Calls that hardly compute and a usual one, as each operator has them: where it has lists,
    2048 keys are selected of 32768; where it trains, they are a prompt."""
    own_value = bool(made.decodes or made.trains)
    usual = m.Shape(1, 1, 2048, 32768, "list")
    if made.trains:
        usual = training.prompt(2048, 1, 1)
    elif made.decodes:
        usual = m.Shape(1, 1, 2048, 2048, value=True)
    return {"1 head, 64 keys": m.Shape(1, 1, 64, 64, value=own_value),
            "4 heads, 256 keys": m.Shape(4, 1, 256, 256, value=own_value),
            "1 head, 2048 keys": usual}


def safety(bench: Bench) -> Table:
    """What plan takes, which checks all arguments and every length, block and page, beside the
    whole call with it."""
    table = Table("Cost of the checks: plan, and its share of a call",
                  ["header", "isa", "plan ns", "1 head, 64 keys", "4 heads, 256 keys",
                   "1 head, 2048 keys", "in pages of 64"],
                  "One query row; in prefill and training 2048 keys are a prompt. plan: at 2048 "
                  "keys. In pages:\nof the same 2048 keys, every id of a page checked.",
                  left=2)
    for header in spec.load_catalogue():
        made = m.build(bench.include / f"{header.name}.h")
        isa = next(iter(made.isas))
        shapes: dict[str, tuple[m.Shape, dict]] = {
            what: (shape, {}) for what, shape in checked_shapes(made).items()}
        if not (made.trains or made.decodes or (made.record and made.record.behind)):
            shapes["paged"] = shapes["1 head, 2048 keys"][0], {"block_size": BLOCK_SIZE}
        shares, plan = {}, 0.0
        for what, (shape, options) in shapes.items():
            calls = m.Calls(made, shape, isa, **options)
            t = alternate({"plan": calls.plan(), "call": calls}, bench.rounds, seconds=2)
            shares[what] = percent(np.median(t["plan"] / t["call"]))
            plan = plan if options else float(np.median(t["plan"]))
        table.add(header.name.removeprefix("hl_"), isa, f"{plan:.0f}",
                  *(shares.get(what, "") for what in (*checked_shapes(made), "paged")))
    return table


def tables(bench: Bench) -> Iterator[Table]:
    """What README and docs quote beside the main table."""
    for make in (list_cost, ways, maths, beside_bf16, writing, masks, safety):
        yield make(bench)

