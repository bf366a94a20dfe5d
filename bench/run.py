"""Times the DeepSeek-shaped kernel against this machine's own limits, and against NumPy.

    make bench    or    build/venv/bin/python bench/run.py [--quick] [--json FILE] [--plot DIR]

Everything runs in one process on one core (but for the column on two threads): what is compared
takes turns, ratios are formed between neighbours, and medians are printed. Times are processor
time, so that other work on the machine does not count; it still takes caches and bandwidth, and
clocks away. Tables are Markdown.
"""

# ruff: noqa: E402 (the number of BLAS threads has to be set before NumPy is loaded)
import os

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import functools
import json
import platform
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import measure as m
from measure import Shape, alternate

SPARSE, SAME = (2048, 32768), (2048, 32768, True)
DENSE_2K, DENSE_8K = (2048, 2048), (8192, 8192)
FLOORS = (("avx512", 128, 0.60), ("avx2", 128, 0.60), ("avx512", 16, 0.55), ("avx2", 16, 0.55))
GROWTH_FLOOR = 1.15
BLOCK_SIZE = 64  # of paged caches


@dataclass
class Table:
    """One table; `records` holds the same, unrounded, for --json."""

    title: str
    columns: list[str]
    note: str = ""
    rows: list[list[str]] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, cells: list[str], **record: Any) -> None:
        self.rows.append(cells)
        self.records.append(record)

    def markdown(self) -> str:
        """Columns of equal width, readable as text too; the first to the left."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]

        def line(cells: list[str]) -> str:
            padded = [c.ljust(w) if i == 0 else c.rjust(w)
                      for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
            return f"| {' | '.join(padded)} |"

        rule = [("-" if i == 0 else "-:").rjust(w, "-") for i, w in enumerate(widths)]
        note = [self.note, ""] if self.note else []
        return "\n".join([f"### {self.title}", "", *note, line(self.columns), line(rule),
                          *map(line, self.rows), ""])


@dataclass
class Bench:
    """What is measured, how often."""

    quick: bool
    rounds: int

    @functools.cached_property
    def build(self) -> m.Build:
        return m.Build()

    @functools.cached_property
    def isas(self) -> list[str]:
        """The vector instruction sets here, the best first."""
        return [isa for isa in ("avx512", "avx2", "neon") if isa in self.build.isas]

    @functools.cached_property
    def heads(self) -> list[int]:
        return [128, 16, 1] if self.quick else [128, 64, 16, 8, 1]


def ms(ns: np.ndarray | float) -> str:
    return f"{np.median(ns) / 1e6:.3f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def heads_of(count: int) -> str:
    return f"{count} head{'s' if count > 1 else ''}"


def machine() -> str:
    """The processor's name, for the reader."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    return f"{name}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before"


# ---- the tables ---------------------------------------------------------------------------------


def limits(bench: Bench) -> Table:
    """Peaks of arithmetic and of reading."""
    table = Table("Limits of this machine", ["what", "median", "lowest", "highest"],
                  "Measured as the kernels are: between other work, on one core.")
    steps = {f"float32 multiply-add, {isa}": m.peak(isa) for isa in [*bench.isas, "scalar"]}
    units = dict.fromkeys(steps, "GFLOP/s")
    for keys in (SPARSE, SAME, DENSE_2K, DENSE_8K, (2048, m.LARGEST)):
        of = Shape(1, *keys)
        for ahead, how in ((0, "plain"), (m.READ_AHEAD, "prefetched")):
            steps[f"read, {of.title}, {how}"] = m.read(of, ahead)
    for what, values in alternate(steps, bench.rounds).items():
        unit = units.get(what, "GB/s")
        cells = [f"{f(values):.1f} {unit}" for f in (np.median, np.min, np.max)]
        table.add([what, *cells], what=what, unit=unit, values=values.tolist())
    return table


