"""The NumPy binding: what it reads from a header, and its ways of failing."""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import check, kernel, table, text
from helpers_cases import Shape, make_case, run
from oracle import BSND, PA_BSND, TND, Args, sparse_flash_attention

from gen import bind, spec

SMALL = {"isa": ["scalar"], "dk": 4, "dv": 3, "rope": 0, "dtype": "f32", "features": []}


def small(**changes: object) -> spec.Header:
    return spec.parse_header({**table("f32_80"), **SMALL, **changes})


def test_structs_are_those_of_the_compiler():
    """Sizes and offsets against what C says, for every struct of the public part."""
    header = bind.parse(text("f32_small"))
    made = bind.structures(header)
    lines = []
    for name in (
        "error",
        "stride",
        *(f"sparse_flash_attention_{n}" for n in ("args", "plan", "parts")),
    ):
        struct = made[f"hl_{name}"]
        lines.append(f'_Static_assert(sizeof(hl_{name}) == {ctypes.sizeof(struct)}, "{name}");')
        for field, *_ in struct._fields_:
            offset = getattr(struct, field).offset
            lines.append(f'_Static_assert(offsetof(hl_{name}, {field}) == {offset}, "{field}");')
    assert len(lines) >= 80
    bind.compile_c(
        {"header.h": header.text, "sizes.c": "\n".join(['#include "header.h"', *lines, ""])}
    )


def test_constants_are_those_of_the_compiler():
    header = bind.parse(text("f32_small"))
    public = {
        n: v
        for n, v in header.constants.items()
        if n.startswith(
            (
                "HL_ERR_",
                "HL_RULE_",
                "HL_ARG_",
                "HL_ISA_",
                "HL_LAYOUT_",
                "HL_INDEX_",
                "HL_OK",
                "HL_SPARSE_",
            )
        )
    }
    assert len(public) > 60 and public["HL_ERR_UNSUPPORTED"] == -10
    asserts = [f'_Static_assert((int){n} == {v}, "{n}");' for n, v in public.items()]
    bind.compile_c(
        {"header.h": header.text, "values.c": "\n".join(['#include "header.h"', *asserts, ""])}
    )


@pytest.mark.parametrize("layout", [BSND, TND, PA_BSND])
def test_attend_reads_sizes_and_strides_from_arrays(layout):
    k = bind.load(small())
    rng = np.random.default_rng(layout)
    query = rng.standard_normal((2, 3, 12, 4)).astype(np.float32)[:, :, ::2]
    key = rng.standard_normal((2, 9, 3, 4)).astype(np.float32).transpose(1, 0, 2, 3).copy()
    key = key.transpose(1, 0, 2, 3)
    fields = {"query": query, "key": key, "scale_value": 0.5, "sparse_mode": 3}
    if layout == TND:
        fields |= {
            "query": query[0],
            "key": key[0],
            "actual_seq_lengths_query": np.array([1, 3], np.int32),
            "actual_seq_lengths_kv": np.array([4, 9], np.int32),
        }
    if layout == PA_BSND:
        fields |= {"block_table": np.array([[1], [0]], np.int32)}
    got = k.attend(**fields)
    tnd = layout == TND
    want = sparse_flash_attention(
        Args(**fields, dv=3, layout_query=TND if tnd else BSND, layout_kv=layout)
    )
    assert np.allclose(got.out, want.out, atol=1e-6)
    assert np.allclose(got.outputs["softmax_lse"], want.lse, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"HL_ERR_UNSUPPORTED: sparse_mode"):
        k.attend(**{**fields, "sparse_mode": 7})


def test_channels_have_to_lie_side_by_side():
    k = bind.load(small())
    apart = np.zeros((1, 1, 1, 8), np.float32)[..., ::2]
    with pytest.raises(ValueError, match="fix: make the last axis contiguous"):
        k.attend(query=apart, key=np.zeros((1, 1, 1, 4), np.float32), scale_value=1.0)


def test_wrong_fields_are_named():
    k = kernel("f32_small")
    with pytest.raises(TypeError, match=r"no field 'querry'.*fix: one of query"):
        k.run(querry=np.zeros(3, np.float32))
    with pytest.raises(TypeError, match="sparse_indices is int64; fix: pass int32"):
        k.run(sparse_indices=np.zeros(3, np.int64))


def test_another_prefix_and_name():
    """Everything is found by what the header says, nothing by our own names."""
    header = small(prefix="zz", name="zz_my_attention")
    k = bind.load(header)
    assert (k.name, k.op, k.header.prefix) == ("zz_my_attention", "zz_sparse_flash_attention", "zz")
    assert k.isas() == {"scalar": 1} and k.dtype == np.float32 and (k.dk, k.rope, k.dv) == (4, 0, 3)
    case = make_case(k, Shape(lens_kv=(9,), group=2))
    check(case.args, run(k, case), "scalar")
    bad = k.run(**{**case.inputs(), **case.sizes(), **case.outputs(), "batch": -1})
    assert bad.status_name == "ZZ_ERR_SHAPE" and bad.argument == "BATCH" and bad.rule == "AT_LEAST"


def test_two_kernels_in_one_file():
    one = {**table("f32_80"), **SMALL}
    header = spec.parse_header(
        {"name": "hl_both", "kernel": [one, {**one, "dtype": "bf16", "dk": 6, "dv": 6}]}
    )
    both = bind.load_all(header)
    assert [k.dk for k in both.values()] == [4, 6]
    for k in both.values():
        case = make_case(k, Shape(lens_kv=(9,), group=2))
        check(case.args, run(k, case), "scalar")
    with pytest.raises(ValueError, match=r"2 kernels; fix: name one of"):
        bind.load(header)
    assert bind.load(header, list(both)[1]).dk == 6


def test_a_library_is_made_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADLIGHT_CACHE", str(tmp_path))
    files = {"one.c": "int one(void);\nint one(void) { return 1; }\n"}
    first = bind.compile_c(files)
    made = first.stat().st_mtime_ns
    assert bind.compile_c(files) == first and first.stat().st_mtime_ns == made
    assert bind.compile_c(files, flags=("-O1",)) != first
    assert bind.compile_c({"one.c": files["one.c"].replace("1;", "2;")}) != first
    assert len(list(tmp_path.iterdir())) == 3, "something was left behind"


def test_who_comes_meanwhile_waits_for_the_library(tmp_path, monkeypatch):
    """Several workers of one test run want the same: one compiles."""
    monkeypatch.setenv("HEADLIGHT_CACHE", str(tmp_path / "cache"))
    slow, log = tmp_path / "slow-cc", tmp_path / "log"
    slow.write_text(f'#!/bin/sh\necho "$1" >>{log}\n[ "$1" = --version ] || sleep 0.3\ncc "$@"\n')
    slow.chmod(0o755)
    files = {"one.c": "int one(void);\nint one(void) { return 1; }\n"}
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: bind.compile_c(files, compiler=str(slow)), range(4)))
    assert len(set(made)) == 1 and made[0].exists()
    assert log.read_text().split().count("-O2") == 1
    assert list((tmp_path / "cache").iterdir()) == [made[0]]


def test_a_compiler_that_refuses_is_quoted(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADLIGHT_CACHE", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"error: .*nonsense"):
        bind.compile_c({"bad.c": "nonsense one(void) { return 1; }\n"})
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"not a generated header.*fix:"):
        bind.load("int x;\n")
