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
import decode  # noqa: E402
import measure as m  # noqa: E402
import peers  # noqa: E402
import tensors  # noqa: E402
import training  # noqa: E402
from peers import base, install  # noqa: E402

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
    "batch": int,
    "layout": str,
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
    dense = tensors.Shape(8, 2, 100, 100, value=True)
    assert dense.flops(6, 4) == 2 * 8 * 10 * 100
    assert dense.bytes(6, 4, 2) == 2 * 100 * 10 * 2
    causal = tensors.Shape(1, 1, 5, 5, "causal", rows=3)
    assert causal.seen() == 3 + 4 + 5
    assert causal.bytes(6, 4, 2) == 5 * 6 * 2


def test_the_reference_is_attention():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 3, 4), (5, 4), (5, 2)))
    out = tensors.exact(q, k, v, 0.5, causal=True)
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


# ---- the decode operator ------------------------------------------------------------------------


def described(name):
    return m.described(Path(decode.PREFIX + name)).kernels[0]


def of_cache(name, shape):
    """A kernel, its tensors, and its cache's keys as the layout has them."""
    kernel = described(name)
    t = decode.tensors(kernel, shape)
    return kernel, t, t.key_held


def test_a_decode_kernel_is_described_by_its_name_where_it_is_not_shipped():
    kernel = described("bf16_i4_32_d96")
    assert (kernel.dtype, kernel.kv, kernel.dk, kernel.decodes) == ("bf16", "i4_32", 96, True)
    assert cases.short(kernel.name) == "decode_bf16_i4_32_d96"
    assert cases.shapes_of(kernel, quick=False) == [decode.gqa(4096), decode.gqa(16384)]


def test_every_decode_shape_is_of_a_kernel_and_every_promise_of_a_shape():
    for name, shapes in decode.SHAPES.items():
        assert described(name).name == decode.PREFIX + name
        assert len(set(shapes)) == len(shapes)
        assert len({shape.title for shape in shapes}) == len(shapes)
    for name, shape, _ in decode.PROMISED:
        assert shape in decode.SHAPES[name]


def test_quick_runs_measure_what_is_shipped_and_others_more():
    shipped = {header.name for header in spec.load_catalogue()}
    assert {header.name for header in cases.headers(quick=True)} == shipped
    every = [header.name for header in cases.headers(quick=False)]
    assert len(set(every)) == len(every)
    others = {decode.PREFIX + name for name in decode.SHAPES}
    others |= {training.PREFIX + name for name in training.SHAPES}
    assert set(every) == shipped | others


def test_decode_targets():
    def target(name, shape, isa, best):
        return cases.Case(Path(decode.PREFIX + name), shape, isa, best).target

    assert target("bf16_d128", decode.gqa(4096), "avx512", True) == cases.Target("read", 0.48)
    assert target("bf16_d128", decode.gqa(4096), "avx2", False) is None
    assert target("bf16_i8_d128", decode.gqa(4096, "BNSD"), "amx", True).share == 0.70
    assert target(decode.F32, decode.SMALL, "avx2", True) == cases.Target("read", 0.65)
    assert target(decode.F32, decode.SMALL, "avx2", False) is None


def test_work_of_a_batch():
    shape = tensors.Shape(8, 2, 100, 100, value=True, batch=3)
    assert shape.flops(6, 4) == 3 * 2 * 8 * 10 * 100
    assert decode.cache_bytes(described("bf16_d6x4"), shape) == 3 * 2 * 100 * (6 + 4) * 2
    assert decode.cache_bytes(described("bf16_bf16xi8_d6x4"), shape) == 600 * (6 * 2 + 4)
    row = 64 // 2 + 2 * 2  # two groups of 32 in float16
    assert decode.cache_bytes(described("f16_i4_32_d64"), shape) == 600 * 2 * row
    latent = tensors.Shape(8, 1, 100, 100)  # values are part of the keys
    assert decode.cache_bytes(described("bf16_d6x4"), latent) == 100 * 6 * 2


@pytest.mark.parametrize(
    ("name", "step"),
    [("bf16_i8_d64", 1 / 200), ("bf16_e4m3_d64", 1 / 15), ("bf16_i4_32_d64", 1 / 12)],
)
def test_a_cache_of_codes_stands_for_nearly_what_was_stored(name, step):
    shape = tensors.Shape(4, 2, 96, 96, value=True)
    kernel, _, held = of_cache(name, shape)
    stored = tensors.normal_once("key", 96, 2, kernel.dk, np.float32)
    assert held.rows.shape == (96, 2, kernel.stored_key.width(kernel.dk))
    assert np.abs(held.numbers - stored).max() < step * np.abs(stored).max()


