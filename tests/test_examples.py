"""The examples compile by the line at their top and run; decode_npy reads what it should."""

import subprocess
import sys
from pathlib import Path

import helpers_tiles
import ml_dtypes
import numpy as np
import pytest
from helpers import ISAS_HERE, TILES

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "examples"
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.c"))
SMALL = ["--heads", "4", "--keys", "300", "--selected", "40"]


@pytest.fixture(scope="module")
def examples():
    """examples/run.py, once: it leaves the programs in build/examples."""
    return subprocess.run(
        [sys.executable, ROOT / "examples" / "run.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
    )


def test_all_run(examples):
    assert examples.returncode == 0, examples.stdout + examples.stderr
    lines = examples.stdout.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("ok ")] == NAMES
    assert lines[-1] == f"{len(NAMES)} of {len(NAMES)} examples ok"


def test_a_failing_example_is_reported(examples, tmp_path):
    """A copy of the runner beside an example that returns 3 and one that does not compile."""
    folder = tmp_path / "examples"
    folder.mkdir()
    runner = folder / "run.py"
    runner.write_text((ROOT / "examples" / "run.py").read_text())
    line = "/* cc examples/{0}.c -o {0} && ./{0} */\n"
    (folder / "wrong.c").write_text(line.format("wrong") + "int main(void) { return 3; }\n")
    (folder / "broken.c").write_text(line.format("broken") + "int main(void) { return }\n")
    done = subprocess.run([sys.executable, runner], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "FAILED (3) wrong" in done.stdout
    assert "FAILED (1) broken" in done.stdout
    assert "0 of 2 examples ok" in done.stdout


# ---- decode_npy ------------------------------------------------------------------------------


def decode(*words, env=None):
    return subprocess.run(
        [BUILD / "decode_npy", *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env=env,
    )


def make(folder, *options):
    subprocess.run(
        [sys.executable, ROOT / "examples" / "make_npy.py", folder, *SMALL, *options],
        check=True,
        capture_output=True,
        timeout=300,
    )


def load(folder, name):
    x = np.load(folder / f"{name}.npy")
    bits = x.dtype.kind == "V" or x.dtype == np.uint16
    return (x.view(ml_dtypes.bfloat16) if bits else x).astype(np.float64)


def attend(folder):
    """One batch, one query row, contiguous keys, in float64: the output and the LSE."""
    query = np.concatenate([load(folder, "query"), load(folder, "query_rope")], -1)[0, 0]
    key = np.concatenate([load(folder, "key"), load(folder, "key_rope")], -1)[0, :, 0]
    key = key[np.load(folder / "sparse_indices.npy")[0, 0, 0]]
    score = query @ key.T / np.sqrt(192)
    top = score.max(-1, keepdims=True)
    weight = np.exp(score - top)
    return (
        weight / weight.sum(-1, keepdims=True) @ key[:, :512],
        top[:, 0] + np.log(weight.sum(-1)),
    )


@pytest.mark.parametrize("kind", ["bf16", "u2", "void2", "f32"])
def test_reads_every_dtype(examples, tmp_path, kind):
    make(tmp_path, *(["--dtype", "f32"] if kind == "f32" else []))
    for name in ("query", "query_rope", "key", "key_rope"):
        path = tmp_path / f"{name}.npy"
        x = np.load(path)
        if kind == "u2":
            np.save(path, x.view(np.uint16))
        elif kind == "void2":
            data = path.read_bytes()
            assert b"'<V2'" in data
            path.write_bytes(data.replace(b"'<V2'", b"'|V2'", 1))
        elif kind == "f32":
            rounded = x.astype(ml_dtypes.bfloat16).astype(np.float32)
            assert (rounded != x).any()
            np.save(tmp_path / f"{name}_as_given.npy", x)
            np.save(path, rounded)  # what the numbers below are computed from
    out, lse = attend(tmp_path)
    if kind == "f32":
        for name in ("query", "query_rope", "key", "key_rope"):
            (tmp_path / f"{name}_as_given.npy").replace(tmp_path / f"{name}.npy")
    done = decode(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    saved = np.load(tmp_path / "attention_out.npy")
    assert saved.dtype.str == {"bf16": "|V2", "u2": "<u2", "void2": "|V2", "f32": "<f4"}[kind]
    got = saved if kind == "f32" else saved.view(ml_dtypes.bfloat16)
    got = got.astype(np.float64)
    assert got.shape == (1, 1, 4, 512)
    assert np.linalg.norm(got[0, 0] - out) < 2.5e-3 * np.linalg.norm(out)
    np.testing.assert_allclose(load(tmp_path, "softmax_lse")[0, 0, 0], lse, atol=1e-5)


def test_version_2_header(examples, tmp_path):
    make(tmp_path)
    with open(tmp_path / "wide.npy", "wb") as file:
        np.lib.format.write_array(file, np.load(tmp_path / "sparse_indices.npy"), (2, 0))
    (tmp_path / "wide.npy").replace(tmp_path / "sparse_indices.npy")
    done = decode(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_give_the_same_bits(examples, tmp_path):
    for name, options in (("flat", []), ("pages", ["--block-size", "16"])):
        make(tmp_path / name, *options)
        done = decode(tmp_path / name)
        assert done.returncode == 0, done.stdout + done.stderr
        assert ("in pages" if options else "contiguous") in done.stdout
    for name in ("attention_out.npy", "softmax_lse.npy"):
        assert (tmp_path / "flat" / name).read_bytes() == (tmp_path / "pages" / name).read_bytes()


def test_several_rows_are_causal_and_dense_without_a_list(examples, tmp_path):
    make(tmp_path, "--rows", "3", "--batch", "2", "--selected", "0")
    (tmp_path / "out").mkdir()
    done = decode(tmp_path, tmp_path / "out")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all keys" in done.stdout
    assert "spread 299 keys a head" in done.stdout  # 298, 299 and 300
    assert np.load(tmp_path / "out" / "softmax_lse.npy").shape == (2, 1, 3, 4)


def test_scale_value_is_used(examples, tmp_path):
    make(tmp_path)
    np.save(tmp_path / "scale_value.npy", np.float32(0))
    done = decode(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    np.testing.assert_allclose(load(tmp_path, "softmax_lse"), np.log(40), rtol=1e-6)


def test_what_it_prints(examples, tmp_path):
    make(tmp_path)
    done = decode(tmp_path)
    lines = dict(line.split(None, 1) for line in done.stdout.splitlines())
    assert list(lines)[:5] == ["query", "spread", "error", "time", "math"]
    assert lines["memory"].startswith("0.05 MB of keys gathered")  # 40 keys of 1152 bytes
    assert "1 of 1 rows checked" in lines["error"]
    assert float(lines["time"].split()[0]) > 0


@pytest.mark.skipif("amx" not in ISAS_HERE, reason="no x86-64 Linux with AVX-512")
def test_tiles_where_they_are_granted(examples, tmp_path):
    """The program asks for them by itself; elsewhere in this file it gets none, unless the machine
    has its own. Other weights are rounded there, so that other bits show that they were used."""
    make(tmp_path)
    results = []
    for mode in ("absent", "granted"):
        done = decode(tmp_path, env=helpers_tiles.preload_environment(mode))
        assert done.returncode == 0, done.stdout + done.stderr
        results.append((tmp_path / "attention_out.npy").read_bytes())
        got = np.load(tmp_path / "attention_out.npy").view(ml_dtypes.bfloat16)
        out, lse = attend(tmp_path)
        assert np.linalg.norm(got.astype(np.float64)[0, 0] - out) < 4e-3 * np.linalg.norm(out)
        np.testing.assert_allclose(load(tmp_path, "softmax_lse")[0, 0, 0], lse, atol=1e-5)
    assert not TILES.emulated or results[0] != results[1]


def save_with(name, change):
    """A change to one file of the folder, made with NumPy."""

    def spoil(folder):
        path = folder / f"{name}.npy"
        np.save(path, change(np.load(path)))

    return spoil


def rewrite(name, change):
    """A change to the bytes of one file."""

    def spoil(folder):
        path = folder / f"{name}.npy"
        path.write_bytes(change(path.read_bytes()))

    return spoil


def huge_shape(data):
    """Four dimensions of 2147483647; the header keeps its length."""
    old = b"(1, 300, 1, 512), }" + b" " * 40
    assert old in data
    return data.replace(old, (b"(" + b"2147483647, " * 4 + b"), }").ljust(len(old)), 1)


def pages_without(name):
    def spoil(folder):
        make(folder, "--block-size", "16")
        (folder / f"{name}.npy").unlink()

    return spoil


def bad_page(folder):
    make(folder, "--block-size", "16")
    table = np.load(folder / "block_table.npy")
    table[0, 2] = 99
    np.save(folder / "block_table.npy", table)


BAD = {
    "missing": (lambda d: (d / "key_rope.npy").unlink(), "cannot open", "key_rope.npy"),
    "float64": (
        save_with("query", lambda x: np.zeros(x.shape)),
        "query.npy: dtype '<f8'",
        "fix: save x.astype(np.float32)",
    ),
    "float16": (save_with("key", lambda x: np.zeros(x.shape, np.float16)), "key.npy: dtype '<f2'"),
    "big endian": (save_with("key", lambda x: np.zeros(x.shape, ">f4")), "key.npy: dtype '>f4'"),
    "int64 list": (
        save_with("sparse_indices", lambda x: x.astype(np.int64)),
        "sparse_indices.npy: dtype '<i8', expected '<i4'",
        "fix: save x.astype(np.int32)",
    ),
    "structured": (
        save_with("key", lambda x: np.zeros(x.shape, [("a", "<f4")])),
        "structured dtypes are not read",
    ),
    "width": (
        save_with("key_rope", lambda x: x[..., :32]),
        "key_rope.npy: shape (1, 300, 1, 32), expected (1, 300, 1, 64)",
    ),
    "rows": (
        save_with("key_rope", lambda x: x[:, 1:]),
        "key_rope.npy: shape (1, 299, 1, 64), expected (1, 300, 1, 64)",
    ),
    "dimensions": (save_with("query", lambda x: x[0]), "query.npy: shape (1, 4, 512), expected"),
    "five dimensions": (save_with("query", lambda x: x[None]), "more than 4 dimensions"),
    "no keys": (save_with("key", lambda x: x[:, :0]), "key.npy: shape (1, 0, 1, 512), expected"),
    "fortran": (
        save_with("key", np.asfortranarray),
        "key.npy: is in Fortran order",
        "fix: save np.ascontiguousarray(x)",
    ),
    "truncated": (
        rewrite("key", lambda b: b[:-1]),
        "key.npy: is truncated",
        "takes 307200 bytes, 307199 are there",
    ),
    "truncated header": (rewrite("key", lambda b: b[:60]), "ends inside its header"),
    "empty": (rewrite("key", lambda b: b""), "is not a .npy file"),
    "not npy": (rewrite("key", lambda b: b"PK\x03\x04" + b), "is not a .npy file"),
    "version 3": (rewrite("key", lambda b: b[:6] + b"\x03" + b[7:]), ".npy version 3"),
    "huge header": (rewrite("key", lambda b: b[:8] + b"\xff\xff" + b[10:]), "is too long"),
    "huge shape": (rewrite("key", huge_shape), "larger than memory can be"),
    "negative shape": (
        rewrite("key", lambda b: b.replace(b"(1, 300,", b"(1, -30,", 1)),
        "cannot read the shape",
    ),
    "no shape": (
        rewrite("key", lambda b: b.replace(b"'shape'", b"'shake'", 1)),
        "the .npy header has no 'shape'",
    ),
    "page id": (bad_page, "block_table"),
    "pages without a table": (pages_without("block_table"), "expected (1, -1, -1, 512)"),
}


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.replace(" ", "-"))
def test_refuses(examples, tmp_path, case):
    """One sentence on stderr, exit status 2, and nothing written."""
    spoil, *words = BAD[case]
    make(tmp_path)
    spoil(tmp_path)
    done = decode(tmp_path)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("decode_npy: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    assert not (tmp_path / "attention_out.npy").exists()


def test_refuses_a_folder_it_cannot_write_to(examples, tmp_path):
    make(tmp_path)
    done = decode(tmp_path, tmp_path / "absent")
    assert done.returncode == 2
    assert "cannot write" in done.stderr


def test_usage(examples):
    done = decode("--help")
    assert done.returncode == 2
    assert done.stderr == "decode_npy: usage: decode_npy [DIR [OUT]]\n"
