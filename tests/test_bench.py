"""The bench: that it runs, what it writes, and the rules by which it judges. No test here looks at
a time."""

import json
import math
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gen import matrix, spec

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))

import cases  # noqa: E402
import measure as m  # noqa: E402
import peers  # noqa: E402
from peers import install  # noqa: E402

FIELDS = {
    "kernel": str,
    "op": str,
    "isa": str,
    "threads": int,
    "rows": int,
    "heads": int,
    "kv_heads": int,
    "dk": int,
    "dv": int,
    "keys": int,
    "cache_keys": int,
    "kv_format": str,
    "selection": str,
    "warm": bool,
    "ms": float,
    "spread": float,
    "gflops": float,
    "gbps": float,
    "limit_kind": str,
    "limit": float,
    "share_of_limit": float,
    "rel_err": float,
    "peer": type(None),
}


def bench(*options):
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *options]
    return subprocess.run(
        command, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900
    )


# ---- a whole run --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    done = bench("--quick", "--out", str(folder))
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_results_have_the_documented_fields_and_types(quick):
    records = json.loads((quick[0] / "results.json").read_text())
    for record in records:
        assert list(record) == list(FIELDS)
        for name, kind in FIELDS.items():
            assert type(record[name]) is kind, name


def test_results_are_finite_and_positive(quick):
    for record in json.loads((quick[0] / "results.json").read_text()):
        for name, value in record.items():
            if type(value) in (int, float):
                assert math.isfinite(value) and (value > 0 or name == "spread"), (name, record)
        assert record["limit_kind"] in ("matrix", "fma", "read")
        dtype = re.search(r"_(bf16|f16|f32)_", record["kernel"])[1]
        assert record["rel_err"] < m.WRONG[dtype]


def test_every_kernel_is_measured_on_every_instruction_set_that_is_not_named_as_lacking(quick):
    records = json.loads((quick[0] / "results.json").read_text())
    measured = {(record["kernel"], record["isa"]) for record in records}
    line = next(line for line in quick[1].splitlines() if "lacks" in line)
    lacking = set(re.findall(r"\w+", line.split(":")[1]))
    for header in spec.load_catalogue():
        for kernel in header.kernels:
            isas = {isa for name, isa in measured if name == kernel.name}
            assert isas == set(kernel.isa) - lacking, kernel.name
    assert lacking and "scalar" not in lacking


def test_a_cold_call_is_among_the_results(quick):
    records = json.loads((quick[0] / "results.json").read_text())
    assert {record["warm"] for record in records} == {True, False}


def test_the_table_has_its_columns(quick):
    header = next(line for line in quick[1].splitlines() if line.startswith("| kernel"))
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "kernel",
        "shape",
        "isa",
        "ms",
        "spread",
        "GFLOP/s",
        "of compute",
        "GB/s",
        "of read",
        "gather GB/s",
        "bound",
        "error",
        "target",
    ]


def test_a_roofline_is_drawn(quick):
    assert (quick[0] / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_a_pattern_measures_only_its_rows_and_keeps_other_results(quick):
    before = json.loads((quick[0] / "results.json").read_text())
    done = bench("--quick", "--only", "f32_d64*list*", "--out", str(quick[0]))
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if re.match(r"\| [a-z0-9_]+\d", line)]
    assert rows and all(line.startswith("| f32_d64") and "list" in line for line in rows)
    after = json.loads((quick[0] / "results.json").read_text())
    assert [*map(cases.identity, after)] == [*map(cases.identity, before)]


def test_a_pattern_that_matches_nothing_is_refused_with_a_fix(tmp_path):
    done = bench("--quick", "--only", "no such row", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "fix:" in done.stderr
    assert not (tmp_path / "results.json").exists()


# ---- rules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        ("", True),
        ("128 heads", True),
        ("bf16*avx2", True),
        ("avx512", False),
        ("x | avx2", True),
        ("BF16", False),
        ("128 heads, dense", True),
        ("1? heads", False),
        ("12? heads", True),
    ],
)
def test_patterns(pattern, matched):
    label = "bf16_d512_rope64 128 heads, dense 2048 avx2"
    assert cases.matches(pattern, label) is matched


def test_the_limit_that_binds_depends_on_operations_a_byte():
    peak, bandwidth = 3000.0, 30.0  # they cross at 100 operations a byte
    assert m.limit_kind("amx", 101e6, 1e6, peak, bandwidth) == "matrix"
    assert m.limit_kind("amx", 99e6, 1e6, peak, bandwidth) == "read"
    assert m.limit_kind("avx512", 101e6, 1e6, peak, bandwidth) == "fma"
    assert m.limit_kind("scalar", 1e6, 1e6, peak, bandwidth) == "read"


def test_spread_is_that_of_the_middle_four_fifths():
    samples = [10.0, *range(1, 10), 1000.0]  # 1 .. 10 and one interruption
    assert m.spread(samples) == pytest.approx((10 - 2) / 6)
    assert m.spread([5.0] * 7) == 0


