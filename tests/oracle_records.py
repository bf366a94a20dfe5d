"""What the routines of a quantised cache have to write: slow, in NumPy, nothing of the generated
code. `encode` is what quantise_rows has to make, `decode` what dequantise_rows has to read."""

from dataclasses import dataclass

import numpy as np
from oracle import STORED, Record, field_bytes
from oracle import decode as numbers_of

BF16, F16, F32 = STORED["bf16"], STORED["f16"], STORED["f32"]
E4M3, E8M0, I8 = STORED["e4m3"], STORED["e8m0"], STORED["i8"]

LIMIT = {I8: 127.0, E4M3: 448.0}
TINY = np.float32(2.0**-80)


@dataclass(frozen=True)
class Form:
    """One record with the query's type known: where what lies, in bytes."""

    record: Record
    query: np.dtype

    def place(self, name: str) -> tuple[np.dtype, int, int]:
        """Type, count and first byte of a field: from the row's start, or from the start of what
        the row has behind its page. Nothing of it: a count of 0."""
        for fields in (self.record.fields, self.record.behind):
            at = 0
            for what, kind, count in fields:
                if what == name:
                    return self.query if kind == "query" else STORED[kind], count, at
                at += count * self.record.width(kind, self.query)
        return self.query, 0, 0

    @property
    def element(self) -> np.dtype:
        return self.place("nope")[0]

    @property
    def dk(self) -> int:
        return self.place("nope")[1]

    @property
    def rope(self) -> int:
        return self.place("rope")[1]

    @property
    def rope_type(self) -> np.dtype:
        return self.place("rope")[0]

    @property
    def rope_at(self) -> int:
        return self.place("rope")[2]

    @property
    def scale(self) -> np.dtype:
        return self.place("scale")[0]

    @property
    def scale_at(self) -> int:
        return self.place("scale")[2]

    @property
    def tile(self) -> int:
        return self.record.tile

    @property
    def bytes(self) -> int:
        return self.record.bytes_of(self.record.fields, self.query)

    @property
    def behind(self) -> int:
        """Bytes that a row has behind its page's rows: there are its scales."""
        return self.record.bytes_of(self.record.behind, self.query)

    @property
    def page_multiple(self) -> int:
        return self.record.page_multiple

    @property
    def align(self) -> int:
        return self.record.align(self.query)

    @property
    def tiles(self) -> int:
        return -(-self.dk // self.tile)

    def page_bytes(self, rows: int, stride: int = 0) -> int:
        """Of a page, packed."""
        all_of_it = rows * ((stride or self.bytes) + self.behind)
        return -(-all_of_it // self.page_multiple) * self.page_multiple


def power_above(x: np.ndarray) -> np.ndarray:
    """The least power of two that is not below x."""
    part, exponent = np.frexp(x)
    return np.ldexp(np.float32(1), exponent - (part == 0.5)).astype(np.float32) * (x > 0)


def rounded_up(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The least number of the type that is not below x."""
    near = x.astype(dtype)
    return np.where(near.astype(np.float32) < x, np.nextafter(near, dtype.type(np.inf)), near)


def scales(form: Form, numbers: np.ndarray, power_of_2: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of one tile a row: as they are stored, and as float32."""
    with np.errstate(all="ignore"):
        most = abs(numbers).max(axis=-1, initial=0)
        exact = np.where(most < TINY, np.float32(0), most / np.float32(LIMIT[form.element]))
        good = np.isfinite(numbers).all(axis=-1)
        exact = np.where(good, exact, np.float32(1))  # anything: it is replaced
        if power_of_2 or form.scale == E8M0:
            exact = power_above(exact)
        if form.scale == E8M0:
            code = np.where(exact > 0, np.frexp(exact)[1] - 1 + 127, 0)
            code = np.where(good, code, 255).astype(np.uint8)
            return code, np.where(good, exact, np.float32(np.nan))
        stored = rounded_up(exact, form.scale) if form.scale != F32 else exact
        good &= np.isfinite(stored.astype(np.float32))
        nan = {F32: 0x7FC00000, BF16: 0x7FC0, F16: 0x7E00}[form.scale]
        bits = stored.view(f"u{form.scale.itemsize}")
        stored = np.where(good, bits, bits.dtype.type(nan)).view(form.scale)
        return stored, stored.astype(np.float32)


def encode(
    form: Form, nope: np.ndarray, rope: np.ndarray | None, power_of_2: bool
) -> tuple[np.ndarray, np.ndarray]:
    """[rows][bytes] of records and [rows][behind] of what is behind the page's rows."""
    rows = len(nope)
    record = np.zeros((rows, form.bytes), np.uint8)
    behind = np.zeros((rows, form.behind), np.uint8)
    holder = behind if form.behind else record
    size = form.scale.itemsize
    for t in range(form.tiles):
        channels = slice(t * form.tile, min((t + 1) * form.tile, form.dk))
        numbers = nope[:, channels].astype(np.float32)
        stored, scale = scales(form, numbers, power_of_2)
        at = form.scale_at + t * size
        holder[:, at : at + size] = stored.reshape(rows, 1).view(np.uint8)
        with np.errstate(all="ignore"):
            some = (scale > 0)[:, None]
            quotient = np.where(some, numbers / np.where(some, scale[:, None], 1), 0)
        quotient = np.clip(quotient, -LIMIT[form.element], LIMIT[form.element])
        if form.element == I8:
            quotient = np.rint(quotient)
        record[:, channels] = quotient.astype(form.element).view(np.uint8)
    if form.rope:
        stored_rope = rope if rope.dtype == form.rope_type else rounded(rope, form.rope_type)
        width = form.rope * form.rope_type.itemsize
        rotary = np.ascontiguousarray(stored_rope).view(np.uint8).reshape(rows, width)
        record[:, form.rope_at : form.rope_at + width] = rotary
    return record, behind


def rounded(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """By way of float32, to nearest even."""
    with np.errstate(all="ignore"):
        return x.astype(np.float32).astype(dtype)


def decode(
    form: Form, record: np.ndarray, behind: np.ndarray, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of numbers: [rows][dk] and [rows][rope]; rotary bits as they are where types agree."""
    rows = np.concatenate([record, behind], axis=1)
    with np.errstate(all="ignore"):
        nope = numbers_of(rows, form.record, form.query)[:, : form.dk].astype(dtype)
    rope = field_bytes(rows, form.record, form.query).get("rope", np.zeros((len(rows), 0), dtype))
    return nope, rope.copy() if rope.dtype == dtype else rounded(rope, dtype)


def swap(form: Form, record: np.ndarray) -> np.ndarray:
    """The same with scales and rotary channels in each other's places."""
    fields = (
        (form.scale_at, form.tiles * form.scale.itemsize),
        (form.rope_at, form.rope * form.rope_type.itemsize),
    )
    (a, a_bytes), (b, b_bytes) = sorted(fields)
    cuts = np.split(record, (a, a + a_bytes, b, b + b_bytes), axis=1)
    return np.concatenate([cuts[i] for i in (0, 3, 2, 1, 4)], axis=1)
