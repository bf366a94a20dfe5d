"""Instruction sets as data, and the list of words that each of them has to spell."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Isa:
    """One instruction set: a region of the header with its own suffix and target attribute."""

    name: str
    macro: str  # HL_HAS_<macro>, HL_ISA_<macro>
    title: str
    lanes: int  # float32 numbers in a vector
    registers: int  # vector registers
    target: str  # of the compiler's target attribute; "" where the baseline will do
    formats: tuple[str, ...]  # element types that its words can load and store
    maths: tuple[str, ...]  # exp2 it can be generated with
    even_odd: tuple[str, ...] = ()  # formats of which vpair takes even and odd numbers apart
    sleef_exp2: str = ""
    header: str = ""  # that declares its intrinsics
    detect: tuple[str, ...] = ()  # what the cpu model has to say; () where it is always there
    rows_by: str = ""  # the instruction set whose words do everything but the two products
    # Stack in bytes, of one function and of a whole call; tests/check.py measures them.
    frame_bytes: int = 4096
    stack_bytes: int = 6144

    @property
    def tiles(self):
        """Has matrix tiles: the block of keys is its own (templates/tile), the rest in words."""
        return bool(self.rows_by)

    @property
    def words(self):
        """The name that its words end in."""
        return self.rows_by or self.name

    @property
    def detect_c(self):
        return " && ".join(f'__builtin_cpu_supports("{name}")' for name in self.detect)


ISAS = {
    isa.name: isa
    for isa in (
        Isa(
            name="scalar",
            macro="SCALAR",
            title="plain C99",
            lanes=1,
            registers=16,
            target="",
            formats=("f32", "f16", "bf16"),
            maths=("builtin", "sleef", "libm"),
            sleef_exp2="Sleef_exp2f_u10",
            frame_bytes=1024,
            stack_bytes=3072,
        ),
        Isa(
            name="neon",
            macro="NEON",
            title="AArch64 NEON",
            lanes=4,
            registers=32,
            target="",
            formats=("f32", "f16", "bf16"),
            maths=("builtin", "libm"),
            header="arm_neon.h",
        ),
        Isa(
            name="avx2",
            macro="AVX2",
            title="AVX2, FMA and F16C",
            lanes=8,
            registers=16,
            target="avx2,fma,f16c",
            formats=("f32", "f16", "bf16"),
            maths=("builtin", "sleef", "libm"),
            even_odd=("bf16",),
            sleef_exp2="Sleef_exp2f8_u10avx2",
            header="immintrin.h",
            detect=("avx2", "fma"),
        ),
        Isa(
            name="avx512",
            macro="AVX512",
            title="AVX-512 F, BW, DQ and VL",
            lanes=16,
            registers=32,
            target="avx512f,avx512bw,avx512dq,avx512vl,fma",
            formats=("f32", "f16", "bf16"),
            maths=("builtin", "sleef", "libm"),
            even_odd=("bf16",),
            sleef_exp2="Sleef_exp2f16_u10avx512f",
            header="immintrin.h",
            detect=("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma"),
        ),
        Isa(
            name="amx",
            macro="AMX",
            title="AMX tiles of bfloat16, with AVX-512",
            lanes=16,
            registers=32,
            target="avx512f,avx512bw,avx512dq,avx512vl,fma",
            formats=("f16", "bf16"),
            maths=("builtin", "sleef", "libm"),
            header="immintrin.h",
            rows_by="avx512",
            frame_bytes=8192,
            stack_bytes=8192,
        ),
    )
}

# The words. A page under templates/isa spells each of them once; algorithms are written in them.
#   x, y, z: vectors of float32; n: a count of lanes, 1 .. lanes-1; p: an address, any alignment
WORDS = {
    "vzero": "0 in every lane",
    "vset": "one number in every lane",
    "vload": "lanes numbers from p",
    "vstore": "lanes numbers to p",
    "vload_n": "n numbers from p, 0 in the lanes behind; reads nothing else",
    "vstore_n": "the first n lanes to p; writes nothing else",
    "vkeep": "x, in a register: GCC would load it again for each of its uses",
    "vadd": "x + y",
    "vsub": "x - y",
    "vmul": "x * y",
    "vfma": "x * y + z, rounded once where the instruction set can",
    "vdiv": "x / y",
    "vmax": "the larger; a NaN in y stays",
    "vround": "x to the nearest whole number, -1e6 < x <= 0; of a NaN anything",
    "vscale": "x * 2^n for a whole n, -126 .. 0, and x in [0.5, 2)",
    "vflush": "y, but 0 where x < limit",
    "vexp2": "2^x for x <= 0 (templates/step/exp2)",
    "vsums": "of as many vectors as there are lanes: lane i is the sum of the lanes of vector i",
    "vswap": "lane i is lane i ^ n of x; n: 1, 2, .. lanes / 2",
    "vturn": "as many vectors as there are lanes, turned: lane j of vector i becomes lane i of j",
    "vpair": "the 2 * lanes numbers from p as x and y",
    "vload_f16": "as vload, from float16",
    "vload_f16_n": "as vload_n",
    "vstore_f16": "as vstore, rounded to nearest even",
    "vstore_f16_n": "as vstore_n",
    "vpair_f16": "as vpair, from float16",
    "vload_bf16": "as vload, from bfloat16",
    "vload_bf16_n": "as vload_n",
    "vstore_bf16": "as vstore, rounded to nearest even; a NaN stays a NaN",
    "vstore_bf16_n": "as vstore_n",
    "vpair_bf16": "as vpair, from bfloat16; on some x even, y odd numbers (Isa.even_odd)",
    "vabs": "the absolute value",
    "vquot": "x / d rounded once; r: 1 / d; d in 2^-90 .. 2^121, x / d is 0 or 2^-13 .. 2^9",
    "vload_i8": "as vload, from int8",
    "vload_i8_n": "as vload_n",
    "vpair_i8": "as vpair, from int8",
    "vstore_i8": "as vstore, rounded to nearest even, never past +-127; |x| < 2^22",
    "vstore_i8_n": "as vstore_n",
    "vload_e4m3": "as vload, from FP8 E4M3",
    "vload_e4m3_n": "as vload_n",
    "vpair_e4m3": "as vpair, from FP8 E4M3",
    "vpair_i4": "as vpair, from int4, two a byte, the first in the lower half",
    "vwiden_e4m3": "4 * lanes codes to as many numbers of bfloat16, which hold them exactly",
    "vstore_e4m3": "as vstore, rounded to nearest even, never past +-448; x is finite",
    "vstore_e4m3_n": "as vstore_n",
    "vclip_i8": "as vstore_i8, of any x: to -128 .. 127; of a NaN 0",
    "vclip_i8_n": "as vstore_n",
    "vclip_e4m3": "as vstore_e4m3, of any x; a NaN is 0x7f",
    "vclip_e4m3_n": "as vstore_n",
    "vpeak_bf16": "the largest magnitude of n numbers of bfloat16; NaN if one is NaN or infinite",
    "vput_i8_bf16": "2 * lanes codes of what vpair_bf16 reads, as vstore_i8; |x| <= 127.49",
    "vput_e4m3_bf16": "the same as vstore_e4m3; |x| <= 463",
    "vdots_i8": "dot products of n int8 codes with 4 rows of 16-bit numbers, 0 behind n up to 32 m",
    "vdots_i8_keys": "the same of one such row with 4 rows of codes",
    "vsum_i8": "n sums in 32 bits take p x + r y of two rows of codes; p, r: -128 .. 127",
    "vrow": "a whole stored row to float32 (templates/kv)",
}

# The word that reads or writes one element type: ("load", "bf16") -> vload_bf16.
FORMAT_WORDS = {
    "f32": {
        "load": "vload",
        "load_n": "vload_n",
        "pair": "vpair",
        "store": "vstore",
        "store_n": "vstore_n",
    },
    "f16": {
        "load": "vload_f16",
        "load_n": "vload_f16_n",
        "pair": "vpair_f16",
        "store": "vstore_f16",
        "store_n": "vstore_f16_n",
    },
    "bf16": {
        "load": "vload_bf16",
        "load_n": "vload_bf16_n",
        "pair": "vpair_bf16",
        "store": "vstore_bf16",
        "store_n": "vstore_bf16_n",
    },
    "i8": {
        "load": "vload_i8",
        "load_n": "vload_i8_n",
        "pair": "vpair_i8",
        "store": "vstore_i8",
        "store_n": "vstore_i8_n",
    },
    "e4m3": {
        "load": "vload_e4m3",
        "load_n": "vload_e4m3_n",
        "pair": "vpair_e4m3",
        "store": "vstore_e4m3",
        "store_n": "vstore_e4m3_n",
    },
}