def test_steps_alternate_and_the_first_round_does_not_count():
    calls = []

    def step(name):
        return lambda: calls.append(name) or float(len(calls))

    times = m.alternate({"a": step("a"), "b": step("b")}, 3)
    assert calls == ["a", "b"] * 4
    assert times["a"].tolist() == [3, 5, 7]


def test_rounds_stop_when_time_is_up_but_there_are_five():
    assert len(m.alternate({"a": lambda: 1.0}, 100, seconds=1e-9)["a"]) == 5


def test_the_limit_is_that_of_the_unit_that_computes():
    half = next(k for h in spec.load_catalogue() for k in h.kernels if k.dtype == "f16")
    least = matrix.least_heads(half)
    assert cases.limit_isa(half, cases.mla(least, "dense", 64), "amx") == "amx"
    assert cases.limit_isa(half, cases.mla(least - 1, "dense", 64), "amx") == "avx512"
    assert cases.limit_isa(half, cases.mla(1, "dense", 64), "avx2") == "avx2"


def test_work_of_a_shape():
    dense = m.Shape(8, 2, 100, 100, value=True)
    assert dense.flops(6, 4) == 2 * 8 * 10 * 100
    assert dense.bytes(6, 4, 2) == 2 * 100 * 10 * 2
    causal = m.Shape(1, 1, 5, 5, "causal", rows=3)
    assert causal.seen() == 3 + 4 + 5
    assert causal.bytes(6, 4, 2) == 5 * 6 * 2


def test_the_reference_is_attention():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 3, 4), (5, 4), (5, 2)))
    out = m.exact(q, k, v, 0.5, causal=True)
    for row in range(2):
        seen = 5 - 2 + row + 1
        for head in range(3):
            p = [math.exp(0.5 * float(q[row, head] @ k[j])) for j in range(seen)]
            want = sum(x * v[j] for j, x in enumerate(p)) / sum(p)
            np.testing.assert_allclose(out[row, head], want, rtol=1e-12)


def test_what_is_measured_again_replaces_the_older_figures():
    old = {"kernel": "a", "peer": None, "ms": 1.0}
    other = {"kernel": "b", "peer": None, "ms": 2.0}
    assert cases.merged([old, other], [{**old, "ms": 3.0}]) == [{**old, "ms": 3.0}, other]
    assert cases.merged([old], [{**old, "peer": "x"}]) == [old, {**old, "peer": "x"}]


def test_targets_are_those_of_the_best_instruction_set_or_a_forced_one():
    path = ROOT / "include" / f"hl_sparse_flash_attention_{cases.MLA}.h"

    def target(shape, isa, best):
        return cases.Case(path, shape, isa, best).target

    many, few = cases.mla(128, "dense", 8192), cases.mla(16, "list", 2048, 32768)
    assert target(many, "amx", True) == cases.Target("matrix", 0.57)
    assert target(many, "avx512", True) == cases.Target("fma", 0.70)
    assert target(many, "avx2", False) == cases.Target("fma", 0.70)
    assert target(cases.mla(64, "dense", 8192), "avx512", True) is None  # no matrix unit there
    assert target(few, "amx", True) == cases.Target("read", 0.42)
    assert target(few, "avx2", False) is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="vectors of x86-64")
def test_no_chain_of_the_peak_loop_is_merged_or_folded():
    """A chain that starts at its own fixed point, 1, is a constant: the peak was 12/11 of it."""
    command = ["cc", "-O2", "-S", "-o", "-", str(ROOT / "bench" / "limits.c")]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for register in ("ymm", "zmm"):
        chains = len(re.findall(rf"vfmadd\w+ps.*%{register}", text))
        assert chains and chains % 12 == 0, register


# ---- peers --------------------------------------------------------------------------------------


def test_every_peer_says_what_it_lacks():
    assert len({kind.name for kind in peers.PEERS}) == len(peers.PEERS)
    assert all(kind.name and kind.lacks for kind in peers.PEERS)


@pytest.mark.parametrize(
    ("complaint", "package"),
    [
        ("ImportError: libcufile.so.0: cannot open shared object file", "nvidia-cufile==1.2"),
        ("libtorch_cuda.so: undefined symbol: ncclCommResume", "nvidia-nccl-cu13==3"),
        ("libcusparseLt.so.0: cannot open shared object file", "nvidia-cusparselt-cu13"),
        ("No module named 'torch'", None),
    ],
)
def test_the_package_of_a_library_that_the_loader_misses(monkeypatch, complaint, package):
    pinned = {
        "nvidia-cufile": "nvidia-cufile==1.2",
        "nvidia-nccl-cu13": "nvidia-nccl-cu13==3",
        "nvidia-cusparselt-cu13": "nvidia-cusparselt-cu13",
        "sympy": "sympy",
    }
    monkeypatch.setattr(install, "required_by_torch", lambda: pinned)
    assert install.torch_package(complaint) == package
