"""The hazard table (docs/hazards.md), cases 45 to 52: processors, compilers, threads, stacks; and
the table itself. Small and for every shipped header; the sweeps are named in the table."""

import ctypes
import functools
import re
import subprocess
from pathlib import Path

import helpers_every as every
import helpers_hazards as hz
import numpy as np
import pytest
from helpers import ROOT, TILES
from helpers_hazards import FLUSHES, HEADERS, differs, filled, made, same
from helpers_memory import Died, in_child

from gen import bind
from gen.isa import ISAS


def every_header(*names: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", names)


# ---- 45, 46 -------------------------------------------------------------------------------------


@every_header(*HEADERS)
def test_hazard_45_no_byte_outside_is_read_at_the_edges_of_tiles(name):
    """Keys round a vector and a tile, three heads, all buffers flush with a forbidden page on
    either side. Every size: tests/test_memory.py and its like for each operator."""
    isas = every.isas_in(name)
    for flush in FLUSHES:
        for keys in (1, 17, 33):
            call = made(name, (keys,), rows=1, heads=3)
            for isa, got in hz.between_pages(call, {}, isas, flush).items():
                same(got, call.run(isa), (isa, flush, keys))
    short = call.inputs()["query"].reshape(-1)[:-1].copy()
    with pytest.raises(Died):  # the control: the last channel is not there
        hz.between_pages(call, {"query": short}, isas[:1])


@every_header(*HEADERS)
def test_hazard_46_threads_order_chunks_and_batch_change_no_bit(name):
    """Tasks in other orders on three threads, long rows cut into tasks, a batch by itself or behind
    others: the same bits. Other numbers: others (the control)."""
    kinds = ("query", "key", "value", "attention_out", "dout", "dquery", "dkey", "dvalue")
    call = filled(made(name, (150, 150), rows=2, heads=3))
    one = filled(made(name, (150,), rows=2, heads=3))
    k, split = call.kernel, "partials" in hz.pointers(name)
    chunk = {"chunk_keys": 128} if split else {}
    for isa in every.isas_in(name):
        want = call.run(isa, **chunk)
        for order in (0, 1):
            outputs = call.outputs()
            fields = {**call.fields(isa), **outputs, **chunk}
            plan, result = k.plan(**fields)
            if split and order and plan.split_bytes:
                room = np.zeros(plan.split_bytes, np.uint8)
                plan, result = k.plan(**fields, partials=room, partials_bytes=room.nbytes)
            assert result.ok, result
            k.execute(plan, np.random.default_rng(order).permutation(plan.n_tasks).tolist(), 3)
            same(outputs, want, (isa, order))
        alone = {n: a for n, a in call.inputs().items() if n in kinds and len(a) == 2}
        if len(alone) >= 3 and not call.grads:
            first = {n: a[1:].copy() for n, a in alone.items()}
            for n in ("actual_seq_lengths_query", "actual_seq_lengths_kv", "actual_seq_lengths"):
                if n in one.inputs():
                    first[n] = one.inputs()[n]
            rest = {n: a[1:].copy() for n, a in call.inputs().items() if n.endswith("_rope")}
            rest |= {n: a for n, a in call.inputs().items() if n.startswith("antiquant")}
            got = one.run(isa, **first, **rest, scale_value=call.sizes()["scale_value"], **chunk)
            assert got["attention_out"][0].tobytes() == want["attention_out"][1].tobytes(), isa
    assert differs(filled(made(name, (150, 150), rows=2, heads=3, seed=2)).run(), call.run())


# ---- 47 to 50 -----------------------------------------------------------------------------------


def own_data(path: str) -> list[str]:
    """Symbols of ours in an object's writable memory."""
    listed = subprocess.run(["nm", path], check=True, capture_output=True, text=True).stdout
    found = (line.split()[-2:] for line in listed.splitlines() if len(line.split()) >= 2)
    written = (name for kind, name in found if kind in "bBdDsSgGcC")
    return [name for name in written if name.lower().startswith("hl_")]


@every_header(*HEADERS)
def test_hazard_47_no_mutable_data(name):
    """Nothing to race for: no variable outlives a call."""
    assert own_data(every.kernel(name).library._name) == []


def test_hazard_47_mutable_data_is_noticed():
    code = "static int hl_found; int hl_use(void); int hl_use(void) { return ++hl_found; }\n"
    assert own_data(str(bind.compile_c({"data.c": code}, flags=("-O0",)))) == ["hl_found"]


@every_header(*[n for n in HEADERS if "amx" in every.isas_in(n)])
def test_hazard_48_tiles_are_released(name):
    """After calls, tasks and refusals. Without permission AVX-512 runs: tests/test_amx.py."""
    assert TILES is not None
    call = made(name, (40,), rows=2, heads=20)
    fields = {**call.fields("amx"), **call.outputs()}
    TILES.reset()
    call.run("amx")
    assert TILES.configured() == 0, "tiles are left configured"
    if TILES.emulated:
        counts = TILES.counts()
        assert counts.pop("violations") == 0
        assert sum(counts.values()) > counts["requests"], "no tile was used"
    assert not call.kernel.run(**{**fields, "batch": -1}).ok
    assert TILES.configured() == 0


def test_hazard_49_no_instruction_set_of_unknown_length():
    """SVE, SME and RVV are not generated: the state that they would have to leave behind does not
    exist. Whoever adds one finds this test, and case 49 of the table."""
    assert set(ISAS) == {"scalar", "avx2", "avx512", "amx", "neon"}
    code = "".join(every.text(name) for name in HEADERS)
    assert not re.search(r"arm_sve\.h|arm_sme\.h|riscv_vector\.h|svcnt|__riscv_v", code)


SMALL_STACK = r"""
#include <pthread.h>
#include <stddef.h>
typedef int (*kernel_fn)(const void *, void *, size_t, void *);
static struct { kernel_fn fn; const void *args; void *workspace; size_t bytes; int status; } job;
static void *go(void *unused)
{
    (void)unused;
    job.status = job.fn(job.args, job.workspace, job.bytes, 0);
    return 0;
}
int hazard_run(void *fn, const void *args, void *workspace, size_t bytes, size_t stack);
int hazard_run(void *fn, const void *args, void *workspace, size_t bytes, size_t stack)
{
    pthread_attr_t attr;
    pthread_t thread;
    job.fn = (kernel_fn)fn;
    job.args = args;
    job.workspace = workspace;
    job.bytes = bytes;
    job.status = -1;
    if (pthread_attr_init(&attr) != 0 || pthread_attr_setstacksize(&attr, stack) != 0) return -2;
    if (pthread_create(&thread, &attr, go, 0) != 0) return -3;
    pthread_join(thread, 0);
    return job.status;
}
int hazard_deep(const void *args, void *workspace, size_t bytes, void *error);
int hazard_deep(const void *args, void *workspace, size_t bytes, void *error)
{
    volatile float sc[16384]; /* what other libraries have there */
    (void)args; (void)workspace; (void)error;
    for (int i = 16383; i >= 0; i -= 64) sc[i] = (float)bytes;
    return (int)sc[63] * 0;
}
"""


@functools.cache
def small_stacks() -> ctypes.CDLL:
    p, size = ctypes.c_void_p, ctypes.c_size_t
    lib = ctypes.CDLL(str(bind.compile_c({"stack.c": SMALL_STACK}, flags=("-O1", "-pthread"))))
    lib.hazard_run.argtypes = (p, p, p, size, size)
    return lib


STACK = 32 * 1024  # of which the C library takes some; tiles may be emulated in signal handlers


@every_header(*HEADERS)
def test_hazard_50_small_stacks(name):
    """The call on a thread of 32 KiB. The bound of each function: -fstack-usage, tests/check.py
    (exported)."""
    lib, k = small_stacks(), every.kernel(name)
    call = hz.full(name)[0]
    for isa in every.isas_in(name):
        if ISAS[isa].tiles and TILES is not None and TILES.emulated:
            continue  # its signal handler needs more than the kernel
        outputs, want = call.outputs(), call.run(isa)
        args = k.args(**{**call.fields(isa), **outputs})
        room = np.zeros(k._c_workspace_bytes(ctypes.byref(args)), np.uint8)
        function = ctypes.cast(k._c, ctypes.c_void_p)

        def run(function=function, args=args, room=room) -> int:
            where = ctypes.addressof(args)
            return lib.hazard_run(function, where, room.ctypes.data, room.nbytes, STACK)

        assert in_child(run, f"{name} {isa}") == 0
        assert run() == 0
        same(outputs, want, isa)


def test_hazard_50_a_deep_stack_is_noticed():
    lib = small_stacks()
    deep = ctypes.cast(lib.hazard_deep, ctypes.c_void_p)
    assert lib.hazard_run(deep, None, None, 0, 1 << 20) == 0
    with pytest.raises(Died):
        in_child(lambda: lib.hazard_run(deep, None, None, 0, STACK))


# ---- 51, 52 -------------------------------------------------------------------------------------


def syntax(
    source: str, folder: Path, *flags: str, cxx: bool = False
) -> subprocess.CompletedProcess:
    path = folder / ("hazard.cpp" if cxx else "hazard.c")
    path.write_text(source)
    standard = "-std=c++11" if cxx else "-std=c99"
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Wshadow", "-Wundef", "-Werror"]
    command = ["g++" if cxx else "gcc", standard, *strict, *flags, f"-I{ROOT / 'include'}"]
    return subprocess.run([*command, str(path)], capture_output=True, text=True, cwd=folder)


@every_header(*HEADERS)
def test_hazard_51_arithmetic_that_forgets_nan_is_refused(name, tmp_path):
    """-ffast-math and -ffinite-math-only: an error that says what to do; HL_ALLOW_FINITE_MATH lets
    them. No union, no pointer to another type than the number's: bits are copied."""
    line = f'#define HL_API extern\n#include "{name}.h"\nextern int used;\n'
    made_of = syntax(line, tmp_path, "-ffast-math", "-fsyntax-only")
    assert made_of.returncode and "-ffast-math removes the rules" in made_of.stderr, made_of.stderr
    assert syntax(line, tmp_path, "-fsyntax-only").returncode == 0
    code = bind.without_comments(every.text(name))
    assert not re.search(r"\bunion\b", code)
    assert "(uint32_t *)&" not in code and "(float *)&" not in code
    if name == HEADERS[0]:
        allowed = "#define HL_ALLOW_FINITE_MATH\n" + line
        assert syntax(allowed, tmp_path, "-ffinite-math-only", "-fsyntax-only").returncode == 0
        assert syntax(line, tmp_path, "-ffinite-math-only", "-fsyntax-only").returncode


def includes(names: tuple[str, ...]) -> str:
    return "".join(f'#include "{name}.h"\n' for name in names)


def test_hazard_52_all_headers_in_one_file(tmp_path):
    """Every shipped header, then all again in the opposite order, as C and as C++, without a
    warning; every macro that they leave has the prefix. Bodies meet in pairs: tests/check.py."""
    both = HEADERS + HEADERS[::-1]
    source = "#define HL_API extern\n" + includes(both) + "extern int used;\n"
    for cxx in (False, True):
        made_of = syntax(source, tmp_path, "-fsyntax-only", cxx=cxx)
        assert made_of.returncode == 0, made_of.stderr[-2000:]
    system = "#include <stddef.h>\n#include <stdint.h>\n"
    defined = []
    for text in (system, system + source):
        made_of = syntax(text, tmp_path, "-dM", "-E", "-o", "-")
        assert made_of.returncode == 0, made_of.stderr[-2000:]
        defined.append(set(re.findall(r"^#define (\w+)", made_of.stdout, re.MULTILINE)))
    left = defined[1] - defined[0]
    assert left and all(macro.startswith("HL_") for macro in left), sorted(left)[:5]
    broken = source.replace("extern int used;", "extern int used\nint;")
    assert syntax(broken, tmp_path, "-fsyntax-only").returncode, "the control compiles"


# ---- the table ----------------------------------------------------------------------------------

TABLE = ROOT / "docs" / ("trust.md" if (ROOT / "docs" / "trust.md").is_file() else "hazards.md")
ROW = re.compile(r"^\| (\d+) \| ([^|]+) \| ([^|]+) \|$", re.MULTILINE)


def faults(table: str, tests: set[str]) -> list[str]:
    """What is wrong with a table: numbers, tests that are not there, numbers without a test."""
    rows = [(int(n), reading, test) for n, reading, test in ROW.findall(table)]
    numbers = [n for n, _, _ in rows]
    counts = {n: numbers.count(n) for n in range(1, 53)}
    found = [f"case {n} is there {times} times" for n, times in counts.items() if times != 1]
    for n, reading, test in rows:
        named = re.findall(r"`(test_\w+)`", test)
        found += [f"case {n}: {name} does not exist" for name in named if name not in tests]
        own = [name for name in named if re.match(rf"test_hazard_{n:02d}_", name)]
        if not own and "does not apply" not in reading:
            found.append(f"case {n} has no test of its number")
    return found


@functools.cache
def all_tests() -> set[str]:
    """Names of all tests of the project."""
    texts = (path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    return {name for text in texts for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}


def test_the_table_names_each_case_once_and_tests_that_exist():
    table = TABLE.read_text(encoding="utf-8")
    if not ROW.search(table):  # trust.md is there, the table still stands by itself
        table = (ROOT / "docs" / "hazards.md").read_text(encoding="utf-8")
    assert faults(table, all_tests()) == []
    every_one = {n for n in all_tests() if n.startswith("test_hazard_")}
    missing = sorted(n for n in every_one if f"`{n}`" not in table)
    assert not missing, f"not in the table: {missing}"


def test_faults_of_a_table_are_found():
    """The control: a case twice, one missing, a test that is not there, a case without a test."""
    row = "| {} | reading | `test_hazard_{:02d}_x` |\n"
    good = "".join(row.format(n, n) for n in range(1, 53))
    tests = {f"test_hazard_{n:02d}_x" for n in range(1, 53)}
    assert faults(good, tests) == []
    assert len(faults(good + row.format(7, 7), tests)) == 1
    assert len(faults(good.replace(row.format(7, 7), ""), tests)) == 1
    assert len(faults(good, tests - {"test_hazard_09_x"})) == 1
    assert len(faults(good.replace("`test_hazard_11_x`", "`test_hazard_12_x`"), tests)) == 1
