"""Machines of other widths and byte orders: 32-bit x86 and Arm, big-endian s390x. Calls are
recorded here and run there by runner.c; structs are laid out as their compilers say, set by name.
"""

import ctypes
import dataclasses
import functools
import os
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import helpers_cases
import helpers_runner
import numpy as np
import pytest
from helpers import record_of
from helpers_every import Call, description, kernel, text

from gen import bind

PARTS = "gcc-i686-linux-gnu libc6-dev-i386-cross gcc-arm-linux-gnueabihf libc6-dev-armhf-cross"
PARTS += " gcc-s390x-linux-gnu libc6-dev-s390x-cross qemu-user"


@dataclass(frozen=True)
class Machine:
    """A machine that this one runs programs of, by itself or under qemu."""

    name: str
    compiler: str
    emulator: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    bits: int = 32
    order: str = "<"  # of bytes, as in struct
    exact: bool = True  # float arithmetic rounds to float: bits are those of any other machine


UNFUSED = ("-std=gnu99", "-ffp-contract=off")
# x87 keeps more than 24 bits of a sum: where gcc may, up to where they are stored. On s390x
# -std=c99 computes floats as doubles (FLT_EVAL_METHOD 1), gnu99 does not, but would fuse.
MACHINES = {
    machine.name: machine
    for machine in (
        Machine("i686", "i686-linux-gnu-gcc", flags=("-std=c99",), exact=False),
        Machine("i686-gnu99", "i686-linux-gnu-gcc", flags=("-std=gnu99",), exact=False),
        Machine("i686-sse", "i686-linux-gnu-gcc", flags=("-msse2", "-mfpmath=sse", "-std=c99")),
        Machine("armv7", "arm-linux-gnueabihf-gcc", ("qemu-arm",), ("-std=c99",)),
        Machine("s390x", "s390x-linux-gnu-gcc", ("qemu-s390x",), UNFUSED, 64, ">"),
    )
}
HERE_64 = Machine("x86-64", "gcc", flags=("-std=c99",), bits=64)
by_machine = pytest.mark.parametrize("machine", MACHINES)


def need(machine: Machine) -> None:
    """Fails where the compiler or qemu is missing; skips only where that was asked for."""
    tools = (machine.compiler, *machine.emulator)
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing and os.environ.get("HEADLIGHT_ALLOW_MISSING") == "1":
        pytest.skip(f"{', '.join(missing)} missing, and HEADLIGHT_ALLOW_MISSING=1")
    assert not missing, f"{', '.join(missing)} missing; fix: apt-get install {PARTS}"


def compiled(machine: Machine, files: dict[str, str], flags: Sequence[str] = ("-O2",)) -> list[str]:
    """The command that runs a program of these files."""
    need(machine)
    made = bind.compile_c(
        files,
        compiler=machine.compiler,
        flags=(*machine.flags, *flags, "-static"),
        suffix=".bin",
    )
    return [*machine.emulator, str(made)]


LAYOUT = """\
#include "header.h"
#include <stdio.h>
int main(void)
{{
    printf("%d\\n", (int)sizeof({struct}));
{lines}
    return 0;
}}
"""
LINE = (
    '    printf("{name} %d %d\\n", (int)offsetof({struct}, {name}),\n'
    "           (int)sizeof((({struct} *)0)->{name}));"
)


