"""The NEON code, run by qemu on any machine, against the same oracle and the same error rule."""

import dataclasses

import numpy as np
import pytest
from helpers import LIBS, SHIPPED_RECORDS, check, header, kernel, same_bits, text
from helpers_cases import RECORD_SPREADS, Case, Shape, Way, make_case
from helpers_runner import QEMU, need_aarch64, play, program, record, various
from oracle import PA_BSND, flat, rows
from test_antiquant import fields_of, single_keys

NEON_ISAS = ["scalar", "neon"]
DEEPSEEK = "hl_sparse_flash_attention_bf16_d512_rope64"


def run_under_qemu(name: str, cases: list[tuple[Case, Way]], isa: str) -> list[dict]:
    """Calls of a kernel, compiled for AArch64; asserts that the instruction set is there."""
    need_aarch64()
    k = kernel(name)
    libs = LIBS[header(name).kernels[0].math]
    number = k.constants[f"HL_ISA_{isa.upper()}"]
    calls = [record(k, case, way, number) for case, way in cases]
    isas, results = play((*QEMU, str(program(text(name), k.name, libs=libs))), calls)
    assert isas == sum(1 << k.constants[f"HL_ISA_{one.upper()}"] for one in NEON_ISAS)
    return results


@pytest.mark.parametrize("isa", NEON_ISAS)
@pytest.mark.parametrize("name", ["f32_small", "f16_small", "bf16_small"])
def test_any_call(name, isa):
    k = kernel(name)
    cases = [(make_case(k, shape), way) for shape, way in various(5, 300, slots=True, rope=True)]
    for (case, _), got in zip(cases, run_under_qemu(name, cases, isa), strict=True):
        check(case.args, got, isa)


@pytest.mark.parametrize("name", ["bf16_259", "f32_80", "f32_libm"])
def test_other_widths_and_maths(name):
    k = kernel(name)
    cases = [
        (make_case(k, shape), way) for shape, way in various(6, 30, slots=False, rope=k.rope > 0)
    ]
    results = run_under_qemu(name, cases, "neon")
    for (case, _), got in zip(cases, results, strict=True):
        check(case.args, got, "neon")


def test_key_and_head_counts_round_every_tile():
    k = kernel("bf16_small")
    cases = []
    for n in (*range(0, 20), *(m + d for m in (24, 32, 48, 64, 128, 256) for d in (-1, 0, 1))):
        shape = Shape(
            lens_q=(1 + n % 2,),
            lens_kv=(n,),
            group=1 + n % 19,
            seed=n,
            sparse_mode=3,
            spread="growing",
        )
        cases.append((make_case(k, shape), Way(flush=("left", "right")[n % 2], chunk_keys=128)))
    results = run_under_qemu("bf16_small", cases, "neon")
    for (case, _), got in zip(cases, results, strict=True):
        check(case.args, got, "neon")


def test_error_rule_on_realistic_scores():
    for name in ("f32_small", "bf16_small"):
        k = kernel(name)
        shape = Shape(lens_q=(12,), lens_kv=(400,), group=8, sparse_mode=3, value=True, seed=7)
        case = make_case(k, shape)
        case = case.changed(scale_value=abs(case.args.scale_value))
        way = Way(chunk_keys=128)
        (got,) = run_under_qemu(name, [(case, way)], "neon")
        check(case.args, got, "neon", strict=True)


def test_the_shipped_header():
    """The DeepSeek shape, the file as it is shipped: 8 heads, 100 of 300 keys, paged."""
    k = kernel(DEEPSEEK)
    shape = Shape(
        lens_q=(2,),
        lens_kv=(300,),
        group=8,
        layout_kv=PA_BSND,
        block_size=16,
        lists="blocks",
        list_length=100,
        sparse_mode=3,
        seed=4,
    )
    case = make_case(k, shape)
    (got,) = run_under_qemu(DEEPSEEK, [(case, Way())], "neon")
    check(case.args, got, "neon")


