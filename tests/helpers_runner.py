"""Calls recorded to a file, for programs that this process cannot load: other processors under
qemu, and builds with sanitizers. The C side is runner.c."""

import ctypes
import dataclasses
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cases import BLOCKS_AND_DENSE, SPREADS, Case, Shape, Way
from oracle import BSND, PA_BSND, TND

from gen import bind

HERE = Path(__file__).resolve().parent
BY_TASK, PARTIALS, FLUSH_LEFT, FLUSH_TO_ZERO = 1, 2, 4, 8
AARCH64 = "aarch64-linux-gnu-gcc"
QEMU = ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"


def need_aarch64() -> None:
    """Fails when the cross compiler or qemu is missing; skips only where that was asked for."""
    missing = [tool for tool in (AARCH64, QEMU[0]) if shutil.which(tool) is None]
    if missing and os.environ.get("HEADLIGHT_ALLOW_MISSING") == "1":
        pytest.skip(f"{', '.join(missing)} missing, and HEADLIGHT_ALLOW_MISSING=1")
    assert not missing, f"{', '.join(missing)} missing; fix: apt-get install {PACKAGES}"


def program(
    text: str,
    name: str,
    *,
    compiler: str = AARCH64,
    flags: Sequence[str] = ("-O2",),
    libs: Sequence[str] = (),
    environment: str = "",
) -> Path:
    """runner.c around one kernel. environment: look at registers and control words after each call
    ("env_good"), or call a function of environment.c that spoils them too."""
    files = {"header.h": text, "runner.c": (HERE / "runner.c").read_text()}
    if environment:
        files["environment.c.txt"] = (HERE / "environment.c").read_text()
        files["runner.c"] = files["runner.c"].replace("environment.c", "environment.c.txt")
        flags = (*flags, "-DENVIRONMENT", f"-DSPOIL={environment}")
    named = named_flags(text, name)
    return bind.compile_c(
        files, compiler=compiler, flags=(*flags, *named), libs=libs, suffix=".bin"
    )


def named_flags(text: str, name: str) -> list[str]:
    """What runner.c has to be told of a kernel."""
    operator = re.search(rf"\b{name}_workspace_bytes\(\s*const (\w+)_args\b", text)[1]
    named = [f"-DKERNEL={name}", f"-DOPERATOR={operator}"]
    return named + ([] if f"{name}_merge(" in text else ["-DWITHOUT_MERGES"])


def record(kernel: bind.Kernel, case: Case, way: Way, isa: int) -> tuple[bytes, dict[str, Any]]:
    """A call as bytes, and the empty outputs that it will fill."""
    outputs = case.outputs(stats=way.stats)
    args = kernel.args(**case.sizes(), isa=isa, chunk_keys=way.chunk_keys)
    mode = BY_TASK * way.by_task | PARTIALS * way.partials | FLUSH_LEFT * (way.flush == "left")
    return packed(args, mode, case.inputs(), outputs), outputs


def packed(
    args: ctypes.Structure, mode: int, inputs: dict[str, Any], outputs: dict[str, Any]
) -> bytes:
    """A call as the runner reads it."""
    pieces = [(n, a, 0) for n, a in inputs.items()] + [(n, a, 1) for n, a in outputs.items()]
    parts = [struct.pack("<3q", ctypes.sizeof(args), mode, len(pieces)), bytes(args)]
    for name, array, written in pieces:
        offset = getattr(type(args), name).offset
        parts.append(struct.pack("<3q", offset, array.nbytes, written))
        if not written:
            parts.append(array.tobytes())
    return b"".join(parts)


def play(
    command: Sequence[str],
    calls: list[tuple[bytes, dict[str, Any]]],
    env: dict[str, str] | None = None,
    order: str = "<",
) -> tuple[int, list[dict[str, np.ndarray]]]:
    """Runs recorded calls, in this process's environment or another; what isas() said there, and
    the outputs. order: of bytes, on the machine that runs them."""
    with tempfile.TemporaryDirectory() as folder:
        to, back = Path(folder) / "calls", Path(folder) / "results"
        to.write_bytes(struct.pack(f"{order}q", len(calls)) + b"".join(data for data, _ in calls))
        run = subprocess.run(
            [*command, str(to), str(back)], capture_output=True, text=True, timeout=300, env=env
        )
        assert run.returncode == 0, f"exit {run.returncode}: {run.stderr[-4000:]}"
        data = back.read_bytes()
    (isas,), at = struct.unpack_from(f"{order}I", data), 4
    for _, outputs in calls:
        (status,), at = struct.unpack_from(f"{order}q", data, at), at + 8
        assert status == 0, f"a call was refused with status {status}"
        for array in outputs.values():
            array.reshape(-1).view(np.uint8)[...] = np.frombuffer(data, np.uint8, array.nbytes, at)
            at += array.nbytes
    assert at == len(data)
    return isas, [outputs for _, outputs in calls]


def various(
    seed: int, count: int, *, slots: bool, rope: bool, max_keys: int = 70, paged: bool = False
) -> list[tuple[Shape, Way]]:
    """Calls of all kinds, drawn once: for programs that run many calls in one go. paged: all of
    them, with one kv head."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        pick = rng.choice
        layout_kv = int(pick((BSND, TND, PA_BSND)))
        batch = int(rng.integers(1, 4))
        lists = str(pick(BLOCKS_AND_DENSE + ("slots",) * slots))
        by_slot = lists == "slots"
        shape = Shape(
            lens_q=tuple(rng.integers(0, 4, batch).tolist()),
            lens_kv=tuple(rng.integers(0, max_keys, batch).tolist()),
            heads_kv=int(pick((1, 1, 2))),
            group=int(rng.integers(1, 10)),
            layout_q=int(pick((BSND, TND))) if layout_kv == PA_BSND else layout_kv,
            layout_kv=layout_kv,
            pad_q=int(pick((0, 1, 3))),
            pad_kv=int(pick((0, 1, 9))),
            block_size=int(pick((1, 3, 16, 48))),
            lists=lists,
            list_length=int(pick((1, 2, 5, 8, 17, 40))),
            list_lengths=by_slot and bool(pick((False, True))),
            sparse_block_size=1 if by_slot else int(pick((1, 1, 2, 8, 64))),
            sparse_mode=0 if by_slot else int(pick((0, 3))),
            joined_q=rope and bool(pick((False, True))),
            joined_k=rope and bool(pick((False, True))),
            value=bool(pick((False, True))),
            sinks=str(pick(("none", "plain", "infinite"))),
            spread=str(pick(SPREADS)),
            seed=int(rng.integers(1 << 30)),
        )
        if paged:
            shape = dataclasses.replace(shape, layout_kv=PA_BSND, heads_kv=1)
        made.append(
            (
                shape,
                Way(
                    flush=str(pick(("left", "right"))),
                    chunk_keys=int(pick((0, 128))),
                    by_task=bool(pick((False, True))),
                    partials=bool(pick((False, True))),
                    stats=bool(rng.random() < 0.8),
                ),
            )
        )
    return made
