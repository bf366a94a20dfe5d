"""The decode operator's append: every byte against the oracle's, in every layout and format."""

import ctypes
import functools
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import helpers_decode
import numpy as np
import pytest
from helpers import WORDS_HERE
from helpers_memory import Arena, in_child
from helpers_runner import AARCH64, QEMU, need_aarch64
from oracle_append import F32, TYPES, decoded, encode, group_of, width

from gen import bind, spec

OP = "incre_flash_attention"
BOTH, NONE = ["stats", "slots", "pages"], ["stats"]
# Odd, so that every vector and every group has a tail; every format on either side.
SPECS: dict[str, dict[str, Any]] = {
    "f32": {"dtype": "f32", "dk": 15, "dv": 7, "features": BOTH},
    "bf16": {"dtype": "bf16", "dk": 32, "dv": 32, "features": BOTH},
    "f16": {"dtype": "f16", "dk": 33, "dv": 40, "features": NONE},
    "i8": {"dtype": "bf16", "dk": 40, "dv": 24, "kv": "i8", "features": BOTH},
    "i8xe4m3": {"dtype": "f16", "dk": 19, "dv": 68, "kv": "i8xe4m3", "features": NONE},
    "e4m3": {"dtype": "bf16", "dk": 64, "dv": 33, "kv": "e4m3", "features": BOTH},
    "i4": {"dtype": "bf16", "dk": 48, "dv": 33, "kv": "i4_32", "features": BOTH},
    "i4xf16": {"dtype": "f16", "dk": 150, "dv": 16, "kv": "i4_128xf16", "features": NONE},
    "bf16xi8": {"dtype": "bf16", "dk": 16, "dv": 20, "kv": "bf16xi8", "features": NONE},
    "i8xi4": {"dtype": "bf16", "dk": 24, "dv": 131, "kv": "i8xi4_64", "features": NONE},
}
NAMES = tuple(SPECS)
CODED = ("i8", "i8xe4m3", "e4m3", "bf16xi8", "i8xi4")
LAYOUTS = {"BSND": 0, "PA_BSND": 2, "BSH": 3, "BNSD": 4, "PA_BNSD": 5}
CHANNEL, TENSOR, TOKEN = 0, 1, 2
BATCH, ROWS, TOKENS, HEADS, BLOCK = 3, 7, 23, 3, 5


@functools.cache
def text(name: str) -> str:
    """Of a shipped header that is named, the committed file."""
    if name.startswith("hl_"):
        return helpers_decode.text(name)
    return bind.header_text(spec.parse_header({"op": OP, "name": f"hl_{name}", **SPECS[name]}))


@functools.cache
def kernel(name: str) -> bind.Kernel:
    """Compiled, once for the whole run."""
    return bind.load(text(name), flags=("-O1",))


def described(name: str) -> dict[str, Any]:
    """A kernel's table, as in SPECS; of a shipped header, from the catalogue."""
    if name in SPECS:
        return SPECS[name]
    of = helpers_decode.header(name).kernels[0]
    fields = ("dtype", "dk", "dv", "kv", "features")
    return {field: getattr(of, field) for field in fields}


def query_type(name: str) -> np.dtype:
    return TYPES[described(name)["dtype"]]


def sides(name: str) -> tuple[tuple[str, int], tuple[str, int]]:
    """(format, channels) of keys and of values."""
    table = described(name)
    kinds = table.get("kv", table["dtype"]).split("x")
    return (kinds[0], table["dk"]), (kinds[-1], table["dv"])


def is_codes(kind: str) -> bool:
    return kind in ("i8", "e4m3")


def has(name: str, feature: str) -> bool:
    return feature in described(name).get("features", ())


def ways(name: str) -> list[str]:
    """Layouts, and what may stand in the place of a table of blocks."""
    more = [w for f, w in (("slots", "slots"), ("pages", "pages")) if has(name, f)]
    return [*LAYOUTS, *more]


def modes(name: str) -> list[tuple[int, int]]:
    """(antiquant_mode, antiquant_f32)."""
    if not any(is_codes(kind) for kind, _ in sides(name)):
        return [(0, 0)]
    return [(CHANNEL, 0), (CHANNEL, 1), (TENSOR, 0), (TENSOR, 1), (TOKEN, 0)]


def isa_number(name: str, isa: str) -> int:
    return kernel(name).constants[f"HL_ISA_{isa.upper()}"]


# ---- numbers -------------------------------------------------------------------------------------


