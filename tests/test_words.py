"""The words: each instruction set spells the same ones, and each spelling means the same, over
hostile numbers, checked against NumPy. AArch64's run under qemu."""

import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import jinja2
import ml_dtypes
import numpy as np
import pytest
from helpers import BF16, WORDS_HERE
from helpers_runner import AARCH64, QEMU, need_aarch64
from oracle_append import as_codes

from gen import bind, render, spec
from gen.formats import CODES, STORED
from gen.isa import ISAS, WORDS

HERE = Path(__file__).resolve().parent
PEAKS = range(0, 65536 - 96, 61)
CODE_ROWS = (*range(1, 40), *range(40, 257, 24))
I4 = tuple(name for name, stored in STORED.items() if stored.packed)
N, ROW_MAX, QUOTIENTS = 1 << 17, 40, 1 << 22
DOTS_MOST, DOTS_ROW = 70, 96  # codes of a row, and from one row to the next
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
ARRAYS = ("x", "y", "z", "tame", "fraction", "exponent", "small", "f16", "bf16", "power")
ARRAYS += tuple(CODES)
AT = {name: i for i, name in enumerate(ARRAYS)}
BINARY = tuple(
    SimpleNamespace(name=n, x=AT[x], y=AT[y])
    for n, x, y in (
        ("vadd", "x", "y"),
        ("vsub", "x", "y"),
        ("vmul", "x", "y"),
        ("vmax", "x", "y"),
        ("vdiv", "x", "y"),
        ("vscale", "fraction", "exponent"),
    )
)
UNARY = (
    SimpleNamespace(name="vround", x=AT["small"]),
    SimpleNamespace(name="vexp2", x=AT["power"]),
    SimpleNamespace(name="vabs", x=AT["x"]),
)
MACHINES = {"here": WORDS_HERE, "aarch64": ("scalar", "neon")}


@functools.cache
def header_text() -> str:
    """One header with all words: three kernels, one an element type; behind them the words of the
    formats that are no kernel's element type."""
    kernels = [
        {"op": "sparse_flash_attention", "dtype": t, "dk": 8} for t in ("f32", "f16", "bf16")
    ]
    text = bind.header_text(spec.parse_header({"name": "hl_words", "kernel": kernels}))
    for isa in ISAS.values():
        if not isa.tiles:
            formats = ("bf16", *CODES, "i4", "dots")
            words = render.words_page(
                isa, formats, "builtin", tuple(STORED), tuple(CODES), turns=True
            )
            text += f"\n#if HL_HAS_{isa.macro}\n{words}#endif\n"
    return text


def defined_words(isa: str) -> set[str]:
    """Names of the word functions that the header defines for an instruction set."""
    code = bind.without_comments(header_text())
    found = re.findall(rf"^HL_WORD_{isa.upper()} [\w ]+?\bhl_(v\w+)_{isa}\(", code, re.MULTILINE)
    return set(found)


def test_every_instruction_set_has_the_same_words():
    expected = (set(WORDS) - {"vrow"}) | {f"vrow_{name}" for name in STORED}
    for name, isa in ISAS.items():
        assert isa.words != name or defined_words(name) == expected, name


def test_every_word_is_tested():
    """A new word has to be added to words.c.j2."""
    source = (HERE / "words.c.j2").read_text()
    for word in WORDS:
        listed = word in {w.name for w in (*BINARY, *UNARY)}
        general = re.sub(r"_(bf16|f16|i8|e4m3|i4)(?=_n$|$)", "_{{ type }}", word)
        of_type = re.sub(r"_(i8|e4m3)_", "_{{ type }}_", word)
        listed = listed or any(f"hl_{name}{{{{ w }}}}(" in source for name in (word, of_type))
        assert listed or f"hl_{general}{{{{ w }}}}" in source or f"hl_{word}_{{{{ type" in source, (
            word
        )


