"""What a call finds and leaves behind, for every shipped header on every instruction set:
callee-saved registers, control words, tiles; subnormal numbers flushed or not, exceptions trapped,
other directions of rounding."""

import ctypes
import dataclasses
import functools
from pathlib import Path
from typing import Any

import helpers
import helpers_every
import helpers_runner
import numpy as np
import pytest
from helpers import TILES, same_bits
from helpers_every import HEADERS, Call, by_pair, description, text
from helpers_memory import Died, in_child
from helpers_runner import BY_TASK, FLUSH_TO_ZERO, PARTIALS, QEMU, need_aarch64

from gen import bind
from gen.isa import ISAS

SOURCE = Path(__file__).resolve().parent / "environment.c"
DEFAULT, FLUSH = 0x1F80, 0x9FC0
TRAPS = DEFAULT & ~0x680  # INVALID, DIVBYZERO and OVERFLOW, as by feenableexcept
TRAPPED = 0x0D  # their sticky bits
# On tiles weights are computed before their maximum is known, and again behind it: what is thrown
# away may overflow.
TRAPS_TILES, TRAPPED_TILES = DEFAULT & ~0x280, 0x05
DOWN, UP, TOWARDS_ZERO = DEFAULT | 0x2000, DEFAULT | 0x4000, DEFAULT | 0x6000
CALLS = 5


