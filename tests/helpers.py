"""The kernels that the tests run, and how results are held against the oracle."""

import functools
import platform
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from oracle import Args, Output, by_kv_head, plain, rows, sparse_flash_attention

from gen import bind, spec

ROOT = Path(__file__).resolve().parent.parent
BF16 = np.dtype(ml_dtypes.bfloat16)
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def isas_here() -> tuple[str, ...]:
    """What this processor says it runs, from the plainest to the best: not what a header found."""
    if platform.machine() == "aarch64":
        return ("scalar", "neon")
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return (
        "scalar",
        *(["avx2"] if flags >= AVX2 else []),
        *(["avx512"] if flags >= AVX512 else []),
    )


ISAS_HERE = isas_here()
BEST = ISAS_HERE[-1]
OP = "sparse_flash_attention"
BOTH, ALL = ["BSND", "TND"], ["BSND", "TND", "PA_BSND"]

# Kernels that only tests need: small, so that many shapes can be tried, and odd, so that every
# vector has a tail. The shipped ones come from gen/catalogue.toml.
SPECS: dict[str, dict[str, Any]] = {
    "f32_small": {"dtype": "f32", "dk": 15, "rope": 5, "dv": 7, "features": ["slots"]},
    "f16_small": {"dtype": "f16", "dk": 33, "rope": 3, "dv": 33, "features": ["slots"]},
    "bf16_small": {"dtype": "bf16", "dk": 32, "rope": 16, "dv": 32, "features": ["slots"]},
    "bf16_259": {"dtype": "bf16", "dk": 259, "rope": 0, "dv": 80},
    "f32_80": {"dtype": "f32", "dk": 80, "rope": 0, "dv": 80},
    "f16_128": {"dtype": "f16", "dk": 128, "rope": 0, "dv": 128},
    "f32_sleef": {"dtype": "f32", "dk": 24, "rope": 8, "dv": 24, "math": "sleef"},
    "f32_libm": {"dtype": "f32", "dk": 24, "rope": 8, "dv": 24, "math": "libm"},
    "bf16_sleef": {"dtype": "bf16", "dk": 40, "rope": 0, "dv": 17, "math": "sleef"},
    "bf16_libm": {"dtype": "bf16", "dk": 40, "rope": 0, "dv": 17, "math": "libm"},
}
LIBS = {"builtin": (), "sleef": ("-lsleef", "-lm"), "libm": ("-lm",)}


def table(name: str, **changes: Any) -> dict[str, Any]:
    """The generator's table of one of SPECS."""
    base = {"op": OP, "layout_q": BOTH, "layout_kv": ALL}
    return {**base, **SPECS[name], **changes}


@functools.cache
def header(name: str) -> Any:
    """The generator's Header of one of SPECS, or of a shipped header."""
    if name in SPECS:
        return spec.parse_header(table(name))
    return next(h for h in spec.load_catalogue() if h.name == name)


@functools.cache
def text(name: str) -> str:
    """The header's C text: the committed file for the shipped ones."""
    shipped = ROOT / "include" / f"{name}.h"
    return shipped.read_text() if shipped.is_file() else bind.header_text(header(name))


@functools.cache
def kernel(name: str) -> bind.Kernel:
    """The compiled kernel, once for the whole run."""
    math = SPECS.get(name, {}).get("math", "builtin")
    made = bind.load(text(name), libs=LIBS[math])
    made.dtype = bind.DTYPES[header(name).kernels[0].dtype]
    return made


@functools.cache
def shipped() -> tuple[str, ...]:
    """Names of the shipped headers of the operator."""
    return tuple(h.name for h in spec.load_catalogue() if all(k.op == OP for k in h.kernels))


# ---- the error rule -----------------------------------------------------------------------------


def sizes(a: Args) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each (row, head): the largest |scale| sum |q k| (how large a score was before its terms
    cancelled), the keys it sees, and for each channel sum p |v|: what rounding is relative to."""
    n_rows = int(np.prod(a.query.shape[:-2]))
    group = a.heads_q // a.heads_kv
    score = np.zeros((n_rows, a.heads_kv, group))
    keys = np.zeros((n_rows, a.heads_kv, group))
    value = np.zeros((n_rows, a.heads_q, a.dv))
    scale = float(np.float32(a.scale_value))
    with np.errstate(all="ignore"):
        for r in rows(a):
            q, k, v = (x.astype(np.float64) for x in (r.q, r.k, r.v))
            keys[r.row, r.n2] = len(k)
            if len(k) == 0:
                continue
            score[r.row, r.n2] = abs(scale) * (abs(q) @ abs(k).T).max(axis=1)
            s = scale * (q @ k.T)
            p = np.exp(s - s.max(axis=1, keepdims=True))
            value[r.row, r.n2 * group : (r.n2 + 1) * group] = (
                p @ abs(v) / p.sum(axis=1, keepdims=True)
            )
    return score, keys, value


def last_place(dtype: np.dtype) -> float:
    """Half a unit in the last place, relative."""
    return {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype.name]


def floor_of(dtype: np.dtype) -> float:
    """Half the smallest subnormal number."""
    return {"float32": 2.0**-150, "float16": 2.0**-25, "bfloat16": 2.0**-134}[dtype.name]


def absolute_slack(exact: np.ndarray, dtype: np.dtype) -> float:
    """FlashAttention's: what adding and subtracting 0.3 in the type costs, twice."""
    o = exact.astype(dtype)
    some = np.asarray(0.3, dtype)
    with np.errstate(all="ignore"):
        return float(2 * np.nanmax(abs(((o + some - some) - o).astype(np.float64)), initial=0.0))


