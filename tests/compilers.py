"""The same calls through every compiler and flag: which bits differ, and where.

    build/venv/bin/python tests/compilers.py --fused         # make compilers: some hours
    build/venv/bin/python tests/compilers.py --corners       # few builds of each header
    build/venv/bin/python tests/compilers.py --only f32_d64 --compilers gcc clang-19

Each header is compiled around tests/runner.c by every compiler here, at every level of
optimisation, as c99 and gnu99, with products and sums of its C code contracted or not. The same
recorded calls run on every instruction set; the outputs are compared with those of the first build.
NEON runs under qemu, tiles are emulated where there are none. What may differ is may_differ; the
exit status says whether anything else does. --fused also counts, in the object code of each
instruction set, operations of a product and a sum: a compiler may not add any to those written.
"""

import argparse
import functools
import hashlib
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import helpers_every as every  # noqa: E402
import helpers_runner  # noqa: E402
import helpers_tiles  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402
from helpers_runner import QEMU  # noqa: E402

from gen import bind  # noqa: E402

LEVELS = ("-O0", "-O1", "-O2", "-O3", "-Os")
STANDARDS = ("c99", "gnu99")
COMPILERS = ("gcc", "clang", "clang-19")
CROSS = ("aarch64-linux-gnu-gcc", "clang-19 --target=aarch64-linux-gnu")
CORNERS = (("-O0", "c99", "off"), ("-O1", "c99"), ("-O2", "gnu99"), ("-O3", "gnu99", "fast"))
CORNERS += (("-Os", "gnu99", "fast"),)
QUICK = (  # of each operator the one that is compiled in the shortest time
    "hl_sparse_flash_attention_f32_d64",
    "hl_sparse_flash_attention_antiquant_bf16_i8_656_d512_rope64",
    "hl_incre_flash_attention_bf16_d128",
    "hl_fusion_attention_bf16_d128",
    "hl_fusion_attention_grad_bf16_d128",
)


@dataclass(frozen=True)
class Build:
    """One way to compile a header."""

    compiler: str
    level: str = "-O2"
    standard: str = "c99"
    contract: str = ""  # "": what the compiler does by itself

    @property
    def clang(self) -> bool:
        return self.compiler.startswith("clang")

    @property
    def neon(self) -> bool:
        return "aarch64" in self.compiler

    @property
    def contracts(self) -> str:
        """What products and sums of C code may become: off; on, within an expression; or fast,
        anywhere, intrinsics too."""
        if self.contract:  # gcc takes on for off
            return self.contract if self.clang or self.contract == "fast" else "off"
        if self.clang:
            return "on"
        return "fast" if self.standard.startswith("gnu") else "off"

    @property
    def flags(self) -> tuple[str, ...]:
        contract = (f"-ffp-contract={self.contract}",) if self.contract else ()
        warn = ("-Wno-unknown-warning-option", "-Wno-psabi") if self.clang else ("-Wno-psabi",)
        static = ("-static",) if self.neon else ()
        return (self.level, f"-std={self.standard}", *contract, *warn, *static)

    def __str__(self) -> str:
        return f"{self.compiler} {self.level} -std={self.standard}" + (
            f" -ffp-contract={self.contract}" if self.contract else ""
        )


def builds(compilers: Sequence[str], every_way: bool) -> list[Build]:
    """Every compiler with every level, standard and kind of contraction; or of each only the
    corners. All are compared with the first."""
    made = []
    for compiler in compilers:
        ways = itertools.product(LEVELS, STANDARDS, ("off", "fast", "on"))
        all_of = [Build(compiler, *way) for way in ways if way[2] != "on" or "clang" in compiler]
        corners = CORNERS if compiler == "gcc" else CORNERS[1::2]
        made += all_of if every_way else [Build(compiler, *way) for way in corners]
    base = Build(compilers[0], "-O2", "c99", "off")
    return [base, *(build for build in made if build != base)]