@functools.cache
def layout(
    machine: Machine, name: str, made: type[ctypes.Structure] | None = None
) -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of a header's args struct there (or of another of its structs), and the offset and
    bytes of each of its fields."""
    made = made or kernel(name).Args
    struct_name = made.__name__
    lines = [LINE.format(struct=struct_name, name=field) for field, *_ in made._fields_]
    source = LAYOUT.format(struct=struct_name, lines="\n".join(lines))
    command = compiled(machine, {"header.h": text(name), "layout.c": source}, ("-O0",))
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    rows = (line.split() for line in said[1:] if line)
    return int(said[0]), {field: (int(at), int(size)) for field, at, size in rows}


def number_bytes(machine: Machine, value: Any, size: int) -> bytes:
    """A number, or a struct of them that are as large as an address, there."""
    if isinstance(value, ctypes.Structure):
        parts = [getattr(value, name) for name, *_ in value._fields_]
        return b"".join(number_bytes(machine, part, size // len(parts)) for part in parts)
    if isinstance(value, tuple):
        return b"".join(number_bytes(machine, part, size // len(value)) for part in value)
    if isinstance(value, float):
        return struct.pack(f"{machine.order}f", value)
    order = "big" if machine.order == ">" else "little"
    return (int(value) % (1 << 8 * size)).to_bytes(size, order)  # two's complement


def args_bytes(machine: Machine, name: str, args: ctypes.Structure) -> bytes:
    """An args struct as the other machine's compiler lays it out; pointers are 0."""
    total, fields = layout(machine, name)
    made = bytearray(total)
    for field, kind, *_ in args._fields_:
        at, size = fields[field]
        if kind is not ctypes.c_void_p:
            made[at : at + size] = number_bytes(machine, getattr(args, field), size)
    return bytes(made)


def swapped(array: np.ndarray) -> np.ndarray:
    """The same numbers with their bytes turned round."""
    size = array.dtype.itemsize
    if size == 1:
        return array.copy()
    whole = np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape, size)
    return np.ascontiguousarray(whole[..., ::-1])


def there(machine: Machine, call: Call, field: str, array: np.ndarray) -> bytes:
    """An input's bytes on the other machine."""
    if machine.order == "<":
        return array.tobytes()
    record = record_of(description(call.name).kv)
    if record is None or field != "key":
        return swapped(array).tobytes()
    a = call.case.args
    made = a.key.copy()
    at = 0
    for _, kind, count in (*record.fields, *record.behind):
        width = record.width(kind, a.query.dtype)
        field = made.view(np.uint8)[..., at : at + count * width]
        each = field.reshape(*field.shape[:-1], count, width)
        field[...] = each[..., ::-1].reshape(field.shape)
        at += count * width
    assert at == made.shape[-1]
    return helpers_cases.packed(dataclasses.replace(a, key=made))[0].tobytes()


def recorded(
    machine: Machine, call: Call, mode: int = 0, **more: Any
) -> tuple[bytes, dict[str, np.ndarray]]:
    """A call for runner.c on that machine, and the empty outputs that it will fill."""
    outputs = call.outputs()
    scalar = call.kernel.constants["HL_ISA_SCALAR"]
    args = call.kernel.args(**{**call.sizes(), "isa": scalar, **more})
    body = args_bytes(machine, call.name, args)
    pieces = [(n, a, 0) for n, a in call.inputs().items()] + [(n, a, 1) for n, a in outputs.items()]
    order = machine.order
    parts = [struct.pack(f"{order}3q", len(body), mode, len(pieces)), body]
    _, fields = layout(machine, call.name)
    for field, array, written in pieces:
        parts.append(struct.pack(f"{order}3q", fields[field][0], array.nbytes, written))
        if not written:
            parts.append(there(machine, call, field, array))
    return b"".join(parts), outputs


def program(machine: Machine, name: str) -> list[str]:
    """runner.c around a shipped header, and how to run it."""
    flags = helpers_runner.named_flags(text(name), kernel(name).name)
    source = (helpers_runner.HERE / "runner.c").read_text()
    return compiled(machine, {"header.h": text(name), "runner.c": source}, ("-O2", *flags))


def play(machine: Machine, name: str, calls: list[tuple[Call, int]]) -> list[dict[str, np.ndarray]]:
    """Runs calls there with their modes; their outputs in this machine's byte order."""
    made = [recorded(machine, call, mode) for call, mode in calls]
    isas, results = helpers_runner.play(program(machine, name), made, order=machine.order)
    assert isas == 1 << kernel(name).constants["HL_ISA_SCALAR"]
    if machine.order == ">":
        for outputs in results:
            for array in outputs.values():
                array.reshape(-1).view(np.uint8)[...] = swapped(array).reshape(-1).view(np.uint8)
    return results