@pytest.mark.parametrize(
    "name", ["f16_i8_tails", "bf16_fp8_wide", "bf16_i8_alone", "bf16_fp8_page"]
)
def test_any_call_on_records(name):
    k = kernel(name)
    slots, paged = "slots" in header(name).kernels[0].features, bool(k.record.behind)
    drawn = various(7, 120, slots=slots, rope=k.rope > 0, paged=paged)
    cases = []
    for i, (shape, way) in enumerate(drawn):
        spread = RECORD_SPREADS[i % len(RECORD_SPREADS)]
        cases.append((make_case(k, dataclasses.replace(shape, spread=spread)), way))
    for (case, _), got in zip(cases, run_under_qemu(name, cases, "neon"), strict=True):
        check(case.args, got, "neon")


@pytest.mark.parametrize("name", ["f16_i8_tails", "bf16_fp8_page", *SHIPPED_RECORDS])
def test_every_code_of_a_record(name):
    """Rows that see one key each return it: every code but NaN's, which make a row NaN."""
    k = kernel(name)
    count = -(-256 // min(k.dk, k.dv))
    case = single_keys(name, 1, count)
    codes = fields_of(case)["nope"].view(np.uint8)
    codes[...] = np.arange(codes.size).reshape(codes.shape) % 256
    if "fp8" in name:
        codes[codes & 0x7F == 0x7F] = 0
    (got,) = run_under_qemu(name, [(case, Way())], "neon")
    for r in rows(case.args):
        assert (flat(got["attention_out"])[r.row] == r.v).all()
    if "fp8" in name:
        for nan in (0x7F, 0xFF):
            bad = case.changed(key=case.args.key.copy())
            fields_of(bad)["nope"].view(np.uint8)[..., -1] = nan
            (got,) = run_under_qemu(name, [(bad, Way())], "neon")
            assert np.isnan(got["attention_out"]).all()


@pytest.mark.parametrize("name", SHIPPED_RECORDS)
def test_the_shipped_records(name):
    """Few heads and many, a list over pages."""
    k = kernel(name)
    cases = []
    for group in (1, 3, 8, 17, 33):
        shape = Shape(
            lens_q=(2,),
            lens_kv=(60,),
            group=group,
            layout_kv=PA_BSND,
            block_size=16,
            lists="blocks",
            list_length=40,
            sparse_mode=3,
            seed=group,
        )
        cases.append((make_case(k, shape), Way(flush=("left", "right")[group % 2])))
    for (case, _), got in zip(cases, run_under_qemu(name, cases, "neon"), strict=True):
        check(case.args, got, "neon")


def test_partials_order_and_guards_change_no_bit():
    k = kernel("bf16_small")
    shape = Shape(lens_q=(3, 1), lens_kv=(300, 129), group=3, sparse_mode=3, seed=2)
    case = make_case(k, shape)
    ways = [
        Way(flush=f, chunk_keys=128, by_task=t, partials=p)
        for f in ("left", "right")
        for t in (False, True)
        for p in (False, True)
    ]
    cases = [(case, way) for way in ways] + [(case, Way(chunk_keys=256))]
    *same, other = run_under_qemu("bf16_small", cases, "neon")
    for got in same[1:]:
        assert all(same_bits(got[n], same[0][n]) for n in got)
    assert not all(same_bits(other[n], same[0][n]) for n in other), "the control changed no bit"


def test_a_kernel_that_reads_too_far_is_noticed():
    """The control: one more key than there is, under qemu."""
    case = make_case(kernel("bf16_small"), Shape(lens_kv=(9,), lengths_given=False))
    case.extra["seq_kv"] = 10
    with pytest.raises(AssertionError, match="exit"):
        run_under_qemu("bf16_small", [(case, Way())], "neon")


def test_missing_tools_are_an_error(monkeypatch):
    """No cross compiler: a failure that says what to install, not a silent skip."""
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("HEADLIGHT_ALLOW_MISSING", raising=False)
    with pytest.raises(AssertionError, match="apt-get install gcc-aarch64-linux-gnu"):
        need_aarch64()
    monkeypatch.setenv("HEADLIGHT_ALLOW_MISSING", "1")
    with pytest.raises(pytest.skip.Exception):
        need_aarch64()
