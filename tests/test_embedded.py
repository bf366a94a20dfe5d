"""The firmware runs under qemu, and the checks around it can fail."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "examples" / "embedded" / "run.py"


def load_run(build):
    """examples/embedded/run.py as a module that builds elsewhere."""
    spec = importlib.util.spec_from_file_location("embedded_run", RUN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.BUILD = build
    return module


@pytest.fixture(scope="module")
def done():
    return subprocess.run(
        [sys.executable, RUN], capture_output=True, text=True, check=False, timeout=900
    )


@pytest.fixture(scope="module")
def tables(done):
    """The printed tables: row title -> [sparse, dense], and [append, decode]."""
    assert done.returncode == 0, done.stdout + done.stderr
    found = []
    for line in done.stdout.splitlines():
        if line.startswith("| Cortex-M4F"):
            found.append({})
        elif line.startswith("|"):
            title, *cells = re.split(r"\s*\|\s*", line.removeprefix("| ").removesuffix(" |"))
            found[-1][title] = cells
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def table(tables):
    return tables[0]


@pytest.fixture(scope="module")
def table_int8(tables):
    return tables[1]


def test_runs(done):
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("counted twice, equal both times.") == 2


def test_table_is_markdown(done):
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    titles = [n for n, line in enumerate(lines) if line.startswith("| Cortex-M4F")]
    assert all(re.fullmatch(r"\|( -+:? \|){3}", lines[n + 1]) for n in titles)
    assert {line.count("|") for line in lines} == {4}


@pytest.mark.parametrize(
    "title, least, most",
    [
        ("code, bytes (as linked)", 1000, 24 * 1024),
        ("constants, bytes", 0, 1024),
        ("workspace, bytes", 4 * 32 * 4, 32 * 1024),
        ("stack, bytes (deepest path in gcc's call graph)", 64, 4096),
        ("stack, bytes (painted and seen on the target)", 64, 4096),
        # 4 heads x 32 keys x (40 + 32) multiply-adds, at most a hundred instructions each.
        ("instructions", 4 * 32 * 72, 100 * 4 * 64 * 72),
    ],
)
def test_costs_are_sane(table, title, least, most):
    assert all(least <= int(cell) <= most for cell in table[title]), table[title]


def test_dense_costs_more_than_half_of_its_keys(table):
    sparse, dense = (int(cell) for cell in table["instructions"])
    assert 1.2 < dense / sparse < 2.5


def test_errors_are_those_of_float32(table):
    assert all(0 < float(cell) <= 1e-6 for cell in table["largest error of the output"])
    assert all(float(cell) <= 4e-6 for cell in table["largest error of the LSE"])


@pytest.mark.parametrize(
    "title, least, most",
    [
        # The decode step may be as large as that of the other table, and append a third of it.
        ("code, bytes (as linked)", 1000, 32 * 1024),
        ("constants, bytes", 0, 1024),
        ("cache, bytes (float32: 32768)", 128, 32768 // 4),
        ("stack, bytes (deepest path in gcc's call graph)", 64, 4096),
        ("stack, bytes (painted and seen on the target)", 64, 4096),
    ],
)
def test_costs_of_int8_are_sane(table_int8, title, least, most):
    assert all(least <= int(cell) <= most for cell in table_int8[title]), table_int8[title]


def test_workspace_of_int8_is_small(table_int8):
    append, decode = (int(cell) for cell in table_int8["workspace, bytes"])
    assert append == 0
    assert 2 * 32 * 4 <= decode <= 8 * 1024


def test_work_of_int8_is_in_proportion(table_int8):
    """Append writes 128 codes, decode does 4 heads x 64 keys x (32 + 32) multiply-adds."""
    append, decode = (int(cell) for cell in table_int8["instructions"])
    assert 128 <= append <= 200 * 128
    assert 4 * 64 * 64 <= decode <= 20 * 4 * 64 * 64


def test_errors_of_int8(table_int8):
    """Arithmetic is float32's; what the codes cost is below a step of the largest values."""
    name = "largest error of the output, from "
    assert 0 < float(table_int8[name + "the cache's own numbers"][1]) <= 1e-6
    assert 1e-4 < float(table_int8[name + "the numbers before int8"][1]) <= 2e-2


@pytest.mark.parametrize(
    "array, wrong",
    [("key_codes[4096]", "1"), ("value_codes[4096]", "1"), ("code_out[128]", "9.0f")],
)
def test_a_wrong_number_of_int8_is_noticed(tmp_path, array, wrong):
    run = load_run(tmp_path)
    run.write_vectors_int8()
    text = (tmp_path / "vectors_int8.h").read_text()
    head, name, tail = text.partition(array + " = {\n    ")
    assert name
    old, comma, rest = tail.partition(",")
    assert old != wrong
    (tmp_path / "vectors_int8.h").write_text(head + name + wrong + comma + rest)
    run.build("_int8")
    with pytest.raises(run.Wrong, match="qemu-system-arm failed"):
        run.run_firmware("_int8")


def test_a_wrong_number_is_noticed(tmp_path):
    run = load_run(tmp_path)
    run.write_vectors()
    text = (tmp_path / "vectors.h").read_text()
    head, name, tail = text.partition("dense_out[128] = {\n    ")
    assert name
    (tmp_path / "vectors.h").write_text(head + name + "0x1p+3f" + tail[tail.index(",") :])
    run.build()
    with pytest.raises(run.Wrong, match="qemu-system-arm failed"):
        run.run_firmware()


@pytest.mark.parametrize(
    "body, expected",
    [
        ("for (int i = 0; i < n; i++) x[i] = a / x[i];", True),
        ("x[0] = a / b; for (int i = 1; i < n; i++) x[i] = x[i - 1] + a;", False),
        ("for (int i = 0; i < n; i++) x[i] += a; x[0] = a / b;", False),
    ],
)
def test_division_in_a_loop_is_found(tmp_path, body, expected):
    run = load_run(tmp_path)
    (tmp_path / "loop.c").write_text(
        "void f(long long *x, int n, long long a, long long b)\n{ (void)b; " + body + " }\n"
    )
    run.command("arm-none-eabi-gcc", *run.CPU, *run.FLAGS, "-c", "loop.c", "-o", "loop.o")
    listing = run.command("arm-none-eabi-objdump", "-dr", "loop.o")
    assert "__aeabi_ldivmod" in listing
    assert bool(run.divisions_in_loops(listing)) is expected


def test_libc_in_the_kernel_is_noticed(tmp_path):
    run = load_run(tmp_path)
    run.write_vectors()
    run.build()
    run.check_symbols()
    (tmp_path / "other.c").write_text(
        "float expf(float); int seen;\nfloat g(float x) { seen++; return expf(x); }\n"
    )
    run.command("arm-none-eabi-gcc", *run.CPU, *run.FLAGS, "-c", "other.c", "-o", "kernel.o")
    with pytest.raises(run.Wrong, match=r"the kernel needs .*expf"):
        run.check_symbols()
    (tmp_path / "other.c").write_text("int seen; void g(void) { seen++; }\n")
    run.command("arm-none-eabi-gcc", *run.CPU, *run.FLAGS, "-c", "other.c", "-o", "kernel.o")
    with pytest.raises(run.Wrong, match=r"mutable static data: .*seen"):
        run.check_symbols()


def test_missing_tools_are_named(tmp_path):
    """With a PATH that has nothing on it: one sentence with the packages."""
    done = subprocess.run(
        [sys.executable, RUN],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path)},
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert (
        "fix: apt-get install gcc-arm-none-eabi qemu-system-arm picolibc-arm-none-eabi"
        in done.stderr
    )
