"""What incre_flash_attention computes: slow, in float64, and meant to be read.

As oracle.py: arguments have the names of the fields of the C struct, pointers are NumPy arrays. Of
key and value the last axis is a row as it is stored; BSH is written as BSND, whose memory it is.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from oracle import BLOCKS, BSND, PA_BSND, SLOTS, STORED, matmul_in_order, weigh, weigh_plain

BSH, BNSD, PA_BNSD = 3, 4, 5
PAGED = (PA_BSND, PA_BNSD)
BY_HEAD = (BNSD, PA_BNSD)  # heads come before rows
CHANNEL, TENSOR, TOKEN = 0, 1, 2  # how many numbers antiquant_scale has


@dataclass
class Args:
    """Arguments of incre_flash_attention. Sizes come from the arrays; formats say how rows of key
    and value are stored: "" in the query's type, "i8", "e4m3", "i4_32", "i4_64" or "i4_128"."""

    query: np.ndarray
    key: np.ndarray
    dk: int
    dv: int
    value: np.ndarray | None = None
    formats: tuple[str, str] = ("", "")
    pse_shift: np.ndarray | None = None  # [B|1][N1][S1][columns]
    atten_mask: np.ndarray | None = None  # [B|1][S1|1][columns]
    actual_seq_lengths: np.ndarray | None = None
    lengths: int = 0
    kv_padding_size: np.ndarray | None = None
    block_table: np.ndarray | None = None
    antiquant_scale: np.ndarray | None = None  # flat: K's numbers, then V's
    antiquant_offset: np.ndarray | None = None
    antiquant_mode: int = CHANNEL
    quant_scale2: np.ndarray | None = None  # [1] or [N1 * DV]
    quant_offset2: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None
    layout_query: int = BSND
    layout_kv: int = BSND
    index_kind: int = BLOCKS
    window: int = 0
    scale_value: float = 0.0
    softcap: float = 0.0

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def seq_q(self) -> int:
        return by_row(self.query, self.layout_query).shape[1]

    @property
    def heads_q(self) -> int:
        return by_row(self.query, self.layout_query).shape[2]

    @property
    def heads_kv(self) -> int:
        return by_row(self.key, self.layout_kv).shape[2]

    @property
    def seq_kv(self) -> int:
        """S2, or how many tokens a row of the block table can name."""
        if self.layout_kv not in PAGED:
            return by_row(self.key, self.layout_kv).shape[1]
        entries = self.block_table.shape[1]
        return entries if self.index_kind == SLOTS else entries * self.block_size

    @property
    def block_size(self) -> int:
        return by_row(self.key, self.layout_kv).shape[1]

    @property
    def scale(self) -> float:
        """scale_value as a float32, 1 in the place of 0."""
        return float(np.float32(self.scale_value)) or 1.0


@dataclass
class Output:
    """attention_out in the query's layout, as float64 or, quantised, int8; `exact` is what it was
    before that. max, sum and lse are [B][N1][S1]."""

    out: np.ndarray
    exact: np.ndarray
    max: np.ndarray
    sum: np.ndarray
    lse: np.ndarray


@dataclass
class Row:
    """One query row of one kv head: its G queries against the n keys that it sees."""

    b: int
    i: int
    n2: int
    heads: slice  # of all query heads
    columns: np.ndarray  # [n] of the cache's rows of the batch, as mask and pse count them
    at: np.ndarray  # [n] where in the cache, among all rows of all batches or blocks
    distance: np.ndarray  # [n] key's number less the query's, in tokens
    q: np.ndarray  # [G][DK]
    k: np.ndarray  # [n][DK] float32
    v: np.ndarray  # [n][DV] float32
    k_size: np.ndarray  # the same, as large as the parts that they are sums of
    v_size: np.ndarray
    pse: np.ndarray  # [G][n], 0 without pse_shift
    slopes: np.ndarray  # [G], 0 without alibi_slopes
    sinks: np.ndarray | None  # [G]


# ---- where keys lie -----------------------------------------------------------------------------


def by_row(tensor: np.ndarray, layout: int) -> np.ndarray:
    """[B][S][N][..] of a tensor in any layout; a view."""
    return tensor.swapaxes(1, 2) if layout in BY_HEAD else tensor


def span(a: Args, b: int) -> tuple[int, int]:
    """The cache rows of batch b that hold its keys: the first one, and how many."""
    if a.actual_seq_lengths is None:
        return 0, a.seq_kv
    length = int(a.actual_seq_lengths[0 if a.lengths == 1 else b])
    if a.layout_kv in PAGED or a.kv_padding_size is None:
        return 0, length
    end = a.seq_kv - max(int(a.kv_padding_size[0]), 0)
    begin = end - length
    return (0, 0) if begin < 0 or end < 0 else (begin, length)


