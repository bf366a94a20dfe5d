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
import numpy as np
import pytest
from helpers import BF16, WORDS_HERE
from helpers_runner import AARCH64, QEMU, need_aarch64

from gen import bind, spec
from gen.isa import ISAS, WORDS

HERE = Path(__file__).resolve().parent
N, ROW_MAX = 1 << 17, 40
ARRAYS = ("x", "y", "z", "tame", "fraction", "exponent", "small", "f16", "bf16", "power")
AT = {name: i for i, name in enumerate(ARRAYS)}
BINARY = tuple(
    SimpleNamespace(name=n, x=AT[x], y=AT[y])
    for n, x, y in (
        ("vadd", "x", "y"),
        ("vsub", "x", "y"),
        ("vmul", "x", "y"),
        ("vmax", "x", "y"),
        ("vscale", "fraction", "exponent"),
    )
)
UNARY = (
    SimpleNamespace(name="vround", x=AT["small"]),
    SimpleNamespace(name="vexp2", x=AT["power"]),
)
MACHINES = {"here": WORDS_HERE, "aarch64": ("scalar", "neon")}


@functools.cache
def header_text() -> str:
    """One header with all words: three kernels, one an element type."""
    kernels = [
        {"op": "sparse_flash_attention", "dtype": t, "dk": 8} for t in ("f32", "f16", "bf16")
    ]
    return bind.header_text(spec.parse_header({"name": "hl_words", "kernel": kernels}))


def defined_words(isa: str) -> set[str]:
    """Names of the word functions that the header defines for an instruction set."""
    code = bind.without_comments(header_text())
    found = re.findall(rf"^HL_WORD_{isa.upper()} [\w ]+?\bhl_(v\w+)_{isa}\(", code, re.MULTILINE)
    return set(found)


def test_every_instruction_set_has_the_same_words():
    expected = (set(WORDS) - {"vrow"}) | {f"vrow_{t}" for t in ("f32", "f16", "bf16")}
    for name, isa in ISAS.items():
        assert isa.words != name or defined_words(name) == expected, name


def test_every_word_is_tested():
    """A new word has to be added to words.c.j2."""
    source = (HERE / "words.c.j2").read_text()
    for word in WORDS:
        listed = word in {w.name for w in (*BINARY, *UNARY)}
        general = re.sub(r"_(bf16|f16)(?=_n$|$)", "_{{ type }}", word)
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
        type_input={"f16": AT["f16"], "bf16": AT["bf16"]},
        row_max=ROW_MAX,
    )
    compiler = AARCH64 if machine == "aarch64" else "cc"
    program = bind.compile_c(
        {"header.h": header_text(), "words.c": source}, compiler=compiler, suffix=".bin"
    )
    with tempfile.TemporaryDirectory() as folder:
        to, back = Path(folder) / "in", Path(folder) / "out"
        to.write_bytes(b"".join(inputs()[name].tobytes() for name in ARRAYS))
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
        made["vpair"] = self.take(2 * lanes)
        for kind in ("f16", "bf16"):
            made[f"vpair_{kind}"] = self.take(65536)
        for kind in ("f32", "f16", "bf16"):
            made[f"vrow_{kind}"] = [
                self.take(-(-n // lanes) * lanes) for n in range(1, ROW_MAX + 1)
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
        assert same(got["vsub"], x - y).all()
        assert same(got["vmul"], x * y).all()
        larger = same(got["vmax"], np.where(x > y, x, y), zeros=True)  # a NaN in y stays,
        assert (larger | (np.isnan(x) & np.isnan(got["vmax"]))).all()  # one in x may
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
    for word in ("vadd", "vsub", "vmul", "vflush", "vload_f16", "vload_bf16"):
        assert same(wide[word], scalar[word]).all(), word
    normal = abs(wide["vscale"]) >= 2.0**-126
    assert same(wide["vscale"], scalar["vscale"])[normal].all()
    assert same(wide["vmax"], scalar["vmax"], zeros=True).all()
    for kind, dtype in (("f16", np.dtype(np.float16)), ("bf16", BF16)):
        assert halves_equal(wide[f"vstore_{kind}"], scalar[f"vstore_{kind}"], dtype).all()
