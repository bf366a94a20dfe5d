"""The same bits whatever is around a row: every shipped header on every instruction set, REPEATS
times in as many ways (make determinism; what a repeat varies: helpers_repeat.py and repeats.c).

    build/venv/bin/python tests/repeats.py --repeats 1000
    build/venv/bin/python tests/repeats.py --repeats 50 --only f32_d64 --isas scalar neon

The repeats of a kernel and instruction set are dealt out to its families of calls. NEON runs under
qemu, tiles are emulated where there are none. The exit status says whether a bit differed.
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers_every as every  # noqa: E402
import helpers_repeat  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--only", nargs="*", default=[], help="parts of headers' names")
    parser.add_argument("--isas", nargs="*", default=[])
    chosen = parser.parse_args()
    count = compared = differing = kernels = 0
    for name in every.HEADERS:
        if chosen.only and not any(part in name for part in chosen.only):
            continue
        neon = ("neon",) if "neon" in every.description(name).isa else ()
        for isa in (*every.isas_in(name), *neon):
            if chosen.isas and isa not in chosen.isas:
                continue
            begin, families = time.time(), helpers_repeat.families(name)
            each = -(-chosen.repeats // len(families))
            for family in families:
                found = (
                    helpers_repeat.repeat_on_neon(name, family, each)
                    if isa == "neon"
                    else helpers_repeat.repeat(name, isa, family, each)
                )
                count, differing = count + found.count, differing + found.differing
                compared += found.count * found.watched
                if found.differing:
                    print(f"{name} {isa} {family.what}: {found}", flush=True)
            kernels += 1
            seconds = time.time() - begin
            print(f"{name} {isa}: {each * len(families)} repeats, {seconds:.0f} s", flush=True)
    print(
        f"{kernels} kernels and instruction sets, {count} repeats, {compared} bytes compared,"
        f" {differing} repeats with a bit that differs"
    )
    return int(differing != 0)


if __name__ == "__main__":
    sys.exit(main())
