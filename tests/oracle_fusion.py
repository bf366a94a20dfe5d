"""What fusion_attention and fusion_attention_grad compute: slow, in float64, and meant to be read.

As oracle.py: arguments have the names of the fields of the C struct, pointers are NumPy arrays in
the layout that input_layout says; BSH is written as BSND, whose memory it is, SBH as [S][B][N][D].
Inside, a tensor is [rows][heads][channels], the rows of all batches one behind the other, and every
head of every batch is one Part: a matrix of scores and what happens to it.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from oracle import BSND, TND, matmul_in_order

BSH, BNSD, SBH = 3, 4, 6
LAYOUTS = {"BSND": BSND, "BSH": BSH, "SBH": SBH, "BNSD": BNSD, "TND": TND}
INNER, OUTER, SLOPE, SLOPE_SQRT = range(4)  # pse_type
FULL, ONE_ROW, LAST_ROWS = range(3)  # pse_shape
NO_LIMIT = 2147483647  # of pre_tokens and next_tokens
FLT_MAX = float(np.finfo(np.float32).max)


@dataclass
class Args:
    """Arguments of fusion_attention. Sizes come from the arrays."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    input_layout: int = BSND
    pse: np.ndarray | None = None  # shaped as pse_shape says; TND: FULL and ONE_ROW have one axis
    atten_mask: np.ndarray | None = None  # [B|1][N1|1][rows][columns]
    prefix: np.ndarray | None = None
    actual_seq_qlen: np.ndarray | None = None
    actual_seq_kvlen: np.ndarray | None = None
    dropout_mask: np.ndarray | None = None  # bytes
    sinks: np.ndarray | None = None
    sparse_mode: int = 0
    mask_from_mode: int = 0
    band: int = 0
    pre_tokens: int = 0
    next_tokens: int = 0
    pse_type: int = INNER
    pse_shape: int = FULL
    q_start: int = 0
    kv_start: int = 0
    dropout_seed: int = 0
    dropout_offset: int = 0
    scale_value: float = 0.0
    keep_prob: float = 0.0
    softcap: float = 0.0

    @property
    def heads_q(self) -> int:
        return self.query.shape[1 if self.input_layout == BNSD else -2]

    @property
    def heads_kv(self) -> int:
        return self.key.shape[1 if self.input_layout == BNSD else -2]

    @property
    def batch(self) -> int:
        if self.input_layout == TND:
            return len(self.actual_seq_qlen)
        return self.query.shape[1 if self.input_layout == SBH else 0]

    @property
    def dv(self) -> int:
        return self.value.shape[-1]

    @property
    def scale(self) -> float:
        """scale_value as a float32, 1 in the place of 0."""
        return float(np.float32(self.scale_value)) or 1.0

    @property
    def kept_share(self) -> float:
        """keep_prob as a float32, 1 in the place of 0."""
        return float(np.float32(self.keep_prob)) or 1.0


@dataclass
class Output:
    """out is [rows][N1][DV]; max, sum and lse are [rows][N1]."""

    out: np.ndarray
    max: np.ndarray
    sum: np.ndarray
    lse: np.ndarray


@dataclass
class Grads:
    """dquery, dkey, dvalue are [rows][heads][channels]; dpse is flat, as pse of HL_PSE_FULL."""

    dquery: np.ndarray
    dkey: np.ndarray
    dvalue: np.ndarray
    dpse: np.ndarray


@dataclass
class Part:
    """One query head of one batch: Sq queries against Skv keys."""

    b: int
    h: int
    n2: int  # its kv head
    rows: slice  # of all queries
    keys: slice  # of all keys
    q: np.ndarray  # [Sq][DK]
    k: np.ndarray  # [Skv][DK]
    v: np.ndarray  # [Skv][DV]
    seen: np.ndarray  # [Sq][Skv]
    pse: np.ndarray  # [Sq][Skv] what is added to a score in the end, 0 without pse
    kept: np.ndarray  # [Sq][Skv] what dropout multiplies a weight with: 0 or 1 / keep_prob
    sink: float  # -inf: none


# ---- layouts ------------------------------------------------------------------------------------


def flat(tensor: np.ndarray, layout: int) -> np.ndarray:
    """A tensor in any layout as [rows][heads][channels]."""
    if layout == TND:
        return tensor
    bsnd = tensor.swapaxes(0, 1) if layout == SBH else tensor
    bsnd = bsnd.swapaxes(1, 2) if layout == BNSD else bsnd
    return bsnd.reshape(-1, *bsnd.shape[2:])