def hostile(rng: np.random.Generator) -> np.ndarray:
    """Every kind of float32: random bits, special values, numbers of ordinary size."""
    bits = rng.integers(0, 1 << 32, N, dtype=np.uint32)
    special = np.array(
        [
            0,
            -0.0,
            1,
            -1,
            np.inf,
            -np.inf,
            np.nan,
            1e-45,
            -1e-45,
            1.17549435e-38,
            1.1754942e-38,
            3.4028235e38,
            -3.4028235e38,
            0.5,
            65504,
            65520,
            65519.99,
            6e-8,
            2.9e-8,
            2**-14,
            2**-25,
        ],
        np.float32,
    )
    made = bits.view(np.float32).copy()
    tame = rng.standard_normal(N).astype(np.float32)
    made = np.where(rng.random(N) < 0.4, tame, made)
    chosen = rng.random(N) < 0.2
    made[chosen] = rng.choice(special, int(chosen.sum()))
    return made


def near_halves(rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
    """Every number of a 16-bit type, the middles between neighbours, and what is just beside."""
    exact = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(dtype).astype(np.float32)
    bits = exact.view(np.uint32)
    half = np.uint32(1 << (15 if dtype == BF16 else 12))
    around = [
        exact,
        *(
            (bits + half + d).view(np.float32)
            for d in np.array([0, 1, -1], np.int64).astype(np.uint32)
        ),
    ]
    return rng.permutation(np.concatenate(around))[:N].astype(np.float32)


def beside(x: np.ndarray) -> np.ndarray:
    """Numbers, the next ones on both sides, and all of them with the other sign."""
    near = [x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))]
    near = np.concatenate(near)
    return np.concatenate([near, -near])


