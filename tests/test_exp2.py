"""2^x and ln x as the headers compute them, against double, float by float.

Every STRIDE-th float32 is looked at; HEADLIGHT_EXHAUSTIVE=1 looks at all of them (minutes). The
figures are those of docs/numerics.md.
"""

import os
import platform
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from gen import bind
from gen.render import render_header
from gen.spec import parse_header

ROOT = Path(__file__).resolve().parent.parent
STRIDE = 1 if os.environ.get("HEADLIGHT_EXHAUSTIVE") == "1" else 997
STRIDE_QEMU = 9973
CROSS = ("aarch64-linux-gnu-gcc", ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"))
TABLE = {"op": "sparse_flash_attention", "dtype": "f32", "dk": 64,
         "isa": ["scalar", "avx2", "avx512", "neon"]}
LIBS = {"builtin": ["-lm"], "sleef": ["-lsleef", "-lm"], "libm": ["-lm"]}
# Units in the last place: SLEEF states 1.0, glibc's exp2f less than 1.
MAX_ULP = {"builtin": 1.0, "sleef": 1.0, "libm": 1.0}


@dataclass(frozen=True)
class Exp2:
    """One line of tests/exp2_sweep.c."""

    isa: str
    count: int
    max_ulp: float
    at: str
    rises: int
    max_rise_ulp: float
    nonzero_below: int
    special_wrong: int


@dataclass(frozen=True)
class Log:
    """Its last line."""

    count: int
    max_error: float
    at: str
    special_wrong: int


@cache
def sweep(math: str, cross: bool) -> tuple[dict[str, Exp2], Log]:
    """Compiles the sweep behind a header of its own and runs it, here or under qemu."""
    isas = [isa for isa in TABLE["isa"] if math == "builtin" or isa != "neon"]
    header = parse_header(TABLE | {"isa": isas, "math": math})
    compiler, emulator = CROSS if cross else ("cc", ())
    flags = ["-O2", '-DHEADER="header.h"', f"-DKERNEL={header.kernels[0].name}"]
    program = bind.compile_c(
        {
            "header.h": render_header(header),
            "words.h": (ROOT / "bench" / "words.h").read_text(),
            "exp2_sweep.c": (ROOT / "tests" / "exp2_sweep.c").read_text(),
        },
        compiler=compiler, flags=flags, libs=LIBS[math], suffix=".exe")
    stride = STRIDE_QEMU if cross else STRIDE
    run = subprocess.run([*emulator, program, str(stride)], check=True, capture_output=True,
                         text=True)
    *lines, last = [line.split() for line in run.stdout.splitlines()]
    made = {}
    for isa, count, ulp, at, rises, rise, below, wrong in lines:
        made[isa] = Exp2(isa, int(count), float(ulp), at, int(rises), float(rise), int(below),
                         int(wrong))
    print(run.stdout)
    return made, Log(int(last[1]), float(last[2]), last[3], int(last[4]))


def isas_here(math: str) -> set[str]:
    """What has to be swept natively."""
    return set(bind.load(parse_header(TABLE | {"math": "builtin"})).isas()) - (
        set() if math == "builtin" else {"neon"})


def check(result: Exp2, math: str, stride: int) -> None:
    floats = 0x42FC0000 + 1  # from -0 to -126
    assert result.count == (floats - 1) // stride + 1
    assert result.max_ulp <= MAX_ULP[math], result
    assert result.nonzero_below == 0, result
    assert result.special_wrong == 0, result


@pytest.mark.parametrize("math", ["builtin", "sleef", "libm"])
def test_exp2(math: str) -> None:
    results, _ = sweep(math, cross=False)
    assert set(results) == isas_here(math)
    for result in results.values():
        check(result, math, STRIDE)