def decode_row(bench: Bench, shape: Shape, isa: str) -> dict[str, Any]:
    """One kernel between two looks at its limits."""
    calls = bench.build.calls(shape, isa)
    t = alternate({
        "before": m.peak(isa), "ns": calls, "after": m.peak(isa),
        "plain": m.read(shape, 0), "ahead": m.read(shape, m.READ_AHEAD),
    }, bench.rounds)
    of_fma = shape.flops / t["ns"] / ((t["before"] + t["after"]) / 2)
    of_read = shape.bytes / t["ns"] / np.maximum(t["plain"], t["ahead"])
    low, high = np.percentile(of_fma, [25, 75])
    return {
        "heads": shape.heads, "keys": shape.title, "isa": isa, "ns": float(np.median(t["ns"])),
        "of_fma": float(np.median(of_fma)), "of_fma_quartiles": [float(low), float(high)],
        "of_read": float(np.median(of_read)), "error": float(calls.error),
    }


def decode(bench: Bench) -> Table:
    """Decode against the limits, instruction sets side by side."""
    columns = ["heads", "keys"]
    for isa in bench.isas:
        columns += [f"{isa} ms", "of FMA", "of R"]
    table = Table(
        "MLA decode, one query row, bf16, 512+64 channels", columns,
        "of FMA: share of the float32 multiply-add peak of that instruction set. of R: share of "
        "the bandwidth of\nreading such rows, plain or prefetched, whichever is better. Every call "
        "reads other rows than those before it,\nwhich then lie in L3 or memory; again: the same "
        "rows in every call.")
    for heads in bench.heads:
        for keys in (SPARSE, SAME) if bench.quick else (SPARSE, SAME, DENSE_2K, DENSE_8K):
            shape = Shape(heads, *keys)
            cells = [str(heads), shape.title]
            for isa in bench.isas:
                row = decode_row(bench, shape, isa)
                cells += [ms(row["ns"]), percent(row["of_fma"]), percent(row["of_read"])]
                table.records.append(row)
            table.rows.append(cells)
    row = decode_row(bench, Shape(8, *SPARSE), "scalar")
    table.records.append(row)
    table.note += (f"\nscalar (plain C), 8 heads, {row['keys']}: {ms(row['ns'])} ms, "
                   f"{percent(row['of_fma'])} of the compiler's baseline vectors.")
    return table


def list_cost(bench: Bench) -> Table:
    """The same list length out of ever larger caches."""
    sizes = (8192, 32768, m.LARGEST)
    table = Table("Cost follows the list: 2048 keys selected of ever more",
                  ["what", *(f"of {keys}, ms" for keys in sizes), "growth"],
                  "Growth: the largest cache over the smallest. Reading alone: the same rows.")

    def add(what: str, t: m.Times, **record: Any) -> None:
        growth = float(np.median(t[str(sizes[-1])] / t[str(sizes[0])]))
        table.add([what, *map(ms, t.values()), f"{growth:.3f}"], what=what, growth=growth, **record)

    for heads in (128, 16, 1):
        for isa in bench.isas:
            add(f"{heads_of(heads)}, {isa}", alternate(
                {str(keys): bench.build.calls(Shape(heads, 2048, keys), isa) for keys in sizes},
                bench.rounds), heads=heads, isa=isa)
    reads = alternate({str(keys): m.read(Shape(1, 2048, keys), m.READ_AHEAD)
                       for keys in sizes}, bench.rounds)
    add("reading alone", {keys: 2048 * m.ROW_BYTES / speed for keys, speed in reads.items()})
    return table


def maths(bench: Bench) -> Table:
    """The choices of --math: whole calls, and 2^x alone."""
    builds = {math: bench.build if math == "builtin" else m.Build(math) for math in m.LIBS}
    table = Table("--math: whole calls relative to builtin, and 2^x alone",
                  ["isa, heads", *builds, *(f"2^x {math}" for math in builds)],
                  "Calls: 2048 of 32768 keys. 2^x: ns an element, out of L1 and back.")
    for isa, heads in [*((isa, h) for isa in bench.isas for h in (128, 16)), ("scalar", 8)]:
        t = alternate({math: build.calls(Shape(heads, *SPARSE), isa)
                       for math, build in builds.items()}, bench.rounds)
        alone = alternate({math: b.exp2_alone(isa) for math, b in builds.items()}, bench.rounds)
        ratios = {math: float(np.median(t[math] / t["builtin"])) for math in builds}
        ns = {math: float(np.median(alone[math])) for math in builds}
        table.add([f"{isa}, {heads}", *(f"{r:.3f}" for r in ratios.values()),
                   *(f"{x:.3f}" for x in ns.values())],
                  isa=isa, heads=heads, calls=ratios, exp2_ns=ns)
    return table


