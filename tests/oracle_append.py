"""What the decode operator's append has to write: slow, in NumPy, nothing of the generated code.

Rows of numbers [heads][channels] become bytes [heads][width], and scales of tokens. `decoded` is
the way back.
"""

import ml_dtypes
import numpy as np

F32, F16 = np.dtype(np.float32), np.dtype(np.float16)
BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
TYPES = {"f32": F32, "f16": F16, "bf16": BF16}
LIMIT = {"i8": 127.0, "e4m3": 448.0}
TINY = np.float32(2.0**-80)
NAN = np.float32(np.nan)


def group_of(kind: str) -> int:
    """Channels that share a scale of int4; 0: not int4."""
    return int(kind[3:]) if kind.startswith("i4_") else 0


def width(kind: str, channels: int) -> int:
    """Bytes of a row."""
    if group_of(kind):
        return -(-channels // 4) * 2 + 2 * -(-channels // group_of(kind))
    return channels * (TYPES[kind].itemsize if kind in TYPES else 1)


def as_codes(kind: str, y: np.ndarray) -> np.ndarray:
    """To nearest even, saturated; bytes."""
    nan = np.isnan(y)
    if kind == "i8":
        whole = np.rint(np.clip(np.where(nan, 0, y), -128, 127))
        return whole.astype(np.int8).view(np.uint8)
    some = np.clip(np.where(nan, 0, y), -448, 448).astype(E4M3).view(np.uint8)
    return np.where(nan, np.uint8(0x7F), some)


def given(kind: str, x: np.ndarray, scale: np.ndarray, offset: np.ndarray | float) -> np.ndarray:
    """x / scale - offset, all float32; by 0 nothing is divided: 0, or NaN if x is not finite."""
    with np.errstate(all="ignore"):
        none = scale == 0
        quotient = x / np.where(none, np.float32(1), scale)
        zero = np.where(np.isfinite(x), np.copysign(np.float32(0), quotient), NAN)
        return as_codes(kind, np.where(none, zero, quotient) - np.asarray(offset, F32))


def scale_of(x: np.ndarray, limit: float) -> np.float32:
    """Of all numbers of a token, or of a group."""
    most = abs(x).max(initial=0)
    if not np.isfinite(x).all():
        return NAN
    return np.float32(0) if most < TINY else most / np.float32(limit)


def shared(kind: str, x: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Codes of a token, and its scale."""
    scale = scale_of(x, LIMIT[kind])
    some = np.isfinite(scale) and scale > 0
    codes = as_codes(kind, x / scale if some else np.zeros_like(x))
    return codes, scale


def rounded_up(x: np.float32) -> np.float16:
    """The least float16 that is not below x; NaN where there is none."""
    with np.errstate(over="ignore"):
        near = np.float16(x)
        near = np.nextafter(near, np.float16(np.inf)) if np.float32(near) < x else near
    return near if np.isfinite(near) else np.float16(np.nan)


def packed(kind: str, x: np.ndarray) -> np.ndarray:
    """One row of int4."""
    n, group = len(x), group_of(kind)
    codes = np.zeros(-(-n // 4) * 4, np.int64)
    scales = []
    for at in range(0, n, group):
        part = x[at : at + group]
        scale = rounded_up(scale_of(part, 7))
        scales.append(0x7E00 if np.isnan(scale) else int(scale.view(np.uint16)))
        if scale > 0:
            codes[at : at + len(part)] = np.rint(part / np.float32(scale))
    halves = (codes & 15).reshape(-1, 2)
    both = (halves[:, 0] | halves[:, 1] << 4).astype(np.uint8)
    return np.concatenate([both, np.asarray(scales, "<u2").view(np.uint8)])


def encode(
    kind: str, x: np.ndarray, scale: np.ndarray | None = None, offset: np.ndarray | float = 0
) -> tuple[np.ndarray, np.float32 | None]:
    """Numbers [heads][channels] of a token: bytes, and with scale = None what goes into the
    tensor of scales."""
    if kind in TYPES:
        same = x.dtype == TYPES[kind]
        with np.errstate(all="ignore"):
            return (x if same else x.astype(F32).astype(TYPES[kind])).view(np.uint8), None
    numbers = x.astype(F32)
    if group_of(kind):
        return np.stack([packed(kind, row) for row in numbers]), None
    if scale is None:
        return shared(kind, numbers)
    return given(kind, numbers, scale, offset), None


def decoded(
    kind: str, stored: np.ndarray, channels: int, scale: np.ndarray | float = 1, offset=0.0
) -> np.ndarray:
    """The way back, float64."""
    stored = np.ascontiguousarray(stored)
    if kind in TYPES:
        return stored.view(TYPES[kind]).astype(np.float64)
    if group_of(kind):
        codes = stored[..., : -(-channels // 2)]
        halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)
        numbers = ((halves.astype(np.int64) ^ 8) - 8)[..., :channels]
        scales = np.ascontiguousarray(stored[..., -(-channels // 4) * 2 :]).view(np.float16)
        each = np.repeat(scales.astype(np.float64), group_of(kind), axis=-1)[..., :channels]
        return numbers * each
    numbers = stored.view(np.int8 if kind == "i8" else E4M3).astype(np.float64)
    return (numbers + offset) * scale
