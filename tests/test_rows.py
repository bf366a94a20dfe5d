"""The routines that write and read a quantised cache: every byte against the oracle's."""

import ctypes
import struct
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from helpers import ISAS_HERE
from helpers_memory import Arena, in_child
from helpers_records import FORMS, kernel, text
from helpers_runner import AARCH64, QEMU, need_aarch64
from oracle_records import BF16, E4M3, E8M0, F16, F32, I8, Form, decode, encode, power_above, swap

from gen import bind

NAMES = list(FORMS)
PAGED_ONLY = [name for name, form in FORMS.items() if form.behind]
SWAPPED = ["i8_656", "fp8_656", "odd", "wide"]
BLOCK = 4  # rows of a page, where scales lie behind pages
BOTH_TYPES = pytest.mark.parametrize("numbers_f32", [0, 1], ids=["own", "f32"])


def each(names: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


def every_isa() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("isa", ISAS_HERE)


def number_type(name: str, numbers_f32: int) -> np.dtype:
    return F32 if numbers_f32 else kernel(name).dtype


def isa_number(name: str, isa: str) -> int:
    return kernel(name).constants[f"HL_ISA_{isa.upper()}"]


# ---- numbers -------------------------------------------------------------------------------------


def ties(form: Form, rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    """Scales that are powers of two, and numbers half way between two codes."""
    if form.element == I8:
        steps = rng.integers(-63, 63, shape) + 0.5
    else:
        low = rng.integers(0, 0x7D, shape).astype(np.uint8)
        middle = low.view(E4M3).astype(np.float64) + (low + 1).view(E4M3).astype(np.float64)
        steps = middle / 2 * rng.choice([-1, 1], shape)
    steps[:, :: form.tile] = 127 if form.element == I8 else 448
    return steps * 2.0 ** rng.integers(-3, 3, (shape[0], 1))


def numbers_of(form: Form, dtype: np.dtype, width: int) -> np.ndarray:
    """Rows of every kind; of most kinds a few."""
    rng = np.random.default_rng(width)
    top = 6e4 if dtype == F16 else 3e38
    low = np.float32(2.0**-80)

    def some(rows: int = 3) -> np.ndarray:
        return rng.standard_normal((rows, width))

    def with_some(value: float) -> np.ndarray:
        x = some(2)
        x[0, rng.integers(width)] = value
        x[1, rng.random(width) < 2 / form.tile] = -value
        return x

    borders = some(4) * 1e-30
    borders[0] = low
    borders[1] = np.nextafter(low, np.float32(0))
    borders[2] = 0
    borders[2, :: form.tile] = -low
    rows = [
        some(6),
        some() * 10.0 ** rng.integers(-6, 4, (3, width)),
        some() * np.where(rng.random((3, width)) < 0.02, 300, 1),
        some() * np.exp(4 * some()),
        np.zeros((1, width)),
        np.full((1, width), -0.0),
        some() * 2.0**-76,
        some() * 1e-42,
        np.clip(some() * top / 4, -top, top),
        np.full((1, width), top),
        ties(form, rng, (4, width)),
        2.0 ** rng.integers(-14, 14, (2, width)),
        borders,
        *(with_some(value) for value in (np.nan, np.inf, -np.inf, top)),
    ]
    with np.errstate(all="ignore"):
        return np.concatenate(rows).astype(np.float32).astype(dtype)


def rope_of(form: Form, dtype: np.dtype, rows: int) -> np.ndarray:
    """Any bits, but of NaN: those of a NaN may change where types do."""
    rng = np.random.default_rng(rows)
    bits = rng.integers(0, 2**32, (rows, form.rope), np.uint32)
    bits[0] &= np.uint32(0x83FFFFFF)
    x = (bits >> (32 - 8 * dtype.itemsize)).astype(f"u{dtype.itemsize}").view(dtype)
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(x), dtype.type(0.1), x)


# ---- calls ---------------------------------------------------------------------------------------


def call(name: str, routine: str, **fields: Any) -> bind.Result:
    """In a child process, which may die of it."""
    return in_child(lambda: getattr(kernel(name), routine)(**fields), routine)


def wide(x: np.ndarray, more: int) -> np.ndarray:
    """Rows further apart, NaN between them and nothing behind the last."""
    rows, width = x.shape
    room = np.full((rows * (width + more) - more,), np.nan, x.dtype)
    for i in range(rows):
        room[i * (width + more) :][:width] = x[i]
    return room


def joined(nope: np.ndarray, rope: np.ndarray) -> np.ndarray:
    return np.concatenate([nope, rope], axis=1)


def pages(
    form: Form, record: np.ndarray, behind: np.ndarray, block: int, stride: int = 0, page: int = 0
) -> np.ndarray:
    """Records as memory: rows, in pages of so many where scales lie behind them; else 0xff."""
    rows, stride = len(record), stride or form.bytes
    if not form.behind:
        room = np.full((rows - 1) * stride + form.bytes, 0xFF, np.uint8)
        for i in range(rows):
            room[i * stride :][: form.bytes] = record[i]
        return room
    page = page or form.page_bytes(block, stride)
    last = (rows - 1) // block
    end = last * page + block * stride + (rows - last * block) * form.behind
    room = np.full(end, 0xFF, np.uint8)
    for i in range(rows):
        at = i // block * page
        room[at + i % block * stride :][: form.bytes] = record[i]
        room[at + block * stride + i % block * form.behind :][: form.behind] = behind[i]
    return room  # fmt: skip


def block_of(form: Form) -> int:
    return BLOCK if form.behind else 0


# ---- quantise ------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_of_2", [0, 1])
@BOTH_TYPES
@each(NAMES)
def test_every_instruction_set_writes_the_oracles_bytes(name, numbers_f32, power_of_2):
    """All kinds of numbers; rows joined or not, packed or not; memory from either side."""
    form, dtype = FORMS[name], number_type(name, numbers_f32)
    nope = numbers_of(form, dtype, form.dk)
    rope = rope_of(form, dtype, len(nope))
    want = encode(form, nope, rope, bool(power_of_2))
    for isa in ISAS_HERE:
        for flush in ("left", "right"):
            for apart in (0, 1):
                stride = form.bytes + 12 * apart
                page = apart * (form.page_bytes(BLOCK, stride) + 4) if form.behind else 0
                memory = pages(form, *want, BLOCK, stride, page)
                with Arena(flush) as arena:
                    fields = {"nope": arena.place(joined(nope, rope))}
                    if apart:
                        fields = {
                            "nope": arena.place(wide(nope, 3)),
                            "nope_stride": form.dk + 3,
                        }
                        if form.rope:
                            fields["rope"] = arena.place(wide(rope, 1))
                            fields["rope_stride"] = form.rope + 1
                    records = arena.room(memory.shape, np.uint8)
                    arena.protect()
                    call(
                        name,
                        "quantise_rows",
                        **fields,
                        records=records,
                        rows=len(nope),
                        numbers_f32=numbers_f32,
                        power_of_2=power_of_2,
                        block_size=block_of(form),
                        record_stride=stride if apart else 0,
                        page_stride=page,
                        isa=isa_number(name, isa),
                    ).check()
                    wrong = np.flatnonzero(records != memory)
                    assert wrong.size == 0, f"{isa} {flush} {apart}: byte {wrong[0]}"
                    arena.check()


def quantise(name: str, nope: np.ndarray, rope: np.ndarray, **fields: Any) -> np.ndarray:
    """Packed records, as the library writes them."""
    form = FORMS[name]
    memory = np.full((len(nope) + BLOCK) * (form.bytes + form.behind + 64), 0xFF, np.uint8)
    kernel(name).quantise_rows(
        nope=joined(nope, rope),
        records=memory,
        rows=len(nope),
        numbers_f32=int(nope.dtype == F32),
        block_size=block_of(form),
        **fields,
    ).check()
    return memory


def dequantise(name: str, memory: np.ndarray, rows: int, numbers_f32: int, **fields: Any) -> Any:
    """nope and rope, as the library reads them."""
    form = FORMS[name]
    out = np.empty((rows, form.dk + form.rope), number_type(name, numbers_f32))
    kernel(name).dequantise_rows(
        nope=out, records=memory, rows=rows, numbers_f32=numbers_f32, block_size=block_of(form),
        **fields,
    ).check()  # fmt: skip
    return out[:, : form.dk], out[:, form.dk :]


@pytest.mark.parametrize("power_of_2", [0, 1])
@each(NAMES)
def test_there_and_back_is_within_half_a_step(name, power_of_2):
    form = FORMS[name]
    rng = np.random.default_rng(3)
    nope = rng.standard_normal((40, form.dk)).astype(np.float32)
    rope = rope_of(form, F32, 40)
    memory = quantise(name, nope, rope, power_of_2=power_of_2)
    back, _ = dequantise(name, memory, 40, 1)
    for t in range(form.tiles):
        tile = slice(t * form.tile, (t + 1) * form.tile)
        x, y = nope[:, tile].astype(np.float64), back[:, tile].astype(np.float64)
        most = abs(x).max(axis=1, keepdims=True)
        step = most / (127 if form.element == I8 else 448) * (2 if power_of_2 else 1)
        step *= 1 + 2.0**-7  # scales of 16 bits are rounded up, and powers always
        if form.scale == E8M0 and not power_of_2:
            step *= 2
        if form.element == E4M3:  # 3 bits behind the first; subnormal from 2^-6
            step = np.maximum(abs(x) * 2.0**-3, step * 2.0**-9)
        assert (abs(x - y) <= step / 2 * (1 + 1e-6)).all()


@each(["i8_656", "odd", "after"])
def test_int8_with_powers_of_two_is_the_same_the_second_time(name):
    """What was read back has the same largest code but for its power: 64 .. 127."""
    form = FORMS[name]
    rng = np.random.default_rng(4)
    nope = (rng.standard_normal((64, form.dk)) * np.exp(3 * rng.standard_normal((64, 1)))).astype(
        np.float32
    )
    rope = np.ones((64, form.rope), np.float32)
    memory = quantise(name, nope, rope, power_of_2=1)
    for numbers_f32 in (0, 1):
        again = quantise(name, *dequantise(name, memory, 64, numbers_f32), power_of_2=1)
        assert (again == memory).all()


def test_the_control_one_step_more_is_noticed():
    """The oracle's bytes differ for a number that is one unit away from a tie."""
    form = FORMS["i8_656"]
    x = np.zeros((1, 512), np.float32)
    x[0, :2] = 127, 0.5
    y = x.copy()
    y[0, 1] = np.nextafter(np.float32(0.5), np.float32(1))
    rope = np.zeros((1, 64), np.float32)
    assert encode(form, x, rope, False)[0][0, 1] == 0
    assert encode(form, y, rope, False)[0][0, 1] == 1
    assert quantise("i8_656", x, rope)[1] == 0
    assert quantise("i8_656", y, rope)[1] == 1


def test_the_oracle_on_cases_worked_out_by_hand():
    form = FORMS["i8_656"]
    x = np.zeros((1, 512), np.float32)
    x[0, :4] = 254, -1, 1, 3  # scale 2: 127, -0.5 -> 0, 0.5 -> 0, 1.5 -> 2
    x[0, 128] = np.inf
    record, _ = encode(form, x, np.zeros((1, 64), BF16), False)
    assert record[0, :4].view(np.int8).tolist() == [127, 0, 0, 2]
    assert record[0, 640:648].tobytes() == struct.pack("<fI", 2.0, 0x7FC00000)
    assert record[0, 128] == 0
    v4 = FORMS["fp8_v4"]
    x = np.zeros((1, 448), np.float32)
    x[0, :3] = 448, 449, 0.5  # scale 2: 1.0 would be too small
    _, behind = encode(v4, x, np.zeros((1, 64), BF16), False)
    assert behind[0].tolist() == [128, 0, 0, 0, 0, 0, 0, 0]
    assert power_above(np.float32([1, 1.5, 2, 2.1, 0])).tolist() == [1, 2, 2, 4, 0]


# ---- dequantise ----------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -3.0, 1e-45, -1e-45, 1e-39, 2.0**-126, 3e38, -3e38, np.inf, -np.inf,
           np.nan, 1 / 3]  # fmt: skip


