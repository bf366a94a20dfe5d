"""Shapes, and what lies in memory for them: tensors of random numbers, lists, tables of pages."""

import contextlib
import functools
import mmap
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

HUGE_PAGE = 2 << 20
MOST_HEADS = 128
LARGEST = 131072  # keys of the largest cache
SCORE_DEVIATION = 1.7  # of the scores of standard normal tensors, as in trained models


# ---- shapes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """`rows` query rows of each of `batch` sequences over `keys` of `cache_keys` keys. selection:
    dense, causal, list (logical ids), slots (physical rows). value: a tensor of its own, not part
    of the key. layout: of the cache; block: tokens of a page, where it is a paged one."""

    heads: int
    kv_heads: int
    keys: int
    cache_keys: int
    selection: str = "dense"
    rows: int = 1
    value: bool = False
    batch: int = 1
    layout: str = "BSND"
    block: int = 0

    @property
    def listed(self) -> bool:
        return self.selection in ("list", "slots")

    @property
    def title(self) -> str:
        heads = f"{self.heads} head{'s' if self.heads > 1 else ''}"
        if self.kv_heads > 1:
            heads = f"{self.heads}/{self.kv_heads} heads"
        rows = f"{self.rows} rows, " if self.rows > 1 else ""
        of = f" of {self.cache_keys}" if self.listed else ""
        batch = f"batch {self.batch}, " if self.batch > 1 else ""
        place = f", {self.place}" if self.place != "BSND" else ""
        seen = f"{self.selection}{',' if ' of ' in self.selection else ''}"  # band of 256, 4096
        return f"{batch}{heads}, {rows}{seen} {self.keys}{of}{place}"

    @property
    def place(self) -> str:
        """The layout, and the tokens of a page."""
        return f"{self.layout} {self.block}" if self.block else self.layout

    @property
    def calls(self) -> int:
        """Rows of the output."""
        return self.batch * self.rows

    def seen(self) -> int:
        """Pairs of query row and key that are computed, for one head."""
        if self.selection == "causal":
            return sum(self.keys - self.rows + i + 1 for i in range(self.rows))
        return self.rows * self.keys

    def flops(self, dk: int, dv: int) -> int:
        return 2 * self.batch * self.heads * (dk + dv) * self.seen()

    def bytes(self, dk: int, dv: int, itemsize: int) -> int:
        """Of the cache, each row read once."""
        return self.kv_heads * self.keys * (dk + (dv if self.value else 0)) * itemsize


# ---- memory -------------------------------------------------------------------------------------


@functools.cache
def rng() -> np.random.Generator:
    """One source, so that every run sees the same tensors."""
    return np.random.default_rng(20261121)


MAPPED: set[int] = set()  # addresses of the memory that `allocate` made and that is still there


def allocate(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Memory as an engine takes it for its caches: pages of 2 MiB asked for by madvise, aligned to
    them. What is smaller than such a page starts a page of the usual size."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    room = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a system without them
            room.madvise(mmap.MADV_HUGEPAGE)
    raw = np.frombuffer(room, np.uint8)
    start = -raw.ctypes.data % HUGE_PAGE
    MAPPED.add(raw.ctypes.data + start)
    weakref.finalize(room, MAPPED.discard, raw.ctypes.data + start)
    return raw[start : start + size].view(dtype).reshape(shape)


def in_huge_pages() -> float | None:
    """The share of the memory that `allocate` made, and that was touched, in huge pages; None if
    the system does not say."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    sums = {"Rss:": 0, "AnonHugePages:": 0}
    ours = False
    for line in lines:
        first, second = line.split()[:2]
        if not first.endswith(":"):  # a mapping: 7f0000000000-7f0000200000 rw-p ..
            begin, end = (int(part, 16) for part in first.split("-"))
            ours = any(begin <= address < end for address in MAPPED)
        elif ours and first in sums:
            sums[first] += int(second)
    return sums["AnonHugePages:"] / sums["Rss:"] if sums["Rss:"] else None


def normal(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Standard normal numbers, rounded to a type."""
    made = allocate(shape, dtype)
    flat = made.reshape(shape[0], -1)
    for row in range(0, shape[0], 8192):
        part = flat[row : row + 8192]
        part[:] = rng().standard_normal(part.shape, np.float32).astype(dtype)
    return made


@functools.cache
def normal_once(kind: str, rows: int, heads: int, width: int, dtype: Any) -> np.ndarray:
    """One tensor of each kind, width and type, so that shapes share their memory."""
    return normal((rows, heads, width), dtype)


@functools.cache
def lists(cache_keys: int, keys: int) -> np.ndarray:
    """Disjoint lists over all keys, in no order: an indexer's come by score, not by place."""
    ids = rng().permutation(cache_keys).astype(np.int32)
    return ids[: cache_keys // keys * keys].reshape(-1, keys)


@functools.cache
def pages(keys: int, block_size: int) -> np.ndarray:
    """A block table whose blocks lie anywhere."""
    return rng().permutation(keys // block_size).astype(np.int32).reshape(1, -1)


@dataclass(frozen=True)
class Tensors:
    """What calls of one shape read. lists: one a call, in turn; together they touch the whole
    cache, so that a call finds its rows where they lie when other layers ran in between."""

    query: np.ndarray  # [rows][heads][dk]
    key: np.ndarray  # [cache_keys][kv_heads][dk]; records: [cache_keys][1][bytes], or pages
    value: np.ndarray | None  # [cache_keys][kv_heads][dv]
    lists: np.ndarray | None
    dv: int
    scale: float
    numbers: np.ndarray | None = None  # what records stand for: [cache_keys][1][dk]
    page: int = 1  # keys of one row of `key`
    seen: np.ndarray | None = None  # how many of the keys each head of a group sees; None: all

    def ids(self, turn: int) -> np.ndarray | slice:
        """The rows of the cache that call number `turn` reads."""
        return slice(None) if self.lists is None else self.lists[turn]


def held_keys(shape: Shape) -> int:
    """Keys of the tensor that holds a shape's cache: caches of one kv head share theirs."""
    if shape.kv_heads > 1:
        return shape.cache_keys
    return next(keys for keys in (4096, 32768, LARGEST, shape.cache_keys)
                if keys >= shape.cache_keys)


def tensors(shape: Shape, dk: int, dv: int, dtype: Any) -> Tensors:
    """The tensors of a shape: dk channels with those of the position."""
    most = max(MOST_HEADS, shape.heads) if shape.kv_heads == 1 else shape.heads
    held = held_keys(shape)
    query = normal_once("query", shape.rows, most, dk, dtype)[:, : shape.heads]
    key = normal_once("key", held, shape.kv_heads, dk, dtype)[: shape.cache_keys]
    value = None
    if shape.value:
        value = normal_once("value", held, shape.kv_heads, dv, dtype)[: shape.cache_keys]
    entries = lists(shape.cache_keys, shape.keys) if shape.listed else None
    return Tensors(np.ascontiguousarray(query), key, value, entries, dv,
                   SCORE_DEVIATION / dk**0.5)


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float,
          causal: bool) -> np.ndarray:
    """Attention in float64: q [rows][heads][dk] over one kv head's k [keys][dk], v [keys][dv]."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    s = np.einsum("rhd,kd->rhk", q, k, optimize=True) * scale
    if causal:
        last = len(k) - len(q) + np.arange(len(q))
        s[np.broadcast_to(np.arange(len(k)) > last[:, None, None], s.shape)] = -np.inf
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    return np.einsum("rhk,kd->rhd", p, v, optimize=True) / p.sum(axis=-1, keepdims=True)
