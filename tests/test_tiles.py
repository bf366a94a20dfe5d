"""The emulator of Intel AMX tiles: every instruction, what hardware refuses, and who may use tiles.

Where the machine has tiles, what is tested through `probe` runs on them, and the last test holds
the emulator against them.
"""

import ctypes
import functools
import mmap
import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import helpers_tiles
import numpy as np
import pytest
from helpers_memory import LIBC, Arena, in_child

from gen import bind

HERE = Path(__file__).resolve().parent
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)]
pytestmark = pytest.mark.skipif(not helpers_tiles.here(), reason="no x86-64 Linux with AVX-512")

# ---- programs -----------------------------------------------------------------------------------

DOTS = ("tdpbf16ps", "tdpbssd", "tdpbsud", "tdpbusd", "tdpbuud")
DOT_TILES = [(0, 1, 2), (7, 6, 5), (3, 0, 7), (5, 7, 1), (2, 4, 0), (6, 3, 4)]  # C, A, B
LEGACY = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
REGISTERS = (*LEGACY, *(f"r{i}" for i in range(8, 16)))
KEPT = ("rbx", "rbp", "r12", "r13", "r14", "r15")

# base, index (or none), scale, displacement
FORMS = [
    *((r, REGISTERS[(i + 7) % 16], 1, 0) for i, r in enumerate(REGISTERS) if i != 13),
    *((REGISTERS[(i + 5) % 16], r, 1 << i % 4, (0, 8, -128, 4660)[i // 2 % 4])
      for i, r in enumerate(REGISTERS) if r != "rsp"),
    *((r, "r10", s, d) for r in ("rsp", "rbp", "r12", "r13", "rax", "r8")
      for s, d in ((1, 127), (2, -1), (4, 128), (8, -70000))),
    *((r, "", 1, d) for r in REGISTERS for d in (0, 64, -4096)),
]  # fmt: skip
FORMS = [form for form in FORMS if form[1] not in ("rsp", form[0])]
LOW = 0x10000000  # an address that fits a displacement without a base

TOOLS = r"""
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

/* arch_prctl as kernels call it. */
static long ask(long code, void *argument)
{
    long result;
    __asm__ volatile("syscall" : "=a"(result) : "a"(158L), "D"(code), "S"(argument)
                     : "rcx", "r11", "memory");
    return result;
}
"""


def operand(base: str, index: str, scale: int, displacement: int) -> str:
    """A memory operand as the assembler writes it."""
    inner = (f"%{base}" if base else "") + (f",%{index},{scale}" if index else "")
    return f"{displacement or ''}({inner})"


def form_function(name: str, instruction: str, base: str, index: str) -> list[str]:
    """name(base, index): runs one instruction with the arguments in these registers."""
    spare = next(r for r in ("rax", "rcx", "rdx") if r not in (base, index))
    return [
        f".globl {name}", f".type {name},@function", f"{name}:",
        *(f"push %{r}" for r in KEPT),
        f"mov %rsp,%{spare}", "push %rdi", "push %rsi",
        f"pop %{index}" if index else "lea 8(%rsp),%rsp",
        f"pop %{base}",
        instruction,
        f"mov %{spare},%rsp",
        *(f"pop %{r}" for r in reversed(KEPT)),
        "ret", f".size {name},.-{name}",
    ]  # fmt: skip


def other_functions() -> list[str]:
    """Addressing that form_function cannot say, and a look at all other registers."""
    low = f"{LOW:#x}(,%rsi,2)"
    lines = [
        *(".globl load_low", "load_low:", f"tileloadd {low},%tmm3", "ret"),
        *(".globl config_here", "config_here:", "ldtilecfg here(%rip)", "ret"),
        *(".globl config_there", "config_there:", "sttilecfg there(%rip)", "ret"),
        *(".globl get_there", "get_there:", "lea there(%rip),%rax", "ret"),
        *(".globl get_here", "get_here:", "lea here(%rip),%rax", "ret"),
        *(".globl all_registers", "all_registers:", "sub $8,%rsp", "stmxcsr (%rsp)"),
        *("ldmxcsr (%rdx)", "push %rbx", "push %r12"),
        *(f"vmovdqu64 {64 * i}(%rdi),%zmm{i}" for i in range(32)),
        *(f"kmovq {8 * i}(%rdi),%k{i}" for i in range(8)),
        *("mov $0x1234,%rbx", "mov $0x5678,%r12", "stc"),
        *("tdpbf16ps %tmm2,%tmm1,%tmm0", "setc %al"),
        *(f"vmovdqu64 %zmm{i},{64 * i}(%rsi)" for i in range(32)),
        *(f"kmovq %k{i},{2048 + 8 * i}(%rsi)" for i in range(8)),
        *("movzbl %al,%eax", "shl $8,%rbx", "lea (%rbx,%r12),%rcx", "mov %rcx,2112(%rsi)"),
        *("stmxcsr 2120(%rsi)", "pop %r12", "pop %rbx", "ldmxcsr (%rsp)", "add $8,%rsp"),
        *("vzeroupper", "ret"),
        *(".data", ".balign 64", "here: .zero 64", "there: .zero 64", ".text"),
    ]
    return lines


def probe_source() -> str:
    """A library with a function for each thing that is tried out."""
    code = [
        TOOLS,
        "long request(void) { return ask(0x1023, (void *)18); }",
        "long request_of(long which) { return ask(0x1023, (void *)which); }",
        "long get(long code, uint64_t *mask) { return ask(code, mask); }",
        'void config(const void *p) { __asm__ volatile("ldtilecfg (%0)" : : "r"(p) : "memory"); }',
        'void get_config(void *p) { __asm__ volatile("sttilecfg (%0)" : : "r"(p) : "memory"); }',
        'void release(void) { __asm__ volatile("tilerelease" : : : "memory"); }',
        'void ud2(void) { __asm__ volatile("ud2"); }',
        'void int3(void) { __asm__ volatile("int3"); }',
        # A handler that skips an invalid instruction.
        "int skipped[2];",
        "static void skip(int s, siginfo_t *info, void *context) { (void)info;",
        "  if (s == SIGILL) ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] += 2;",
        "  skipped[s == SIGTRAP]++; }",
        "void skip_invalid(void) { struct sigaction act; memset(&act, 0, sizeof act);",
        "  act.sa_sigaction = skip; act.sa_flags = SA_SIGINFO;",
        "  sigaction(SIGILL, &act, NULL); sigaction(SIGTRAP, &act, NULL); }",
    ]
    for t in range(8):
        for name, text, to in (
            ("load", f"tileloadd (%0,%1,1),%%tmm{t}", "const void"),
            ("loadt1", f"tileloaddt1 (%0,%1,1),%%tmm{t}", "const void"),
            ("store", f"tilestored %%tmm{t},(%0,%1,1)", "void"),
        ):
            run = f'__asm__ volatile("{text}" : : "r"(p), "r"(stride) : "memory");'
            code.append(f"void {name}_{t}({to} *p, long stride) {{ {run} }}")
        code.append(f'void zero_{t}(void) {{ __asm__ volatile("tilezero %%tmm{t}" : :); }}')
    for c, a, b in DOT_TILES:
        for name in DOTS:
            run = f'__asm__ volatile("{name} %%tmm{b},%%tmm{a},%%tmm{c}" : :);'
            code.append(f"void {name}_{c}{a}{b}(void) {{ {run} }}")
    lines = [".text"]
    for i, form in enumerate(FORMS):
        for name, text in (
            ("load", "tileloadd {},%tmm3"),
            ("store", "tilestored %tmm3,{}"),
            ("config", "ldtilecfg {}"),
            ("get_config", "sttilecfg {}"),
        ):
            lines += form_function(f"{name}_form_{i}", text.format(operand(*form)), *form[:2])
    lines += other_functions()
    code.append("__asm__(" + "\n".join(f'"{line}\\n"' for line in lines) + ");")
    return "\n".join(code) + "\n"


@functools.cache
def build_probe(compiler: str) -> ctypes.CDLL:
    """The library of probe_source()."""
    flags = ("-std=gnu99", "-O2", "-Wall", "-Wextra", "-Wno-unused-function")
    lib = ctypes.CDLL(str(bind.compile_c({"a.c": probe_source()}, compiler=compiler, flags=flags)))
    lib.get_there.restype = lib.get_here.restype = ctypes.c_void_p
    lib.request.restype = lib.get.restype = lib.request_of.restype = ctypes.c_long
    lib.request_of.argtypes = (ctypes.c_long,)
    lib.get.argtypes = (ctypes.c_long, ctypes.c_void_p)
    two = [f"{name}_{t}" for name in ("load", "loadt1", "store") for t in range(8)]
    for name in ("load", "store", "config", "get_config"):
        two += [f"{name}_form_{i}" for i in range(len(FORMS))]
    for name in two:
        getattr(lib, name).argtypes = (ctypes.c_void_p, ctypes.c_long)
    for name in ("config", "get_config"):
        getattr(lib, name).argtypes = (ctypes.c_void_p,)
    lib.load_low.argtypes = (ctypes.c_void_p, ctypes.c_long)
    lib.all_registers.argtypes = (ctypes.c_void_p,) * 3
    return lib


@functools.cache
def early_thread() -> ThreadPoolExecutor:
    """A thread that is there before the emulator is."""
    made = ThreadPoolExecutor(1)
    made.submit(int).result()
    return made


@pytest.fixture
def tiles():
    """The emulator, with tiles to be had."""
    early_thread()
    with helpers_tiles.during("granted") as made:
        made.reset()
        yield made


@pytest.fixture(params=COMPILERS)
def probe(request, tiles):
    """The library, in a process that may use tiles."""
    lib = build_probe(request.param)
    assert lib.request() == 0
    yield lib
    if not tiles.emulated or tiles.configured():
        lib.release()


@pytest.fixture
def emulated(tiles):
    """The emulator, and only that."""
    if not tiles.emulated:
        pytest.skip("this machine has tiles")
    return tiles


# ---- shapes and numbers -------------------------------------------------------------------------


def config(shapes: dict[int, tuple[int, int]]) -> bytes:
    """What LDTILECFG reads: tile -> (rows, bytes of a row)."""
    made = bytearray(64)
    made[0] = 1
    for tile, (rows, row_bytes) in shapes.items():
        made[16 + 2 * tile] = row_bytes
        made[48 + tile] = rows
    return bytes(made)


def load(lib: ctypes.CDLL, tile: int, array: np.ndarray, how: str = "load") -> None:
    """A C-contiguous array of rows into a tile."""
    getattr(lib, f"{how}_{tile}")(array.ctypes.data, array.strides[0])


def store(lib: ctypes.CDLL, tile: int) -> np.ndarray:
    """What a tile stores into 16 x 64 bytes of 0xcc."""
    made = np.full((16, 64), 0xCC, np.uint8)
    getattr(lib, f"store_{tile}")(made.ctypes.data, 64)
    return made


def rand(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def flush(x: np.ndarray) -> np.ndarray:
    """Denormal float32 numbers as zeros."""
    return np.where(abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x)


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32 numbers whose product float64 holds exactly, rounded once: the sum is
    rounded to odd in float64, which leaves the second rounding nothing to get wrong."""
    with np.errstate(all="ignore"):
        product = flush(a).astype(np.float64) * flush(b).astype(np.float64)
        other = flush(c).astype(np.float64)
        total = product + other
        part = total - product
        rest = (product - (total - part)) + (other - part)
        inexact = np.isfinite(total) & (rest != 0)
        toward_zero = np.where(inexact & (rest * total < 0), np.nextafter(total, 0.0), total)
        odd = (toward_zero.view(np.uint64) | inexact.astype(np.uint64)).view(np.float64)
        tiny = abs(odd) < 2.0**-126 * (1 - 2.0**-25)  # still less than 2^-126 when rounded
        return np.where(tiny, np.copysign(0.0, odd), odd).astype(np.float32)


def dot_bf16(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c (m, n) float32, a (m, 2k) and b (k, 2n) uint16 holding bfloat16."""
    wide_a, wide_b = ((x.astype(np.uint32) << 16).view(np.float32) for x in (a, b))
    sums = np.zeros((2, *c.shape), np.float32)
    for k in range(b.shape[0]):
        for half in range(2):
            row = wide_b[k, half::2]
            sums[half] = fma(wide_a[:, 2 * k + half, None], row[None, :], sums[half])
    one = np.float32(1)
    return fma(np.broadcast_to(one, c.shape), c, fma(np.broadcast_to(one, c.shape), *sums))


def dot_bytes(name: str, c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c (m, n) int32, a (m, 4k) and b (k, 4n) bytes; the third letter from behind is A's sign."""
    types = {"s": np.int8, "u": np.uint8}
    wide_a = a.view(types[name[-3]]).astype(np.int64)
    wide_b = b.view(types[name[-2]]).astype(np.int64)
    right = wide_b.reshape(len(b), -1, 4).transpose(0, 2, 1).reshape(4 * len(b), -1)
    return (c.astype(np.int64) + wide_a @ right).astype(np.uint64).astype(np.uint32).view(np.int32)


SPECIAL = [0x0000, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81, 0x0001, 0x807F, 0x0080, 0x8080]
SPECIAL += [0x7F7F, 0xFF7F, 0x3F80, 0xBF80, 0x2000, 0x1FFF]


def numbers(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """bfloat16 numbers as uint16."""
    if kind == "bits":
        return rng.integers(0, 1 << 16, shape, np.uint16)
    if kind == "special":
        return rng.choice(np.array(SPECIAL, np.uint16), shape)
    scale = {"plain": 1.0, "large": 3e18, "tiny": 3e-20}[kind]
    x = (rng.standard_normal(shape) * scale * 2.0 ** rng.integers(-6, 7, shape)).astype(np.float32)
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def wide_numbers(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """float32 numbers that suit them."""
    if kind in ("bits", "special"):
        high = numbers(rng, kind, shape).astype(np.uint32) << 16
        return (high | rng.integers(0, 1 << 16, shape, np.uint32)).view(np.float32)
    scale = {"plain": 1.0, "large": 1e38, "tiny": 1e-38}[kind]
    return (rng.standard_normal(shape) * scale).astype(np.float32)


KINDS = ("plain", "large", "tiny", "special", "bits")
SHAPES = [(16, 16, 16), (1, 1, 1), (3, 5, 7), (16, 1, 16), (1, 16, 2), (7, 16, 16), (15, 13, 1)]


def numeric_case(lib: ctypes.CDLL, name: str, kind: str, shape: tuple[int, int, int], at: int):
    """One dot product on random operands: what C stores (in 0xcc), and what the model says."""
    m, n, k = shape
    rng = rand(hash_of(name, kind, shape, at))
    c_tile, a_tile, b_tile = DOT_TILES[at % len(DOT_TILES)]
    shapes = dict.fromkeys(range(8), (16, 64))
    shapes.update({c_tile: (m, 4 * n), a_tile: (m, 4 * k), b_tile: (k, 4 * n)})
    if name == "tdpbf16ps":
        a, b = numbers(rng, kind, (m, 2 * k)), numbers(rng, kind, (k, 2 * n))
        c = wide_numbers(rng, kind, (m, n))
        want = dot_bf16(c, a, b)
    else:
        a, b = (rng.integers(0, 256, s, np.uint8) for s in ((m, 4 * k), (k, 4 * n)))
        c = rng.integers(-(1 << 31), 1 << 31, (m, n), np.int64).astype(np.int32)
        want = dot_bytes(name, c, a, b)
    lib.config(config(shapes))
    for tile, array in ((c_tile, c), (a_tile, a), (b_tile, b)):
        load(lib, tile, array)
    getattr(lib, f"{name}_{c_tile}{a_tile}{b_tile}")()
    got = store(lib, c_tile)
    lib.release()
    return got, want


def hash_of(*parts: object) -> int:
    """The same number in every run."""
    return int.from_bytes(repr(parts).encode(), "little") % (1 << 61)


def same_numbers(got: np.ndarray, want: np.ndarray) -> bool:
    """Equal in every bit; all NaNs are one."""
    if want.dtype == np.int32:
        return np.array_equal(got, want)
    nan = np.isnan(want)
    return np.array_equal(np.isnan(got), nan) and np.array_equal(
        got.view(np.uint32)[~nan], want.view(np.uint32)[~nan]
    )


def digest(lib: ctypes.CDLL) -> bytes:
    """Results of all instructions on many operands; NaNs as one."""
    made = []
    for name in DOTS:
        for kind in KINDS if name == "tdpbf16ps" else ("bits",):
            for at, shape in enumerate(SHAPES):
                got = numeric_case(lib, name, kind, shape, at)[0].copy()
                if name == "tdpbf16ps":
                    numbers_ = got.view(np.float32)
                    numbers_[np.isnan(numbers_)] = np.nan
                made.append(got.tobytes())
    return b"".join(made)


def run_python(code: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """Python code that can import what tests import, in a process of its own."""
    start = f"import sys; sys.path[:0] = {[str(HERE), str(HERE.parent)]!r}\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, env=env)


# ---- instructions -------------------------------------------------------------------------------


def test_the_emulator_compiles_without_warnings():
    for compiler in COMPILERS:
        flags = (*helpers_tiles.FLAGS, "-Werror")
        files = {"tiles.c": helpers_tiles.SOURCE.read_text()}
        bind.compile_c(files, compiler=compiler, flags=flags, libs=("-pthread",))


def test_configurations_are_kept_and_released(probe, tiles):
    shapes = {0: (16, 64), 3: (1, 1), 7: (5, 33)}
    want = config(shapes)
    probe.config(want)
    assert tiles.configured() == 1
    got = np.full(64, 7, np.uint8)
    probe.get_config(got.ctypes.data)
    assert got.tobytes() == want
    probe.release()
    assert tiles.configured() == 0
    probe.get_config(got.ctypes.data)
    assert not got.any()
    probe.config(want)
    probe.config(bytes(64))  # palette 0 releases too
    assert tiles.configured() == 0


@pytest.mark.parametrize("how", ["load", "loadt1"])
@pytest.mark.parametrize("shape", [(16, 64), (1, 1), (5, 33), (16, 4), (1, 64)])
def test_loads_and_stores_keep_to_the_shape(probe, shape, how):
    rows, row_bytes = shape
    probe.config(config(dict.fromkeys(range(8), shape)))
    data = rand(1).integers(0, 256, (8, 16, 64), np.uint8)
    for t in range(8):
        load(probe, t, data[t], how)
    for t in range(8):
        want = np.full((16, 64), 0xCC, np.uint8)
        want[:rows, :row_bytes] = data[t, :rows, :row_bytes]
        assert np.array_equal(store(probe, t), want)
    for t in (0, 5):
        getattr(probe, f"zero_{t}")()
        assert not store(probe, t)[:rows, :row_bytes].any()
        assert store(probe, 7)[:rows, :row_bytes].any()
    probe.config(config(dict.fromkeys(range(8), shape)))
    for t in range(8):
        assert not store(probe, t)[:rows, :row_bytes].any(), "a new configuration zeroes tiles"


def room() -> tuple[np.ndarray, int]:
    """Memory with the stack of a signal handler below and rows above, and an address in it."""
    memory = np.zeros(1 << 19, np.uint8)
    return memory, memory.ctypes.data + (1 << 18) & ~63


@pytest.mark.parametrize("stride", [64, 96, 1000, -72])
def test_every_form_of_address(probe, stride):
    probe.config(config({3: (16, 64)}))
    memory, at = room()
    first = at - memory.ctypes.data
    for i, (base, index, scale, displacement) in enumerate(FORMS):
        if base == "rsp" and stride < 0:
            continue  # what is below the stack pointer belongs to signals
        step = stride if index else 0
        memory[:] = 0
        rows = rand(i).integers(1, 256, (16, 64), np.uint8)
        for r in range(16):
            memory[first + r * step : first + r * step + 64] = rows[r]
        want = np.array([memory[first + r * step : first + r * step + 64] for r in range(16)])
        getattr(probe, f"load_form_{i}")(at - displacement, step // scale)
        assert np.array_equal(store(probe, 3), want), FORMS[i]
        memory[:] = 0
        load(probe, 3, rows)
        getattr(probe, f"store_form_{i}")(at - displacement, step // scale)
        for r in range(16 if step else 0):
            found = memory[first + r * step : first + r * step + 64]
            assert np.array_equal(found[:step] if 0 < step < 64 else found, rows[r]), FORMS[i]
        if not step:
            assert np.array_equal(memory[first : first + 64], rows[15]), FORMS[i]


def test_every_form_of_address_of_a_configuration(probe):
    memory, at = room()
    first = at - memory.ctypes.data
    for i, (_base, index, scale, displacement) in enumerate(FORMS):
        want = config({3: (1 + i % 16, 1 + i % 64)})
        memory[:] = 0
        memory[first : first + 64] = list(want)
        far = 24 if index else 0
        getattr(probe, f"config_form_{i}")(at - displacement - far * scale, far)
        memory[:] = 0
        getattr(probe, f"get_config_form_{i}")(at - displacement - far * scale, far)
        assert memory[first : first + 64].tobytes() == want, FORMS[i]


def test_addresses_without_a_base_and_behind_the_instruction(probe):
    here, there = (
        np.frombuffer((ctypes.c_uint8 * 64).from_address(get()), np.uint8)
        for get in (probe.get_here, probe.get_there)
    )
    here[:] = list(config({3: (16, 64)}))
    probe.config_here()
    probe.config_there()
    assert np.array_equal(there, here)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x100000  # MAP_FIXED_NOREPLACE
    assert LIBC.mmap(LOW, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == LOW
    try:
        low = np.frombuffer((ctypes.c_uint8 * 1024).from_address(LOW), np.uint8)
        low[:] = rand(2).integers(0, 256, 1024, np.uint8)
        probe.load_low(0, 32)
        assert np.array_equal(store(probe, 3).ravel(), low)
    finally:
        LIBC.munmap(LOW, mmap.PAGESIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_products(probe, kind):
    for at in range(6 * len(SHAPES)):
        shape = SHAPES[at % len(SHAPES)]
        m, n, _ = shape
        got, want = numeric_case(probe, "tdpbf16ps", kind, shape, at)
        inside = np.ascontiguousarray(got[:m, : 4 * n]).view(np.float32)
        assert same_numbers(inside, want), (kind, shape, at)
        got[:m, : 4 * n] = 0xCC
        assert (got == 0xCC).all(), "a byte past the shape was stored"


@pytest.mark.parametrize("name", DOTS[1:])
def test_byte_products(probe, name):
    for at in range(6 * len(SHAPES)):
        shape = SHAPES[at % len(SHAPES)]
        m, n, _ = shape
        got, want = numeric_case(probe, name, "bits", shape, at)
        assert same_numbers(np.ascontiguousarray(got[:m, : 4 * n]).view(np.int32), want), shape


def test_the_model_of_a_rounded_product_is_right():
    """Against integers: float32 has 24 bits."""
    one = np.float32(1)
    for a, b, c, want in (
        (one + 2**-7, one + 2**-7, 2.0**24, 2.0**24 + 2),  # 1.0157 past halfway: up
        (1.0, 1.0, 2.0**24, 2.0**24),  # halfway: to even
        (1.0, 1.0, 2.0**24 + 2, 2.0**24 + 4),
        (2.0**-60, 2.0**-66, 0.0, 2.0**-126),
        (2.0**-60, -(2.0**-67), 0.0, -0.0),
        (2.0**-127, 2.0**20, 0.0, 0.0),
        (2.0**-30, 2.0**-30, 1 - 2.0**-24, 1 - 2.0**-24),
        (2.0**-25, 1.0, 1 - 2.0**-24, 1.0),  # halfway of float32; float64 has room for it
        (2.0**100, 2.0**28, 0.0, np.inf),
    ):
        got = fma(*(np.array([x], np.float32) for x in (a, b, c)))
        assert same_numbers(got, np.array([want], np.float32)), (a, b, c, got)


@pytest.mark.parametrize("mxcsr", [0x1F80, 0x7F80, 0x3F80, 0xFFC0])
def test_no_other_register_changes(probe, mxcsr):
    """And rounding modes of the program do not reach the product."""
    probe.config(config(dict.fromkeys(range(3), (16, 64))))
    rng = rand(3)
    a, b = (numbers(rng, "plain", (16, 32)) for _ in range(2))
    c = wide_numbers(rng, "plain", (16, 16))
    for t, array in enumerate((c, a, b)):
        load(probe, t, array)
    before = rng.integers(0, 256, 2048, np.uint8)
    after = np.zeros(2048 + 64 + 16, np.uint8)
    control = np.array([mxcsr], np.uint32)
    assert probe.all_registers(before.ctypes.data, after.ctypes.data, control.ctypes.data) == 1
    assert np.array_equal(after[:2048], before)
    assert np.array_equal(after[2048:2112], before[:64])
    assert after[2112:2120].view(np.uint64)[0] == (0x1234 << 8) + 0x5678
    assert after[2120:2124].view(np.uint32)[0] == mxcsr
    assert same_numbers(store(probe, 0).view(np.float32), dot_bf16(c, a, b))


def test_counts(probe, emulated):
    emulated.reset()
    probe.config(config(dict.fromkeys(range(8), (16, 64))))
    for t in range(8):
        getattr(probe, f"zero_{t}")()
    for _ in range(3):
        probe.tdpbf16ps_012()
        store(probe, 0)
    thread = threading.Thread(target=lambda: probe.config(config({0: (1, 4)})))
    thread.start()
    thread.join()
    probe.release()
    expected = {"ldtilecfg": 2, "tilezero": 8, "tdpbf16ps": 3, "tilestored": 3, "tilerelease": 1}
    assert emulated.counts() == {**dict.fromkeys(emulated.names, 0), **expected}
    emulated.reset()
    assert not any(emulated.counts().values())


def test_clobbered_tiles_hold_nans_until_they_are_configured(probe, emulated):
    assert not emulated.clobber()
    shapes = config({0: (16, 64)})
    probe.config(shapes)
    assert emulated.clobber()
    assert np.isnan(store(probe, 0).view(np.float32)).all()
    probe.config(shapes)
    assert not store(probe, 0).any()


def test_threads_have_tiles_of_their_own(probe, tiles):
    meet = threading.Barrier(4)
    wrong = []

    def work(i: int) -> None:
        if tiles.configured():
            wrong.append("a new thread has tiles")
        mine = config({0: (1 + i, 4 * (1 + i)), 1: (16, 64)})
        data = rand(i).integers(0, 256, (16, 64), np.uint8)
        for _ in range(20):
            probe.config(mine)
            meet.wait(30)
            load(probe, 1, data)
            meet.wait(30)
            got = np.zeros(64, np.uint8)
            probe.get_config(got.ctypes.data)
            if got.tobytes() != mine or not np.array_equal(store(probe, 1), data):
                wrong.append(i)
            probe.release()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert tiles.configured() == 0


# ---- memory -------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush_", ["left", "right"])
@pytest.mark.parametrize("shape", [(16, 64), (3, 33), (1, 1), (16, 1)])
def test_no_byte_past_the_shape_is_touched(probe, shape, flush_):
    probe.config(config({0: shape}))
    data = rand(4).integers(0, 256, shape, np.uint8)
    with Arena(flush_) as arena:
        source, target = arena.place(data), arena.room(shape, np.uint8)
        arena.protect()
        load(probe, 0, source)
        probe.store_0(target.ctypes.data, shape[1])
        arena.check()
        assert np.array_equal(target, data)


FAULTS = r"""
static unsigned char shapes[64] = {1};
static unsigned char out[16][64];
static unsigned char *page, *guard;
static sigjmp_buf back;
static volatile int faults;

static void jump(int s, siginfo_t *info, void *context)
{
    (void)s, (void)context;
    if (info->si_addr == guard)
        ++faults;
    siglongjmp(back, 1);
}

static void jump_without_mask(int s, siginfo_t *info, void *context)
{
    sigset_t segv;
    (void)context;
    faults += info->si_addr == guard;
    sigemptyset(&segv);
    sigaddset(&segv, s);
    sigprocmask(SIG_UNBLOCK, &segv, NULL);
    __builtin_longjmp((void **)back, 1);
}

static void mend(int s, siginfo_t *info, void *context)
{
    (void)s, (void)context;
    faults += info->si_addr == guard;
    mprotect(guard, 4096, PROT_READ | PROT_WRITE);
}

static void catch_with(void (*handler)(int, siginfo_t *, void *))
{
    struct sigaction act;
    memset(&act, 0, sizeof act);
    act.sa_sigaction = handler;
    act.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &act, NULL);
}

static void load(const void *from)
{
    __asm__ volatile("tileloadd (%0,%1,1),%%tmm0" : : "r"(from), "r"(64L) : "memory");
}
static void store(void *to)
{
    __asm__ volatile("tilestored %%tmm0,(%0,%1,1)" : : "r"(to), "r"(64L) : "memory");
}

int main(int argc, char **argv)
{
    const char *const what = argc > 1 ? argv[1] : "";
    if (ask(0x1023, (void *)18) != 0)
        return 3;
    page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    guard = page + 4096;
    for (int i = 0; i < 8192; ++i)
        page[i] = (unsigned char)(i * 7 + i / 64);
    mprotect(guard, 4096, PROT_NONE);
    shapes[16] = 64, shapes[48] = 16;
    __asm__ volatile("ldtilecfg %0" : : "m"(shapes));
    load(guard - 1024);
    store(guard - 1024);
    if (strcmp(what, "load") == 0)
        load(guard - 960);
    if (strcmp(what, "store") == 0)
        store(guard - 960);
    if (strcmp(what, "config") == 0)
        __asm__ volatile("ldtilecfg (%0)" : : "r"(guard - 63) : "memory");
    if (strcmp(what, "jump") == 0) {
        catch_with(jump);
        for (volatile int i = 0; i < 3; ++i)
            if (sigsetjmp(back, 1) == 0)
                load(guard - 960);
        load(guard - 1024);
        store(out);
        return faults == 3 && memcmp(out, guard - 1024, 1024) == 0 ? 0 : 4;
    }
    if (strcmp(what, "jump_without_mask") == 0) { /* leaves the mask of the fault in force */
        catch_with(jump_without_mask);
        if (__builtin_setjmp((void **)back) == 0)
            load(guard - 960);
        load(guard - 1024);
        store(out);
        return faults == 1 && memcmp(out, guard - 1024, 1024) == 0 ? 0 : 4;
    }
    if (strcmp(what, "mend") == 0) {
        catch_with(mend);
        load(guard - 960);
        store(out);
        return faults == 1 && memcmp(out, guard - 960, 1024) == 0 ? 0 : 4;
    }
    __asm__ volatile("tilerelease");
    puts("survived");
    return 0;
}
"""

FAULTY = {
    "none": 0, "load": -signal.SIGSEGV, "store": -signal.SIGSEGV, "config": -signal.SIGSEGV,
    "jump": 0, "jump_without_mask": 0, "mend": 0,
}  # fmt: skip


def program(text: str, compiler: str) -> str:
    """A compiled program, with TOOLS in front."""
    flags = ("-std=gnu99", "-O1", "-Wall", "-Wextra")
    return str(bind.compile_c({"a.c": TOOLS + text}, compiler=compiler, flags=flags, suffix=""))


def ways() -> list[dict[str, str] | None]:
    """Environments in which programs find tiles: emulated ones, and the machine's own."""
    emulated = helpers_tiles.preload_environment("granted", force=True)
    return [emulated, None] if helpers_tiles.native() else [emulated]


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("what", FAULTY)
def test_faults_of_loads_and_stores_are_ordinary(compiler, what):
    for env in ways():
        run = subprocess.run([program(FAULTS, compiler), what], capture_output=True, env=env)
        assert run.returncode == FAULTY[what], run.stderr
        assert b"tiles:" not in run.stderr


# ---- what hardware refuses ----------------------------------------------------------------------

MISUSE = r"""
static unsigned char shapes[64], data[1024];
static void shape(int tile, int rows, int row_bytes)
{
    shapes[16 + 2 * tile] = (unsigned char)row_bytes;
    shapes[17 + 2 * tile] = (unsigned char)(row_bytes >> 8);
    shapes[48 + tile] = (unsigned char)rows;
}
static void on(void) { __asm__ volatile("ldtilecfg %0" : : "m"(shapes)); }
#define LOAD __asm__ volatile("tileloadd (%0,%1,1),%%tmm1" : : "r"(data), "r"(64L) : "memory")
#define STORE __asm__ volatile("tilestored %%tmm1,(%0,%1,1)" : : "r"(data), "r"(64L) : "memory")
#define DOT __asm__ volatile("tdpbf16ps %%tmm2,%%tmm1,%%tmm0" : :)
#define BYTES __asm__ volatile("tdpbuud %%tmm2,%%tmm1,%%tmm0" : :)
#define ZERO __asm__ volatile("tilezero %%tmm1" : :)
#define OFF __asm__ volatile("tilerelease")

int main(int argc, char **argv)
{
    const int which = argc > 1 ? atoi(argv[1]) : -1, asks = argc > 2 ? atoi(argv[2]) : 1;
    if (asks)
        printf("%ld\n", ask(0x1023, (void *)18));
    shapes[0] = 1;
    shape(0, 16, 64), shape(1, 16, 64), shape(2, 16, 64);
    switch (which) {
CASES
    default: on(); LOAD; ZERO; DOT; BYTES; STORE; OFF; break;
    }
    puts("survived");
    return 0;
}
"""


def encoded(prefix: int, opcode: int, c: int, a: int, b: int) -> str:
    """A product in bytes: assemblers do not write some of them."""
    text = (0xC4, 0xE2, (~b & 15) << 3 | prefix, opcode, 0xC0 | c << 3 | a)
    return f'__asm__ volatile(".byte {", ".join(map(hex, text))}");'


ILL, SEGV = -signal.SIGILL, -signal.SIGSEGV
# what -> (C code, how the process ends, the reason)
REFUSED = {
    "load first": ("LOAD;", ILL, "TILELOADD: not configured"),
    "store first": ("STORE;", ILL, "TILESTORED: not configured"),
    "zero first": ("ZERO;", ILL, "TILEZERO: not configured"),
    "product first": ("DOT;", ILL, "TDPBF16PS: not configured"),
    "bytes first": ("BYTES;", ILL, "TDPBUUD: not configured"),
    "load after release": ("on(); OFF; LOAD;", ILL, "TILELOADD: not configured"),
    "load after palette 0": ("on(); shapes[0] = 0; on(); LOAD;", ILL, "TILELOADD: not configured"),
    "C is A": ("on(); " + encoded(2, 0x5C, 1, 1, 2), ILL, "TDPBF16PS: the same tile twice"),
    "C is B": ("on(); " + encoded(2, 0x5C, 2, 1, 2), ILL, "TDPBF16PS: the same tile twice"),
    "A is B": ("on(); " + encoded(3, 0x5E, 0, 1, 1), ILL, "TDPBSSD: the same tile twice"),
    "no shape to load": ("shape(1, 0, 0); on(); LOAD;", ILL, "TILELOADD: without a shape"),
    "no shape to store": ("shape(1, 0, 0); on(); STORE;", ILL, "TILESTORED: without a shape"),
    "no shape to zero": ("shape(1, 0, 0); on(); ZERO;", ILL, "TILEZERO: without a shape"),
    "no shape in C": ("shape(0, 0, 0); on(); DOT;", ILL, "TDPBF16PS: without a shape"),
    "no shape in B": ("shape(2, 0, 0); on(); DOT;", ILL, "TDPBF16PS: without a shape"),
    "rows differ": ("shape(1, 15, 64); on(); DOT;", ILL, "TDPBF16PS: A and C differ in rows"),
    "columns differ": ("shape(2, 16, 60); on(); DOT;", ILL, "TDPBF16PS: B and C differ in columns"),
    "k differs": ("shape(1, 16, 60); on(); DOT;", ILL, "TDPBF16PS: B does not have a row"),
    "k differs in bytes": ("shape(2, 15, 64); on(); BYTES;", ILL, "TDPBUUD: B does not have a row"),
    "odd A": ("shape(1, 16, 62); on(); DOT;", ILL, "TDPBF16PS: a group of four"),
    "odd C": ("shape(0, 16, 63); shape(2, 16, 63); on(); BYTES;", ILL, "TDPBUUD: a group of four"),
    "palette 2": ("shapes[0] = 2; on();", SEGV, "LDTILECFG: no such palette"),
    "start row": ("shapes[1] = 1; on();", SEGV, "LDTILECFG: start_row"),
    **{f"byte {i}": (f"shapes[{i}] = 1; on();", SEGV, "LDTILECFG: reserved")
       for i in (2, 15, 32, 47, 56, 63)},
    "65 bytes": ("shape(7, 16, 65); on();", SEGV, "LDTILECFG: more than 64 bytes"),
    "256 bytes": ("shape(7, 16, 256); on();", SEGV, "LDTILECFG: more than 64 bytes"),
    "17 rows": ("shape(7, 17, 64); on();", SEGV, "LDTILECFG: more than 16 rows"),
    "rows only": ("shape(7, 1, 0); on();", SEGV, "LDTILECFG: rows without bytes"),
    "bytes only": ("shape(7, 0, 4); on();", SEGV, "LDTILECFG: rows without bytes"),
    "tile 8": ("on(); " + encoded(2, 0x5C, 0, 1, 8), ILL, ""),
    "fp16": ("on(); " + encoded(3, 0x5C, 0, 1, 2), ILL, ""),
}  # fmt: skip


@functools.cache
def misuse(compiler: str) -> str:
    """The program of all of these."""
    cases = [f"    case {i}: {code} break;" for i, (code, _, _) in enumerate(REFUSED.values())]
    return program(MISUSE.replace("CASES", "\n".join(cases)), compiler)


def misused(compiler: str, what: str, env: dict[str, str] | None, asks: bool = True):
    """One of them, run."""
    which = list(REFUSED).index(what) if what else -1
    command = [misuse(compiler), str(which), str(int(asks))]
    return subprocess.run(command, capture_output=True, env=env, text=True)


@pytest.mark.parametrize("compiler", COMPILERS)
@pytest.mark.parametrize("what", REFUSED)
def test_what_hardware_refuses_ends_the_process(compiler, what):
    _, end, reason = REFUSED[what]
    for env in ways():
        if env is None and what in ("start row", "fp16"):
            continue  # resuming an interrupted load, and what newer processors have
        run = misused(compiler, what, env)
        assert run.returncode == end, run.stderr
        assert "survived" not in run.stdout
        if env is not None and reason:
            name, _, words = reason.partition(": ")
            assert run.stderr.startswith(f"tiles: {name.lower()} at 0x"), run.stderr
            assert words in run.stderr


@pytest.mark.parametrize("compiler", COMPILERS)
def test_what_hardware_accepts_does_not(compiler):
    for env in ways():
        run = misused(compiler, "", env)
        assert (run.returncode, run.stdout, run.stderr) == (0, "0\nsurvived\n", "")


@pytest.mark.parametrize("mode", helpers_tiles.MODES)
@pytest.mark.parametrize("asks", [False, True])
def test_tiles_without_permission_end_the_process(mode, asks):
    run = misused(COMPILERS[0], "", helpers_tiles.preload_environment(mode, force=True), asks)
    if mode == "granted" and asks:
        assert run.returncode == 0
    else:
        assert run.returncode == ILL
        assert "ldtilecfg" in run.stderr
        assert "no permission" in run.stderr


# ---- permission ---------------------------------------------------------------------------------

TILE_CONFIG, TILE_DATA = 1 << 17, 1 << 18


def answers(lib: ctypes.CDLL) -> list[int]:
    """Supported components, permitted ones, what a request returns, and permitted ones again."""
    mask = np.zeros(1, np.uint64)
    tile_bits = TILE_CONFIG | TILE_DATA

    def get(code: int) -> int:
        mask[0] = 0
        assert lib.get(code, mask.ctypes.data) == 0
        assert int(mask[0]) & 7 == 7  # x87, SSE, AVX
        return int(mask[0]) & tile_bits

    return [get(0x1021), get(0x1022), lib.request(), get(0x1022)]


ANSWERS = {
    "absent": [0, 0, -95, 0],
    "refused": [TILE_CONFIG | TILE_DATA, TILE_CONFIG, -1, TILE_CONFIG],
    "granted": [TILE_CONFIG | TILE_DATA, TILE_CONFIG, 0, TILE_CONFIG | TILE_DATA],
}


@pytest.mark.parametrize("mode", ANSWERS)
def test_modes(emulated, mode):
    lib = build_probe(COMPILERS[0])
    emulated.mode(mode)
    emulated.reset()
    assert answers(lib) == ANSWERS[mode]
    assert emulated.counts()["requests"] == 1
    assert lib.request_of(17) == -95
    assert lib.request_of(64) == -22
    emulated.mode(mode)
    assert answers(lib) == ANSWERS[mode], "a mode begins without permission"


def test_a_test_leaves_the_mode_that_it_found(emulated):
    lib = build_probe(COMPILERS[0])
    emulated.mode("refused")
    with helpers_tiles.during("granted"):
        assert answers(lib) == ANSWERS["granted"]
    assert answers(lib) == ANSWERS["refused"]


def test_modes_on_other_threads(emulated):
    lib = build_probe(COMPILERS[0])
    found = []
    for mode in ANSWERS:
        emulated.mode(mode)
        thread = threading.Thread(target=lambda: found.append(answers(lib)))
        thread.start()
        thread.join()
    assert found == list(ANSWERS.values())


def test_a_bad_pointer_is_an_error(emulated):
    assert build_probe(COMPILERS[0]).get(0x1021, 8) == -14


def test_a_forked_child_has_tiles_of_its_own(emulated):
    lib = build_probe(COMPILERS[0])

    def child() -> tuple[list[int], bool, int]:
        found = answers(lib)
        data = rand(5).integers(0, 256, (16, 64), np.uint8)
        lib.config(config({0: (16, 64)}))
        load(lib, 0, data)
        same = np.array_equal(store(lib, 0), data)
        lib.release()
        return found, same, emulated.counts()["tileloadd"]

    emulated.reset()
    assert in_child(child) == (ANSWERS["granted"], True, 1)
    assert in_child(lambda: in_child(child)) == (ANSWERS["granted"], True, 1)
    assert answers(lib)[1] == TILE_CONFIG, "what the child asked for is the child's"
    assert in_child(lambda: answers(lib)[1]) == TILE_CONFIG | TILE_DATA, "a child inherits it"


def test_code_becomes_faster_only_where_it_runs(emulated, tmp_path):
    """A child marks instructions in its own memory, and the file stays as it is."""
    copy = tmp_path / "copy.so"
    shutil.copy(build_probe(COMPILERS[0])._name, copy)
    before = copy.read_bytes()

    def marked(lib: ctypes.CDLL) -> bool:
        return 0xCC in ctypes.string_at(ctypes.cast(lib.zero_0, ctypes.c_void_p), 16)

    def child() -> tuple[bool, bool]:
        lib = ctypes.CDLL(str(copy))
        assert build_probe(COMPILERS[0]).request() == 0
        first = marked(lib)
        build_probe(COMPILERS[0]).config(config({0: (16, 64)}))
        lib.zero_0()
        lib.zero_0()
        return first, marked(lib)

    assert in_child(child) == (False, True)
    assert copy.read_bytes() == before


ASK = r"""
int main(void)
{
    uint64_t supported = 0, permitted = 0;
    const long a = ask(0x1021, &supported), b = ask(0x1022, &permitted);
    const long c = ask(0x1023, (void *)18);
    printf("%ld %ld %ld %d %d\n", a, b, c, (int)(supported >> 17 & 3), (int)(permitted >> 17 & 3));
    return 0;
}
"""


@pytest.mark.parametrize("compiler", COMPILERS)
def test_programs_that_are_started_get_the_kernels_answers(emulated, compiler):
    run = subprocess.run([program(ASK, compiler)], capture_output=True, text=True)
    assert run.returncode == 0
    found = [int(word) for word in run.stdout.split()]
    assert found[2] < 0
    assert found[3:] == [0, 0]
    assert misused(compiler, "", None).returncode == ILL, "and have no tiles"


@pytest.mark.parametrize("mode", ANSWERS)
def test_programs_that_are_started_with_the_emulator(mode):
    env = helpers_tiles.preload_environment(mode, force=True)
    supported, permitted, requested, _ = ANSWERS[mode]
    want = f"0 0 {requested} {supported >> 17} {permitted >> 17}\n"
    for command in ([program(ASK, COMPILERS[0])], ["sh", "-c", program(ASK, COMPILERS[0])]):
        run = subprocess.run(command, capture_output=True, text=True, env=env)
        assert (run.returncode, run.stdout, run.stderr) == (0, want, "")


def test_threads_that_were_there_before(emulated):
    found = early_thread().submit(answers, build_probe(COMPILERS[0])).result()
    assert found == ANSWERS["granted"]


def test_threads_that_were_there_before_where_the_parent_emulates_too(emulated):
    """One process can have only one listener, so that the child takes the other way."""
    code = """
import helpers_tiles, test_tiles
lib, early = test_tiles.build_probe(test_tiles.COMPILERS[0]), test_tiles.early_thread()
helpers_tiles.install("granted", force=True)
found = early.submit(test_tiles.answers, lib).result()
assert found == test_tiles.ANSWERS["granted"], found
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr.decode()


# ---- other handlers -----------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("what", ["ud2", "zero_0"])
def test_other_handlers_of_invalid_instructions_come_next(what, again):
    """faulthandler's: it shows where Python was, and the process ends. Also where it took ours for
    the one before it."""
    code = f"""
import faulthandler, helpers_tiles, test_tiles
lib = test_tiles.build_probe(test_tiles.COMPILERS[0])
if {again}:
    helpers_tiles.install("granted", force=True)
faulthandler.enable()
helpers_tiles.install("granted", force=True)
assert lib.request() == 0
lib.{what}()
"""
    run = run_python(code)
    assert run.returncode == ILL
    assert b"Fatal Python error: Illegal instruction" in run.stderr
    assert (b"tiles: tilezero at 0x" in run.stderr) == (what == "zero_0")


def test_handlers_that_go_on_do():
    code = """
import ctypes, helpers_tiles, test_tiles
lib = test_tiles.build_probe(test_tiles.COMPILERS[0])
lib.skip_invalid()
helpers_tiles.install("granted", force=True)
assert lib.request() == 0
for _ in range(3):
    lib.ud2()
    lib.int3()
    lib.config(test_tiles.config({0: (16, 64)}))
    lib.release()
assert list((ctypes.c_int * 2).in_dll(lib, "skipped")) == [3, 3]
lib.zero_0()
"""
    run = run_python(code)
    assert run.returncode == ILL, run.stderr.decode()
    assert b"tiles: tilezero at 0x" in run.stderr, "no handler lets a violation pass"


# ---- the emulator against itself and against hardware -------------------------------------------

RESULTS = """
import test_tiles
lib = test_tiles.build_probe(test_tiles.COMPILERS[0])
assert lib.request() == 0
sys.stdout.buffer.write(test_tiles.digest(lib))
"""


def test_programs_compute_what_this_process_does(tiles):
    """Emulated tiles in a child; in this process emulated ones too, or where there are real ones
    those."""
    lib = build_probe(COMPILERS[0])
    assert lib.request() == 0
    run = run_python(RESULTS, helpers_tiles.preload_environment("granted", force=True))
    assert run.returncode == 0, run.stderr.decode()
    assert run.stdout == digest(lib)


def test_the_environment_keeps_what_was_there(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "other.so")
    monkeypatch.setenv("HL_TILES_FORCE", "1")
    env = helpers_tiles.preload_environment("refused")
    assert env["LD_PRELOAD"].split() == [str(helpers_tiles.path()), "other.so"]
    assert env["HL_TILES"] == "refused"
    assert "HL_TILES_FORCE" not in env
    assert env["PATH"] == os.environ["PATH"]
