"""Records of a quantised cache, byte by byte: slow, in NumPy, and nothing of the generated code.

A Form says where a record's fields lie, in literals. `encode` is what quantise_rows has to write,
`decode` what dequantise_rows has to read.
"""

from dataclasses import dataclass

import ml_dtypes
import numpy as np

BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)
F32 = np.dtype(np.float32)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E8M0 = np.dtype(np.uint8)  # 2^(code - 127), 255 is NaN
I8 = np.dtype(np.int8)

LIMIT = {I8: 127.0, E4M3: 448.0}
TINY = np.float32(2.0**-80)


@dataclass(frozen=True)
class Form:
    """One record: where what lies, in bytes."""

    element: np.dtype
    dk: int
    tile: int
    scale: np.dtype
    scale_at: int  # from the row's start, or from the start of what the row has behind its page
    bytes: int
    rope_at: int = 0
    rope: int = 0
    rope_type: np.dtype = BF16
    behind: int = 0  # bytes that a row has behind its page's rows: there are its scales
    page_multiple: int = 1
    align: int = 4

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
    """Rows of numbers: [rows][dk] and [rows][rope]."""
    holder = behind if form.behind else record
    size = form.scale.itemsize
    bits = holder[:, form.scale_at : form.scale_at + form.tiles * size].copy()
    if form.scale == E8M0:
        scale = np.where(bits == 255, np.nan, 2.0 ** (bits.astype(np.float64) - 127))
    else:
        scale = bits.view(form.scale)
    codes = record[:, : form.dk].copy().view(form.element).astype(np.float32)
    each = np.repeat(scale.astype(np.float32), form.tile, axis=1)[:, : form.dk]
    with np.errstate(all="ignore"):
        nope = (codes * each).astype(dtype)
    width = form.rope * form.rope_type.itemsize
    rope = record[:, form.rope_at : form.rope_at + width].copy().view(form.rope_type)
    return nope, rope if rope.dtype == dtype else rounded(rope, dtype)


def swap(form: Form, record: np.ndarray) -> np.ndarray:
    """The same with scales and rotary channels in each other's places."""
    fields = (
        (form.scale_at, form.tiles * form.scale.itemsize),
        (form.rope_at, form.rope * form.rope_type.itemsize),
    )
    (a, a_bytes), (b, b_bytes) = sorted(fields)
    cuts = np.split(record, (a, a + a_bytes, b, b + b_bytes), axis=1)
    return np.concatenate([cuts[i] for i in (0, 3, 2, 1, 4)], axis=1)