def places(a: Args, b: int, columns: np.ndarray) -> np.ndarray:
    """Cache rows of a batch -> rows of the whole tensor."""
    if a.layout_kv not in PAGED:
        return b * a.seq_kv + columns
    table, size = a.block_table[b].astype(np.int64), a.block_size
    if a.index_kind == SLOTS:
        return table[columns]
    return table[columns // size] * size + columns % size


def seen(a: Args, b: int, i: int) -> np.ndarray:
    """The numbers of the keys of batch b that row i sees, 0 being the batch's first key."""
    begin, length = span(a, b)
    last = length - a.seq_q + i
    j = np.arange(max(min(length, last + 1), 0))
    if a.window > 0:
        j = j[j > last - a.window]
    if a.atten_mask is not None:
        mask = a.atten_mask[b % len(a.atten_mask)]
        j = j[mask[i % len(mask), begin + j] == 0]
    return j


# ---- numbers ------------------------------------------------------------------------------------


def group_of(kind: str) -> int:
    """Channels that share a scale in rows that carry their scales; else 0."""
    return int(kind[3:]) if kind.startswith("i4_") else 0


def is_codes(kind: str) -> bool:
    """Whether antiquant_scale has numbers for it."""
    return kind in ("i8", "e4m3")


def width(kind: str, channels: int) -> int:
    """Elements of a stored row: channels, or bytes of one that carries its scales."""
    if not group_of(kind):
        return channels
    return -(-channels // 4) * 2 + 2 * -(-channels // group_of(kind))


def stored_type(kind: str, query: np.dtype) -> np.dtype:
    """What an element of a stored row is."""
    if group_of(kind):
        return np.dtype(np.uint8)
    return STORED[kind] if kind else query


def decode_group(rows: np.ndarray, kind: str, channels: int) -> np.ndarray:
    """Rows of 4-bit codes, the low half of a byte first, and float16 scales behind them."""
    scales_at = -(-channels // 4) * 2
    codes = np.stack([rows & 15, rows >> 4], axis=-1)
    codes = codes.reshape(*rows.shape[:-1], 2 * rows.shape[-1])
    codes = codes[..., :channels].astype(np.int8)
    codes = np.where(codes > 7, codes - 16, codes).astype(np.float32)
    scales = np.ascontiguousarray(rows[..., scales_at:]).view(np.float16).astype(np.float32)
    return codes * np.repeat(scales, group_of(kind), axis=-1)[..., :channels]


def numbers_of(
    rows: np.ndarray, kind: str, channels: int, scale: np.ndarray, offset: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Stored rows as float32, every operation rounded, and the size of what was added up."""
    if group_of(kind):
        rows = decode_group(rows, kind, channels)
    rows = rows[..., :channels].astype(np.float32)
    if not is_codes(kind):
        return rows, abs(rows)
    return (rows + offset) * scale, (abs(rows) + abs(offset)) * abs(scale)


def per_tensor(a: Args, side: int) -> int:
    """How many antiquant numbers K (side 0) or V (side 1) has."""
    if not is_codes(a.formats[side]):
        return 0
    if a.antiquant_mode == TENSOR:
        return 1
    if a.antiquant_mode == TOKEN:
        return a.batch * a.seq_kv
    return a.heads_kv * (a.dk, a.dv)[side]


def antiquant(
    a: Args, numbers: np.ndarray | None, side: int, b: int, n2: int, columns: np.ndarray
) -> np.ndarray:
    """antiquant_scale or _offset of some cache rows, as float32 that fits to [n][channels]."""
    count = per_tensor(a, side)
    if count == 0 or numbers is None:
        return np.zeros(1, np.float32)
    first = per_tensor(a, 0) if side else 0
    mine = numbers[first : first + count].astype(np.float32)
    if a.antiquant_mode == TENSOR:
        return mine
    if a.antiquant_mode == TOKEN:
        return mine.reshape(a.batch, a.seq_kv)[b, columns][:, None]
    return mine.reshape(a.heads_kv, -1)[n2]


def numbers_seen(
    a: Args, side: int, b: int, n2: int, columns: np.ndarray, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Keys (side 0) or values (side 1) at some places of the cache, and their sizes."""
    tensor = a.key if side == 0 or a.value is None else a.value
    stored = by_row(tensor, a.layout_kv)
    rows = stored.reshape(-1, *stored.shape[2:])[at, n2]
    scale = antiquant(a, a.antiquant_scale, side, b, n2, columns)
    offset = antiquant(a, a.antiquant_offset, side, b, n2, columns)
    return numbers_of(rows, a.formats[side], (a.dk, a.dv)[side], scale, offset)


# ---- the operator -------------------------------------------------------------------------------


def rows(a: Args) -> Iterator[Row]:
    """Every query row, once for each kv head."""
    query = by_row(a.query, a.layout_query)
    group = a.heads_q // a.heads_kv
    for b in range(a.batch):
        begin, length = span(a, b)
        for i in range(a.seq_q):
            j = seen(a, b, i)
            columns = begin + j
            at = places(a, b, columns)
            for n2 in range(a.heads_kv):
                heads = slice(n2 * group, (n2 + 1) * group)
                k, k_size = numbers_seen(a, 0, b, n2, columns, at)
                if a.value is None and not is_codes(a.formats[1]):  # the first channels of the keys
                    v, v_size = k[:, : a.dv], k_size[:, : a.dv]
                else:
                    v, v_size = numbers_seen(a, 1, b, n2, columns, at)
                pse = np.zeros((group, len(j)), np.float32)
                if a.pse_shift is not None:
                    pse = a.pse_shift[b % len(a.pse_shift), heads, i][:, columns]
                slopes, sinks = a.alibi_slopes, a.sinks
                yield Row(
                    b,
                    i,
                    n2,
                    heads,
                    columns,
                    at,
                    (j - (length - a.seq_q + i)).astype(np.float64),
                    query[b, i, heads],
                    k,
                    v,
                    k_size,
                    v_size,
                    pse,
                    np.zeros(group, np.float32) if slopes is None else slopes[heads],
                    None if sinks is None else sinks[heads],
                )


def scores(r: Row, a: Args, dtype: type) -> np.ndarray:
    """[G][n], every step in the type: scale, softcap, pse, alibi, in this order."""
    q, k, pse, slopes, distance = (x.astype(dtype) for x in (r.q, r.k, r.pse, r.slopes, r.distance))
    in_order = dtype == np.float32 and r.q.dtype == np.float32
    s = dtype(a.scale) * (matmul_in_order(q, k.T) if in_order else q @ k.T)
    if a.softcap:
        cap = dtype(np.float32(a.softcap))
        s = cap * np.tanh(s / cap)
    return s + pse + slopes[:, None] * distance


def attend(r: Row, a: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """out, max, sum and lse of one row, in float64."""
    return weigh(scores(r, a, np.float64), r.v.astype(np.float64), r.sinks)


def attend_plain(r: Row, a: Args) -> np.ndarray:
    """The same out as anyone would first write it in the query's type."""
    if len(r.k) == 0:
        return attend(r, a)[0].astype(r.q.dtype)
    return weigh_plain(scores(r, a, np.float32), r.v, r.sinks, r.q.dtype)


def incre_flash_attention(a: Args) -> Output:
    """The operator. Rows that see no key and no sink: 0, 0, 0 and -inf."""
    out = np.zeros((a.batch, a.seq_q, a.heads_q, a.dv))
    stats = np.zeros((3, a.batch, a.heads_q, a.seq_q))
    stats[2] = -np.inf
    with np.errstate(all="ignore"):
        for r in rows(a):
            out[r.b, r.i, r.heads], *row_stats = attend(r, a)
            stats[:, r.b, r.heads, r.i] = row_stats
    exact = by_row(out, a.layout_query).copy()
    quantised = exact if a.quant_scale2 is None else by_row(quantise(a, out), a.layout_query).copy()
    return Output(quantised, exact, *stats)


def quantise(a: Args, out: np.ndarray) -> np.ndarray:
    """[B][S1][N1][DV] to int8: float32 product and sum, each rounded, then to the nearest whole
    number, of two to the even one, and into the range."""
    scale = a.quant_scale2.astype(np.float32)
    offset = np.zeros_like(scale) if a.quant_offset2 is None else a.quant_offset2
    shape = (1,) if scale.size == 1 else (a.heads_q, a.dv)
    with np.errstate(all="ignore"):
        y = out.astype(np.float32) * scale.reshape(shape)
        y = y + offset.astype(np.float32).reshape(shape)
        return np.clip(np.rint(y), -128, 127).astype(np.int8)


def plain(a: Args) -> np.ndarray:
    """attention_out [B][S1][N1][DV] of the plain implementation in the query's own type."""
    out = np.zeros((a.batch, a.seq_q, a.heads_q, a.dv), a.query.dtype)
    with np.errstate(all="ignore"):
        for r in rows(a):
            out[r.b, r.i, r.heads] = attend_plain(r, a)
    return out
