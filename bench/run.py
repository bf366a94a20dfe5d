"""Times the shipped headers against this machine's own limits.

    make bench [ONLY=<pattern>]    or    build/venv/bin/python bench/run.py [--quick] [--only ..]
    make bench-peers [ONLY=<pattern>]    the same shapes through other libraries (bench/peers)

Everything runs in one process on one core (but for the table of two threads): what is compared
takes turns, ratios are formed between neighbours, and medians are printed. Times are processor
time, so that other work on the machine does not count; it still takes caches and bandwidth, and
clocks away. Tables are Markdown; the main one is in build/bench/results.json too, whose fields are
those of cases.Record, and in build/bench/*.png.
"""

# ruff: noqa: E402 (the number of BLAS threads has to be set before NumPy is loaded)
import os

for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"

import argparse
import json
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

import cases
import side
import tables
from cases import LETTERS, Measured
from measure import ROOT
from tables import machine, number, percent

COLUMNS = ["kernel", "shape", "isa", "ms", "spread", "GFLOP/s", "of compute", "GB/s", "of read",
           "gather GB/s", "bound", "error", "target"]
NOTE = """\
ms: median of one call, plan included. spread: (90th - 10th percentile) / median. of compute: share
of the peak of bf16 tile products (amx) or of that instruction set's float32 multiply-adds. of read:
share of the bandwidth R of reading as many consecutive bytes out of the same level of caches.
gather GB/s: reading the listed rows alone. bound: the limit that binds, by this row's own figures.
error: relative L2 against float64, with the rounding of the output. Dense: the same rows in every
call; listed: others in each call, all over the cache. Prefill and backward: only pairs of row and
key that count, backward five products; error: of the first kv head's heads. target: for the
reference machine, an Intel Xeon with AMX; P: the peak of bf16 tile products."""
ROUNDS, QUICK_ROUNDS = 31, 5
SECONDS, QUICK_SECONDS = 8.0, 0.4  # for one row; no fewer than five rounds


def line(row: Measured) -> list[str]:
    """The cells of one row of the main table."""
    r = row.record
    target = ""
    if row.target:
        target = (f"{100 * row.target.share:.0f} % {LETTERS[row.target.kind]}: "
                  f"{'yes' if row.reached else 'NO'}")
    return [cases.short(r.kernel), row.shape.title, r.isa,
            tables.ms(r.ms * 1e6), percent(r.spread), number(r.gflops), percent(row.of_compute),
            f"{r.gbps:.1f}", percent(row.of_read), f"{row.gather:.1f}" if row.gather else "",
            r.limit_kind, f"{r.rel_err:.1e}", target]


def main_table(chosen: list[cases.Case], bench: side.Bench) -> list[Measured]:
    """Prints the table line by line, for it takes minutes."""
    made = []
    labels = [max(len(cells[i]) for cells in (
        ["kernel", "shape", "isa"], *([case.header, case.shape.title, case.isa]
                                      for case in chosen))) for i in range(3)]
    widths = [*labels, 9, 8, 7, 10, 6, 8, 11, 6, 7, 13]

    def show(cells: list[str]) -> None:
        print("| " + " | ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(
            zip(cells, widths, strict=True))) + " |", flush=True)

    print(f"### Kernels\n\n{NOTE}\n")
    show(COLUMNS)
    show([("-" if i < 3 else "-:").rjust(w, "-") for i, w in enumerate(widths)])
    for case in chosen:
        row = cases.measure(case, bench.rounds, QUICK_SECONDS if bench.quick else SECONDS)
        made.append(row)
        show(line(row))
    print()
    return made


