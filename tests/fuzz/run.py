"""make fuzz SECONDS=n: every fuzz target in turn, from its kept inputs on, two at a time.

Prints for each what it ran, how fast, what it covers and what it found. Inputs that found something
are kept under build/fuzz; --keep puts a small set that covers the same into tests/fuzz/corpus.
"""

import argparse
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers_fuzz as fuzzing  # noqa: E402

FOLDER = ROOT / "build" / "fuzz"
SANITIZERS = {
    "checks": fuzzing.ASAN,
    "run": fuzzing.ASAN,
    "run-msan": fuzzing.MSAN,
}


def targets() -> list[tuple[str, str]]:
    """(name, operator)."""
    return [(name, op) for op in fuzzing.OPERATORS for name in SANITIZERS]


def one(name: str, op: str, seconds: int, keep: bool) -> fuzzing.Found:
    """Builds and runs a target."""
    target = name.removesuffix("-msan")
    binary = fuzzing.build(target, op, sanitize=SANITIZERS[name])
    corpus = FOLDER / "corpus" / f"{name}-{op}"
    fuzzing.unpack(target, op, corpus)
    found = fuzzing.fuzz(
        binary, corpus, seconds=seconds, artifacts=FOLDER / "found" / f"{name}-{op}"
    )
    if keep and name == target and not found.failure:
        small = FOLDER / "small" / f"{name}-{op}"
        fuzzing.minimised(binary, corpus, small)
        fuzzing.pack(target, op, small)
        shutil.rmtree(small)
    return found


def line(name: str, op: str, found: fuzzing.Found) -> str:
    rate = found.calls / max(found.seconds, 1e-9)
    return (
        f"{name:9} {op:34} {found.executions:>10} {found.calls:>11} {found.accepted:>10} "
        f"{rate:>9.0f} {found.edges:>6} {found.features:>7} {'FOUND' if found.failure else 'none'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="in all, on two cores")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="targets whose names hold this")
    parser.add_argument("--keep", action="store_true", help="replace the kept inputs")
    options = parser.parse_args()
    chosen = [x for x in targets() if options.only in "-".join(x)]
    each = max(1, options.seconds * options.jobs // max(1, len(chosen)))
    print(
        f"{'target':9} {'operator':34} {'inputs':>10} {'calls':>11} {'accepted':>10} "
        f"{'calls/s':>9} {'edges':>6} {'feat.':>7} findings",
        flush=True,
    )
    failed = []
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [(x, pool.submit(one, *x, each, options.keep)) for x in chosen]
        for (name, op), job in jobs:
            found = job.result()
            print(line(name, op, found), flush=True)
            if found.failure:
                failed.append(f"{name} {op}:\n{found.failure}")
    for failure in failed:
        print(f"\n{failure}")
    print(f"\n{len(chosen) - len(failed)} passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