def special_scales(form: Form) -> np.ndarray:
    """As they are stored, one after another: all that E8M0 has."""
    if form.scale == E8M0:
        return np.arange(256, dtype=np.uint8)
    with np.errstate(all="ignore"):
        values = np.asarray(SPECIAL, np.float64).astype(form.scale)
    smallest = np.asarray([1, 0x8001], f"u{form.scale.itemsize}").view(form.scale)
    return np.concatenate([values, smallest])


@BOTH_TYPES
@each(NAMES)
def test_all_codes_times_special_scales(name, numbers_f32):
    """Each of the 256 codes under each scale, in each place of a tile."""
    form, dtype = FORMS[name], number_type(name, numbers_f32)
    stored = special_scales(form)
    rows = 256 * -(-len(stored) // form.tiles)
    record = np.zeros((rows, form.bytes), np.uint8)
    behind = np.full((rows, form.behind), 0x55, np.uint8)
    codes = np.arange(256, dtype=np.int64)[:, None] + 37 * np.arange(form.dk)
    record[:, : form.dk] = np.tile(codes % 256, (rows // 256, 1))
    holder = behind if form.behind else record
    size = form.scale.itemsize
    for group in range(rows // 256):
        some = stored[(group * form.tiles + np.arange(form.tiles)) % len(stored)]
        holder[group * 256 : group * 256 + 256, form.scale_at :][:, : form.tiles * size] = (
            some.view(np.uint8)
        )
    width = form.rope * form.rope_type.itemsize
    rope = rope_of(form, form.rope_type, rows) if form.rope else np.zeros((rows, 0), BF16)
    record[:, form.rope_at :][:, :width] = np.ascontiguousarray(rope).view(np.uint8)
    want = decode(form, record, behind, dtype)
    memory = pages(form, record, behind, BLOCK)
    for isa in ISAS_HERE:
        for flush in ("left", "right"):
            with Arena(flush) as arena:
                fields = {
                    "records": arena.place(memory),
                    "nope": arena.room((rows, form.dk), dtype),
                }
                if form.rope:
                    fields["rope"] = arena.room((rows, form.rope), dtype)
                arena.protect()
                call(
                    name,
                    "dequantise_rows",
                    **fields,
                    rows=rows,
                    numbers_f32=numbers_f32,
                    block_size=block_of(form),
                    isa=isa_number(name, isa),
                ).check()
                for part, exact in zip(("nope", "rope"), want, strict=True):
                    if exact.size:
                        assert_same(fields[part], exact)
                arena.check()


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """In every bit; one NaN is like another."""
    bits = f"u{want.dtype.itemsize}"
    same = np.ascontiguousarray(got).view(bits) == np.ascontiguousarray(want).view(bits)
    same |= np.isnan(got) & np.isnan(want)
    assert same.all(), f"{np.argwhere(~same)[0]}: {got[~same][0]}, not {want[~same][0]}"


def test_strides_of_dequantised_rows_leave_what_is_between():
    form, rows = FORMS["odd"], 7
    nope, rope = numbers_of(form, F32, form.dk)[:rows], rope_of(form, F32, rows)
    record, behind = encode(form, nope, rope, False)
    memory = pages(form, record, behind, 0, stride=form.bytes + 4)
    out, rotary = np.full((rows, 40), 0xFF, np.uint16), np.full((rows, 9), 0xFF, np.uint16)
    kernel("odd").dequantise_rows(
        records=memory, nope=out, rope=rotary, rows=rows, nope_stride=40, rope_stride=9,
        record_stride=form.bytes + 4,
    ).check()  # fmt: skip
    want = decode(form, record, behind, BF16)
    assert_same(out[:, :33].copy().view(BF16), want[0])
    assert_same(rotary[:, :5].copy().view(BF16), want[1])
    assert (out[:, 33:] == 0xFF).all() and (rotary[:, 5:] == 0xFF).all()


# ---- append --------------------------------------------------------------------------------------


class Cache:
    """A cache of the oracle's, its bytes 0xff until a token is written."""

    def __init__(self, name: str, batch: int, tokens: int, heads: int, paged: bool, seed: int = 0):
        self.form, self.name, self.heads, self.paged = FORMS[name], name, heads, paged
        rng = np.random.default_rng(seed)
        self.block = 5 if paged else tokens
        self.max_blocks = -(-tokens // self.block)
        self.blocks = batch * self.max_blocks + 2 if paged else batch
        order = rng.permutation(self.blocks)[: batch * self.max_blocks] if paged else None
        self.table = order.reshape(batch, -1).astype(np.int32) if paged else None
        self.page = self.form.page_bytes(self.block, heads * self.form.bytes)
        self.memory = np.full((self.blocks, self.page), 0xFF, np.uint8)

    def write(self, b: int, token: int, record: np.ndarray, behind: np.ndarray) -> None:
        """Token of a batch: [heads][bytes]."""
        outer = self.table[b, token // self.block] if self.paged else b
        slot = token % self.block if self.paged else token
        page, row = self.memory[outer], self.heads * self.form.bytes
        page[slot * row :][:row] = record.reshape(-1)
        if self.form.behind:
            page[self.block * row + slot * self.form.behind :][: self.form.behind] = behind[0]

    def fields(self) -> dict[str, Any]:
        if not self.paged:
            return {"layout_kv": 0, "seq_kv": self.block, "heads_kv": self.heads}
        return {
            "layout_kv": kernel(self.name).constants["HL_LAYOUT_PA_BSND"],
            "heads_kv": self.heads,
            "num_blocks": self.blocks,
            "block_size": self.block,
            "max_blocks": self.max_blocks,
        }


def ways() -> list[tuple[str, bool, int]]:
    """(name, paged, heads)."""
    return [
        (name, paged, heads)
        for name, form in FORMS.items()
        for paged in ([True] if form.behind else [False, True])
        for heads in ([1] if form.behind else [1, 2])
    ]


@pytest.mark.parametrize("name,paged,heads", ways())
def test_append_by_token_or_at_once_writes_the_oracles_bytes(name, paged, heads):
    """Several batches, from positions of their own, so many rows as each of them has; the same
    bytes one at a time; all others stay as they are."""
    form, dtype = FORMS[name], number_type(name, 0)
    batch, rows, tokens = 3, 7, 23
    rng = np.random.default_rng(heads)
    all_of_it = numbers_of(form, dtype, form.dk)
    nope = all_of_it[rng.integers(len(all_of_it), size=batch * rows * heads)]
    nope = nope.reshape(batch, rows, heads, form.dk)
    rope = rope_of(form, dtype, batch * rows * heads).reshape(batch, rows, heads, form.rope)
    positions = np.asarray([3, -1, tokens - rows], np.int32)  # of no new row: not read
    lengths = np.asarray([4, 0, 7], np.int32)
    want = Cache(name, batch, tokens, heads, paged)
    for b in range(batch):
        for i in range(lengths[b]):
            want.write(b, positions[b] + i, *encode(form, nope[b, i], rope[b, i], False))
    for isa in ISAS_HERE:
        for at_once in (True, False):
            with Arena("right" if at_once else "left") as arena:
                cache = arena.room(want.memory.shape, np.uint8)
                fields = want.fields()
                if paged:
                    fields["block_table"] = arena.place(want.table)
                parts = [(lengths, positions, slice(None))]
                if not at_once:
                    parts = [
                        (
                            (lengths > i).astype(np.int32),
                            (positions + i).astype(np.int32),
                            slice(i, i + 1),
                        )
                        for i in range(rows)
                    ]
                apart = form.rope > 0 and not at_once
                for n, first, which in parts:
                    some = nope[:, which].copy(), rope[:, which].copy()
                    numbers = some[0] if apart else np.concatenate(some, axis=-1)
                    call(
                        name,
                        "append",
                        nope=arena.place(numbers),
                        rope=arena.place(some[1]) if apart else None,
                        key=cache,
                        positions=arena.place(first),
                        lengths=arena.place(n),
                        batch=batch,
                        rows=numbers.shape[1],
                        isa=isa_number(name, isa),
                        **fields,
                    ).check()
                arena.check()
                assert (cache == want.memory).all(), f"{isa} at once {at_once}"


def test_append_reads_only_entries_that_it_needs():
    """A table that ends behind the last one; others name no block."""
    form, dtype = FORMS["fp8_v4"], BF16
    nope, rope = numbers_of(form, dtype, form.dk)[:6], rope_of(form, dtype, 6)
    want = Cache("fp8_v4", 1, 20, 1, True)
    table = np.full((1, 4), -7, np.int32)
    table[0, 1:3] = want.table[0, 1:3]
    for i in range(6):
        want.write(0, 7 + i, *encode(form, nope[i : i + 1], rope[i : i + 1], False))
    cache = np.full(want.memory.shape, 0xFF, np.uint8)
    fields = {**want.fields(), "block_table": table, "positions": np.asarray([7], np.int32)}
    kernel("fp8_v4").append(
        nope=nope, rope=rope, key=cache, batch=1, rows=6, **fields
    ).check()  # fmt: skip
    assert (cache == want.memory).all()


def test_append_takes_strides_and_float_numbers():
    """[B][N2][S] instead of [B][S][N2]; a cache whose rows and batches are further apart."""
    form, name = FORMS["wide"], "wide"
    nope = numbers_of(form, F32, form.dk)[:12].reshape(2, 2, 3, form.dk)  # B, N2, S
    rope = rope_of(form, F32, 12).reshape(2, 2, 3, form.rope)
    cache = np.full((2, 1000), 0xFF, np.uint8)
    want = cache.copy()
    for b in range(2):
        for h in range(2):
            for i in range(3):
                record, _ = encode(form, nope[b, h, i : i + 1], rope[b, h, i : i + 1], True)
                want[b, (b + i) * 100 + h * 48 :][: form.bytes] = record[0]
    kernel(name).append(
        nope=nope, rope=rope, key=cache, positions=np.asarray([0, 1], np.int32), batch=2, rows=3,
        heads_kv=2, seq_kv=4, numbers_f32=1, power_of_2=1, nope_stride=(96, 16, 48),
        rope_stride=(24, 4, 12), key_stride=(1000, 100, 48),
    ).check()  # fmt: skip
    assert (cache == want).all()


# ---- convert -------------------------------------------------------------------------------------


@each(SWAPPED)
def test_convert_is_the_oracles_order_and_its_own_inverse(name):
    form, rows = FORMS[name], 9
    record = np.random.default_rng(0).integers(0, 256, (rows, form.bytes), np.uint8)
    for stride in (form.bytes, form.bytes + 8):
        for flush in ("left", "right"):
            with Arena(flush) as arena:
                size = ((rows - 1) * stride + form.bytes,)
                there, back = arena.room(size, np.uint8), arena.room(size, np.uint8)
                start = arena.place(pages(form, record, record[:, :0], 0, stride))
                steps = {"rows": rows, "from_stride": stride, "to_stride": stride}
                call(name, "convert", **{"from": start}, to=there, **steps).check()
                assert (there == pages(form, swap(form, record), record[:, :0], 0, stride)).all()
                call(name, "convert", **{"from": there}, to=back, back=1, **steps).check()
                assert (back == start).all()
                arena.check()


@each([name for name in NAMES if name not in SWAPPED])
def test_convert_is_not_there_where_there_is_no_other_order(name):
    with pytest.raises(TypeError, match="has no convert"):
        kernel(name).convert()
    assert f"{kernel(name).name}_convert" not in text(name)


def test_the_two_orders_of_656_bytes_are_each_others():
    """The same numbers, as int8 records read by the other header's order of fields."""
    a, b = FORMS["i8_656"], FORMS["fp8_656"]
    record = np.random.default_rng(0).integers(0, 256, (3, 656), np.uint8)
    assert (swap(b, swap(a, record)) == record).all()


# ---- refusals ------------------------------------------------------------------------------------

P64 = 2**62


def base(name: str, routine: str) -> dict[str, Any]:
    """A call that is accepted, with arrays of its own. Of append: two batches, three rows each."""
    form = FORMS[name]
    i32 = np.int32
    some = {"block_size": BLOCK} if form.behind else {}
    numbers = np.zeros((6, form.dk + form.rope + 1), np.uint16)
    records = np.full(4 * form.page_bytes(8), 0xFF, np.uint8)
    if routine == "convert":
        return {"from": np.zeros(6 * form.bytes + 8, np.uint8), "to": records, "rows": 6}
    if routine == "append":
        table = np.asarray([[0, 1], [2, 3]], i32)
        pa = kernel(name).constants["HL_LAYOUT_PA_BSND"]
        paged = {"layout_kv": pa, "block_table": table, "num_blocks": 4, "max_blocks": 2}
        return {
            "nope": numbers,
            "key": records,
            "positions": np.asarray([3, 2], i32),
            "lengths": np.asarray([2, 3], i32),
            "batch": 2,
            "rows": 3,
            **({**paged, "block_size": 4} if form.behind else {"seq_kv": 8}),
        }
    return {"nope": numbers, "records": records, "rows": 6, **some}


def shifted(name: str, by: int = 1) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The same array, not aligned."""
    return lambda f: {name: f[name].ctypes.data + by}


def table(*rows: tuple[int, int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {"block_table": np.asarray(rows, np.int32)}


def array(name: str, *values: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda _: {name: np.asarray(values, np.int32)}


Bad = tuple[str, str, Any, str, str, str, tuple[int, ...], int, int]
PTR_MAX = 2**63 - 1
# name, routine, change, argument, status, rule, position, value, limit
BAD: list[Bad] = [
    # Rows one after another.
    *(
        bad
        for routine in ("quantise_rows", "dequantise_rows")
        for bad in (
            ("i8_656", routine, {"rows": -1}, "ROWS", "SHAPE", "AT_LEAST", (), -1, 0),
            ("i8_656", routine, {"nope": None}, "NOPE", "NULL", "NOT_NULL", (), 0, 0),
            ("i8_656", routine, {"records": None}, "RECORDS", "NULL", "NOT_NULL", (), 0, 0),
            ("i8_656", routine, {"numbers_f32": 2}, "NUMBERS_F32", "SHAPE", "AT_MOST", (), 2, 1),
            ("i8_656", routine, {"nope_stride": -576}, "NOPE_STRIDE", "SHAPE", "AT_LEAST", (),
             -576, 576),
            ("i8_656", routine, {"nope_stride": 575}, "NOPE_STRIDE", "SHAPE", "AT_LEAST", (), 575,
             576),
            ("i8_656", routine, {"rope_stride": 63}, "ROPE_STRIDE", "SHAPE", "AT_LEAST", (), 63,
             64),
            ("i8_656", routine, {"record_stride": -4}, "RECORD_STRIDE", "SHAPE", "AT_LEAST", (),
             -4, 656),
            ("i8_656", routine, {"record_stride": 652}, "RECORD_STRIDE", "SHAPE", "AT_LEAST", (),
             652, 656),
            ("i8_656", routine, {"record_stride": 658}, "RECORD_STRIDE", "SHAPE", "MULTIPLE_OF",
             (), 658, 4),
            ("i8_656", routine, {"record_stride": P64}, "RECORDS", "SHAPE", "ADDRESSABLE", (),
             PTR_MAX, PTR_MAX),
            ("i8_656", routine, {"nope_stride": P64}, "NOPE", "SHAPE", "ADDRESSABLE", (), PTR_MAX,
             PTR_MAX),
            ("i8_656", routine, {"block_size": 16}, "BLOCK_SIZE", "UNSUPPORTED", "NULL", (), 16,
             0),
            ("i8_656", routine, {"page_stride": 16}, "PAGE_STRIDE", "UNSUPPORTED", "NULL", (), 16,
             0),
            ("i8_656", routine, shifted("nope"), "NOPE", "ALIGN", "MULTIPLE_OF", (), 1, 2),
            ("i8_656", routine, shifted("records", 2), "RECORDS", "ALIGN", "MULTIPLE_OF", (), 2,
             4),
            ("i8_656", routine, {"isa": 99}, "ISA", "UNSUPPORTED", "GENERATED", (), 99, 0),
            ("i8_656", routine, {"isa": -1}, "ISA", "UNSUPPORTED", "GENERATED", (), -1, 0),
            ("norope", routine, lambda f: {"rope": f["nope"]}, "ROPE", "UNSUPPORTED", "NULL", (),
             1, 0),
            ("fp8_v4", routine, {"block_size": 0}, "BLOCK_SIZE", "SHAPE", "AT_LEAST", (), 0, 1),
            ("fp8_v4", routine, {"block_size": -2}, "BLOCK_SIZE", "SHAPE", "AT_LEAST", (), -2, 1),
            ("fp8_v4", routine, {"block_size": 2**31 - 1, "record_stride": P64}, "BLOCK_SIZE",
             "SHAPE", "ADDRESSABLE", (), PTR_MAX, PTR_MAX),
            ("fp8_v4", routine, {"page_stride": 4 * 584 - 2}, "PAGE_STRIDE", "SHAPE", "AT_LEAST",
             (), 4 * 584 - 2, 4 * 584),
            ("fp8_v4", routine, {"page_stride": 4 * 584 + 1}, "PAGE_STRIDE", "SHAPE",
             "MULTIPLE_OF", (), 4 * 584 + 1, 2),
        )
    ),
    ("i8_656", "quantise_rows", {"power_of_2": -1}, "POWER_OF_2", "SHAPE", "AT_MOST", (), -1, 1),
    ("i8_656", "quantise_rows", lambda f: {"records": f["nope"]}, "RECORDS", "ALIAS", "DISJOINT",
     (), 0, 0),
    ("i8_656", "quantise_rows", lambda f: {"rope": f["records"]}, "RECORDS", "ALIAS", "DISJOINT",
     (), 0, 0),
    ("i8_656", "dequantise_rows", lambda f: {"nope": f["records"]}, "NOPE", "ALIAS", "DISJOINT",
     (), 0, 0),
    ("i8_656", "dequantise_rows", lambda f: {"rope": f["nope"]}, "NOPE", "ALIAS", "DISJOINT", (),
     0, 0),
    # Append.
    ("i8_656", "append", {"batch": -1}, "BATCH", "SHAPE", "AT_LEAST", (), -1, 0),
    ("i8_656", "append", {"rows": -1}, "ROWS", "SHAPE", "AT_LEAST", (), -1, 0),
    ("i8_656", "append", {"heads_kv": -1}, "HEADS_KV", "SHAPE", "AT_LEAST", (), -1, 0),
    ("i8_656", "append", {"seq_kv": -1}, "SEQ_KV", "SHAPE", "AT_LEAST", (), -1, 0),
    ("i8_656", "append", {"layout_kv": 1}, "LAYOUT_KV", "UNSUPPORTED", "GENERATED", (), 1, 0),
    ("i8_656", "append", {"layout_kv": 7}, "LAYOUT_KV", "UNSUPPORTED", "GENERATED", (), 7, 0),
    ("i8_656", "append", array("block_table", 1), "BLOCK_TABLE", "UNSUPPORTED", "NULL", (), 1, 0),
    ("i8_656", "append", {"numbers_f32": 2}, "NUMBERS_F32", "SHAPE", "AT_MOST", (), 2, 1),
    ("i8_656", "append", {"power_of_2": 2}, "POWER_OF_2", "SHAPE", "AT_MOST", (), 2, 1),
    ("i8_656", "append", {"isa": 99}, "ISA", "UNSUPPORTED", "GENERATED", (), 99, 0),
    ("i8_656", "append", {"nope": None}, "NOPE", "NULL", "NOT_NULL", (), 0, 0),
    ("i8_656", "append", {"key": None}, "KEY", "NULL", "NOT_NULL", (), 0, 0),
    ("i8_656", "append", {"positions": None}, "POSITIONS", "NULL", "NOT_NULL", (), 0, 0),
    ("i8_656", "append", shifted("nope"), "NOPE", "ALIGN", "MULTIPLE_OF", (), 1, 2),
    ("i8_656", "append", shifted("key", 2), "KEY", "ALIGN", "MULTIPLE_OF", (), 2, 4),
    ("i8_656", "append", shifted("positions"), "POSITIONS", "ALIGN", "MULTIPLE_OF", (), 1, 4),
    ("i8_656", "append", shifted("lengths"), "LENGTHS", "ALIGN", "MULTIPLE_OF", (), 1, 4),
    ("i8_656", "append", lambda f: {"key": f["nope"]}, "KEY", "ALIAS", "DISJOINT", (), 0, 0),
    ("i8_656", "append", lambda f: {"lengths": f["key"].view(np.int32)}, "KEY", "ALIAS",
     "DISJOINT", (), 0, 0),
    ("i8_656", "append", {"nope_stride": (-1, 0, 0)}, "NOPE_STRIDE", "SHAPE", "AT_LEAST", (), -1,
     0),
    ("i8_656", "append", {"nope_stride": (0, 575, 0)}, "NOPE_STRIDE", "SHAPE", "AT_LEAST", (),
     575, 576),
    ("i8_656", "append", {"key_stride": (0, 652, 0)}, "KEY_STRIDE", "SHAPE", "AT_LEAST", (), 652,
     656),
    ("i8_656", "append", {"key_stride": (5264, 658, 0)}, "KEY_STRIDE", "SHAPE", "MULTIPLE_OF", (),
     658, 4),
    ("i8_656", "append", {"key_stride": (0, -4, 0)}, "KEY_STRIDE", "SHAPE", "AT_LEAST", (), -4,
     0),
    ("i8_656", "append", {"key_stride": (P64, P64, 0)}, "KEY_STRIDE", "SHAPE", "AT_LEAST", (),
     P64, None),
    ("i8_656", "append", array("positions", -1, 0), "POSITIONS", "LENGTH", "AT_LEAST", (0,), -1,
     0),
    ("i8_656", "append", array("positions", 6, 6), "POSITIONS", "LENGTH", "AT_MOST", (1,), 6, 5),
    ("i8_656", "append", array("lengths", 1, -1), "LENGTHS", "LENGTH", "AT_LEAST", (1,), -1, 0),
    ("i8_656", "append", array("lengths", 4, 1), "LENGTHS", "LENGTH", "AT_MOST", (0,), 4, 3),
    ("i8_656", "append", {"seq_kv": 2}, "POSITIONS", "LENGTH", "AT_MOST", (0,), 3, 0),
    # Append into pages.
    ("fp8_v4", "append", {"heads_kv": 2}, "HEADS_KV", "SHAPE", "EQUAL", (), 2, 1),
    ("fp8_v4", "append", {"layout_kv": 0}, "LAYOUT_KV", "UNSUPPORTED", "GENERATED", (), 0, 0),
    ("fp8_v4", "append", {"layout_kv": 1}, "LAYOUT_KV", "UNSUPPORTED", "GENERATED", (), 1, 0),
    ("fp8_v4", "append", {"block_size": 0}, "BLOCK_SIZE", "SHAPE", "AT_LEAST", (), 0, 1),
    ("fp8_v4", "append", {"num_blocks": -1}, "NUM_BLOCKS", "SHAPE", "AT_LEAST", (), -1, 0),
    ("fp8_v4", "append", {"max_blocks": -1}, "MAX_BLOCKS", "SHAPE", "AT_LEAST", (), -1, 0),
    ("fp8_v4", "append", {"max_blocks": 2**30}, "MAX_BLOCKS", "SHAPE", "AT_MOST", (), 2**30,
     (2**31 - 1) // 4),
    ("fp8_v4", "append", {"block_table": None}, "BLOCK_TABLE", "NULL", "NOT_NULL", (), 0, 0),
    ("fp8_v4", "append", shifted("block_table"), "BLOCK_TABLE", "ALIGN", "MULTIPLE_OF", (), 1, 4),
    ("fp8_v4", "append", table((0, 1), (-1, 3)), "BLOCK_TABLE", "BLOCK_ID", "AT_LEAST", (1, 0),
     -1, 0),
    ("fp8_v4", "append", table((0, 4), (2, 3)), "BLOCK_TABLE", "BLOCK_ID", "AT_MOST", (0, 1), 4,
     3),
    ("fp8_v4", "append", {"key_stride": (4 * 584 - 2, 0, 0)}, "KEY_STRIDE", "SHAPE", "AT_LEAST",
     (), 4 * 584 - 2, 4 * 584),
    ("fp8_v4", "append", array("positions", 0, 6), "POSITIONS", "LENGTH", "AT_MOST", (1,), 6, 5),
    ("norope", "append", lambda f: {"rope": f["nope"]}, "ROPE", "UNSUPPORTED", "NULL", (), 1, 0),
    # Convert.
    ("i8_656", "convert", {"rows": -1}, "ROWS", "SHAPE", "AT_LEAST", (), -1, 0),
    ("i8_656", "convert", {"back": 2}, "BACK", "SHAPE", "AT_MOST", (), 2, 1),
    ("i8_656", "convert", {"from": None}, "FROM", "NULL", "NOT_NULL", (), 0, 0),
    ("i8_656", "convert", {"to": None}, "TO", "NULL", "NOT_NULL", (), 0, 0),
    ("i8_656", "convert", shifted("from"), "FROM", "ALIGN", "MULTIPLE_OF", (), 1, 4),
    ("i8_656", "convert", shifted("to"), "TO", "ALIGN", "MULTIPLE_OF", (), 1, 4),
    ("i8_656", "convert", lambda f: {"to": f["from"]}, "TO", "ALIAS", "DISJOINT", (), 0, 0),
    ("i8_656", "convert", {"from_stride": 652}, "FROM_STRIDE", "SHAPE", "AT_LEAST", (), 652, 656),
    ("i8_656", "convert", {"to_stride": 658}, "TO_STRIDE", "SHAPE", "MULTIPLE_OF", (), 658, 4),
    ("i8_656", "convert", {"to_stride": -656}, "TO_STRIDE", "SHAPE", "AT_LEAST", (), -656, 656),
]  # fmt: skip


@pytest.mark.parametrize(
    "name,routine,change,argument,status,rule,position,value,limit", BAD,
    ids=[f"{b[1]}-{b[0]}-{b[3]}-{b[5]}-{i}" for i, b in enumerate(BAD)],
)  # fmt: skip
def test_bad_input(name, routine, change, argument, status, rule, position, value, limit):
    """Which argument, where, what and what it was held against; and nothing is written."""
    fields = base(name, routine)
    good = call(name, routine, **fields)
    assert good.ok, good.error_text
    fields = base(name, routine)
    fields_then = {**fields, **(change(fields) if callable(change) else change)}
    before = {n: a.copy() for n, a in fields.items() if isinstance(a, np.ndarray)}
    got = getattr(kernel(name), routine)(**fields_then)
    assert (got.status_name, got.argument, got.rule) == (f"HL_ERR_{status}", argument, rule)
    assert got.position == position
    assert got.value == value
    assert limit is None or got.limit == limit
    assert argument.lower() in got.error_text
    for n, a in before.items():
        assert (fields[n] == a).all(), f"{n} was written"


@pytest.mark.parametrize("routine", ["quantise_rows", "dequantise_rows", "append", "convert"])
def test_no_arguments_are_refused(routine):
    k = kernel("i8_656")
    error = k.Error()
    assert getattr(k, f"_c_{routine}")(None, ctypes.byref(error)) == k.constants["HL_ERR_NULL"]
    assert k.result(-1, error).argument == "ARGS"


@pytest.mark.parametrize("routine", ["quantise_rows", "dequantise_rows", "append", "convert"])
@each(["i8_656", "fp8_v4"])
def test_nothing_to_do_needs_no_memory(name, routine):
    k = kernel(name)
    if routine == "convert" and name not in SWAPPED:
        return
    fields: dict[str, Any] = {}
    if FORMS[name].behind:
        fields = {"block_size": 4}
        if routine == "append":
            fields["layout_kv"] = k.constants["HL_LAYOUT_PA_BSND"]
    getattr(k, routine)(**fields).check()
    if routine == "append":
        k.append(batch=3, **fields).check()
        k.append(rows=3, **fields).check()


@every_isa()
def test_an_instruction_set_that_is_not_here_is_refused(isa):
    """And one that is, is not: tiles use the words of AVX-512."""
    k = kernel("i8_656")
    k.quantise_rows(isa=isa_number("i8_656", isa)).check()
    absent = "avx2" if "neon" in ISAS_HERE else "neon"
    got = k.quantise_rows(isa=isa_number("i8_656", absent))
    assert (got.argument, got.rule) == ("ISA", "GENERATED")


def test_writing_rows_asks_nobody_for_tiles():
    """The question is a system call: a token's few hundred nanoseconds have no room for it."""
    code = text("i8_656")
    body = code[code.index("_words(int32_t asked)") :]
    body = body[: body.index("\n}\n")]
    assert "asked == HL_ISA_AMX && hl_runs_amx()" in body
    assert body.count("hl_runs_amx") == 1


# ---- AArch64 -------------------------------------------------------------------------------------

ARM_PROGRAM = """\
#include <stdio.h>
#include <stdlib.h>
#include "header.h"
#define JOIN(a, b) JOINED(a, b)
#define JOINED(a, b) a##b
int main(void)
{
    enum { ROWS = NUMBER_OF_ROWS, IN = ROWS * WIDTH * NUMBER, OUT = ROWS * WIDTH * 4 };
    static _Alignas(16) char numbers[IN], records[SIZE], out[OUT];
    hl_error error;
    if (fread(numbers, 1, IN, stdin) != IN) return 1;
    for (int isa = HL_ISA_SCALAR; isa <= HL_ISA_NEON; isa++) {
        for (int power = 0; power < 2; power++) {
            hl_kv_quantise_args q = {0};
            hl_kv_dequantise_args d = {0};
            for (int i = 0; i < SIZE; i++) records[i] = (char)0xff;
            q.nope = numbers;
            q.records = records;
            q.rows = ROWS;
            q.numbers_f32 = NUMBER == 4;
            q.power_of_2 = power;
            q.block_size = BLOCK_SIZE;
            q.isa = isa;
            if (JOIN(KERNEL, _quantise_rows)(&q, &error) != HL_OK) return 2;
            d.records = records;
            d.nope = out;
            d.rows = ROWS;
            d.numbers_f32 = 1;
            d.block_size = BLOCK_SIZE;
            d.isa = isa;
            if (JOIN(KERNEL, _dequantise_rows)(&d, &error) != HL_OK) return 3;
            if (fwrite(records, 1, SIZE, stdout) != SIZE) return 4;
            if (fwrite(out, 1, OUT, stdout) != OUT) return 4;
        }
    }
    return 0;
}
"""


@BOTH_TYPES
@each(NAMES)
def test_neon_writes_and_reads_the_same_bytes(name, numbers_f32):
    """Under qemu: plain C99 and NEON, both ways of rounding scales, and the way back."""
    need_aarch64()
    form, dtype = FORMS[name], number_type(name, numbers_f32)
    nope = numbers_of(form, dtype, form.dk)
    rope = rope_of(form, dtype, len(nope))
    memory = [pages(form, *encode(form, nope, rope, bool(p)), BLOCK) for p in (0, 1)]
    defines = {
        "KERNEL": kernel(name).name,
        "NUMBER_OF_ROWS": len(nope),
        "WIDTH": form.dk + form.rope,
        "NUMBER": dtype.itemsize,
        "SIZE": memory[0].size,
        "BLOCK_SIZE": block_of(form),
    }
    program = bind.compile_c(
        {"header.h": text(name), "rows.c": ARM_PROGRAM},
        compiler=AARCH64,
        flags=("-O1", *(f"-D{key}={value}" for key, value in defines.items())),
        suffix=".bin",
    )
    run = subprocess.run(
        [*QEMU, str(program)], input=joined(nope, rope).tobytes(), capture_output=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    got = np.frombuffer(run.stdout, np.uint8).reshape(2, 2, -1)
    for p in (0, 1):
        record, behind = encode(form, nope, rope, bool(p))
        want = np.concatenate(decode(form, record, behind, F32), axis=1)
        for isa in (0, 1):
            assert (got[isa, p, : memory[p].size] == memory[p]).all()
            assert_same(got[isa, p, memory[p].size :].copy().view(F32).reshape(want.shape), want)