def rows_in(tensor: np.ndarray, layout: int) -> int:
    """How many rows it has."""
    if layout == TND:
        return tensor.shape[0]
    return tensor.shape[0] * tensor.shape[2 if layout == BNSD else 1]


def unflat(rows: np.ndarray, layout: int, batch: int) -> np.ndarray:
    """The other way round."""
    if layout == TND:
        return rows
    bsnd = rows.reshape(batch, len(rows) // max(batch, 1), *rows.shape[1:])
    if layout == SBH:
        return bsnd.swapaxes(0, 1).copy()
    return bsnd.swapaxes(1, 2).copy() if layout == BNSD else bsnd


def spans(ends: np.ndarray | None, batch: int, rows: int) -> list[tuple[int, int]]:
    """(first row, how many) of each batch. Ends that do not grow are those of an empty one."""
    if ends is None:
        each = rows // max(batch, 1)
        return [(b * each, each) for b in range(batch)]
    begins = [0, *map(int, ends)][: len(ends)]
    return [(begin, max(int(end) - begin, 0)) for begin, end in zip(begins, ends, strict=True)]


def spans_of(a: Args) -> list[tuple[int, int, int, int]]:
    """First query, queries, first key, keys of each batch."""
    q = spans(a.actual_seq_qlen, a.batch, rows_in(a.query, a.input_layout))
    kv = spans(a.actual_seq_kvlen, a.batch, rows_in(a.key, a.input_layout))
    return [(*one, *other) for one, other in zip(q, kv, strict=True)]


# ---- masks --------------------------------------------------------------------------------------


def keep(mode: int, sq: int, skv: int, before: int, behind: int, prefix: int) -> np.ndarray:
    """[Sq][Skv]: modes 0 to 6 by their formulas. before, behind: pre_tokens and next_tokens."""
    before, behind = (max(-(1 << 40), min(n, 1 << 40)) for n in (before, behind))
    i, j = np.arange(sq)[:, None], np.arange(skv)[None, :]
    corner = i + skv - sq  # the diagonal that ends in the right lower corner
    match mode:
        case 0:
            return (i - before <= j) & (j <= i + behind)
        case 1:
            return np.ones((sq, skv), bool)
        case 2:
            return j <= i
        case 3:
            return j <= corner
        case 4:
            return (corner - before <= j) & (j <= corner + behind)
        case 5 | 6:
            return (j < prefix) | (j <= corner)
    raise ValueError(f"mode {mode}")


@functools.cache
def upper_triangle() -> np.ndarray:
    """The mask that modes 2, 3, 4, 7 and 8 want to be given: 1 right of the diagonal."""
    return np.triu(np.ones((2048, 2048), np.uint8), k=1)


@functools.cache
def triangle_and_rectangle() -> np.ndarray:
    """And that of mode 6: below it 1024 rows whose right half is 1."""
    rectangle = np.concatenate([np.zeros((1024, 1024)), np.ones((1024, 1024))], axis=1)
    return np.concatenate([upper_triangle(), rectangle.astype(np.uint8)])


def full_mask(mode: int, sq: int, skv: int, before: int, behind: int, prefix: int) -> np.ndarray:
    """The mask that fits modes 0, 1 and 5, [Sq][Skv], as the operator's own example makes it."""
    ones = np.ones((sq, skv), np.uint8)
    before, behind = (max(-sq - skv, min(n, sq + skv)) for n in (before, behind))
    if mode == 0:
        return np.triu(ones, k=behind + 1) | np.tril(ones, k=-before - 1)
    mask = np.triu(ones, k=skv - sq + 1) if mode == 5 else 0 * ones
    mask[:, : max(prefix, 0)] = 0
    return mask


def mask_for(mode: int, sq: int, skv: int, before: int, behind: int, prefix: int) -> np.ndarray:
    """What a caller passes as atten_mask."""
    if mode in (0, 1, 5):
        return full_mask(mode, sq, skv, before, behind, prefix)
    return triangle_and_rectangle() if mode == 6 else upper_triangle()


def keep_by_mask(mode: int, sq: int, skv: int, before: int, behind: int, prefix: int) -> np.ndarray:
    """keep once more, read from the mask that is passed: its window at the diagonal's place."""
    mask = mask_for(mode, sq, skv, before, behind, prefix)
    if mode in (0, 1, 5):
        return mask == 0

    def below(diagonal: int) -> np.ndarray:
        """Whether j <= i + diagonal, from a triangle in which this is 0."""
        diagonal = max(-sq, min(diagonal, skv))
        row, column = max(diagonal, 0), max(-diagonal, 0)
        return mask[row : row + sq, column : column + skv] == 0

    if mode == 6:
        prefix = max(0, min(prefix, skv))
        column = 1024 - prefix
        return (mask[2048 : 2048 + sq, column : column + skv] == 0) | below(skv - sq)
    if mode == 4:
        return below(skv - sq + behind) & ~below(skv - sq - before - 1)
    return below(0 if mode == 2 else skv - sq)


def modes_of(a: Args) -> list[int]:
    """The mode whose formula each batch takes: of modes 7 and 8 one takes the band's."""
    if a.sparse_mode not in (7, 8):
        return [a.sparse_mode] * a.batch
    modes = [3 if a.sparse_mode == 7 else 2] * a.batch
    some = [b for b, (_, sq, _, _) in enumerate(spans_of(a)) if sq > 0]
    if some:
        modes[some[-1] if a.sparse_mode == 7 else some[0]] = 4
    return modes


def seen(a: Args, b: int, h: int, sq: int, skv: int, formula: Callable = keep) -> np.ndarray:
    """[Sq][Skv] of one head: what takes part."""
    if a.atten_mask is None and not a.mask_from_mode:
        return np.ones((sq, skv), bool)
    mode = modes_of(a)[b]
    band = (a.pre_tokens, a.next_tokens) if a.band else (NO_LIMIT, NO_LIMIT)
    prefix = int(a.prefix[b]) if a.prefix is not None else 0
    if a.atten_mask is None or mode not in (0, 1, 5):
        return formula(mode, sq, skv, *band, prefix)
    mask = a.atten_mask
    given = mask[b % mask.shape[0], h % mask.shape[1], :sq, :skv] == 0
    return given & formula(0, sq, skv, *band, 0) if mode == 0 else given


# ---- bias and dropout ---------------------------------------------------------------------------


def bias(a: Args, b: int, h: int, sq: int, skv: int) -> np.ndarray:
    """[Sq][Skv] of one head: what is added to its scaled scores."""
    if a.pse is None or sq * skv == 0:
        return np.zeros((sq, skv))
    i, j = np.arange(sq)[:, None], np.arange(skv)[None, :]
    of = b % len(a.pse)  # pse_batch is B or 1
    if a.pse_type in (SLOPE, SLOPE_SQRT):
        distance = abs(j - i + a.kv_start - a.q_start).astype(np.float64)
        distance = np.sqrt(distance) if a.pse_type == SLOPE_SQRT else distance
        return np.float64(a.pse[of, h]) * -distance
    before = spans_of(a)[:b]
    if a.pse_shape == LAST_ROWS:  # of a bias that depends on i - j only: any entry that far apart
        width, distance = a.pse.shape[-1], i - j
        row = 1023 + np.minimum(distance, 0)
        column = width - 1 - np.maximum(distance, 0)
        there = (row >= 0) & (column >= 0)
        made = a.pse[of, h][np.maximum(row, 0), np.maximum(column, 0)].astype(np.float64)
        made = np.where(there, made, 0.0)  # 1024 and more behind the row: there is none
    elif a.pse_shape == ONE_ROW and a.input_layout == TND:
        at = a.heads_q * sum(n for _, _, _, n in before) + h * skv
        made = a.pse[at : at + skv].astype(np.float64)[None].repeat(sq, axis=0)
    elif a.pse_shape == ONE_ROW:
        made = a.pse[of, h].astype(np.float64)[None].repeat(sq, axis=0)
    elif a.input_layout == TND:
        at = a.heads_q * sum(m * n for _, m, _, n in before) + h * sq * skv
        made = a.pse[at : at + sq * skv].astype(np.float64).reshape(sq, skv)
    else:
        made = a.pse[of, h].astype(np.float64)
    return made * a.scale if a.pse_type == INNER else made


def philox(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011) of counters [..][4]: words [..][4]."""
    low = np.uint64(0xFFFFFFFF)
    c = [counter[..., n].astype(np.uint64) for n in range(4)]
    for turn in range(10):
        k = [np.uint64((k0 + turn * step) & 0xFFFFFFFF) for k0, step in zip(key, WEYL, strict=True)]
        x, y = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        shift = np.uint64(32)
        c = [(y >> shift) ^ c[1] ^ k[0], y & low, (x >> shift) ^ c[3] ^ k[1], x & low]
    return np.stack(c, axis=-1).astype(np.uint32)


WEYL = (0x9E3779B9, 0xBB67AE85)


def kept_bits(a: Args, b: int, h: int, sq: int, skv: int) -> np.ndarray:
    """[Sq][Skv] of one head: the weights that our own generator keeps."""
    blocks = -(-skv // 4)
    counter = np.zeros((sq, blocks, 4), np.uint64)
    counter[..., 0] = np.arange(blocks)
    counter[..., 1] = np.arange(sq)[:, None]
    counter[..., 2] = b * a.heads_q + h
    counter[..., 3] = a.dropout_offset
    seed = a.dropout_seed % (1 << 64)
    words = philox(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(sq, 4 * blocks)[:, :skv]
    return words.astype(np.uint64) < np.uint64(int(a.kept_share * 2**32))


def generated_mask(a: Args) -> np.ndarray:
    """The generator's bits packed as dropout_mask."""
    bits = [
        kept_bits(a, b, h, sq, skv).reshape(-1)
        for b, (_, sq, _, skv) in enumerate(spans_of(a))
        for h in range(a.heads_q)
    ]
    return pack(np.concatenate([np.zeros(0, bool), *bits]))


def pack(bits: np.ndarray) -> np.ndarray:
    """Bit k of byte n is element 8 n + k."""
    return np.packbits(bits.reshape(-1), bitorder="little")


def kept(a: Args, b: int, h: int, sq: int, skv: int) -> np.ndarray:
    """[Sq][Skv] of one head: what its weights are multiplied with."""
    if a.dropout_mask is not None and a.kept_share < 1:
        before = a.heads_q * sum(m * n for _, m, _, n in spans_of(a)[:b]) + h * sq * skv
        bits = np.unpackbits(a.dropout_mask, bitorder="little")[before : before + sq * skv]
        return bits.reshape(sq, skv) / a.kept_share
    if a.kept_share < 1:
        return kept_bits(a, b, h, sq, skv) / a.kept_share
    return np.ones((sq, skv))


# ---- the operator -------------------------------------------------------------------------------


def parts(a: Args, formula: Callable = keep) -> Iterator[Part]:
    """Every query head of every batch."""
    query, key, value = (flat(x, a.input_layout) for x in (a.query, a.key, a.value))
    group = a.heads_q // max(a.heads_kv, 1)
    for b, (first_q, sq, first_kv, skv) in enumerate(spans_of(a)):
        rows, keys = slice(first_q, first_q + sq), slice(first_kv, first_kv + skv)
        for h in range(a.heads_q):
            yield Part(
                b,
                h,
                h // group,
                rows,
                keys,
                query[rows, h],
                key[keys, h // group],
                value[keys, h // group],
                seen(a, b, h, sq, skv, formula),
                bias(a, b, h, sq, skv),
                kept(a, b, h, sq, skv),
                -np.inf if a.sinks is None else float(a.sinks[h]),
            )


def raw_scores(p: Part, a: Args, dtype: type) -> np.ndarray:
    """[Sq][Skv] scale * (q . k) in the type, before softcap."""
    q, k = p.q.astype(dtype), p.k.astype(dtype)
    in_order = dtype == np.float32 and p.q.dtype == np.float32 and q.size
    return dtype(a.scale) * (matmul_in_order(q, k.T) if in_order else q @ k.T)


def scores(p: Part, a: Args, dtype: type = np.float64) -> np.ndarray:
    """[Sq][Skv]: scale, softcap, pse, in this order; -inf where a key is not seen."""
    s = raw_scores(p, a, dtype)
    if a.softcap:
        cap = dtype(np.float32(a.softcap))
        s = cap * np.tanh(s / cap)
    return np.where(p.seen, s + p.pse.astype(dtype), dtype(-np.inf))


def weights(p: Part, s: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """exp(s - m), its sums with the sink's, and m; for rows without keys and sink 0, 0 and -inf."""
    sink = s.dtype.type(p.sink)
    m = np.maximum(s.max(axis=1, initial=-np.inf), sink)
    safe = np.where(m == -np.inf, s.dtype.type(0), m)
    e = np.where(p.seen, np.exp(s - safe[:, None]), 0)
    return e, e.sum(axis=1) + np.where(sink == m, m > -np.inf, np.exp(sink - safe)), m


def times(seen: np.ndarray, w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """w @ x over the pairs that are seen: what the others hold does not count."""
    if np.isfinite(x).all():
        return w @ x
    rows = [one[mine] @ x[mine] for one, mine in zip(w, seen, strict=True)]
    return np.array(rows).reshape(len(w), x.shape[1])


def fusion_attention(a: Args, formula: Callable = keep) -> Output:
    """The operator. Rows without keys: 0, -FLT_MAX, FLT_MAX, -inf; of batches that have no keys at
    all, and behind the last end: 0, 0, 0, -inf. Where there is a sink: 0, sink, 1, sink."""
    n_rows = rows_in(a.query, a.input_layout)
    made = Output(
        np.zeros((n_rows, a.heads_q, a.dv)),
        *np.zeros((2, n_rows, a.heads_q)),
        np.full((n_rows, a.heads_q), -np.inf),
    )
    with np.errstate(all="ignore"):
        for p in parts(a, formula):
            e, total, m = weights(p, scores(p, a))
            alone = m == -np.inf
            out = times(p.seen, e * p.kept, p.v.astype(np.float64))
            made.out[p.rows, p.h] = out / np.where(alone, 1, total)[:, None]
            none = 0.0 if p.seen.shape[1] == 0 else FLT_MAX
            made.max[p.rows, p.h] = np.where(alone, -none, m)
            made.sum[p.rows, p.h] = np.where(alone, none, total)
            made.lse[p.rows, p.h] = np.where(alone, -np.inf, m + np.log(total))
    return made


def plain(a: Args) -> np.ndarray:
    """out [rows][N1][DV] as anyone would first write it in the query's type: float32 scores and
    sums, P rounded to the type before it meets V, the result rounded to the type."""
    dtype = a.query.dtype
    out = np.zeros((rows_in(a.query, a.input_layout), a.heads_q, a.dv), dtype)
    with np.errstate(all="ignore"):
        for p in parts(a):
            w = (probabilities(p, a, np.float32) * p.kept).astype(dtype).astype(np.float32)
            out[p.rows, p.h] = times(p.seen, w, p.v.astype(np.float32)).astype(dtype)
    return out


def probabilities(p: Part, a: Args, dtype: type) -> np.ndarray:
    """[Sq][Skv] softmax, before dropout, in the type."""
    e, total, m = weights(p, scores(p, a, dtype))
    return (e / np.where(m == -np.inf, 1, total)[:, None]).astype(dtype)


# ---- backward -----------------------------------------------------------------------------------


def fusion_attention_grad(a: Args, dout: np.ndarray, out: np.ndarray | None = None) -> Grads:
    """The gradients of sum(dout * attention_out); dout in the query's layout, with DV channels.
    With `out`, the attention_out of the call, as anyone would first write it in the query's type:
    every matrix is rounded to it, and rowsum(P o dP) = rowsum(dO o O) is made of what is there."""
    query, key, value, dout = (flat(x, a.input_layout) for x in (a.query, a.key, a.value, dout))
    made = Grads(*(np.zeros(x.shape) for x in (query, key, value)), np.zeros(0))
    dpse, dtype = [], a.query.dtype
    number = np.float64 if out is None else np.float32
    out = dout if out is None else flat(out, a.input_layout)

    def rounded(x: np.ndarray) -> np.ndarray:
        return x if number is np.float64 else x.astype(dtype).astype(np.float32)

    with np.errstate(all="ignore"):
        for p in parts(a):
            do, o = (x[p.rows, p.h].astype(number) for x in (dout, out))
            q, k, v = (x.astype(number) for x in (p.q, p.k, p.v))
            scale, back = number(a.scale), p.seen.T
            w, kept = rounded(probabilities(p, a, number)), p.kept.astype(number)
            dw = rounded(np.where(p.seen, do @ v.T * kept, 0))
            row = (w * dw if number is np.float64 else do * o).sum(axis=1, keepdims=True)
            ds = rounded(np.where(p.seen, w * (dw - row), 0))
            dpse.append((ds * scale if a.pse_type == INNER else ds).reshape(-1))
            if a.softcap:
                slope = 1 - np.tanh(raw_scores(p, a, number) / number(np.float32(a.softcap))) ** 2
                ds = rounded(np.where(p.seen, ds * slope, 0))
            made.dquery[p.rows, p.h] = scale * times(p.seen, ds, k)
            made.dkey[p.keys, p.n2] += scale * times(back, ds.T, q)
            made.dvalue[p.keys, p.n2] += times(back, rounded(w * kept).T, do)
    made.dpse = np.concatenate([np.zeros(0), *dpse])
    if number is np.float32:
        for name, x in vars(made).items():
            setattr(made, name, x.astype(dtype))
    return made