def ways(bench: Bench) -> Table:
    """Paging, threads and checks, each relative to the plain call."""
    isa = bench.isas[0]
    table = Table(f"Relative to the plain call on one thread ({isa})",
                  ["heads", "keys", "paged", "checks", "share", "tasks", "split", "two threads"],
                  f"paged: blocks of {BLOCK_SIZE} anywhere. checks: plan, and its share of a call. "
                  "split: the row is cut into\ntasks and merged, on one thread. two threads: the "
                  "same on two over one, by the clock on the wall.")
    for heads in (128, 16, 1):
        for keys in (SPARSE, DENSE_8K):
            shape = Shape(heads, *keys)
            plain = bench.build.calls(shape, isa)
            steps = {"plain": plain, "plan": plain.plan(),
                     "paged": bench.build.calls(shape, isa, block_size=BLOCK_SIZE)}
            if options := plain.partials():
                steps["split"] = split = bench.build.calls(shape, isa, **options)
                steps |= {f"on {n}": split.on_threads(n) for n in (1, 2)}
            t = alternate(steps, bench.rounds)
            ns = float(np.median(t["plan"]))
            r = {name: float(np.median(t[name] / t["plain"])) for name in ("paged", "plan")}
            cells = [str(heads), shape.title, f"{r['paged']:.3f}", f"{ns:.0f} ns",
                     f"{100 * r['plan']:.2f} %"]
            if options:
                r["split"] = float(np.median(t["split"] / t["plain"]))
                r["two threads"] = float(np.median(t["on 2"] / t["on 1"]))
                cells += [str(split.tasks()), f"{r['split']:.3f}", f"{r['two threads']:.3f}"]
            table.add([*cells, "1", "", ""][:8], heads=heads, keys=shape.title, plan_ns=ns, **r)
    return table


def numpy_step(shape: Shape, widened: bool) -> m.Step:
    """NumPy on the same tensors; widened: on rows that lie ready in float32."""
    q = m.widen(m.queries()[: shape.heads])
    turn = m.rotation(shape)

    def gather() -> np.ndarray:
        case = turn.cases[turn.take()]
        return m.widen(case.keys[case.list])

    ready = gather()

    def step() -> float:
        begin = time.thread_time_ns()
        m.attend(q, ready if widened else gather())
        return float(time.thread_time_ns() - begin)

    return step


def peers(bench: Bench) -> Table:
    """What one composes without a kernel. PyTorch is not among them: it would be the same
    composition from a package of hundreds of megabytes."""
    isa = bench.isas[0]
    table = Table("Against NumPy (OpenBLAS, one thread), 2048 of 32768 keys",
                  ["heads", f"{isa} ms", "NumPy ms", "times", "of float32 rows ms", "times"],
                  "NumPy: gather, bf16 to float32, sgemm, softmax, sgemm. of float32 rows: sgemm, "
                  "softmax, sgemm alone,\non rows that lie ready in float32.")
    for heads in bench.heads:
        shape = Shape(heads, *SPARSE)
        t = alternate({"ours": bench.build.calls(shape, isa), "numpy": numpy_step(shape, False),
                       "ready": numpy_step(shape, True)}, bench.rounds)
        r = {name: float(np.median(t[name] / t["ours"])) for name in ("numpy", "ready")}
        table.add([str(heads), ms(t["ours"]), ms(t["numpy"]), f"{r['numpy']:.1f}",
                   ms(t["ready"]), f"{r['ready']:.1f}"],
                  heads=heads, **{k: float(np.median(v)) for k, v in t.items()}, ratios=r)
    return table