def near_codes(rng: np.random.Generator, exact: np.ndarray, most: float) -> np.ndarray:
    """The positive numbers of a format and what lies past them, the middles between neighbours, and
    what is just beside; zeros; ordinary numbers, tiny ones, and large ones up to `most`."""
    exact = exact.astype(np.float32)
    hard = beside(np.concatenate([exact, (exact[1:] + exact[:-1]) / 2]))
    hard = np.concatenate([hard, np.float32([0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, most, -most])])
    made = rng.uniform(-1.1, 1.1, N) * exact.max()
    made[: N // 4] = np.exp2(rng.uniform(-20, np.log2(most), N // 4)) * rng.choice([-1, 1], N // 4)
    made = made.astype(np.float32)
    made[-len(hard) :] = hard
    return rng.permutation(made)


def next_to_middles(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """x and d whose quotient is as near to the middle of two float32 as one can be: as whole
    numbers, 2^p x = m d + k with an odd m of 25 bits and k = -1 or 1. d between 1 and 2."""
    d = rng.integers(1 << 22, 1 << 23, count, dtype=np.int64) * 2 + 1
    k = rng.choice(np.array([-1, 1]), count)
    p = rng.choice(np.array([24, 25]), count)  # 25: x < d
    inverse = d.copy()
    for _ in range(5):
        inverse = inverse * (2 - d * inverse) & ((1 << 25) - 1)
    m = -k * inverse & ((1 << p) - 1)
    m += (m < 1 << 24).astype(np.int64) << 24
    x = (m * d + k) >> p
    good = ((x << p) == m * d + k) & (x >= 1 << 23) & (x < 1 << 24)
    return (x[good] * 2.0**-23).astype(np.float32), (d[good] * 2.0**-23).astype(np.float32)


@functools.cache
def quotients() -> tuple[np.ndarray, np.ndarray]:
    """What a cache is quantised by: d is the largest |x| by 127 or by 448, x as float32, float16 or
    bfloat16 would be. A quarter are the hardest quotients there are."""
    rng = np.random.default_rng(21)
    kind = rng.integers(0, 3, QUOTIENTS)
    cut = np.array([0, 0xFFFF, 0x1FFF], np.uint32)[kind]  # bits that bf16 and f16 do not have

    def short(x: np.ndarray) -> np.ndarray:
        return (x.view(np.uint32) & ~cut).view(np.float32)

    most = short(np.exp2(rng.uniform(-81, 127.9, QUOTIENTS)).astype(np.float32))
    d = most / rng.choice(np.array([127, 448], np.float32), QUOTIENTS)
    size = np.where(rng.random(QUOTIENTS) < 0.8, rng.random(QUOTIENTS), 0)
    size = np.maximum(size, np.exp2(rng.uniform(-18, 0, QUOTIENTS)))
    size[:1000] = 1
    x = short((most * size).astype(np.float32)) * rng.choice(np.float32([-1, 1]), QUOTIENTS)
    x[1000:2000] = 0.0
    x[2000:3000] = -0.0
    hard = next_to_middles(rng, QUOTIENTS)
    count = min(len(hard[0]), QUOTIENTS // 4)
    scale = rng.integers(-90, 120, count).astype(np.int32)
    d[-count:] = np.ldexp(hard[1][:count], scale)
    x[-count:] = np.ldexp(hard[0][:count], scale + rng.integers(-12, 7, count).astype(np.int32))
    return x, d


@functools.cache
def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(20)
    small = rng.uniform(-1e6, 0, N).astype(np.float32)
    small[: N // 2] = rng.uniform(-200, 0, N // 2)
    small[: N // 4] = np.round(small[: N // 4] * 4) / 4
    small[:5] = [np.nan, 0.0, -0.0, -0.5, -0.49999997]
    power = -np.exp2(rng.uniform(-30, 7.2, N)).astype(np.float32)
    power[: N // 4] = rng.uniform(-127, 0, N // 4)
    power[:12] = [
        0,
        -0.0,
        -1,
        -126,
        -125.99999,
        -126.00001,
        -127,
        -1e9,
        -np.inf,
        np.nan,
        -0.5,
        -1e-30,
    ]
    return {
        "x": hostile(rng),
        "y": hostile(rng),
        "z": hostile(rng),
        "tame": rng.standard_normal(N).astype(np.float32),
        "fraction": rng.uniform(0.5, 2, N).astype(np.float32),
        "exponent": rng.integers(-126, 1, N).astype(np.float32),
        "small": small,
        "f16": near_halves(rng, np.dtype(np.float16)),
        "bf16": near_halves(rng, BF16),
        "power": power,
        "i8": near_codes(rng, np.arange(140), 2.0**22 - 1),
        "e4m3": near_codes(rng, np.append(numbers_of("e4m3")[:127], 480), 2.0**20),
    }


@functools.cache
def results(machine: str) -> dict[str, dict[str, np.ndarray]]:
    """What each word of a machine's instruction sets made of the inputs: isa -> word -> result."""
    names = MACHINES[machine]
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        line_statement_prefix="//%",
        keep_trailing_newline=True,
    )
    source = environment.from_string((HERE / "words.c.j2").read_text()).render(
        n=N,
        arrays=ARRAYS,
        isas=[ISAS[name] for name in names],
        binary=BINARY,
        unary=UNARY,
        tame=AT["tame"],
        type_input={name: AT[name] for name in ("f16", "bf16", *CODES)},
        quotients=QUOTIENTS,
        row_max=ROW_MAX,
        dots_most=DOTS_MOST,
        dots_row=DOTS_ROW,
    )
    compiler = AARCH64 if machine == "aarch64" else "cc"
    program = bind.compile_c(
        {"header.h": header_text(), "words.c": source}, compiler=compiler, suffix=".bin"
    )
    with tempfile.TemporaryDirectory() as folder:
        to, back = Path(folder) / "in", Path(folder) / "out"
        arrays = [*(inputs()[name] for name in ARRAYS), *quotients()]
        to.write_bytes(b"".join(array.tobytes() for array in arrays))
        command = [*(QEMU if machine == "aarch64" else ()), str(program), str(to), str(back)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"exit {run.returncode}: {run.stderr}"
        return dict(Pieces(back.read_bytes()).all(names))


class Pieces:
    """The output file, read in the order in which words.c.j2 writes it."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int, dtype: type = np.float32) -> np.ndarray:
        made = np.frombuffer(self.data, dtype, count, self.at)
        self.at += made.nbytes
        return made

    def all(self, names: tuple[str, ...]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
        for name in names:
            yield name, self.one(ISAS[name].lanes)
        assert self.at == len(self.data)

    def one(self, lanes: int) -> dict[str, np.ndarray]:
        made = {"vzero": self.take(lanes), "vset": self.take(lanes)}
        for word in BINARY:
            made[word.name] = self.take(N)
        made["vfma"], made["vflush"] = self.take(N), self.take(N)
        made["vsums"] = self.take(N // lanes**2 * lanes)
        made["vturn"] = self.take(lanes * lanes).reshape(lanes, lanes)
        made["vkeep"] = self.take(lanes)
        made["vswap"] = {n: self.take(lanes) for n in (1, 2, 4, 8) if n < lanes}
        for word in UNARY:
            made[word.name] = self.take(N)
        made["tails"] = [
            (self.take(lanes), self.take(n), self.take(lanes)) for n in range(1, lanes)
        ]
        for kind in ("f16", "bf16"):
            made[f"vload_{kind}"] = self.take(65536)
            made[f"vstore_{kind}"] = self.take(N, np.uint16)
            made[f"tails_{kind}"] = [
                (self.take(lanes), self.take(n, np.uint16), self.take(lanes, np.uint16))
                for n in range(1, lanes)
            ]
        made["vquot"] = self.take(QUOTIENTS)
        for kind in CODES:
            made[f"loads_{kind}"] = [
                (self.take((257 - n) * lanes).reshape(-1, lanes), self.take(lanes))
                for n in range(1, lanes + 1)
            ]
            made[f"vstore_{kind}"] = self.take(N, np.uint8)
            made[f"tails_{kind}"] = [
                (self.take(n, np.uint8), self.take(lanes, np.uint8)) for n in range(1, lanes)
            ]
        made["flushed_e4m3"] = self.take(256)
        made["vwiden_e4m3"] = self.take(256, np.uint16)
        for kind in CODES:
            made[f"vput_{kind}"] = self.take(65536, np.uint8), self.take(N // 2, np.uint8)
        made["vpeak"] = self.take(len(PEAKS))
        for kind in CODES:
            made[f"vclip_{kind}"] = self.take(2 * N, np.uint8)
            made[f"clip_tails_{kind}"] = [
                (self.take(n, np.uint8), self.take(lanes, np.uint8)) for n in range(1, lanes)
            ]
        for kind in (*CODES, *I4):
            made[f"vrow_{kind}"] = [(n, self.take(-(-n // lanes) * lanes)) for n in CODE_ROWS]
        for kind in (*CODES, "i4"):
            made[f"vpair_{kind}"] = self.take(256)
        made["vpair"] = self.take(2 * lanes)
        for kind in ("f16", "bf16"):
            made[f"vpair_{kind}"] = self.take(65536)
        for kind in ("f32", "f16", "bf16"):
            made[f"vrow_{kind}"] = [
                self.take(-(-n // lanes) * lanes) for n in range(1, ROW_MAX + 1)
            ]
        made["dots"] = [
            tuple(self.take(count, np.int32) for count in (4, 4, DOTS_ROW))
            for _ in range(DOTS_MOST)
        ]
        return made


EVERY = [(machine, isa) for machine, names in MACHINES.items() for isa in names]
BY_ISA = pytest.mark.parametrize("machine,isa", EVERY)


def of(machine: str, isa: str) -> dict[str, np.ndarray]:
    if machine == "aarch64":
        need_aarch64()
    return results(machine)[isa]


def same(x: np.ndarray, y: np.ndarray, zeros: bool = False) -> np.ndarray:
    """Equal bits; NaNs are one, and zeros of both signs where asked for."""
    equal = (x.view(np.uint32) == y.view(np.uint32)) | (np.isnan(x) & np.isnan(y))
    return equal | ((x == 0) & (y == 0)) if zeros else equal


@BY_ISA
def test_arithmetic(machine, isa):
    got, a = of(machine, isa), inputs()
    x, y, z = a["x"], a["y"], a["z"]
    assert not got["vzero"].view(np.uint32).any() and same(got["vset"], x[5]).all()
    with np.errstate(all="ignore"):
        assert same(got["vadd"], x + y).all()
        assert same(got["vdiv"], x / y).all()
        assert same(got["vsub"], x - y).all()
        assert same(got["vmul"], x * y).all()
        larger = same(got["vmax"], np.where(x > y, x, y), zeros=True)  # a NaN in y stays,
        assert (larger | (np.isnan(x) & np.isnan(got["vmax"]))).all()  # one in x may
        assert same(got["vabs"], abs(x)).all()
        assert same(got["vflush"], np.where(x < 0.5, np.float32(0), y)).all()
        exact = x.astype(np.float64) * y + z
        twice = (x * y + z).astype(np.float64)
        room = 2.0**-24 * (abs(x.astype(np.float64) * y) + abs(exact)) + 2.0**-149
        ok = (abs(got["vfma"] - exact) <= room) | same(got["vfma"], exact.astype(np.float32))
        ok |= same(got["vfma"], twice.astype(np.float32))
        assert ok.all()


@BY_ISA
def test_exponents(machine, isa):
    got, a = of(machine, isa), inputs()
    exact = np.ldexp(a["fraction"], a["exponent"].astype(np.int32))
    normal = exact >= 2.0**-126
    assert same(got["vscale"], exact)[normal].all()
    rounded, small = got["vround"], a["small"]
    assert (rounded[1:] == np.round(rounded[1:])).all()  # [0] is a NaN: anything goes
    assert (abs(rounded[1:] - small[1:].astype(np.float64)) <= 0.5 + 2.0**-24).all()
    x = a["power"]
    with np.errstate(all="ignore"):
        want = np.exp2(x.astype(np.float64))
    below = x < -126
    assert not got["vexp2"][below].view(np.uint32).any()
    assert np.isnan(got["vexp2"][np.isnan(x)]).all()
    inside = (x >= -126) & (x <= 0)
    unit = 2.0 ** (np.floor(np.log2(want[inside])) - 23)
    assert (
        abs(got["vexp2"][inside] - want[inside]) <= 1.25 * unit
    ).all()  # exact figures: test_exp2
    assert (got["vexp2"][x == 0] == 1).all()


@BY_ISA
def test_a_square_of_vectors_is_turned(machine, isa):
    got, lanes = of(machine, isa), ISAS[isa].lanes
    square = inputs()["tame"][: lanes * lanes].reshape(lanes, lanes)
    assert same(got["vturn"], square.T).all()


@BY_ISA
def test_sums_across_lanes(machine, isa):
    """Every one of as many vectors as there are lanes, in its own lane."""
    got, lanes = of(machine, isa), ISAS[isa].lanes
    count = N // lanes**2 * lanes
    vectors = inputs()["tame"][: count * lanes].reshape(count, lanes).astype(np.float64)
    room = 2.0**-23 * np.log2(max(lanes, 2)) * abs(vectors).sum(axis=1)
    assert (abs(got["vsums"] - vectors.sum(axis=1)) <= room).all()


@BY_ISA
def test_lanes_swap_over_every_distance(machine, isa):
    got, lanes = of(machine, isa), ISAS[isa].lanes
    x = inputs()["x"][:lanes]
    assert same(got["vkeep"], x).all()
    for n, swapped in got["vswap"].items():
        assert same(swapped, x[np.arange(lanes) ^ n]).all(), n


@BY_ISA
def test_pairs_are_two_vectors(machine, isa):
    """All 65536 numbers; even and odd ones apart where the table says so."""
    got, lanes = of(machine, isa), ISAS[isa].lanes
    assert same(got["vpair"], inputs()["x"][: 2 * lanes]).all()
    for kind, dtype in (("f16", np.dtype(np.float16)), ("bf16", BF16)):
        exact = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(dtype).astype(np.float32)
        pairs = exact.reshape(-1, 2 * lanes)
        if kind in ISAS[isa].even_odd:
            pairs = np.concatenate([pairs[:, ::2], pairs[:, 1::2]], axis=1)
        assert same(got[f"vpair_{kind}"], pairs.ravel()).all(), kind


@BY_ISA
def test_tails_end_where_they_should(machine, isa):
    got, a, lanes = of(machine, isa), inputs(), ISAS[isa].lanes
    start = a["x"][:lanes]
    for n, (loaded, last, first) in enumerate(got["tails"], 1):
        want = np.where(np.arange(lanes) < n, start, np.float32(0))
        assert same(loaded, want).all() and same(last, start[:n]).all() and same(first, want).all()
    for kind, dtype in (("f16", np.dtype(np.float16)), ("bf16", BF16)):
        with np.errstate(over="ignore"):
            stored = start.astype(dtype)
        read = np.arange(0x3F00, 0x3F00 + lanes, dtype=np.uint16).view(dtype).astype(np.float32)
        for n, (loaded, last, first) in enumerate(got[f"tails_{kind}"], 1):
            inside = np.arange(lanes) < n
            assert same(loaded, np.where(inside, read, np.float32(0))).all()
            want = np.where(inside, stored.view(np.uint16), 0)
            assert halves_equal(last, stored.view(np.uint16)[:n], dtype).all()
            assert halves_equal(first, want.astype(np.uint16), dtype).all()


def halves_equal(x: np.ndarray, y: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Bits of a 16-bit type; all NaNs are one."""
    nan = [np.isnan(np.ascontiguousarray(v).view(dtype).astype(np.float32)) for v in (x, y)]
    return (x == y) | (nan[0] & nan[1])


@BY_ISA
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_conversions(machine, isa, kind):
    """All 65536 numbers read, and written back from everywhere between them."""
    got, dtype = of(machine, isa), BF16 if kind == "bf16" else np.dtype(np.float16)
    exact = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(dtype).astype(np.float32)
    assert same(got[f"vload_{kind}"], exact).all()
    with np.errstate(all="ignore"):
        want = inputs()[kind].astype(dtype).view(np.uint16)
    wrong = ~halves_equal(got[f"vstore_{kind}"], want, dtype)
    assert not wrong.any(), (inputs()[kind][wrong][:5], got[f"vstore_{kind}"][wrong][:5])


def numbers_of(kind: str) -> np.ndarray:
    """What the 256 codes of a format stand for."""
    codes = np.arange(256, dtype=np.uint8)
    return codes.view(E4M3 if kind == "e4m3" else np.int8).astype(np.float32)


def codes_of(kind: str, x: np.ndarray) -> np.ndarray:
    """The codes that numbers are stored as."""
    if kind == "e4m3":
        return np.clip(x, -448, 448).astype(E4M3).view(np.uint8)
    return np.clip(np.rint(x), -127, 127).astype(np.int8).view(np.uint8)


def test_the_codes_expected_are_the_nearest_ones():
    """ml_dtypes against a search among all codes in float64, where no two are equally near."""
    x = inputs()["e4m3"][:4096]
    finite = np.delete(np.arange(256), [0x7F, 0xFF])
    far = abs(numbers_of("e4m3")[finite].astype(np.float64) - x[:, None].astype(np.float64))
    chosen = abs(numbers_of("e4m3")[codes_of("e4m3", x)].astype(np.float64) - x)
    assert (chosen == far.min(axis=1)).all()


@BY_ISA
@pytest.mark.parametrize("kind", CODES)
def test_codes_are_read(machine, isa, kind):
    """All 256, in every lane of a vector and of every tail."""
    got, lanes, exact = of(machine, isa), ISAS[isa].lanes, numbers_of(kind)
    for n, (loaded, first) in enumerate(got[f"loads_{kind}"], 1):
        at = np.arange(257 - n)[:, None] + np.arange(lanes)
        inside = np.arange(lanes) < n
        want = np.where(inside, exact[np.minimum(at, 255)], np.float32(0))
        assert same(loaded, want).all(), n
        assert same(first, np.where(inside, exact[1 : 1 + lanes], np.float32(0))).all(), n


@BY_ISA
@pytest.mark.parametrize("kind", CODES)
def test_codes_are_written(machine, isa, kind):
    """The nearest one, from everywhere between them and past them; tails touch nothing else."""
    got, lanes, x = of(machine, isa), ISAS[isa].lanes, inputs()[kind]
    want = codes_of(kind, x)
    wrong = got[f"vstore_{kind}"] != want
    assert not wrong.any(), (x[wrong][:5], got[f"vstore_{kind}"][wrong][:5], want[wrong][:5])
    for n, (last, first) in enumerate(got[f"tails_{kind}"], 1):
        assert (last == want[:n]).all() and (first[:n] == want[:n]).all(), n
        assert (first[n:] == 0x55).all() and len(first) == lanes, n


@BY_ISA
@pytest.mark.parametrize("kind", CODES)
def test_any_number_becomes_a_code(machine, isa, kind):
    """Infinite ones the largest, NaN 0 or E4M3's; -128 too."""
    got, lanes = of(machine, isa), ISAS[isa].lanes
    x = np.concatenate([inputs()[kind], inputs()["x"]])
    want = as_codes(kind, x)
    wrong = got[f"vclip_{kind}"] != want
    assert not wrong.any(), (x[wrong][:5], got[f"vclip_{kind}"][wrong][:5], want[wrong][:5])
    assert {"i8": (want == 0x80).any(), "e4m3": (want == 0x7F).any()}[kind]
    start = as_codes(kind, inputs()["x"][:lanes])
    for n, (last, first) in enumerate(got[f"clip_tails_{kind}"], 1):
        assert (last == start[:n]).all() and (first[:n] == start[:n]).all(), n
        assert (first[n:] == 0x55).all(), n


@BY_ISA
def test_codes_are_read_where_subnormal_numbers_are_flushed(machine, isa):
    assert same(of(machine, isa)["flushed_e4m3"], numbers_of("e4m3")).all()


@BY_ISA
@pytest.mark.parametrize("kind", CODES)
def test_pairs_become_codes(machine, isa, kind):
    """In the order in which they lie, from bfloat16 and from between its numbers."""
    most = {"i8": 127.49, "e4m3": 463}[kind]
    halves, between = of(machine, isa)[f"vput_{kind}"]
    exact = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(BF16).astype(np.float32)
    for x, got in ((exact, halves), (inputs()[kind][: N // 2], between)):
        fits = abs(x) <= most
        wrong = fits & (got != codes_of(kind, np.where(fits, x, 0)))
        assert fits.sum() > N // 16 and not wrong.any(), (x[wrong][:5], got[wrong][:5])


@BY_ISA
def test_the_largest_magnitude(machine, isa):
    halves = np.arange(65536, dtype=np.uint32).astype(np.uint16).view(BF16).astype(np.float32)
    for i, got in zip(PEAKS, of(machine, isa)["vpeak"], strict=True):
        x = abs(halves[i : i + i % 97])
        want = np.max(x, initial=0) if np.isfinite(x).all() else np.nan
        assert same(got, np.float32(want)), i


@BY_ISA
def test_codes_are_widened(machine, isa):
    wide = of(machine, isa)["vwiden_e4m3"].view(BF16).astype(np.float32)
    assert same(wide, numbers_of("e4m3")).all()


@BY_ISA
@pytest.mark.parametrize("kind", CODES)
def test_rows_and_pairs_of_codes(machine, isa, kind):
    """As many as there are, 0 behind them; and a pair is two vectors, in order."""
    got, numbers = of(machine, isa), numbers_of(kind)
    for n, row in got[f"vrow_{kind}"]:
        assert same(row[:n], numbers[256 - n :]).all(), n
        assert not row[n:].any(), n
    assert same(got[f"vpair_{kind}"], numbers).all()


@BY_ISA
def test_pairs_of_int4_are_in_order(machine, isa):
    bytes_ = np.arange(128)
    codes = np.stack([bytes_ & 15, bytes_ >> 4], axis=-1).ravel()
    assert same(of(machine, isa)["vpair_i4"], ((codes ^ 8) - 8).astype(np.float32)).all()


@BY_ISA
@pytest.mark.parametrize("kind", I4)
def test_rows_of_int4_take_their_scales(machine, isa, kind):
    """Low halves are even channels; scales are float16 behind an even number of bytes."""
    group = int(kind[3:])
    for n, row in of(machine, isa)[f"vrow_{kind}"]:
        packed, scales = (n + 3) // 4 * 2, -(-n // group)
        stored = np.arange(256, dtype=np.uint8)[256 - packed - 2 * scales :]
        halves = np.stack([stored[:packed] & 15, stored[:packed] >> 4], axis=-1).ravel()[:n]
        codes = ((halves.astype(np.int32) ^ 8) - 8).astype(np.float32)
        scale = np.repeat(stored[packed:].view(np.float16).astype(np.float32), group)[:n]
        with np.errstate(all="ignore"):
            assert same(row[:n], codes * scale).all(), n
        assert not row[n:].any(), n


@BY_ISA
def test_quotients_are_rounded_as_division_rounds(machine, isa):
    got = of(machine, isa)["vquot"]
    x, d = quotients()
    want = x / d
    wrong = got.view(np.uint32) != want.view(np.uint32)
    assert not wrong.any(), (wrong.sum(), x[wrong][:5], d[wrong][:5], got[wrong][:5])


@BY_ISA
def test_products_of_codes_are_exact(machine, isa):
    """At least where both are -128, whose product is the largest."""
    c, i = np.arange(DOTS_ROW), np.arange(4)[:, None]
    for n, found in enumerate(results(machine)[isa]["dots"], 1):
        q, k = (c * 37 + i * 11 + n) % 256 - 128, (c * 91 + i * 53 + n * 7) % 256 - 128
        x, y = k[n % 4], k[(n + 1) % 4]
        weights = -128 if n % 2 else 127, -128
        sums = c * 1000 - 5
        sums[:n] += (weights[0] * x + weights[1] * y)[:n]
        assert found[0].tolist() == (q[:, :n] @ x[:n]).tolist(), n
        assert found[1].tolist() == (k[:, :n] @ q[0, :n]).tolist(), n
        assert found[2].tolist() == sums.tolist(), n


@BY_ISA
def test_rows_are_padded_with_zeros(machine, isa):
    got, lanes = of(machine, isa), ISAS[isa].lanes
    for kind, dtype in (("f32", None), ("f16", np.dtype(np.float16)), ("bf16", BF16)):
        source = (
            inputs()["x"][:ROW_MAX]
            if dtype is None
            else np.arange(0x3F00, 0x3F00 + ROW_MAX, dtype=np.uint16).view(dtype).astype(np.float32)
        )
        for n, row in enumerate(got[f"vrow_{kind}"], 1):
            want = np.zeros(-(-n // lanes) * lanes, np.float32)
            want[:n] = source[:n]
            assert same(row, want).all(), (kind, n)


@pytest.mark.parametrize("isa", WORDS_HERE[1:])
def test_wide_words_are_the_scalar_ones(isa):
    """Where a word rounds once, all instruction sets agree in every bit."""
    wide, scalar = results("here")[isa], results("here")["scalar"]
    for word in ("vadd", "vsub", "vmul", "vflush", "vload_f16", "vload_bf16", "vabs", "vdiv"):
        assert same(wide[word], scalar[word]).all(), word
    normal = abs(wide["vscale"]) >= 2.0**-126
    assert same(wide["vscale"], scalar["vscale"])[normal].all()
    assert same(wide["vmax"], scalar["vmax"], zeros=True).all()
    for kind, dtype in (("f16", np.dtype(np.float16)), ("bf16", BF16)):
        assert halves_equal(wide[f"vstore_{kind}"], scalar[f"vstore_{kind}"], dtype).all()