def present(compilers: Iterable[str]) -> tuple[str, ...]:
    return tuple(c for c in compilers if shutil.which(c.split()[0]))


@functools.cache
def calls_of(name: str, count: int, seed: int = 7) -> list[every.Call]:
    """Random calls, and two long enough for several chunks, few heads and many."""
    made = list(every.calls(name, seed, count))
    heads = (3, 17) if every.description(name).op != "fusion_attention_grad" else (2,)
    return made + [every.sized(name, 300, 2, group, seed) for group in heads]


def recorded(name: str, isa: int, count: int) -> list[tuple[bytes, dict[str, Any]]]:
    """The calls for runner.c; more chunks than one where there are chunks, whole and by task."""
    trains = every.description(name).trains
    more = {} if trains else {"chunk_keys": 128}
    ways = (0, helpers_runner.BY_TASK, helpers_runner.BY_TASK | helpers_runner.PARTIALS)
    return [
        call.recorded(isa, ways[i % len(ways)], **more)
        for i, call in enumerate(calls_of(name, count))
    ]


def bits(array: np.ndarray) -> bytes:
    """What is compared: every bit, but that all NaNs count as one."""
    if array.dtype in (np.dtype(np.float32), np.dtype(np.float16)) or array.dtype == np.dtype(
        ml_dtypes.bfloat16
    ):
        array = array.copy()
        array[np.isnan(array.astype(np.float32))] = np.nan
    return array.tobytes()


def isas_of(name: str, neon: bool) -> dict[str, int]:
    """Instruction sets of a header that run here, with the value of args.isa."""
    known = {
        n[7:].lower(): v
        for n, v in every.kernel(name).constants.items()
        if n.startswith("HL_ISA_") and v > 0
    }
    here = ("scalar", "neon") if neon else every.isas_in(name)
    return {isa: known[isa] for isa in here if isa in every.description(name).isa}


def outputs(
    name: str, build: Build, count: int, text: str | None = None
) -> dict[str, dict[str, str]]:
    """A digest of every output of every call, by instruction set."""
    program = helpers_runner.program(
        text or every.text(name), name, compiler=build.compiler, flags=build.flags
    )
    made = {}
    for isa, value in isas_of(name, build.neon).items():
        env = helpers_tiles.preload_environment() if isa == "amx" else None
        command = [*(QEMU if build.neon else ()), program]
        _, results = helpers_runner.play(command, recorded(name, value, count), env)
        made[isa] = {
            f"{i} {output}": hashlib.sha256(bits(array)).hexdigest()[:16]
            for i, result in enumerate(results)
            for output, array in result.items()
        }
    return made


def differing(want: dict[str, dict[str, str]], got: dict[str, dict[str, str]]) -> dict[str, list]:
    """Outputs of which some bit differs, by instruction set."""
    return {
        isa: [at for at in digests if digests[at] != want[isa][at]] for isa, digests in got.items()
    }


# ---- what the compiler made of it ---------------------------------------------------------------

FUSED = re.compile(r"\s+(vf?n?m(add|sub)|vfn?m(add|sub)|fn?m(add|sub|la|ls))")  # x86-64, AArch64


def fused(text: str, compiler: str, flags: Sequence[str], isa: str) -> int:
    """How many operations of a product and a sum there are in a header's object code for one
    instruction set."""
    source = bind.export_source(bind.parse(text), (f"HL_ISA_ONLY_{isa.upper()}",))
    with tempfile.TemporaryDirectory() as folder:
        for file, content in (("header.h", text), ("header.c", source)):
            (Path(folder) / file).write_text(content)
        command = [*compiler.split(), *flags, "-S", "-o", "-", "header.c"]
        made = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return sum(FUSED.match(line) is not None for line in made.stdout.splitlines())


def fused_by_itself(
    text: str, compiler: str, level: str, contract: str, isa: str
) -> tuple[int, int]:
    """How many there are with contraction off, all of them written in the header, and else."""
    flags = (level, "-std=gnu99", "-w")
    asked, made = (
        fused(text, compiler, (*flags, f"-ffp-contract={c}"), isa) for c in ("off", contract)
    )
    return asked, made


