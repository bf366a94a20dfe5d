"""What every peer has: a name, what it does less, which shapes it can do, and how to run one."""

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measure import declare
from tensors import Shape, Tensors

from gen import bind

FOLDER = Path(__file__).resolve().parent
Run = Callable[[int, int], None]  # `count` calls, with the lists first, first + 1, .. modulo n


class MissingError(Exception):
    """A library that this machine does not have, and why."""


@dataclass
class Prepared:
    """One peer on one shape. `run(first, count)` calls it; `out()` is what the last call wrote,
    [rows][heads][dv]; `kept` lives as long; `free` gives back what is not Python's."""

    run: Run
    out: Callable[[], np.ndarray]
    kept: tuple[Any, ...] = ()
    free: Callable[[], None] = lambda: None


class Peer:
    """A library that one could take instead. The constructor raises MissingError."""

    name = ""
    lacks = ""  # what it does less than the kernels here

    def refuses(self, shape: Shape, kv_format: str) -> str:
        """Why it cannot do a shape; "" if it can."""
        if shape.rows != 1 or shape.selection not in ("dense", "list"):
            return f"no {shape.selection} selection here"
        if kv_format not in bind.DTYPES:
            return f"no {kv_format} cache"
        return ""

    def prepare(self, shape: Shape, t: Tensors, kv_format: str) -> Prepared:
        raise NotImplementedError


def repeated(calls: Sequence[Callable[[], Any]]) -> Run:
    """A run over Python calls, one for each list."""

    def run(first: int, count: int) -> None:
        for i in range(first, first + count):
            calls[i % len(calls)]()

    return run


def mask(t: Tensors, dtype: Any) -> np.ndarray | None:
    """What a library adds to the scores of a group, [heads of the group][keys]: -infinity for keys
    that a head does not see; None where all see all."""
    if t.seen is None:
        return None
    hidden = np.arange(len(t.key)) >= t.seen[:, None]
    return np.where(hidden, np.float32(-np.inf), np.float32(0)).astype(dtype)


def fastest(variants: dict[str, Prepared]) -> Prepared:
    """The way of calling a library that takes the least time on this shape: of five calls, fewer
    where they take long."""

    def seconds(prepared: Prepared) -> float:
        times: list[float] = []
        while len(times) < 5 and sum(times) < 0.5:
            begin = time.process_time()
            prepared.run(len(times), 1)
            times.append(time.process_time() - begin)
        return min(times)

    best = min(variants, key=lambda name: seconds(variants[name]))
    for name, prepared in variants.items():
        if name != best:
            prepared.free()
    return variants[best]


def compiled(source: str, libs: Sequence[str], functions: dict[str, tuple[str, str]],
             flags: Sequence[str] = ("-O2",)) -> ctypes.CDLL:
    """A C file of this folder as a library. functions: name -> letters of parameters, result."""
    try:
        path = bind.compile_c({source: (FOLDER / source).read_text()}, flags=flags, libs=libs)
        library = ctypes.CDLL(str(path))
    except (RuntimeError, OSError) as error:
        lines = [line for line in str(error).splitlines() if "rror" in line] or [str(error)]
        raise MissingError(lines[0].strip()[:160]) from error
    for name, (parameters, result) in functions.items():
        declare(getattr(library, name), parameters, result)
    return library


def addresses(arrays: Sequence[np.ndarray] | None) -> Any:
    """An array of pointers for C; None: NULL."""
    if arrays is None:
        return None
    return (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
