"""2^x and ln x of the headers against double, float by float: what docs/numerics.md states.

Every STRIDE-th float32 of the range is looked at; with HEADLIGHT_EXHAUSTIVE=1 all of them, which
takes minutes.
"""

import functools
import os
import re
import subprocess
from dataclasses import dataclass

import pytest
from helpers import LIBS, ROOT, WORDS_HERE, text

from gen import bind

EXHAUSTIVE = os.environ.get("HEADLIGHT_EXHAUSTIVE") == "1"
STRIDE = 1 if EXHAUSTIVE else 997
STRIDE_QEMU = 997 if EXHAUSTIVE else 9973
FLOATS = 0x42FC0000 + 1  # from -0 to -126
HEADERS = {
    "builtin": "hl_sparse_flash_attention_bf16_d512_rope64",
    "sleef": "f32_sleef",
    "libm": "f32_libm",
}
CROSS = "aarch64-linux-gnu-gcc"
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")


@dataclass(frozen=True)
class Exp2:
    """What tests/exp2_sweep.c says of one instruction set."""

    count: int
    max_ulp: float
    rises: int
    max_rise_ulp: float
    nonzero_below: int
    special_wrong: int


@dataclass(frozen=True)
class Log:
    """What it says of ln x; the error is without the rounding of the result itself."""

    max_error: float
    special_wrong: int


def run_sweep(header: str, math: str, cross: bool, stride: int) -> tuple[dict[str, Exp2], Log]:
    """Compiles the sweep behind a header's text, and runs it here or under qemu."""
    program = bind.compile_c(
        {
            "header.h": header,
            "words.h": (ROOT / "bench" / "words.h").read_text(),
            "sweep.c": (ROOT / "tests" / "exp2_sweep.c").read_text(),
        },
        compiler=CROSS if cross else "cc",
        flags=(
            "-O2",
            "-Werror=implicit-function-declaration",
            '-DHEADER="header.h"',
            f"-DKERNEL={bind.parse(header).kernels[0]}",
        ),
        libs=(*LIBS[math], "-lm"),
        suffix=".program",
    )
    command = [*(QEMU if cross else ()), program, str(stride)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    print(output)
    *lines, log = [line.split() for line in output.splitlines()]
    isas = {
        isa: Exp2(int(count), float(ulp), int(rises), float(rise), int(below), int(wrong))
        for isa, count, ulp, _, rises, rise, below, wrong in lines
    }
    return isas, Log(float(log[2]), int(log[4]))


@functools.cache
def sweep(math: str) -> tuple[dict[str, Exp2], Log]:
    """The sweep of one of HEADERS on this machine, once for all tests."""
    return run_sweep(text(HEADERS[math]), math, False, STRIDE)


def stated(pattern: str) -> float:
    """A number that the shipped header states about itself; the same in all its regions."""
    found = {float(x) for x in re.findall(pattern, text(HEADERS["builtin"]))}
    assert len(found) == 1, found
    return found.pop()


def max_ulp(math: str) -> float:
    """Units in the last place: SLEEF states 1.0, and glibc's exp2f keeps it too."""
    return 1.0 if math != "builtin" else stated(r"Within ([\d.]+) units in the last place")


def check(result: Exp2, math: str, stride: int) -> None:
    assert result.count == (FLOATS - 1) // stride + 1
    assert 0.3 < result.max_ulp <= max_ulp(math)  # less than a half is no sweep at all
    assert result.max_rise_ulp <= 1.0
    assert result.nonzero_below == 0
    assert result.special_wrong == 0


@pytest.mark.parametrize("math", HEADERS)
def test_exp2_of_every_instruction_set_here(math: str) -> None:
    results, _ = sweep(math)
    assert "scalar" in results
    here = set(bind.load(text(HEADERS[math]), libs=LIBS[math]).isas())
    assert set(results) == here & set(WORDS_HERE)  # tiles have no words of their own
    for result in results.values():
        check(result, math, STRIDE)


def test_exp2_and_log_of_neon() -> None:
    results, log = run_sweep(text(HEADERS["builtin"]), "builtin", True, STRIDE_QEMU)
    assert set(results) == {"scalar", "neon"}
    for result in results.values():
        check(result, "builtin", STRIDE_QEMU)
    check_log(log)


def test_log() -> None:
    check_log(sweep("builtin")[1])


def check_log(log: Log) -> None:
    assert 0.0 < log.max_error <= stated(r"Absolute error below ([\d.e-]+) plus half a unit")
    assert log.special_wrong == 0


def test_the_sweep_sees_a_wrong_coefficient() -> None:
    """The control: one coefficient off by two units in its last place has to show."""
    header = text(HEADERS["builtin"])
    wrong = header.replace("6.93147182e-1f", "6.93147302e-1f")
    assert wrong != header
    results, _ = run_sweep(wrong, "builtin", False, 9973)
    assert all(result.max_ulp > max_ulp("builtin") for result in results.values())