def floors(tables: dict[str, Table]) -> Table:
    """What was promised, held against what was measured."""
    table = Table("Floors", ["what", "floor", "measured", "reached"])
    shares = {(r["isa"], r["heads"]): r["of_fma"] for r in tables["decode"].records
              if r["keys"] == Shape(1, *SPARSE).title}
    for isa, heads, floor in FLOORS:
        if (isa, heads) in shares:
            got = shares[isa, heads]
            over = f"{'yes' if got >= floor else 'NO'}, by {100 * (got - floor):+.1f} points"
            table.add([f"{heads} heads, 2048 of 32768, share of the {isa} FMA peak",
                       f">= {percent(floor)}", percent(got), over],
                      isa=isa, heads=heads, floor=floor, measured=got, reached=got >= floor)
    floored = {heads for _, heads, _ in FLOORS}
    for r in tables["list_cost"].records:
        if r.get("heads") not in floored:
            continue
        growth = r["growth"]
        over = f"{'yes' if growth < GROWTH_FLOOR else 'NO'}, by {growth - GROWTH_FLOOR:+.3f}"
        table.add([f"{r['what']}, 2048 of 8192 to of {m.LARGEST}, growth of time",
                   f"< {GROWTH_FLOOR}", f"{growth:.3f}", over], **r, floor=GROWTH_FLOOR,
                  reached=growth < GROWTH_FLOOR)
    return table


# ---- putting it out -----------------------------------------------------------------------------


def plot(tables: dict[str, Table], folder: Path) -> None:
    """Bar charts: the share of whichever limit binds, and the times of NumPy over ours."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    records = [r for r in tables["decode"].records if r["isa"] != "scalar"]
    kinds = list(dict.fromkeys(r["keys"] for r in records))
    isas = list(dict.fromkeys(r["isa"] for r in records))
    width = 0.8 / len(isas)
    figure, panels = plt.subplots(1, len(kinds), figsize=(3.2 * len(kinds), 3.5), sharey=True,
                                  layout="constrained")
    for axes, kind in zip(panels, kinds, strict=True):
        for i, isa in enumerate(isas):
            bars = [r for r in records if (r["isa"], r["keys"]) == (isa, kind)]
            shares = [100 * max(r["of_fma"], r["of_read"]) for r in bars]
            names = ["FMA" if r["of_fma"] >= r["of_read"] else "read" for r in bars]
            drawn = axes.bar(np.arange(len(bars)) + (i - (len(isas) - 1) / 2) * width, shares,
                             width, label=isa)
            axes.bar_label(drawn, [f"{s:.0f}\n{n}" for s, n in zip(shares, names, strict=True)],
                           fontsize=6)
            axes.set_xticks(range(len(bars)), [heads_of(r["heads"]) for r in bars], fontsize=7)
        axes.set_title(kind, fontsize=9)
        axes.set_ylim(0, 110)
    panels[0].set_ylabel("% of the limit that binds:\nmultiply-add peak or bandwidth", fontsize=8)
    panels[0].legend(fontsize=8)
    figure.savefig(folder / "decode.png", dpi=150)

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    records = tables["peers"].records
    for i, (name, title) in enumerate((("numpy", "from the bf16 cache"),
                                       ("ready", "rows ready in float32"))):
        drawn = axes.bar(np.arange(len(records)) + (i - 0.5) * 0.4,
                         [r["ratios"][name] for r in records], 0.4, label=f"NumPy, {title}")
        axes.bar_label(drawn, fmt="%.1f", fontsize=7)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(records)), [heads_of(r["heads"]) for r in records], fontsize=8)
    axes.set_ylabel("time, this kernel = 1")
    axes.legend(fontsize=8)
    figure.savefig(folder / "peers.png", dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds: a minute")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="draw bar charts into DIR")
    options = parser.parse_args()
    bench = Bench(options.quick, 11 if options.quick else 31)
    print(f"{machine()}; {bench.rounds} rounds, medians\n")
    tables: dict[str, Table] = {}
    for make in (limits, decode, list_cost, maths, ways, peers):
        tables[make.__name__] = make(bench)
        print(tables[make.__name__].markdown(), flush=True)
    tables["floors"] = floors(tables)
    print(tables["floors"].markdown())
    if options.json:
        figures = {name: table.records for name, table in tables.items()}
        text = json.dumps({"machine": machine(), "rounds": bench.rounds, **figures}, indent=1)
        options.json.write_text(text + "\n")
    if options.plot:
        plot(tables, options.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
