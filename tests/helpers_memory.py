"""Memory that notices: buffers between pages that may not be touched, and calls in a child process
that may die of them.

The buffers are shared with the child, so the parent reads the results there; the oracle never runs
in the process that ran the kernel under test.
"""

import ctypes
import faulthandler
import mmap
import os
import pickle
import select
import signal
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from gen import bind

PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_ssize_t,
)
LIBC.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
LIBC.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
PROT_NONE = 0
MAP_NORESERVE = 0x4000
CANARY = 0xC3
LONGEST = 120.0  # seconds that a call may take: it takes milliseconds


def map_pages(size: int, protection: int, flags: int = 0) -> int:
    """Fresh shared pages; their address."""
    address = LIBC.mmap(None, size, protection, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def view(address: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory at an address as an array."""
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:  # its address is that of a page nobody may touch
        return np.lib.stride_tricks.as_strided(
            np.frombuffer((ctypes.c_byte * 0).from_address(address), np.uint8).view(dtype), shape
        )
    raw = (ctypes.c_byte * (count * np.dtype(dtype).itemsize)).from_address(address)
    return np.frombuffer(raw, np.uint8).view(dtype).reshape(shape)


class Arena:
    """Buffers, each flush with a forbidden page on one side and with canary bytes on the other.

    with Arena(flush="right") as arena:
        k = arena.place(array)              # a copy; read-only after arena.protect()
        out = arena.room(shape, dtype)      # every byte 0xff: NaN in each float type
    """

    def __init__(self, flush: str = "right") -> None:
        assert flush in ("left", "right")
        self.flush = flush
        self.maps: list[tuple[int, int]] = []
        self.inputs: list[tuple[int, int]] = []
        self.canaries: list[np.ndarray] = []

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *exc: object) -> None:
        self.canaries.clear()
        for address, size in self.maps:
            if exc[0] is None:
                LIBC.munmap(address, size)
            else:  # whoever reports it will look at arrays
                LIBC.mprotect(address, size, mmap.PROT_READ)
        self.maps.clear()

    def room(
        self, shape: tuple[int, ...], dtype: np.dtype, *, read_only: bool = False
    ) -> np.ndarray:
        """An array between forbidden pages, filled with 0xff bytes."""
        dtype = np.dtype(dtype)
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        inner = -(-size // PAGE) * PAGE
        base = map_pages(inner + 2 * PAGE, PROT_NONE)
        self.maps.append((base, inner + 2 * PAGE))
        first = base + PAGE
        if size == 0:
            return view(first, shape, dtype)
        LIBC.mprotect(first, inner, mmap.PROT_READ | mmap.PROT_WRITE)
        start = first + inner - size if self.flush == "right" else first
        slack = first if self.flush == "right" else first + size
        margin = view(slack, (inner - size,), np.dtype(np.uint8))
        margin[...] = CANARY
        self.canaries.append(margin)
        if read_only:
            self.inputs.append((first, inner))
        array = view(start, shape, dtype)
        array.view(np.uint8)[...] = 0xFF
        return array

    def place(self, array: np.ndarray) -> np.ndarray:
        """A copy of an input between forbidden pages."""
        copy = self.room(array.shape, array.dtype, read_only=True)
        copy[...] = array
        return copy

    def protect(self) -> None:
        """From now on nobody writes to inputs."""
        for address, size in self.inputs:
            LIBC.mprotect(address, size, mmap.PROT_READ)

    def check(self) -> None:
        """Bytes beside the buffers are as they were."""
        for margin in self.canaries:
            assert (margin == CANARY).all(), "a byte beside a buffer was written"


class Died(AssertionError):
    """The child was killed by a signal."""


def covered(what: str) -> None:
    """Tells libraries that were compiled for coverage (tests/cover.py) that a child begins or ends;
    others have no ear for it."""
    if "LLVM_PROFILE_FILE" in os.environ:
        for library in bind.loaded:
            getattr(library, f"hl_cover_{what}", lambda: None)()


_inside = False  # this process is a child that may die: what it calls needs no child of its own


def in_child(call: Callable[[], Any], what: str = "", longest: float = LONGEST) -> Any:
    """Runs call() in a forked child and returns its result; Died if a signal ended it, or if it
    had to be ended after so many seconds. In such a child it is simply called: many calls share
    one, which costs less than a child each."""
    global _inside
    if _inside:
        return call()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        _inside = True
        covered("begin")
        try:
            message = pickle.dumps((True, call()))
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        covered("end")
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(message)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        late = not select.select([pipe], [], [], longest)[0]
        if late:
            os.kill(child, signal.SIGKILL)
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    if late:
        raise Died(f"not done after {longest:.0f} s {what}".strip())
    if os.WIFSIGNALED(status):
        raise Died(f"killed by {signal.Signals(os.WTERMSIG(status)).name} {what}".strip())
    well, value = pickle.loads(message)
    if not well:
        raise AssertionError(f"in the child {what}:\n{value}")
    return value


CHUNK = 100  # jobs of a child: enough for the fork not to count, too few for it to grow large
LONGEST_CHUNK = 3000.0  # seconds: of a moment's work, on a machine that others use
ENOUGH = 20  # faults that are reported


@dataclass
class Survey:
    """What came of many jobs: calls made, and what is wrong with which job."""

    calls: int = 0
    wrong: list[str] = field(default_factory=list)

    def __add__(self, other: "Survey") -> "Survey":
        return Survey(self.calls + other.calls, self.wrong + other.wrong)


def survey(jobs: Sequence[Callable[[], int]]) -> Survey:
    """Runs jobs, each of which returns how many calls it made, many to a child. A child that dies
    is the fault of the job it was at, whose number is in memory that both see; those behind it get
    another."""
    made, at = Survey(), 0
    state = view(map_pages(PAGE, mmap.PROT_READ | mmap.PROT_WRITE), (2,), np.dtype(np.int64))
    while at < len(jobs) and len(made.wrong) < ENOUGH:
        state[0] = at
        try:
            at, wrong = in_child(partial(some_of, jobs, state), longest=LONGEST_CHUNK)
            made.wrong += [f"{jobs[at - 1]}: {wrong}"] if wrong else []
        except Died as death:
            at = int(state[0]) + 1
            made.wrong.append(f"{jobs[at - 1]}: {death}")
    made.calls = int(state[1])
    LIBC.munmap(state.ctypes.data, PAGE)
    return made


def some_of(jobs: Sequence[Callable[[], int]], state: np.ndarray) -> tuple[int, str]:
    """In the child: a chunk of jobs; the number of the next one, and what was wrong with the last.
    state: the job that is under way, calls made."""
    end = min(int(state[0]) + CHUNK, len(jobs))
    for i in range(int(state[0]), end):
        state[0] = i
        try:
            state[1] += jobs[i]()
        except Exception:
            return i + 1, traceback.format_exc()
    return end, ""