def test_int4_lies_low_nibble_first_with_its_scales_behind():
    _, _, held = of_cache("bf16_i4_32_d64", tensors.Shape(4, 2, 96, 96, value=True))
    row = held.rows[5, 1]
    codes = np.stack([row[:32] & 15, row[:32] >> 4], axis=-1).reshape(-1).astype(int)
    codes = np.where(codes > 7, codes - 16, codes)
    scale = row[32:].view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(held.numbers[5, 1], codes * np.repeat(scale, 32))


@pytest.mark.parametrize(
    ("layout", "block"), [("BSND", 0), ("BNSD", 0), ("PA_BSND", 16), ("PA_BNSD", 16)]
)
def test_every_layout_holds_every_row_in_its_place(layout, block):
    shape = tensors.Shape(4, 2, 48, 48, value=True, batch=3, layout=layout, block=block)
    kernel, t, held = of_cache("bf16_d64", shape)
    fields = decode.fields(
        shape,
        t,
        dict.fromkeys((f"HL_LAYOUT_{name}" for name in ("BSND", "BNSD", "PA_BSND", "PA_BNSD")), 0),
    )
    for b, j, n in ((0, 0, 0), (1, 47, 1), (2, 17, 0)):
        at = {"BSND": (b, j, n), "BNSD": (b, n, j)}.get(layout)
        sizes = (3, 48, 2) if layout == "BSND" else (3, 2, 48)
        if block:
            page = fields["block_table"][b, j // 16]
            at = (page, j % 16, n) if layout == "PA_BSND" else (page, n, j % 16)
            sizes = (9, 16, 2) if layout == "PA_BSND" else (9, 2, 16)
        there = t.key.reshape(*sizes, kernel.dk)[at]
        np.testing.assert_array_equal(there, held.rows[b * 48 + j, n])


def test_a_call_of_a_cache_of_codes_has_both_sides_scales():
    shape = tensors.Shape(4, 2, 48, 48, value=True)
    constants = {"HL_LAYOUT_BSND": 0, "HL_ANTIQUANT_CHANNEL": 3, "HL_ANTIQUANT_TENSOR": 4}

    def fields(name):
        _, t, _ = of_cache(name, shape)
        return t, decode.fields(shape, t, constants)

    t, made = fields("bf16_i8_d64")
    assert made["antiquant_mode"] == 3 and made["antiquant_scale"].shape == (2 * 2 * 64,)
    np.testing.assert_array_equal(made["antiquant_scale"][128:], t.value_held.scale.reshape(-1))
    assert fields("bf16_e4m3_d64")[1]["antiquant_scale"].shape == (2,)
    assert fields("bf16_bf16xi8_d64")[1]["antiquant_scale"].shape == (2 * 64,)
    assert "antiquant_scale" not in fields("bf16_i4_32_d64")[1]


# ---- prefill and training -----------------------------------------------------------------------


def trained(name):
    return m.described(Path(training.PREFIX + name)).kernels[0]


def test_every_training_shape_is_of_a_kernel():
    for name, shapes in training.SHAPES.items():
        kernel = trained(name)
        assert kernel.name == training.PREFIX + name and kernel.trains
        assert kernel.backward == name.startswith(training.GRADIENT)
        assert len({shape.title for shape in shapes}) == len(shapes)
        assert cases.shapes_of(kernel, quick=False) == shapes
        assert cases.shapes_of(kernel, quick=True) == training.QUICK
    assert cases.short(trained("bf16_d128").name) == "prefill_bf16_d128"
    assert cases.short(trained("grad_bf16_d128").name) == "backward_bf16_d128"
    assert "band of 256, 4096" in training.MASKED[0].title


SELECTIONS = {
    "dense": lambda i, j: True,
    "causal": lambda i, j: j <= i + 3,
    "band of 4": lambda i, j: i + 3 - 4 < j <= i + 3,
    "prefix of 5": lambda i, j: j <= i + 3 or j < 5,
}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_pairs_that_count_and_the_tiles_that_they_touch(selection):
    shape = tensors.Shape(2, 1, 10, 10, selection, 7, value=True)  # 7 rows, 3 keys in front
    seen = {(i, j) for i in range(7) for j in range(10) if SELECTIONS[selection](i, j)}
    assert training.pairs(shape) == len(seen)
    for rows, keys in ((1, 1), (3, 4), (7, 10), (100, 100)):
        touched = {(i // rows, j // keys) for i, j in seen}
        every = {(i // rows, j // keys) for i in range(7) for j in range(10)}
        assert training.tiles(shape, rows, keys) == pytest.approx(len(touched) / len(every))


def test_work_of_training():
    """Two products forward; backward five, of which three are of keys' channels."""
    shape = tensors.Shape(4, 2, 5, 5, "causal", 3, value=True)
    pairs = 3 + 4 + 5
    assert training.flops(trained("bf16_d8x6"), shape) == 2 * 4 * pairs * (8 + 6)
    assert training.flops(trained("grad_bf16_d8x6"), shape) == 2 * 4 * pairs * (3 * 8 + 2 * 6)
    size = 2 * (3 * 4 * (8 + 6) + 5 * 2 * (8 + 6))
    assert training.bytes_of(trained("bf16_d8x6"), shape) == size
    assert training.bytes_of(trained("grad_bf16_d8x6"), shape) == 2 * size


def test_the_gradients_of_the_reference_are_those_of_its_result():
    shape = tensors.Shape(4, 2, 6, 6, "causal", 4, value=True)
    kernel = trained("grad_f32_d5x3")
    t = training.tensors_of(kernel, shape)
    got = training.reference(kernel, shape)
    dout = tensors.normal_once("dout", 4, 4, 3, t.query.dtype)[:, :2].astype(np.float64)

    def loss(**changed):
        q, k, v = (
            changed.get(name, getattr(t, name)[:, :heads].astype(np.float64))
            for name, heads in (("query", 2), ("key", 1), ("value", 1))
        )
        return float((tensors.exact(q, k[:, 0], v[:, 0], t.scale, causal=True) * dout).sum())

    for name, heads in (("query", 2), ("key", 1), ("value", 1)):
        x = getattr(t, name)[:, :heads].astype(np.float64)
        want = np.empty_like(x)
        for at in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[at] = 1e-5
            want[at] = (loss(**{name: x + step}) - loss(**{name: x - step})) / 2e-5
        np.testing.assert_allclose(got[f"d{name}"], want, rtol=1e-6, atol=1e-8)


def test_calls_of_training_say_what_a_selection_is():
    def said(selection, *names):
        shape = tensors.Shape(4, 2, 6, 6, selection, 4, value=True)
        made = training.common(shape, training.tensors_of(trained("f32_d5"), shape))
        return [made.get(name) for name in ("mask_from_mode", "sparse_mode", *names)]

    assert said("dense") == [0, None]
    assert said("causal") == [1, 3]
    assert said("band of 4", "band", "pre_tokens", "next_tokens") == [1, 4, 1, 3, 0]
    assert said("prefix of 5", "prefix") == [1, 6, 5]
    latent = tensors.Shape(4, 1, 6, 6, "causal", 4)
    t = training.tensors_of(trained("f32_d5x3"), latent)
    made = training.common(latent, t)
    assert made["value"] is t.key and made["value_stride"] == (0, 5, 5)


# ---- peers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "batch"), [(1, 1), (3, 1), (1, 2), (3, 2)])
def test_peers_are_given_the_same_problem_in_parts(rows, batch):
    shape = tensors.Shape(
        8, 2, 48, 48, "causal" if rows > 1 else "dense", rows, value=True, batch=batch
    )
    kernel = described("f32_d16")
    made = []
    for part, t in peers.parts_of(shape, decode.tensors(kernel, shape)):
        assert (part.rows, part.batch, part.heads) == (1, 1, 8 * rows)
        group = part.heads // part.kv_heads
        hidden = base.mask(t, np.float64)
        out = np.empty((1, part.heads, 16))
        for h in range(part.heads):
            k, v = (x[:, h // group].astype(np.float64) for x in (t.key, t.value))
            s = t.scale * (k @ t.query[0, h]) + (0 if hidden is None else hidden[h % group])
            p = np.exp(s - s.max())
            out[0, h] = p @ v / p.sum()
        made.append(base.Prepared(lambda first, count: None, lambda out=out: out))
    got = peers.joined(made, shape).out()
    np.testing.assert_allclose(got, decode.reference(kernel, shape), rtol=1e-6, atol=1e-9)


def test_a_library_is_looked_for_by_linking(tmp_path):
    assert install.links("stdio.h", "m")
    assert not install.links("stdio.h", "no_such_library_here")
    assert not install.links("no_such_header.h", "m")


def test_a_python_that_is_not_there_is_a_reason():
    good, why = install.run("/no/such/python", "-c", "")
    assert not good and "/no/such/python" in why


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