def remarks(rows: list[Measured], lacking: list[str]) -> list[str]:
    """The lines under the main table."""
    made = []
    if lacking:
        made.append(f"Instruction sets that this machine lacks, left out: {', '.join(lacking)}.")
    held = [row for row in rows if row.target]
    if held:
        made.append(f"Targets reached: {sum(row.reached for row in held)} of {len(held)} that can "
                    "be asked of this machine.")
    of_tiles = [f"{100 * row.of_matrix:.1f} % ({cases.short(row.record.kernel)} {row.shape.title}, "
                f"{row.record.isa})" for row in rows if row.of_matrix is not None]
    if of_tiles:
        made.append(f"Prefill on vectors, share of P all the same: {', '.join(of_tiles)}.")
    f16 = {(row.record.selection, row.record.keys, row.record.isa): row.record.ms for row in rows
           if cases.short(row.record.kernel) == "f16_d512_rope64" and row.record.heads == 128}
    ratios = {f"{selection} {keys}": f16[selection, keys, "avx512"] / ms
              for (selection, keys, isa), ms in f16.items()
              if isa == "amx" and (selection, keys, "avx512") in f16}
    if ratios:
        figures = ", ".join(f"{ratio:.1f} ({what})" for what, ratio in ratios.items())
        made.append(f"float16, 128 heads, the matrix unit over AVX-512, target "
                    f"{cases.F16_TIMES:.0f}: {figures}.")
    made.append(f"Caches and workspaces: {tables.pages()}.")
    return made


# ---- results ------------------------------------------------------------------------------------


def load(path: Path) -> list[dict]:
    """The results of runs before; none that are not of today's fields."""
    try:
        records = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    fields = set(cases.Record.__dataclass_fields__)
    return [record for record in records if set(record) == fields]


def save(path: Path, records: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")


def own(options: argparse.Namespace, bench: side.Bench) -> int:
    """Our kernels against the limits."""
    every, lacking = cases.cases(bench.include, bench.quick)
    chosen = [case for case in every if cases.matches(options.only, case.label)]
    if not chosen:
        print(f"no row matches {options.only!r}; fix: a part of a label, for example "
              f"{every[0].label!r}; * and ? stand for anything", file=sys.stderr)
        return 1
    if not options.only:
        print(side.limits(bench).markdown(), flush=True)
    rows = main_table(chosen, bench)
    print("\n".join(remarks(rows, lacking)), end="\n\n")
    measured = list(rows)
    if not options.only:
        for make in (side.cold, side.threads):
            table, more = make(bench)
            measured += more
            print(table.markdown(), flush=True)
        if not bench.quick:
            for table in side.tables(bench):
                print(table.markdown(), flush=True)
    path = options.out / "results.json"
    old = [record for record in load(path) if options.only or record["peer"] is not None]
    records = cases.merged(old, [row.record.json() for row in measured])
    finish(path, records, rows)
    return 0


def finish(path: Path, records: list[dict], rows: list[Measured]) -> None:
    """Writes results and pictures."""
    import plots

    save(path, records)
    made = [path]
    if rows:
        plots.roofline(records, rows, path.parent / "roofline.png")
        made.append(path.parent / "roofline.png")
    if plots.peers(records, path.parent / "peers.png"):
        made.append(path.parent / "peers.png")
    print("written:", *(os.path.relpath(file) for file in made))


def against_peers(options: argparse.Namespace, bench: side.Bench) -> int:
    """Our kernels and others' libraries on the same shapes, in turn."""
    import peers

    table, records = peers.compare(bench, options.only)
    if not records:
        print(f"no shape matches {options.only!r}; fix: a part of, for example, "
              f"'{cases.MLA} 16 heads, dense 8192'", file=sys.stderr)
        return 1
    path = options.out / "results.json"
    old = [record for record in load(path) if options.only or record["peer"] is None]
    print(table.markdown())
    print(f"Caches and workspaces: {tables.pages()}.\n")
    finish(path, cases.merged(old, records), [])
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true",
                        help="small shapes, few rounds: does it run at all? under a minute")
    parser.add_argument("--only", default="", metavar="PATTERN",
                        help="rows whose 'kernel shape isa' has this in it; * ? and |")
    parser.add_argument("--peers", action="store_true", help="against other libraries")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench", metavar="DIR",
                        help="where results.json and pictures go (build/bench)")
    options = parser.parse_args()
    bench = side.Bench(ROOT / "include", options.quick,
                       QUICK_ROUNDS if options.quick else ROUNDS)
    print(f"{machine()}; up to {bench.rounds} rounds, medians\n")
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, also for others' pools
    return against_peers(options, bench) if options.peers else own(options, bench)


if __name__ == "__main__":
    sys.exit(main())
