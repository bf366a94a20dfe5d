"""The sweep of tests/test_guard.py on processors that are not here: NEON and plain C on an emulated
64-bit Arm, AVX2 on an emulated machine without AVX-512. runner.c has the guard pages."""

import shutil
from collections.abc import Sequence
from typing import Any

import helpers_every as every
import pytest
from helpers import same_bits
from helpers_guard import FULL, Job, jobs, note
from helpers_memory import Survey
from helpers_runner import (
    BY_TASK,
    FLUSH_LEFT,
    PARTIALS,
    QEMU,
    need_aarch64,
    play,
    program,
)
from test_guard_lies import MAY_BE_REFUSED, honest, shapes_of, unread

HASWELL = ("qemu-x86_64", "-cpu", "Haswell")
SLICE = "hl_sparse_flash_attention_f32_d64"
JOBS = 240 if FULL else 30  # for each instruction set, from all over the sweep
AT_ONCE = 60  # calls of one run of the program
BY_NAME = pytest.mark.parametrize("name", every.HEADERS if FULL else [SLICE])
Recorded = tuple[bytes, dict[str, Any]]


def arm(name: str) -> Sequence[str]:
    need_aarch64()
    return (*QEMU, str(program(every.text(name), every.kernel(name).name)))


def haswell(name: str) -> Sequence[str]:
    assert shutil.which(HASWELL[0]), "qemu-x86_64 missing; fix: apt-get install qemu-user"
    built = program(every.text(name), every.kernel(name).name, compiler="gcc")
    return (*HASWELL, str(built))


def run_recorded(command: Sequence[str], calls: list[Recorded], what: list[str]) -> int:
    """Plays all of them; if the program dies, those before and behind the middle by themselves, so
    that the report names the call. What isas() said there."""
    try:
        return play(command, calls)[0]
    except AssertionError as failure:
        if len(calls) == 1:
            raise AssertionError(f"{what[0]}: {failure}") from None
        half = len(calls) // 2
        run_recorded(command, calls[:half], what[:half])
        run_recorded(command, calls[half:], what[half:])
        raise


def recorded(job: Job, number: int) -> tuple[every.Call, list[Recorded]]:
    """A job's call from both sides, by the one call and by tasks, with partials and without."""
    call, made = every.call_of(job.name, job.shape), []
    merges = call.kernel.merges
    for side, flush in enumerate((0, FLUSH_LEFT)):
        turn = job.way + side
        mode = flush | BY_TASK * (turn % 2) | PARTIALS * (merges and turn % 3 > 0)
        more = {"chunk_keys": (0, 128)[job.way % 2]} if merges else {}
        made.append(call.recorded(number, mode, **more))
    return call, made


def sweep(name: str, isas: Sequence[str], command: Sequence[str], here: str, what: str) -> None:
    """Jobs of the sweep in another program: its tiles are those of `isas`."""
    constants = every.kernel(name).constants
    number = {isa: constants[f"HL_ISA_{isa.upper()}"] for isa in isas}
    for isa in isas:
        some = jobs(name, (isa,))
        some = some[len(name) % 7 :: max(1, len(some) // JOBS)]
        calls = 0
        for at in range(0, len(some), AT_ONCE // 2):
            chunk = some[at : at + AT_ONCE // 2]
            made = [recorded(job, number[isa]) for job in chunk]
            flat = [one for _, pair in made for one in pair]
            said = run_recorded(command, flat, [str(job) for job in chunk for _ in range(2)])
            assert said == sum(1 << constants[f"HL_ISA_{i.upper()}"] for i in isas), hex(said)
            for job, (call, ((_, right), (_, left))) in zip(chunk, made, strict=True):
                for n in right:
                    same = same_bits(right[n], left[n])
                    assert same or not right["attention_out"].size, f"{n} of {job}"
                if job.checked:
                    call.check(right, isa)
                calls += 2
        note(what, name, f"{isa} {here}".strip(), Survey(calls))


@BY_NAME
def test_arm(name):
    """Every header on NEON and in plain C."""
    of = every.description(name)
    isas = [isa for isa in ("scalar", "neon") if isa in of.isa]
    sweep(name, isas, arm(name), "qemu-aarch64", "elsewhere")


AVX2 = [name for name in every.HEADERS if "avx2" in every.description(name).isa]


if FULL:

    @pytest.mark.parametrize("name", AVX2)
    def test_without_avx512(name):
        """Every header on a processor of 2013: what it finds there is AVX2, and that is enough."""
        sweep(name, ("scalar", "avx2"), haswell(name), "qemu Haswell", "elsewhere")


@pytest.mark.parametrize("name", every.HEADERS if FULL else [SLICE])
def test_every_buffer_is_guarded_there(name):
    """The control: each input one element shorter than the call says."""
    command, constants = arm(name), every.kernel(name).constants
    isa = "neon" if "neon" in every.description(name).isa else "scalar"
    for shape in shapes_of(name):
        call = honest(name, shape)
        if every.description(name).record is not None:
            continue  # test_guard_lies knows what fills a record up
        inputs = call.inputs()
        for n, array in inputs.items():
            if unread(call, shape, n, "right"):
                continue
            short = _without_last(call, n)
            data = short.recorded(constants[f"HL_ISA_{isa.upper()}"], 0)
            with pytest.raises(AssertionError, match=r"exit|refused"):
                play(command, [data])
            assert n in MAY_BE_REFUSED or array.size


def _without_last(call: every.Call, name: str) -> every.Call:
    """The same call, one of its inputs without its last element."""

    class Shorter(every.Call):
        def inputs(self) -> dict[str, Any]:
            made = super().inputs()
            return {**made, name: made[name].reshape(-1)[:-1]}

    return Shorter(call.name, call.case)