def rows_of_numbers(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> np.ndarray:
    """[...][heads][channels]: of every kind, each kind in some rows."""
    rng = np.random.default_rng([seed, *shape])
    x = rng.standard_normal(shape)
    top = 6e4 if dtype == np.float16 else 3e38
    flat = x.reshape(-1, *shape[-2:])
    for i, row in enumerate(flat):
        some = rng.random(row.shape) < 0.1
        kind = i % 12
        if kind == 1:
            row *= 10.0 ** rng.integers(-6, 4)
        elif kind == 2:
            row[some] *= 300
        elif kind == 3:
            row[...] = 0
        elif kind == 4:
            row *= 2.0**-78
        elif kind == 5:
            row *= 1e-42
        elif kind == 6:
            row[...] = np.clip(row * top, -top, top)
        elif kind == 7:  # halves of steps, where the largest number is the limit
            row[...] = rng.integers(-126, 126, row.shape) / 2
            row[0, 0] = 127
        elif kind == 8:
            row[tuple(rng.integers(n) for n in row.shape)] = np.nan
        elif kind == 9:
            row[tuple(rng.integers(n) for n in row.shape)] = rng.choice([np.inf, -np.inf])
        elif kind == 10:
            row[some] = -0.0
    with np.errstate(all="ignore"):
        return x.astype(F32).astype(dtype)


def scales_of(name: str, mode: int, dtype: np.dtype, seed: int = 1) -> dict[str, Any]:
    """Given scales and offsets of each side, as the oracle takes them: arrays [heads][channels]."""
    rng = np.random.default_rng(seed)
    made: dict[str, Any] = {"scale": [], "offset": []}
    for kind, channels in sides(name):
        shape = (HEADS, channels) if mode == CHANNEL else (1, 1)
        scale = rng.uniform(0.005, 0.1, shape) * rng.choice([1, 1, 1, -1], shape)
        offset = rng.integers(-20, 20, shape) + rng.choice([0, 0, 0.5, 0.25], shape)
        if mode == CHANNEL:
            scale[rng.random(shape) < 0.05] = 0
            scale[rng.random(shape) < 0.02] = 1e-30
            scale[rng.random(shape) < 0.02] = np.nan
            offset[rng.random(shape) < 0.02] = np.inf
        with np.errstate(all="ignore"):
            coded = is_codes(kind)
            made["scale"].append(scale.astype(F32).astype(dtype) if coded else None)
            made["offset"].append(offset.astype(F32).astype(dtype) if coded else None)
    return made


def joined(parts: list[np.ndarray | None]) -> np.ndarray:
    """K's numbers, then V's, as the argument has them."""
    return np.concatenate([part.ravel() for part in parts if part is not None])


# ---- a cache -------------------------------------------------------------------------------------


class Cache:
    """A cache of the oracle's: bytes 0xff until a token is written."""

    def __init__(self, name: str, way: str, batch: int = BATCH, heads: int = HEADS, seed: int = 0):
        self.name, self.way, self.heads, self.batch = name, way, heads, batch
        self.slots, self.pages = way == "slots", way == "pages"
        self.layout = "PA_BSND" if self.slots else "PA_BNSD" if self.pages else way
        self.paged = self.layout.startswith("PA_")
        rng = np.random.default_rng(seed)
        self.block = BLOCK if self.paged else TOKENS
        entries = TOKENS if self.slots else -(-TOKENS // self.block)
        places = batch * entries + 2
        self.outer = -(-places // BLOCK) if self.slots else places if self.paged else batch
        count = self.outer * BLOCK if self.slots else self.outer
        order = rng.permutation(count)[: batch * entries] if self.paged else None
        self.table = order.reshape(batch, entries).astype(np.int32) if self.paged else None
        self.limit = entries if self.slots else entries * self.block
        self.memory = [self.empty(width(*side)) for side in sides(name)]
        self.scales = [
            np.full((batch, self.limit), 0xFFFFFFFF, np.uint32).view(F32)
            for kind, _ in sides(name)
            if is_codes(kind)
        ]

    def empty(self, row: int) -> np.ndarray:
        inner = (self.heads, self.block) if "BNSD" in self.layout else (self.block, self.heads)
        return np.full((self.outer, *inner, row), 0xFF, np.uint8)

    def rows(self, side: int) -> np.ndarray:
        """[outer][row][head][bytes], whatever lies first."""
        return self.memory[side].swapaxes(1, 2) if "BNSD" in self.layout else self.memory[side]

    def place(self, b: int, t: int) -> tuple[int, int]:
        if not self.paged:
            return b, t
        if self.slots:
            return divmod(int(self.table[b, t]), self.block)
        return int(self.table[b, t // self.block]), t % self.block

    def write(self, b: int, t: int, side: int, numbers: np.ndarray, given: Any) -> None:
        """[heads][channels] of a token."""
        kind = sides(self.name)[side][0]
        scale = given["scale"][side] if given else None
        offset = given["offset"][side] if given and given.get("offset") else None
        made, token = encode(
            kind,
            numbers,
            scale.astype(F32) if scale is not None else None,
            offset.astype(F32) if offset is not None else 0,
        )
        self.rows(side)[self.place(b, t)] = made
        if token is not None:
            which = side if len(self.scales) == 2 else 0
            bits = np.uint32(0x7FC00000) if np.isnan(token) else token.view(np.uint32)
            self.scales[which].view(np.uint32)[b, t] = bits

    def fields(self, memory: list[np.ndarray], table: np.ndarray | None) -> dict[str, Any]:
        """Of the C struct."""
        made: dict[str, Any] = {
            "layout_kv": LAYOUTS[self.layout],
            "heads_kv": self.heads,
            "batch": self.batch,
        }
        if not self.pages:
            made |= {"key_cache": memory[0], "value_cache": memory[1]}
        if not self.paged:
            return {**made, "seq_kv": self.block}
        made |= {
            "num_blocks": self.outer,
            "block_size": self.block,
            "max_blocks": table.shape[1],
        }
        if self.pages:
            made["key_pages"] = [memory[0][i] for i in table.ravel()]
            made["value_pages"] = [memory[1][i] for i in table.ravel()]
        else:
            made |= {"block_table": table, "index_kind": int(self.slots)}
        return made


def laid_out(x: np.ndarray, layout: str) -> np.ndarray:
    """[B][S][N][D] as the new rows lie."""
    return np.ascontiguousarray(x.swapaxes(1, 2) if layout == "BNSD" else x)


@dataclass
class Call:
    """New rows of all batches, their places, and the cache that they make."""

    name: str
    way: str
    mode: int = CHANNEL
    antiquant_f32: int = 1
    numbers_f32: int = 0
    offset: bool = True
    layout_new: str = "BSND"

    def __post_init__(self) -> None:
        dtype = F32 if self.numbers_f32 else query_type(self.name)
        shape = (BATCH, ROWS, HEADS)
        self.new = [
            rows_of_numbers((*shape, channels), dtype, i)
            for i, (_, channels) in enumerate(sides(self.name))
        ]
        self.positions = np.asarray([3, -1, TOKENS - ROWS], np.int32)  # of no new row: not read
        self.lengths = np.asarray([4, 0, 7], np.int32)
        self.given = None
        self.coded = any(is_codes(kind) for kind, _ in sides(self.name))
        if self.coded and self.mode != TOKEN:
            number = F32 if self.antiquant_f32 else query_type(self.name)
            self.given = scales_of(self.name, self.mode, number)
            if not self.offset:
                self.given.pop("offset")
        self.want = Cache(self.name, self.way)
        for b in range(BATCH):
            for i in range(self.lengths[b]):
                for s in range(2):
                    self.want.write(b, self.positions[b] + i, s, self.new[s][b, i], self.given)

    def steps(self, at_once: bool) -> Iterator[tuple[np.ndarray, np.ndarray, slice]]:
        """(lengths, positions, rows)."""
        if at_once:
            yield self.lengths, self.positions, slice(None)
            return
        for i in range(ROWS):
            n = (self.lengths > i).astype(np.int32)
            yield n, (self.positions + i).astype(np.int32), slice(i, i + 1)

    def run(self, arena: Arena, isas: tuple[str, ...], at_once: bool) -> dict[str, Any]:
        """Bytes of the caches and the scales that each instruction set writes."""
        want = self.want
        room = {
            isa: [arena.room(m.shape, np.uint8) for m in want.memory]
            + [arena.room((len(want.scales), BATCH, want.limit), F32)]
            for isa in isas
        }
        steps = []
        for n, first, which in self.steps(at_once):
            some = {
                name: arena.place(laid_out(self.new[i][:, which], self.layout_new))
                for i, name in enumerate(("key", "value"))
            }
            shape = some["key"].shape
            some["rows"] = shape[2] if self.layout_new == "BNSD" else shape[1]
            steps.append({**some, "lengths": arena.place(n), "positions": arena.place(first)})
        table = arena.place(want.table) if want.paged else None
        more: dict[str, Any] = {
            "antiquant_mode": self.mode if self.coded else 0,
            "antiquant_f32": self.antiquant_f32,
            "numbers_f32": self.numbers_f32,
            "layout_new": LAYOUTS[self.layout_new],
        }
        if self.given:
            more["antiquant_scale"] = arena.place(joined(self.given["scale"]))
            if self.offset:
                more["antiquant_offset"] = arena.place(joined(self.given["offset"]))
        arena.protect()
        made = kernel(self.name)  # here, not in each child

        def all_of_it() -> None:
            for isa in isas:
                *memory, scales = room[isa]
                fields = {**want.fields(memory, table), **more, "isa": isa_number(self.name, isa)}
                if self.coded and self.mode == TOKEN:
                    fields["token_scales"] = scales
                for step in steps:
                    made.append(**fields, **step).check()

        in_child(all_of_it, f"{self}")
        return room

    def check(self, flush: str, at_once: bool, isas: tuple[str, ...] = WORDS_HERE) -> None:
        with Arena(flush) as arena:
            for isa, (*memory, scales) in self.run(arena, isas, at_once).items():
                for s in range(2):
                    wrong = np.argwhere(memory[s] != self.want.memory[s])
                    assert not len(wrong), f"{isa} side {s} at once {at_once}: byte {wrong[0]}"
                for got, want in zip(scales, self.want.scales, strict=True):
                    assert (got.view(np.uint32) == want.view(np.uint32)).all(), isa
            arena.check()


PAIRS = [(name, way) for name in NAMES for way in ways(name)]


@pytest.mark.parametrize("name,way", PAIRS)
def test_append_by_token_or_at_once_writes_the_oracles_bytes(name, way):
    """Several batches, from positions of their own, as many rows as each of them has; every
    instruction set, one at a time or all at once; all other bytes stay as they are."""
    for i, (mode, antiquant_f32) in enumerate(modes(name)):
        call = Call(name, way, mode, antiquant_f32, numbers_f32=i % 2)
        call.check("right", True)
        call.check("left", False)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout_new", ["BSND", "BSH", "BNSD"])
def test_new_rows_in_every_layout_and_type(name, layout_new):
    """Whatever the cache's own layout is."""
    for numbers_f32 in (0, 1):
        for mode, antiquant_f32 in modes(name):
            way = "PA_BSND" if numbers_f32 else "BNSD"
            call = Call(name, way, mode, antiquant_f32, numbers_f32, False, layout_new)
            call.check("right", True)


# ---- what the bytes mean -------------------------------------------------------------------------


def tame(name: str, batch: int, rows: int, seed: int = 5) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    dtype = query_type(name)
    return [
        rng.standard_normal((batch, rows, HEADS, channels)).astype(F32).astype(dtype)
        for _, channels in sides(name)
    ]


def appended(
    name: str, way: str, new: list[np.ndarray], first: int, mode: int = CHANNEL, **fields: Any
) -> tuple[Cache, dict[str, Any], np.ndarray | None]:
    """A cache with rows appended; its fields; token_scales."""
    batch = len(new[0])
    cache = Cache(name, way, batch)
    there = cache.fields(cache.memory, cache.table)
    scales = None
    more: dict[str, Any] = {}
    if cache.scales:
        more["antiquant_mode"] = mode
        if mode == TOKEN:
            scales = np.full((len(cache.scales), batch, cache.limit), np.nan, F32)
            more["token_scales"] = scales
        else:
            more["antiquant_scale"] = fields.pop("antiquant_scale")
            more["antiquant_offset"] = fields.pop("antiquant_offset", None)
            more["antiquant_f32"] = 1
    kernel(name).append(
        key=new[0],
        value=new[1] if len(new) > 1 else None,
        rows=new[0].shape[1],
        positions=np.full(batch, first, np.int32),
        **there,
        **more,
        **fields,
    ).check()
    return cache, there, scales


def fine_scales(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, so wide that nothing is cut off: scales and offsets."""
    coded = [channels for kind, channels in sides(name) if is_codes(kind)]
    count = HEADS * sum(coded)
    rng = np.random.default_rng(9)
    return rng.uniform(0.05, 0.06, count).astype(F32), rng.uniform(-3, 3, count).astype(F32)


def read_back(name: str, cache: Cache, s: int, t: int, numbers: Any) -> np.ndarray:
    """Row t of batch 0 of keys or values: [heads][channels]."""
    kind, channels = sides(name)[s]
    stored = cache.rows(s)[cache.place(0, t)]
    if not is_codes(kind):
        return decoded(kind, stored, channels)
    scale, offset = numbers(s, t)
    return decoded(kind, stored, channels, scale, offset)


def given_numbers(name: str, scale: np.ndarray, offset: np.ndarray) -> Callable[..., Any]:
    """(scale, offset) of a side's channels."""
    cut = HEADS * sides(name)[0][1] if is_codes(sides(name)[0][0]) else 0

    def of(s: int, _: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(cut, None) if s else slice(0, cut)
        return tuple(x[part].reshape(HEADS, -1).astype(np.float64) for x in (scale, offset))

    return of


def token_numbers(name: str, scales: np.ndarray) -> Callable[..., Any]:
    first = is_codes(sides(name)[0][0])
    return lambda s, t: (float(scales[int(s == 1 and first), 0, t]), 0.0)


@pytest.mark.parametrize("mode", [CHANNEL, TOKEN])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_back_is_within_half_a_step(name, mode):
    new = tame(name, 1, 9)
    scale, offset = fine_scales(name)
    more = {"antiquant_scale": scale, "antiquant_offset": offset} if mode == CHANNEL else {}
    cache, _, tokens = appended(name, "BSND", new, 4, mode, **(more if name in CODED else {}))
    numbers = given_numbers(name, scale, offset) if mode == CHANNEL else None
    numbers = numbers or (token_numbers(name, tokens) if name in CODED else None)
    for s, (kind, _) in enumerate(sides(name)):
        for i in range(9):
            x = new[s][0, i].astype(np.float64)
            y = read_back(name, cache, s, 4 + i, numbers)
            if kind in TYPES:
                assert (x == y).all()
                continue
            if group_of(kind):
                group = group_of(kind)
                step = np.zeros_like(x)
                for at in range(0, x.shape[1], group):
                    most = abs(x[:, at : at + group]).max(axis=1, keepdims=True)
                    step[:, at : at + group] = most / 7 * (1 + 2.0**-10)
            else:
                step = np.broadcast_to(numbers(s, 4 + i)[0], x.shape).astype(np.float64)
                if kind == "e4m3":  # 3 bits behind the first; subnormal from 2^-6
                    code = abs(x / step - (numbers(s, 4 + i)[1]))
                    step = step * np.maximum(2.0 ** np.floor(np.log2(code + 1e-30)) / 8, 2.0**-9)
            assert (abs(x - y) <= step / 2 * (1 + 1e-5) + 1e-12).all()


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray, scale: float) -> np.ndarray:
    """[S][N][D] of one batch and as many heads of keys and values."""
    s = scale * np.einsum("nd,tnd->nt", q, k)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    return np.einsum("nt,tnd->nd", p / p.sum(axis=1, keepdims=True), v)


@pytest.mark.parametrize("name,way", PAIRS)
def test_attention_over_appended_rows_is_that_over_the_decoded_ones(name, way):
    """In every layout, for each way to scale: what append writes is what attention reads."""
    keys = 13
    if way in ("BSH", "PA_BSND", "slots"):
        layout_query = "BSH" if way == "BSH" else "BSND"
    else:
        layout_query = "BSND" if way == "BSND" else "BNSD"
    rng = np.random.default_rng(2)
    (_, dk), (_, dv) = sides(name)
    query = rng.standard_normal((1, 1, HEADS, dk)).astype(F32).astype(query_type(name))
    scale, offset = fine_scales(name)
    for mode in [CHANNEL, TOKEN] if name in CODED else [CHANNEL]:
        more = {}
        if name in CODED and mode == CHANNEL:
            more = {"antiquant_scale": scale, "antiquant_offset": offset}
        cache, there, tokens = appended(name, way, tame(name, 1, keys), 0, mode, **more)
        out = np.empty((1, 1, HEADS, dv), F32)
        fields: dict[str, Any] = {
            "query": query,
            "attention_out": out,
            "out_f32": 1,
            "heads_q": HEADS,
            "layout_query": LAYOUTS[layout_query],
            "actual_seq_lengths": np.asarray([keys], np.int32),
            "scale_value": 0.2,
            "isa": isa_number(name, WORDS_HERE[-1]),  # in float32, which tiles are not
        }
        for old, new in (("key_cache", "key"), ("value_cache", "value")):
            if old in there:
                fields[new] = there[old]
        fields |= {n: v for n, v in there.items() if not n.endswith("_cache")}
        numbers = None
        if name in CODED:
            fields["antiquant_mode"] = mode
            fields["antiquant_f32"] = 1
            fields["antiquant_scale"] = scale if mode == CHANNEL else tokens
            fields["antiquant_offset"] = offset if mode == CHANNEL else None
            numbers = (
                given_numbers(name, scale, offset)
                if mode == CHANNEL
                else token_numbers(name, tokens)
            )
        kernel(name).run(**fields).check()
        k, v = (
            np.stack([read_back(name, cache, s, t, numbers) for t in range(keys)]) for s in (0, 1)
        )
        want = attention(query[0, 0].astype(np.float64), k, v, np.float64(np.float32(0.2)))
        assert abs(out[0, 0] - want).max() <= 2e-5 * max(1, abs(v).max())


# ---- values that are the first channels of keys --------------------------------------------------


@pytest.mark.parametrize("way", ["BSND", "PA_BNSD", "slots", "pages"])
@pytest.mark.parametrize("name", ["bf16", "i8", "e4m3", "i4"])
def test_without_values_only_keys_are_written(name, way):
    new = tame(name, 2, 5)[:1]
    for mode in [CHANNEL, TOKEN] if name in CODED else [CHANNEL]:
        scale, _ = fine_scales(name)
        more = {"antiquant_scale": scale} if name in CODED and mode == CHANNEL else {}
        cache = Cache(name, way, 2)
        there = cache.fields(cache.memory, cache.table)
        there.pop("value_cache", None)
        there.pop("value_pages", None)
        if name in CODED:
            more |= {"antiquant_mode": mode, "antiquant_f32": 1}
        tokens = np.full((2, 2, cache.limit), -1, F32)
        if name in CODED and mode == TOKEN:
            more["token_scales"] = tokens
        kernel(name).append(
            key=new[0], rows=5, positions=np.asarray([2, 6], np.int32), **there, **more
        ).check()
        want = Cache(name, way, 2)
        channels = HEADS * sides(name)[0][1]
        given = {"scale": [scale[:channels].reshape(HEADS, -1)]} if mode == CHANNEL else None
        for b, first in enumerate((2, 6)):
            for i in range(5):
                want.write(b, first + i, 0, new[0][b, i], given if name in CODED else None)
        assert (cache.memory[0] == want.memory[0]).all()
        assert (cache.memory[1] == 0xFF).all()
        if name in CODED and mode == TOKEN:
            written = want.scales[0].view(np.uint32) != 0xFFFFFFFF
            assert written.sum() == 10
            for side in tokens:
                assert (side[written] == want.scales[0][written]).all()
                assert (side[~written] == -1).all()


# ---- strides, and keys and values in one tensor --------------------------------------------------


def test_strides_of_new_rows_and_of_the_cache():
    """Rows and heads further apart on both sides."""
    name, rng = "bf16", np.random.default_rng(0)
    new = rng.integers(0, 2**15, (2, 4, 3, 40)).astype(np.uint16)
    cache = np.full((2, 9, 3, 50), 0xFFFF, np.uint16)
    want = cache.copy()
    want[0, 1:5, :, :32], want[1, 5:9, :, :32] = new[0, :, :, :32], new[1, :, :, :32]
    kernel(name).append(
        key=new, key_cache=cache, positions=np.asarray([1, 5], np.int32), batch=2, rows=4,
        heads_kv=3, seq_kv=9, key_stride=(480, 120, 40), key_cache_stride=(1350, 150, 50),
    ).check()  # fmt: skip
    assert (cache == want).all()


@pytest.mark.parametrize("swapped", [0, 1])
def test_keys_and_values_of_a_block_row_or_head_may_lie_side_by_side(swapped):
    """One tensor for both, as engines have it: [block][2][row][head], [block][row][2][head],
    [block][row][head][2]."""
    new = tame("bf16", 1, 7)
    table = np.asarray([[2, 0]], np.int32)
    for axis in (1, 2, 3):
        shape = [3, 4, HEADS, 32]
        shape.insert(axis, 2)
        both = np.full(shape, 0xFFFF, np.uint16)
        halves = np.moveaxis(both, axis, 0)[:: -1 if swapped else 1]
        stride = tuple(n // 2 for n in halves[0].strides[:3])
        kernel("bf16").append(
            key=new[0], value=new[1], rows=7, batch=1, heads_kv=HEADS, layout_kv=2, num_blocks=3,
            block_size=4, max_blocks=2, block_table=table, positions=np.asarray([1], np.int32),
            key_cache=halves[0].ctypes.data, value_cache=halves[1].ctypes.data,
            key_cache_stride=stride, value_cache_stride=stride,
        ).check()  # fmt: skip
        for s in (0, 1):
            rows = halves[s][[2, 0]].reshape(8, HEADS, 32)
            assert (rows[1:] == new[s][0].view(np.uint16)).all(), axis
            assert (rows[0] == 0xFFFF).all() and (halves[s][1] == 0xFFFF).all()


@pytest.mark.parametrize(
    "gap,stride",
    [
        (0, (0, 0, 0)),  # the same memory
        (31, (768, 192, 64)),  # a head's last channel
        (64, (768, 192, 64)),  # heads in the gaps of the next one
        (33, (768, 192, 64)),  # the other way round
        (192, (768, 192, 64)),  # the next row
        (32, (760, 192, 64)),  # the next block begins before the last value ends
    ],
)
def test_keys_and_values_that_overlap_are_refused(gap, stride):
    new = tame("bf16", 1, 1)
    both = np.full((4096,), 0xFFFF, np.uint16)
    got = kernel("bf16").append(
        key=new[0], value=new[1], rows=1, batch=1, heads_kv=HEADS, layout_kv=2, num_blocks=3,
        block_size=4, max_blocks=1, block_table=np.zeros((1, 1), np.int32),
        positions=np.zeros(1, np.int32), key_cache=both, value_cache=both.ctypes.data + 2 * gap,
        key_cache_stride=stride, value_cache_stride=stride,
    )  # fmt: skip
    assert (got.argument, got.rule) == ("VALUE_CACHE", "DISJOINT"), got.error_text
    assert (both == 0xFFFF).all()


# ---- refusals ------------------------------------------------------------------------------------

P62 = 2**62
PTR_MAX = 2**63 - 1


def base(name: str, way: str) -> dict[str, Any]:
    """A call that is accepted, with arrays of its own: two batches, three rows each."""
    new = tame(name, 2, 3)
    paged = way != "BSND"
    rows = (4, 4) if paged else (2, 8)
    memory = [np.full((*rows, HEADS, width(*side)), 0xFF, np.uint8) for side in sides(name)]
    fields: dict[str, Any] = {
        "key": new[0],
        "value": new[1],
        "key_cache": memory[0],
        "value_cache": memory[1],
        "positions": np.asarray([3, 2], np.int32),
        "lengths": np.asarray([2, 3], np.int32),
        "batch": 2,
        "rows": 3,
        "heads_kv": HEADS,
    }
    if any(is_codes(kind) for kind, _ in sides(name)):
        scale, offset = fine_scales(name)
        fields |= {"antiquant_scale": scale, "antiquant_offset": offset, "antiquant_f32": 1}
    if not paged:
        return {**fields, "seq_kv": 8}
    fields |= {"layout_kv": 2, "num_blocks": 4, "block_size": 4, "max_blocks": 2}
    table = np.asarray([[0, 1], [2, 3]], np.int32)
    if way == "slots":
        slots = np.arange(16, dtype=np.int32).reshape(2, 8)
        return {**fields, "index_kind": 1, "max_blocks": 8, "block_table": slots}
    if way == "pages":
        del fields["key_cache"], fields["value_cache"]
        pages = [[*m] for m in memory]
        return {**fields, "key_pages": pages[0], "value_pages": pages[1], "kept": memory}
    return {**fields, "block_table": table}


def shifted(name: str, by: int = 1) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The same array, not aligned."""
    return lambda f: {name: f[name].ctypes.data + by}


def array(name: str, *values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {name: np.asarray(values, np.int32)}


def page(which: str, i: int, new: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Another one of the pages: an address, or a field's."""

    def change(f: dict[str, Any]) -> dict[str, Any]:
        pages = list(f[which])
        pages[i] = f[new] if isinstance(new, str) else new
        return {which: pages}

    return change


TOKENS_ROOM = np.zeros((2, 2, 8), F32)
TOKEN_CALL = {
    "antiquant_mode": TOKEN,
    "antiquant_scale": None,
    "antiquant_offset": None,
    "token_scales": TOKENS_ROOM,
}
Bad = tuple[str, str, Any, str, str, str, tuple[int, ...], int, int]
# name, way, change, argument, status, rule, position, value, limit
BAD: list[Bad] = [
    *(
        ("bf16", "BSND", {field: -1}, field.upper(), "SHAPE", "AT_LEAST", (), -1, 0)
        for field in ("batch", "rows", "heads_kv", "seq_kv", "antiquant_f32", "numbers_f32")
    ),
    ("bf16", "BSND", {"numbers_f32": 2}, "NUMBERS_F32", "SHAPE", "AT_MOST", (), 2, 1),
    ("i8", "BSND", {"antiquant_f32": 2}, "ANTIQUANT_F32", "SHAPE", "AT_MOST", (), 2, 1),
    ("i8", "BSND", {"antiquant_mode": 3}, "ANTIQUANT_MODE", "SHAPE", "AT_MOST", (), 3, 2),
    ("i8", "BSND", {"antiquant_mode": -1}, "ANTIQUANT_MODE", "SHAPE", "AT_LEAST", (), -1, 0),
    ("bf16", "BSND", {"layout_kv": 1}, "LAYOUT_KV", "UNSUPPORTED", "GENERATED", (), 1, 0),
    ("bf16", "BSND", {"layout_kv": 9}, "LAYOUT_KV", "UNSUPPORTED", "GENERATED", (), 9, 0),
    ("bf16", "BSND", {"layout_new": 2}, "LAYOUT_NEW", "UNSUPPORTED", "GENERATED", (), 2, 0),
    ("bf16", "BSND", {"layout_new": -1}, "LAYOUT_NEW", "UNSUPPORTED", "GENERATED", (), -1, 0),
    ("bf16", "BSND", {"isa": 99}, "ISA", "UNSUPPORTED", "GENERATED", (), 99, 0),
    ("bf16", "BSND", {"isa": -1}, "ISA", "UNSUPPORTED", "GENERATED", (), -1, 0),
    ("bf16", "BSND", array("block_table", 1), "BLOCK_TABLE", "UNSUPPORTED", "NULL", (), 1, 0),
    ("bf16", "BSND", lambda f: {"key_pages": [f["key"]]}, "KEY_PAGES", "UNSUPPORTED", "NULL", (),
     1, 0),
    ("bf16", "BSND", {"index_kind": 1}, "INDEX_KIND", "UNSUPPORTED", "GENERATED", (), 1, 1),
    ("bf16", "PA", {"index_kind": 2}, "INDEX_KIND", "UNSUPPORTED", "GENERATED", (), 2, 1),
    # What a header was not generated with.
    ("f16", "PA", {"index_kind": 1}, "INDEX_KIND", "UNSUPPORTED", "NULL", (), 1, 0),
    ("f16", "PA", lambda f: {"key_pages": [f["key"]]}, "KEY_PAGES", "UNSUPPORTED", "NULL", (), 1,
     0),
    ("f16", "PA", lambda f: {"value_pages": [f["key"]]}, "VALUE_PAGES", "UNSUPPORTED", "NULL", (),
     1, 0),
    ("f16", "BSND", {"antiquant_mode": 1}, "ANTIQUANT_MODE", "UNSUPPORTED", "NULL", (), 1, 0),
    *(
        ("i4", "BSND", {field: TOKENS_ROOM}, field.upper(), "UNSUPPORTED", "NULL", (), 1, 0)
        for field in ("antiquant_scale", "antiquant_offset", "token_scales")
    ),
    # Tensors.
    *(
        (name, "BSND", {field: None}, field.upper(), "NULL", "NOT_NULL", (), 0, 0)
        for name in ("bf16", "i8", "i4")
        for field in ("key", "value", "key_cache", "value_cache", "positions")
    ),
    ("f16", "BSND", {"value": None, "value_cache": None}, "VALUE", "NULL", "NOT_NULL", (), 0, 0),
    ("i8", "BSND", {"antiquant_scale": None}, "ANTIQUANT_SCALE", "NULL", "NOT_NULL", (), 0, 0),
    ("i8", "BSND", {**TOKEN_CALL, "token_scales": None}, "TOKEN_SCALES", "NULL", "NOT_NULL", (), 0,
     0),
    ("i8", "BSND", {"token_scales": TOKENS_ROOM}, "TOKEN_SCALES", "UNSUPPORTED", "NULL", (), 1, 0),
    ("i8", "BSND", {**TOKEN_CALL, "antiquant_scale": TOKENS_ROOM}, "ANTIQUANT_SCALE",
     "UNSUPPORTED", "NULL", (), 1, 0),
    ("i8", "BSND", {**TOKEN_CALL, "antiquant_offset": TOKENS_ROOM}, "ANTIQUANT_OFFSET",
     "UNSUPPORTED", "NULL", (), 1, 0),
    ("bf16", "PA", {"block_table": None}, "BLOCK_TABLE", "NULL", "NOT_NULL", (), 0, 0),
    *(
        ("bf16", "BSND", shifted(field), field.upper(), "ALIGN", "MULTIPLE_OF", (), 1, 2)
        for field in ("key", "value", "key_cache", "value_cache")
    ),
    ("bf16", "BSND", {"numbers_f32": 1, "key": np.zeros(900, F32).ctypes.data + 2}, "KEY", "ALIGN",
     "MULTIPLE_OF", (), 2, 4),
    *(
        ("bf16", "PA", shifted(field, 2), field.upper(), "ALIGN", "MULTIPLE_OF", (), 2, 4)
        for field in ("positions", "lengths", "block_table")
    ),
    ("i8", "BSND", shifted("antiquant_scale", 2), "ANTIQUANT_SCALE", "ALIGN", "MULTIPLE_OF", (), 2,
     4),
    ("i8", "BSND", {**TOKEN_CALL, "token_scales": TOKENS_ROOM.ctypes.data + 2}, "TOKEN_SCALES",
     "ALIGN", "MULTIPLE_OF", (), 2, 4),
    # Memory that is written, and that lies under something else.
    *(
        ("bf16", "PA", lambda f, field=field: {"key_cache": f[field]}, "KEY_CACHE", "ALIAS",
         "DISJOINT", (), 0, 0)
        for field in ("key", "value", "positions", "lengths", "block_table")
    ),
    ("bf16", "BSND", lambda f: {"value_cache": f["key"]}, "VALUE_CACHE", "ALIAS", "DISJOINT", (),
     0, 0),
    ("bf16", "BSND", lambda f: {"value_cache": f["key_cache"]}, "VALUE_CACHE", "ALIAS", "DISJOINT",
     (), 0, 0),
    ("i8", "BSND", lambda f: {"antiquant_scale": f["key_cache"].view(F32)}, "KEY_CACHE", "ALIAS",
     "DISJOINT", (), 0, 0),
    ("i8", "BSND", lambda f: {**TOKEN_CALL, "token_scales": f["value_cache"].view(F32)},
     "VALUE_CACHE", "ALIAS", "DISJOINT", (), 0, 0),
    ("i8", "BSND", lambda f: {**TOKEN_CALL, "token_scales": f["key"].view(F32)}, "TOKEN_SCALES",
     "ALIAS", "DISJOINT", (), 0, 0),
    # Strides.
    *(
        ("bf16", "BSND", {field: (0, -1, 0)}, field.upper(), "SHAPE", "AT_LEAST", (), -1, 0)
        for field in ("key_stride", "value_stride", "key_cache_stride", "value_cache_stride")
    ),
    ("bf16", "BSND", {"key_cache_stride": (0, 95, 0)}, "KEY_CACHE_STRIDE", "SHAPE", "AT_LEAST", (),
     95, 96),
    ("bf16", "BSND", {"value_cache_stride": (767, 96, 0)}, "VALUE_CACHE_STRIDE", "SHAPE",
     "AT_LEAST", (), 767, 768),
    ("i4", "BSND", {"key_cache_stride": (0, 0, 27)}, "KEY_CACHE_STRIDE", "SHAPE", "AT_LEAST", (),
     27, 28),
    ("bf16", "BSND", {"key_stride": (P62, 0, 0)}, "KEY_STRIDE", "SHAPE", "ADDRESSABLE", (),
     PTR_MAX, PTR_MAX),
    ("bf16", "BSND", {"key_cache_stride": (P62, 0, 0)}, "KEY_CACHE_STRIDE", "SHAPE",
     "ADDRESSABLE", (), PTR_MAX, PTR_MAX),
    # Places.
    ("bf16", "BSND", array("positions", -1, 0), "POSITIONS", "LENGTH", "AT_LEAST", (0,), -1, 0),
    ("bf16", "BSND", array("positions", 6, 6), "POSITIONS", "LENGTH", "AT_MOST", (1,), 6, 5),
    ("bf16", "BSND", array("positions", 2**31 - 1, 6), "POSITIONS", "LENGTH", "AT_MOST", (0,),
     2**31 - 1, 6),
    ("bf16", "BSND", {"seq_kv": 2}, "POSITIONS", "LENGTH", "AT_MOST", (0,), 3, 0),
    ("bf16", "BSND", array("lengths", 1, -1), "LENGTHS", "LENGTH", "AT_LEAST", (1,), -1, 0),
    ("bf16", "BSND", array("lengths", 4, 1), "LENGTHS", "LENGTH", "AT_MOST", (0,), 4, 3),
    ("bf16", "PA", array("positions", 0, 6), "POSITIONS", "LENGTH", "AT_MOST", (1,), 6, 5),
    ("bf16", "slots", array("positions", 0, 6), "POSITIONS", "LENGTH", "AT_MOST", (1,), 6, 5),
    ("bf16", "PA", {"block_size": 0}, "BLOCK_SIZE", "SHAPE", "AT_LEAST", (), 0, 1),
    ("bf16", "PA", {"num_blocks": -1}, "NUM_BLOCKS", "SHAPE", "AT_LEAST", (), -1, 0),
    ("bf16", "PA", {"max_blocks": -1}, "MAX_BLOCKS", "SHAPE", "AT_LEAST", (), -1, 0),
    ("bf16", "PA", {"max_blocks": 2**30}, "MAX_BLOCKS", "SHAPE", "AT_MOST", (), 2**30,
     (2**31 - 1) // 4),
    ("bf16", "PA", array("block_table", [0, 1], [-1, 3]), "BLOCK_TABLE", "BLOCK_ID", "AT_LEAST",
     (1, 0), -1, 0),
    ("bf16", "PA", array("block_table", [0, 4], [2, 3]), "BLOCK_TABLE", "BLOCK_ID", "AT_MOST",
     (0, 1), 4, 3),
    ("bf16", "slots", array("block_table", range(8), [8, 9, 10, 16, 0, 0, 0, 0]), "BLOCK_TABLE",
     "BLOCK_ID", "AT_MOST", (1, 3), 16, 15),
    ("bf16", "slots", array("block_table", range(8), [8, 9, 10, 11, -1, 0, 0, 0]), "BLOCK_TABLE",
     "BLOCK_ID", "AT_LEAST", (1, 4), -1, 0),
    # Pages.
    ("i8", "pages", page("key_pages", 1, None), "KEY_PAGES", "NULL", "NOT_NULL", (0, 1), 0, 0),
    ("i8", "pages", page("value_pages", 2, None), "VALUE_PAGES", "NULL", "NOT_NULL", (1, 0), 0, 0),
    ("bf16", "pages", page("key_pages", 2, 4099), "KEY_PAGES", "ALIGN", "MULTIPLE_OF", (1, 0), 1,
     2),
    ("bf16", "pages", page("value_pages", 3, "key"), "VALUE_PAGES", "ALIAS", "DISJOINT", (1, 1), 0,
     0),
    ("bf16", "pages", lambda f: {"value_pages": f["key_pages"]}, "VALUE_PAGES", "ALIAS",
     "DISJOINT", (0, 0), 0, 0),
    ("bf16", "pages", {"key_pages": None}, "KEY_PAGES", "NULL", "NOT_NULL", (), 0, 0),
    ("bf16", "pages", {"value_pages": None}, "VALUE_PAGES", "NULL", "NOT_NULL", (), 0, 0),
    ("bf16", "pages", array("block_table", 1), "BLOCK_TABLE", "UNSUPPORTED", "NULL", (), 1, 0),
    ("bf16", "pages", lambda f: {"key_cache": f["kept"][0]}, "KEY_CACHE", "UNSUPPORTED", "NULL",
     (), 1, 0),
    ("bf16", "pages", lambda f: {"value_cache": f["kept"][0]}, "VALUE_CACHE", "UNSUPPORTED",
     "NULL", (), 1, 0),
    ("bf16", "pages", {"index_kind": 1}, "INDEX_KIND", "UNSUPPORTED", "GENERATED", (), 1, 1),
]  # fmt: skip


def call(name: str, fields: dict[str, Any]) -> bind.Result:
    return kernel(name).append(**{n: v for n, v in fields.items() if n != "kept"})


@pytest.mark.parametrize(
    "name,way,change,argument,status,rule,position,value,limit", BAD,
    ids=[f"{b[0]}-{b[1]}-{b[3]}-{b[5]}-{i}" for i, b in enumerate(BAD)],
)  # fmt: skip
def test_bad_input(name, way, change, argument, status, rule, position, value, limit):
    """Which argument, where, what and what it was held against; and nothing is written."""
    good = call(name, base(name, way))
    assert good.ok, good.error_text
    fields = base(name, way)
    arrays = [a for a in fields.values() if isinstance(a, np.ndarray)] + fields.get("kept", [])
    before = [a.copy() for a in [*arrays, TOKENS_ROOM]]
    got = call(name, {**fields, **(change(fields) if callable(change) else change)})
    assert (got.status_name, got.argument, got.rule) == (f"HL_ERR_{status}", argument, rule)
    assert (got.position, got.value, got.limit) == (position, value, limit)
    assert argument.lower() in got.error_text
    for a, then in zip([*arrays, TOKENS_ROOM], before, strict=True):
        assert a.tobytes() == then.tobytes()


@pytest.mark.parametrize("name", ["f32", "i8", "i4xf16"])
def test_nothing_to_do_needs_no_memory(name):
    paged = {"layout_kv": 2, "block_size": 4}
    for fields in ({}, {"batch": 3}, {"rows": 3}, paged, {**paged, "batch": 3}):
        kernel(name).append(**fields).check()
    error = kernel(name).Error()
    status = kernel(name)._c_append(None, ctypes.byref(error))
    assert kernel(name).result(status, error).argument == "ARGS"


def test_an_instruction_set_that_is_not_here_is_refused():
    for isa in WORDS_HERE:
        kernel("i8").append(isa=isa_number("i8", isa)).check()
    absent = "avx2" if "neon" in WORDS_HERE else "neon"
    got = kernel("i8").append(isa=isa_number("i8", absent))
    assert (got.argument, got.rule) == ("ISA", "GENERATED")


@pytest.mark.parametrize("name,way", [("bf16", "PA"), ("i8", "pages")])
def test_only_entries_that_new_rows_need_are_read(name, way):
    """Others name no block, or no page; a page that is not needed may even be the keys."""
    fields = base(name, way)
    fields |= {"positions": np.asarray([4, 0], np.int32), "lengths": np.asarray([2, 0], np.int32)}
    fields["rows"] = 3
    if way == "pages":
        fields["key_pages"] = [None, fields["key_pages"][1], fields["key"], None]
        fields["value_pages"] = [None, fields["value_pages"][1], None, None]
    else:
        fields["block_table"] = np.asarray([[-7, 1], [99, -1]], np.int32)
    call(name, fields).check()


# ---- AArch64 -------------------------------------------------------------------------------------

ARM_PROGRAM = """\
#include <stdio.h>
#include "header.h"
#define JOIN(a, b) JOINED(a, b)
#define JOINED(a, b) a##b
int main(void)
{
    enum { K_IN = N_ROWS * N_HEADS * K_CHANNELS * NUMBER, GIVEN = 4096 };
    enum { V_IN = N_ROWS * N_HEADS * V_CHANNELS * NUMBER };
    static _Alignas(16) char k[K_IN], v[V_IN], scale[GIVEN], offset[GIVEN];
    static _Alignas(16) char k_out[N_ROWS * K_ROW], v_out[N_ROWS * V_ROW], tokens[8 * N_ROWS];
    static const int32_t zero = 0;
    hl_error error;
    if (fread(k, 1, K_IN, stdin) != K_IN || fread(v, 1, V_IN, stdin) != V_IN) return 1;
    if (fread(scale, 1, GIVEN, stdin) != GIVEN || fread(offset, 1, GIVEN, stdin) != GIVEN) return 1;
    for (int isa = HL_ISA_SCALAR; isa <= HL_ISA_NEON; isa++) {
        hl_decode_append_args a = {0};
        for (size_t i = 0; i < sizeof tokens; i++) tokens[i] = (char)0xff;
        a.key = k;
        a.value = v;
        a.key_cache = k_out;
        a.value_cache = v_out;
        a.positions = &zero;
        a.batch = 1;
        a.rows = a.seq_kv = N_ROWS;
        a.heads_kv = N_HEADS;
        a.numbers_f32 = NUMBER == 4;
        a.antiquant_f32 = 1;
        a.antiquant_mode = SCALING;
        if (CODED && SCALING == HL_ANTIQUANT_TOKEN) a.token_scales = (float *)(void *)tokens;
        if (CODED && SCALING != HL_ANTIQUANT_TOKEN) a.antiquant_scale = scale;
        if (CODED && SCALING != HL_ANTIQUANT_TOKEN) a.antiquant_offset = offset;
        a.isa = isa;
        if (JOIN(KERNEL, _append)(&a, &error) != HL_OK) return 2;
        fwrite(k_out, 1, sizeof k_out, stdout);
        fwrite(v_out, 1, sizeof v_out, stdout);
        fwrite(tokens, 1, sizeof tokens, stdout);
    }
    return 0;
}
"""


@pytest.mark.parametrize("name", ["bf16", "f16", "i8", "i8xe4m3", "e4m3", "i4"])
def test_neon_writes_the_same_bytes(name):
    """Under qemu: plain C99 and NEON, both types of numbers, scales that are given and that are
    not."""
    need_aarch64()
    rows = 24
    for mode in [CHANNEL, TOKEN] if name in CODED else [CHANNEL]:
        for dtype in (query_type(name), F32):
            new = [
                rows_of_numbers((rows, HEADS, channels), dtype, i)
                for i, (_, channels) in enumerate(sides(name))
            ]
            given = scales_of(name, mode, np.dtype(F32)) if name in CODED else None
            want = [[], []]
            tokens = np.full((2, rows), 0xFFFFFFFF, np.uint32)
            for s, (kind, _) in enumerate(sides(name)):
                for i in range(rows):
                    use = given is not None and mode == CHANNEL
                    scale = given["scale"][s] if use else None
                    offset = given["offset"][s] if use else 0
                    made, token = encode(kind, new[s][i], scale, offset)
                    want[s].append(made)
                    if token is not None:
                        nan = np.isnan(token)
                        tokens[s, i] = 0x7FC00000 if nan else token.view(np.uint32)
            blocks = [np.zeros(4096, np.uint8) for _ in range(2)]
            if given:
                for block, what in zip(blocks, ("scale", "offset"), strict=True):
                    flat = joined(given[what]).view(np.uint8)
                    block[: flat.size] = flat
            defines = {
                "KERNEL": kernel(name).name,
                "N_ROWS": rows,
                "N_HEADS": HEADS,
                "K_CHANNELS": sides(name)[0][1],
                "V_CHANNELS": sides(name)[1][1],
                "NUMBER": dtype.itemsize,
                "K_ROW": HEADS * width(*sides(name)[0]),
                "V_ROW": HEADS * width(*sides(name)[1]),
                "CODED": int(name in CODED),
                "SCALING": mode,
            }
            program = bind.compile_c(
                {"header.h": text(name), "append.c": ARM_PROGRAM},
                compiler=AARCH64,
                flags=("-O1", *(f"-D{key}={value}" for key, value in defines.items())),
                suffix=".bin",
            )
            run = subprocess.run(
                [*QEMU, str(program)],
                input=b"".join(x.tobytes() for x in [*new, *blocks]),
                capture_output=True,
                timeout=300,
            )
            assert run.returncode == 0, run.stderr
            exact = np.concatenate([np.concatenate(w).ravel() for w in want])
            exact = np.concatenate([exact, tokens.view(np.uint8).ravel()])
            for got in np.frombuffer(run.stdout, np.uint8).reshape(2, -1):
                wrong = np.flatnonzero(got != exact)
                assert not wrong.size, (mode, dtype, wrong[0])