def all_fused(name: str) -> list[str]:
    """Where some compiler fused more than a header says."""
    x86 = [(c, isa) for c in present(COMPILERS) for isa in ("avx2", "avx512", "amx")]
    wrong = []
    for compiler, isa in [*x86, *((c, "neon") for c in present(CROSS))]:
        for contract in ("fast", "on") if "clang" in compiler else ("fast",):
            if isa in every.description(name).isa:
                pair = fused_by_itself(every.text(name), compiler, "-O2", contract, isa)
                if pair[0] != pair[1]:
                    wrong.append(f"{name}: {compiler} {contract}: {isa}: {pair} fused")
    return wrong


# ---- all of it ----------------------------------------------------------------------------------


def sweep(name: str, compilers: Sequence[str], every_way: bool, count: int) -> list[dict]:
    """All builds of one header against the first one."""
    want, found = None, []
    for build in builds(compilers, every_way):
        row = {"header": name, "build": str(build), "contracts": build.contracts}
        try:
            got = outputs(name, build, count)
        except (RuntimeError, subprocess.SubprocessError, AssertionError) as error:
            found.append({**row, "failed": str(error)[-600:]})
            print(f"{name}: {build}: FAILED {str(error)[-600:]}", flush=True)
            continue
        want = want or got
        for isa, apart in differing(want, got).items():
            of = len(got[isa])
            expected = may_differ(build, isa)
            found.append({**row, "isa": isa, "of": of, "apart": apart, "expected": expected})
            if apart:
                kind = "as expected" if expected else "UNEXPECTED"
                print(f"{name}: {build}: {isa}: {len(apart)} of {of} differ, {kind}", flush=True)
    return found


def may_differ(build: Build, isa: str) -> bool:
    """Plain C on a processor that has one instruction for a product and a sum: its words leave it
    to the compiler whether to use it."""
    return isa == "scalar" and build.neon and build.contracts != "off"


def summary(rows: list[dict[str, Any]]) -> str:
    """A line for each instruction set and kind of contraction."""
    lines = [
        "| instruction set | contraction | builds | outputs | that differ |",
        "|---|---|---:|---:|---:|",
    ]
    keys = sorted({(r["isa"], r["contracts"]) for r in rows if "isa" in r})
    for isa, kind in keys:
        mine = [r for r in rows if r.get("isa") == isa and r["contracts"] == kind]
        n = sum(r["of"] for r in mine)
        lines.append(
            f"| {isa} | {kind} | {len(mine)} | {n} | {sum(len(r['apart']) for r in mine)} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="*", default=[], help="parts of headers' names")
    parser.add_argument("--corners", action="store_true", help="few builds of each header")
    parser.add_argument("--fused", action="store_true", help="count what is fused as well")
    parser.add_argument("--compilers", nargs="*", default=[*COMPILERS])
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--json", type=Path, help="where to write what was found")
    chosen = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in (*QUICK, *(n for n in every.HEADERS if n not in QUICK)):
        if chosen.only and not any(part in name for part in chosen.only):
            continue
        every_way = name in QUICK and not chosen.corners
        for compilers in (present(chosen.compilers), present(CROSS)):
            if compilers:
                rows += sweep(
                    name, compilers, every_way and compilers[0] not in CROSS, chosen.calls
                )
        if chosen.json:
            chosen.json.write_text(json.dumps(rows, indent=1))
    extra = [line for name in every.HEADERS if chosen.fused for line in all_fused(name)]
    print("\n".join([summary(rows), *extra]))
    wrong = [r for r in rows if "failed" in r or (r["apart"] and not r["expected"])]
    print(f"{len(rows)} runs of builds, {len(wrong)} of them with bits that should be the same")
    return int(bool(wrong or extra))


if __name__ == "__main__":
    sys.exit(main())
