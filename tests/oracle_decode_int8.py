"""What incre_flash_attention computes with int8 queries: slow, and meant to be read.

Everything but the exponential is exact, or rounded as it is defined. So the oracle says which codes
a weight may have when P is off by a few units in the last place: nearly always that is one code.
"""

from dataclasses import dataclass

import numpy as np

F32 = np.float32


@dataclass
class Scales:
    dequant1: float = 1e-3
    quant1: float = 127.0
    dequant2: float = 1e-2
    scale_value: float = 0.0


@dataclass
class Row:
    """One query against the keys that it sees: sums of codes times weights, at least and at most.
    They differ only where a weight lies next to the middle between two codes."""

    low: np.ndarray  # [DV], whole numbers
    high: np.ndarray
    keys: int
    nan: bool = False


def to_codes(x: np.ndarray) -> np.ndarray:
    """To the nearest whole number, ties to even; saturated."""
    return np.clip(np.rint(x), -128, 127).astype(np.int64)


def scores(q: np.ndarray, k: np.ndarray, pse: np.ndarray | None, c: Scales) -> np.ndarray:
    """s of each key in float32, every step rounded as it is defined."""
    with np.errstate(all="ignore"):
        whole = (k.astype(np.int64) @ q.astype(np.int64)).astype(F32)
        x = (whole * F32(c.dequant1)).astype(np.float16)
        s = x.astype(F32) * F32(c.scale_value if c.scale_value != 0 else 1.0)
        return s if pse is None else s + pse.astype(F32)


def attend(q: np.ndarray, k: np.ndarray, v: np.ndarray, pse: np.ndarray | None, c: Scales) -> Row:
    """One query [DK] against keys [n][DK] and values [n][DV], codes all of them."""
    none = np.zeros(v.shape[1], np.int64)
    s = scores(q, k, pse, c).astype(np.float64)
    if len(s) == 0 or s.max(initial=-np.inf) == -np.inf:
        return Row(none, none, 0)
    if np.isnan(s).any() or s.max() == np.inf:
        return Row(none, none, len(s), nan=True)
    below = s - s.max()
    p = np.exp(below) / np.exp(below).sum()
    # Of float32: the difference, its product with log2 e, 2^x, the sum, the division, the product.
    error = -np.where(np.isinf(below), 0, below) * 2.0**-21 + 2.0**-19
    with np.errstate(all="ignore"):
        ends = [to_codes(p * (1 + sign * error) * float(F32(c.quant1))) for sign in (-1, 1)]
    gone = below / np.log(2) < -125.9  # 2^x is 0 below 2^-126
    codes = np.array([np.where(gone & (side == 0), 0, e) for side, e in enumerate(ends)])
    products = codes[:, :, None] * v.astype(np.int64)[None]
    return Row(products.min(axis=0).sum(axis=0), products.max(axis=0).sum(axis=0), len(s))


def result(row: Row, c: Scales) -> tuple[np.ndarray, np.ndarray]:
    """The output in float32, at least and at most."""
    with np.errstate(all="ignore"):
        if row.nan:
            nan = np.full(len(row.low), np.nan, F32)
            return nan, nan
        ends = [x.astype(F32) * F32(c.dequant2) for x in (row.low, row.high)]
        return np.minimum(*ends), np.maximum(*ends)


def quantised(x: np.ndarray, scale: np.ndarray, offset: np.ndarray | None) -> np.ndarray:
    """int8 results: product and sum rounded to float32, then to the nearest code; of a NaN 0."""
    with np.errstate(all="ignore"):
        y = x * scale.astype(F32)
        y = y if offset is None else y + offset.astype(F32)
        return np.where(np.isnan(y), 0, np.clip(np.rint(np.nan_to_num(y)), -128, 127)).astype(int)