class Report(ctypes.Structure):
    """env_report of environment.c."""

    _fields_ = [
        ("given", ctypes.c_uint64 * 18),
        ("left", ctypes.c_uint64 * 18),
        ("result", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("status", ctypes.c_uint64),
        ("flags", ctypes.c_uint64),
        ("x87", ctypes.c_uint64 * 4),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """environment.c, loaded."""
    made = ctypes.CDLL(str(bind.compile_c({"environment.c": SOURCE.read_text()})))
    made.env_set.argtypes = (ctypes.c_uint64,)
    made.env_call.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_void_p)
    return made


def enter(function: Any, *arguments: Any, control: int = DEFAULT) -> Report:
    """Calls a C function with a full set of registers; asserts that it gives them back."""
    report = Report()
    passed = (ctypes.c_void_p * 4)(*arguments)
    address = ctypes.cast(function, ctypes.c_void_p)
    wrong = library().env_call(address, passed, control, ctypes.addressof(report))
    assert wrong == 0, f"environment {wrong}: control {report.control:x}, flags {report.flags:x}"
    assert TILES is None or TILES.configured() == 0, "tiles were left configured"
    return report


def run(call: Call, isa: str, control: int = DEFAULT, **more: Any) -> tuple[int, dict, int]:
    """The one-call function in that environment: its status, its outputs, and what exceptions it
    has raised."""
    k, outputs = call.kernel, call.outputs()
    args, error = k.args(**{**call.fields(isa), **outputs, **more}), k.Error()
    size = k._c_workspace_bytes(ctypes.byref(args))
    workspace = np.full(max(size, 1), 0xFF, np.uint8)
    report = enter(
        k._c,
        ctypes.addressof(args),
        workspace.ctypes.data,
        size,
        ctypes.addressof(error),
        control=control,
    )
    return ctypes.c_int32(report.result & 0xFFFFFFFF).value, outputs, report.control & 0x3F


def finite_calls(name: str, seed: int, count: int) -> list[Call]:
    """Random calls all of whose numbers are finite, and that no number's place is without."""
    made = []
    for shape in helpers_every.shapes(name, seed, count):
        sinks = shape.sinks.replace("infinite", "plain")
        call = helpers_every.call_of(name, dataclasses.replace(shape, spread="normal", sinks=sinks))
        case = call.case
        if call.grads:
            case.case = finite(case.case)
            case.dout = np.nan_to_num(case.dout.astype(np.float32)).astype(case.case.dtype)
        elif description(name).trains or helpers_every.of_operator(name) is helpers:
            call.case = finite(case)
        made.append(call)
    return made


def finite(case: Any) -> Any:
    """1 in the place of NaN that nobody may read."""
    changes = {}
    for field in ("query", "query_rope", "key", "key_rope", "value", "pse"):
        tensor = getattr(case.args, field, None)
        if tensor is not None and tensor.dtype != np.uint8:
            numbers = tensor.astype(np.float32)
            changes[field] = np.where(np.isnan(numbers), tensor.dtype.type(1), tensor)
    return case.changed(**changes)


@by_pair()
def test_hazard_38_39_48_registers_and_control_words_are_given_back(name, isa):
    """Callee-saved registers, MXCSR, x87, the direction flag, tiles; with subnormal numbers flushed
    too, where results are within the bounds as well."""
    for call in helpers_every.calls(name, 41, CALLS):
        for control in (DEFAULT, FLUSH):
            status, outputs, _ = run(call, isa, control)
            assert status == 0, call
            call.check(outputs, isa)


@by_pair()
def test_hazard_48_refused_calls_give_all_back_too(name, isa):
    """Bad arguments, memory that is too small; and plan and task by themselves."""
    call = next(iter(helpers_every.calls(name, 42, 1)))
    k, outputs = call.kernel, call.outputs()
    for bad in ({"scale_value": float("nan")}, {"heads_q": -1}, {"query": 1}, {"batch": 1 << 30}):
        status, got, _ = run(call, isa, **bad)
        assert status < 0, bad
        for output in got:
            assert same_bits(got[output], outputs[output]), f"{output} of a refused call"
    args, error, plan = k.args(**{**call.fields(isa), **outputs}), k.Error(), k.Plan()
    at = [ctypes.addressof(x) for x in (args, error, plan)]
    room = np.zeros(16, np.uint8)
    assert enter(k._c, at[0], room.ctypes.data, 0, at[1]).result & 0xFFFFFFFF or plan.n_tasks == 0
    assert enter(k._c_plan, at[2], at[0], at[1]).result & 0xFFFFFFFF == 0
    workspace = np.zeros(plan.task_bytes, np.uint8)
    for task in (-1, *range(min(plan.n_tasks, 3)), plan.n_tasks):
        enter(k._c_task, at[2], task, workspace.ctypes.data)


@by_pair()
def test_hazard_39_finite_numbers_trap_nothing(name, isa):
    """With INVALID, DIVBYZERO and OVERFLOW trapped (on tiles the first two), calls of finite
    numbers run to their end."""
    traps, flags = (TRAPS_TILES, TRAPPED_TILES) if ISAS[isa].tiles else (TRAPS, TRAPPED)

    def trapped(call: Call) -> tuple[int, dict]:
        return run(call, isa, traps)[:2]

    for call in finite_calls(name, 43, CALLS):
        _, want, raised = run(call, isa)
        assert raised & flags == 0, (hex(raised), call)
        status, got = in_child(functools.partial(trapped, call), f"{name} {isa} {call}")
        assert status == 0
        for output in got:
            assert same_bits(got[output], want[output])


def test_a_trap_is_noticed():
    """The control: one division by zero."""

    def divide(control: int) -> int:
        numbers = np.array([1, 0], np.float32)
        return enter(library().env_divide, numbers.ctypes.data, control=control).control & 0x3F

    assert divide(DEFAULT) & 0x04
    with pytest.raises(Died, match="SIGFPE"):
        in_child(lambda: divide(TRAPS))


@pytest.mark.parametrize(
    "function,wrong",
    [
        ("env_good", None),
        ("env_bad_register", 1),
        ("env_bad_control", 2),
        ("env_bad_flag", 4),
        ("env_bad_x87", 8),
        ("env_bad_mmx", 16),
    ],
)
def test_what_is_left_behind_is_noticed(function, wrong):
    """The control: functions that do not give back what they have to."""
    if wrong is None:
        enter(library()[function])
        return
    with pytest.raises(AssertionError, match=f"environment {wrong}:"):
        enter(library()[function])


@by_pair()
def test_hazard_39_other_directions_of_rounding(name, isa):
    """Nothing outside a call's memory is touched (the child has the mode, too), nothing is NaN
    that was none; sums are off by what the direction takes from each step."""
    for call in finite_calls(name, 44, 2):
        want = run(call, isa)[1]
        for control in (DOWN, UP, TOWARDS_ZERO):
            library().env_set(control)
            try:
                got = call.guarded(isa)
            finally:
                library().env_set(DEFAULT)
            for output, numbers in got.items():
                if numbers.dtype.kind in "iu":
                    continue
                x, y = (n.astype(np.float64) for n in (numbers, want[output]))
                assert (np.isfinite(x) == np.isfinite(y)).all(), (output, hex(control))
                both = np.isfinite(x)
                error = abs(x[both] - y[both]).max(initial=0)
                size = abs(y[both]).max(initial=1)
                assert error <= 0.05 * size, (output, hex(control), error, size)


SLICE = ("hl_sparse_flash_attention_f32_d32_rope8", "hl_incre_flash_attention_bf16_i8_d128")


@pytest.mark.parametrize("name", SLICE)
def test_hazard_49_registers_of_aarch64_are_given_back(name):
    """x19 to x28, d8 to d15 and FPCR, with FZ set and not, under qemu; scalar and NEON."""
    need_aarch64()
    built = helpers_runner.program(
        text(name), helpers_every.kernel(name).name, environment="env_good"
    )
    assert len(HEADERS) > len(SLICE)
    k = helpers_every.kernel(name)
    isas = [isa for isa in ("scalar", "neon") if isa in description(name).isa]
    calls, cases = [], []
    for i, call in enumerate(helpers_every.calls(name, 45, 12)):
        mode = (0, FLUSH_TO_ZERO, BY_TASK, BY_TASK | PARTIALS | FLUSH_TO_ZERO)[i % 4]
        for isa in isas:
            calls.append(call.recorded(k.constants[f"HL_ISA_{isa.upper()}"], mode))
            cases.append((call, isa))
    _, results = helpers_runner.play((*QEMU, str(built)), calls)
    for (call, isa), got in zip(cases, results, strict=True):
        call.check(got, isa)


@pytest.mark.parametrize("spoil,wrong", [("env_bad_register", 1), ("env_bad_control", 2)])
def test_what_is_left_behind_is_noticed_on_aarch64(spoil, wrong):
    need_aarch64()
    name = SLICE[0]
    k = helpers_every.kernel(name)
    built = helpers_runner.program(text(name), k.name, environment=spoil)
    call = next(iter(helpers_every.calls(name, 45, 1)))
    with pytest.raises(AssertionError, match=f"environment {wrong}"):
        helpers_runner.play((*QEMU, str(built)), [call.recorded(k.constants["HL_ISA_SCALAR"])])