def check_out(a: Args, got: np.ndarray, want: Output, dtype: np.dtype, strict: bool) -> None:
    """attention_out of one call against the error rule and against the bound of each element."""
    got, exact = got.astype(np.float64), want.out
    assert (np.isnan(got) == np.isnan(exact)).all(), "NaN where the oracle has none, or none there"
    bad = np.isnan(exact)
    error = np.where(bad, 0.0, abs(got - exact))
    reference = np.where(bad, 0.0, abs(plain(a).astype(np.float64) - exact))
    if not error.size:
        return
    score, keys, value = sizes(a)
    slack = absolute_slack(exact, dtype)
    if not strict:  # with few elements the plain implementation may be exact by luck: allow four
        # roundings of a score of that size, to which every float32 implementation is exposed
        slack += 4 * 2.0**-24 * (1 + score.max()) * value.max()
    assert error.max() <= 2 * reference.max() + slack, (
        f"largest error {error.max():.3g}, the plain implementation's {reference.max():.3g}"
    )
    assert error.mean() <= 1.5 * reference.mean() + slack, (
        f"mean error {error.mean():.3g}, the plain implementation's {reference.mean():.3g}"
    )
    check_bound(a, error, exact, dtype, score, keys, value)


def check_bound(
    a: Args,
    error: np.ndarray,
    exact: np.ndarray,
    dtype: np.dtype,
    score: np.ndarray,
    keys: np.ndarray,
    value: np.ndarray,
) -> None:
    """|error| <= u |o| + (4 delta + gamma) sum p |v|, for each element: delta bounds the error of a
    score summed in float32 in any order, gamma those of exp2, of rescaling and of the sums."""
    channels = a.query.shape[-1] + (0 if a.query_rope is None else a.query_rope.shape[-1])
    heads = (len(keys), a.heads_q, 1)
    delta = (channels + 8) * 2.0**-24 * score.reshape(heads)
    gamma = (2 * keys.reshape(heads) + 64) * 2.0**-24
    bound = (4 * delta + gamma) * np.exp(np.minimum(4 * delta, 50.0)) * value
    bound = (
        bound.reshape(exact.shape)
        + last_place(dtype) * (abs(exact) + bound.reshape(exact.shape))
        + 2 * floor_of(dtype)
        + keys.max(initial=0.0) * 2.0**-120
    )
    worst = np.nanmax(np.where(np.isnan(exact), 0.0, error / bound))
    assert worst <= 1.0, f"an element's error is {worst:.3g} times its bound"


def check_stats(a: Args, got: dict[str, np.ndarray], want: Output) -> None:
    """max, sum and lse within 1e-5 relative and 16 * 2^-24 of the score's size."""
    score, _, _ = sizes(a)
    size = by_kv_head(score, a)
    for name in ("max", "sum", "lse"):
        if got.get(f"softmax_{name}") is None:
            continue
        found, exact = got[f"softmax_{name}"].astype(np.float64), getattr(want, name)
        assert found.shape == exact.shape
        plain_ones = np.isfinite(exact)
        same = (found == exact) | (np.isnan(found) & np.isnan(exact))
        assert same[~plain_ones].all(), f"softmax_{name}: infinity or NaN is misplaced"
        relative = np.maximum(abs(exact), 1.0 if name == "lse" else 0.0)
        slack = 16 * 2.0**-24 * size
        slack = slack * relative if name == "sum" else slack
        with np.errstate(all="ignore"):
            excess = abs(found - exact) / (1e-5 * relative + slack + 1e-37)
        worst = np.max(np.where(plain_ones & ~same, excess, 0.0), initial=0.0)
        assert worst <= 1.0, f"softmax_{name}: {worst:.3g} times what is allowed"


def check(a: Args, got: dict[str, np.ndarray], dtype: np.dtype, strict: bool = False) -> Output:
    """All outputs of one call against the oracle; strict: enough elements for the error rule to
    need no slack but FlashAttention's."""
    want = sparse_flash_attention(a)
    check_out(a, got["attention_out"], want, dtype, strict)
    check_stats(a, got, want)
    return want


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Equal in every bit; all NaNs count as one."""
    x, y = np.asarray(x), np.asarray(y)
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.itemsize]
    both_nan = np.isnan(x.astype(np.float64)) & np.isnan(y.astype(np.float64))
    return x.shape == y.shape and bool(((x.view(bits) == y.view(bits)) | both_nan).all())
