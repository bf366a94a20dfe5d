"""What the operators compute: slow, in float64, and meant to be read.

`sparse_flash_attention` follows the documents of the operator and nothing of the generated code.
Arguments have the names and shapes of the fields of the C struct; pointers are NumPy arrays.
Its sister whose cache holds records, `sparse_flash_attention_antiquant`, is the same on the numbers
that the records stand for: `decoded`.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

BSND, TND, PA_BSND = 0, 1, 2
BLOCKS, SLOTS = 0, 1


# ---- rows of a quantised cache ------------------------------------------------------------------

STORED = {
    "i8": np.dtype(np.int8),
    "e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "e8m0": np.dtype(np.uint8),  # 2^(code - 127)
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class Record:
    """A row of a cache: (what, type, count) in the order of its bytes; what is nope, rope, scale or
    pad. `behind` is of the same kind and lies behind all rows of a page."""

    fields: tuple[tuple[str, str, int], ...]
    tile: int  # nope channels that share a scale
    behind: tuple[tuple[str, str, int], ...] = ()
    page_multiple: int = 1  # what a page's bytes are filled up to

    def width(self, kind: str, query: np.dtype) -> int:
        """Bytes of one number of a type."""
        return 1 if kind == "bytes" else (query if kind == "query" else STORED[kind]).itemsize

    def bytes_of(self, fields: tuple[tuple[str, str, int], ...], query: np.dtype) -> int:
        return sum(count * self.width(kind, query) for _, kind, count in fields)

    def align(self, query: np.dtype) -> int:
        """A record starts at any multiple of its widest number."""
        return max(self.width(kind, query) for _, kind, _ in (*self.fields, *self.behind))


# The shipped ones, from the documents of those who made them.
RECORDS = {
    "i8_656": Record((("nope", "i8", 512), ("rope", "query", 64), ("scale", "f32", 4)), tile=128),
    "fp8_656": Record((("nope", "e4m3", 512), ("scale", "f32", 4), ("rope", "bf16", 64)), tile=128),
    "fp8_v4": Record(
        (("nope", "e4m3", 448), ("rope", "bf16", 64)),
        tile=64,
        behind=(("scale", "e8m0", 7), ("pad", "bytes", 1)),
        page_multiple=576,
    ),
}


def field_bytes(rows: np.ndarray, record: Record, query: np.dtype) -> dict[str, np.ndarray]:
    """Each field but pad of records [..][bytes, those behind the page's rows last], as numbers:
    views, so that writing to them writes to the records."""
    found, at = {}, 0
    for what, kind, count in (*record.fields, *record.behind):
        size = count * record.width(kind, query)
        if what != "pad":
            piece = rows[..., at : at + size]
            found[what] = piece.view(query if kind == "query" else STORED[kind])
        at += size
    assert at == rows.shape[-1]
    return found


def scales_of(stored: np.ndarray, kind: str) -> np.ndarray:
    """Scales as float32. E8M0 is an exponent; its code 255 is the NaN."""
    if kind != "e8m0":
        return stored.astype(np.float32)
    powers = np.ldexp(1.0, stored.astype(np.int32) - 127)
    return np.where(stored == 255, np.nan, powers).astype(np.float32)


def decode(rows: np.ndarray, record: Record, query: np.dtype) -> np.ndarray:
    """Records as rows of float32: codes times the scale of their tile, rounded once, then the
    rotary channels as they are."""
    found = field_bytes(rows, record, query)
    kind = next(kind for what, kind, _ in (*record.fields, *record.behind) if what == "scale")
    code = found["nope"].astype(np.float32)
    scale = np.repeat(scales_of(found["scale"], kind), record.tile, axis=-1)
    with np.errstate(all="ignore"):
        nope = code * scale[..., : code.shape[-1]]
    if "rope" not in found:
        return nope
    return np.concatenate([nope, found["rope"].astype(np.float32)], axis=-1)


def decoded(a: "Args") -> "Args":
    """The same call on the numbers of its records: value is the first dv channels of the key."""
    if a.record is None:
        return a
    key = decode(a.key, a.record, a.query.dtype)
    return dataclasses.replace(a, key=key, record=None)


# ---- the operators ------------------------------------------------------------------------------


@dataclass
class Args:
    """Arguments of sparse_flash_attention; `dv` is the value's width when key holds the values.

    With a record key is bytes, [..][heads][those of a record and of its piece behind the page]."""

    query: np.ndarray
    key: np.ndarray
    scale_value: float
    dv: int
    query_rope: np.ndarray | None = None
    key_rope: np.ndarray | None = None
    value: np.ndarray | None = None
    sparse_indices: np.ndarray | None = None
    sparse_lengths: np.ndarray | None = None
    block_table: np.ndarray | None = None
    actual_seq_lengths_query: np.ndarray | None = None
    actual_seq_lengths_kv: np.ndarray | None = None
    sinks: np.ndarray | None = None
    sparse_block_size: int = 1
    layout_query: int = BSND
    layout_kv: int = BSND
    sparse_mode: int = 0
    index_kind: int = BLOCKS
    record: Record | None = None

    @property
    def heads_q(self) -> int:
        return self.query.shape[-2]

    @property
    def heads_kv(self) -> int:
        return self.key.shape[-2]


@dataclass
class Output:
    """Shapes as the operator returns them: max, sum and lse are [B][N2][S1][G] or [N2][T1][G]."""

    out: np.ndarray
    max: np.ndarray
    sum: np.ndarray
    lse: np.ndarray


@dataclass
class Row:
    """One query row of one kv head: its G queries against the keys that it sees, in list order."""

    row: int  # among all rows of the query tensor
    n2: int
    q: np.ndarray  # [G][DK + ROPE]
    k: np.ndarray  # [n][DK + ROPE]
    v: np.ndarray  # [n][DV]
    kv_rows: np.ndarray  # [n] where in the kv tensor
    sinks: np.ndarray | None  # [G]


def flat(tensor: np.ndarray) -> np.ndarray:
    """[.., heads, channels] -> [rows, heads, channels]."""
    return tensor.reshape(math.prod(tensor.shape[:-2]), *tensor.shape[-2:])


def joined(nope: np.ndarray, rope: np.ndarray | None) -> np.ndarray:
    """Rows of nope and rope channels side by side, however they were passed."""
    return flat(nope) if rope is None else np.concatenate([flat(nope), flat(rope)], axis=-1)


def spans(layout: int, lengths: np.ndarray | None, batch: int, seq: int) -> list[tuple[int, int]]:
    """(first row, rows in use) of each batch, for BSND lengths and for TND ends."""
    if layout == TND:
        ends = [0, *map(int, lengths)]
        return [(ends[b], ends[b + 1] - ends[b]) for b in range(batch)]
    return [(b * seq, seq if lengths is None else int(lengths[b])) for b in range(batch)]


def kv_rows_of_batch(a: Args, b: int) -> np.ndarray:
    """Where in the kv tensor the tokens 0, 1, .. of batch b lie."""
    if a.layout_kv == PA_BSND:
        size = a.key.shape[1]
        length = a.block_table.shape[1] * size
        if a.actual_seq_lengths_kv is not None:
            length = int(a.actual_seq_lengths_kv[b])
        j = np.arange(length)
        return a.block_table[b].astype(np.int64)[j // size] * size + j % size
    batch = len(a.actual_seq_lengths_kv) if a.layout_kv == TND else a.key.shape[0]
    seq = 0 if a.layout_kv == TND else a.key.shape[1]
    first, length = spans(a.layout_kv, a.actual_seq_lengths_kv, batch, seq)[b]
    return first + np.arange(length)


def listed(ids: np.ndarray, size: int, threshold: int) -> np.ndarray:
    """Tokens that a list of blocks of `size` tokens selects below the threshold."""
    tokens = [np.zeros(0, np.int64)]
    for block in map(int, ids):
        if block < 0:
            break
        if block * size < threshold:
            tokens.append(np.arange(block * size, min(block * size + size, threshold)))
    return np.concatenate(tokens)


def slots(ids: np.ndarray, length: int, n_slots: int) -> np.ndarray:
    """Rows of the kv tensor that a list of physical slots selects; the others are holes."""
    ids = ids[:length].astype(np.int64)
    return ids[(ids >= 0) & (ids < n_slots)]


def rows(a: Args) -> Iterator[Row]:
    """Every query row that is not padding, once for each kv head."""
    a = decoded(a)
    q, k = joined(a.query, a.query_rope), joined(a.key, a.key_rope)
    v = k[..., : a.dv] if a.value is None else flat(a.value)
    group = a.heads_q // a.heads_kv
    tnd = a.layout_query == TND
    batch = len(a.actual_seq_lengths_query) if tnd else a.query.shape[0]
    seq = 0 if tnd else a.query.shape[1]
    lists = a.sparse_indices
    if lists is not None:
        lists = lists.reshape(len(q), a.heads_kv, lists.shape[-1])
    for b, (first, s1) in enumerate(spans(a.layout_query, a.actual_seq_lengths_query, batch, seq)):
        kv = None if a.index_kind == SLOTS and lists is not None else kv_rows_of_batch(a, b)
        for i in range(s1):
            for n2 in range(a.heads_kv):
                row = first + i
                if kv is None:
                    length = lists.shape[-1]
                    if a.sparse_lengths is not None:
                        length = a.sparse_lengths.reshape(len(q), a.heads_kv)[row, n2]
                    at = slots(lists[row, n2], length, len(k))
                else:
                    threshold = len(kv) - (s1 - i - 1 if a.sparse_mode == 3 else 0)
                    tokens = np.arange(max(threshold, 0))
                    if lists is not None:
                        tokens = listed(lists[row, n2], a.sparse_block_size, threshold)
                    at = kv[tokens]
                heads = slice(n2 * group, n2 * group + group)
                sinks = None if a.sinks is None else a.sinks[heads]
                yield Row(row, n2, q[row, heads], k[at, n2], v[at, n2], at, sinks)


def attend(r: Row, a: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out, max, sum and lse of one row, in float64."""
    q, k, v = (x.astype(np.float64) for x in (r.q, r.k, r.v))
    s = np.float64(np.float32(a.scale_value)) * (q @ k.T)
    out, m, total, lse = weigh(s, v, r.sinks)
    if a.index_kind == SLOTS:  # a slot list's lse leaves the sink out
        top = s.max(axis=1, initial=-np.inf)
        lse = top + np.log(np.exp(s - top[:, None]).sum(axis=1))
    return out, m, total, lse


def weigh(
    s: np.ndarray, v: np.ndarray, sinks: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out, max, sum and lse of heads with scores s [G][n] over the values v [n][DV]."""
    sink = np.full(len(s), -np.inf) if sinks is None else sinks.astype(np.float64)
    m = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    empty = m == -np.inf if s.shape[1] == 0 else np.zeros(len(s), bool)
    m = np.where(empty, 0.0, m)
    p = np.exp(s - m[:, None])
    total = p.sum(axis=1) + np.where(sink == m, 1.0, np.exp(sink - m))
    out = p @ v / np.where(empty, 1.0, total)[:, None]
    return out, m, total, m + np.log(total)


def matmul_in_order(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x @ y as three loops do it: every product and every sum rounded to the type, in order."""
    return np.stack([(row[:, None] * y).cumsum(axis=0, dtype=x.dtype)[-1] for row in x])


def attend_plain(r: Row, a: Args) -> np.ndarray:
    """The same out as anyone would first write it in the query's type: float32 scores and sums,
    P rounded to the type before it meets V, the result rounded to the type."""
    dtype = r.q.dtype
    q, k, v = (x.astype(np.float32) for x in (r.q, r.k, r.v))
    if len(k) == 0:
        return attend(r, a)[0].astype(dtype)
    matmul = matmul_in_order if dtype == np.float32 else np.matmul
    return weigh_plain(np.float32(a.scale_value) * matmul(q, k.T), v, r.sinks, dtype)


def weigh_plain(
    s: np.ndarray, v: np.ndarray, sinks: np.ndarray | None, dtype: np.dtype
) -> np.ndarray:
    """out from float32 scores and values, with P and the result rounded to the type."""
    sink = np.full(len(s), -np.inf, np.float32) if sinks is None else sinks
    if np.isposinf(sink).any():
        return weigh(s.astype(np.float64), v.astype(np.float64), sinks)[0].astype(dtype)
    matmul = matmul_in_order if dtype == np.float32 else np.matmul
    m = np.maximum(s.max(axis=1), sink)
    p = np.exp(s - m[:, None])
    p = (p / (p.sum(axis=1) + np.exp(sink - m))[:, None]).astype(dtype)
    return matmul(p.astype(np.float32), v).astype(dtype)


def sparse_flash_attention(a: Args) -> Output:
    """Both operators. Rows that are padding, or that see no key and no sink: 0, 0, 0 and -inf."""
    n_rows = math.prod(a.query.shape[:-2])
    group = a.heads_q // a.heads_kv
    out = np.zeros((n_rows, a.heads_q, a.dv))
    stats = np.zeros((3, n_rows, a.heads_kv, group))
    stats[2] = -np.inf
    with np.errstate(all="ignore"):
        for r in rows(a):
            result, *row_stats = attend(r, a)
            out[r.row, r.n2 * group : (r.n2 + 1) * group] = result
            stats[:, r.row, r.n2] = row_stats
    return Output(out.reshape(*a.query.shape[:-1], a.dv), *(by_kv_head(x, a) for x in stats))


def plain(a: Args) -> np.ndarray:
    """attention_out of the plain implementation in the query's own type."""
    group = a.heads_q // a.heads_kv
    out = np.zeros((math.prod(a.query.shape[:-2]), a.heads_q, a.dv), a.query.dtype)
    with np.errstate(all="ignore"):
        for r in rows(a):
            out[r.row, r.n2 * group : (r.n2 + 1) * group] = attend_plain(r, a)
    return out.reshape(*a.query.shape[:-1], a.dv)


def by_kv_head(stat: np.ndarray, a: Args) -> np.ndarray:
    """[rows][N2][G] -> [B][N2][S1][G], or [N2][T1][G] for TND."""
    shape = a.query.shape[:-2]
    return np.moveaxis(stat.reshape(*shape, *stat.shape[1:]), len(shape), len(shape) - 1).copy()
