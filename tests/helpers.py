"""The kernels that the tests run, and how results are held against the oracle."""

import dataclasses
import functools
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helpers_tiles
import ml_dtypes
import numpy as np
import pytest
from oracle import (
    RECORDS,
    Args,
    Output,
    Record,
    by_kv_head,
    decoded,
    plain,
    rows,
    sparse_flash_attention,
)

from gen import bind, formats, records, spec
from gen.isa import ISAS

ROOT = Path(__file__).resolve().parent.parent
BF16 = np.dtype(ml_dtypes.bfloat16)
AVX2 = {"avx2", "fma", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


# Tiles where the machine has none are emulated, from here to the end of the process: slower than
# hardware by a factor of some hundreds, exact in every bit, and it notices what hardware refuses.
TILES = helpers_tiles.install("granted")


def isas_here() -> tuple[str, ...]:
    """What this processor says it runs, or what is emulated on it, from the plainest to the best:
    not what a header found."""
    if platform.machine() == "aarch64":
        return ("scalar", "neon")
    found = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return (
        "scalar",
        *(["avx2"] if flags >= AVX2 else []),
        *(["avx512"] if flags >= AVX512 else []),
        *(["amx"] if flags >= AVX512 and TILES is not None else []),
    )


ISAS_HERE = isas_here()
WORDS_HERE = tuple(isa for isa in ISAS_HERE if not ISAS[isa].tiles)  # that have words of their own
OP = "sparse_flash_attention"
ANTIQUANT = "sparse_flash_attention_antiquant"
BOTH, ALL = ["BSND", "TND"], ["BSND", "TND", "PA_BSND"]

FEW_HEADS = 16  # on tiles: up to so many take another way through a block, or with float16 none

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
# And those of tests/test_amx.py: only the instruction sets that it compares, so that they compile
# quickly, which it does again and again with a defect in them. In whole columns of 32 channels
# rows can be loaded as tiles where they are; the others have to be copied.
ON_TILES = {"isa": ["avx512", "amx"], "layout_q": BOTH, "layout_kv": ALL}
TILE_SPECS: dict[str, dict[str, Any]] = {
    "bf16_whole": {"dtype": "bf16", "dk": 64, "rope": 32, "dv": 64, **ON_TILES},
    "bf16_joined": {"dtype": "bf16", "dk": 64, "rope": 0, "dv": 64, **ON_TILES},
    "bf16_half": {"dtype": "bf16", "dk": 32, "rope": 16, "dv": 32, **ON_TILES},
    "bf16_tails": {"dtype": "bf16", "dk": 33, "rope": 5, "dv": 17, **ON_TILES},
    "f16_tails": {"dtype": "f16", "dk": 33, "rope": 5, "dv": 33, **ON_TILES},
    "f16_whole": {"dtype": "f16", "dk": 64, "rope": 32, "dv": 64, **ON_TILES},
}


# Caches of records that only tests have, and their kernels: odd ones, so that every vector has a
# tail and every tile of a scale too, and each of those things that no shipped record has.
def field(name: str, kind: str, count: int) -> dict[str, Any]:
    return {"name": name, "type": kind, "count": count}


RECORD_TABLES: dict[str, dict[str, Any]] = {
    table["name"]: table
    for table in (
        {  # bfloat16 scales, three channels with the last one, a byte that fills up
            "name": "i8_tails",
            "fields": [
                field("nope", "i8", 33),
                field("pad", "bytes", 1),
                field("rope", "query", 5),
                field("scale", "bf16", 4),
            ],
            "tile": 10,
        },
        {  # rotary channels first and of a type of their own
            "name": "fp8_wide",
            "fields": [
                field("rope", "f32", 16),
                field("scale", "f16", 3),
                field("pad", "bytes", 2),
                field("nope", "e4m3", 48),
            ],
            "tile": 16,
        },
        {  # whole vectors of codes, which few heads read where they are; no rotary channels
            "name": "i8_alone",
            "fields": [field("scale", "f32", 3), field("nope", "i8", 96)],
            "tile": 32,
        },
        {  # as fp8_v4 in small
            "name": "fp8_page",
            "fields": [field("nope", "e4m3", 64), field("rope", "bf16", 32)],
            "tile": 32,
            "behind": [field("scale", "e8m0", 2), field("pad", "bytes", 2)],
            "page_multiple": 96,
            "dv": 96,
        },
        {  # such codes too, other numbers behind a page, and nothing that fills it up
            "name": "i8_page",
            "fields": [field("nope", "i8", 64), field("rope", "query", 6)],
            "tile": 32,
            "behind": [field("pad", "bytes", 4), field("scale", "f32", 2)],
        },
        {  # codes that few heads widen to bfloat16, and padding in two places
            "name": "fp8_codes",
            "fields": [
                field("pad", "bytes", 4),
                field("nope", "e4m3", 64),
                field("rope", "query", 3),
                field("pad", "bytes", 2),
                field("scale", "f32", 2),
            ],
            "tile": 32,
        },
    )
}
RECORD_SPECS: dict[str, dict[str, Any]] = {
    "f16_i8_tails": {"dtype": "f16", "kv": "i8_tails", "features": ["slots"]},
    "bf16_fp8_wide": {"dtype": "bf16", "kv": "fp8_wide", "dv": 21},
    "bf16_i8_alone": {"dtype": "bf16", "kv": "i8_alone"},
    "bf16_fp8_page": {"dtype": "bf16", "kv": "fp8_page", "features": ["slots"]},
    "f16_i8_page": {"dtype": "f16", "kv": "i8_page"},
    "bf16_fp8_codes": {"dtype": "bf16", "kv": "fp8_codes", "isa": ["scalar", "avx2", "avx512"]},
}
SMALL_RECORDS = tuple(RECORD_SPECS)
LIBS = {"builtin": (), "sleef": ("-lsleef", "-lm"), "libm": ("-lm",)}


def table(name: str, **changes: Any) -> dict[str, Any]:
    """The generator's table of one of SPECS, TILE_SPECS or RECORD_SPECS."""
    if name in RECORD_SPECS:
        return {"op": ANTIQUANT, **RECORD_SPECS[name], **changes}
    base = {"op": OP, "layout_q": BOTH, "layout_kv": ALL}
    return {**base, **(SPECS | TILE_SPECS)[name], **changes}


@functools.cache
def known_records() -> dict[str, Any]:
    """The generator's records, and those of the tests as it reads them."""
    own = {name: records.parse_record(table) for name, table in RECORD_TABLES.items()}
    return {**formats.RECORDS, **own}


def record_of(kv: str) -> Record | None:
    """What the oracle knows of a cache's rows."""
    return record_from(RECORD_TABLES[kv]) if kv in RECORD_TABLES else RECORDS.get(kv)


def record_from(table: dict[str, Any]) -> Record:
    """A caller's own record, from the table that the generator reads too."""
    fields, behind = (
        tuple((f["name"], f.get("type", "bytes"), f["count"]) for f in table.get(where, ()))
        for where in ("fields", "behind")
    )
    return Record(fields, table["tile"], behind, table.get("page_multiple", 1))


@functools.cache
def header(name: str) -> Any:
    """The generator's Header of one of these, or of a shipped header."""
    if name in SPECS or name in TILE_SPECS:
        return spec.parse_header(table(name))
    if name in RECORD_SPECS:
        return spec.parse_header(table(name), records=known_records())
    return next(h for h in spec.load_catalogue() if h.name == name)


def isas_in(name: str) -> tuple[str, ...]:
    """The instruction sets that one of these headers has and that run here: all of ISAS_HERE but
    tiles for float32, or what the header's table says."""
    return tuple(isa for isa in ISAS_HERE if isa in header(name).kernels[0].isa)


def best_in(name: str) -> str:
    """The one that plan chooses."""
    return isas_in(name)[-1]


def has_tiles(*names: str) -> list[tuple[str, str]]:
    """(name, instruction set with tiles) of headers that have one that runs here: what is to run
    on tiles beside a test's own kernels."""
    return [(name, isa) for name in names for isa in isas_in(name) if ISAS[isa].tiles]


def pairs(*names: str) -> list[tuple[str, str]]:
    """Every (name, instruction set) that there is, for tests that run one kernel on one of them."""
    return [(name, isa) for name in names for isa in isas_in(name)]


def by_pair(*names: str, also: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Parametrises name and isa: names on all that they have, and of `also` only what has tiles."""
    return pytest.mark.parametrize("name,isa", pairs(*names) + has_tiles(*also))


def enough_heads(name: str, isa: str, group: int) -> int:
    """At least `group` query heads on a kv head, and as many as it takes to run on tiles and not on
    the words that the kernel falls back to."""
    words_do_better = ISAS[isa].tiles and header(name).kernels[0].dtype == "f16"
    return max(group, FEW_HEADS + 1) if words_do_better else group


def groups_of(name: str, isa: str, few: int) -> tuple[int, ...]:
    """Numbers of heads by which a test sees every way through a block: `few`, and on tiles more
    than 16, which are another program there."""
    ways = (few, FEW_HEADS + 1) if ISAS[isa].tiles else (few,)
    return tuple(sorted({enough_heads(name, isa, group) for group in ways}))


def by_way(*names: str, few: int = 3) -> pytest.MarkDecorator:
    """Parametrises name, isa and group: every kernel, instruction set and way through a block."""
    ways = [(n, isa, g) for n, isa in pairs(*names) for g in groups_of(n, isa, few)]
    return pytest.mark.parametrize("name,isa,group", ways)


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
    made.record = record_of(header(name).kernels[0].kv)
    return made


@functools.cache
def shipped(op: str = OP) -> tuple[str, ...]:
    """Names of the shipped headers of an operator."""
    return tuple(h.name for h in spec.load_catalogue() if all(k.op == op for k in h.kernels))


SHIPPED_RECORDS = shipped(ANTIQUANT)


# ---- the error rule -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """What rounding is relative to, for each (row, head), and (value, spread) each channel."""

    score: np.ndarray  # largest |scale| sum |q k|: a score's size before its terms cancelled
    keys: np.ndarray  # keys that it sees
    value: np.ndarray  # sum p |v|
    spread: np.ndarray  # sum p |v - o|, o being the mean of v: what unequal weights can do to it


def sizes(a: Args) -> Sizes:
    """In float64, from the oracle's rows."""
    n_rows = int(np.prod(a.query.shape[:-2]))
    group = a.heads_q // a.heads_kv
    score = np.zeros((n_rows, a.heads_kv, group))
    keys = np.zeros((n_rows, a.heads_kv, group))
    value = np.zeros((n_rows, a.heads_q, a.dv))
    spread = np.zeros((n_rows, a.heads_q, a.dv))
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
            p /= p.sum(axis=1, keepdims=True)
            heads = slice(r.n2 * group, (r.n2 + 1) * group)
            value[r.row, heads] = p @ abs(v)
            if a.query.dtype == BF16:  # only there it is asked for
                for head, weight in enumerate(p):
                    spread[r.row, heads][head] = weight @ abs(v - weight @ v)
    return Sizes(score, keys, value, spread)


def on_tiles(a: Args, isa: str) -> bool:
    """Whether a call is computed on tiles: float16 with up to 16 heads is left to the words."""
    return ISAS[isa].tiles and (a.query.dtype == BF16 or a.heads_q // a.heads_kv > FEW_HEADS)


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the nearest bfloat16 number, ties away from zero; as float32."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x8000)) & np.uint32(0xFFFF0000)).view(np.float32)
    return np.where(np.isnan(x), np.float32(np.nan), rounded)


def as_computed(a: Args, isa: str) -> Args:
    """The call with the numbers that a kernel computes with: those of records are rounded to
    bfloat16 on tiles, for float16 queries to two such parts."""
    made = decoded(a)
    if a.record is None or not on_tiles(a, isa):
        return made
    high = to_bf16(made.key)
    if a.query.dtype == BF16:
        return dataclasses.replace(made, key=high)
    with np.errstate(all="ignore"):
        low = to_bf16(made.key - high)
        return dataclasses.replace(made, key=high.astype(np.float64) + low)


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


def check_out(
    a: Args, got: np.ndarray, want: Output, dtype: np.dtype, isa: str, strict: bool
) -> None:
    """attention_out of one call against the error rule and against the bound of each element."""
    size = sizes(a)
    bound = bound_of(a, want.out, dtype, isa, size)
    check_errors(got, want.out, plain(a), size, bound, dtype, strict)


def check_errors(
    got: np.ndarray,
    exact: np.ndarray,
    reference: np.ndarray,
    size: Sizes,
    bound: np.ndarray,
    dtype: np.dtype,
    strict: bool,
) -> None:
    """An output against the error rule, with what the plain implementation got as reference, and
    against the bound of each element."""
    got = got.astype(np.float64)
    assert (np.isnan(got) == np.isnan(exact)).all(), "NaN where the oracle has none, or none there"
    bad = np.isnan(exact)
    error = np.where(bad, 0.0, abs(got - exact))
    reference = np.where(bad, 0.0, abs(reference.astype(np.float64) - exact))
    if not error.size:
        return
    slack = absolute_slack(exact, dtype)
    if not strict:  # with few elements the plain implementation may be exact by luck: allow four
        # roundings of a score of that size, to which every float32 implementation is exposed
        slack += 4 * 2.0**-24 * (1 + size.score.max()) * size.value.max()
    assert error.max() <= 2 * reference.max() + slack, (
        f"largest error {error.max():.3g}, the plain implementation's {reference.max():.3g}"
    )
    assert error.mean() <= 1.5 * reference.mean() + slack, (
        f"mean error {error.mean():.3g}, the plain implementation's {reference.mean():.3g}"
    )
    worst = np.nanmax(np.where(bad, 0.0, error / bound))
    assert worst <= 1.0, f"an element's error is {worst:.3g} times its bound"


def tile_error(a: Args, isa: str, size: Sizes) -> np.ndarray:
    """What weights in bfloat16 add to the error of each element of [rows][heads][channels].

    bfloat16, t = 2^-8: half a unit of 8 bits. The weights that V meets are w = p (1 + e), |e| <= t,
    and O is divided by their own sum. As sum p (v - o) = 0,

        |sum w v / sum w - o| = |sum p e (v - o)| / sum w <= t / (1 - t) sum p |v - o|.

    float16, in two parts of 8 bits each, t = 2^-16: what is left of a weight is below t of it, and
    the product of the small parts, each below 2^-8 of its number, is left out: another t p |v|. O
    is divided by the sum of the exact weights, so that the mean does not come off:
    2 t sum p |v|."""
    if not on_tiles(a, isa):
        return np.zeros(1)
    if a.query.dtype == BF16:
        return 2.0**-8 / (1 - 2.0**-8) * size.spread
    return 2 * 2.0**-16 * size.value


def bound_of(
    a: Args, exact: np.ndarray, dtype: np.dtype, isa: str, size: Sizes | None = None
) -> np.ndarray:
    """u |o| + (4 delta + gamma) sum p |v|, for each element: delta bounds the error of a score
    summed in float32 in any order, gamma those of exp2, of rescaling and of the sums. On tiles
    comes what tile_error says."""
    size = size or sizes(a)
    channels = a.query.shape[-1] + (0 if a.query_rope is None else a.query_rope.shape[-1])
    heads = (len(size.keys), a.heads_q, 1)
    by_head = dataclasses.replace(
        size, score=size.score.reshape(heads), keys=size.keys.reshape(heads)
    )
    bound = float32_error(by_head, channels) + tile_error(a, isa, size)
    return rounded_bound(bound.reshape(exact.shape), exact, dtype, size)


def float32_error(size: Sizes, channels: int) -> np.ndarray:
    """The part of bound_of that float32 brings, for sizes that fit to each other."""
    delta = (channels + 8) * 2.0**-24 * size.score
    gamma = (2 * size.keys + 64) * 2.0**-24
    return (4 * delta + gamma) * np.exp(np.minimum(4 * delta, 50.0)) * size.value


def rounded_bound(bound: np.ndarray, exact: np.ndarray, dtype: np.dtype, size: Sizes) -> np.ndarray:
    """And with the rounding to the output's type."""
    return (
        bound
        + last_place(dtype) * (abs(exact) + bound)
        + 2 * floor_of(dtype)
        + size.keys.max(initial=0.0) * 2.0**-120
    )


def check_stats(a: Args, got: dict[str, np.ndarray], want: Output, isa: str) -> None:
    """max, sum and lse within 1e-5 relative and 16 * 2^-24 of the score's size; float16 on tiles:
    and what scores leave out there. (That is more than docs/numerics.md promises:
    tests/test_amx.py::test_float16_statistics_keep_the_limit_of_all_others.)"""
    check_statistics(got, want, by_kv_head(sizes(a).score, a))


def check_statistics(got: dict[str, np.ndarray], want: Output, size: np.ndarray) -> None:
    """The same for scores of the given sizes, one each."""
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


def check(a: Args, got: dict[str, np.ndarray], isa: str, strict: bool = False) -> Output:
    """All outputs of one call, made on an instruction set, against the oracle; strict: enough
    elements for the error rule to need no slack but FlashAttention's."""
    a = as_computed(a, isa)
    want = sparse_flash_attention(a)
    check_out(a, got["attention_out"], want, a.query.dtype, isa, strict)
    check_stats(a, got, want, isa)
    return want


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    """Equal in every bit; all NaNs count as one."""
    x, y = np.asarray(x), np.asarray(y)
    bits = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[x.itemsize]
    both_nan = np.isnan(x.astype(np.float64)) & np.isnan(y.astype(np.float64))
    return x.shape == y.shape and bool(((x.view(bits) == y.view(bits)) | both_nan).all())


def assert_same(x: dict, y: dict, what: object = "") -> None:
    """Every output equal in every bit."""
    for name in x:
        assert same_bits(x[name], y[name]), f"{name} {what}"
