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
from collections.abc import Callable
from typing import Any

import numpy as np

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
inside = False  # whether this process is a child of in_child


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
            LIBC.munmap(address, size)
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


def in_child(call: Callable[[], Any], what: str = "") -> Any:
    """Runs call() in a forked child and returns its result; Died if a signal ended it, or if it
    had to be ended after LONGEST seconds. In such a child call() just runs: many calls can share
    one, which costs less than a child each."""
    global inside
    if inside:
        return call()
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        faulthandler.disable()
        inside = True
        try:
            message = pickle.dumps((True, call()))
        except BaseException:
            message = pickle.dumps((False, traceback.format_exc()))
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(message)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        if not select.select([pipe], [], [], LONGEST)[0]:
            os.kill(child, signal.SIGKILL)
        message = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        raise Died(f"killed by {signal.Signals(os.WTERMSIG(status)).name} {what}".strip())
    well, value = pickle.loads(message)
    if not well:
        raise AssertionError(f"in the child {what}:\n{value}")
    return value
